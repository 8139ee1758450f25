"""The affinity field: every implementation against the float64 reference, and the reference against
the definition.
"""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import available
from inputs import given, maker, subset
from interpreted import smaller_if_interpreted
from layouts import LAYOUTS, laid_out
from opchecks import image_size, opcheck

import tritonaff
from tritonaff.functional import AffinityFieldTerms
from tritonaff.kernels.blocks import override
from tritonaff.testing import CASES, Case, check_parity, evaluate, make_inputs

VARIANTS = ("paper", "authors")
BACKENDS = ("portable", "triton")


# --- The reference against the definition, pixel by pixel --------------------------------------


def terms_by_definition(logits, target, kernel_sizes, margin, eps, ignore_index, variant):
    """The equations as loops over images, pixels, neighbours and classes."""
    n, c, height, width = logits.shape
    shape = c, len(kernel_sizes)
    edge_sum, non_edge_sum = torch.zeros(shape).double(), torch.zeros(shape).double()
    edge_count, non_edge_count = torch.zeros(shape).long(), torch.zeros(shape).long()
    probability = logits.double().softmax(1)

    def counted(b, y, x):
        if not (0 <= y < height and 0 <= x < width):
            return False
        return int(target[b, y, x]) in range(c) and int(target[b, y, x]) != ignore_index

    def kl(p_j, p_i):
        if variant == "paper":
            a_j, a_i = (min(max(p, eps), 1 - eps) for p in (p_j, p_i))
            b_j, b_i = 1 - a_j, 1 - a_i
        else:
            a_j, a_i = max(p_j, eps), max(p_i, eps)
            b_j, b_i = max(1 - p_j, eps), max(1 - p_i, eps)
        return a_j * math.log(a_j / a_i) + b_j * math.log(b_j / b_i)

    pixels = itertools.product(range(n), range(height), range(width))
    for (b, y, x), (k, size) in itertools.product(pixels, enumerate(kernel_sizes)):
        d = size // 2
        for dy, dx in itertools.product((-d, 0, d), repeat=2):
            pair = (dy, dx) != (0, 0) and counted(b, y, x) and counted(b, y + dy, x + dx)
            if variant == "authors":
                pair = pair and counted(b, y - dy, x - dx)
            if not pair:
                continue
            label_i, label_j = int(target[b, y, x]), int(target[b, y + dy, x + dx])
            for channel in range(c):
                row = channel if variant == "paper" else label_i
                p_i, p_j = (
                    float(probability[b, channel, y, x]),
                    float(probability[b, channel, y + dy, x + dx]),
                )
                if (label_i == channel) != (label_j == channel):
                    edge_sum[row, k] += max(0.0, margin - kl(p_j, p_i))
                    edge_count[row, k] += 1
                else:
                    non_edge_sum[row, k] += kl(p_j, p_i)
                    non_edge_count[row, k] += 1
    return AffinityFieldTerms(edge_sum, non_edge_sum, edge_count, non_edge_count)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 2, 1, 1), (1, 2, 1, 6), (1, 4, 9, 2)])
def test_reference_is_the_definition(variant, shape):
    torch.manual_seed(0)
    logits = 4 * torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target[torch.rand(target.shape) < 0.15] = 255
    expected = terms_by_definition(logits, target, (3, 7), 2.0, 1e-3, 255, variant)
    with tritonaff.use_backend("reference"):
        terms = tritonaff.affinity_field_terms(
            logits, target, (3, 7), margin=2.0, eps=1e-3, variant=variant
        )
    for result, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)


AUTHORS = json.loads((Path(__file__).parent / "data/affinity_field_authors.json").read_text())[
    "cases"
]


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("case", AUTHORS, ids=lambda case: f"sizes {case['kernel_sizes']}")
def test_authors_variant_equals_the_published_code(backend, case):
    """Loss and gradients that the authors' TensorFlow code gave for these inputs in float64."""

    def double(name):
        return torch.tensor(case[name], dtype=torch.float64)

    logits = double("logits").requires_grad_()
    edge_weight = double("edge_scores").softmax(1).requires_grad_()
    non_edge_weight = double("non_edge_scores").softmax(1).requires_grad_()
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_loss(
            logits,
            torch.tensor(case["target"]),
            case["kernel_sizes"],
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            variant="authors",
        )
        loss.backward()
        terms = tritonaff.affinity_field_terms(
            logits, torch.tensor(case["target"]), case["kernel_sizes"], variant="authors"
        )
    counts = torch.stack([terms.edge_count.sum(0), terms.non_edge_count.sum(0)], dim=1)
    assert counts.tolist() == case["counts"]
    exactly = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(loss.detach(), double("loss"), **exactly)
    torch.testing.assert_close(logits.grad, double("grad_logits"), **exactly)
    torch.testing.assert_close(edge_weight.grad, double("grad_edge_weight"), **exactly)
    torch.testing.assert_close(non_edge_weight.grad, double("grad_non_edge_weight"), **exactly)


