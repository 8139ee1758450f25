"""Affinities of pixels by their colours: the reference against the projects' formulas, the
implementation against the reference, and the refinement of masks.
"""

import itertools
import math

import pytest
import torch
from inputs import given, maker, subset
from layouts import LAYOUTS, laid_out
from opchecks import opcheck
from torch.nn import functional as F

import tritonaff
from tritonaff.testing import Case, check_parity

MODES = ["pamr", "par"]
DIRECTIONS = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]


def neighbors_of(image, y, x, dilations):
    """The pixels themselves, (8 D, channels): beyond the border, the nearest pixel of the image."""
    _, height, width = image.shape
    places = [
        (min(max(y + d * dy, 0), height - 1), min(max(x + d * dx, 0), width - 1))
        for d in dilations
        for dy, dx in DIRECTIONS
    ]
    return torch.stack([image[:, row, column] for row, column in places])


def weights_by_definition(image, dilations, mode):
    """The weights of one image, pixel by pixel."""
    _, height, width = image.shape
    weights = torch.zeros(8 * len(dilations), height, width, dtype=torch.float64)
    for y, x in itertools.product(range(height), range(width)):
        own, others = image[:, y, x], neighbors_of(image, y, x, dilations)
        if mode == "pamr":
            values = torch.cat((others, own.expand(len(dilations), -1)))
            s = ((values - values.mean(0)) ** 2).sum(0).div(len(values) - 1).sqrt()
            weights[:, y, x] = (-(own - others).abs() / (1e-8 + 0.1 * s)).mean(1).softmax(0)
        else:
            s = ((others - others.mean(0)) ** 2).sum(0).div(len(others) - 1).sqrt()
            color = -(((own - others).abs() / (s + 1e-8) / 0.3) ** 2).mean(1)
            r = torch.tensor([d * math.hypot(*step) for d in dilations for step in DIRECTIONS])
            r = r.double()
            position = -((r / (r.std() + 1e-8) / 0.3) ** 2)
            weights[:, y, x] = color.softmax(0) + 0.01 * position.softmax(0)
    return weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(2, 3, 6, 5), (1, 1, 1, 4), (1, 3, 7, 1)], ids=str)
def test_weights_are_the_definition(mode, shape):
    torch.manual_seed(0)
    images = torch.randn(shape, dtype=torch.float64)
    dilations = [1, 3]
    expected = torch.stack([weights_by_definition(image, dilations, mode) for image in images])
    for backend in ("reference", "portable"):
        with tritonaff.use_backend(backend):
            weights = tritonaff.image_affinity(images, dilations, mode=mode)
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
    total = weights.sum(dim=1)
    torch.testing.assert_close(total, torch.full_like(total, 1.01 if mode == "par" else 1.0))


# --- The implementation against the reference ---------------------------------------------------


def case_with(dilations, mode):
    """The operation, every element of its result weighted differently."""

    def tables(images):
        return (tritonaff.image_affinity(images, dilations, mode=mode),)

    def loss(weights):
        factor = torch.arange(weights.numel(), device=weights.device).cos().view(weights.shape)
        return (weights * factor).sum().to(weights.dtype) / max(1, weights[:, 0].numel())

    return Case.of_tables("image_affinity", tables, loss, largest_term=10.0)


@maker
def inputs(pick):
    n, c, height, width = pick([1, 2]), pick([1, 3]), pick(range(1, 12)), pick(range(1, 15))
    dilations = subset(pick, [1, 2, 5, 40], 3)
    torch.manual_seed(pick(range(2**16)))
    # Colours of bytes, and colours around 0; smooth, as differences of images are small.
    images = torch.randn(n, c, height, width).cumsum(dim=3) * pick([1.0, 40.0]) + pick([0.0, 128.0])
    images = laid_out(
        images.to(pick([torch.float32, torch.float64, torch.bfloat16])), pick(LAYOUTS)
    )
    return images, case_with(dilations, pick(MODES))


@given(inputs(), rows=12)
def test_portable_matches_the_reference(values):
    images, case = values
    check_parity(case, "portable", images)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value", [0.0, 0.1, 255.0])
def test_one_color_everywhere(mode, value):
    images = torch.full((1, 3, 5, 6), value, requires_grad=True)
    weights = tritonaff.image_affinity(images, [1, 2], mode=mode)
    weights.square().sum().backward()
    assert images.grad.isfinite().all()
    if mode == "pamr":
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))


