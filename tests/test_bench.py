"""The bench: it refuses wrong implementations, and what it prints and writes can be read."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import torch

import tritonaff
from tritonaff.bench import __main__, measure
from tritonaff.bench.__main__ import main
from tritonaff.testing import (
    CASES,
    ParityError,
    check_parity,
    differentiable,
    make_inputs,
)

QUICK_ALL = ["run", "--quick", "--device", "cpu", "--impl", "reference,portable"]
QUICK = [*QUICK_ALL, "--op", "affinity_field"]


def test_rows(capsys, tmp_path):
    path = tmp_path / "rows.json"
    assert main([*QUICK_ALL, "--mode", "fwd,fwd_bwd", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line in CASES] == list(CASES)
    assert "CPU" in printed
    assert f"torch {torch.__version__}" in printed
    content = json.loads(path.read_text())
    assert set(content) == {"device", "versions", "rows"}
    assert [(row["op"], row["impl"], row["mode"]) for row in content["rows"]] == [
        (op, impl, mode)
        for op in CASES
        for mode in ("fwd", "fwd_bwd")
        for impl in ("reference", "portable", "cross_entropy")
    ]
    for row in content["rows"]:
        assert list(row) == [
            "op", "impl", "mode", "dtype", "shape", "ms", "speedup_eager", "speedup_compiled",
            "compile_s", "peak_bytes", "gb_per_s",
        ]  # fmt: skip
        assert row["ms"] > 0
        assert row["peak_bytes"] > 0
        assert row["speedup_compiled"] is None
        assert (row["impl"] == "reference") == (row["speedup_eager"] == 1)
        assert f"{row['ms']:.2f}" in printed


def test_what_no_memory_holds_is_named_and_left_out(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("tritonaff.checks.MAX_MATRIX_BYTES", 14_000_000)
    path = tmp_path / "rows.json"
    arguments = ["--op", "affinity_regression_every_pixel", "--json", str(path)]
    arguments += ["--shape", "1,3,5,6", "1,3,20,100"]
    assert main([*QUICK_ALL, "--mode", "fwd", *arguments]) == 0
    printed = capsys.readouterr().out
    assert "not run: affinity_regression_every_pixel 1,3,20,100 reference: affinity matr" in printed
    content = json.loads(path.read_text())
    (left_out,) = content["left_out"]
    assert (left_out["impl"], left_out["shape"]) == (["reference"], [1, 3, 20, 100])
    implementations = [(row["shape"][2], row["impl"]) for row in content["rows"]]
    assert (5, "reference") in implementations
    assert (20, "portable") in implementations
    assert (20, "reference") not in implementations


def wrong_sign(function, place):
    def wrong(*args, **options):
        results = function(*args, **options)
        if isinstance(results, torch.Tensor):
            return -results
        results = list(results)
        if results[place] is not None:
            results[place] = -results[place]
        return tuple(results)

    return wrong


@pytest.mark.parametrize(
    ("op", "part", "place"),
    [
        ("affinity_field", "statistics", 0),
        ("affinity_field", "compute", 0),
        ("affinity_field", "compute", 3),
        ("affinity_propagation", "forward", 0),
        ("affinity_propagation", "backward", 0),
    ],
)
def test_it_refuses_to_time_a_wrong_implementation(monkeypatch, capsys, tmp_path, op, part, place):
    portable = importlib.import_module(f"tritonaff.portable.{op}")
    monkeypatch.setattr(portable, part, wrong_sign(getattr(portable, part), place))
    path = tmp_path / "rows.json"
    assert main([*QUICK, "--op", op, "--json", str(path)]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"{op} portable" in printed.err
    assert not path.exists()


def test_it_refuses_to_time_what_goes_wrong_only_on_large_images(monkeypatch, capsys):
    """Blocks left out: the corner that is compared in full has one block only."""
    from tritonaff.portable import affinity_field as portable

    blocks = portable.blocks
    monkeypatch.setattr(portable, "blocks", lambda logits: list(blocks(logits))[:1])
    assert main([*QUICK, "--shape", "1,5,256,512"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "portable: loss of the inputs to time is off" in printed.err


def test_parity_sees_one_wrong_border_pixel(monkeypatch):
    from tritonaff.portable import affinity_field as portable

    compute = portable.compute

    def wrong(*args, **options):
        *tables, gradient = compute(*args, **options)
        if gradient is not None:
            gradient[..., -1, -1] *= 1.01
        return *tables, gradient

    monkeypatch.setattr(portable, "compute", wrong)
    with pytest.raises(ParityError, match="gradient is off by"):
        check_parity(CASES["affinity_field"], "portable", *make_inputs((1, 5, 24, 24)))


def test_peak_bytes_counts_what_lives_at_one_time():
    def run(_):
        first = torch.empty(1000, dtype=torch.float32)
        del first
        return torch.empty(1500, dtype=torch.float32), torch.empty(500, dtype=torch.float32)

    assert measure.peak_bytes(run, torch.device("cpu")) == pytest.approx(8000, rel=0.1)


def test_portable_memory_is_at_most_eight_times_the_logits():
    """Random labels too, of which nearly every pair is an edge."""
    logits, target = make_inputs((1, 19, 256, 512))
    case = CASES["affinity_field"]
    for labels in (target, torch.randint(0, 19, target.shape)):
        result = measure.measure(case, "portable", ("fwd_bwd",), (logits, labels), quick=True)
        assert result.by_mode["fwd_bwd"].peak_bytes <= 8 * logits.nbytes


def test_portable_propagation_holds_its_iterates_and_gates():
    """Those of one large image, whatever the batch."""
    case = CASES["affinity_propagation"]

    def peak(inputs):
        def forward_backward(_):
            with tritonaff.use_backend("portable"):
                torch.autograd.grad(case.loss(*leaves), differentiable(leaves))

        leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
        return measure.peak_bytes(forward_backward, torch.device("cpu"))

    logits, _, affinity = one = case.make_inputs((1, 19, 160, 192))
    assert peak(one) <= 16 * logits.nbytes + 3.5 * affinity.nbytes
    # What an image more costs is what goes in and out of the operation.
    three = case.make_inputs((3, 19, 160, 192))
    assert peak(three) - peak(one) <= 2 * (5 * logits.nbytes + affinity.nbytes)


def test_interpreted_tiles_are_not_timed(capsys):
    assert main(["run", "--quick", "--device", "cpu", "--impl", "triton"]) == 1
    assert "not timed" in capsys.readouterr().err


def test_list(capsys):
    assert main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(op in printed for op in CASES)


@pytest.mark.parametrize("device", ["nonsense", "meta", "hpu", "vulkan"])
def test_a_device_that_cannot_compute(capsys, device):
    assert main(["run", "--quick", "--device", device]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"tritonaff-bench: device {device} cannot be used: ")


def test_shapes_beyond_memory_are_named_and_left_out(capsys, tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    huge = "64,1000,100000,10000"  # 512 TB of float64
    arguments = [*QUICK, "--mode", "fwd", "--json", str(path), "--shape"]
    assert main([*arguments, huge]) == 1
    reason = "reference,portable: needs more memory than cpu has"
    expected = f"tritonaff-bench: not run: affinity_field {huge} {reason}\n"
    assert capsys.readouterr() == ("", expected)
    assert not path.exists()

    assert main([*arguments, huge, "1,3,5,6"]) == 0
    assert f"not run: affinity_field {huge} {reason}\n" in capsys.readouterr().out
    content = json.loads(path.read_text())
    (left_out,) = content["left_out"]
    assert left_out["shape"] == [64, 1000, 100000, 10000]
    assert {tuple(row["shape"]) for row in content["rows"]} == {(1, 3, 5, 6)}

    def broken(*args):
        raise RuntimeError("something else")

    monkeypatch.setattr(measure, "measure", broken)
    with pytest.raises(RuntimeError, match="something else"):
        main([*arguments, "1,3,5,6"])


@pytest.mark.parametrize("command", ["run", "static", "scaling"])
@pytest.mark.parametrize("place", ["", "file/rows.json"])
def test_where_json_cannot_go_is_said_before_anything_is_measured(
    capsys, tmp_path, monkeypatch, command, place
):
    def measured(args):
        raise AssertionError("it was measured")

    monkeypatch.setattr(__main__, f"_{command}", measured)
    (tmp_path / "file").write_text("")
    assert main([command, "--json", str(tmp_path / place)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(r"tritonaff-bench: \[Errno \d+\] .*" + re.escape(str(tmp_path)), line)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_takes_one_line(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, "measure", interrupted)
    assert main(QUICK) == 130
    assert capsys.readouterr() == ("", "tritonaff-bench: interrupted\n")


def test_compiled_is_not_measured_without_a_compiler(capsys, monkeypatch):
    monkeypatch.setattr(measure, "compiler_works", lambda device: False)
    assert main(["run", "--quick", "--device", "cpu", "--impl", "compiled"]) == 1
    assert "compiled needs a C++ compiler" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--impl", "fast"],
        ["--shape", "1,2,3"],
        ["--shape", "99999999999,9,99999999999,1"],
        ["--mode", "x"],
    ],
)
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit):
        main(["run", *arguments])


COMMITTED = json.loads((Path(__file__).parent.parent / "docs/results/static.json").read_text())


def without_interpreter():
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


@pytest.fixture(scope="module")
def static_table(tmp_path_factory):
    """Every tile compiled for three GPUs, without one, in a process of its own: no interpreter."""
    pytest.importorskip("triton", minversion="3.6")
    path = tmp_path_factory.mktemp("static") / "static.json"
    command = [sys.executable, "-m", "tritonaff.bench", "static", "--json", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env=without_interpreter())
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 80
    return json.loads(path.read_text())


def kernel_of(row):
    return row["op"], row["kernel"], row["target"]


def test_static(static_table):
    assert set(static_table) == set(COMMITTED)
    assert [kernel_of(row) for row in static_table["kernels"]] == [
        kernel_of(row) for row in COMMITTED["kernels"]
    ]
    for row in static_table["kernels"]:
        assert row["registers"] > 0
        assert row["instructions_per_element"]["memory"] > 0
        assert row["bytes_per_element"] > 0


def test_every_kernel_is_in_the_static_table():
    static = {(row["op"], row["kernel"]) for row in COMMITTED["kernels"]}
    static = {(OPS_OF_VARIANTS.get(op, op), kernel) for op, kernel in static}
    source = Path(tritonaff.__file__).parent / "kernels"
    kernels = {
        (file.stem, name)
        for file in source.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert static == kernels


OPS_OF_VARIANTS = {
    "affinity_field_cross_entropy": "affinity_field",
    "affinity_field_cross_entropy_bfloat16": "affinity_field",
    "affinity_field_backward": "affinity_field",
    "affinity_field_unaligned": "affinity_field",
    "affinity_regression_every_pixel": "affinity_regression",
    "affinity_regression_150_classes": "affinity_regression",
    "square_root_affinity": "affinity_regression",
}


def test_no_kernel_spills(static_table):
    """But for a word or two outside of the loops, for which the assembler keeps to 128 registers:
    more warps fit, it costs nothing, and every version does it elsewhere. A tile that is too large
    spills hundreds.
    """
    version = static_table["versions"]["triton"]
    if version.startswith("3.6."):
        pytest.skip("Triton 3.6 puts lanes along classes, of which affinity regression has all")
    pinned = version == COMMITTED["versions"]["triton"]
    spilled = {kernel_of(row): row["spills"] for row in static_table["kernels"] if row["spills"]}
    assert all(words <= (2 if pinned else 16) for words in spilled.values()), spilled


def test_no_kernel_has_grown(static_table):
    """Instructions per element, within 10 % of docs/results/static.json. Where more are wanted,
    `tritonaff-bench static --json docs/results/static.json` with the Triton it names commits them.
    """
    if static_table["versions"]["triton"] != COMMITTED["versions"]["triton"]:
        pytest.skip(f"counts hold for Triton {COMMITTED['versions']['triton']}")
    committed = {kernel_of(row): row for row in COMMITTED["kernels"]}
    grown = {
        kernel_of(row): (row["instructions_per_element"]["all"], before)
        for row in static_table["kernels"]
        for before in [committed[kernel_of(row)]["instructions_per_element"]["all"]]
        if row["instructions_per_element"]["all"] > 1.1 * before
    }
    assert not grown


def test_ci_installs_the_triton_of_the_committed_table():
    """Else nothing would notice that a kernel has grown."""
    constraints = (Path(__file__).parent.parent / ".ci/constraints.txt").read_text()
    assert f"triton=={COMMITTED['versions']['triton']}" in constraints.splitlines()


def test_implied_times():
    """A kernel of 43 bytes and 33 instructions per element on an H200, 19 elements a pixel."""
    pytest.importorskip("triton", minversion="3.6")
    script = """
