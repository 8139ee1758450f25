"""Box-supervised pairwise loss: the reference against the definition, every implementation against
the reference, colours against scikit-image.
"""

import itertools
import math

import pytest
import torch
from inputs import given, maker
from opchecks import opcheck
from torch.nn import functional as F

import tritonaff
from tritonaff.kernels.blocks import override
from tritonaff.native.library import find_compiler
from tritonaff.portable import box_pairwise as portable
from tritonaff.reference import box_pairwise as reference
from tritonaff.testing import CASES, Case, check_parity, evaluate

CASE = CASES["box_pairwise"]
DIRECTIONS = [step for step in itertools.product((-1, 0, 1), repeat=2) if step != (0, 0)]


# --- Colours ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lab_of_rgb", [reference.lab_of_rgb, portable.lab_of_rgb])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-4)])
def test_lab_is_scikit_images(lab_of_rgb, dtype, atol):
    """float32: a is 500 (f_x - f_y), and both of at most 1 have a few roundings of 1.2e-7."""
    color = pytest.importorskip("skimage.color")
    torch.manual_seed(0)
    images = torch.rand(2, 3, 9, 11, dtype=dtype) ** 3  # dark ones too
    images[0, :, 0] = torch.tensor([0.0, 0.04, 1.0]).repeat(4)[:11]
    for image, lab in zip(images, lab_of_rgb(images), strict=True):
        expected = torch.from_numpy(color.rgb2lab(image.double().movedim(0, -1).numpy()))
        torch.testing.assert_close(lab.movedim(0, -1).double(), expected, rtol=0, atol=atol)


def similarity_by_definition(colors, valid, dilation):
    """The similarity of one image (C, H, W), pixel by pixel."""
    _, height, width = colors.shape
    values = torch.zeros(8, height, width, dtype=torch.float64)
    for y, x, (k, (dy, dx)) in itertools.product(
        range(height), range(width), enumerate(DIRECTIONS)
    ):
        there = y + dilation * dy, x + dilation * dx
        if 0 <= there[0] < height and 0 <= there[1] < width and valid[there]:
            distance = (colors[:, y, x] - colors[:, there[0], there[1]]).norm()
            values[k, y, x] = math.exp(-float(distance) / 2)
    return values


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("color_space", ["lab", "rgb"])
@pytest.mark.parametrize("stride", [1, 3])
def test_similarity_is_the_definition(backend, color_space, stride):
    torch.manual_seed(0)
    images = 0.1 * torch.rand(2, 3, 13, 17, dtype=torch.float64) + 0.4
    valid = torch.rand(2, 13, 17) > 0.2
    start, (height, width) = stride // 2, (13 // stride, 17 // stride)
    pooled = F.avg_pool2d(images, stride)
    colors = reference.lab_of_rgb(pooled) if color_space == "lab" else pooled
    seen = valid[:, start::stride, start::stride][:, :height, :width]
    with tritonaff.use_backend(backend):
        values = tritonaff.color_similarity(
            images, dilation=2, color_space=color_space, stride=stride, valid=valid
        )
        bits = tritonaff.color_similarity(
            images, color_space=color_space, stride=stride, valid=valid, threshold=0.3
        )
    for image in range(2):
        expected = similarity_by_definition(colors[image], seen[image], 2)
        torch.testing.assert_close(values[image], expected, rtol=1e-9, atol=1e-12)
    expected = sum((values[:, k] >= 0.3).to(torch.uint8) << k for k in range(8))
    assert torch.equal(bits, expected)


def test_bytes_are_colors_in_0_to_1():
    images = torch.randint(0, 256, (1, 3, 6, 7), dtype=torch.uint8)
    for color_space in ("lab", "rgb"):
        values = tritonaff.color_similarity(images, color_space=color_space)
        expected = tritonaff.color_similarity(images / 255, color_space=color_space)
        assert torch.equal(values, expected)


# --- The reference against the definition, pixel by pixel ---------------------------------------


