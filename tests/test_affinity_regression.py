"""Affinity regression: every implementation against the float64 reference, and the reference
against the definition.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from inputs import given, maker
from interpreted import smaller_if_interpreted
from layouts import BACKENDS, LAYOUTS, laid_out
from opchecks import image_size, opcheck
from versions import wording

import tritonaff
from tritonaff.bench.measure import peak_bytes
from tritonaff.functional import AffinityRegressionTerms
from tritonaff.kernels.blocks import override
from tritonaff.testing import CASES, Case, check_parity, evaluate, make_inputs

GRIDS = ((12, 6), (1,), (3, 5), None)


# --- The reference against the definition, pair by pair -----------------------------------------


def points_by_definition(height, width, grid_sizes):
    if grid_sizes is None:
        return list(itertools.product(range(height), range(width)))
    return [
        (math.floor(i * height / size), math.floor(j * width / size))
        for size in grid_sizes
        for i, j in itertools.product(range(size), repeat=2)
    ]


def terms_by_definition(logits, target, grid_sizes, ignore_index):
    """The equations as loops over images and pairs of points."""
    n, _, height, width = logits.shape
    squared_error, pair_count = torch.zeros(n).double(), torch.zeros(n).long()
    probability = logits.double().softmax(1)
    points = points_by_definition(height, width, grid_sizes)
    for b, (y_i, x_i), (y_j, x_j) in itertools.product(range(n), points, points):
        label_i, label_j = int(target[b, y_i, x_i]), int(target[b, y_j, x_j])
        if ignore_index in (label_i, label_j):
            continue
        affinity = (probability[b, :, y_i, x_i] * probability[b, :, y_j, x_j]).sqrt().sum()
        squared_error[b] += (affinity - int(label_i == label_j)) ** 2
        pair_count[b] += 1
    return AffinityRegressionTerms(squared_error, pair_count)


@pytest.mark.parametrize("grid_sizes", [(3, 2), (7,), None])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 1), (1, 4, 1, 6)])
def test_reference_is_the_definition(shape, grid_sizes):
    torch.manual_seed(0)
    logits = 4 * torch.randn(shape, dtype=torch.float64)
    target = torch.randint(0, shape[1], (shape[0], *shape[2:]))
    target[torch.rand(target.shape) < 0.15] = 255
    expected = terms_by_definition(logits, target, grid_sizes, 255)
    with tritonaff.use_backend("reference"):
        terms = tritonaff.affinity_regression_terms(logits, target, grid_sizes)
    for result, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(60, 60), (97, 41), (5, 300)])
def test_sample_points_are_those_of_interpolation(size):
    from tritonaff.portable.affinity_regression import sampled as portable
    from tritonaff.reference.affinity_regression import sampled as reference

    image = torch.arange(size[0] * size[1]).float().view(1, 1, *size)
    expected = torch.cat(
        [torch.nn.functional.interpolate(image, (g, g)).flatten(2) for g in (12, 6)], dim=2
    )
    assert torch.equal(portable(image, [12, 6]), expected)
    assert torch.equal(reference(image, (12, 6)), expected)


# --- Every implementation against the reference -------------------------------------------------


def case_with(grid_sizes, **options):
    """The operation with these options, its images weighted differently."""

    def tables(logits, target):
        return tritonaff.affinity_regression_terms(logits, target, grid_sizes, **options)

    def loss(squared_error, pair_count):
        weight = 1 + torch.arange(len(pair_count), device=pair_count.device)
        return (weight * squared_error).sum() / pair_count.sum().clamp(min=1)

    largest_term = CASES["affinity_regression"].largest_term
    return Case.of_tables("affinity_regression", tables, loss, largest_term)


few_classes = range(2, 21)
# Numbers of classes. Beyond 32 and beyond 64 other kernels take every pixel. The last class begins
# a block of classes, ends a block, or does neither.
many_classes = [33, 64, 65, 100]


@maker
def inputs(pick, dtypes, classes=few_classes, ignored_labels=(255, -100, 0)):
    n, c = pick([1, 2]), pick(classes)
    height, width = pick(range(1, 21)), pick(range(1, 31))
    torch.manual_seed(pick(range(2**16)))
    ignore_index = pick(ignored_labels)
    target = torch.randint(0, c, (n, height, width))
    labels = pick(["noise", "one label", "all ignored"])
    if labels == "one label":
        target = torch.full_like(target, c - 1)
    target[torch.rand(target.shape) < (1.0 if labels == "all ignored" else 0.1)] = ignore_index
    shown = torch.where(target == ignore_index, 0, target)
    logits = pick([0.0, 0.1, 1.0, 15.0]) * torch.randn(n, c, height, width)
    confidence = pick([0.0, 9.0])
    logits = logits + confidence * torch.nn.functional.one_hot(shown, c).movedim(-1, 1)
    logits = logits.to(pick(dtypes))
    layout = pick(LAYOUTS)
    logits = laid_out(logits, layout)
    if layout == "strided":
        target = torch.stack([target, target], dim=1)[:, 0]
    if ignore_index >= 0:
        target = target.to(pick([torch.uint8, torch.int32, torch.int64]))
    return logits, target, ignore_index


def available(backend):
    if backend not in BACKENDS:
        pytest.skip(f"{backend} cannot run here")
    return backend


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # of the tiles
grids = GRIDS


@given(inputs([torch.float32, torch.bfloat16, torch.float16, torch.float64]), grids)
def test_portable_matches_the_reference(values, grid_sizes):
    logits, target, ignore_index = values
    case = case_with(grid_sizes, ignore_index=ignore_index)
    check_parity(case, "portable", logits, target)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), grids)
def test_native_matches_the_reference(values, grid_sizes):
    logits, target, ignore_index = values
    case = case_with(grid_sizes, ignore_index=ignore_index)
    check_parity(case, available("native"), logits, target)


def check_tiles(logits, target, ignore_index, grid_sizes):
    pytest.importorskip("triton", minversion="3.6")
    case = case_with(grid_sizes, ignore_index=ignore_index)
    if grid_sizes is None:
        # Where all points predict the same, the error is the remainder of sums of up to 4 for a
        # pair, and so is the gradient of a pixel. Gram matrices add up 32 equal products in
        # float32, which all round the same way: up to 4 roundings of each sum.
        case = dataclasses.replace(case, largest_term=16.0, rounds_pixels=True)
    check_parity(case, "triton", logits.to(DEVICE), target.to(DEVICE))


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), grids, rows=8)
def test_triton_matches_the_reference(values, grid_sizes):
    check_tiles(*values, grid_sizes)


@given(inputs([torch.float32, torch.bfloat16, torch.float16], many_classes), rows=8)
def test_triton_matches_the_reference_with_many_classes(values):
    check_tiles(*values, None)


@given(inputs([torch.float32, torch.bfloat16, torch.float64]), grids)
def test_matrices_match_the_reference(values, grid_sizes):
    logits, target, ignore_index = values
    with tritonaff.use_backend("reference"):
        expected = tritonaff.square_root_affinity(logits.double(), grid_sizes)
        expected_labels = tritonaff.label_affinity(target, grid_sizes, ignore_index)
    for backend in BACKENDS:
        if backend != "portable" and logits.dtype == torch.float64:
            continue
        device = DEVICE if backend == "triton" else "cpu"
        with tritonaff.use_backend(backend):
            affinity = tritonaff.square_root_affinity(logits.to(device), grid_sizes).cpu()
            labels = tritonaff.label_affinity(target, grid_sizes, ignore_index)
        # A sum of squares, 1 at most: a few roundings, and the roundings of the exponents.
        rounding = 1e-12 if logits.dtype == torch.float64 else 4e-6
        torch.testing.assert_close(affinity.double(), expected, rtol=0, atol=rounding)
        assert all(map(torch.equal, labels, expected_labels))


@pytest.mark.parametrize(
    ("grid_sizes", "classes"),
    [*itertools.product(((12, 6), None), (19, 32, 40, 256)), (None, 65)],
)
def test_many_classes(backend, device, classes, grid_sizes):
    """One full block of classes and more than one, more than one of pixels: the largest numbers
    that kernels take for a few classes, and more.
    """
    shape = (2, classes, 23, 31) if classes < 100 else (1, classes, 12, 13)
    for confidence in (0.0, 9.0):
        values = make_inputs(shape, device=device, confidence=confidence)
        check_parity(case_with(grid_sizes), backend, *values)


def test_points_that_are_the_same_pixel(backend, device):
    """The points of one grid, of two equal grids, of a coarser grid."""
    check_parity(case_with((6, 6, 12)), backend, *make_inputs((2, 4, 5, 7), device=device))


def test_a_fine_grid_is_several_blocks_of_points(backend, device):
    check_parity(case_with((20,)), backend, *make_inputs((2, 5, 33, 40), device=device))


@pytest.mark.parametrize("block", [1, 150])
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block):
    from tritonaff.portable import blocks

    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    check_parity(case_with(None), "portable", *make_inputs((3, 4, 6, 7)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("grid_sizes", [None, (47, 30)])
@pytest.mark.parametrize("classes", [3, 22])
def test_native_between_its_blocks_and_tasks(layout, grid_sizes, classes):
    """Several tasks of 2048 points, the last block and its last vector not full."""
    logits, target = make_inputs((2, classes, 43, 71))
    target[1, :9] = 255
    exact = evaluate(case_with(grid_sizes), "portable", logits.double(), target)
    for dtype in (torch.int32, torch.uint8):
        labels = target.to(dtype).mT.contiguous().mT
        results = evaluate(
            case_with(grid_sizes), available("native"), laid_out(logits, layout), labels
        )
        assert torch.equal(results["pair_count"], exact["pair_count"])
        for name in ("squared_error", "gradient"):
            error = (results[name] - exact[name]).norm()
            assert error <= 1e-6 * exact[name].norm()


@pytest.mark.parametrize("grid_sizes", [None, (60, 41)])
def test_native_gives_the_same_bits_on_any_number_of_threads(grid_sizes):
    values = make_inputs((2, 7, 90, 91))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(evaluate(case_with(grid_sizes), available("native"), *values))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("classes", [3, 65])
def test_tiles_do_not_depend_on_their_blocks(device, classes):
    """Few points and pixels in a program: every seam between programs."""
    pytest.importorskip("triton", minversion="3.6")
    logits, target = make_inputs((2, classes, 9, 19), device=device)
    points = {"points": 32, "gradient_points": 16, "matrix_points": 64}
    pixels = {"pixels": 32, "gram_pixels": 64, "statistics_pixels": 32, "many_pixels": 32}
    for grid_sizes in ((6, 3), None):
        with override(affinity_regression=points | pixels):
            check_parity(case_with(grid_sizes), "triton", logits, target)
            with tritonaff.use_backend("triton"):
                affinity = tritonaff.square_root_affinity(logits, grid_sizes)
        with tritonaff.use_backend("reference"):
            expected = tritonaff.square_root_affinity(logits.double(), grid_sizes)
        torch.testing.assert_close(affinity.double(), expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize(("grid_sizes", "classes"), [*((grids, 5) for grids in GRIDS), (None, 65)])
def test_nothing_is_left_unwritten(backend, device, poisoned_memory, grid_sizes, classes):
    case = case_with(grid_sizes)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        logits, target = make_inputs((2, classes, 13, 35), device=device)
        target[0] = 255
        logits = logits.contiguous(memory_format=memory_format)
        results = evaluate(case, backend, logits, target)
        assert all(result.isfinite().all() for result in results.values())
        assert results["gradient"].stride() == logits.stride()
        assert not results["gradient"][0].any()
        with tritonaff.use_backend(backend):
            assert tritonaff.square_root_affinity(logits, grid_sizes).isfinite().all()


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[..., 1:, :-2],
        lambda x: x.mT,
        lambda x: x[:, :, :1].expand(-1, -1, 5, -1),
        lambda x: 0 * x[:, :, :1, :1].expand(-1, -1, 5, 8),
        lambda x: x[:, :, ::2, :1],
        lambda x: x[:, :, :1, ::2],
        lambda x: x[:, :, :1, :1],
        # The pixels of this view are evenly spaced, unlike the pixels of its torch.empty_like.
        lambda x: x[:, 0].movedim(0, 2).contiguous().movedim(2, 0)[:, None].expand(-1, 3, -1, -1),
    ],
)
def test_any_strides(backend, device, view):
    torch.manual_seed(0)
    logits = view(torch.randn(2, 3, 15, 16, device=device))
    target = torch.arange(logits[:, 0].numel(), device=device).view_as(logits[:, 0]) % 3
    results = evaluate(case_with(None), backend, logits, target)
    expected = evaluate(case_with(None), backend, logits.contiguous(), target)
    for name, result in results.items():
        # Two compiled kernels may fuse different products with sums.
        torch.testing.assert_close(result, expected[name], rtol=1e-5, atol=1e-6)
    assert results["gradient"].stride() == torch.empty_like(logits).stride()


@pytest.mark.parametrize(("grid_sizes", "classes"), [((12, 6), 5), (None, 5), (None, 65)])
def test_same_bits_every_time(backend, device, grid_sizes, classes):
    if backend == "portable":
        device = torch.device("cpu")  # GPUs add with atomics, in any order
    shape = smaller_if_interpreted((2, classes, 30, 40), backend, device)
    values = make_inputs(shape, device=device)
    first = evaluate(case_with(grid_sizes), backend, *values)
    second = evaluate(case_with(grid_sizes), backend, *values)
    assert all(torch.equal(first[name], second[name]) for name in first)


# --- Accuracy ------------------------------------------------------------------------------------


def near_perfect(labels, confidence, points=900, classes=19):
    torch.manual_seed(0)
    side = math.isqrt(points)
    target = torch.randint(0, labels, (1, side, side))
    one_hot = torch.nn.functional.one_hot(target, classes).movedim(-1, 1)
    return confidence * one_hot + torch.randn(1, classes, side, side), target


def textbook(logits, target):
    """||S S^T||^2 - 2 ||S Y^T||^2 + ||Y Y^T||^2: linear too, but not used, for it loses digits."""
    s = (logits.flatten(2)[0].log_softmax(0) / 2).exp()
    y = torch.nn.functional.one_hot(target.flatten(), len(s)).T.to(s.dtype)
    error = (s @ s.T).square().sum() - 2 * (s @ y.T).square().sum() + (y @ y.T).square().sum()
    return error / target.numel() ** 2


@pytest.mark.parametrize(
    ("labels", "confidence"), [(19, 9.0), (19, 20.0), (19, 22.0), (1, 12.0), (1, 13.0)]
)
@pytest.mark.parametrize("grid_sizes", [None, (12, 6)])
def test_near_the_optimum_the_loss_keeps_five_digits(
    backend, device, grid_sizes, labels, confidence
):
    """Down to a loss of 1e-8, in an image of a single label too; the gradient as well."""
    logits, target = (x.to(device) for x in near_perfect(labels, confidence))
    exact = evaluate(case_with(grid_sizes), "reference", logits.double(), target)
    ours = evaluate(case_with(grid_sizes), backend, logits, target)
    assert abs(ours["loss"] - exact["loss"]) <= 1e-5 * exact["loss"]
    assert (ours["gradient"] - exact["gradient"]).norm() <= 2e-6 * exact["gradient"].norm()


def test_the_textbook_form_has_no_digit_left_there(backend, device):
    logits, target = (x.to(device) for x in near_perfect(1, 13.0))
    exact = textbook(logits.double(), target)
    assert 1e-9 < exact < 3e-8
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_regression_loss(logits, target, None)
    assert abs(loss - exact) <= 1e-5 * exact
    assert abs(textbook(logits, target) - exact) > 0.1 * exact


def test_soft_predictions_that_hardly_differ(backend, device):
    """All points of one label, p about 1/2: the Gram matrices cancel to a millionth.

    Products in float64 keep the digits of the reference; in float32 they leave an absolute error
    of a rounding.
    """
    torch.manual_seed(0)
    target = torch.full((1, 40, 40), 3, device=device)
    logits = 0.05 * torch.randn(1, 19, 40, 40).to(device)
    logits[:, 3] += 3
    with tritonaff.use_backend("reference"):
        exact = tritonaff.affinity_regression_loss(logits.double(), target, None)
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_regression_loss(logits, target, None)
    assert abs(loss - exact) <= (6e-8 if backend == "triton" else 1e-5 * exact)


@pytest.mark.parametrize("backend", ["portable", "native"])
@pytest.mark.parametrize("top", [0.0, 3.0])
def test_gradients_of_soft_predictions_that_hardly_differ(backend, top):
    """The two parts of the gradient cancel too: products in float32 alone are off by 2e-3."""
    torch.manual_seed(0)
    target = torch.full((1, 30, 30), 3)
    logits = 0.05 * torch.randn(1, 19, 30, 30)
    logits[:, 3] += top
    exact = evaluate(case_with(None), "reference", logits.double(), target)["gradient"]
    gradient = evaluate(case_with(None), available(backend), logits, target)["gradient"]
    assert (gradient - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("grid_sizes", [(12, 6), None])
def test_gradients_are_finite_where_probabilities_underflow(backend, device, grid_sizes):
    logits, target = make_inputs((1, 4, 13, 14), device=device)
    for gap in (200, 1e4):
        far = gap * torch.nn.functional.one_hot(target.roll(1) % 4, 4).movedim(-1, 1)
        results = evaluate(case_with(grid_sizes), backend, logits + far, target)
        assert all(result.isfinite().all() for result in results.values())
        x = (logits + far).requires_grad_()
        with tritonaff.use_backend(backend):
            (grad,) = torch.autograd.grad(tritonaff.square_root_affinity(x, grid_sizes).sum(), x)
        assert grad.isfinite().all()


# --- Derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("grid_sizes", [(4, 3), (7,), None])
def test_gradcheck(backend, grid_sizes):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 5, 6))
    target[0, 0, :2] = 255
    weight = torch.rand(100, 100, dtype=torch.float64)

    def loss(logits):
        return tritonaff.affinity_regression_loss(logits, target, grid_sizes)

    def weighted_matrix(logits):
        affinity = tritonaff.square_root_affinity(logits, grid_sizes)
        points = affinity.shape[1]
        return (affinity * weight[:points, :points]).sum()

    with tritonaff.use_backend(backend):
        assert torch.autograd.gradcheck(loss, logits)
        assert torch.autograd.gradcheck(weighted_matrix, logits)


def test_a_second_derivative_is_refused():
    logits, target = make_inputs((1, 3, 6, 6))
    logits.requires_grad_()
    for value in (
        tritonaff.affinity_regression_loss(logits, target),
        tritonaff.square_root_affinity(logits).square().sum(),
    ):
        (gradient,) = torch.autograd.grad(value, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="_backward"):
            gradient.sum().backward()


@pytest.mark.parametrize("grid_sizes", [(4, 3), ()])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_opcheck(backend, device, grid_sizes, memory_format):
    logits, target = make_inputs((2, 4, *image_size(backend)), device=device)
    logits = logits.contiguous(memory_format=memory_format).requires_grad_()
    op = torch.ops.tritonaff.affinity_regression.default
    opcheck(op, (logits, target, grid_sizes, 255, backend), backend)
    squared_error, pair_count, gram = op(logits, target, grid_sizes, 255, backend)
    assert [x.requires_grad for x in (squared_error, pair_count, gram)] == [True, False, False]
    opcheck(
        torch.ops.tritonaff.affinity_regression_backward.default,
        (torch.ones(2, device=device), logits.detach(), target, gram, grid_sizes, 255, backend),
        backend,
    )
    op = torch.ops.tritonaff.square_root_affinity.default
    opcheck(op, (logits, grid_sizes, backend), backend)
    opcheck(
        torch.ops.tritonaff.square_root_affinity_backward.default,
        (op(logits.detach(), grid_sizes, backend), logits.detach(), grid_sizes),
    )


# --- Properties ----------------------------------------------------------------------------------


doubles = inputs([torch.float64])


@given(inputs([torch.float32, torch.float64]), grids, BACKENDS)
def test_affinities_are_between_0_and_1(values, grid_sizes, backend):
    logits, _, _ = values
    if backend != "portable":
        logits = logits.float()
    device = DEVICE if backend == "triton" else "cpu"
    with tritonaff.use_backend(backend):
        affinity = tritonaff.square_root_affinity(logits.to(device), grid_sizes)
    # Half an eps for every class in the softmax's sum and in the product, a few for the terms.
    rounding = (4 + logits.shape[1]) * torch.finfo(affinity.dtype).eps
    assert (affinity >= 0).all()
    assert (affinity <= 1 + rounding).all()
    diagonal = affinity.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, torch.ones_like(diagonal), rtol=0, atol=rounding)


@given(doubles)
def test_the_affinity_is_1_only_of_equal_distributions(values):
    logits, _, _ = values
    affinity = tritonaff.square_root_affinity(logits, None)
    p = logits.flatten(2).softmax(1)
    # 1 - A is half the squared distance of the square roots, at least an eighth of the squared
    # distance of the probabilities.
    distance = (p[:, :, :, None] - p[:, :, None, :]).square().sum(1)
    assert (1 - affinity >= distance / 8 - 1e-14).all()
    changed = logits + torch.randn_like(logits[:, :1])  # other logits, the same distributions
    both = torch.cat([logits, changed], dim=3)
    points = both.shape[2] * both.shape[3]
    order = torch.arange(points).view(both.shape[2:])
    left, right = order.chunk(2, dim=1)
    pairs = tritonaff.square_root_affinity(both, None)[:, left.flatten(), right.flatten()]
    torch.testing.assert_close(pairs, torch.ones_like(pairs))


# No label that is also a class, which would become another one.
@given(inputs([torch.float64], ignored_labels=(255, -100)), grids)
def test_perfect_predictions_have_no_loss(values, grid_sizes):
    logits, target, ignore_index = values
    target = target.long()
    label = torch.where(target == ignore_index, 0, target)
    perfect = 1e4 * torch.nn.functional.one_hot(label, logits.shape[1]).movedim(-1, 1).double()
    for backend in ("reference", *BACKENDS):
        x, labels = perfect, target
        if backend in ("native", "triton"):
            x = perfect.float()
        if backend == "triton":
            x, labels = x.to(DEVICE), target.to(DEVICE)
        with tritonaff.use_backend(backend):
            loss = tritonaff.affinity_regression_loss(
                x, labels, grid_sizes, ignore_index=ignore_index
            )
        assert loss == 0


@given(doubles)
def test_permuting_the_points_changes_nothing(values):
    logits, target, ignore_index = values
    n, c, height, width = logits.shape
    order = torch.randperm(height * width)
    loss = tritonaff.affinity_regression_loss(logits, target, None, ignore_index=ignore_index)
    permuted = tritonaff.affinity_regression_loss(
        logits.flatten(2)[:, :, order].view(n, c, height, width),
        target.flatten(1)[:, order].view(n, height, width),
        None,
        ignore_index=ignore_index,
    )
    torch.testing.assert_close(permuted, loss)


# No label that is also a class, which would become another one.
@given(inputs([torch.float64], ignored_labels=(255, -100)), grids)
def test_permuting_the_classes_changes_nothing(values, grid_sizes):
    logits, target, ignore_index = values
    order = torch.randperm(logits.shape[1])
    target = target.long()
    known = target != ignore_index
    permuted = torch.where(known, order.argsort()[torch.where(known, target, 0)], target)
    expected = tritonaff.affinity_regression_terms(
        logits, target, grid_sizes, ignore_index=ignore_index
    )
    terms = tritonaff.affinity_regression_terms(
        logits[:, order], permuted, grid_sizes, ignore_index=ignore_index
    )
    for result, value in zip(terms, expected, strict=True):
        torch.testing.assert_close(result, value)


@given(doubles, grids)
def test_the_loss_is_that_of_the_matrices(values, grid_sizes):
    logits, target, ignore_index = values
    a = tritonaff.square_root_affinity(logits, grid_sizes)
    m, valid = tritonaff.label_affinity(target, grid_sizes, ignore_index)
    pair = valid[:, :, None] & valid[:, None, :]
    expected = ((a - m).square() * pair).sum((1, 2))
    squared_error, pair_count = tritonaff.affinity_regression_terms(
        logits, target, grid_sizes, ignore_index=ignore_index
    )
    torch.testing.assert_close(squared_error, expected)
    assert torch.equal(pair_count, pair.sum((1, 2)))
    loss = tritonaff.affinity_regression_loss(logits, target, grid_sizes, ignore_index=ignore_index)
    of_images = (expected / pair_count)[pair_count > 0]
    torch.testing.assert_close(loss, of_images.sum() / max(1, len(of_images)))


# --- Special images, memory ----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("grid_sizes", [(12, 6), None])
def test_empty_sets_are_zero_with_a_zero_gradient(backend, shape, grid_sizes, device):
    logits = torch.randn(shape, device=device, requires_grad=True)
    target = torch.full((shape[0], *shape[2:]), 255, device=device)
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_regression_loss(logits, target, grid_sizes)
        loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


@pytest.mark.parametrize("grid_sizes", [(12, 6), None])
def test_images_without_a_point_are_left_out_of_the_mean(backend, grid_sizes, device):
    logits, target = make_inputs((2, 3, 9, 11), device=device)
    target[1] = 255
    with tritonaff.use_backend(backend):
        both = tritonaff.affinity_regression_loss(logits, target, grid_sizes)
        first = tritonaff.affinity_regression_loss(logits[:1], target[:1], grid_sizes)
    assert torch.equal(both, first)


@pytest.mark.parametrize("grid_sizes", [(12, 6), None])
def test_labels_that_are_no_class_are_ignored_under_compile(backend, device, grid_sizes):
    logits, target = make_inputs((1, 3, 9, 9), device=device)
    void, wrong = target.clone(), target.clone()
    void[0, 0, 0], wrong[0, 0, 0] = 255, 2**32 + 1
    compiled = torch.compile(tritonaff.affinity_regression_loss, backend="eager")
    with tritonaff.use_backend(backend):
        assert torch.equal(compiled(logits, wrong, grid_sizes), compiled(logits, void, grid_sizes))


@pytest.mark.parametrize("backend", ["portable", "native"])
def test_memory_is_the_gradient_and_buffers_of_one_size(backend):
    """Linear in the number of points: a matrix of the larger image would take 275 GB."""

    def buffers(shape):
        logits, target = make_inputs(shape)
        logits.requires_grad_()

        def run(_):
            loss = tritonaff.affinity_regression_loss(logits, target, None)
            return torch.autograd.grad(loss, logits)

        with tritonaff.use_backend(available(backend)):
            # Labels are compared as int64.
            return peak_bytes(run, logits.device) - logits.nbytes - 2 * target.nbytes

    assert buffers((1, 8, 512, 512)) <= 1.1 * buffers((1, 8, 256, 512))


def test_matrices_that_do_not_fit():
    logits = torch.empty(1, 19, 1024, 2048, device="meta")
    target = torch.empty(1, 1024, 2048, dtype=torch.uint8, device="meta")
    message = (
        r"must take at most 8 GB, got 1 of 2097152 x 2097152, 17 TB: .*"
        r"affinity_regression_loss need no matrix"
    )
    with pytest.raises(ValueError, match=message):
        tritonaff.square_root_affinity(logits, None)
    with pytest.raises(ValueError, match=message):
        tritonaff.label_affinity(target, None)
    with tritonaff.use_backend("reference"), pytest.raises(ValueError, match=message):
        tritonaff.affinity_regression_loss(logits, target, None)
    assert tritonaff.affinity_regression_loss(logits, target, None).shape == ()
    assert tritonaff.square_root_affinity(logits).shape == (1, 180, 180)
    half = torch.empty(1, 2, 200, 200, device="meta")
    assert tritonaff.square_root_affinity(half, None).shape == (1, 40_000, 40_000)
    with pytest.raises(ValueError, match="12 GB"):
        tritonaff.square_root_affinity(half.double(), None)


@wording
def test_matrices_that_do_not_fit_under_dynamic_compile():
    torch._dynamo.reset()
    compiled = torch.compile(
        tritonaff.square_root_affinity, backend="eager", fullgraph=True, dynamic=True
    )
    assert compiled(torch.zeros(1, 2, 5, 6), None).shape == (1, 30, 30)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="must take at most 8 GB"):
        compiled(torch.zeros(1, 2, 300, 300), None)


def test_autocast_changes_nothing(backend, device):
    logits, target = make_inputs((1, 4, 13, 14), device=device)
    for name in (backend, "reference"):
        for grid_sizes in ((12, 6), None):
            results = []
            for enabled in (False, True):
                x = logits.clone().requires_grad_()
                with (
                    tritonaff.use_backend(name),
                    torch.autocast(device.type, torch.bfloat16, enabled=enabled),
                ):
                    affinity = tritonaff.square_root_affinity(x, grid_sizes)
                    loss = tritonaff.affinity_regression_loss(x, target, grid_sizes)
                grads = torch.autograd.grad(loss + affinity.sum(), x)
                results.append((affinity, loss, *grads))
            assert all(map(torch.equal, *results))
