"""Affinity propagation: every implementation against the float64 reference, and the reference
against the definition.
"""

import itertools
import math

import pytest
import torch
from conftest import available
from inputs import given, maker, subset
from layouts import LAYOUTS, laid_out
from opchecks import image_size, opcheck

import tritonaff
from tritonaff.checks import check_rates
from tritonaff.kernels.blocks import override
from tritonaff.testing import CASES, Case, check_parity, evaluate, make_propagation_inputs

RATES = (1, (2, 3))


def propagate(backend, *inputs, **options):
    with tritonaff.use_backend(backend):
        return tritonaff.affinity_propagation(*inputs, **options)


def make(shape, rates=RATES, dtype=torch.float32, device="cpu", seed=0):
    """Probabilities and affinity logits."""
    torch.manual_seed(seed)
    probs = (2 * torch.randn(shape)).softmax(dim=1)
    affinity = torch.randn(shape[0], 8 * len(rates), *shape[2:])
    return probs.to(device, dtype), affinity.to(device, dtype)


# --- The reference against the definition, pixel by pixel --------------------------------------


def propagation_by_definition(
    probs, affinity, rates, iterations, self_weight, mu, from_logits, normalize, border
):
    """The equations as loops over images, pixels, classes and neighbours."""
    n, c, height, width = probs.shape
    p = probs.clone()
    for _ in range(iterations):
        refined = torch.zeros_like(p)
        for b, y, x in itertools.product(range(n), range(height), range(width)):
            for i in range(c):
                total = self_weight * p[b, i, y, x] * max(p[b, :, y, x])
                channel = 0
                for r1, r2 in rates:
                    for dy, dx in itertools.product((-r1, 0, r1), (-r2, 0, r2)):
                        if (dy, dx) == (0, 0):
                            continue
                        a = float(affinity[b, channel, y, x])
                        a = mu**a / (1 + mu**a) if from_logits else a
                        row, column = y + dy, x + dx
                        if border == "replicate":
                            row, column = (
                                sorted((0, row, height - 1))[1],
                                sorted((0, column, width - 1))[1],
                            )
                        if 0 <= row < height and 0 <= column < width:
                            total += a * p[b, i, row, column]
                        channel += 1
                refined[b, i, y, x] = total
            if normalize == "sum":
                refined[b, :, y, x] /= sum(refined[b, :, y, x])
        p = refined
    return p


@pytest.mark.parametrize("border", ["valid", "replicate"])
@pytest.mark.parametrize("normalize", ["sum", "none"])
@pytest.mark.parametrize("from_logits", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 2, 1, 1), (1, 2, 1, 6), (1, 4, 7, 2)])
def test_reference_is_the_definition(from_logits, shape, normalize, border):
    torch.manual_seed(0)
    probs = torch.rand(shape, dtype=torch.float64)
    affinity = torch.rand(shape[0], 24, *shape[2:], dtype=torch.float64)
    if from_logits:
        affinity = 6 * affinity - 3
    rates = ((1, 1), (2, 3), (3, 1))
    options = 2, 1.5, 5.0, from_logits, normalize, border
    expected = propagation_by_definition(probs, affinity, rates, *options)
    names = "iterations", "self_weight", "steepness", "from_logits", "normalize", "border"
    options = dict(zip(names, options, strict=True))
    result = propagate("reference", probs, affinity, rates, **options)
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)


# --- Every implementation against the reference -------------------------------------------------


def case_with(rates, softmax=False, **options):
    """The operation with these options, every element of its result weighted differently."""

    def tables(x, affinity):
        probs = x.softmax(dim=1) if softmax else x
        return (tritonaff.affinity_propagation(probs, affinity, rates, **options),)

    def loss(result):
        weight = 1 + torch.arange(result.numel(), device=result.device).cos().view(result.shape)
        # In the dtype of the result: the loss rounds like the result.
        return (result * weight).sum().to(result.dtype) / max(1, result[:, 0].numel())

    return Case.of_tables("affinity_propagation", tables, loss, largest_term=1.0)