def by_definition(logits, bits, boxes, image_index, labels, dilation, stride):
    """Counts and sums, as loops over masks, pixels and neighbours."""
    m, height, width = logits.shape
    count, log_loss = torch.zeros(m, dtype=torch.int64), torch.zeros(m, dtype=torch.float64)
    for b, y, x, (k, (dy, dx)) in itertools.product(
        range(m), range(height), range(width), enumerate(DIRECTIONS)
    ):
        left, top, right, bottom = (math.floor(edge) for edge in boxes[b].tolist())
        row, column = (stride // 2 + stride * place for place in (y, x))
        there = y + dilation * dy, x + dilation * dx
        in_box = top <= row <= bottom and left <= column <= right
        inside = 0 <= there[0] < height and 0 <= there[1] < width
        if not (in_box and inside and int(bits[image_index[b], y, x]) >> k & 1):
            continue
        p, p_there = (1 / (1 + math.exp(-float(logits[b][place]))) for place in ((y, x), there))
        same = p * p_there + (1 - p) * (1 - p_there)
        agree = labels is None or labels[b, y, x] == labels[b][there]
        count[b] += 1
        log_loss[b] -= math.log(same if agree else 1 - same)
    return count, log_loss


BOXES = torch.tensor(
    [[2, 1, 6, 4], [-3, -2, 99, 99], [3.9, 3.2, 3.1, 5.8], [5, 5, 4, 9], [0, 6, 0, 6], [9, 1, 9, 4]]
)  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("supervised", [False, True])
@pytest.mark.parametrize(("dilation", "stride"), [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_reference_is_the_definition(backend, supervised, dilation, stride):
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 7, 9, dtype=torch.float64)
    bits = torch.randint(0, 256, (3, 7, 9), dtype=torch.uint8)
    image_index = torch.tensor([2, 0, 1, 1, 0, 2])
    boxes = stride * BOXES.double()
    labels = torch.rand(6, 7, 9) > 0.5 if supervised else None
    for pairs in [bits, None] if supervised else [bits]:
        with tritonaff.use_backend(backend):
            terms = tritonaff.box_pairwise_terms(
                logits, pairs, boxes, image_index, labels=labels, dilation=dilation, stride=stride
            )
        seen = torch.full_like(bits, 255) if pairs is None else bits
        count, log_loss = by_definition(logits, seen, boxes, image_index, labels, dilation, stride)
        assert torch.equal(terms.count, count)
        assert count[1] > 0
        torch.testing.assert_close(terms.log_loss, log_loss, rtol=1e-12, atol=1e-12)


# --- Every implementation against the reference -------------------------------------------------


def case_with(dilation, labels):
    """The operation, the sums of its masks weighted differently."""

    def tables(logits, bits, boxes, image_index):
        given = None if labels is None else labels.to(logits.device)
        return tritonaff.box_pairwise_terms(
            logits, bits, boxes, image_index, labels=given, dilation=dilation
        )

    def loss(count, log_loss):
        weight = 1 + torch.arange(len(count), device=count.device) / 7
        return (log_loss * weight.to(log_loss.dtype)).sum() / count.sum().clamp(min=1)

    return Case.of_tables("box_pairwise", tables, loss, largest_term=40.0)


def laid_out(tensor, layout):
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "strided":
        return torch.stack([tensor, tensor], dim=-1)[..., 0]
    if layout == "cropped":
        return F.pad(tensor, (1, 2, 2, 1))[..., 2:-1, 1:-2]
    return tensor


LAYOUTS = ["contiguous", "transposed", "strided", "cropped"]


@maker
def inputs(pick, dtypes):
    m, n = pick([1, 2, 5]), pick([1, 3])
    height, width = pick(range(1, 16)), pick([1, 2, 7, 16, 33, 70])
    torch.manual_seed(pick(range(2**16)))
    logits = pick([0.0, 1.0, 4.0, 15.0]) * torch.randn(m, height, width)
    logits = laid_out(logits.to(pick(dtypes)), pick(LAYOUTS))
    bits = laid_out(torch.randint(0, 256, (n, height, width), dtype=torch.uint8), pick(LAYOUTS))
    corners = torch.rand(m, 2, 2).sort(dim=1).values  # low and high, by axis
    if pick([False, True]):  # boxes that reach beyond the image
        corners = 3 * corners - 1
    boxes = (corners * torch.tensor([width, height])).flatten(1)
    labels = torch.rand(m, height, width) > 0.5 if pick([False, True]) else None
    case = case_with(pick([2, 1, 5, 2**40]), labels)
    return (logits, bits, boxes.to(torch.int64), torch.randint(0, n, (m,))), case


@given(inputs([torch.float32, torch.bfloat16, torch.float16, torch.float64]), rows=12)
def test_portable_matches_the_reference(values):
    tensors, case = values
    check_parity(case, "portable", *tensors)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=20)
def test_native_matches_the_reference(values):
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    tensors, case = values
    check_parity(case, "native", *tensors)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=10)
