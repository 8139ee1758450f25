"""What the compiler makes of every tile, for three GPUs, without a GPU: exact, repeatable
figures.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tritonaff.kernels import (
    affinity_field,
    affinity_propagation,
    affinity_regression,
    dilated_affinity,
)
from tritonaff.rates import rate_offsets

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
NUM_WARPS = 4
KINDS = ("memory", "shuffle", "special", "arithmetic", "control")


@dataclass(frozen=True)
class Tile:
    """A kernel as its launcher calls it: 19 classes, 3 sizes or 4 rates, float32, contiguous."""

    op: str
    kernel: Any
    blocks: dict[str, Any]
    elements: int
    """Elements, a class of a pixel each, that one program works on."""
    trips: int = 1
    """How often its loops run."""


# On no device: the launchers then give a GPU's blocks, not those that the interpreter likes.
LOGITS = torch.empty(1, 19, 256, 512, device="meta")
BATCH = torch.empty(8, 19, 512, 512, device="meta")
# A strip owns fewer columns and rows than it reads.
STRIP_ROWS = affinity_field.rows(BATCH)
((SIZES, STRIP, PATCH),) = affinity_field.parts([3, 5, 7], BATCH)
STRIP_ELEMENTS = BATCH.numel() // affinity_field.strip_grid(BATCH)[0]
STRIP_TRIPS = -(-(STRIP_ROWS + 2 * SIZES["REACH"]) // STRIP["UNROLL"])
PATCH_ELEMENTS = 19 * PATCH["BLOCK_H"] * PATCH["BLOCK_W"]
PATCHES = affinity_field.patch_programs(BATCH)
SUM_OF_TABLES: dict[str, Any] = {"BLOCK": affinity_field.BLOCK_SUM, "num_warps": 8}
PIXELS = affinity_field.pixel_blocks(BATCH)
PIXEL_ELEMENTS = 19 * PIXELS["BLOCK_P"]
PIXEL_TRIPS = -(-19 // PIXELS["BLOCK_C"])
GRIDS: dict[str, Any] = {"GRIDS": (12, 6)}
PAIRS = affinity_regression.pairs_blocks(LOGITS, points=180)
PAIRS_GRADIENT = affinity_regression.pairs_gradient_blocks(LOGITS, points=180)
GRAM = affinity_regression.gram_blocks(LOGITS)
GRADIENT = affinity_regression.gradient_blocks(LOGITS)
MATRIX = affinity_regression.matrix_blocks(LOGITS)
RATES = (8, 8, 16, 16, 32, 32, 64, 64)
GATES = {"FROM_LOGITS": True, **affinity_propagation.gates_tile(LOGITS)}
GATE_ELEMENTS = 4 * len(RATES) * GATES["BLOCK_P"]
ALL_CLASSES = affinity_propagation.tile(LOGITS)
NOT_FIRST = {"IS_FIRST": False, "NEEDS_P": True, "NEEDS_GATES": True}
SUM = {"RATES": RATES, **ALL_CLASSES}
SUM_ELEMENTS = 19 * ALL_CLASSES["BLOCK_P"]
OFFSETS = rate_offsets(((8, 8), (16, 16), (32, 32), (64, 64)))
SIGNALS: dict[str, Any] = dilated_affinity.blocks(LOGITS, OFFSETS, group_size=8)
NUM_SIGNALS = len(OFFSETS) // 2 * SIGNALS["BLOCK_P"]
TILES = (
    Tile(
        "affinity_field",
        affinity_field.statistics_kernel,
        PIXELS,
        PIXEL_ELEMENTS,
        trips=PIXEL_TRIPS,
    ),
    Tile(
        "affinity_field",
        affinity_field.dense_tables_kernel,
        SIZES | STRIP,
        STRIP_ELEMENTS,
        trips=STRIP_TRIPS,
    ),
    # Of a patch that has edges to all 8 neighbours, of one label in the gradient: an upper bound.
    Tile(
        "affinity_field",
        affinity_field.edge_tables_kernel,
        {"CROSS_ENTROPY": True, "BLOCK_CLASSES": 32, **SIZES, **PATCH},
        PATCH_ELEMENTS,
        trips=8,
    ),
    Tile(
        "affinity_field",
        affinity_field.sum_kernel,
        SUM_OF_TABLES,
        BATCH.numel() // (19 * 4),
        trips=-(-PATCHES // SUM_OF_TABLES["BLOCK"]),
    ),
    Tile(
        "affinity_field",
        affinity_field.dense_gradient_kernel,
        {"ADD": False, **SIZES, **STRIP},
        STRIP_ELEMENTS,
        trips=STRIP_TRIPS,
    ),
    Tile(
        "affinity_field",
        affinity_field.edge_gradient_kernel,
        {"REPLACE": False, **SIZES, **PATCH},
        PATCH_ELEMENTS,
        trips=8,
    ),
    Tile(
        "affinity_field",
        affinity_field.softmax_backward_kernel,
        {"CROSS_ENTROPY": True, **PIXELS},
        PIXEL_ELEMENTS,
        trips=PIXEL_TRIPS,
    ),
    Tile(
        "affinity_regression",
        affinity_regression.pairs_kernel,
        GRIDS | PAIRS,
        19 * 180,
        trips=PAIRS["STEPS_I"] * PAIRS["STEPS_J"],
    ),
    Tile(
        "affinity_regression",
        affinity_regression.pairs_gradient_kernel,
        GRIDS | PAIRS_GRADIENT,
        19 * PAIRS_GRADIENT["BLOCK_I"],
        trips=PAIRS_GRADIENT["STEPS_J"],
    ),
    Tile(
        "affinity_regression",
        affinity_regression.gram_kernel,
        GRAM,
        19 * GRAM["BLOCK_P"] * GRAM["STEPS"],
        trips=GRAM["STEPS"],
    ),
    Tile(
        "affinity_regression",
        affinity_regression.gradient_kernel,
        GRADIENT,
        19 * GRADIENT["BLOCK_P"],
    ),
    Tile(
        "affinity_regression",
        affinity_regression.matrix_kernel,
        GRIDS | MATRIX,
        19 * 2 * MATRIX["BLOCK_I"],
        trips=MATRIX["BLOCK_C"] // MATRIX["BLOCK_A"],
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.gates_kernel,
        {"RATES": RATES, **GATES},
        GATE_ELEMENTS,
    ),
    Tile("affinity_propagation", affinity_propagation.step_kernel, SUM, SUM_ELEMENTS, trips=8),
    Tile(
        "affinity_propagation",
        affinity_propagation.normalise_backward_kernel,
        ALL_CLASSES,
        SUM_ELEMENTS,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.step_backward_kernel,
        {**NOT_FIRST, **SUM},
        SUM_ELEMENTS,
        trips=8,
    ),
    Tile(
        "affinity_propagation",
        affinity_propagation.gates_backward_kernel,
        {"NUM_RATES": len(RATES) // 2, **GATES},
        GATE_ELEMENTS,
        trips=4,
    ),
    Tile(
        "dilated_affinity",
        dilated_affinity.tables_kernel,
        {**SIGNALS, "BLOCK_K": 16},
        NUM_SIGNALS,
        trips=8,
    ),
    Tile("dilated_affinity", dilated_affinity.gradient_kernel, SIGNALS, NUM_SIGNALS, trips=8),
)


def compile_tile(tile: Tile, target: str, *, size_1: bool = False) -> Any:
    """For contiguous float32 logits; or for those whose every size is 1, which Triton takes for a
    constant.
    """
    options = {"num_warps": tile.blocks.get("num_warps", NUM_WARPS)}
    return triton.compile(_source(tile, size_1), target=TARGETS[target], options=options)


def analyse(tile: Tile, target: str) -> dict[str, Any]:
    """One row of the static table."""
    compiled = compile_tile(tile, target)
    num_warps = tile.blocks.get("num_warps", NUM_WARPS)
    if target.startswith("sm_"):
        registers, spills, assembly = _nvidia(compiled.asm["cubin"])
    else:
        registers, spills, assembly = _amd(compiled.asm["amdgcn"])
    threads = num_warps * TARGETS[target].warp_size
    counts = count_instructions(assembly, tile.trips)
    per_element = {kind: round(counts[kind] * threads / tile.elements, 1) for kind in KINDS}
    return {
        "kernel": tile.kernel.__name__,
        "op": tile.op,
        "target": target,
        "registers": registers,
        "spills": spills,
        "shared_bytes": compiled.metadata.shared,
        "instructions_per_element": {**per_element, "all": round(sum(per_element.values()), 1)},
    }


# Every other number is an int.
FLOATS = ("margin", "eps", "limit", "self_weight", "slope", "gamma")
# Sizes and strides that are multiples of 16, as in most images: loads of four numbers.
ALIGNED = ("H", "W", "HW", "stride_n", "stride_c", "target_stride_n")
POINTERS = {
    "target_ptr": "*i64",
    "label_ptr": "*i16",
    "counts_ptr": "*i32",
    "count_ptr": "*i32",
    "pair_count_ptr": "*i64",
    "gram_ptr": "*fp64",
}


def _source(tile: Tile, size_1: bool) -> ASTSource:
    """Types and alignments as the launcher finds them."""
    names = tile.kernel.arg_names
    constants = {name: size for name, size in tile.blocks.items() if name != "num_warps"}
    signature, aligned = {}, {}
    for i, name in enumerate(names):
        is_pointer, is_float = name.endswith("_ptr"), name in FLOATS
        if name.endswith("stride_w") or (size_1 and not is_pointer and not is_float):
            constants.setdefault(name, 1)
        if name in constants:
            signature[name] = "constexpr"
        elif is_pointer:
            signature[name] = POINTERS.get(name, "*fp32")
            aligned[i,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if is_float else "i32"
            if name in ALIGNED:
                aligned[i,] = [["tt.divisibility", 16]]
    constexprs = {(names.index(name),): value for name, value in constants.items()}
    return ASTSource(tile.kernel, signature, constexprs, aligned)


def _nvidia(cubin: bytes) -> tuple[int, int, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(str(tools / "cuobjdump"), "-res-usage", file.name)
        assembly = _run(str(tools / "nvdisasm"), "-c", file.name)
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    return registers, int(re.findall(r"STACK:(\d+)", usage)[0]) // 4, assembly


def _amd(assembly: str) -> tuple[int, int, str]:
    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", assembly)[0])

    return field("vgpr_count"), field("vgpr_spill_count"), assembly


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_instructions(assembly: str, trips: int) -> Counter[str]:
    """Instructions that a thread executes, by kind; a loop's count ``trips`` times."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in assembly.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        instruction = INSTRUCTION.match(line)
        if not instruction or instruction[1] in ("NOP", "s_nop"):
            continue
        jump = re.search(r"(\.L\w+)", line)
        # A jump to itself is the padding after the program's end.
        if jump and labels.get(jump[1], len(instructions)) < len(instructions):
            loops.append((labels[jump[1]], len(instructions)))
        instructions.append(instruction[1])
    counts: Counter[str] = Counter()
    for i, name in enumerate(instructions):
        in_loop = any(first <= i <= last for first, last in loops)
        counts[kind_of(name)] += trips if in_loop else 1
    return counts


# A line of nvdisasm, "/*0010*/ @!P0 IMAD.MOV R1, ...;", or of AMD's assembly, "v_add_f32 v1, ...".
INSTRUCTION = re.compile(r"\s+(?:/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?)?([A-Za-z][A-Za-z0-9_]*)")


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