@maker
def inputs(pick, dtypes, max_rates=3):
    n, c = pick([1, 2]), pick(range(2, 7))
    height, width = pick(range(1, 17)), pick(range(1, 25))
    rates = subset(pick, [1, 2, 5, (1, 2), (4, 1), (3, 11), 64], max_rates)
    options = {
        "rates": rates,
        "softmax": pick([False, True]),
        "iterations": pick(range(0, 4)),
        "self_weight": pick([0.1, 1.0, 6.0]),
        "steepness": pick([1.5, 7.0]),
        "from_logits": pick([False, True]),
        "normalize": pick(["sum", "none"]),
        "border": pick(["valid", "replicate"]),
    }
    if options["normalize"] == "none":
        c = pick([1, c])
        options["self_weight"] = pick([0.0, 1.0])
    torch.manual_seed(pick(range(2**16)))
    x = pick([0.1, 1.0, 15.0]) * torch.randn(n, c, height, width)
    affinity = pick([0.1, 1.0, 15.0]) * torch.randn(n, 8 * len(rates), height, width)
    if not options["softmax"]:
        x = x.softmax(dim=1) if pick([False, True]) else torch.rand_like(x) + 0.05
    if not options["from_logits"]:
        affinity = affinity.sigmoid() if pick([False, True]) else (affinity > 0).to(x.dtype)
    if options["normalize"] == "none":  # sums stay about 1
        affinity = affinity / (4 * affinity.shape[1])
    x, affinity = (laid_out(t.to(pick(dtypes)), pick(LAYOUTS)) for t in (x, affinity))
    return case_with(**options), x, affinity


HALF_AND_SINGLE = [torch.float32, torch.bfloat16, torch.float16]


@given(inputs([*HALF_AND_SINGLE, torch.float64]))
def test_portable_matches_the_reference(values):
    case, x, affinity = values
    check_parity(case, "portable", x, affinity)


@given(inputs(HALF_AND_SINGLE), rows=24)
def test_native_matches_the_reference(values):
    case, x, affinity = values
    check_parity(case, available("native"), x, affinity)


@given(inputs(HALF_AND_SINGLE, max_rates=1), rows=8)
def test_triton_matches_the_reference(values):
    pytest.importorskip("triton", minversion="3.6")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case, x, affinity = values
    check_parity(case, "triton", x.to(device), affinity.to(device))


@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_the_papers_rates(backend, device, confidence):
    """Neighbours up to 64 pixels away, some inside the image."""
    shape = (1, 3, 9, 70) if backend == "triton" else (1, 3, 70, 75)
    values = make_propagation_inputs(shape, device=device, confidence=confidence)
    check_parity(CASES["affinity_propagation"], backend, *values)


def test_many_classes(backend, device):
    check_parity(case_with(RATES, iterations=2), backend, *make((1, 150, 6, 7), device=device))


BORDERS = [("sum", "valid"), ("sum", "replicate"), ("none", "valid"), ("none", "replicate")]


@pytest.mark.parametrize("block", [1, 200])
@pytest.mark.parametrize(("normalize", "border"), BORDERS)
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block, normalize, border):
    """Single images, and groups of images."""
    from tritonaff.portable import blocks

    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    options = {"iterations": 2, "normalize": normalize, "border": border}
    check_parity(case_with(RATES, **options), "portable", *make((5, 3, 5, 6)))


@pytest.mark.parametrize("classes", [2, 10, 11, 23])
@pytest.mark.parametrize("rates", [[(4, 2), (6, 9)], [(3, 1)], [(1, 40)]], ids=str)
def test_native_kernels_do_not_depend_on_their_passes(classes, rates):
    """Passes over the classes; sets of rows with and without neighbours; widths of vectors."""
    for width in (16, 37):
        inputs = make((2, classes, 9, width), rates)
        for border in ("valid", "replicate"):
            case = case_with(rates, iterations=3, border=border)
            check_parity(case, available("native"), *inputs)


