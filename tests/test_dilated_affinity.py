"""Dilated affinity: every implementation against the float64 reference, and the reference against
the definition.
"""

import itertools
import math

import pytest
import torch
from conftest import available
from inputs import given, maker, subset
from layouts import LAYOUTS, laid_out
from opchecks import image_size, opcheck
from torch.nn import functional as F

import tritonaff
from tritonaff.functional import (
    WEIGHTINGS,
    DilatedAffinityTerms,
    neighbor_counts,
    signal_weight,
)
from tritonaff.kernels.blocks import override
from tritonaff.rates import DIRECTIONS
from tritonaff.testing import CASES, Case, check_parity, evaluate

CASE = CASES["dilated_affinity"]


# --- The reference against the definition, pixel by pixel --------------------------------------


def by_definition(logits, target, rates, gamma, ignore_index):
    """The signals, and the terms, as loops over images, pixels, rates and neighbours."""
    n, height, width = target.shape
    signals = torch.full((n, 8 * len(rates), height, width), 255, dtype=torch.uint8)
    loss_sum = torch.zeros(len(rates), 9, 2, dtype=torch.float64)
    signal_count, correct_count = torch.zeros(2, len(rates), 9, 2, dtype=torch.int64)
    pixel_count = torch.zeros(len(rates), 9, dtype=torch.int64)

    def counted(b, y, x):
        inside = 0 <= y < height and 0 <= x < width
        return inside and int(target[b, y, x]) != ignore_index

    pixels = itertools.product(range(n), range(height), range(width))
    for (b, y, x), (r, (r1, r2)) in itertools.product(pixels, enumerate(rates)):
        same = {}
        for s, (dy, dx) in enumerate(DIRECTIONS):
            there = b, y + r1 * dy, x + r2 * dx
            if counted(b, y, x) and counted(*there):
                same[8 * r + s] = int(target[there] == target[b, y, x])
        category = 8 - list(same.values()).count(0)
        pixel_count[r, category] += bool(same)
        for channel, t in same.items():
            signals[b, channel, y, x] = t
            logit = float(logits[b, channel, y, x])
            p = 1 / (1 + math.exp(-logit))
            pt = p if t == 1 else 1 - p
            loss_sum[r, category, t] += -((1 - pt) ** gamma) * math.log(pt)
            signal_count[r, category, t] += 1
            correct_count[r, category, t] += (logit > 0) == bool(t)
    return signals, DilatedAffinityTerms(loss_sum, signal_count, correct_count, pixel_count)


@pytest.mark.parametrize("shape", [(2, 5, 7), (1, 1, 1), (1, 1, 6), (1, 9, 2)], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_reference_is_the_definition(shape, gamma):
    torch.manual_seed(0)
    rates = ((1, 1), (2, 3))
    n, height, width = shape
    logits = 3 * torch.randn(n, 16, height, width, dtype=torch.float64)
    logits[0, :, 0, 0] = 0  # predicted different
    target = 400 * torch.randint(0, 3, shape)
    target[torch.rand(shape) < 0.15] = 255
    signals, expected = by_definition(logits, target, rates, gamma, 255)
    with tritonaff.use_backend("reference"):
        terms = tritonaff.dilated_affinity_terms(logits, target, rates, gamma=gamma)
        assert torch.equal(tritonaff.dilated_affinity_target(target, rates), signals)
        counts = neighbor_counts(target, rates)
    for result, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)
    assert torch.equal(counts.pixel_count, expected.pixel_count)
    assert torch.equal(counts.signal_count, expected.signal_count)


# --- Every implementation against the reference -------------------------------------------------


def case_with(rates, **options):
    """The operation with these options, its sums weighted differently by rate, category, target."""

    def tables(logits, target):
        return tritonaff.dilated_affinity_terms(logits, target, rates, **options)

    def loss(loss_sum, signal_count, _correct_count, _pixel_count):
        weight = 1 + torch.arange(loss_sum.numel(), device=loss_sum.device).view_as(loss_sum) / 7
        return (loss_sum * weight).sum() / signal_count.sum().clamp(min=1)

    return Case.of_tables("dilated_affinity", tables, loss, largest_term=20.0)


RATES = [(1, 1), (2, 2), (1, 4), (5, 2), (7, 30), (50, 60)]


