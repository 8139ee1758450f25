"""README.md and the pages of docs/: the code that they show runs, their figures are measured."""

import json
import re
import socket
from pathlib import Path

import pytest
import torch
from test_adapters import Images, arguments, segformer
from test_training_loops import Step
from torch import nn
from vision import import_torchvision

import tritonaff

ROOT = Path(__file__).parent.parent


def python_blocks(page):
    """The blocks of Python of a page, each with its first line's number."""
    text = (ROOT / page).read_text()
    blocks = re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [
        pytest.param(block[1], id=f"{page}:{text[: block.start(1)].count(chr(10)) + 1}")
        for block in blocks
    ]


@pytest.mark.parametrize("block", python_blocks("README.md"))
def test_blocks_of_the_readme_run_as_they_stand(block):
    names = {}
    exec(block, names)
    # A network that knows nothing pays the margin, 3, beside the logarithm of 19.
    assert 5 < names["loss"].item() < 7


# The libraries of the extra "adapters": a block that imports a missing one is skipped.
LIBRARIES = "accelerate", "mmengine", "monai", "timm", "transformers"


@pytest.fixture
def names(device, tmp_path, monkeypatch):
    """The names that the pages take for granted: a network, images, labels, tritonaff's."""
    images = torch.randn(2, 3, 16, 16, device=device)
    target = torch.randint(0, 4, (2, 16, 16), device=device)
    logits = torch.randn(2, 4, 16, 16, device=device, requires_grad=True)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    yield {
        **vars(tritonaff),
        "torch": torch,
        "device": device,
        "images": images,
        "target": target,
        "logits": logits,
        "optimizer": torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=0.1),
        "ce": nn.CrossEntropyLoss(ignore_index=255),
        "micro_batches": [(images, target)] * 2,
        "outputs": [logits, logits[:, :, ::2, ::2]],
        "half_logits": logits[:, :, ::2, ::2],
        "large_target": target.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2),
        "ids": target,
        "rgb": torch.full((2, 3, 16, 16), 0.5, device=device),
        "boxes": torch.tensor([[2.0, 3.0, 12.0, 9.0], [0.0, 0.0, 7.0, 7.0]], device=device),
        "image_index": torch.arange(2, device=device),
        "y_pred": logits[:, :1],
        "y_true": (target == 1)[:, None].float(),
        "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    }
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("block", python_blocks("docs/which-loss.md"))
def test_blocks_for_a_network_train_it(names, block):
    labels = torch.stack([names["target"] == k for k in range(4)], dim=1)
    exec(block, names | {"labels": labels, "step": 1, "steps": 2})
    assert names["logits"].grad.abs().sum() > 0


@pytest.mark.parametrize("block", python_blocks("docs/training-loops.md"))
def test_blocks_of_training_loops_run(names, block, tmp_path):
    step = Step(num_classes=19).to(names["device"])
    names |= {"step": step, "model": step.net, "aaf": step.aaf}
    names["labels"] = names["target"][:, None].float()
    if "pos_weight" in block:  # of a single channel
        names |= {"logits": names["y_pred"], "target": names["y_true"]}
    if re.search("transformers|timm", block):
        import_torchvision()
    if "transformers" in block:
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        names |= {"segformer": segformer(transformers), "arguments": arguments(tmp_path)}
        names["dataset"] = Images(2)
    try:
        exec(block, names)
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] not in LIBRARIES:
            raise
        pytest.skip(str(error))
    if "loss" in names:
        assert names["loss"].isfinite()


def test_the_rows_of_speed_are_measurements():
    readme = pytest.importorskip("readme", exc_type=ImportError)  # it needs matplotlib
    bench = json.loads((ROOT / "docs/results/cpu.json").read_text())
    page = (ROOT / "README.md").read_text()
    assert readme.with_table(page, bench) == page
    slower = {**bench, "rows": [{**row, "ms": 2 * row["ms"]} for row in bench["rows"]]}
    assert readme.with_table(page, slower) != page


def test_the_scores_of_cracks_are_those_of_the_trainings():
    lines = (ROOT / "docs/results/cracks.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    page = (ROOT / "docs/which-loss.md").read_text()
    for loss in ("bce", "bce+field"):
        for score in ("f1", "miou"):
            scores = [row["test"][score] for row in rows if row["loss"] == loss]
            assert len(scores) == 3
            mean = sum(scores) / 3
            assert f"{mean:.3f} ({min(scores):.3f} to {max(scores):.3f})" in page
    assert f"--steps {rows[0]['steps']}" in page


def test_the_times_beside_a_busy_process_are_measurements():
    page = (ROOT / "docs/native.md").read_text()
    for row in json.loads((ROOT / "docs/results/busy.json").read_text())["rows"]:
        times = f"{row['alone_ms']:.1f}, {row['beside_ms']:.1f} ms: {row['times']:.1f} x"
        assert times in page


def test_native_kernels_are_shown_once_they_are_measured():
    readme = pytest.importorskip("readme", exc_type=ImportError)
    row = {"op": "affinity_field", "mode": "fwd_bwd", "dtype": "float32", "peak_bytes": 1e6}
    times = {"reference": 8.0, "portable": 4.0, "native": 2.0, "cross_entropy": 1.0}
    rows = [
        {**row, "impl": name, "ms": size * ms, "shape": [1, 2, size, size]}
        for size in (2, 4)
        for name, ms in times.items()
    ]
    (shown,) = readme.rows_of_speed({"rows": [*rows, {**rows[0], "mode": "fwd", "ms": 100.0}]})
    assert (shown["shape"], shown["ours"]["impl"]) == ((1, 2, 4, 4), "native")
    (shown,) = readme.rows_of_speed({"rows": [r for r in rows if r["impl"] != "native"]})
    assert shown["ours"]["ms"] == 16


def test_the_site_has_every_public_name():
    """The pages of docs/api name what the docstrings are taken from."""
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/api").glob("*.md"))
    shown = set(re.findall(r"auto(?:function|class):: (?:tritonaff\.)?(\w+)$", pages, re.MULTILINE))
    assert set(tritonaff.__all__) - {"__version__"} <= shown
    index = (ROOT / "docs/index.md").read_text()
    pages = {*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/api").glob("*.md")}
    names = {str(path.relative_to(ROOT / "docs").with_suffix("")) for path in pages}
    assert names - {"index"} <= set(re.findall(r"^(\S+)$", index, re.MULTILINE))
