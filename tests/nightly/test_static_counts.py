"""The static table: kernels compiled for three GPUs without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

ROOT = Path(__file__).parent.parent.parent
TOOLS = ROOT / "tools"
COMMITTED = json.loads((ROOT / "docs/results/static.json").read_text())


def run_python(*arguments):
    """In a process of its own, without the interpreter, where ``import static_counts`` works."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TOOLS)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def static_table(tmp_path_factory):
    """Kernels compiled for three GPUs, without one, in a process of its own: no interpreter."""
    path = tmp_path_factory.mktemp("static") / "static.json"
    printed = run_python("static_counts.py", "--json", path)
    assert max(map(len, printed.splitlines())) <= 80
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


def test_no_kernel_spills(static_table):
    """A word or two outside of the loops may spill: the assembler keeps to 128 registers, so that
    more warps fit, at no cost, and every version does so somewhere. Too large a block spills
    hundreds.
    """
    version = static_table["versions"]["triton"]
    if version.startswith("3.6."):
        pytest.skip("Triton 3.6 puts lanes along classes, of which affinity regression has all")
    pinned = version == COMMITTED["versions"]["triton"]
    spilled = {kernel_of(row): row["spills"] for row in static_table["kernels"] if row["spills"]}
    assert all(words <= (2 if pinned else 16) for words in spilled.values()), spilled


def test_no_kernel_has_grown(static_table):
    """Instructions per element, within 10 % of docs/results/static.json. To commit larger counts,
    run `python tools/static_counts.py --json docs/results/static.json` with the Triton named there.
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


def test_implied_times():
    """A kernel of 43 bytes and 33 instructions per element on an H200, 19 elements a pixel."""
    script = """
import static_counts as static
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
    run_python("-c", script)


def test_kernels_compile_for_sizes_of_1_and_multiply_in_full_precision():
    """The interpreter hides two faults: Triton takes an argument of 1 for a constant, and products
    of float32 have 10 bits on tensor cores.
    """
    script = """
from launches import compile_launch
from static_counts import measured
for each in measured("sm_90"):
    kernel, _, arguments = each.launch
    sizes = [
        name for name in kernel.arg_names
        if type(arguments[name]) is int and name not in each.launch.constants()
    ]
    ones = arguments | dict.fromkeys(sizes, 1)
    compile_launch(each.launch._replace(arguments=ones), "sm_90")
    assert "tf32" not in compile_launch(each.launch, "sm_90").asm["ptx"], kernel
"""
    run_python("-c", script)


def test_kernels_compile_for_sizes_that_no_strip_reaches():
    """The other value of every switch of the affinity field's kernels."""
    script = """
import itertools
from assembly import nvidia_code
from launches import compile_launch
from static_counts import measured
from tritonaff.kernels.affinity_field import passes
_, far = passes([3, 13, 65])
assert far["RADII"] == (6, 32)
for each, aligned in itertools.product(measured("sm_90"), (False, True)):
    switches = {**far, "REPLACE": True, "ADD": True, "CROSS_ENTROPY": False, "ALIGNED": aligned}
    arguments = each.launch.arguments
    if "REACH" in arguments:
        other = {name: switches.get(name, value) for name, value in arguments.items()}
        compiled = compile_launch(each.launch._replace(arguments=other), "sm_90")
        registers, spills, _ = nvidia_code(compiled.asm["cubin"])
        assert spills == 0, (each.launch.name, spills)
"""
    run_python("-c", script)


def test_instructions_in_a_loop_count_as_often_as_it_runs():
    script = """
from assembly import count_instructions
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
    run_python("-c", script)