@maker
def targets(pick):
    n, height, width = pick([1, 2]), pick(range(1, 21)), pick(range(1, 37))
    torch.manual_seed(pick(range(2**16)))
    ignore_index = pick([255, -100, 0])
    dtype = pick([torch.uint8, torch.int32, torch.int64])
    labels = pick(["noise", "patches", "one label", "all ignored", "large"])
    target = torch.randint(0, 6, (n, height, width))
    if labels == "patches":
        target = target[:, ::3, ::4].repeat_interleave(3, 1).repeat_interleave(4, 2)
        target = target[:, :height, :width].contiguous()
    elif labels == "one label":
        target = torch.full_like(target, 5)
    elif labels == "large" and dtype != torch.uint8:  # neighbouring ones are equal as float32
        target += 2**30 if dtype == torch.int32 else 2**60
    ignored = torch.rand(target.shape) < (1.0 if labels == "all ignored" else 0.1)
    if dtype != torch.uint8 or ignore_index >= 0:
        target[ignored] = ignore_index
    target = target.to(dtype)
    layout = pick(["contiguous", "strided", "transposed"])
    if layout == "strided":
        target = torch.stack([target, target], dim=1)[:, 0]
    elif layout == "transposed":
        target = target.mT.contiguous().mT
    return target, ignore_index


def rate_sets(pick):
    return subset(pick, RATES, most=3)


@maker
def inputs(pick, dtypes):
    target, ignore_index = targets()(pick)
    rates = rate_sets(pick)
    scale = pick([0.0, 0.1, 1.0, 4.0, 15.0])
    confidence = pick([0.0, 9.0])
    signals = tritonaff.dilated_affinity_target(target, rates, ignore_index=ignore_index)
    logits = scale * torch.randn(signals.shape) + confidence * (signals.clamp(max=1).float() - 0.5)
    logits = logits.to(pick(dtypes))
    logits = laid_out(logits, pick(LAYOUTS))
    gamma = pick([0.0, 0.5, 1.0, 2.0])
    return logits, target, case_with(rates, gamma=gamma, ignore_index=ignore_index)


@given(inputs([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
def test_portable_matches_the_reference(values):
    logits, target, case = values
    check_parity(case, "portable", logits, target)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=24)
def test_native_matches_the_reference(values):
    logits, target, case = values
    check_parity(case, available("native"), logits, target)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=8)
def test_triton_matches_the_reference(values):
    pytest.importorskip("triton", minversion="3.6")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, target, case = values
    check_parity(case, "triton", logits.to(device), target.to(device))


@given(targets(), rate_sets)
def test_targets_and_counts_match_the_reference(values, rates):
    target, ignore_index = values
    results = []
    for backend in ("portable", "reference"):
        with tritonaff.use_backend(backend):
            results.append(
                (
                    tritonaff.dilated_affinity_target(target, rates, ignore_index=ignore_index),
                    *neighbor_counts(target, rates, ignore_index=ignore_index),
                )
            )
    for result, expected in zip(*results, strict=True):
        assert result.dtype == expected.dtype
        assert torch.equal(result, expected)


@pytest.mark.parametrize("shape", [(2, 32, 65, 70), (1, 32, 150, 33)], ids=str)
@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_larger_images(backend, device, shape, confidence):
    check_parity(CASE, backend, *CASE.make_inputs(shape, device=device, confidence=confidence))


@pytest.mark.parametrize("block", [1, 1100])
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block):
    """Single images, and groups of images."""
    from tritonaff.portable import blocks

    values = CASE.make_inputs((3, 32, 7, 9))
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    check_parity(case_with([1, (2, 3), 5, 20]), "portable", *values)


@pytest.mark.parametrize(
    ("width", "dtype", "layout"),
    [
        (8, torch.float32, "contiguous"),
        (31, torch.float32, "contiguous"),
        (31, torch.float16, "cropped"),
        (512, torch.float32, "strided"),
        (513, torch.float32, "contiguous"),
        (513, torch.bfloat16, "channels_last"),
        (1100, torch.float32, "cropped"),
    ],
)
def test_native_kernels_do_not_depend_on_their_strips(width, dtype, layout):
    """Seams between strips of a row and bands of rows; the last pixels of a row, and of memory."""
    logits, target = CASE.make_inputs((2, 32, 11, width), dtype, confidence=4.0)
    case = case_with([(1, 2), (2, 511), (3, 30), (10, 7)])
    check_parity(case, available("native"), laid_out(logits, layout), target)