def test_triton_matches_the_reference(values):
    pytest.importorskip("triton", minversion="3.6")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors, case = values
    check_parity(case, "triton", *(x.to(device) for x in tensors))


@pytest.mark.parametrize("pixels", [16, 64])
def test_tiles_do_not_depend_on_their_blocks(device, pixels):
    """Blocks of less than a row, of several rows, at both ends of a box."""
    pytest.importorskip("triton", minversion="3.6")
    logits, _, _, _ = CASE.make_inputs((2, 2, 9, 21), device=device)
    bits = torch.randint(0, 256, (2, 9, 21), generator=torch.Generator().manual_seed(0)).byte()
    boxes = torch.tensor([[3, 2, 17, 3], [0, 0, 20, 8], [5, 4, 6, 7], [12, 3, 30, 5]])
    index = torch.tensor([1, 0, 0, 1])
    tensors = laid_out(logits, "transposed"), laid_out(bits, "cropped"), boxes, index
    with override(box_pairwise={"pixels": pixels}):
        check_parity(case_with(2, None), "triton", *(x.to(device) for x in tensors))


@pytest.mark.parametrize("block", [1, 300, 1000])
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block):
    """Blocks of one mask, of a few masks, the last one of fewer."""
    from tritonaff.portable import blocks

    tensors = CASE.make_inputs((2, 5, 11, 13))
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    check_parity(case_with(2, None), "portable", *tensors)