@pytest.mark.parametrize("rates", [(1, (2, 3)), (4, (8, 3))], ids=str)
@pytest.mark.parametrize(("normalize", "border"), [BORDERS[0], BORDERS[3]])
def test_native_kernels_do_not_depend_on_the_number_of_threads(rates, normalize, border):
    """Threads that share the rows of an image, and threads that have sets of their own."""
    values = make((1, 21, 33, 40), rates)
    case = case_with(rates, iterations=3, normalize=normalize, border=border)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(case, available("native"), *values))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_native_kernels_pass_on_what_is_no_number_to_neighbors_alone(number):
    """Pixels at the border of the image have no neighbours in the row above or below."""
    probs, affinity = make((1, 3, 7, 11), [2])
    probs[0, 1, 3, 10] = probs[0, 2, 5, 0] = number
    check_what_is_finite([2], probs, affinity)


@pytest.mark.parametrize("place", [1, 4])
def test_native_kernels_pass_nothing_through_columns_outside_the_image(place):
    """From column 1 to the right by 5 and back by 2, or the other way round."""
    probs, affinity = make((1, 3, 7, 6), [(1, 5), (2, 2)])
    probs[0, 1, 0, place] = math.nan
    check_what_is_finite([(1, 5), (2, 2)], probs, affinity)


def check_what_is_finite(rates, probs, affinity):
    case = case_with(rates, iterations=2)
    results = evaluate(case, available("native"), probs, affinity)
    expected = evaluate(case, "reference", probs, affinity)
    assert not expected["0"].isfinite().all()
    assert expected["gradient"].isfinite().any()
    for name in ("0", "gradient"):
        assert torch.equal(results[name].isfinite(), expected[name].isfinite())


def test_native_kernels_read_affinities_of_other_dtypes():
    probs, affinity = make((1, 3, 5, 6))
    affinity = affinity.double().requires_grad_()
    results = []
    for backend in (available("native"), "reference"):
        result = propagate(backend, probs, affinity, RATES, iterations=2)
        (gradient,) = torch.autograd.grad(result[:, 0].sum(), affinity)
        assert (result.dtype, gradient.dtype) == (torch.float32, torch.float64)
        results.append((result, gradient))
    torch.testing.assert_close(*results)


def test_tiles_do_not_depend_on_their_blocks(device):
    """Several programs per image, with seams inside rows, and several blocks of classes."""
    pytest.importorskip("triton", minversion="3.6")
    pixels = {"pixels": 16, "elements": 128, "gate_pixels": 16}
    with override(affinity_propagation={**pixels, "classes": 2, "classes_of_many": 2}):
        for normalize, border in (BORDERS[0], BORDERS[3]):
            case = case_with([(1, 2)], iterations=2, normalize=normalize, border=border)
            check_parity(case, "triton", *make((2, 5, 5, 9), [1], device=device))


def test_nothing_is_left_unwritten(backend, device, poisoned_memory):
    case = case_with([1, (2, 30)], iterations=2)
    for layout in ("contiguous", "channels_last"):
        values = [laid_out(x, layout) for x in make((2, 3, 5, 9), device=device)]
        results = evaluate(case, backend, *values)
        assert all(result.isfinite().all() for result in results.values())
        assert results["0"].stride() == results["gradient"].stride() == values[0].stride()
        assert results["gradient 1"].stride() == values[1].stride()
        assert not results["gradient 1"][:, 8].any()  # nobody has that neighbour