# --- Every implementation against the reference -------------------------------------------------


def case_with(kernel_sizes, edge_factor=1.0, **options):
    """The operation with these options, its tables weighted differently per class and size."""
    # A divergence that rounding moves across the margin, 0 for example, has another gradient.
    margin = options.get("margin", 3.0) + 16 * torch.finfo(torch.float32).eps
    nearby = _case_with(kernel_sizes, edge_factor, **options | {"margin": margin})
    return replace(_case_with(kernel_sizes, edge_factor, **options), nearby=nearby)


def _case_with(kernel_sizes, edge_factor, **options):

    def tables(logits, target):
        return tritonaff.affinity_field_terms(logits, target, kernel_sizes, **options)

    def loss(edge_sum, non_edge_sum, edge_count, non_edge_count):
        weight = 1 + torch.arange(edge_sum.numel(), device=edge_sum.device).view_as(edge_sum) / 7
        edge, non_edge = edge_factor * edge_sum * weight, non_edge_sum * weight.flip(0)
        entries = (edge_count.sum() + non_edge_count.sum()).clamp(min=1)
        return (edge + non_edge).sum() / entries

    largest_term = CASES["affinity_field"].largest_term
    return Case.of_tables("affinity_field", tables, loss, largest_term)


@maker
def inputs(pick, dtypes, rows=20, ignored_labels=(255, -100, 0)):
    n, c = pick([1, 2]), pick(range(2, 7))
    height, width = pick(range(1, rows + 1)), pick(range(1, 37))
    torch.manual_seed(pick(range(2**16)))
    ignore_index = pick(ignored_labels)
    target_dtype = pick([torch.uint8, torch.int32, torch.int64])

    labels = pick(["noise", "patches", "one label", "all ignored"])
    target = torch.randint(0, c, (n, height, width))
    if labels == "patches":
        target = target[:, ::3, ::4].repeat_interleave(3, 1).repeat_interleave(4, 2)
        target = target[:, :height, :width].contiguous()
    elif labels == "one label":
        target = torch.full_like(target, c - 1)
    ignored = torch.rand(target.shape) < (1.0 if labels == "all ignored" else 0.1)
    if target_dtype != torch.uint8 or ignore_index >= 0:
        target[ignored] = ignore_index
    target = target.to(target_dtype)

    scale = pick([0.0, 0.1, 1.0, 4.0, 15.0])
    confidence = pick([0.0, 9.0])
    logits = scale * torch.randn(n, c, height, width)
    shown = torch.where((target < c) & (target >= 0), target, 0).long()
    logits = logits + confidence * torch.nn.functional.one_hot(shown, c).movedim(-1, 1)
    logits = logits.to(pick(dtypes))
    layout = pick(LAYOUTS)
    logits = laid_out(logits, layout)
    if layout == "strided":
        target = torch.stack([target, target], dim=1)[:, 0]
    return logits, target, ignore_index


def options(pick):
    return {
        "kernel_sizes": subset(pick, [3, 5, 7, 13], most=3),
        "margin": pick([0.0, 0.5, 3.0]),
        "eps": pick([1e-4, 1e-2, 0.3]),
    }


@given(inputs([torch.float32, torch.bfloat16, torch.float16, torch.float64]), options)
def test_portable_matches_the_reference(values, options):
    logits, target, ignore_index = values
    case = case_with(**options, ignore_index=ignore_index)
    check_parity(case, "portable", logits, target)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), options, rows=24)
def test_native_matches_the_reference(values, options):
    logits, target, ignore_index = values
    case = case_with(**options, ignore_index=ignore_index)
    check_parity(case, available("native"), logits, target)


# The dense kernel marches row by row: with few rows the interpreter is fast. These rows are enough
# for every row in registers to pass through once.
TILE_ROWS = 9


@given(inputs([torch.float32, torch.bfloat16, torch.float16], TILE_ROWS), options, rows=8)
def test_triton_matches_the_reference(values, options):
    pytest.importorskip("triton", minversion="3.6")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, target, ignore_index = values
    case = case_with(**options, ignore_index=ignore_index)
    check_parity(case, "triton", logits.to(device), target.to(device))


@given(inputs([torch.float32, torch.float64]), options)
def test_authors_variant_matches_the_reference(values, options):
    logits, target, ignore_index = values
    case = case_with(**options, ignore_index=ignore_index, variant="authors")
    check_parity(case, "portable", logits, target)


@pytest.mark.parametrize(
    ("shape", "confidence"), [((1, 7, 33, 40), 9.0), ((1, 40, 20, 9), 0.0)], ids=str
)
def test_larger_images_of_many_classes(backend, device, shape, confidence):
    """More than one block of classes and pixels in both directions."""
    check_parity(
        CASES["affinity_field"], backend, *make_inputs(shape, device=device, confidence=confidence)
    )


