"""The growth of time and memory, measured on tiny images."""

import json
from itertools import pairwise, takewhile

from scaling import OPERATIONS, main

from tritonaff.testing import CASES


def test_scaling(capsys, tmp_path):
    path = tmp_path / "scaling.json"
    assert main(["--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert set(content) == {"device", "versions", "all_reduce_ms", "rows"}
    assert 0 < content["all_reduce_ms"] < 1000
    rows = {(row["op"], row["grows"]): row for row in content["rows"]}
    assert {op for op, _ in rows} == set(OPERATIONS) <= set(CASES)
    for (op, grows), row in rows.items():
        assert all(ms > 0 for ms in row["ms"])
        lines = [line.rstrip() for line in printed.splitlines()]
        of_op = lines[lines.index(op.removeprefix("affinity_")) + 1 :]
        values = " ".join(map(str, row["values"]))
        indented = takewhile(lambda line: line.startswith("  "), of_op)
        assert any(line.startswith(f"  {grows} {values} ") for line in indented)
        ratios = [large / small for small, large in pairwise(row["values"])]
        assert set(ratios) == {2}
        if grows in ("images", "rows") and op != "affinity_regression":
            # Sums of several buffers, of which some are of a fixed size.
            assert 3 < row["peak_bytes"][2] / row["peak_bytes"][0] < 5
