"""The notebook of examples/, executed: on a drawn scene and on an image of the reader's."""

from pathlib import Path

import pytest

import tritonaff

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
np = pytest.importorskip("numpy")
Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

NOTEBOOK = Path(__file__).parent.parent.parent / "examples/affinity.ipynb"


def execute(monkeypatch, **names):
    """The printed lines and the number of pictures of the notebook with other values of names."""
    paths = [str(Path(tritonaff.__file__).parent.parent), str(NOTEBOOK.parent)]
    monkeypatch.setenv("PYTHONPATH", ":".join(paths))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in names.items():
        lines = first.source.splitlines()
        (index,) = (k for k, line in enumerate(lines) if line.startswith(f"{name} ="))
        lines[index] = f"{name} = {value!r}"
        first.source = "\n".join(lines)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, sum("image/png" in output.get("data", ()) for output in outputs)


def test_a_drawn_scene(monkeypatch):
    printed, pictures = execute(monkeypatch)
    losses = [float(line.split()[3]) for line in printed.splitlines() if line.startswith("step")]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert pictures == 5


def test_an_image_of_the_reader(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (10, 12)).repeat(5, 0).repeat(5, 1).astype(np.uint8)
    labels[:3] = 9
    Image.fromarray(rng.integers(0, 256, (50, 60, 3)).astype(np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(labels).save(tmp_path / "b.png")
    names = {"IMAGE": str(tmp_path / "a.png"), "LABELS": str(tmp_path / "b.png"), "IGNORE": 9}
    printed, pictures = execute(monkeypatch, **names)
    assert printed.count("step") == 5
    assert pictures == 5