@pytest.mark.parametrize("block", [1, 150])
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block):
    """Blocks and bands of one class, one row, one image."""
    from tritonaff.portable import blocks

    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    for case in (case_with((3, 7)), case_with((5,), variant="authors")):
        check_parity(case, "portable", *make_inputs((3, 4, 6, 7)))


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        *(("3-7", layout) for layout in LAYOUTS),
        ("13-5-3-9-7", "contiguous"),
        ("41-5-201", "channels_last"),
        ("41-5-201", "contiguous"),
        ("601", "strided"),
    ],
)
def test_native_kernels_do_not_depend_on_their_tiles(sizes, layout):
    """Seams between tiles and groups of columns; sizes that keep rows, and sizes that do not."""
    logits, target = make_inputs((2, 2, 75, 611))
    logits, target = laid_out(logits, layout), target.to(torch.uint8)
    case = case_with(tuple(map(int, sizes.split("-"))))
    check_parity(case, available("native"), logits, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_kernels_do_not_depend_on_the_number_of_threads(dtype):
    case, values = CASES["affinity_field"], make_inputs((2, 19, 70, 150), dtype)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(case, available("native"), *values))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


def test_native_kernels_far_beyond_one_tile():
    """Labels that share a bit, and so many classes that a tile is small."""
    check_parity(case_with((3, 5)), available("native"), *make_inputs((1, 600, 20, 150)))


def test_portable_without_selecting_pairs(monkeypatch):
    """Devices that cannot wait for the number of edges take all pairs, with weight 0 or 1."""
    from tritonaff.portable import affinity_field as portable

    monkeypatch.setattr(portable, "selects_pairs", lambda device: False)
    check_parity(case_with((3, 7)), "portable", *make_inputs((2, 4, 11, 9)))


@pytest.mark.parametrize(("width", "aligned"), [(13, False), (12, True), (12, False)])
def test_tiles_do_not_depend_on_their_blocks(device, width, aligned):
    """Many small patches: every seam between programs."""
    pytest.importorskip("triton", minversion="3.6")
    strips = {"rows": 3, "strip_classes": 2, "lanes": 8, "unroll": 2}  # an odd number of steps
    patches = {"patch": (8, 8), "part": (4, 4), "count_programs": 2}  # several patches each
    pixels = {"pixels": 64, "pixel_classes": 2, "partial_sums": 2}
    logits, target = make_inputs((2, 3, 5, width), device=device)
    if not aligned:  # the first pixel is not at a multiple of 16 bytes
        logits = torch.cat((logits.new_empty(1), logits.flatten()))[1:].view(logits.shape)
    with override(affinity_field=strips | patches | pixels):
        check_parity(case_with((3, 9)), "triton", logits, target)


@pytest.mark.parametrize("kernel_sizes", [(3,), (13,), (3, 13)])
@pytest.mark.parametrize("side", ["below", "beside"])
def test_labels_that_meet_between_patches(device, kernel_sizes, side):
    """Every patch holds one label: all edges lead to pixels of other patches, below or beside."""
    pytest.importorskip("triton", minversion="3.6")
    logits, target = make_inputs((1, 2, 16, 8), device=device)
    target[:, :8], target[:, 8:] = 0, 1
    if side == "beside":
        logits, target = logits.mT, target.mT
    with override(affinity_field={"patch": (8, 8), "part": (4, 8)}):
        check_parity(case_with(kernel_sizes), "triton", logits, target)


def test_more_counts_than_pixels(device, poisoned_memory):
    """A program of few pixels begins more than a block of counts."""
    pytest.importorskip("triton", minversion="3.6")
    logits, target = make_inputs((1, 50, 2, 3), device=device)
    counts = []
    for backend in BACKENDS:
        with (
            override(affinity_field={"pixels": 16, "pixel_classes": 64}),
            tritonaff.use_backend(backend),
        ):
            _, _, *tables = tritonaff.affinity_field_terms(logits, target)
        counts.append(tables)
    assert all(map(torch.equal, *counts))


@pytest.mark.parametrize("kernel_size", [3, 7])
def test_pixels_alone_among_others(device, kernel_size):
    """All neighbours have one label, larger or smaller; at size 7 no neighbour is in the same part
    of the patch.
    """
    pytest.importorskip("triton", minversion="3.6")
    logits, target = make_inputs((1, 3, 17, 24), device=device)
    target[:] = 1
    target[:, 5::8, 3::8], target[:, 5::8, 7::8] = 0, 2
    with override(affinity_field={"patch": (8, 8), "part": (4, 2)}):
        check_parity(case_with((kernel_size,)), "triton", logits, target)


def test_channels_last(backend, device):
    logits, target = make_inputs((2, 3, 5, 6), device=device)
    check_parity(case_with((3,)), backend, laid_out(logits, "channels_last"), target)