@pytest.mark.parametrize("shape", [(1, 32, 2, 2), (2, 32, 3, 5)])
def test_native_kernels_take_images_smaller_than_a_vector(shape):
    """A vector from the last row on ends behind the last logit in memory."""
    logits, target = CASE.make_inputs(shape)
    check_parity(case_with([1]), available("native"), logits[:, :8].contiguous(), target)


def test_native_kernels_do_not_depend_on_the_number_of_threads():
    values = CASE.make_inputs((2, 32, 70, 90))
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(CASE, available("native"), *values))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("min_programs", [1, 4, 1000])
def test_tiles_do_not_depend_on_their_blocks(device, min_programs):
    """All blocks of an image in one program, in two programs, in one program each."""
    pytest.importorskip("triton", minversion="3.6")
    blocks = {"pixels": 32, "tables_pixels": 32, "min_programs": min_programs}
    values = CASE.make_inputs((2, 32, 7, 19), device=device)
    with override(dilated_affinity=blocks):
        check_parity(case_with([1, (2, 3), 5, 20]), "triton", *values)


def test_nothing_is_left_unwritten(backend, device, poisoned_memory):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        logits, target = CASE.make_inputs((2, 32, 13, 35), device=device)
        target[0] = 255
        logits = logits.contiguous(memory_format=memory_format)
        results = evaluate(CASE, backend, logits, target)
        assert all(result.isfinite().all() for result in results.values())
        assert results["gradient"].stride() == logits.stride()
        assert not results["gradient"][0].any()


def test_same_bits_every_time(backend, device):
    if backend == "portable":
        device = torch.device("cpu")  # GPUs scatter with atomics, in any order
    values = CASE.make_inputs((2, 32, 30, 40), device=device)
    first = evaluate(CASE, backend, *values)
    second = evaluate(CASE, backend, *values)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("backend", ["portable", "native"])
@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_gradient_is_at_most_twice_as_far_off_as_eager(backend, confidence):
    logits, target = CASE.make_inputs((1, 32, 65, 65), confidence=confidence)
    exact = evaluate(CASE, "reference", logits.double(), target)["gradient"]
    eager = evaluate(CASE, "reference", logits, target)["gradient"]
    ours = evaluate(CASE, available(backend), logits, target)["gradient"]
    assert (ours - exact).norm() <= 2 * (eager - exact).norm()


# --- Derivatives and the compiler ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "gamma"),
    [("reference", 0.5), ("portable", 0.0), ("portable", 0.5), ("portable", 2.0)],
)
def test_gradcheck(backend, gamma):
    torch.manual_seed(0)
    logits = torch.randn(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (1, 3, 4))
    target[0, 0, :2] = 255

    def loss(logits):
        return tritonaff.dilated_affinity_loss(logits, target, [1, (2, 1)], gamma=gamma, beta=30.0)

    with tritonaff.use_backend(backend):
        assert torch.autograd.gradcheck(loss, logits)