@pytest.mark.parametrize("dilation", [2, 60, 1300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_and_several_tasks(dilation, dtype):
    """Native kernels cut rows into segments, and masks into tasks."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 16, 2500).to(dtype)
    bits = torch.randint(0, 256, (2, 16, 2500), dtype=torch.uint8)
    boxes = torch.tensor([[3, 2, 2400, 14], [1020, 0, 1030, 9]])
    for layout in ("contiguous", "transposed"):
        tensors = laid_out(logits, layout), laid_out(bits, layout), boxes, torch.tensor([1, 0])
        check_parity(case_with(dilation, None), "native", *tensors)


def test_same_bits_every_time_on_any_number_of_threads(backend, device):
    tensors = CASE.make_inputs((1, 3, 40, 50), device=device)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(CASE, backend, *tensors))
    torch.set_num_threads(1)
    for name, value in results[0].items():
        assert all(torch.equal(result[name], value) for result in results)


def test_nothing_is_left_unwritten(backend, device, poisoned_memory):
    logits, bits, boxes, image_index = CASE.make_inputs((1, 4, 13, 35), device=device)
    boxes[0] = torch.tensor([9, 9, 2, 2])  # no pixel
    boxes[1] = torch.tensor([-9, -9, 99, 99])
    for layout in LAYOUTS[:2]:
        x = laid_out(logits, layout)
        results = evaluate(CASE, backend, x, bits, boxes, image_index)
        assert all(result.isfinite().all() for result in results.values())
        assert results["gradient"].stride() == x.stride()
        assert not results["gradient"][0].any()
        assert results["gradient"][1].any()


def test_logits_that_do_not_count_may_be_anything(backend, device):
    logits, bits, boxes, image_index = CASE.make_inputs((1, 1, 20, 35), device=device)
    boxes[0] = torch.tensor([10, 6, 20, 12])
    bits[:, 9, 15] = 0
    for k, (dy, dx) in enumerate(DIRECTIONS):  # a pixel in the box that is like no other
        bits[:, 9 - 2 * dy, 15 - 2 * dx] &= 255 - (1 << k)
    expected = evaluate(CASE, backend, logits, bits, boxes, image_index)
    counted = torch.zeros_like(logits, dtype=torch.bool)
    counted[:, 4:15, 8:23] = True  # two rows and columns more than the box
    counted[:, 9, 15] = False
    for anything in (math.nan, math.inf, -math.inf):
        x = logits.where(counted, anything)
        results = evaluate(CASE, backend, x, bits, boxes, image_index)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_a_logit_that_counts_and_is_no_number_shows(backend, device):
    logits, bits, boxes, image_index = CASE.make_inputs((1, 2, 20, 35), device=device)
    boxes[:] = torch.tensor([10, 6, 20, 12])
    bits[:] = 255
    logits[0, 7, 12] = math.nan
    results = evaluate(CASE, backend, logits, bits, boxes, image_index)
    assert results["log_loss"].isnan().tolist() == [True, False]
    assert results["gradient"][0, 7, 12].isnan()
    assert results["gradient"][0, 9, 14].isnan()
    assert not results["gradient"][1].isnan().any()


@pytest.mark.parametrize("size", [20.0, 1e4])
def test_extreme_logits_are_finite(backend, device, size):
    logits, *others = CASE.make_inputs((1, 2, 20, 20), device=device, confidence=0.0)
    results = evaluate(CASE, backend, size * logits.sign(), *others)
    assert all(result.isfinite().all() for result in results.values())
    assert results["loss"] > 0.1 * size


@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_gradient_is_about_as_exact_as_eager(backend, device, confidence, times_eager):
    logits, *others = CASE.make_inputs((1, 3, 45, 45), confidence=confidence, device=device)
    exact = evaluate(CASE, "reference", logits.double(), *others)["gradient"]
    eager = evaluate(CASE, "reference", logits, *others)["gradient"]
    ours = evaluate(CASE, backend, logits, *others)["gradient"]
    assert (ours - exact).norm() <= times_eager(backend) * (eager - exact).norm()


def test_opcheck(backend):
    logits, bits, _, image_index = CASE.make_inputs((2, 2, 5, 6))
    boxes = torch.tensor([[1, 0, 5, 4]]).repeat(4, 1)  # rows and columns in the image
    arguments = logits.requires_grad_(), bits, boxes, image_index, 2, backend
    opcheck(torch.ops.tritonaff.box_pairwise.default, arguments, backend)
    op = torch.ops.tritonaff.box_pairwise_backward.default
    opcheck(op, (torch.ones(4), logits.detach(), *arguments[1:]), backend)


@pytest.mark.parametrize("threshold", [None, 0.3])
def test_opcheck_of_the_similarity(threshold):
    images, valid = torch.rand(2, 3, 5, 6), torch.rand(2, 5, 6) > 0.5
    op = torch.ops.tritonaff.color_similarity.default
    opcheck(op, (images, valid, 2, "lab", threshold))


# --- The loss -----------------------------------------------------------------------------------


def boxinst_loss(logits, images, boxes, image_index, stride):
    """Eq. 7 by unfold, each mask with a copy of its image's similarity."""
    m, height, width = logits.shape
    lab = reference.lab_of_rgb(F.avg_pool2d(images.double(), stride))

    def neighbors(x):
        columns = F.unfold(x, 3, dilation=2, padding=2).view(*x.shape[:2], 9, *x.shape[2:])
        return torch.cat((columns[:, :, :4], columns[:, :, 5:]), dim=2)

    similarity = (-(lab[:, :, None] - neighbors(lab)).norm(dim=1) / 2).exp()
    similarity = similarity * neighbors(torch.ones_like(lab[:, :1]))[:, 0]
    full = torch.zeros(m, height * stride, width * stride)
    for mask, (left, top, right, bottom) in zip(full, boxes.tolist(), strict=True):
        mask[int(top) : int(bottom + 1), int(left) : int(right + 1)] = 1
    bitmask = full[:, stride // 2 :: stride, stride // 2 :: stride]
    log_p, log_q = F.logsigmoid(logits[:, None]), F.logsigmoid(-logits[:, None])
    log_same = torch.logaddexp(log_p + neighbors(log_p)[:, 0], log_q + neighbors(log_q)[:, 0])
    weight = (similarity[image_index] >= 0.3) * bitmask[:, None]
    return -(log_same * weight).sum() / weight.sum().clamp(min=1)


def test_the_loss_is_that_of_boxinst(any_backend, device):
    torch.manual_seed(0)
    images = torch.rand(2, 3, 1, 1) + 0.05 * torch.rand(2, 3, 48, 64)
    images /= images.max()
    logits = 2 * torch.randn(4, 1, 12, 16)
    boxes = torch.tensor([[2, 3, 39.5, 30.2], [0, 0, 63, 47], [9.5, 9, 40, 12], [33, 2, 34, 46]])
    image_index = torch.tensor([0, 1, 1, 0])
    expected = boxinst_loss(logits[:, 0].double(), images, boxes, image_index, 4)
    loss_fn = tritonaff.BoxPairwiseLoss(stride=4)
    logits, images, boxes, image_index = (
        x.to(device) for x in (logits, images, boxes, image_index)
    )
    with tritonaff.use_backend(any_backend):
        loss = loss_fn(logits, images, boxes, image_index)
        values = tritonaff.color_similarity(images, stride=4)
        bits = tritonaff.color_similarity(images, stride=4, threshold=0.3)
        for similarity in (values, bits):
            assert torch.equal(loss_fn(logits, similarity, boxes, image_index), loss)
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)


def test_reductions_and_warmup():
    logits, bits, boxes, image_index = CASE.make_inputs((2, 3, 20, 24))
    tensors = logits, bits, boxes, image_index
    terms = tritonaff.box_pairwise_terms(*tensors)
    loss = tritonaff.box_pairwise_loss(*tensors)
    total = tritonaff.box_pairwise_loss(*tensors, reduction="sum")
    each = tritonaff.box_pairwise_loss(*tensors, reduction="none")
    assert torch.equal(total, terms.log_loss.sum())
    torch.testing.assert_close(loss, total / terms.count.sum())
    torch.testing.assert_close(each, terms.log_loss / terms.count.clamp(min=1))
    for warmup in (0.25, torch.tensor(0.25)):
        torch.testing.assert_close(tritonaff.BoxPairwiseLoss()(*tensors, warmup=warmup), loss / 4)


@pytest.mark.parametrize("m", [0, 2])
def test_no_pair_is_0_with_a_zero_gradient(any_backend, device, m):
    logits = torch.randn(m, 5, 6, device=device, requires_grad=True)
    boxes = torch.tensor([[3, 3, 1, 1]], device=device).expand(m, 4)
    with tritonaff.use_backend(any_backend):
        bits = torch.full((1, 5, 6), 255, dtype=torch.uint8, device=device)
        loss = tritonaff.box_pairwise_loss(logits, bits, boxes)
        loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_a_mask_of_no_image_has_no_pairs(backend, device):
    """Where values may not be read, as under torch.compile."""
    from tritonaff.ops import box_pairwise as ops

    logits = torch.zeros(4, 9, 9, device=device)
    bits = torch.full((2, 9, 9), 255, dtype=torch.uint8, device=device)
    boxes = torch.tensor([[0, 0, 9, 9]], device=device).expand(4, 4)
    index = torch.tensor([0, -1, 1, 2], device=device)
    with tritonaff.use_backend(backend):
        _, count = ops.tables(logits, bits, boxes, index, None, 2)
    assert (count > 0).tolist() == [True, False, True, False]


def test_boxes_with_nan_are_empty():
    bits = torch.full((1, 5, 6), 255, dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0]]).repeat(4, 1)
    boxes.fill_diagonal_(math.nan)
    assert not tritonaff.box_pairwise_terms(torch.zeros(4, 5, 6), bits, boxes).count.any()