def test_several_largest_logits(backend, device):
    """The gradient of a single largest logit follows from the gradients of the other classes."""
    logits, target = make_inputs((1, 4, 6, 8), device=device, confidence=0.0)
    check_parity(case_with((3,)), backend, logits.round(), target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_edges_in_half_precision(backend, device, dtype):
    """The edge kernel replaces the dense gradient in bfloat16 and corrects it in float16."""
    check_parity(case_with((3, 5)), backend, *make_inputs((1, 3, 8, 12), dtype, device))


def test_a_sure_and_wrong_pixel_in_float16(backend, device):
    """At a usual loss scale: d loss / d p is 1 / eps times the gradient of the logits."""
    target = torch.zeros(1, 16, 16, dtype=torch.int64, device=device)
    target[:, :, 8:] = 1
    logits = 2.0 * torch.nn.functional.one_hot(target, 4).movedim(-1, 1)
    logits[:, :, :, 8] = torch.tensor([9.6, 0, 0, 0], device=device)[:, None]
    logits = logits.half().requires_grad_()
    (expected,) = torch.autograd.grad(
        2**14 * tritonaff.affinity_field_loss(logits.double(), target), logits
    )
    with tritonaff.use_backend(backend):
        (grad,) = torch.autograd.grad(2**14 * tritonaff.affinity_field_loss(logits, target), logits)
    torch.testing.assert_close(grad, expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_a_number_shows(backend, device, bad, monkeypatch):
    """With a GPU's maximum, which drops NaN, in place of the interpreter's."""
    if backend == "triton":
        from triton.runtime.interpreter import InterpreterBuilder

        for name, operation in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(
                InterpreterBuilder,
                name,
                lambda self, a, b, operation=operation: self.binary_op(a, b, operation),
            )
    logits, target = make_inputs((1, 4, 12, 12), device=device)
    logits[0, 1, 5, 6] = bad
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_loss(logits.requires_grad_(), target)
        (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan()
    assert not grad[0, :, 5, 6].isfinite().any()


@pytest.mark.parametrize(
    ("width", "sizes"), [(56, (3, 9)), (57, (13, 3)), (116, (13, 3)), (250, (3, 9))]
)
def test_strips_of_any_width(device, width, sizes):
    """Strips that end with an image, inside one, between two; sizes that reach out of a strip."""
    pytest.importorskip("triton", minversion="3.6")
    check_parity(case_with(sizes), "triton", *make_inputs((2, 2, 2, width), device=device))


@pytest.mark.parametrize(("between", "before"), [(0, 0), (1, 0), (0, 1), (4, 4)])
def test_planes_that_begin_anywhere(backend, device, between, before):
    """Four columns of a row are loaded at once only at addresses that are multiples of four."""
    logits, target = make_inputs((2, 3, 7, 12), device=device)
    memory = torch.zeros(before + 6 * (7 * 12 + between), device=device)
    planes = memory[before:].view(2, 3, -1)[..., : 7 * 12].view(2, 3, 7, 12)
    check_parity(case_with((3, 5)), backend, planes.copy_(logits), target)


def test_nothing_is_left_unwritten(backend, device, poisoned_memory):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        logits, target = make_inputs((2, 5, 13, 35), device=device)
        target[0] = 255
        logits = logits.contiguous(memory_format=memory_format)
        results = evaluate(CASES["affinity_field"], backend, logits, target)
        expected = evaluate(CASES["affinity_field"], "reference", logits, target)
        assert all(result.isfinite().all() for result in results.values())
        for name in ("edge_count", "non_edge_count"):
            torch.testing.assert_close(results[name], expected[name])
        assert results["gradient"].stride() == logits.stride()
        assert not results["gradient"][0].any()


def test_same_bits_every_time(backend, device):
    if backend == "portable":
        device = torch.device("cpu")  # GPUs scatter with atomics, in any order
    values = make_inputs(smaller_if_interpreted((2, 5, 30, 40), backend, device), device=device)
    first = evaluate(CASES["affinity_field"], backend, *values)
    second = evaluate(CASES["affinity_field"], backend, *values)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- Cross-entropy in the same operation ---------------------------------------------------------


def separate_losses(logits, target, kernel_sizes, weight, ignore_index, variant):
    """F.cross_entropy plus the affinity field loss, in float64."""
    logits = logits.double()
    label = target.long()
    known = (label >= 0) & (label < logits.shape[1]) & (label != ignore_index)
    label = label.where(known, -100)
    weight = None if weight is None else weight.double()
    loss = torch.nn.functional.cross_entropy(logits, label, weight)
    if not known.any() or (weight is not None and weight[label[known]].sum() == 0):
        loss = 0 * logits.sum()  # torch gives NaN
    with tritonaff.use_backend("reference"):
        return loss + tritonaff.affinity_field_loss(
            logits, target, kernel_sizes, ignore_index=ignore_index, variant=variant
        )


weights = [None, "random", "some are 0", "negative"]


def check_cross_entropy(backend, values, kind, variant="paper"):
    logits, target, ignore_index = values
    c = logits.shape[1]
    weight = None if kind is None else torch.rand(c, generator=torch.Generator().manual_seed(1))
    if kind == "some are 0":
        weight[::2] = 0
    if kind == "negative":
        weight = -weight
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    logits = logits.to(device).detach().requires_grad_()
    target, weight = target.to(device), weight if weight is None else weight.to(device)
    expected = separate_losses(logits, target, (3, 5), weight, ignore_index, variant)
    (exact,) = torch.autograd.grad(expected, logits, materialize_grads=True)
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_cross_entropy(
            logits, target, (3, 5), weight=weight, ignore_index=ignore_index, variant=variant
        )
        (gradient,) = torch.autograd.grad(loss, logits)
    # Float32 logits of up to 60 are themselves 4e-6 off, and so is a log-probability.
    assert (loss - expected).abs() <= 1e-5 * (1 + expected.abs())
    rounding = 2e-5 if logits.dtype in (torch.float32, torch.float64) else 2e-2
    assert gradient.dtype == logits.dtype
    assert (gradient - exact).double().norm() <= rounding * (exact.double().norm() + 1e-3)


@given(inputs([torch.float32, torch.bfloat16, torch.float64]), weights, VARIANTS)
def test_cross_entropy_with_the_affinity_field(values, kind, variant):
    check_cross_entropy("portable", values, kind, variant)
    if variant == "paper" and values[0].dtype != torch.float64:
        check_cross_entropy(available("native"), values, kind)
    logits, target, ignore_index = values  # in float32 the reference's q is 1e-3 off
    check_cross_entropy("reference", (logits.double(), target, ignore_index), kind, variant)


@given(inputs([torch.float32, torch.bfloat16], TILE_ROWS), weights, rows=6)
def test_triton_cross_entropy_with_the_affinity_field(values, kind):
    pytest.importorskip("triton", minversion="3.6")
    check_cross_entropy("triton", values, kind)


@pytest.mark.parametrize("confidence", [0.0, 20.0])
def test_cross_entropy_keeps_its_digits(backend, device, confidence):
    """Confident pixels too, whose loss is far below the rounding of 1, keep their digits."""
    logits, target = make_inputs((1, 5, 12, 16), device=device, confidence=confidence)
    logits.requires_grad_()
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_cross_entropy(
            logits, target, edge_lambda=0, non_edge_lambda=0
        )
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = torch.nn.functional.cross_entropy(logits.double(), target, ignore_index=255)
    (exact_gradient,) = torch.autograd.grad(exact, logits)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-6, atol=0)
    assert (gradient - exact_gradient).norm() <= 2e-6 * exact_gradient.norm()


@pytest.mark.parametrize("backend", ["portable", "native"])
@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_gradient_is_at_most_twice_as_far_off_as_eager(backend, confidence):
    """The budget without the allowance for nearly exact eager results: float32, a whole
    gradient.
    """
    logits, target = make_inputs((1, 19, 96, 128), confidence=confidence)
    case = CASES["affinity_field"]
    exact = evaluate(case, "reference", logits.double(), target)["gradient"]
    eager = evaluate(case, "reference", logits, target)["gradient"]
    ours = evaluate(case, available(backend), logits, target)["gradient"]
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


def test_confident_logits_keep_their_digits(backend, device):
    """Float32 results as good as on noise, where eager mode is off by 1e-5 (sum) and 1e-3."""
    logits, target = make_inputs((1, 5, 24, 32), device=device, confidence=12.0)
    case = CASES["affinity_field"]
    exact = evaluate(case, "reference", logits.double(), target)
    eager = evaluate(case, "reference", logits, target)
    ours = evaluate(case, backend, logits, target)
    of_sum = 2e-6
    if backend == "triton":
        from tritonaff.kernels.affinity_field.mathematics import has_fast_log

        if has_fast_log():  # it may be off by 2^-22, four roundings
            of_sum = 8e-6
    for name, allowed in (("non_edge_sum", of_sum), ("gradient", 2e-6)):
        error = ((ours[name] - exact[name]).norm() / exact[name].norm()).item()
        of_eager = ((eager[name] - exact[name]).norm() / exact[name].norm()).item()
        assert error < allowed < of_eager


# --- Derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck(backend, variant):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 3, 2, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (1, 4, 5))
    target[0, 0, :2] = 255

    def loss(logits, edge_weight, non_edge_weight):
        return tritonaff.affinity_field_loss(
            logits,
            target,
            (3, 5),
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            variant=variant,
            # Both sides of the hinge and of the clamp occur, none within gradcheck's step.
            margin=0.8,
            eps=0.05,
        )

    with tritonaff.use_backend(backend):
        assert torch.autograd.gradcheck(loss, (logits, *weights))


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_gradcheck_with_cross_entropy(backend):
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(3, dtype=torch.float64)
    target = torch.randint(0, 3, (1, 4, 5))
    target[0, 0, :2] = 255

    def loss(logits):
        return tritonaff.affinity_field_cross_entropy(
            logits, target, (3, 5), weight=weight, margin=0.8, eps=0.05
        )

    with tritonaff.use_backend(backend):
        assert torch.autograd.gradcheck(loss, (logits,))


def loss_of_terms(logits, target, kernel_sizes):
    """The loss of affinity_field_loss, from tables whose gradient comes afterwards."""
    terms = tritonaff.affinity_field_terms(logits, target, kernel_sizes)
    edge_sum, non_edge_sum, *counts = (table.sum(dim=0) for table in terms)
    edge_count, non_edge_count = (count.clamp(min=1) for count in counts)
    loss = edge_sum / edge_count + non_edge_sum / non_edge_count
    return loss.sum() / len(kernel_sizes)


@pytest.mark.parametrize(
    ("kernel_sizes", "dtype"), [((3, 5), torch.float32), ((5, 13), torch.bfloat16)]
)
def test_tables_and_gradient_together_and_apart(backend, device, dtype, kernel_sizes):
    """In one pass over the sizes and in two, whose gradients add up in float32."""
    logits, target = make_inputs((2, 3, 8, 11), dtype, device)
    with tritonaff.use_backend(backend):
        with torch.no_grad():
            alone = tritonaff.affinity_field_loss(logits, target, kernel_sizes)
        logits.requires_grad_()
        loss = tritonaff.affinity_field_loss(logits, target, kernel_sizes)
        (gradient,) = torch.autograd.grad(loss, logits)
        expected = loss_of_terms(logits, target, kernel_sizes)
        (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(alone, loss)
    torch.testing.assert_close(loss, expected)
    # The coefficients may differ by a rounding.
    rounding = 1e-6 if dtype == torch.float32 else 4e-3
    distance = (gradient - expected_gradient).double().norm()
    assert distance <= rounding * expected_gradient.double().norm()


def test_several_passes_through_one_graph(backend, device):
    """The first backward pass returns the stored gradient, the others compute it again."""
    logits, target = make_inputs((1, 3, 9, 14), device=device)
    logits.requires_grad_()
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_cross_entropy(logits, target, (3, 13))
        gradients = [
            torch.autograd.grad(factor * loss, logits, retain_graph=True)[0]
            for factor in (1.0, -3.0, 0.0)
        ]
    (expected,) = torch.autograd.grad(
        tritonaff.affinity_field_cross_entropy(logits.double(), target, (3, 13)), logits
    )
    for factor, gradient in zip((1, -3, 0), gradients, strict=True):
        torch.testing.assert_close(gradient, factor * expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("factor", [1.0, 0.3, float("nan")])
def test_a_loss_is_multiplied_in_place(backend, device, factor):
    """The backward pass returns the stored tensor itself."""
    logits, target = make_inputs((2, 3, 20, 50), device=device)
    logits.requires_grad_()
    ops = torch.ops.tritonaff
    _, _, *pixels = ops.affinity_field_statistics(
        logits.detach(), target, (3,), 255, "paper", backend
    )
    grad_sums = torch.ones(2, 3, 1, device=device)
    *_, zero, grad = ops.affinity_field_with_gradient(
        logits, grad_sums, None, *pixels, (3,), 3.0, 1e-4, "paper", backend
    )
    expected = factor * grad
    (result,) = torch.autograd.grad(factor * zero, logits)
    assert result.data_ptr() == grad.data_ptr()
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_float16_gradients_wait_for_the_loss_scale(backend, device):
    """Gradients of 12 000 pixels with a small weight are 1e-7: float16 has no digit left there."""
    logits, target = make_inputs((1, 4, 96, 128), torch.float16, device)
    logits.requires_grad_()

    def scaled(logits):
        return 2**16 * tritonaff.affinity_field_loss(
            logits, target, edge_lambda=0.01, non_edge_lambda=0.01
        )

    (expected,) = torch.autograd.grad(scaled(logits.double()), logits)
    with tritonaff.use_backend(backend):
        (gradient,) = torch.autograd.grad(scaled(logits), logits)
    assert gradient.dtype == torch.float16
    assert (gradient - expected).double().norm() <= 1e-3 * expected.double().norm()


def test_weights_alone_may_want_a_gradient(backend, device):
    logits, target = make_inputs((1, 3, 8, 9), device=device)
    weight = torch.rand(3, 2, device=device).requires_grad_()
    with tritonaff.use_backend(backend):
        gradients = [
            torch.autograd.grad(
                tritonaff.affinity_field_loss(x, target, (3, 5), edge_weight=weight), weight
            )[0]
            for x in (logits, logits.clone().requires_grad_())
        ]
    assert gradients[0].any()
    torch.testing.assert_close(*gradients)


def test_a_second_derivative_is_refused():
    logits, target = make_inputs((1, 3, 6, 6))
    logits.requires_grad_()
    weight = torch.rand(3, 1, requires_grad=True)
    loss = tritonaff.affinity_field_loss(logits, target, edge_weight=weight)
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    for inputs in (None, [logits], [weight]):
        with pytest.raises(RuntimeError, match="affinity_field_backward"):
            gradient.sum().backward(inputs=inputs, retain_graph=True)


@pytest.mark.parametrize("learned", ["edge_weight", "weight"])
def test_a_mixed_second_derivative_is_refused(learned):
    """Gradients of the learned weights, then of the logits; alone and with an ordinary loss."""
    logits, target = make_inputs((1, 3, 6, 6))
    logits.requires_grad_()
    weight = torch.rand((3, 1) if learned == "edge_weight" else 3, requires_grad=True)
    loss = tritonaff.affinity_field_cross_entropy(logits, target, 3, **{learned: weight})
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    for result in (gradient.sum(), loss + gradient.sum()):
        with pytest.raises(RuntimeError, match="affinity_field_coefficients_backward"):
            result.backward(inputs=[logits], retain_graph=True)
    (expected,) = torch.autograd.grad(loss, weight)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend, device, variant, memory_format):
    if backend != "portable" and variant == "authors":
        pytest.skip("this variant has neither tile nor native kernel")
    logits, target = make_inputs((2, 4, *image_size(backend)), device=device)
    logits = logits.contiguous(memory_format=memory_format).requires_grad_()
    ops = torch.ops.tritonaff
    of_labels = logits.detach(), target, (3, 7), 255, variant, backend
    opcheck(ops.affinity_field_statistics.default, of_labels, backend)
    _, _, *pixels = ops.affinity_field_statistics(*of_labels)
    options = *pixels, (3, 7), 3.0, 1e-4, variant, backend
    opcheck(ops.affinity_field.default, (logits, *options), backend)
    tables = ops.affinity_field(logits, *options)
    assert all(table.requires_grad for table in tables)
    sums, log_loss = (torch.ones_like(table) for table in tables)
    for grads in ((sums, None), (sums, log_loss)):
        of_gradients = *grads, logits.detach(), *options
        opcheck(ops.affinity_field_backward.default, of_gradients, backend)
        # Traced, the op has the same results, see tests/test_compile.py; but the backward pass of
        # eager mode turns one result into the gradient, in place.
        opcheck(
            ops.affinity_field_with_gradient.default,
            (logits, *grads, *options),
            backend,
            test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
        )
        results = ops.affinity_field_with_gradient(logits, *grads, *options)
        assert [result.requires_grad for result in results] == [False, False, True, False]
        assert results[2].item() == 0
    opcheck(ops.affinity_field_scale.default, (results[3], log_loss[0], backend), backend)


# --- Properties ----------------------------------------------------------------------------------


def terms_of(logits, target, backend="auto", **options):
    with tritonaff.use_backend(backend):
        return tritonaff.affinity_field_terms(logits, target, (3, 5), **options)


def assert_same(terms, expected, tolerance=1e-10):
    for name, result, value in zip(terms._fields, terms, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=tolerance, atol=tolerance, msg=name)


doubles = inputs([torch.float64])


@given(doubles, VARIANTS)
def test_divergences_are_not_negative(values, variant):
    logits, target, ignore_index = values
    for backend in ("reference", "portable"):
        terms = terms_of(logits, target, backend, ignore_index=ignore_index, variant=variant)
        # The authors' clamps do not leave a distribution: an entry may be a little negative.
        slack = (1e-3 if variant == "authors" else 1e-14) * (1 + terms.non_edge_count)
        assert (terms.non_edge_sum >= -slack).all()
        assert (terms.edge_sum >= 0).all()
        assert (terms.edge_sum <= 3.0 * terms.edge_count + slack).all()


@given(doubles, VARIANTS)
def test_transposing_the_image_changes_nothing(values, variant):
    logits, target, ignore_index = values
    options = {"ignore_index": ignore_index, "variant": variant}
    expected = terms_of(logits, target, **options)
    assert_same(terms_of(logits.mT, target.mT, **options), expected)


# The ignored label is no class: a class would become another one.
@given(inputs([torch.float64], ignored_labels=(255, -100)), VARIANTS)
def test_permuting_the_classes_permutes_the_rows(values, variant):
    logits, target, ignore_index = values
    order = torch.randperm(logits.shape[1])
    place = order.argsort()
    known = (target >= 0) & (target < logits.shape[1])
    permuted = torch.where(known, place[torch.where(known, target, 0).long()], target.long())
    options = {"ignore_index": ignore_index, "variant": variant}
    expected = terms_of(logits, target, **options)
    terms = terms_of(logits[:, order], permuted, **options)
    assert_same(terms, [table[order] for table in expected])


@given(doubles, VARIANTS)
def test_tables_add_up_over_the_batch(values, variant):
    logits, target, ignore_index = values
    options = {"ignore_index": ignore_index, "variant": variant}
    parts = [terms_of(logits[i : i + 1], target[i : i + 1], **options) for i in range(len(logits))]
    expected = [
        sum((part[t] for part in parts), torch.zeros_like(table))
        for t, table in enumerate(terms_of(logits, target, **options))
    ]
    assert_same(terms_of(logits, target, **options), expected)


@given(doubles, [-50.0, -0.1, 0.0, 3.0, 50.0])
def test_a_constant_added_to_all_logits_of_a_pixel_changes_nothing(values, constant):
    logits, target, ignore_index = values
    shift = constant * torch.randn_like(logits[:, :1])
    expected = terms_of(logits, target, ignore_index=ignore_index)
    assert_same(terms_of(logits + shift, target, ignore_index=ignore_index), expected)


@given(doubles)
def test_every_pair_is_an_edge_in_two_channels_or_none(values):
    logits, target, ignore_index = values
    terms = terms_of(logits, target, ignore_index=ignore_index)
    entries = terms.edge_count + terms.non_edge_count
    assert (entries == entries[:1]).all()  # every channel sees every pair
    assert (terms.edge_count.sum(0) % 4 == 0).all()  # two channels, two directions


# --- Special images ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (1, 3, 1, 1), (2, 3, 4, 5)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_sets_are_zero_with_a_zero_gradient(shape, variant):
    """No pixel, no pair, all ignored: where the published code gives NaN."""
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.full((shape[0], *shape[2:]), 255 if logits[0:1, 0].numel() > 1 else 1)
    loss = tritonaff.affinity_field_loss(logits, target, (3, 5, 7), variant=variant)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_one_label_has_no_edges(backend, device):
    logits = make_inputs((2, 3, 6, 7), device=device)[0].requires_grad_()
    target = torch.ones(2, 6, 7, dtype=torch.uint8, device=device)
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_loss(logits, target, non_edge_lambda=0)
        loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("shape", [(1, 5, 12, 14), (1, 5, 3, 40), (1, 5, 1, 1)])
def test_a_size_beyond_the_image_does_not_disturb_the_others(backend, device, shape):
    """A size without pairs has empty tables and the normaliser 1; other sizes have thousands."""
    values = make_inputs(shape, device=device)

    def loss(logits, target):
        return tritonaff.affinity_field_loss(logits, target, (3, 41, 81))

    def tables(logits, target):
        return tritonaff.affinity_field_terms(logits, target, (3, 41, 81))

    check_parity(
        Case("affinity_field", (), (), loss, tables, CASES["affinity_field"].largest_term),
        backend,
        *values,
    )
    if shape[2:] == (1, 1):
        assert not evaluate(CASES["affinity_field"], backend, *values)["gradient"].any()


def test_a_size_whose_pairs_are_all_ignored_does_not_disturb_the_others(backend, device):
    logits, target = make_inputs((1, 5, 40, 48), device=device)
    target[:, 20:], target[:, :, 20:] = 255, 255
    logits.requires_grad_()
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_loss(logits, target, (3, 41))
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = tritonaff.affinity_field_loss(logits.double(), target, (3, 41))
    (expected,) = torch.autograd.grad(exact, logits)
    assert (gradient - expected).norm() <= 1e-6 * expected.norm()  # 1e-7 of ours, 2e-7 of eager


@pytest.mark.parametrize("size", [200_001, 2**62 + 1])
def test_gigantic_sizes_cost_nothing(any_backend, device, size):
    logits, target = make_inputs((1, 3, 8, 8), device=device)
    with tritonaff.use_backend(any_backend):
        terms = tritonaff.affinity_field_terms(logits, target, (size,))
    assert not any(table.any() for table in terms)


def test_infinite_confidence_is_finite(backend, device):
    """Logits 1e4 apart: probabilities of exactly 0 and 1."""
    logits, target = make_inputs((1, 4, 9, 9), device=device)
    results = evaluate(CASES["affinity_field"], backend, 1e4 * logits, target)
    assert all(result.isfinite().all() for result in results.values())


def test_ignore_index_may_be_a_class(backend, device):
    logits, target = make_inputs((1, 3, 9, 9), device=device)
    target[target == 255] = 1
    check_parity(case_with((3, 5), ignore_index=1), backend, logits, target)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_ignore_index_outside_the_targets_range_ignores_nothing(backend, device, dtype):
    """-100 is no uint8: it must not wrap around to 156."""
    logits, target = make_inputs((1, 200, 5, 5), device=device)
    target = torch.full_like(target, 156).to(dtype)
    with tritonaff.use_backend(backend):
        terms = tritonaff.affinity_field_terms(logits, target, ignore_index=-100)
    pairs = 2 * (5 * 4 + 4 * 5 + 2 * 4 * 4)
    assert (terms.non_edge_count == pairs).all()


def test_a_target_beyond_32_bits_is_no_class(backend, device):
    """2**32 + 1 must not be taken for class 1. Under compile such labels are ignored."""
    logits, target = make_inputs((1, 3, 5, 5), device=device)
    target = torch.ones_like(target)
    target[0, 0, 0] += 2**32
    with tritonaff.use_backend(backend):
        terms = (
            tritonaff.affinity_field_terms(logits, target, variant="paper")
            if (device.type != "cpu")
            else torch.compile(tritonaff.affinity_field_terms, backend="eager")(logits, target)
        )
    assert int(terms.edge_count.sum()) == 0
    assert int(terms.non_edge_count[0, 0]) == 2 * (5 * 4 + 4 * 5 + 2 * 4 * 4) - 2 * 3