def test_a_second_derivative_is_refused():
    logits, target = CASE.make_inputs((1, 32, 9, 9))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(CASE.loss(logits, target), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="dilated_affinity_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend, device, memory_format):
    logits, target = CASE.make_inputs((2, 32, *image_size(backend)), device=device)
    logits = logits[:, :8].contiguous(memory_format=memory_format).requires_grad_()
    offsets = [2 * step for direction in DIRECTIONS for step in direction]
    settings = offsets, 2.0, 255, backend
    op = torch.ops.tritonaff.dilated_affinity.default
    opcheck(op, (logits, target, *settings), backend)
    assert [out.requires_grad for out in op(logits, target, *settings)] == [True] + 3 * [False]
    loss_sum = op(logits.detach(), target, *settings)[0]
    opcheck(
        torch.ops.tritonaff.dilated_affinity_backward.default,
        (torch.ones_like(loss_sum), logits.detach(), target, *settings),
        backend,
    )


@pytest.mark.parametrize("name", ["neighbor_counts", "dilated_affinity_target"])
def test_opcheck_of_labels_alone(name, device):
    target = CASE.make_inputs((2, 32, 9, 11), device=device)[1]
    offsets = [2 * step for direction in DIRECTIONS for step in direction]
    op = getattr(torch.ops.tritonaff, name).default
    torch.library.opcheck(op, (target, offsets, 255))


def test_one_graph_serves_every_image_size(backend, device):
    torch._dynamo.reset()
    rates = tritonaff.expand_rates([1, (2, 3)])
    loss_fn = tritonaff.DilatedAffinityLoss(rates, beta=1.5)

    def step(logits, target):
        counts = tritonaff.neighbor_categories(target, rates)
        signals = tritonaff.dilated_affinity_target(target, rates)
        return loss_fn(2 * logits, target), counts, signals

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 8, 9), (3, 7, 11), (4, 2, 5)):
        torch.manual_seed(0)
        logits = torch.randn(shape[0], 24, *shape[1:], device=device, requires_grad=True)
        target = torch.randint(0, 3, shape, device=device)
        with tritonaff.use_backend(backend):
            loss, *rest = compiled(logits, target)
            (gradient,) = torch.autograd.grad(loss, logits)
            expected, *expected_rest = step(logits, target)
            (expected_gradient,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert all(map(torch.equal, rest, expected_rest))


def test_meta_tensors_have_the_right_shapes():
    logits = torch.empty(2, 16, 8, 9, device="meta", requires_grad=True)
    target = torch.empty(2, 8, 9, dtype=torch.uint8, device="meta")
    terms = tritonaff.dilated_affinity_terms(logits, target, [1, 2])
    assert [tuple(table.shape) for table in terms] == [(2, 9, 2)] * 3 + [(2, 9)]
    assert tritonaff.dilated_affinity_loss(logits, target, [1, 2]).shape == ()


# --- Properties ----------------------------------------------------------------------------------


@given(inputs([torch.float64]))
def test_without_focus_it_is_binary_cross_entropy(values):
    logits, target, _ = values
    target = target.masked_fill(target < 0, 255)
    rates = RATES[: logits.shape[1] // 8]
    signals = tritonaff.dilated_affinity_target(target, rates)
    valid = signals != 255
    expected = F.binary_cross_entropy_with_logits(
        logits[valid], signals[valid].double(), reduction="sum"
    )
    terms = tritonaff.dilated_affinity_terms(logits, target, rates, gamma=0)
    torch.testing.assert_close(terms.loss_sum.sum(), expected, rtol=1e-10, atol=1e-10)
    correct = ((logits > 0) == (signals == 1))[valid].sum()
    assert terms.correct_count.sum() == correct
    assert (terms.correct_count <= terms.signal_count).all()


@given(targets(), rate_sets)
def test_counts_are_those_of_the_target(values, rates):
    target, ignore_index = values
    signals = tritonaff.dilated_affinity_target(target, rates, ignore_index=ignore_index)
    counts = neighbor_counts(target, rates, ignore_index=ignore_index)
    per_rate = signals.unflatten(1, (len(rates), 8))
    some = (per_rate != 255).any(dim=2)
    assert torch.equal(counts.pixel_count.sum(dim=1), some.sum(dim=(0, 2, 3)))
    for t in (0, 1):
        assert torch.equal(counts.signal_count[..., t].sum(1), (per_rate == t).sum((0, 2, 3, 4)))
    assert torch.equal(
        tritonaff.neighbor_categories(target, rates, ignore_index=ignore_index), counts.pixel_count
    )


@given(targets(), rate_sets)
def test_the_target_is_symmetric(values, rates):
    """The signal at i towards j equals the signal at j towards i."""
    target, ignore_index = values
    _, height, width = target.shape
    signals = tritonaff.dilated_affinity_target(target, rates, ignore_index=ignore_index)
    for r, (r1, r2) in enumerate(rates):
        for s, (dy, dx) in enumerate(DIRECTIONS):
            dy, dx = r1 * dy, r2 * dx
            towards, back = signals[:, 8 * r + s], signals[:, 8 * r + 7 - s]
            # The pixels that have this neighbour, and these neighbours.
            i = towards[..., max(0, -dy) : max(0, height - dy), max(0, -dx) : max(0, width - dx)]
            j = back[..., max(0, dy) : max(0, height + dy), max(0, dx) : max(0, width + dx)]
            assert torch.equal(i, j)


@given(targets(), rate_sets)
def test_transposing_the_image_and_the_rates_changes_no_count(values, rates):
    target, ignore_index = values
    counts = neighbor_counts(target, rates, ignore_index=ignore_index)
    flipped = [pair[::-1] for pair in rates]
    transposed = neighbor_counts(target.mT, flipped, ignore_index=ignore_index)
    assert all(map(torch.equal, transposed, counts))


@given(inputs([torch.float64]))
def test_tables_add_up_over_the_batch(values):
    logits, target, case = values
    tables = case.tables(logits, target)
    parts = [case.tables(x[None], y[None]) for x, y in zip(logits, target, strict=True)]
    for i, table in enumerate(tables):
        total = sum((part[i] for part in parts), torch.zeros_like(table))
        torch.testing.assert_close(table, total)


# --- Weights -------------------------------------------------------------------------------------


def test_weights():
    torch.manual_seed(0)
    pixel_count = torch.randint(0, 100, (3, 9))
    signal_count = torch.randint(0, 100, (3, 9, 2))
    weight = {name: signal_weight(name, pixel_count, signal_count) for name in WEIGHTINGS}
    assert all(w.shape == (3, 9, 2) and w.dtype == torch.float32 for w in weight.values())
    assert (weight["none"] == 1).all()
    torch.testing.assert_close(weight["sqrt"] ** 2, weight["neighbor"])
    assert (weight["sqrt"][:, 8] == 1).all()
    assert (weight["neighbor"][:, 8] == 1).all()
    ratio = (pixel_count[1, 8] + 1) / (pixel_count[1, 3] + 1)
    torch.testing.assert_close(weight["neighbor"][1, 3], ratio.expand(2))
    different, same = signal_count.sum(dim=1).unbind(dim=1)
    assert (weight["signal"][..., 1] == 1).all()
    torch.testing.assert_close(
        weight["signal"][..., 0], ((same + 1) / (different + 1))[:, None].expand(-1, 9)
    )
    of_doubles = signal_weight("signal", pixel_count.double(), signal_count.double())
    assert of_doubles.dtype == torch.float64
    zeros = torch.zeros_like(pixel_count), torch.zeros_like(signal_count)
    assert all((signal_weight(name, *zeros) == 1).all() for name in WEIGHTINGS)
    with pytest.raises(ValueError, match="weighting must be one of"):
        signal_weight("other", pixel_count, signal_count)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_loss_is_the_weighted_mean_of_its_terms(backend, device, weighting):
    logits, target = CASE.make_inputs((2, 32, 20, 22), device=device)
    rates = [8, 16, 32, 64]
    with tritonaff.use_backend(backend):
        terms = tritonaff.dilated_affinity_terms(logits, target, rates, gamma=1)
        loss = tritonaff.dilated_affinity_loss(
            logits, target, rates, gamma=1, beta=0.5, weighting=weighting
        )
    weight = signal_weight(weighting, terms.pixel_count, terms.signal_count)
    expected = sum(
        0.5 * (weight[r] * terms.loss_sum[r]).sum() / terms.pixel_count[r].sum() for r in range(2)
    )
    assert not terms.pixel_count[2:].any()
    torch.testing.assert_close(loss, expected)


class Statistics:
    """The attributes of NeighborStatistics that the loss uses."""

    def __init__(self, pixel_count, signal_count):
        self.pixel_count, self.signal_count = pixel_count, signal_count


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_given_statistics_of_the_batch_change_nothing(weighting):
    logits, target = CASE.make_inputs((2, 32, 20, 22))
    logits = logits.double()  # no tile computes in float64
    rates = [8, (2, 3), 16, 64]
    counts = neighbor_counts(target, rates)
    options = {"weighting": weighting, "beta": 1.5, "gamma": 1.0}
    expected = tritonaff.dilated_affinity_loss(logits, target, rates, **options)
    for statistics in (counts, list(counts), Statistics(*counts), [c.int() for c in counts]):
        options["statistics"] = statistics
        loss = tritonaff.dilated_affinity_loss(logits, target, rates, **options)
        module = tritonaff.DilatedAffinityLoss(rates, **options)
        torch.testing.assert_close(loss, expected)
        assert torch.equal(module(logits, target), loss)


def test_given_statistics_are_those_of_the_weights():
    logits, target = CASE.make_inputs((1, 32, 20, 22))
    pixel_count, signal_count = COUNTS[0].repeat(4, 1), COUNTS[1].repeat(4, 1, 1)
    pixel_count[:, 8] = 15
    loss = tritonaff.dilated_affinity_loss(
        logits, target, [1, 2, 3, 4], statistics=(pixel_count, signal_count)
    )
    terms = tritonaff.dilated_affinity_terms(logits, target, [1, 2, 3, 4])
    weighted = terms.loss_sum.sum(dim=(1, 2)) * 4 - 3 * terms.loss_sum[:, 8].sum(dim=1)
    torch.testing.assert_close(loss, (weighted / terms.pixel_count.sum(dim=1)).sum())


def test_statistics_are_buffers_of_the_module():
    counts = neighbor_counts(torch.randint(0, 3, (1, 9, 9)), [1, 2])
    module = tritonaff.DilatedAffinityLoss([1, 2], statistics=counts)
    assert set(module.state_dict()) == {"pixel_count", "signal_count"}
    assert module.to("meta").pixel_count.device.type == "meta"
    assert not tritonaff.DilatedAffinityLoss([1]).state_dict()
    assert "statistics=given" in repr(module)


# --- Special images ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 8, 4, 4), (1, 8, 1, 1), (2, 8, 4, 5)], ids=str)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_empty_sets_are_zero_with_a_zero_gradient(backend, device, shape, weighting):
    """No image, no neighbour, all ignored."""
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.full((shape[0], *shape[2:]), 255 if shape[0] == 2 else 1, device=device)
    with tritonaff.use_backend(backend):
        loss = tritonaff.dilated_affinity_loss(logits, target, [1], weighting=weighting)
        loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_a_rate_beyond_the_image_does_not_disturb_the_others(backend, device):
    """A large rate does not cost memory either."""
    logits, target = CASE.make_inputs((1, 32, 12, 14), device=device)
    rates = [1, (200_001, 3), 2, 10**12]
    check_parity(case_with(rates), backend, logits, target)
    with tritonaff.use_backend(backend):
        counts = tritonaff.dilated_affinity_terms(logits, target, rates).pixel_count
        loss = tritonaff.dilated_affinity_loss(logits, target, rates)
        fewer = torch.cat((logits[:, :24],), dim=1)
        expected = tritonaff.dilated_affinity_loss(fewer, target, rates[:3])
    assert not counts[3].any()
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_are_finite(backend, device, gamma, dtype):
    """All kinds of signals at 1e4 and -1e4."""
    logits, target = CASE.make_inputs((1, 32, 20, 20), device=device, confidence=0.0)
    logits = (1e4 * logits.sign()).to(dtype)
    case = case_with([1, 2, 3, 40], gamma=gamma)
    results = evaluate(case, backend, logits, target)
    assert all(result.isfinite().all() for result in results.values())
    check_parity(case, backend, logits, target)


def test_the_smallest_logit_above_zero_predicts_a_same_label(backend, device):
    """A logit of zero, of either sign, predicts "different"."""
    logits, target = CASE.make_inputs((1, 32, 5, 7), device=device)
    around_zero = torch.tensor([0.0, -0.0, 2.0**-149, -(2.0**-149)], device=device)
    logits = around_zero.repeat(logits.numel() // 4).view_as(logits)
    check_parity(case_with([1, (2, 3), 2, 4]), backend, logits, target)


def test_logits_that_do_not_count_may_be_anything(backend, device):
    """Signals of ignored pixels and across the border, with NaN and infinity in their place."""
    logits, target = CASE.make_inputs((2, 32, 9, 21), device=device)
    rates = [1, (2, 3), 5, 30]
    expected = evaluate(case_with(rates), backend, logits, target)
    signals = tritonaff.dilated_affinity_target(target, rates)
    for number in (math.nan, math.inf, -math.inf):
        results = evaluate(
            case_with(rates), backend, logits.masked_fill(signals == 255, number), target
        )
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_a_logit_that_is_no_number_shows(backend, device):
    logits, target = CASE.make_inputs((1, 32, 9, 21), device=device)
    signals = tritonaff.dilated_affinity_target(target, [1, 2, 3, 4])
    logits[0, 0, 4, 5] = logits[0, 31, 2, 3] = math.nan
    assert signals[0, 0, 4, 5] != 255
    assert signals[0, 31, 2, 3] != 255
    results = evaluate(case_with([1, 2, 3, 4]), backend, logits, target)
    assert results["loss"].isnan()
    # In the rows of its rate and category alone; portable masks by products.
    rows = results["loss_sum"].isnan().any(dim=2).sum(dim=1)
    assert rows.tolist() == [1, 0, 0, 1]
    assert torch.equal(results["gradient"].isnan(), logits.isnan())


def test_labels_that_32_bits_confuse(backend, device):
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([255, 255 + 2**32, 2**31 - 1, 2**31, 2**40, 2**63 - 1])
    target = labels[torch.randint(0, 6, (2, 9, 21), generator=generator)].to(device)
    logits = torch.randn(2, 16, 9, 21, generator=generator).to(device)
    for ignore_index in (255, 2**40, 3):
        check_parity(case_with([1, (2, 3)], ignore_index=ignore_index), backend, logits, target)


def test_a_uniform_image_is_n8_up_to_its_border(backend, device):
    target = torch.full((1, 6, 7), 3, device=device)
    assert tritonaff.neighbor_categories(target, [2]).tolist() == [[0] * 8 + [42]]
    with tritonaff.use_backend(backend):
        logits = torch.ones(1, 8, 6, 7, device=device)
        terms = tritonaff.dilated_affinity_terms(logits, target, [2])
    assert terms.pixel_count.tolist() == [[0] * 8 + [42]]
    assert torch.equal(terms.correct_count, terms.signal_count)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_ignore_index_outside_the_targets_range_ignores_nothing(backend, device, dtype):
    """-100 is no uint8: it must not wrap around to 156."""
    target = torch.full((1, 5, 5), 156, device=device).to(dtype)
    logits = torch.zeros(1, 8, 5, 5, device=device)
    with tritonaff.use_backend(backend):
        terms = tritonaff.dilated_affinity_terms(logits, target, [1], ignore_index=-100)
    assert int(terms.signal_count.sum()) == 2 * (5 * 4 + 4 * 5 + 2 * 4 * 4)


# --- Bad input -----------------------------------------------------------------------------------

LOGITS, TARGET = torch.zeros(2, 8, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
COUNTS = torch.zeros(1, 9, dtype=torch.int64), torch.zeros(1, 9, 2, dtype=torch.int64)
BAD_TENSORS = {
    "logits no tensor": ([[0.0]], TARGET, TypeError, "affinity_logits must be a tensor, got list"),
    "logits integer": (LOGITS.long(), TARGET, TypeError, "affinity_logits must have dtype .*int64"),
    "logits rank": (LOGITS[0], TARGET, ValueError, r"must have shape \(N, 8 R, H, W\), got"),
    "logits channels": (
        LOGITS[:, :7],
        TARGET,
        ValueError,
        r"\(2, 8, 4, 5\) of R = 1 rates and target \(2, 4, 5\), got \(2, 7, 4, 5\)",
    ),
    "target soft": (LOGITS, TARGET + 0.5, ValueError, r"target must hold whole numbers, got \[0.5"),
    "target rank": (LOGITS, TARGET[0], ValueError, r"target must have shape \(N, H, W\)"),
    "target size": (LOGITS, TARGET[:, :3], ValueError, r"\(2, 8, 3, 5\) of R = 1 rates"),
    "target negative": (LOGITS, TARGET - 1, ValueError, r"in \[0, inf\) or ignore_index 255, got"),
    "empty": (LOGITS[..., :0], TARGET[..., :0], ValueError, "target must have at least one row"),
    "devices": (LOGITS, TARGET.to("meta"), ValueError, "one device, got cpu and meta"),
}
BAD_OPTIONS = {
    "rates": ({"rates": 8.0}, TypeError, "rates must be a sequence"),
    "rates empty": ({"rates": []}, ValueError, "rates must be at least 1 and distinct"),
    "gamma": ({"gamma": -1}, ValueError, r"gamma must be in \[0, inf\), got -1"),
    "gamma type": ({"gamma": "2"}, TypeError, "gamma must be a number, got str"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
}
BAD_LOSS_OPTIONS = {
    **BAD_OPTIONS,
    "beta": ({"beta": -0.5}, ValueError, r"beta must be in \[0, inf\), got -0.5"),
    "weighting": ({"weighting": "root"}, ValueError, "weighting must be one of .* got 'root'"),
    "statistics": ({"statistics": 3}, TypeError, "statistics must be a sequence of two .* got int"),
    "statistics one": ({"statistics": COUNTS[:1]}, ValueError, r"\(pixel_count, signal_count\)"),
    "statistics list": ({"statistics": (COUNTS[0], [1])}, TypeError, "signal_count must be a tens"),
    "statistics dtype": ({"statistics": (COUNTS[0].float(), COUNTS[1])}, TypeError, "got float32"),
    "statistics rates": (
        {"statistics": Statistics(*(torch.cat((count, count)) for count in COUNTS))},
        ValueError,
        r"pixel_count must have shape \(1, 9\), got \(2, 9\)",
    ),
    "statistics swapped": ({"statistics": COUNTS[::-1]}, ValueError, "pixel_count must have shape"),
}


def cases(table):
    return pytest.mark.parametrize("bad", table.values(), ids=table.keys())


FUNCTIONS = {
    "terms": lambda *tensors: tritonaff.dilated_affinity_terms(*tensors, [1]),
    "loss": lambda *tensors: tritonaff.dilated_affinity_loss(*tensors, [1]),
    "module": tritonaff.DilatedAffinityLoss([1]),
}


@cases(BAD_TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors(backend, function, bad):
    logits, target, error, message = bad
    with tritonaff.use_backend(backend), pytest.raises(error, match=message):
        function(logits, target)


@cases(
    {k: bad for k, bad in BAD_TENSORS.items() if k.startswith(("target f", "target r", "target n"))}
)
@pytest.mark.parametrize(
    "function",
    [tritonaff.dilated_affinity_target, tritonaff.neighbor_categories, neighbor_counts],
)
def test_targets_alone(function, bad):
    _, target, error, message = bad
    with pytest.raises(error, match=message):
        function(target, [1])
    with pytest.raises(TypeError, match="rates must be a sequence"):
        function(TARGET, 8.0)


@pytest.mark.parametrize("most", [2, 2**40])
def test_where_labels_are_not_looked_at_those_below_0_are_ignored(any_backend, device, most):
    logits = torch.randn(1, 8, 6, 7, device=device)
    target = torch.randint(-1, 3, (1, 6, 7), device=device)
    target[target == 2] = most

    def terms(target, ignore_index):
        same = tritonaff.dilated_affinity_target(target, [1], ignore_index=ignore_index)
        matrix, valid = tritonaff.label_affinity(target, 3, ignore_index=ignore_index)
        tables = tritonaff.dilated_affinity_terms(logits, target, [1], ignore_index=ignore_index)
        return *tables, same, matrix, valid

    with tritonaff.use_backend(any_backend):
        results = torch.compile(terms, backend="eager")(target, None)
        torch.testing.assert_close(results, terms(target, -1))


@cases(BAD_OPTIONS)
def test_options_of_terms(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        tritonaff.dilated_affinity_terms(LOGITS, TARGET, **{"rates": [1], **options})


@cases(BAD_LOSS_OPTIONS)
def test_options_of_the_loss(bad):
    options, error, message = bad
    options = {"rates": [1], **options}
    with pytest.raises(error, match=message):
        tritonaff.dilated_affinity_loss(LOGITS, TARGET, **options)
    with pytest.raises(error, match=message):
        tritonaff.DilatedAffinityLoss(**options)


def test_statistics_on_another_device():
    statistics = [count.to("meta") for count in COUNTS]
    with pytest.raises(ValueError, match="one device, got meta and cpu"):
        tritonaff.dilated_affinity_loss(LOGITS, TARGET, [1], statistics=statistics)


@pytest.mark.parametrize(
    ("rates", "ignore_index", "message"),
    [([2], 255, r"loss's rates \(\(1, 1\),\), got"), ([1], 0, "loss's ignore_index 255, got 0")],
)
def test_statistics_of_something_else(rates, ignore_index, message):
    statistics = tritonaff.NeighborStatistics(rates, ignore_index)
    with pytest.raises(ValueError, match=message):
        tritonaff.dilated_affinity_loss(LOGITS, TARGET, [1], statistics=statistics)
    with pytest.raises(ValueError, match=message):
        tritonaff.DilatedAffinityLoss([1], statistics=statistics)