from tritonaff.bench import static
row = dict(op="o", kernel="k", target="sm_90", launches=2, elements_per_pixel=19,
           bytes_per_element=43.0, instructions_per_element=dict(all=33.0),
           instructions_per_thread=1000)
pixels = 8 * 512 * 512
(implied,) = static.implied_times([row])
assert implied["gpu"] == "H200" and implied["bound"] == "bytes", implied
assert implied["ps_per_element"] == 10 and implied["percent_of_copy"] == 100, implied
assert abs(implied["ms"] - 2 * 1e-8 * 19 * pixels) < 1e-4, implied
(implied,) = static.implied_times([{**row, "instructions_per_element": dict(all=3345.4)}])
assert implied["bound"] == "instructions" and implied["percent_of_copy"] == 10, implied
assert abs(implied["ps_per_element"] - 100) < 0.1, implied
(implied,) = static.implied_times([{**row, "instructions_per_thread": 1.98e9}])
assert implied["bound"] == "one program" and implied["ms"] == 2000, implied
assert abs(static.cross_entropy_ms("H200") - 20 * 19 * pixels / 4.3e9) < 1e-6
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=without_interpreter())


def test_tiles_compile_for_sizes_of_1_and_multiply_in_full_precision():
    """Neither can be seen in the interpreter: Triton takes an argument of 1 for a constant, and
    products of float32 have 10 bits on tensor cores.
    """
    pytest.importorskip("triton", minversion="3.6")
    script = """
from tritonaff.bench import static
for tile in static.TILES:
    static.compile_tile(tile, "sm_90", size_1=True)
    assert "tf32" not in static.compile_tile(tile, "sm_90").asm["ptx"], tile.kernel
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=without_interpreter())


def test_tiles_compile_for_sizes_that_no_strip_reaches():
    """The other side of every switch of the affinity field's tiles."""
    pytest.importorskip("triton", minversion="3.6")
    script = """
import itertools
from dataclasses import replace
from tritonaff.bench import static
_, far = static.affinity_field.passes([3, 13, 65])
assert far["RADII"] == (6, 32)
for tile, aligned in itertools.product(static.TILES, (False, True)):
    switches = {**far, "REPLACE": True, "ADD": True, "CROSS_ENTROPY": False, "ALIGNED": aligned}
    if "REACH" in tile.blocks and "sm_90" in tile.targets:
        other = {name: switches.get(name, size) for name, size in tile.blocks.items()}
        registers, spills, _ = static._nvidia(
            static.compile_tile(replace(tile, blocks=other), "sm_90").asm["cubin"]
        )
        assert spills == 0, (tile.kernel, spills)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=without_interpreter())


def test_instructions_in_a_loop_count_as_often_as_it_runs():
    pytest.importorskip("triton", minversion="3.6")
    script = """