def test_same_bits_every_time(backend, device):
    values = make((2, 5, 12, 17), device=device)
    first, second = (evaluate(case_with(RATES, iterations=2), backend, *values) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_are_left_alone(backend, device):
    for iterations in (0, 1, 2):
        values = make((1, 3, 5, 6), device=device)
        copies = [x.clone() for x in values]
        result = propagate(backend, *values, RATES, iterations=iterations)
        assert result.data_ptr() != values[0].data_ptr()
        evaluate(case_with(RATES, iterations=iterations), backend, *values)
        assert all(torch.equal(x, copy) for x, copy in zip(values, copies, strict=True))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_dtypes_may_differ(backend, device, dtype):
    """The result and each gradient have the dtype of their own input."""
    probs = make((1, 3, 5, 6), device=device)[0].to(dtype).requires_grad_()
    affinity = make((1, 3, 5, 6), device=device)[1].half().requires_grad_()
    result = propagate(backend, probs, affinity, RATES, iterations=2)
    result[:, 0].sum().backward()
    assert (result.dtype, probs.grad.dtype, affinity.grad.dtype) == (dtype, dtype, torch.float16)


# --- Derivatives --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("softmax", "from_logits", "normalize", "border"),
    [
        *((softmax, from_logits, *BORDERS[0]) for softmax in (0, 1) for from_logits in (0, 1)),
        (False, False, *BORDERS[3]),
    ],
)
@pytest.mark.parametrize("implementation", ["reference", "portable"])
def test_gradcheck(implementation, softmax, from_logits, normalize, border):
    torch.manual_seed(0)
    x = torch.rand(1, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    affinity = torch.rand(1, 16, 3, 4, dtype=torch.float64, requires_grad=True)

    def refine(x, affinity):
        probs = x.softmax(dim=1) if softmax else x
        return tritonaff.affinity_propagation(
            probs, affinity, RATES, iterations=3, self_weight=2.0, from_logits=bool(from_logits),
            normalize=normalize, border=border,
        )  # fmt: skip

    with tritonaff.use_backend(implementation):
        assert torch.autograd.gradcheck(refine, (x, affinity))


def test_the_largest_passes_its_gradient_to_the_first_of_equals(backend, device):
    """The gradient goes to the first maximum, as with torch.max(dim)."""
    probs = torch.tensor([0.2, 0.4, 0.4], device=device).view(1, 3, 1, 1).requires_grad_()
    affinity = torch.zeros(1, 8, 1, 1, device=device)
    gradients = []
    for name in (backend, "reference"):
        # A pixel alone in its image stays the same: a second pixel shows the effect of max.
        two = torch.cat((probs, probs.detach().flip(1)), dim=3)
        result = propagate(name, two, affinity.repeat(1, 1, 1, 2), [1], iterations=1)
        gradients += torch.autograd.grad(result[0, 0, 0, 0], probs)
    torch.testing.assert_close(*gradients)
    assert gradients[0][0, 1] != gradients[0][0, 2]


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_only_what_needs_a_gradient_gets_one(backend, device, iterations):
    def gradients(needs):
        values = [
            x.requires_grad_(need)
            for x, need in zip(make((1, 3, 5, 6), device=device), needs, strict=True)
        ]
        result = propagate(backend, *values, RATES, iterations=iterations)
        result[:, 0].square().sum().backward()
        return [x.grad for x in values]

    both = gradients((True, True))
    probs_alone, none = gradients((True, False))
    assert none is None
    # Two compiled kernels may fuse different products with sums.
    torch.testing.assert_close(probs_alone, both[0], rtol=1e-6, atol=1e-7)
    none, affinity_alone = gradients((False, True))
    assert none is None
    torch.testing.assert_close(affinity_alone, both[1], rtol=1e-6, atol=1e-7)


def test_a_second_derivative_is_refused():
    values = [x.requires_grad_() for x in make((1, 3, 5, 6))]
    result = tritonaff.affinity_propagation(*values, RATES, iterations=1)
    (gradient, _) = torch.autograd.grad(result[:, 0].sum(), values, create_graph=True)
    with pytest.raises(RuntimeError, match="affinity_propagation_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(backend, device, layout):
    shape = 2, 3, *image_size(backend)
    probs, affinity = (laid_out(x, layout) for x in make(shape, device=device))
    affinity = affinity[:, :8]
    settings = [2, 3], 1, 6.0, 7.0, True, "sum", "valid", backend
    as_they_are = [2, 3], 1, 0.0, 7.0, False, "none", "replicate", backend
    for options in (settings, as_they_are)[: 2 if layout == "contiguous" else 1]:
        opcheck(
            torch.ops.tritonaff.affinity_propagation.default,
            (probs.clone().requires_grad_(), affinity.clone().requires_grad_(), *options),
            backend,
        )
    for needs in ((True, True), (True, False), (False, True)):
        opcheck(
            torch.ops.tritonaff.affinity_propagation_backward.default,
            (torch.ones_like(probs), probs, affinity, *needs, *settings),
            backend,
        )


def test_two_graphs_serve_every_image_size(backend, device):
    torch._dynamo.reset()
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def refine(logits, affinity):
        probs = logits.softmax(dim=1)
        return tritonaff.affinity_propagation(probs, affinity, [(2, 3)], iterations=2)

    compiled = torch.compile(refine, backend=compiler, fullgraph=True)
    for n, height, width in [(2, 5, 6), (3, 4, 7), (2, 6, 3)]:
        values = [x.requires_grad_() for x in make((n, 3, height, width), [1], device=device)]
        with tritonaff.use_backend(backend):
            result, expected = compiled(*values), refine(*values)
            gradients, expected_gradients = (
                torch.autograd.grad(x.square().sum(), values) for x in (result, expected)
            )
        torch.testing.assert_close(result, expected)
        torch.testing.assert_close(gradients, expected_gradients)
    assert len(graphs) <= 2


def test_meta_tensors_and_export():
    probs, affinity = (x.to("meta") for x in make((2, 3, 5, 6)))
    assert tritonaff.affinity_propagation(probs, affinity, RATES).shape == probs.shape
    module, values = tritonaff.AffinityPropagation(RATES), make((2, 3, 5, 6))
    exported = torch.export.export(module, values)
    torch.testing.assert_close(exported.module()(*values), module(*values))


# --- Properties ----------------------------------------------------------------------------------


def shapes(pick):
    return pick([1, 2]), pick(range(2, 6)), pick(range(1, 10)), pick(range(1, 12))


@given(shapes, range(2**16))
def test_the_classes_of_a_pixel_sum_to_1(shape, seed):
    torch.manual_seed(seed)
    probs, affinity = torch.rand(shape) + 0.01, torch.randn(shape[0], 16, *shape[2:])
    total = propagate("portable", probs, affinity, RATES).sum(dim=1)
    torch.testing.assert_close(total, torch.ones_like(total))


@given(shapes, range(2**16))
def test_the_order_of_the_classes_does_not_matter(shape, seed):
    probs, affinity = make(shape, dtype=torch.float64, seed=seed)
    order = torch.randperm(shape[1])
    expected = tritonaff.affinity_propagation(probs, affinity, RATES)[:, order]
    result = tritonaff.affinity_propagation(probs[:, order], affinity, RATES)
    torch.testing.assert_close(result, expected)


@given(shapes, range(2**16))
def test_a_flipped_image_with_flipped_neighbors_is_flipped(shape, seed):
    probs, affinity = make(shape, dtype=torch.float64, seed=seed)
    flipped = affinity.unflatten(1, (2, 8)).flip(2).flatten(1, 2).flip(2, 3)
    result = tritonaff.affinity_propagation(probs.flip(2, 3), flipped, RATES)
    expected = tritonaff.affinity_propagation(probs, affinity, RATES).flip(2, 3)
    torch.testing.assert_close(result, expected)


@given(shapes, range(2**16))
def test_one_distribution_everywhere_stays(shape, seed):
    probs, affinity = make(shape, dtype=torch.float64, seed=seed)
    probs = probs[:, :, :1, :1].expand(shape)
    torch.testing.assert_close(tritonaff.affinity_propagation(probs, affinity, RATES), probs)


@pytest.mark.parametrize("classes", [1, 3])
def test_weights_that_sum_to_1_keep_what_is_constant(any_backend, device, classes):
    """Any number, of any sign, in images smaller than the rate as well."""
    options = {"from_logits": False, "self_weight": 0, "normalize": "none", "border": "replicate"}
    probs = torch.tensor([-3.0, 0.5, 7.0], device=device)[:classes, None, None].expand(2, -1, 3, 4)
    weights = torch.randn(2, 16, 3, 4, device=device).softmax(dim=1)
    result = propagate(any_backend, probs, weights, [1, 9], **options)
    torch.testing.assert_close(result, probs.contiguous(), rtol=1e-5, atol=1e-6)


def test_without_affinity_every_pixel_stays(backend, device):
    probs, affinity = make((2, 3, 5, 6), device=device)
    none = {"affinity": torch.zeros_like(affinity), "from_logits": False}
    below = {"affinity": torch.full_like(affinity, -30.0), "from_logits": True}
    for options in (none, below):
        result = propagate(backend, probs, rates=RATES, iterations=3, **options)
        torch.testing.assert_close(result, probs)


def test_steepness_e_is_the_ordinary_sigmoid(backend, device):
    probs, affinity = make((1, 3, 5, 6), device=device)
    result = propagate(backend, probs, affinity, RATES, iterations=2, steepness=math.e)
    a = affinity.sigmoid()
    expected = propagate(backend, probs, a, RATES, iterations=2, from_logits=False)
    torch.testing.assert_close(result, expected)


# --- Special images ------------------------------------------------------------------------------


def test_nothing_to_divide_by_is_0_with_a_zero_gradient(backend, device):
    """A pixel without probabilities that receives nothing from its neighbours."""
    probs, affinity = make((1, 3, 4, 5), device=device)
    probs[..., 1, 2] = 0
    affinity = affinity.sigmoid()
    affinity[..., 1, 2] = 0
    case = case_with(RATES, iterations=3, from_logits=False)
    results = evaluate(case, backend, probs, affinity)
    expected = evaluate(case, "reference", probs, affinity)
    assert all(result.isfinite().all() for result in results.values())
    assert not results["0"][..., 1, 2].any()
    assert not results["gradient 1"][..., 1, 2].any()
    torch.testing.assert_close(results, expected)


def test_images_without_numbers_do_not_disturb_the_one_between_them(backend, device):
    """They lie in memory where border pixels would have their neighbours outside."""
    probs, affinity = make((3, 3, 4, 5), device=device)
    case = case_with(RATES, iterations=2)
    expected = evaluate(case, backend, probs, affinity)
    probs[::2] = math.nan
    results = evaluate(case, backend, probs, affinity)
    for name in ("0", "gradient", "gradient 1"):
        assert torch.equal(results[name][1], expected[name][1])


def test_infinite_affinity_is_finite(backend, device):
    probs, affinity = make((1, 3, 5, 6), device=device)
    affinity = affinity.sign() * math.inf
    results = evaluate(case_with(RATES, iterations=2), backend, probs, affinity)
    assert all(result.isfinite().all() for result in results.values())


def test_the_module_is_the_function():
    options = {"iterations": 2, "self_weight": 3.0, "steepness": 2.0, "from_logits": False}
    values = make((1, 3, 5, 6))
    module = tritonaff.AffinityPropagation(RATES, **options)
    assert torch.equal(module(*values), tritonaff.affinity_propagation(*values, RATES, **options))
    assert repr(module) == (
        f"AffinityPropagation(rates={check_rates(RATES)}, iterations=2, self_weight=3.0, "
        "steepness=2.0, from_logits=False, normalize='sum', border='valid')"
    )
    assert not list(module.parameters())


@pytest.mark.parametrize("rate", [200_001, 2**31, 2**33, 2**62])
def test_gigantic_rates_have_no_neighbors(any_backend, device, rate):
    probs = torch.rand(1, 3, 4, 5, device=device)
    affinity = torch.zeros(1, 8, 4, 5, device=device)
    with tritonaff.use_backend(any_backend):
        result = tritonaff.affinity_propagation(probs, affinity, [rate], iterations=1)
    torch.testing.assert_close(result, probs / probs.sum(dim=1, keepdim=True))
    weights = torch.full_like(affinity, 1 / 8)
    options = {"from_logits": False, "self_weight": 0, "normalize": "none", "border": "replicate"}
    with tritonaff.use_backend(any_backend):
        result = tritonaff.affinity_propagation(probs, weights, [rate], iterations=1, **options)
    # The neighbours: corners, and the ends of the pixel's own row and column.
    ends = [
        probs[:, :, rows, columns]
        for rows in (slice(0, 1), slice(None), slice(-1, None))
        for columns in (slice(0, 1), slice(None), slice(-1, None))
    ]
    expected = sum(x.expand_as(probs) for x in ends) - probs
    torch.testing.assert_close(result, expected / 8)