@pytest.mark.parametrize("mode", MODES)
def test_bytes_are_read(mode):
    images = torch.randint(0, 256, (1, 3, 6, 7), dtype=torch.uint8)
    weights = tritonaff.image_affinity(images, [1, 2], mode=mode)
    assert torch.equal(weights, tritonaff.image_affinity(images.float(), [1, 2], mode=mode))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    images = torch.randn(2, 3, 5, 6)
    op = torch.ops.tritonaff.image_affinity.default
    opcheck(op, (images.clone().requires_grad_(), [1, 2], mode), "portable")
    grad = torch.ones(2, 16, 5, 6)
    op = torch.ops.tritonaff.image_affinity_backward.default
    opcheck(op, (grad, images, [1, 2], mode), "portable")


# --- The refinement of masks --------------------------------------------------------------------


def refined_by_definition(images, masks, dilations, num_iter, mode):
    masks = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
    weights = torch.stack([weights_by_definition(image, dilations, mode) for image in images])
    for _ in range(num_iter):
        before, masks = masks, torch.zeros_like(masks)
        for b, y, x in itertools.product(*(range(size) for size in images[:, 0].shape)):
            others = neighbors_of(before[b], y, x, dilations)
            masks[b, :, y, x] = (weights[b, :, y, x, None] * others).sum(dim=0)
    return masks


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(6, 7), (3, 4)], ids=str)
def test_refinement_is_the_definition(any_backend, device, mode, size):
    torch.manual_seed(0)
    images, masks = torch.randn(2, 3, 6, 7), torch.randn(2, 2, *size)
    refine = tritonaff.PAMR(3, [1, 4]) if mode == "pamr" else tritonaff.PAR([1, 4], 3)
    with tritonaff.use_backend(any_backend):
        result = refine(images.to(device), masks.to(device))
    expected = refined_by_definition(images.double(), masks.double(), [1, 4], 3, mode)
    torch.testing.assert_close(result.double().cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("module", [tritonaff.PAMR(2, [1, 2]), tritonaff.PAR([1, 2], 2)])
def test_derivatives_of_a_refinement(module):
    torch.manual_seed(0)
    images = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(1, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (images, masks))


def test_checkpoints_of_the_original_modules():
    network = torch.nn.ModuleDict({"aff": tritonaff.PAMR(10, [1, 2]), "par": tritonaff.PAR([1], 1)})
    kernel = torch.zeros(8, 1, 3, 3)
    state = {"aff.aff_x.kernel": kernel, "aff.aff_std.kernel": kernel, "par.kernel": kernel}
    network.load_state_dict(state)
    assert not network.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network.load_state_dict({"aff.weight": kernel})


def test_the_modules_say_what_they_are():
    assert repr(tritonaff.PAMR()) == "PAMR(num_iter=1, dilations=(1,))"
    assert (
        repr(tritonaff.PAR(dilations=[1, 2], num_iter=10)) == "PAR(num_iter=10, dilations=(1, 2))"
    )
    defaults = tritonaff.PAMR(num_iter=10, dilations=[1, 2, 4])
    assert (defaults.num_iter, defaults.dilations) == (10, (1, 2, 4))


affinity = tritonaff.image_affinity
IMAGES, MASKS = torch.zeros(2, 3, 4, 5), torch.zeros(2, 1, 4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: affinity(IMAGES.int(), [1]), TypeError, "images must have dtype"),
        (lambda: affinity(IMAGES[0], [1]), ValueError, r"shape \(N, C, H, W\)"),
        (lambda: affinity(IMAGES[..., :0], [1]), ValueError, "one channel, row"),
        (lambda: affinity(IMAGES, []), ValueError, "must be distinct"),
        (lambda: affinity(IMAGES, [1, 1]), ValueError, "must be distinct"),
        (lambda: affinity(IMAGES, [0]), ValueError, "dilations must be at least 1"),
        (lambda: affinity(IMAGES, [1.0]), TypeError, "dilations must be an int"),
        (lambda: affinity(IMAGES, [1], mode="crf"), ValueError, "mode must be one"),
        (lambda: tritonaff.PAMR(-1), ValueError, "num_iter must be at least 0, got -1"),
        (lambda: tritonaff.PAR([1], 1.0), TypeError, "num_iter must be an int, got float"),
        (lambda: tritonaff.PAMR()(IMAGES, MASKS[:1]), ValueError, "of 2 images, got 1"),
        (lambda: tritonaff.PAMR()(IMAGES, MASKS > 0), TypeError, "masks must have dtype"),
        (lambda: tritonaff.PAMR()(IMAGES, MASKS.to("meta")), ValueError, "one device, got cpu and"),
    ],
)  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