from tritonaff.bench.static import count_instructions
nvidia = '''
        /*0000*/                   LDG.E R2, [R2] ;
.L_x_0:
        /*0010*/                   MUFU.EX2 R4, R2 ;
        /*0020*/              @!P0 FADD R4, R4, R2 ;
        /*0030*/               @P0 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
.L_x_1:
        /*0050*/                   BRA `(.L_x_1);
        /*0060*/                   NOP;
'''
assert count_instructions(nvidia, 8) == dict(memory=1, special=8, arithmetic=8, control=8 + 1)
amd = '''
\\tglobal_load_dword v1, v0, s[0:1]
.LBB0_1:                                ; the loop
\\tv_exp_f32_e32 v1, v1
\\tv_add_f32_e32 v1, v1, v2
\\ts_cbranch_scc1 .LBB0_1
\\ts_endpgm
'''
assert count_instructions(amd, 4) == dict(memory=1, special=4, arithmetic=4, control=4 + 1)
# Two loops in one another, and code at the end that jumps back without closing a loop.
nested = '''
        /*0000*/               @P3 BRA `(.L_x_9) ;
.L_x_8:
        /*0010*/                   IADD R1, R1, R2 ;
.L_x_1:
        /*0020*/                   MUFU.RCP R4, R2 ;
.L_x_2:
        /*0030*/                   LDG.E R2, [R2] ;
        /*0040*/               @P0 BRA `(.L_x_2) ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_9:
        /*0070*/                   IADD R1, R1, R3 ;
        /*0080*/                   BRA `(.L_x_8) ;
'''
assert count_instructions(nested, 2, 5) == dict(
    arithmetic=2, special=2, memory=2 * 5, control=1 + 2 * 5 + 2 + 1 + 1
)
assert count_instructions(nested, 2, 5) == count_instructions(nested, 2, 1, 5)
try:
    count_instructions(nested, 2)
