from __future__ import annotations

from torch import Tensor

from tritonaff.kernels.shared import INTERPRETED, cdiv, next_power_of_2

# Pixels per class that one program adds up: so many that the partial matrices stay below an eighth
# of float32 logits. A quarter as many where there would be too few programs for a GPU.
GRAM_PIXELS_PER_CLASS, GRAM_PROGRAMS = 32, 1024
# More classes than these are cut into blocks of 32: by the Gram matrices, by the gradient.
GRAM_CLASSES, GRADIENT_CLASSES = 32, 64
# Points i that one program compares with all others.
POINTS_PER_PROGRAM = 256


# Blocks are small because products in full precision keep their operands in registers: with 19 and
# with 150 classes they spill none on the GPUs that `tritonaff-bench static` compiles for, from
# Triton 3.7 on.
def all_classes(logits: Tensor) -> dict[str, int]:
    """A matrix product takes 16 of a side at least, and 8 of the second one."""
    block_c = max(16, next_power_of_2(logits.shape[1]))
    return {"C": logits.shape[1], "BLOCK_C": block_c, "num_warps": 8 if block_c > 64 else 4}


def pixels_per_program(logits: Tensor) -> int:
    """With all their classes. A thread has 64 elements at most, and of many classes fewer."""
    if INTERPRETED:
        return 512
    block_c = all_classes(logits)["BLOCK_C"]
    return (8192 if block_c <= 64 else 4096) // block_c


def pairs_blocks(logits: Tensor, points: int) -> dict[str, int]:
    classes = all_classes(logits)
    block = 64 if classes["BLOCK_C"] <= 32 else 32
    if INTERPRETED:  # the interpreter takes its time per step, whatever the size
        block = 128
    return {
        **classes,
        "BLOCK_A": classes["BLOCK_C"] if classes["BLOCK_C"] <= 32 else 16,
        "BLOCK": block,
        "STEPS": cdiv(min(points, POINTS_PER_PROGRAM), block),
    }


def pairs_gradient_blocks(logits: Tensor, points: int) -> dict[str, int]:
    classes = all_classes(logits)
    block = 128 if INTERPRETED else 16
    return {
        **classes,
        "BLOCK_A": min(32, classes["BLOCK_C"]),
        "BLOCK_I": block,
        "BLOCK_J": block,
        "BLOCK_P": pixels_per_program(logits),
        "STEPS_J": cdiv(points, block),
        "CHANNELS_LAST": logits.stride(1) == 1,
    }


def gram_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    block_p, pixels = 32, GRAM_PIXELS_PER_CLASS * classes["BLOCK_C"]
    blocks = cdiv(classes["C"], GRAM_CLASSES)
    if logits[:, 0].numel() * blocks * (blocks + 1) // 2 < GRAM_PROGRAMS * pixels:
        pixels //= 4
    if INTERPRETED:  # as many pixels as elsewhere in a float32 sum
        pixels = 1024
    steps = {"BLOCK_P": block_p, "STEPS": pixels // block_p}
    if blocks > 1:
        return {"C": classes["C"], "BLOCK_A": GRAM_CLASSES, **steps}
    block_y = next_power_of_2(max(8, 2 * classes["C"] - classes["BLOCK_C"]))
    if block_y < 32:  # few enough registers for fewer threads, which repeat less
        classes["num_warps"] = 2
    return {**classes, "BLOCK_Y": block_y, **steps}


def statistics_blocks(logits: Tensor) -> dict[str, int]:
    return {**all_classes(logits), "BLOCK_P": 512 if INTERPRETED else 32, "num_warps": 4}


def gradient_blocks(logits: Tensor) -> dict[str, int]:
    classes = all_classes(logits)
    if classes["C"] > GRADIENT_CLASSES:
        block_p = 128 if INTERPRETED else 32
        return {"C": classes["C"], "BLOCK_A": 32, "BLOCK_D": 16, "BLOCK_P": block_p}
    return {**classes, "BLOCK_P": pixels_per_program(logits)}


def matrix_blocks(logits: Tensor) -> dict[str, int]:
    block = 128 if INTERPRETED else 32
    return {**all_classes(logits), "BLOCK_A": 16, "BLOCK_I": block}
