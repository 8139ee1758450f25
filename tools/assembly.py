"""Counts the instructions that a thread executes, from the assembly of NVIDIA and AMD."""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path

import triton


def nvidia_code(cubin: bytes) -> tuple[int, int, str]:
    """Registers, spilled words and assembly."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "-res-usage", file.name)
        assembly = _run(str(tools / "nvdisasm"), "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return registers, int(re.findall(r"STACK:(\d+)", usage)[0]) // 4, assembly


def amd_code(assembly: str) -> tuple[int, int, str]:
    """Registers, spilled words and assembly."""

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    return field("vgpr_count"), field("vgpr_spill_count"), assembly


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(assembly: str, *trips: float) -> dict[str, float]:
    """Instructions that a thread executes, by kind. ``trips`` are the trips of loops, the
    outermost first; a 1 stands for a loop that the compiler has unrolled, and is left out.

    Code that the entry does not reach is left out: padding, and subroutines for operands that do
    not occur. The path for a warp with diverged lanes is left out too.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    jumps: dict[int, tuple[str, bool]] = {}
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(names)
        instruction = INSTRUCTION.match(line)
        if not instruction or instruction["name"] in ("NOP", "s_nop"):
            continue
        name, rest = instruction["name"], instruction["rest"]
        label = re.search(r"(\.L\w+)", rest)
        if label and JUMPS(name) and not rest.startswith(".DIV"):
            always = name in ("BRA", "s_branch") and not instruction["predicate"]
            jumps[len(names)] = label[1], always
        elif name in ENDS and not instruction["predicate"]:
            jumps[len(names)] = "", True
        names.append(name)

    def after(i: int) -> list[int]:
        label, always = jumps.get(i, ("", False))
        return [*([labels[label]] if label else []), *([] if always else [i + 1])]

    # Straight pieces: from an entry to before the next one.
    entries = sorted({0, *(j for i in jumps for j in (*after(i), i + 1) if j < len(names))})
    pieces = [range(i, j) for i, j in zip(entries, [*entries[1:], len(names)], strict=True)]
    index = {piece.start: i for i, piece in enumerate(pieces)}
    successors = {
        i: {index[j] for j in after(piece[-1]) if j in index} for i, piece in enumerate(pieces)
    }
    times = [n for n in trips if n != 1]
    counts: dict[str, float] = defaultdict(float)
    for i, depth in loop_depths(successors).items():
        if depth > len(times):
            raise ValueError(f"the code has {depth} loops in one another, told are {trips}")
        for name in pieces[i]:
            counts[kind_of(names[name])] += math.prod(times[:depth])
    return counts


# A line of nvdisasm, "/*0010*/ @!P0 IMAD.MOV R1, ...;", or of AMD's assembly, "v_add_f32 v1, ...".
INSTRUCTION = re.compile(
    r"\s+(?:/\*[0-9a-f]{4,}\*/\s+(?P<predicate>@\S+\s+)?)?"
    r"(?P<name>[A-Za-z][A-Za-z0-9_]*)(?P<rest>.*)"
)
# A call of a label within the code is a jump far away.
JUMPS = re.compile(r"BRA|CALL|s_c?branch.*").fullmatch
ENDS = ("EXIT", "RET", "s_endpgm")


def loop_depths(successors: dict[int, set[int]], entry: int = 0) -> dict[int, int]:
    """Number of loops around every node that the entry reaches.

    A jump backwards need not close a loop: compilers put rarely executed code at the end, and this
    code jumps back to its origin. A loop is a set of nodes that reach each other.
    """
    depths = dict.fromkeys(_reached(successors, entry) | {entry}, 0)
    reached = {i: _reached(successors, i) for i in depths}
    done: set[int] = set()
    for i in depths:
        if i in reached[i] and i not in done:
            loop = {j for j in reached[i] if i in reached[j]}
            done |= loop
            heads = {k for j in depths if j not in loop for k in successors[j] & loop} or {entry}
            head = min(heads)
            # Without the way back to its head a loop is open; any loop that remains is inside it.
            inside = {j: (successors[j] & loop) - {head} for j in loop}
            for j, depth in loop_depths(inside, head).items():
                depths[j] = depth + 1
    return depths


def _reached(successors: dict[int, set[int]], start: int) -> set[int]:
    reached: set[int] = set()
    waiting = [start]
    while waiting:
        new = successors[waiting.pop()] - reached
        reached |= new
        waiting += new
    return reached


def kind_of(name: str) -> str:
    if re.match(r"SHFL|ds_bpermute|ds_swizzle|v_permlane|v_readlane", name):
        return "shuffle"
    if re.match(r"(LD|ST)[GSLC]?$|LDGSTS|ATOM|global_|flat_|buffer_|scratch_|ds_|s_load", name):
        return "memory"
    if re.match(r"MUFU|v_(exp|log|rcp|rsq|sqrt)_", name):
        return "special"
    if re.match(
        r"BRA|EXIT|BAR|BSSY|BSYNC|WARPSYNC|RET|CALL|s_cbranch|s_branch|s_barrier|s_waitcnt|s_endpgm",
        name,
    ):
        return "control"
    return "arithmetic"