@pytest.mark.parametrize("stride", [1, 4])
def test_torch_compile_traces_the_loss(stride):
    logits, _, boxes, image_index = CASE.make_inputs((2, 2, 6, 8))
    images = torch.randint(0, 256, (2, 3, 6 * stride, 8 * stride), dtype=torch.uint8)
    loss_fn = tritonaff.BoxPairwiseLoss(stride=stride)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    with tritonaff.use_backend("portable"):
        for tensor, function in ((x, loss_fn), (y, compiled)):
            function(tensor, images, boxes, image_index, warmup=0.5).backward()
    assert torch.equal(x.grad, y.grad)


# --- Bad input ----------------------------------------------------------------------------------

LOGITS, BITS = torch.zeros(2, 4, 5), torch.zeros(1, 4, 5, dtype=torch.uint8)
BOX = torch.zeros(2, 4)
INDEX = torch.zeros(2, dtype=torch.int64)
BAD = {
    "logits type": ([1], BITS, BOX, {}, TypeError, "mask_logits must be a tensor, got list"),
    "logits dtype": (LOGITS.int(), BITS, BOX, {}, TypeError, "mask_logits must have dtype"),
    "logits shape": (LOGITS[0], BITS, BOX, {}, ValueError, r"shape \(M, H, W\), got \(4, 5\)"),
    "empty": (LOGITS[:, :0], BITS, BOX, {}, ValueError, "at least one row and column"),
    "similarity None": (LOGITS, None, BOX, {}, ValueError, "where there are no labels, got None"),
    "similarity dtype": (LOGITS, BITS.int(), BOX, {}, TypeError, "similarity must have dtype"),
    "similarity size": (LOGITS, BITS[:, 1:], BOX, {}, ValueError, r"values \(N, 8, H, W\), bits"),
    "bits as floats": (LOGITS, BITS.float(), BOX, {}, ValueError, r"got float32 \(1, 4, 5\)"),
    "images, stride": (
        LOGITS, torch.zeros(1, 3, 4, 5), BOX, {"stride": 2}, ValueError, "stride 2, got float32"
    ),
    "images normalised": (
        LOGITS, torch.full((1, 3, 4, 5), 2.0), BOX, {}, ValueError, r"in \[0, 1\], got 2 to 2"
    ),
    "boxes dtype": (LOGITS, BITS, BOX.short(), {}, TypeError, "boxes must have dtype"),
    "boxes shape": (LOGITS, BITS, BOX[:1], {}, ValueError, r"boxes must have shape \(2, 4\)"),
    "boxes device": (LOGITS, BITS, BOX.to("meta"), {}, ValueError, "one device, got cpu and meta"),
    "index missing": (LOGITS, BITS.expand(3, 4, 5), BOX, {}, ValueError, "given for 3 images"),
    "index dtype": (LOGITS, BITS, BOX, {"image_index": BOX[:, 0]}, TypeError, "image_index must"),
    "index shape": (LOGITS, BITS, BOX, {"image_index": INDEX[:1]}, ValueError, r"shape \(2,\)"),
    "index range": (LOGITS, BITS, BOX, {"image_index": INDEX - 1}, ValueError, r"\[0, 1\), got -1"),
    "labels": (LOGITS, None, BOX, {"labels": LOGITS[:1]}, ValueError, "labels must have shape"),
    "threshold": (LOGITS, BITS, BOX, {"threshold": 2}, ValueError, r"threshold must be in \[0, 1"),
    "dilation": (LOGITS, BITS, BOX, {"dilation": 0}, ValueError, "dilation must be at least 1"),
    "stride": (LOGITS, BITS, BOX, {"stride": 1.0}, TypeError, "stride must be an int, got float"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
@pytest.mark.parametrize(
    "function", [tritonaff.box_pairwise_terms, tritonaff.box_pairwise_loss], ids=["terms", "loss"]
)
def test_bad_input(function, bad):
    logits, similarity, boxes, options, error, message = bad
    with pytest.raises(error, match=message):
        function(logits, similarity, boxes, **options)


def test_bad_options():
    loss, tensors = tritonaff.box_pairwise_loss, (LOGITS, BITS, BOX)
    with pytest.raises(ValueError, match=r"warmup must be in \[0, 1\], got 2"):
        loss(*tensors, warmup=2)
    with pytest.raises(ValueError, match=r"reduction must be one of .* got 'all'"):
        loss(*tensors, reduction="all")
    with pytest.raises(TypeError, match="process_group must be None or"):
        tritonaff.BoxPairwiseLoss(process_group=3)
    with pytest.raises(ValueError, match="stride must be at most"):
        tritonaff.color_similarity(torch.zeros(1, 3, 4, 5), stride=5)
    with pytest.raises(ValueError, match="three channels, R, G, B, got 1"):
        tritonaff.color_similarity(torch.zeros(1, 1, 4, 5))
    with pytest.raises(ValueError, match="color_space must be one of"):
        tritonaff.color_similarity(torch.zeros(1, 3, 4, 5), color_space="hsv")
    with pytest.raises(ValueError, match=r"valid must have shape \(1, 4, 5\)"):
        tritonaff.color_similarity(torch.zeros(1, 3, 4, 5), valid=torch.ones(1, 4, 4))


def test_the_module_says_what_it_is():
    assert repr(tritonaff.BoxPairwiseLoss()) == (
        "BoxPairwiseLoss(threshold=0.3, dilation=2, stride=1, reduction='mean')"
    )
