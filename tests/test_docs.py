"""README.md and the pages of docs/: the code that they show runs, their figures are measured."""

import json
import re
from pathlib import Path

import pytest

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


def test_the_rows_of_speed_are_measurements():
    readme = pytest.importorskip("readme", exc_type=ImportError)  # it needs matplotlib
    bench = json.loads((ROOT / "docs/results/cpu.json").read_text())
    page = (ROOT / "README.md").read_text()
    assert readme.with_table(page, bench) == page
    slower = {**bench, "rows": [{**row, "ms": 2 * row["ms"]} for row in bench["rows"]]}
    assert readme.with_table(page, slower) != page


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
