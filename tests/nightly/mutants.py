"""Deliberate faults, each of which the named tests of the ordinary gate must catch.

    python tests/nightly/mutants.py [--seconds N] [WORD ...]

breaks kernels, native kernels and portable implementations in every way listed here, or in the
ways whose file or name contains one of the words, in a copy of the repository, and says which
faults survive. Files take turns, and no fault is begun after N seconds. A fault whose results are
the same is none, and has no place here: a mask that another one repeats, a shortcut that is not
taken.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import NamedTuple

from tritonaff.native.library import find_compiler

ROOT = Path(__file__).parents[2]
# A fault may make a loop endless.
MOST_SECONDS = 900


class Mutant(NamedTuple):
    file: str
    name: str
    text: str
    replacement: str
    tests: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}: {self.name}"


def mutated(mutant: Mutant) -> str:
    """The file with its fault."""
    source = (ROOT / mutant.file).read_text()
    if source.count(mutant.text) != 1:
        raise ValueError(f"{mutant}: its text is {source.count(mutant.text)} times in the file")
    source = source.replace(mutant.text, mutant.replacement)
    if mutant.file.endswith(".py"):
        compile(source, mutant.file, "exec")
    else:
        compile_cpp(mutant, source)
    return source


def compile_cpp(mutant: Mutant, source: str) -> None:
    """ValueError unless the C++ file compiles with its fault."""
    command = [*(find_compiler() or ["c++"]), "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    folder = str((ROOT / mutant.file).parent)
    result = subprocess.run(
        [*command, "-I", folder], input=source, capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise ValueError(f"{mutant}: does not compile\n{result.stderr}")


def is_caught(mutant: Mutant) -> bool:
    return fail(mutant.tests, {mutant.file: mutated(mutant)})


def fail(tests: Iterable[str], sources: dict[str, str]) -> bool:
    """True if one of the tests fails where these files have other sources."""
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        shutil.copy(ROOT / "pyproject.toml", tree)
        ignored = shutil.ignore_patterns("__pycache__", "nightly")
        for name in ("tritonaff", "tests", "tools"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        for file, source in sources.items():
            (tree / file).write_text(source)
        # The ordinary gate's examples, also in a nightly run.
        environment = {k: v for k, v in os.environ.items() if k != "HYPOTHESIS_PROFILE"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        try:
            result = subprocess.run(
                [*command, *(f"tests/{test}" for test in tests)],
                cwd=tree,
                env={**environment, "PYTHONPATH": directory},
                capture_output=True,
                text=True,
                timeout=MOST_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return True
    if result.returncode > 1:  # no such test, for instance; a signal is below 0
        raise ValueError(f"tests of {list(sources)} do not run\n{result.stdout}{result.stderr}")
    return result.returncode != 0


def of(file: str, tests: str, *faults: tuple[str, str, str]) -> Iterator[Mutant]:
    """The first word of ``tests`` is a test file, the others are tests in it. A file without an
    ending is Python.
    """
    test_file, *names = tests.split()
    file = file if file.endswith((".cpp", ".h")) else f"{file}.py"
    for name, text, replacement in faults:
        yield Mutant(
            f"tritonaff/{file}",
            name,
            text,
            replacement,
            tuple(f"{test_file}.py::{test}" for test in names),
        )


FIELD, FIELD_TESTS = "kernels/affinity_field/", "test_affinity_field test_"
REGRESSION, REGRESSION_TESTS = "kernels/affinity_regression/", "test_affinity_regression test_"
PROPAGATION, PROPAGATION_TESTS = "kernels/affinity_propagation/", "test_affinity_propagation test_"
DILATED, DILATED_TESTS = "kernels/dilated_affinity/", "test_dilated_affinity test_"
BOXES, BOX_TESTS = "kernels/box_pairwise/", "test_box_pairwise test_"
INSTANCE, INSTANCE_TESTS = "kernels/instance_affinity/", "test_instance_affinity test_"

NATIVE_FIELD, NATIVE_SHARED = "native/affinity_field.cpp", "native/common.h"
NATIVE_TILES = FIELD_TESTS + "native_kernels_do_not_depend_on_their_tiles"
FIELD_TILES = (
    FIELD_TESTS + "planes_that_begin_anywhere[triton-0-0] test_tiles_do_not_depend_on_their_blocks"
)
FIELD_PATCHES = FIELD_TESTS + "labels_that_meet_between_patches"
FIELD_PIXELS = FIELD_TESTS + "pixels_alone_among_others"
REGRESSION_TILES = (
    REGRESSION_TESTS + "tiles_do_not_depend_on_their_blocks[3]"
    " test_a_fine_grid_is_several_blocks_of_points[triton]"
)
PROPAGATION_TILES = (
    PROPAGATION_TESTS + "nothing_to_divide_by_is_0_with_a_zero_gradient[triton]"
    " test_tiles_do_not_depend_on_their_blocks"
)
PROPAGATION_NOTHING = PROPAGATION_TESTS + "nothing_to_divide_by_is_0_with_a_zero_gradient[triton]"
BOX_TILES = (
    BOX_TESTS + "tiles_do_not_depend_on_their_blocks test_nothing_is_left_unwritten[triton]"
    " test_logits_that_do_not_count_may_be_anything[triton]"
)
BOX_PORTABLE = (
    BOX_TESTS + "portable_does_not_depend_on_its_blocks test_portable_matches_the_reference"
    " test_logits_that_do_not_count_may_be_anything[portable]"
)
BOX_COLORS = (
    BOX_TESTS + "similarity_is_the_definition test_lab_is_scikit_images"
    " test_the_loss_is_that_of_boxinst[portable]"
)
INSTANCE_TILES = INSTANCE_TESTS + "tiles_do_not_depend_on_their_blocks[4]"
DILATED_TILES = (
    DILATED_TESTS + "a_rate_beyond_the_image_does_not_disturb_the_others[triton]"
    " test_tiles_do_not_depend_on_their_blocks[4]"
)

MUTANTS = [
    # --- Native kernels of the affinity field -----------------------------------------------------
    *of(
        NATIVE_FIELD,
        NATIVE_TILES + "[3-7-contiguous]",
        ("the row below", ": here(t) + int(size.d)", ": here(t) + int(reach)"),
        ("rows that are kept", "3 : 2 * int(reach) + 1", "3 : 2 * int(reach)"),
        ("margins of another tile", "{&u_sums_, &l_sums_}", "{&l_sums_}"),
        ("labels to the right", "labels_of_group(row + w + d)", "labels_of_group(row + w)"),
        ("hinges of the neighbour", "mask(room_back > 0.0f)", "mask(room > 0.0f)"),
        ("the first tile's columns", "strips_ * columns_;", "strips_ * columns_ / 2;"),
    ),
    *of(
        NATIVE_FIELD,
        NATIVE_TILES + "[13-5-3-9-7-contiguous]",
        ("the fourth size", "first && s == 0", "first"),
    ),
    *of(
        NATIVE_FIELD,
        NATIVE_TILES + "[41-5-201-contiguous]",
        ("rows of a large size", "(i % 3 - 1) * reach", "(i % 3) * reach"),
        ("large sizes first", "bool first = &marcher ==", "bool first = &marcher !="),
    ),
    *of(
        NATIVE_FIELD,
        FIELD_TESTS + "several_largest_logits[native]",
        ("several largest classes", "~mask(rest[w] < 1.0f)", "~mask(rest[w] < 9.0f)"),
    ),
    *of(
        NATIVE_FIELD,
        FIELD_TESTS + "cross_entropy_keeps_its_digits[native-0.0]"
        " test_cross_entropy_keeps_its_digits[native-20.0]",
        (
            "the factor of another class",
            "masked(factor[w], another) - others[w]",
            "-masked(others[w], another | -1)",
        ),
        ("digits of the log loss", " + (rest[w] - (total - 1.0f)) * inverse[w]", ""),
    ),
    *of(
        NATIVE_FIELD,
        FIELD_TESTS + "confident_logits_keep_their_digits[native]",
        ("digits of q", "((1.0f - e) + rest[w]) * inverse[w]", "1.0f - e * inverse[w]"),
    ),
    *of(
        NATIVE_FIELD,
        FIELD_TESTS + "infinite_confidence_is_finite[native]",
        ("a clamp", "counted & mask(std::fabs(odds) < limit)", "counted"),
    ),
    *of(
        NATIVE_SHARED,
        FIELD_TESTS + "ignore_index_may_be_a_class[native]",
        ("the ignored class", " & (k != ignore_index)", ""),
    ),
    *of(
        NATIVE_SHARED,
        "test_native test_exp_and_log_keep_their_digits test_exp_of_what_is_no_ordinary_number",
        ("a coefficient of exp", "1.6666665459e-1f", "1.6667665459e-1f"),
        ("numbers that are none", "x < -87.0f ? -87.0f : x", "x > -87.0f ? x : -87.0f"),
        ("a coefficient of log", "4.9999648e-1f", "4.9989648e-1f"),
    ),
    *of(
        NATIVE_SHARED,
        NATIVE_TILES + "[3-7-contiguous]",
        ("integers of another dtype", "sizeof *row == sizeof(To) && ", ""),
    ),
    # --- Tiles of the affinity field --------------------------------------------------------------
    *of(
        FIELD + "columns",
        FIELD_TILES,
        ("a column from the same lane", "if column + d > 3:", "if column + d > 4:"),
        ("a column from another lane", "if column < d:", "if column <= d:"),
        ("counts of the left lane", "(left >> (32 - 8 * d))", "(left >> (24 - 8 * d))"),
        ("a column beyond a row", "(w + i >= 0) & (w + i < W)", "(w + i >= 0) & (w + i <= W)"),
        ("the row above", "rows[(middle - d) * WIDTH + i]", "rows[(middle - d + 1) * WIDTH + i]"),
    ),
    *of(
        FIELD + "columns",
        FIELD_PIXELS,
        ("counts at distance 3", "if d < 4:", "if d < 3:"),
    ),
    *of(
        FIELD + "columns",
        FIELD_TESTS + "a_size_beyond_the_image_does_not_disturb_the_others[triton-shape1]",
        (
            "four columns beyond a row",
            "& (w >= 0) & (w < W))[:, :, None]",
            "& (w >= 0))[:, :, None]",
        ),
    ),
    *of(
        FIELD + "dense",
        FIELD_TILES,
        ("a row below the image", "(h < H)\n    column = h", "(h <= H)\n    column = h"),
        (
            "counts of other columns",
            "counted.to(tl.uint32) << 8 * i",
            "counted.to(tl.uint32) << 8 * (i ^ 1)",
        ),
        ("the last lane twice", "owned = (lane > 0) & (lane < LANES - 1)", "owned = lane > 0"),
        ("strips that share nothing", "(4 * LANES - 2 * HALO)", "(4 * LANES - HALO)"),
        ("behind the last image", "tl.where(n < N, band * ROWS, H + HALO)", "band * ROWS"),
        (
            "gradients beyond a row",
            "    if not ALIGNED:\n        written",
            "    if False:\n        written",
        ),
        ("rows of the next band", "if (row >= REACH) & (row < ROWS + REACH):", "if row >= REACH:"),
        ("sums of the halo", "tl.where(owned, sums[k], 0.0)", "sums[k]"),
        (
            "coefficients of edges",
            "(coefficients_ptr + (C + some_c[:, None]) * K",
            "(coefficients_ptr + some_c[:, None] * K",
        ),
        (
            "steps of u for those of l",
            "(box * l_i - l_sums[4 * k + i])",
            "(box * l_i - u_sums[4 * k + i])",
        ),
    ),
    *of(
        FIELD + "dense",
        FIELD_PATCHES,
        (
            "far neighbours one short",
            "h + dy * d, w + dx * d, H, W, limit",
            "h + dy * d, w + dx * (d - 1), H, W, limit",
        ),
        ("far counts", "count + counts\n", "count\n"),
        ("far columns as if aligned", "ALIGNED and RADII[k] % 4 == 0,", "ALIGNED,"),
        ("only the last pass", "if ADD:", "if False:"),
        (
            "dense sums of a pass",
            "(c.to(tl.int64) * K + COLUMNS[k]) * PROGRAMS",
            "(c.to(tl.int64) * K + k) * PROGRAMS",
        ),
    ),
    *of(
        FIELD + "dense",
        FIELD_TESTS + "ignore_index_may_be_a_class[triton]",
        ("l of pixels that do not count", "tl.where(counted, log_odds, 0.0)", "log_odds"),
        ("u of pixels that do not count", "tl.where(counted, u, 0.0)", "u"),
    ),
    *of(
        FIELD + "dense",
        FIELD_TESTS + "confident_logits_keep_their_digits[triton]",
        (
            "a gradient through the dense clamp",
            "free = (tl.abs(l_i) < limit) &",
            "free = (tl.abs(l_i) < 9e9) &",
        ),
    ),
    *of(
        FIELD + "labels",
        FIELD_PATCHES,
        ("no far edges", "return (REACH == 0) |", "return (REACH < 0) |"),
        ("only patches below", "(corner // 2 * 2 - 1) * REACH,", "corner // 2 * REACH,"),
        ("only patches to the right", "(corner % 2 * 2 - 1) * REACH\n", "corner % 2 * REACH\n"),
    ),
    *of(
        FIELD + "labels",
        FIELD_PIXELS,
        (
            "the smallest label is a neighbour's",
            "tl.minimum(tl.min(smallest, axis=0), label.to(tl.uint32))",
            "tl.min(smallest, axis=0)",
        ),
        (
            "the largest label is a neighbour's",
            "tl.maximum(tl.max(largest, axis=0), label)",
            "tl.max(largest, axis=0)",
        ),
    ),
    *of(
        FIELD + "labels",
        FIELD_TESTS + "ignore_index_may_be_a_class[triton]",
        (
            "pairs with pixels that do not count",
            "pair = tl.minimum(label_b, label[None, :]) >= 0",
            "pair = label_b + 0 * label[None, :] >= 0",
        ),
    ),
    *of(
        FIELD + "counts",
        FIELD_PATCHES,
        (
            "far pairs by the label of a patch",
            "if (REACH > 0) & (tl.min(smallest",
            "if (tl.min(smallest",
        ),
        ("totals of a pass", "column_ptr = totals_ptr + COLUMNS[k]", "column_ptr = totals_ptr + k"),
    ),
    *of(
        FIELD + "counts",
        FIELD_PIXELS,
        ("edge counts of a label", "count = 2 * tables[1 + k]", "count = tables[1 + k]"),
        ("entries with their edges", ".to(tl.int64) - edge_count", ".to(tl.int64)"),
    ),
    *of(
        FIELD + "counts",
        FIELD_TESTS + "several_passes_through_one_graph[triton]",
        ("edges in one direction", "edge_count = 2 * tl.sum", "edge_count = tl.sum"),
        ("pixels of every pass", "    if COUNT_PIXELS:", "    if True:"),
    ),
    *of(
        FIELD + "counts",
        FIELD_TESTS + "nothing_is_left_unwritten[triton]",
        ("pairs of ignored patches", "tl.where(label >= 0, 8, 0)", "8"),
    ),
    *of(
        FIELD + "edges",
        FIELD_TILES,
        ("patches left out", "index += PROGRAMS", "index += 2 * PROGRAMS"),
    ),
    *of(
        FIELD + "edges",
        FIELD_PATCHES,
        ("edge sums of a pass", "edges_ptr, 2 * COLUMNS[k], C", "edges_ptr, 2 * k, C"),
    ),
    *of(
        FIELD + "edges",
        FIELD_PIXELS,
        (
            "edges in their own channel only",
            "own[None, :] != (around[k] == c)",
            "own[None, :] & (around[k] != c)",
        ),
        ("p of the wrong centre", "margin + p_b * l_step", "margin + p * l_step"),
        ("p of the wrong neighbour", "margin - p * l_step", "margin - p_b * l_step"),
        ("products of edges added", "product -= tl.where(own_edge", "product += tl.where(own_edge"),
        (
            "sign of an edge's l",
            "pair_d_u -= coef_dense * l_step",
            "pair_d_u += coef_dense * l_step",
        ),
        ("sign of another's u", "p + q_b - 2 * eps)", "2 * eps - p - q_b)"),
        (
            "the dense gradient replaced",
            "                if not REPLACE:\n",
            "                if False:\n",
        ),
    ),
    *of(
        FIELD + "edges",
        FIELD_TESTS + "edges_in_half_precision[triton-dtype0]",
        (
            "sign of l in half precision",
            "pair_d_u = tl.where(edge, pair_d_u, coef_dense * l_step)",
            "pair_d_u = tl.where(edge, pair_d_u, -coef_dense * l_step)",
        ),
        (
            "sign of p in half precision",
            "pair_d_l = tl.where(edge, pair_d_l, coef_dense * p_step)",
            "pair_d_l = tl.where(edge, pair_d_l, -coef_dense * p_step)",
        ),
    ),
    *of(
        FIELD + "edges",
        FIELD_TESTS + "confident_logits_keep_their_digits[triton]",
        (
            "a gradient through the clamp of edges",
            "tl.where(tl.abs(log_odds) < limit, d_l / q + d_u * p, 0.0)",
            "d_l / q + d_u * p",
        ),
    ),
    *of(
        FIELD + "edges",
        FIELD_TESTS + "tables_and_gradient_together_and_apart[triton-kernel_sizes0-dtype0]",
        ("hinges of both channels", "tl.where(own_edge, both, 0.0)", "tl.where(edge, both, 0.0)"),
    ),
    *of(
        FIELD + "pixels",
        FIELD_TILES,
        ("sign of u", "return tl.where(own, -u, u), log_odds", "return u, log_odds"),
    ),
    *of(
        FIELD + "pixels",
        FIELD_TESTS + "confident_logits_keep_their_digits[triton]",
        ("u below its clamp", "tl.maximum(u, 0.0, nan)", "u"),
    ),
    *of(
        FIELD + "pixels",
        FIELD_TESTS + "what_is_not_a_number_shows",
        ("a maximum without NaN", "tl.maximum(u, 0.0, nan)", "tl.maximum(u, 0.0)"),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TILES,
        (
            "softmax of a second block",
            "tl.where(x > top, (rest + 1) * e, rest + e)",
            "tl.where(x > top, rest * e, rest + e)",
        ),
        ("the largest of other rows", "others = (rest + 1) * exp", "others = rest * exp"),
        ("classes that do not exist", '& mask, other=-float("inf")', "& mask, other=0.0"),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "confident_logits_keep_their_digits[triton]",
        ("digits of the largest class", "(x == top) & (rest < 1)", "(x == top) & (rest < 0)"),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "what_is_not_a_number_shows",
        (
            "a softmax of infinity",
            'tl.where(tl.abs(largest) < 1e38, rest, float("nan"))',
            "rest + 0",
        ),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "several_passes_through_one_graph[triton]",
        ("cross-entropy of the label", "e - 1 - rest, e)", "e - 1, e)"),
        (
            "cross-entropy without its scale",
            "mask=label >= 0, other=0.0) * scale",
            "mask=label >= 0, other=0.0)",
        ),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "nothing_is_left_unwritten[triton]",
        (
            "counts that do not begin at 0",
            "store_zeros(entries_ptr, ENTRIES, BLOCK_P)",
            "store_zeros(entries_ptr, 0, BLOCK_P)",
        ),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "several_largest_logits[triton]",
        ("two largest classes", "tl.where((x == top) & (rest < 1)", "tl.where((x == top)"),
    ),
    *of(
        FIELD + "softmax",
        FIELD_TESTS + "more_counts_than_pixels",
        (
            "tables of one block",
            "entry += tl.num_programs(0).to(tl.int64) * BLOCK",
            "entry += tl.num_programs(0).to(tl.int64) * BLOCK * 2",
        ),
    ),
    *of(
        FIELD + "softmax",
        "test_backend test_ignored_pixels_may_hold_no_numbers[triton-nan-cross_entropy]",
        (
            "a gradient where no pixel counts",
            "grad = tl.where(label >= 0, grad, 0.0)",
            "grad = grad + 0",
        ),
    ),
    *of(
        FIELD + "finish",
        FIELD_TILES,
        ("sums without an end", "mask=offs < left, other=0.0", "mask=offs >= 0, other=0.0"),
        ("edges in their dense sums", "(dense - second).to", "dense.to"),
    ),
    *of(
        FIELD + "finish",
        FIELD_TESTS + "nothing_is_left_unwritten[triton]",
        ("no zero", "            tl.store(zero_ptr, 0.0)\n", ""),
    ),
    *of(
        FIELD + "finish",
        FIELD_TESTS + "a_loss_is_multiplied_in_place",
        ("a scale of 1", "if scale != 1:", "if scale > 1:"),
    ),
    *of(
        FIELD + "launchers",
        FIELD_TESTS + "channels_last[triton]",
        (
            "planes of any layout",
            "return logits if pixel_step(logits) == 1 else logits.contiguous()",
            "return logits",
        ),
    ),
    # --- Tiles of affinity regression -------------------------------------------------------------
    *of(
        REGRESSION + "grids",
        REGRESSION_TILES,
        ("points beyond the last", "return tl.where(index < L, h, -1), w", "return h, w"),
        (
            "columns of a grid",
            "w = tl.where(inside, j * W // GRIDS[k], w)",
            "w = tl.where(inside, j * H // GRIDS[k], w)",
        ),
    ),
    *of(
        REGRESSION + "grids",
        REGRESSION_TESTS + "points_that_are_the_same_pixel[triton]",
        ("the last of a row", "first = tl.cdiv(h * size, H)", "first = h * size // H"),
    ),
    *of(
        REGRESSION + "roots",
        REGRESSION_TILES,
        ("half exponents", "(x - top) * HALF_LOG2_E", "(x - top) * (2 * HALF_LOG2_E)"),
        (
            "D of the label",
            "-points.own_q / (1 + points.own_s), s)",
            "-points.own_q / (1 - points.own_s), s)",
        ),
        ("M of the label", "tl.where(own, points.own_s + 1, s)", "s"),
        (
            "gradient of the label",
            "own_product - points.own_s * points.own_s * others",
            "own_product + points.own_s * points.own_s * others",
        ),
    ),
    *of(
        REGRESSION + "pairs",
        REGRESSION_TILES,
        ("pairs once", "tl.where(start_j == start_i, 1, 2)", "1"),
        ("every pair twice", "tl.where(start_j == start_i, 1, 2)", "2"),
        ("points of every block", "(points_j.label >= 0) & (start_i == 0)", "points_j.label >= 0"),
        ("points below the diagonal", "start_j = start_i\n", "start_j = start_i + BLOCK\n"),
        ("one half of the difference", "tl.dot(tl.trans(m_j), d_i,", "tl.dot(tl.trans(d_j), m_i,"),
        (
            "points that are several",
            "others, s_i, c, points_i) * times\n",
            "others, s_i, c, points_i)\n",
        ),
        ("zeros at sample points", "W, GRIDS) == 0)", "W, GRIDS) >= 0)"),
    ),
    *of(
        REGRESSION + "every_pixel",
        REGRESSION_TILES,
        ("Y beside D", "tl.where(c == C + label, 1.0, 0.0))", "0.0)"),
        ("labels of a step", "count += tl.where((c < C)", "count = tl.where((c < C)"),
        (
            "image of a factor",
            "target_ptr += n * HW\n    factor_ptr += n * 2 * C * C\n",
            "target_ptr += n * HW\n",
        ),
        ("pixels beyond the image", "mask=(c < C) & (pixel < HW))", "mask=c < C)"),
    ),
    *of(
        REGRESSION + "every_pixel",
        REGRESSION_TESTS + "many_classes[triton-None-19]",
        ("rest of Y", "y = tl.where(rest == C + label", "y = tl.where(rest == label"),
    ),
    *of(
        REGRESSION + "many_classes",
        REGRESSION_TESTS + "tiles_do_not_depend_on_their_blocks[65]",
        (
            "matrices of one image",
            "partial % N).to(tl.int64)\n    start_row",
            "0 * partial).to(tl.int64)\n    start_row",
        ),
        (
            "rows for columns",
            "_s, other_d, _m = load_roots(logits_ptr, column,",
            "_s, other_d, _m = load_roots(logits_ptr, row,",
        ),
        ("a block and not its mirror", "    if start_row < start_column:\n", "    if False:\n"),
        (
            "labels of one column fewer",
            "(label < start_column + BLOCK_A)",
            "(label < start_column)",
        ),
        (
            "labels counted by every row",
            "y = tl.trans(tl.where(own, 1.0, 0.0))",
            "y = tl.trans(tl.where(own, 0.0, 1.0))",
        ),
        (
            "statistics of one kind",
            "        statistics_ptr += HW\n    return Points",
            "    return Points",
        ),
        ("sums of the last block", "others += block_others", "others = block_others"),
        ("where gradients begin", "acc=grads_s[k], ", ""),
    ),
    *of(
        REGRESSION + "matrix",
        REGRESSION_TILES,
        (
            "rows of the matrix",
            "s_i = half_exp(x_ai, top_i) * scale_i",
            "s_i = half_exp(x_ai, top_j) * scale_i",
        ),
    ),
    # --- Tiles of affinity propagation ------------------------------------------------------------
    *of(
        PROPAGATION + "classes",
        PROPAGATION_TESTS + "images_without_numbers_do_not_disturb_the_one_between_them[triton]",
        (
            "neighbours of other pixels",
            "tl.where(there, place.pixel + (dy * tl.cast(W, tl.int64) + dx), place.pixel)",
            "place.pixel + (dy * tl.cast(W, tl.int64) + dx)",
        ),
    ),
    *of(
        PROPAGATION + "classes",
        PROPAGATION_NOTHING,
        ("rates of the first", "r1 = tl.where(s < 8 * k, r1, RATES[2 * k])", "r1 = r1 + 0"),
        (
            "columns of the first rate",
            "r2 = tl.where(s < 8 * k, r2, RATES[2 * k + 1])",
            "r2 = r2 + 0",
        ),
    ),
    *of(
        PROPAGATION + "gates",
        PROPAGATION_TILES,
        ("gates of the border", "gate = tl.where(there, gate, 0.0)", "gate = gate + 0"),
        (
            "rates transposed",
            "h + dy * RATES[2 * k], w + dx * RATES[2 * k + 1]",
            "h + dy * RATES[2 * k + 1], w + dx * RATES[2 * k]",
        ),
        ("sigmoid's derivative", "grad * gate * (1 - gate) * slope", "grad * gate * slope"),
        (
            "images of gates",
            "gates_ptr += n * (4 * len(RATES)) * HW\n    for",
            "gates_ptr += 0 * n\n    for",
        ),
    ),
    *of(
        PROPAGATION + "steps",
        PROPAGATION_TILES,
        ("the first class of a sum", "total = y[0]\n", "total = 0 * y[0]\n"),
        (
            "own weight of the last block",
            "own_weight = self_weight * largest_of_classes(largest, p_ptrs",
            "own_weight = self_weight * largest_of_classes(largest, p_ptr + pixel",
        ),
        (
            "totals of the last block",
            "        total += block_total\n        p_ptr",
            "        p_ptr",
        ),
    ),
    *of(
        PROPAGATION + "steps",
        PROPAGATION_NOTHING,
        ("division by 0", 'tl.where(total == 0, float("inf"), total)', "total + 0"),
    ),
    *of(
        PROPAGATION + "steps_backward",
        PROPAGATION_TILES,
        ("mean of the last block", "mean += block_mean", "mean = block_mean"),
        ("class of the largest", "first -= BLOCK_C", "first -= 0"),
        ("the largest without its weight", "grad_largest *= self_weight", "grad_largest *= 1"),
        ("the first iteration normalised", "if IS_FIRST:", "if False:"),
        (
            "gates of one iteration",
            "tl.store(grad_gates_ptrs, before + grad_gate",
            "tl.store(grad_gates_ptrs, grad_gate",
        ),
        ("gradient through the mean", "(grad_p - mean) / total", "grad_p / total"),
        ("neighbours in the other direction", "neighbor(s, -1, place", "neighbor(s, 1, place"),
    ),
    *of(
        PROPAGATION + "steps_backward",
        PROPAGATION_TESTS + "the_largest_passes_its_gradient_to_the_first_of_equals[triton]",
        (
            "the last of equals",
            "tl.where(p[c] > largest, FIRST + c",
            "tl.where(p[c] >= largest, FIRST + c",
        ),
    ),
    # --- Tiles of dilated affinity ----------------------------------------------------------------
    *of(
        DILATED + "signals",
        DILATED_TILES,
        ("pairs of the next row", "pair += BLOCK_PAIRS % W_PAIRS", "pair += 0"),
        (
            "rows of the next block",
            "h += BLOCK_PAIRS // W_PAIRS + is_next.to(tl.int32)",
            "h += BLOCK_PAIRS // W_PAIRS",
        ),
        ("pairs of whole rows", "tl.cdiv(W, 2), BLOCK_PAIRS)", "W // 2, BLOCK_PAIRS)"),
        (
            "pixels beyond a row",
            "tl.where(inside & (label >= 0)",
            "tl.where((label >= 0)",
        ),
        (
            "ignored pixels",
            "valid = tl.where(inside & (label >= 0) & (label != ignore_index), valid, 0)",
            "valid = tl.where(inside & (label >= 0), valid, 0)",
        ),
        ("ignored neighbours", " & (label_j != ignore_index)", ""),
        (
            "offsets of the first rate",
            "dy = tl.where(rate == r, OFFSETS[2 * (8 * r + s)], dy)",
            "dy = dy + 0",
        ),
        (
            "columns of the first rate",
            "OFFSETS[2 * (8 * r + s) + 1], dx)",
            "OFFSETS[2 * s + 1], dx)",
        ),
        ("bits", "((x >> 2) & 0x33333333)", "((x >> 2) & 0x13333333)"),
    ),
    *of(
        DILATED + "focal",
        DILATED_TILES,
        (
            "the wrong logarithm",
            "return tl.maximum(-u, 0.0) + log, tl.maximum(u, 0.0) + log",
            "return tl.maximum(u, 0.0) + log, tl.maximum(-u, 0.0) + log",
        ),
    ),
    *of(
        DILATED + "tables",
        DILATED_TILES,
        ("categories one off", "is_category = 8 - tl.arange", "is_category = 7 - tl.arange"),
        (
            "last category without its loss",
            "same_last = tl.where(is_last, same_last + loss_same, same_last)",
            "same_last = same_last + 0",
        ),
        (
            "last category without its counts",
            "counts_last += tl.where(is_last, counts, 0)",
            "counts_last += 0",
        ),
        (
            "the first step alone",
            "h, pair = pairs_after(h, pair, W, BLOCK_PAIRS)",
            "h, pair = h + 0, pair + 0",
        ),
        ("rates of the logits", "logits_ptr += 8 * tl.cast", "logits_ptr += 0 * tl.cast"),
        ("pixels without signals", "tl.where(signal != 0, 1, 0)", "1"),
        (
            "correct signals",
            "(not_positive.to(tl.int32) * 0x101 ^ 0xFF00)",
            "(not_positive.to(tl.int32) * 0x101 ^ 0xFFFF)",
        ),
    ),
    *of(
        DILATED + "tables",
        DILATED_TESTS + "the_smallest_logit_above_zero_predicts_a_same_label[triton]",
        ("the smallest logits", "x_2 = x * LOG2_E - SMALLEST", "x_2 = x * LOG2_E"),
    ),
    *of(
        DILATED + "gradient",
        DILATED_TILES,
        (
            "coefficients of a category",
            "2 * (8 - bits_of_bytes(different))",
            "2 * bits_of_bytes(different)",
        ),
        (
            "sign of same signals",
            "tl.where(is_different, coef_different, -coef_same)",
            "tl.where(is_different, coef_different, coef_same)",
        ),
        (
            "slope of the focus",
            "slope = gamma * p * minus_log_p + q",
            "slope = p * minus_log_p + q",
        ),
        (
            "gradients that are not valid",
            "tl.where(is_different | is_same, slope, 0.0)",
            "slope + 0",
        ),
        ("coefficients of the first rate", "coefficients_ptr += 2 * 9", "coefficients_ptr += 0"),
    ),
    # --- What tiles share -------------------------------------------------------------------------
    *of(
        "kernels/shared",
        "test_affinity_propagation test_tiles_do_not_depend_on_their_blocks",
        ("columns outside", " & (w.to(tl.uint32) < tl.cast(W, tl.uint32))", ""),
        ("the pixel as its neighbour", "(direction > 3)", "(direction > 4)"),
        (
            "rows of consecutive pixels",
            "return first // W + w // W, w % W",
            "return first // W + 0 * w, w % W",
        ),
        (
            "the first programs of an image",
            "(program % programs).to(tl.int64) * pixels",
            "program.to(tl.int64) * pixels",
        ),
    ),
    *of(
        "kernels/shared",
        "test_affinity_regression test_tiles_do_not_depend_on_their_blocks[3]",
        (
            "labels outside",
            "inside & known & (label != ignore_index)",
            "known & (label != ignore_index)",
        ),
    ),
    *of(
        "kernels/shared",
        "test_affinity_field test_ignore_index_may_be_a_class[triton]",
        ("ignored pixels", "inside & known & (label != ignore_index)", "inside & known"),
    ),
    *of(
        "kernels/shared",
        "test_affinity_regression test_any_strides",
        ("gaps between rows", "logits.stride(2) == width * step", "logits.stride(2) >= 0"),
        ("one column", "return 1 if height == 1 else logits.stride(2)", "return 1"),
    ),
    *of(
        "kernels/shared",
        "test_affinity_field test_gigantic_sizes_cost_nothing",
        ("steps beyond 32 bits", "max(-FAR, min(FAR, step))", "max(-FAR, step)"),
    ),
    # --- Torch operations -------------------------------------------------------------------------
    *of(
        "portable/affinity_field",
        "test_affinity_field test_portable_does_not_depend_on_its_blocks"
        " test_portable_without_selecting_pairs"
        " test_portable_matches_the_reference",
        (
            "edges in one direction",
            "2 * sum_by_label(edges_of_pixel",
            "sum_by_label(edges_of_pixel",
        ),
        ("pairs of edges only", "+= counted.sum()", "+= edges_of_pixel.sum()"),
        ("products of edges added", "product.to(sums.dtype), alpha=-1)", "product.to(sums.dtype))"),
        (
            "hinge of one centre",
            "(F.relu(margin - edges.kl_ab()) + F.relu(margin - edges.kl_ba()))",
            "(2 * F.relu(margin - edges.kl_ab()))",
        ),
        (
            "gradient of the other centre",
            "edge_grad * (edges.kl_ab() < margin)",
            "edge_grad * (edges.kl_ba() < margin)",
        ),
        ("gradient through the clamp", "valid[images] * (p > eps)", "valid[images]"),
        ("gradient through the upper clamp", " * (q > eps)", ""),
        ("sides of a box", "rows[..., d : d + width]", "rows[..., :width]"),
        ("one direction twice", "overlap(width, dx * d)", "overlap(width, d)"),
        ("sizes beyond the image", "if d < max(label.shape[-2:])", "if d < min(label.shape[-2:])"),
        ("classes of a block", "sums[1, classes, k] +=", "sums[1, : p.shape[1], k] +="),
        ("the own plane", "image * (num_classes - 1) + channel", "image * num_classes + channel"),
    ),
    *of(
        "portable/affinity_field",
        "test_affinity_field test_cross_entropy_keeps_its_digits",
        ("cross-entropy of the label", " + rest[images, :, rows]) / total", ") / total"),
    ),
    *of(
        "portable/affinity_field",
        "test_affinity_field test_several_largest_logits[portable]",
        (
            "only the largest in the sum",
            "(e * below).sum(dim=1, keepdim=True) + ties",
            "(e * below).sum(dim=1, keepdim=True)",
        ),
    ),
    *of(
        "portable/affinity_field_authors",
        "test_affinity_field test_authors_variant_equals_the_published_code",
        ("without the opposite pixel", " & (label[opposite] >= 0)", ""),
        (
            "the row of the neighbour",
            "sum_by_label(value, label[images][here]",
            "sum_by_label(value, label[images][there]",
        ),
        ("clamp at both ends", "q.clamp(eps, 1)", "q.clamp(eps, 1 - eps)"),
        ("the other gradient", " - grad_q * (q > eps)", " + grad_q * (q > eps)"),
        ("gradient without its log", "kl_grad * (log_q + 1)", "kl_grad * log_q"),
        ("edges among others", "kl * non_edge\n", "kl * pair\n"),
    ),
    *of(
        "portable/affinity_propagation",
        "test_affinity_propagation test_portable_does_not_depend_on_its_blocks"
        " test_the_largest_passes_its_gradient_to_the_first_of_equals[portable]",
        ("neighbours above", "overlap(height, dy, above)", "overlap(height, 0, above)"),
        ("gates without their derivative", ".mul_(1 - self.gates)", ""),
        ("the self weight of the gradient", "self.self_weight * grad_p", "grad_p"),
        (
            "all classes are the largest",
            ".scatter_add_(1, first, largest_grad)",
            ".add_(largest_grad)",
        ),
        (
            "gates of the neighbour",
            "framed[there].addcmul_(self.gates[:, k : k + 1][here], grad_y[here])",
            "framed[there].add_(self.gates[:, k : k + 1][here])",
        ),
        (
            "gradient of border pixels",
            "        fold_frame(framed, self.frame)\n",
            "",
        ),
        (
            "gradients without their mean",
            "(grad_p - (grad_p * p).sum(dim=1, keepdim=True))",
            "grad_p",
        ),
    ),
    *of(
        "portable/affinity_regression",
        "test_affinity_regression test_portable_does_not_depend_on_its_blocks"
        " test_points_that_are_the_same_pixel[portable]"
        " test_gradcheck",
        ("bands of one image", "gram[images] += points.gram()", "gram[images] = points.gram()"),
        ("points of one band", "count[images] += points.count()", "count[images] = points.count()"),
        ("M of the label", "(self.own_s + valid).to", "self.own_s.to"),
        ("gradient of the label", "self.own_q * own - self.own_s", "self.own_q * own + self.own_s"),
        ("the other product", "(dm * dm.mT).sum", "(dm * dm).sum"),
        (
            "points that are several",
            "at_points(grad * times_sampled(logits, grid_sizes), logits",
            "at_points(grad, logits",
        ),
        (
            "rows and columns of a point",
            "steps * height // size, steps * width // size,",
            "steps * height // size, steps * height // size,",
        ),
        (
            "one half of a matrix",
            "grad_affinity + grad_affinity.mT",
            "grad_affinity + grad_affinity",
        ),
    ),
    *of(
        "native/affinity_regression.cpp",
        "test_affinity_regression test_native_between_its_blocks_and_tasks"
        " test_native_matches_the_reference",
        (
            "points of one task",
            "std::min(first + task_size, points.count)",
            "points.count",
        ),
        (
            "the second task",
            "for (int64_t task = 1; task < tasks;",
            "for (int64_t task = 2; task < tasks;",
        ),
        (
            "labels of the last vector",
            "std::fill(label, label + whole, -1);",
            "std::fill(label, label + n, -1);",
        ),
        (
            "rows with a gap",
            "points.height == 1 || stride_h ==",
            "points.height >= 1 || stride_h ==",
        ),
        ("the lower half", "sums.dd[std::min(i, j) * c + std::max(i, j)]", "sums.dd[i * c + j]"),
        (
            "channels after the last four",
            "for (; i < c; i++) add_row",
            "for (; i < c - 1; i++) add_row",
        ),
        ("the other product", "dm[i * c + j] * dm[j * c + i]", "dm[i * c + j] * dm[i * c + j]"),
        ("rows of a product", "left[i] += roots[i * c + k] * a;", "left[i] += roots[k] * a;"),
        (
            "the gradient of an image",
            "grad_squared_error[n], c, n);",
            "grad_squared_error[0], c, n);",
        ),
        (
            "the sum of the others",
            "0.5f * (first - p * others[w])",
            "0.5f * (first + p * others[w])",
        ),
        ("points on one pixel", "total += here;", "total = here;"),
        (
            "columns of a grid",
            "&points.across.times[(lines + j)",
            "&points.across.times[(lines + i)",
        ),
        ("the next grid", "if (i == points.sizes[g]) i = 0,", "if (i > points.sizes[g]) i = 0,"),
    ),
    *of(
        "native/affinity_regression.cpp",
        "test_affinity_regression test_near_the_optimum_the_loss_keeps_five_digits"
        " test_gradients_of_soft_predictions_that_hardly_differ"
        " test_native_gives_the_same_bits_on_any_number_of_threads",
        (
            "digits of D",
            "own_d[w] = -q / (1.0f + s);",
            "own_d[w] = label[w] >= 0 ? s - 1.0f : 0.0f;",
        ),
        (
            "digits of the label's gradient",
            "is_own ? own_q[w] * own[w] : products[w] - p * own[w]",
            "products[w] - p * own[w]",
        ),
        (
            "no center",
            "center[row + k] = float(",
            "center[row + k] = 0.0f * float(",
        ),
        (
            "sums of the last task",
            "std::fill(memory, memory + size, 0.0);",
            "if (task == 0) std::fill(memory, memory + size, 0.0);",
        ),
    ),
    *of(
        "portable/dilated_affinity",
        "test_dilated_affinity test_portable_does_not_depend_on_its_blocks"
        " test_portable_matches_the_reference"
        " test_targets_and_counts_match_the_reference"
        " test_labels_that_32_bits_confuse[portable]",
        ("neighbours above", "above + dy : above + dy + height", "above : above + height"),
        (
            "signals outside the image",
            "left, above, above), value=-1)",
            "left, above, above), value=0)",
        ),
        (
            "signals that are not valid",
            "valid, equal = (own >= 0) & (neighbor",
            "valid, equal = (neighbor",
        ),
        ("labels to ignore", " & (label != ignore_index), -1)", ", -1)"),
        (
            "labels beyond 32 bits",
            "target[images].to(torch.int64)",
            "target[images].to(torch.int32)",
        ),
        (
            "pixels without signals",
            "(self.same | self.different).any(dim=1)",
            "self.same[:, 0] >= 0",
        ),
        ("sign of same signals", " - same_grad * block.same", " + same_grad * block.same"),
        ("slope of the focus", "miss - gamma * pt * F", "miss - pt * F"),
        ("correct different signals", "correct = (x > 0) == block.same", "correct = x > 0"),
    ),
    *of(
        INSTANCE + "pairs",
        INSTANCE_TILES,
        (
            "fours of whole rows",
            "FOURS = tl.cdiv(W, 4)\n    row",
            "FOURS = W // 4\n    row",
        ),
        (
            "planes in a block",
            "(row // H).to(tl.int32) + h // H, h % H",
            "(row // H).to(tl.int32), h % H",
        ),
        ("fours of the next block", "four += BLOCK_FOURS % FOURS", "four += 0"),
        (
            "rows of the next block",
            "h += rows % H + is_next.to(tl.int32)",
            "h += rows % H",
        ),
        (
            "planes of the next block",
            "z += rows // H + is_next.to(tl.int32)",
            "z += rows // H",
        ),
        (
            "offsets of the first channel",
            "dy = tl.where(k == i, OFFSETS[3 * i + 1], dy)",
            "dy = OFFSETS[1]",
        ),
        (
            "voxels beyond a row",
            "counts = there & is_inside(z, h, w, D, H, W)",
            "counts = there",
        ),
        (
            "ignored voxels",
            "counts & (ids != ignored) & (other != ignored)",
            "counts & (other != ignored)",
        ),
        ("background", "same = same & (ids != background)", "same = same & (ids == ids)"),
        (
            "planes of the other voxel",
            "step = dz * tl.cast(stride_d, tl.int64) + dy * tl.cast",
            "step = dy * tl.cast",
        ),
        (
            "the hit for the miss",
            "return tl.where(u < 0, r, e * r), ",
            "return tl.where(u < 0, e * r, r), ",
        ),
    ),
    *of(
        INSTANCE + "pairs",
        INSTANCE_TESTS + "triton_matches_the_reference",
        (
            "channels that say different",
            "tl.where(same, -x, x) if INVERT else",
            "tl.where(same, x, -x) if INVERT else",
        ),
        ("ids in 32 bits", "tl.int64 if WIDE else tl.int32", "tl.int32 if WIDE else tl.int32"),
    ),
    *of(
        INSTANCE + "tables",
        INSTANCE_TILES,
        ("channels of the logits", "logits_ptr += stride_k", "logits_ptr += 0"),
        ("images of the ids", "ids_ptr += n * ids_stride_n", "ids_ptr += 0"),
        (
            "the first step alone",
            "z, h, four = fours_after(z, h, four, H, W, BLOCK_FOURS)",
            "z, h, four = z + 0, h + 0, four + 0",
        ),
        (
            "the other target",
            "tl.store(ptr + 4 + TERM, total(of_same))",
            "tl.store(ptr + 4 + TERM, total(of_different))",
        ),
        ("all pairs", "((counted >> 16) & 0xFFFF) - num_same", "(counted >> 16) & 0xFFFF"),
        ("pairs of one id", "tl.where(is_same, 0x10001, 0)", "tl.where(is_same, 0x10000, 0)"),
        ("pairs that do not count", "same & counts, counts & ~same", "same & counts, ~same"),
        ("squares", "square = miss * miss", "square = miss + 0.0"),
        ("focus", "tl.exp2(minus_log_miss * (gamma", "tl.exp2(loss * (gamma"),
    ),
    *of(
        INSTANCE + "gradient",
        INSTANCE_TILES,
        (
            "coefficients of the first image",
            "coefficients_ptr += n * (NUM_CHANNELS * 8)",
            "coefficients_ptr += 0",
        ),
        ("coefficients of the first channel", "coefficients_ptr += 8", "coefficients_ptr += 0"),
        (
            "coefficients of a target",
            "return tl.where(same, tl.load(ptr + 4 + TERM), tl.load(ptr + TERM))",
            "return tl.load(ptr + TERM)",
        ),
        ("sign", "else tl.where(same, -slope, slope)", "else slope"),
        ("derivative of the square", "of_square = 2.0 *", "of_square = 1.0 *"),
        ("derivative of the miss", "of_square * miss) * pt * miss", "of_square * miss) * miss"),
        (
            "pairs that do not count",
            "slope = tl.where(counts, slope, 0.0)",
            "slope = slope + 0.0",
        ),
        ("slope of the focus", "(gamma * pt * loss + miss)", "(pt * loss + miss)"),
        ("channels of the gradient", "grad_ptrs += grad_stride_k", "grad_ptrs += 0"),
    ),
    *of(
        "native/instance_affinity.cpp",
        INSTANCE_TESTS
        + "long_rows_and_several_tasks test_native_matches_the_reference"
        + " test_nothing_is_left_unwritten[native]",
        (
            "segments of a row",
            "w = begin; w < end; w += SEGMENT",
            "w = begin; w < end; w += 2 * SEGMENT",
        ),
        (
            "rows of the next plane",
            "if (++h == call.height) h = 0, z++;",
            "if (++h == call.height) h = 0;",
        ),
        (
            "ignored voxels",
            "(-Id(ids[w] != ignored) & -Id(others[w] != ignored))",
            "(-Id(ids[w] != ignored))",
        ),
        (
            "nothing is ignored",
            "-Id(others[w] != ignored)) | no_ignored",
            "-Id(others[w] != ignored))",
        ),
        ("background", "(-Id(ids[w] != background) | no_background)", "Id(-1)"),
        (
            "squares",
            "square_same += is_same ? miss * miss : 0.0f;",
            "square_same += is_same ? miss : 0.0f;",
        ),
        (
            "derivative of the square",
            "square_different = 2.0f * different[2]",
            "square_different = different[2]",
        ),
        (
            "focus of any gamma",
            "exp_of_negative(-gamma * minus_log_miss)",
            "exp_of_negative(-minus_log_miss)",
        ),
        (
            "channels that say different",
            "slope = is_same ? -slope * side : slope * side;",
            "slope = is_same ? -slope : slope;",
        ),
        (
            "tables of the last task",
            "table[i] += partial[size_t(task",
            "table[i] = partial[size_t(task",
        ),
        (
            "tables of the first image",
            "tables + task / tasks_per_image(call) * table_size",
            "tables + 0 * table_size",
        ),
        ("voxels without a pair", "std::fill(row, row + count, 0.0f);", ""),
    ),
    *of(
        "portable/instance_affinity",
        INSTANCE_TESTS
        + "portable_does_not_depend_on_its_blocks test_portable_matches_the_reference",
        ("background", "same &= source != background", "same &= source == source"),
        (
            "ignored voxels",
            "(source != ignore_index) & (destination != ignore_index)",
            "source != ignore_index",
        ),
        (
            "images of a block",
            "slice(i, min(n, i + images))",
            "slice(i, min(n, i + 1))",
        ),
        ("planes of a block", "slice(j, min(z_end, j + planes))", "slice(j, min(z_end, j + 1))"),
        ("slope of the focus", ".mul_(-gamma).add_(miss)", ".mul_(gamma).add_(miss)"),
        ("derivative of the square", "(2 * of_square * miss)", "(of_square * miss)"),
        ("sign", "sign if invert else sign.neg_()", "sign"),
        ("pairs that do not count", "slope.masked_fill_(~block.counted, 0)", "slope"),
    ),
    # --- The box-supervised pairwise loss ---------------------------------------------------------
    *of(
        BOXES + "pairs",
        BOX_TILES,
        ("rows of boxes", "tl.load(ptr), tl.load(ptr + 1)", "tl.load(ptr + 1), tl.load(ptr)"),
        ("boxes of masks", "boxes_ptr + 4 * m", "boxes_ptr + 0 * m"),
        ("last row of a box", "(h < bottom)", "(h <= bottom)"),
        ("first column of a box", "(w >= left)", "(w > left)"),
        ("rows in memory", "h.to(tl.int64) * stride_h", "h.to(tl.int64) * stride_w"),
        ("dilation of columns", "w + dx * DILATION", "w + dx"),
        ("neighbours outside", "is_inside(there_h, there_w, H, W)", "is_inside(h, w, H, W)"),
        ("bits", "(bits.to(tl.int32) >> k) & 1) == 1", "(bits.to(tl.int32) >> k) & 1) >= 0"),
    ),
    *of(
        BOXES + "tables",
        BOX_TILES,
        ("logarithm of the sum", "- log_of(x + y) +", "- log_of(x - y) +"),
        ("logarithm of the neighbour", "log_x + log_of(y)", "log_x + log_of(x)"),
        ("different signs", "+ tl.maximum(apart, 0.0)", "+ apart"),
        (
            "bits outside of the box",
            "bits_stride_w), mask=own, other=0)",
            "bits_stride_w), mask=is_inside(h, w, H, W), other=0)",
        ),
        ("images of masks", "tl.load(index_ptr + m) * bits_stride_n", "m * bits_stride_n * 0"),
        ("programs at the box's end", "(last_row >= top)", "(first_row >= top)"),
        ("programs after the box", "(first_row < bottom)", "(last_row < bottom)"),
        ("counts", "count += counts.to(tl.int32)", "count += own.to(tl.int32)"),
    ),
    *of(
        BOXES + "gradient",
        BOX_TILES,
        ("the opposite direction", "has_bit(its_bits, 7 - k)", "has_bit(its_bits, k)"),
        ("sign", "grad *= sign *", "grad *="),
        ("the sum's sign", "miss_at(sign * (x + y))", "miss_at(x + y)"),
        ("coefficients of masks", "coefficients_ptr + m)", "coefficients_ptr)"),
        ("programs near the box", "(last_row >= top - DILATION)", "(last_row >= top)"),
        ("pixels near the box", "bottom + DILATION, right + DILATION", "bottom + DILATION, right"),
        ("boxes of neighbours", "is_in_box(there_h, there_w, top", "is_in_box(h, w, top"),
        ("weights", "grad + slope, grad)", "grad + slope / weight, grad)"),
    ),
    *of(
        BOXES + "launchers",
        BOX_TILES,
        ("programs of a mask", "m, programs, dtype=torch.float32", "m, 1, dtype=torch.float32"),
        ("the last program", "(m * programs,)", "(m * programs - 1,)"),
        (
            "pixels without a program",
            "(m * cdiv(height * width, blocks.pixels),)",
            "(m * (height * width // blocks.pixels),)",
        ),
        ("strides of the gradient", "*grad.stride()", "*mask_logits.contiguous().stride()"),
    ),
    *of(
        "native/box_pairwise.cpp",
        BOX_TESTS
        + "long_rows_and_several_tasks test_native_matches_the_reference"
        + " test_nothing_is_left_unwritten[native]",
        ("segments of a row", "w < box.right; w += SEGMENT", "w < box.right; w += 2 * SEGMENT"),
        ("neighbours after a segment", "end + call.dilation)};", "end)};"),
        ("different signs", "(apart > 0.0f ? apart : 0.0f)", "0.0f"),
        ("pairs that do not count", "total += counts ? loss : 0.0f;", "total += loss;"),
        ("the opposite direction", "(bits_of_y[w] >> (7 - k))", "(bits_of_y[w] >> k)"),
        ("pairs of two boxes", "float(weight) * difference", "difference"),
        ("sign", "(x[w] < 0.0f ? -coefficient : coefficient)", "coefficient"),
        ("images of masks", "call.image_index[m], 0, h, left", "0, 0, h, left"),
        ("rows of boxes", "!box.has_row(h) || left >= right", "left >= right"),
        ("columns outside", "call.width - step.dx)", "call.width)"),
        ("rows near the box", "h < box.bottom + call.dilation", "h < box.bottom"),
        (
            "the last task",
            "divide_up(call.height, rows_per_task(call))",
            "call.height / rows_per_task(call)",
        ),
        ("zeros beside the box", "zeros(h, right, call.width);", ""),
    ),
    *of(
        "portable/box_pairwise",
        BOX_PORTABLE,
        ("the opposite direction", "(bits[there] >> (7 - k))", "(bits[there] >> k)"),
        ("images of masks", "similarity[image_index[masks]]", "similarity[image_index[:1]]"),
        ("pairs of two boxes", "loss * weight, 0)", "loss, 0)"),
        ("sign", "torch.where(logits < 0, -1, 1)", "torch.where(logits < 0, 1, 1)"),
        ("pairs that do not count", "torch.where(weight > 0, slope, 0)", "slope"),
    ),
    *of(
        "portable/box_pairwise",
        BOX_COLORS,
        ("dark colours", "images / 12.92)", "images / 12.9)"),
        ("valid neighbours", "values.mul_(valid[there])", "values.mul_(valid[here])"),
        ("threshold", "(values >= threshold)", "(values > 0)"),
        (
            "directions of bits",
            ">= threshold).to(torch.uint8) << k\n    return bits",
            ">= threshold).to(torch.uint8) << 7 - k\n    return bits",
        ),
    ),
    *of(
        "portable/image_affinity",
        "test_image_affinity test_weights_are_the_definition test_portable_matches_the_reference"
        " test_one_color_everywhere",
        ("positions", "weights += position_weights(", "weights -= position_weights("),
        ("values of the centre", "Mode(1, 0.1, EPS, True)", "Mode(1, 0.1, EPS, False)"),
        ("slope of the deviation", ".mul_(-kind.scale)", ".mul_(kind.scale)"),
        ("gradient of the centre", "x - mean, value=len(dilations))", "x - mean, value=1)"),
        ("pixels of the frame", "    fold_frame(grad_frame, neighbors.frame)\n", ""),
        ("one colour", "deviation == 0, math.inf", "deviation == 1, math.inf"),
    ),
    # --- Native kernels of dilated affinity and its propagation -----------------------------------
    *of(
        "native/affinity_propagation.cpp",
        PROPAGATION_TESTS + "native_kernels_do_not_depend_on_their_passes"
        " test_native_kernels_pass_nothing_through_columns_outside_the_image",
        (
            "the last vector of a neighbour",
            "int64_t last = divide_up(std::min(width, width - dx), LANES);",
            "int64_t last = std::min(width, width - dx) / LANES;",
        ),
        (
            "backwards as forwards",
            "backwards_ ? -neighbors[k].dx : neighbors[k].dx",
            "neighbors[k].dx",
        ),
        (
            "rows that are not like the last",
            "if (row == 0 || here != before)",
            "if (row == 0 || here.size() != before.size())",
        ),
        ("passes over the same classes", "        row.p += classes * row.pitch;\n", ""),
        ("one of the two sums", "sum[0] + sum[1]);\n        }", "sum[0]);\n        }"),
        ("sets that meet", "std::gcd(divisor, neighbor.dy)", "std::max(divisor, neighbor.dy)"),
        (
            "gradients of the set before",
            "        std::fill_n(grad_gates,",
            "        (void)(grad_gates,",
        ),
        ("slope of the gates", "(1.0f - gate[w]) * slope", "(1.0f - gate[w])"),
        ("surplus lanes", "        set.clear_surplus(to.p + row * plane);\n", ""),
        (
            "border pixels not yet normalised",
            "            if (layout.options.replicates) set.clear_surplus(to.p + row * plane);\n",
            "",
        ),
        (
            "surplus lanes of gradients",
            "                set.clear_surplus(other + row * plane);\n",
            "",
        ),
    ),
    *of(
        "native/affinity_propagation.cpp",
        PROPAGATION_TESTS + "native_kernels_pass_on_what_is_no_number_to_neighbors_alone"
        " test_nothing_to_divide_by_is_0_with_a_zero_gradient[native]"
        " test_the_largest_passes_its_gradient_to_the_first_of_equals[native]"
        " test_native_kernels_do_not_depend_on_the_number_of_threads"
        " test_only_what_needs_a_gradient_gets_one",
        ("a total of 0", "total == 0.0f ? zero : 1.0f / total", "1.0f / total"),
        ("all of the largest", "            left = found ? zero : left;\n", ""),
        ("rows of several threads", "(task + 1) * rows_of_task", "(task + 1) * rows_of_task - 1"),
        ("only the gradient of the affinity", "t == 0 && !grad_probs", "!grad_probs"),
    ),
    *of(
        "native/dilated_affinity.cpp",
        DILATED_TESTS + "labels_that_32_bits_confuse[native]"
        " test_logits_that_do_not_count_may_be_anything[native]"
        " test_a_logit_that_is_no_number_shows[native]"
        " test_the_smallest_logit_above_zero_predicts_a_same_label[native]",
        ("labels beyond 32 bits", "beyond |= k & ~ignored", "beyond |= k & ignored"),
        (
            "ranks of another image",
            "rank(target, n, ignore_index);",
            "rank(target, 0, ignore_index);",
        ),
        (
            "signals that are not valid",
            "valid = ~((own | there) >> 31);",
            "valid = ~(there >> 31);",
        ),
        ("logits of 0", "(logit[w] > 0.0f ? -1 : 0)", "(logit[w] >= 0.0f ? -1 : 0)"),
    ),
    *of(
        "native/dilated_affinity.cpp",
        DILATED_TESTS + "native_kernels_do_not_depend_on_their_strips"
        " test_native_kernels_take_images_smaller_than_a_vector"
        " test_gradient_is_at_most_twice_as_far_off_as_eager"
        " test_native_matches_the_reference",
        (
            "labels without columns beside them",
            "pitch_(whole_vectors(width) + LANES)",
            "pitch_(width)",
        ),
        ("pixels without signals", "!= 0 ? k : CATEGORIES", "!= 0 ? k : NEIGHBORS"),
        ("the focus", "power[w] = -gamma * (s.log", "power[w] = -1.5f * (s.log"),
        ("slope of the focus", "(gamma * pt * s.loss + q)", "(pt * s.loss + q)"),
        ("counts of the row before", "                counts.clear(0, columns);\n", ""),
        (
            "a neighbour in the strip before",
            "first = std::max(patch.w, -dx);",
            "first = std::max<int64_t>(0, -dx);",
        ),
        (
            "bands that share a row",
            "std::min(height, start + band_rows())",
            "std::min(height, start + band_rows() + 1)",
        ),
        ("sign of same signals", "= -table[2 * k + 1];", "= table[2 * k + 1];"),
        ("gradients of the neighbour before", "result.clear(0, first);", ""),
        (
            "memory behind the last logit",
            "std::memcpy(buffer, logit, count * sizeof(float));",
            "",
        ),
    ),
    *of(
        "portable/blocks",
        "test_affinity_field test_portable_does_not_depend_on_its_blocks"
        " test_portable_matches_the_reference",
        (
            "images of a block",
            "slice(i, i + images), slice(j, j + classes)",
            "slice(i, i + 1), slice(j, j + classes)",
        ),
        ("ignored labels", " & (label != ignore_index)", ""),
    ),
    *of(
        "portable/blocks",
        "test_affinity_propagation test_portable_does_not_depend_on_its_blocks",
        (
            "a frame of the narrower step",
            "max(dy for dy, _ in inside)",
            "min(dy for dy, _ in inside)",
        ),
        ("a frame without its place", "slice(first + step + frame,", "slice(first + step,"),
    ),
    *of(
        "portable/blocks",
        "test_affinity_field test_a_target_beyond_32_bits_is_no_class[portable]"
        " test_nothing_is_left_unwritten[portable]",
        ("labels that are no class", " & (label < num_classes)", ""),
        (
            "layout",
            "return torch.empty_like(logits, dtype=dtype).copy_(grad)",
            "return grad.to(like.dtype)",
        ),
    ),
    # --- One channel, several labels ------------------------------------------------------------
    *of(
        NATIVE_FIELD,
        "test_sigmoid test_binary_cross_entropy_beside_it test_every_backend_matches_the_reference",
        ("the labels of a channel", "std::max<int64_t>(c, 2)", "c"),
        (
            "the logit of the first class",
            "std::fill_n(top, whole, 0.0f);",
            "std::fill_n(top, whole, 1.0f);",
        ),
        ("the lesser probability", "less = rest[w] * inverse[w]", "less = rest[w]"),
        ("p of a channel", "p = x[w] > 0.0f ? inverse[w] : less", "p = less"),
        ("q of a channel", "q = x[w] > 0.0f ? less : inverse[w]", "q = 1.0f"),
        ("sign of label 0", "(label[w] == 1 ? -q : p)", "(label[w] == 1 ? -q : -p)"),
        ("log loss of label 1", "log_total[w] + (top[w] - x[w])", "log_total[w] + top[w]"),
        ("a channel's pixels that do not count", "masked(result, mask(", "masked(result, ~mask("),
    ),
    *of(
        "ops/affinity_field",
        "test_sigmoid test_binary_cross_entropy_beside_it"
        " test_one_channel_is_the_softmax_over_two test_sizes_are_learned_by_channel",
        ("gradient of the second class", "copy_(grad[:, 1:])", "copy_(grad[:, :1])"),
        ("the second class's sums alone", "F.pad(grad_sums, (0, 0, 1, 0))", "grad_sums"),
        ("log losses of the channels", "of_log_loss = log_loss_coefficients.unbind()", "pass"),
        (
            "totals of the channels",
            "torch.stack(self.entry_counts()).sum(dim=1)",
            "torch.stack(self.entry_counts()).amax(dim=1)",
        ),
    ),
    # --- Conventions that people bring ----------------------------------------------------------
    *of(
        "api/affinity_field",
        "test_conventions test_label_smoothing_is_torchs test_without_the_background"
        " test_terms_add_up_to_the_loss test_names_of_terms",
        ("smoothing of the own label", " + smoothing.sum(), smoothing", ", smoothing"),
        ("pixels that count alone", "return above.where(label >= 0, 0)", "return above"),
        (
            "counts of the background",
            "torch.stack(counted.entry_counts())[:, 1:]",
            "torch.stack(counted.entry_counts())",
        ),
        ("sums of the background", "F.pad(coefficients[:, 1:], (0, 0, 1, 0))", "coefficients"),
    ),
    *of(
        "api/labels",
        "test_conventions test_labels_resized_to_any_size test_which_pixel_of_513_is_taken"
        " test_ids_of_volumes_are_resized",
        ("the middle of a pixel", "(2 * i + 1) * m", "2 * i * m"),
        ("the nearest corner", "(m - 1) + n - 1)", "(m - 1))"),
        ("a single pixel", "max(2 * (n - 1), 1)", "max(2 * (n - 1), 2 * n)"),
        ("one size for both axes", "range(-len(sizes), 0)", "range(1, len(sizes) + 1)"),
    ),
    *of(
        "api/deep_supervision",
        "test_conventions test_deep_supervision_is_a_weighted_sum"
        " test_deep_supervision_hands_progress_on_and_learns_sizes",
        ("the sum of the factors", "2 - 0.5 ** (number - 1)", "2"),
        ("the factors", "tuple(0.5**i / total", "tuple(1 / total"),
        (
            "labels at each resolution",
            "isinstance(target, Tensor):\n                labels",
            "labels is None:\n                labels",
        ),
        ("progress", "{} if progress is None", "{} if True"),
    ),
    *of(
        "monai",
        "test_adapters test_words_of_monai test_background_of_monai",
        (
            "pixels ignored in all channels",
            "label.where(ignored, ",
            "label.where(ignored & ~ignored, ",
        ),
        ("a channel for each class", "(label == classes)", "(label != classes)"),
        (
            "no label is ignored by default",
            "ignore_index: int | None = None",
            "ignore_index: int | None = 1",
        ),
        ("channels without the background", "input[:, 1:], target[:, 1:]", "input, target"),
    ),
    *of(
        "hf",
        "test_adapters test_calling_convention_of_a_trainer test_one_label_of_transformers"
        " test_trainer_of_transformers",
        ("a batch's share", "sum() / num_items_in_batch", "sum() / labels.numel()"),
        ("outputs by name", 'outputs["logits"] if isinstance(outputs, Mapping) else', ""),
        ("logits of the labels' size", 'mode="bilinear"', 'mode="nearest"'),
        ("labels of the logits' size", 'if self.resolution == "logits"', "if False"),
    ),
    *of(
        "nnunet",
        "test_adapters test_field_beside_a_loss_of_nnunet test_trainer_of_nnunet_on_a_stand_in",
        (
            "pixels ignored in regions",
            "target[:, num_channels:] != 0",
            "target[:, num_channels:] < 0",
        ),
        ("slices of a volume", "volume.transpose(1, 2).flatten(0, 1)", "volume.flatten(0, 1)"),
        ("nnU-Net's own loss", "self.own(net_output, target) + field", "field"),
        ("the decay", "self.current_epoch / self.num_epochs", "0.0"),
    ),
    *of(
        "smp",
        "test_training_loops test_calling_convention_of_segmentation_models_pytorch"
        " test_several_labels_in_segmentation_models_pytorch"
        " test_ignore_index_of_segmentation_models_pytorch"
        " test_half_probabilities_are_read_in_float32",
        (
            "the library's ignore_index",
            "label.masked_fill(label == ignored, ignored_by_loss)",
            "label",
        ),
        ("log odds of a probability", " - _log(1 - probs)", ""),
        ("the class without a channel", "(torch.zeros_like(y_pred), y_pred)", "(y_pred, y_pred)"),
        ("half precision", "torch.promote_types(y_pred.dtype, torch.float32)", "y_pred.dtype"),
    ),
    *of(
        "mmseg",
        "test_training_loops test_calling_convention_of_mmsegmentation"
        " test_the_registry_of_mmengine",
        ("the factor of the loss", "self.loss_weight * super()", "super()"),
        (
            "the head's ignore_index",
            "self.ignore_index = checks.check_ignore_index(ignore_index)",
            "pass",
        ),
        ("weights of pixels", "if value is not None:", "if False:"),
        ("the name in the log", "self.loss_name = loss_name", 'self.loss_name = "loss_aaf"'),
    ),
]


def in_turns(mutants: Iterable[Mutant]) -> list[Mutant]:
    """The first fault of every file, the second of every file, and so on."""
    files: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        files.setdefault(mutant.file, []).append(mutant)
    turns = chain.from_iterable(zip_longest(*files.values()))
    return [mutant for mutant in turns if mutant is not None]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Says which deliberate faults no test catches.")
    parser.add_argument("words", nargs="*", metavar="WORD", help="of a fault's file or name")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no fault begins later")
    options = parser.parse_args(arguments)
    words = options.words or [""]
    chosen = in_turns(m for m in MUTANTS if any(word in str(m) for word in words))
    end = time.monotonic() + options.seconds
    survivors = done = 0
    for mutant in chosen:
        if time.monotonic() >= end:
            break
        caught = is_caught(mutant)
        survivors += not caught
        done += 1
        print("caught  " if caught else "SURVIVED", mutant, flush=True)
    print(f"{survivors} of {done} survived, {len(chosen) - done} left out")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