except ValueError as error:
    assert "2 loops in one another" in str(error)
else:
    raise AssertionError("one trip count was enough for two loops")
# A call of a label far away ends a loop as a jump does; subroutines are left out.
far = '''
.L_x_0:
        /*0000*/                   MUFU.RCP R4, R2 ;
        /*0010*/               @P4 CALL.REL.NOINC `(.L_x_1) ;
        /*0020*/                   BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   IADD R1, R1, R3 ;
        /*0040*/          BRA.DIV UR4, `(.L_x_3) ;
        /*0050*/                   EXIT ;
$__internal_0_$__cuda_sm20_div_s64:
        /*0060*/                   IADD R1, R1, R3 ;
        /*0070*/                   RET.REL.NODEC R30 `(gram_kernel) ;
.L_x_3:
        /*0080*/                   IADD R1, R1, R3 ;
'''
assert count_instructions(far, 3) == dict(special=3, arithmetic=1, control=3 * 2 + 2)
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=without_interpreter())


def test_scaling(capsys, tmp_path):
    path = tmp_path / "scaling.json"
    assert main(["scaling", "--quick", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    content = json.loads(path.read_text())
    assert set(content) == {"device", "versions", "all_reduce_ms", "rows"}
    assert 0 < content["all_reduce_ms"] < 1000
    rows = {(row["op"], row["grows"]): row for row in content["rows"]}
    assert {op for op, _ in rows} == set(CASES)
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


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_that_of_what_is_measured(tmp_path, monkeypatch):
    def git(*arguments):
        author = ["-c", "user.name=a", "-c", "user.email=a"]
        subprocess.run(["git", *author, *arguments], cwd=tmp_path, check=True)

    for file in ("package/code.py", "tests/test.py", "docs/results/gpu.json"):
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message", "first")
    monkeypatch.setattr(__main__, "__file__", str(tmp_path / "package/code.py"))
    commit = __main__.versions()["commit"]
    assert re.fullmatch("[0-9a-f]{7,}", commit)
    (tmp_path / "docs/results/gpu.json").write_text("2")
    assert __main__.versions()["commit"] == commit
    (tmp_path / "tests/test.py").write_text("2")
    assert __main__.versions()["commit"] == f"{commit}-dirty"
