"""Instance affinities: every implementation against the float64 reference, the reference against
the definition, the losses against other projects' formulas.
"""

import itertools
import math

import pytest
import torch
from inputs import given, maker
from torch.nn import functional as F

import tritonaff
from tritonaff.functional import InstanceAffinityTerms
from tritonaff.kernels.blocks import override
from tritonaff.native.library import find_compiler
from tritonaff.testing import CASES, INSTANCE_OFFSETS, Case, check_parity, evaluate

CASE = CASES["instance_affinity"]
IMAGE_OFFSETS = ((0, 1), (-1, 0), (2, -1), (-3, -2), (0, 50))
VOLUME_OFFSETS = ((0, 0, 1), (-1, 0, 0), (1, -2, 1), (-1, 1, 3), (0, -9, 0), (7, 0, 0))


# --- The reference against the definition, voxel by voxel ---------------------------------------


def by_definition(logits, ids, offsets, background, ignore_index, anchor, gamma, invert):
    """Targets and terms, as loops over images, voxels and channels."""
    n, *size = ids.shape
    targets = torch.full((n, len(offsets), *size), 255, dtype=torch.uint8)
    count = torch.zeros(n, len(offsets), 2, dtype=torch.int64)
    sums = torch.zeros(4, n, len(offsets), 2, dtype=torch.float64)
    for b, (k, offset), x in itertools.product(
        range(n), enumerate(offsets), itertools.product(*map(range, size))
    ):
        sign = 1 if anchor == "source" else -1
        y = tuple(place + sign * step for place, step in zip(x, offset, strict=True))
        if not all(0 <= place < length for place, length in zip(y, size, strict=True)):
            continue
        a, c = int(ids[(b, *x)]), int(ids[(b, *y)])
        if ignore_index is not None and ignore_index in (a, c):
            continue
        t = int(a == c and (background is None or a != background))
        channels_own = 1 - t if invert else t
        targets[(b, k, *x)] = channels_own
        p = 1 / (1 + math.exp(-float(logits[(b, k, *x)])))
        pt = p if channels_own == 1 else 1 - p
        terms = -math.log(pt), p, p * p, -((1 - pt) ** gamma) * math.log(pt)
        count[b, k, t] += 1
        for table, term in zip(sums, terms, strict=True):
            table[b, k, t] += term
    return targets, InstanceAffinityTerms(count, *sums)


@pytest.mark.parametrize("anchor", ["source", "destination"])
@pytest.mark.parametrize("background", [0, None, 2])
@pytest.mark.parametrize("ignore_index", [None, 1])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 2, 3, 4), (1, 1, 1)], ids=str)
def test_reference_is_the_definition(anchor, background, ignore_index, invert, shape):
    torch.manual_seed(0)
    offsets = (VOLUME_OFFSETS if len(shape) == 4 else IMAGE_OFFSETS)[:4]
    ids = torch.randint(0, 4, shape)
    logits = 3 * torch.randn(shape[0], 4, *shape[1:], dtype=torch.float64)
    options = {"background": background, "ignore_index": ignore_index, "anchor": anchor}
    gamma = 1.5
    targets, expected = by_definition(logits, ids, offsets, **options, gamma=gamma, invert=invert)
    for backend in ("reference", "portable"):
        with tritonaff.use_backend(backend):
            target = tritonaff.instance_affinity_target(ids, offsets, **options, invert=invert)
            terms = tritonaff.instance_affinity_terms(
                logits, ids, offsets, **options, gamma=gamma, invert=invert
            )
        assert torch.equal(target, targets)
        for result, value in zip(terms, expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("ignore", [None, 3])
def test_targets_are_those_of_bioimage_cpp(dimensions, ignore):
    """Its sources are affogato's, which torch-em and the mutex watershed go by."""
    affinities = pytest.importorskip("bioimage_cpp.affinities")
    offsets = INSTANCE_OFFSETS[dimensions]
    torch.manual_seed(0)
    ids = torch.randint(0, 5, (2, 4, 30, 35)[: 1 + dimensions])
    ids = ids.repeat_interleave(3, -1).repeat_interleave(2, -2)
    target = tritonaff.instance_affinity_target(ids, offsets, background=None, ignore_index=ignore)
    for volume, result in zip(ids, target, strict=True):
        same, counted = affinities.compute_affinities(volume.numpy(), offsets, ignore_label=ignore)
        assert torch.equal(result != 255, torch.from_numpy(counted).bool())
        assert torch.equal(result == 1, torch.from_numpy(same * counted).bool())


def test_anchors_are_negated_offsets(any_backend, device):
    logits, ids = CASE.make_inputs((2, 12, 20, 30), device=device)
    offsets, logits = INSTANCE_OFFSETS[2][2:6], logits[:, 2:6]
    negated = [tuple(-step for step in offset) for offset in offsets]
    with tritonaff.use_backend(any_backend):
        ours = tritonaff.instance_affinity_terms(logits, ids, offsets, anchor="destination")
        expected = tritonaff.instance_affinity_terms(logits, ids, negated)
    assert all(map(torch.equal, ours, expected))


# --- Every implementation against the reference -------------------------------------------------


def case_with(offsets, **options):
    """The operation with these options, its sums weighted differently by image, channel, target."""

    def tables(logits, ids):
        return tritonaff.instance_affinity_terms(logits, ids, offsets, **options)

    def loss(count, *sums):
        total = 0.0
        for i, table in enumerate(sums):
            weight = 1 + torch.arange(table.numel(), device=table.device).view_as(table) / 7
            total = total + (table * weight.to(table.dtype)).sum() / (i + 1)
        return total / count.sum().clamp(min=1)

    return Case.of_tables("instance_affinity", tables, loss, largest_term=40.0)


LAYOUTS = ["contiguous", "channels_last", "strided", "cropped"]
ID_DTYPES = [
    torch.int64, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack([tensor, -tensor], dim=-1)[..., 0]
    if layout == "cropped":
        return F.pad(tensor, (1, 2, 2, 1))[..., 2:-1, 1:-2]
    return tensor


@maker
def inputs(pick, dtypes):
    depth = pick([None, 1, 2, 5])
    n, height, width = pick([1, 2]), pick(range(1, 13)), pick([1, 3, 8, 17, 36, 67])
    torch.manual_seed(pick(range(2**16)))
    size = (height, width) if depth is None else (depth, height, width)
    known = IMAGE_OFFSETS if depth is None else VOLUME_OFFSETS
    first = pick([0, 1, 2])
    offsets = known[first : first + pick([1, 2, 4])]
    dtype = pick(ID_DTYPES)
    ids = torch.randint(0, 2 if dtype == torch.bool else 4, (n, *size))
    if dtype in (torch.int64, torch.uint64):  # equal as float64, and in their lower 32 bits
        ids = ids + 2**60 if pick([True, False]) else (ids - 1) * 2**32
    ids = ids.to(dtype)
    number = int(ids.flatten()[0].item())  # some id of the image
    background = pick([0, None, number, 300])
    ignore_index = pick([None, int(ids.flatten()[-1].item()), -1])
    if pick(["contiguous", "transposed"]) == "transposed":
        ids = ids.mT.contiguous().mT
    scale, confidence = pick([0.0, 1.0, 4.0, 15.0]), pick([0.0, 9.0])
    target = tritonaff.instance_affinity_target(ids, offsets, background=background)
    logits = scale * torch.randn(target.shape) + confidence * (target.clamp(max=1).float() - 0.5)
    logits = laid_out(logits.to(pick(dtypes)), pick(LAYOUTS))
    options = {
        "background": background,
        "ignore_index": ignore_index,
        "anchor": pick(["source", "destination"]),
        "invert": pick([False, True]),
        "gamma": pick([2.0, 0.0, 0.5, 1.0]),
    }
    return logits, ids, case_with(offsets, **options)


@given(inputs([torch.float32, torch.bfloat16, torch.float16, torch.float64]), rows=16)
def test_portable_matches_the_reference(values):
    logits, ids, case = values
    check_parity(case, "portable", logits, ids)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=24)
def test_native_matches_the_reference(values):
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    logits, ids, case = values
    check_parity(case, "native", logits, ids)


@given(inputs([torch.float32, torch.bfloat16, torch.float16]), rows=12)
def test_triton_matches_the_reference(values):
    pytest.importorskip("triton", minversion="3.6")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits, ids, case = values
    check_parity(case, "triton", logits.to(device), ids.to(device))


@pytest.mark.parametrize("shape", [(2, 12, 40, 45), (1, 12, 4, 30, 33)], ids=str)
@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_larger_images(backend, device, shape, confidence):
    check_parity(CASE, backend, *CASE.make_inputs(shape, device=device, confidence=confidence))


@given(inputs([torch.float64]), rows=16)
def test_counts_match_the_targets(values):
    _, ids, _ = values
    offsets = VOLUME_OFFSETS if ids.dim() == 4 else IMAGE_OFFSETS
    for backend in ("portable", "reference"):
        with tritonaff.use_backend(backend):
            target = tritonaff.instance_affinity_target(ids, offsets)
            counts = tritonaff.InstanceAffinityLoss(offsets).normalizer(ids)
        axes = [0, *range(2, target.dim())]
        expected = torch.stack([(target == t).sum(dim=axes) for t in (0, 1)], dim=-1)
        assert torch.equal(counts, expected)


@pytest.mark.parametrize("block", [1, 40, 300])
def test_portable_does_not_depend_on_its_blocks(monkeypatch, block):
    """Blocks of one row, of some rows, of some planes, of one image."""
    from tritonaff.portable import blocks

    values = [CASE.make_inputs((3, 12, *size)) for size in ((11, 9), (4, 10, 6))]
    monkeypatch.setattr(blocks, "CPU_BLOCK", block)
    for logits, ids in values:
        offsets = VOLUME_OFFSETS if ids.dim() == 4 else IMAGE_OFFSETS
        case = case_with(offsets, ignore_index=255)
        check_parity(case, "portable", logits[:, : len(offsets)], ids)
        target = tritonaff.instance_affinity_target(ids, offsets)
        with tritonaff.use_backend("reference"):
            assert torch.equal(target, tritonaff.instance_affinity_target(ids, offsets))


@pytest.mark.parametrize("min_programs", [1, 4, 1000])
def test_tiles_do_not_depend_on_their_blocks(device, min_programs):
    """All blocks of a volume in one program, in a few programs, in one program each."""
    pytest.importorskip("triton", minversion="3.6")
    blocks = {"voxels": 32, "tables_voxels": 32, "min_programs": min_programs}
    torch.manual_seed(0)
    with override(instance_affinity=blocks):
        for size in ((3, 5, 9), (1, 4, 35)):
            ids = torch.randint(0, 3, (2, *size), device=device)
            logits = 3 * torch.randn(2, 3, *size, device=device)
            case = case_with([(0, -2, 1), (1, 0, -3), (0, 3, 0)], ignore_index=2)
            check_parity(case, "triton", logits, ids)


def test_nothing_is_left_unwritten(backend, device, poisoned_memory):
    for shape, memory_format in (
        ((2, 12, 13, 35), torch.contiguous_format),
        ((2, 12, 13, 35), torch.channels_last),
        ((2, 12, 3, 13, 35), torch.contiguous_format),
        ((2, 12, 3, 13, 35), torch.channels_last_3d),
    ):
        logits, ids = CASE.make_inputs(shape, device=device)
        ids[0] = 255
        logits = logits.contiguous(memory_format=memory_format)
        results = evaluate(CASE, backend, logits, ids)
        assert all(result.isfinite().all() for result in results.values())
        assert results["gradient"].stride() == logits.stride()
        assert not results["gradient"][0].any()


def test_logits_that_do_not_count_may_be_anything(backend, device):
    logits, ids = CASE.make_inputs((1, 12, 20, 35), device=device)
    ids[0, 5:9, 11:30] = 255
    expected = evaluate(CASE, backend, logits, ids)
    target = tritonaff.instance_affinity_target(ids, INSTANCE_OFFSETS[2], ignore_index=255)
    for anything in (math.nan, math.inf, -math.inf):
        results = evaluate(CASE, backend, logits.masked_fill(target == 255, anything), ids)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


def test_a_logit_that_counts_and_is_no_number_shows(backend, device):
    logits, ids = CASE.make_inputs((1, 12, 20, 35), device=device)
    ids[:] = 3
    logits[0, 4, 12, 20] = math.nan
    results = evaluate(CASE, backend, logits, ids)
    assert all(results[name][0, 4, 1].isnan() for name in InstanceAffinityTerms._fields[1:])
    assert not results["log_loss"][0, 3].isnan().any()
    assert results["loss"].isnan()
    assert results["gradient"][0, 4, 12, 20].isnan()


@pytest.mark.parametrize("shape", [(2, 12, 30, 40), (2, 12, 5, 17, 33)], ids=str)
def test_same_bits_every_time(backend, device, shape):
    values = CASE.make_inputs(shape, device=device)
    first = evaluate(CASE, backend, *values)
    second = evaluate(CASE, backend, *values)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(1, 2, 3, 2, 2100), (2, 2, 3, 90, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows_and_several_tasks(shape, dtype):
    """Native kernels cut rows into segments, and images into tasks."""
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    torch.manual_seed(0)
    ids = torch.randint(0, 3, (shape[0], *shape[2:]))
    logits = 3 * torch.randn(shape).to(dtype)
    for layout in ("contiguous", "channels_last"):
        case = case_with([(0, -1, 1050), (1, 0, -3)], ignore_index=2)
        check_parity(case, "native", laid_out(logits, layout), ids)


def test_same_bits_on_any_number_of_threads():
    if find_compiler() is None:
        pytest.skip("no C++ compiler")
    values = CASE.make_inputs((2, 12, 9, 60, 70))
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(evaluate(CASE, "native", *values))
    torch.set_num_threads(1)
    for name, value in results[0].items():
        assert all(torch.equal(result[name], value) for result in results)


@pytest.mark.parametrize("confidence", [0.0, 9.0])
def test_gradient_is_about_as_exact_as_eager(backend, device, confidence, times_eager):
    logits, ids = CASE.make_inputs((1, 12, 45, 45), confidence=confidence, device=device)
    exact = evaluate(CASE, "reference", logits.double(), ids)["gradient"]
    eager = evaluate(CASE, "reference", logits, ids)["gradient"]
    ours = evaluate(CASE, backend, logits, ids)["gradient"]
    assert (ours - exact).norm() <= times_eager(backend) * (eager - exact).norm()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_extreme_logits_are_finite(backend, device, gamma, dtype):
    logits, ids = CASE.make_inputs((1, 12, 20, 20), device=device, confidence=0.0)
    logits = (1e4 * logits.sign()).to(dtype)
    case = case_with(INSTANCE_OFFSETS[2], gamma=gamma, ignore_index=255)
    results = evaluate(case, backend, logits, ids)
    assert all(result.isfinite().all() for result in results.values())
    check_parity(case, backend, logits, ids)


def test_steps_beyond_any_image(backend, device):
    """Nothing counts; the other channels do not notice."""
    logits, ids = CASE.make_inputs((1, 12, 9, 11), device=device)
    far = 2**63 - 1
    offsets = [(0, far), (0, 1), (-far, 0), (2**31, 0), (0, -(2**32))]
    with tritonaff.use_backend(backend):
        terms = tritonaff.instance_affinity_terms(logits[:, :5], ids, offsets)
        expected = tritonaff.instance_affinity_terms(logits[:, 1:2], ids, [(0, 1)])
    for table, value in zip(terms, expected, strict=True):
        assert not table[:, [0, 2, 3, 4]].any()
        torch.testing.assert_close(table[:, 1:2], value)


def test_no_images(backend, device):
    logits = torch.zeros(0, 2, 4, 5, device=device, requires_grad=True)
    ids = torch.zeros(0, 4, 5, dtype=torch.long, device=device)
    with tritonaff.use_backend(backend):
        loss = tritonaff.instance_affinity_loss(logits, ids, [(0, 1), (1, 0)], loss="dice")
    loss.backward()
    assert loss == 0
    assert logits.grad.shape == logits.shape


# --- Derivatives and the compiler ---------------------------------------------------------------

LOSSES = ["bce", "dice", "mse", "focal", {"bce": 0.5, "dice": 2.0, "mse": 1.0, "focal": 3.0}]


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("loss", LOSSES, ids=str)
@pytest.mark.parametrize("invert", [False, True])
def test_gradcheck(backend, loss, invert):
    torch.manual_seed(0)
    logits = torch.randn(2, 2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(0, 3, (2, 2, 3, 4))

    def loss_of(logits):
        return tritonaff.instance_affinity_loss(
            logits, ids, [(0, 0, 1), (1, -1, 0)], loss=loss, invert=invert,
            balance="inverse", ignore_index=2, gamma=1.5,
        )  # fmt: skip

    with tritonaff.use_backend(backend):
        assert torch.autograd.gradcheck(loss_of, logits)


@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_tables_that_no_loss_uses_do_not_matter(backend, device, loss):
    """An implementation computes only the sums that are asked for."""
    logits, ids = CASE.make_inputs((2, 12, 20, 33), device=device)
    logits.requires_grad_()
    results = []
    for name in (backend, "reference"):
        with tritonaff.use_backend(name):
            value = tritonaff.instance_affinity_loss(logits, ids, INSTANCE_OFFSETS[2], loss=loss)
        results.append((value, *torch.autograd.grad(value, logits)))
    for result, expected in zip(*results, strict=True):
        torch.testing.assert_close(result, expected, rtol=2e-5, atol=1e-8)


def test_a_second_derivative_is_refused():
    logits, ids = CASE.make_inputs((1, 12, 9, 9))
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(CASE.loss(logits, ids), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="instance_affinity_backward"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(2, 2, 1, 9, 11), (2, 2, 3, 5, 7)], ids=str)
def test_opcheck(backend, device, shape):
    torch.manual_seed(0)
    logits = torch.randn(shape, device=device, requires_grad=True)
    ids = torch.randint(0, 3, (shape[0], *shape[2:]), device=device)
    pairs = [0, 0, 1, 1, -1, 0], 0, None
    settings = *pairs, False, 2.0, True, True, backend
    op = torch.ops.tritonaff.instance_affinity.default
    torch.library.opcheck(op, (logits, ids, *settings))
    assert [out.requires_grad for out in op(logits, ids, *settings)] == 4 * [True] + [False]
    coefficients = torch.rand(2, 2, 2, 4, device=device)
    torch.library.opcheck(
        torch.ops.tritonaff.instance_affinity_backward.default,
        (coefficients, logits.detach(), ids, *settings),
    )


@pytest.mark.parametrize("name", ["instance_pair_counts", "instance_affinity_target"])
def test_opcheck_of_ids_alone(name, device):
    ids = torch.randint(0, 3, (2, 3, 4, 5), device=device)
    op = getattr(torch.ops.tritonaff, name).default
    torch.library.opcheck(op, (ids, [0, 0, 1, 1, -1, 0], 0, 2))


def test_one_graph_serves_every_size(backend, device):
    torch._dynamo.reset()
    offsets = [(0, 1), (-2, 1), (3, 0)]
    loss_fn = tritonaff.InstanceAffinityLoss(
        offsets, loss={"bce": 1.0, "dice": 1.0}, balance="clipped", ignore_index=2
    )

    def step(logits, ids):
        return loss_fn(2 * logits, ids), tritonaff.instance_affinity_target(ids, offsets)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((2, 8, 9), (3, 7, 11), (4, 2, 5)):
        torch.manual_seed(0)
        logits = torch.randn(shape[0], 3, *shape[1:], device=device, requires_grad=True)
        ids = torch.randint(0, 3, shape, device=device)
        with tritonaff.use_backend(backend):
            loss, target = compiled(logits, ids)
            (gradient,) = torch.autograd.grad(loss, logits)
            expected, expected_target = step(logits, ids)
            (expected_gradient,) = torch.autograd.grad(expected, logits)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient, expected_gradient)
        assert torch.equal(target, expected_target)


def test_meta_tensors_have_the_right_shapes():
    logits = torch.empty(2, 3, 4, 8, 9, device="meta", requires_grad=True)
    ids = torch.empty(2, 4, 8, 9, dtype=torch.uint16, device="meta")
    offsets = tritonaff.instance_offsets("nearest_3d")
    terms = tritonaff.instance_affinity_terms(logits, ids, offsets)
    assert [tuple(table.shape) for table in terms] == [(2, 3, 2)] * 5
    assert tritonaff.instance_affinity_loss(logits, ids, offsets).shape == ()


# --- Losses ---------------------------------------------------------------------------------------


@maker
def drawn(pick):
    """Logits and ids in float64, the targets of the logits, and the pairs that count."""
    torch.manual_seed(pick(range(2**16)))
    size = pick([(13, 14), (4, 11, 12)])
    offsets = INSTANCE_OFFSETS[len(size)][:5]
    ids = torch.randint(0, pick([2, 5]), (2, *size))
    ids = ids[..., : size[-1] // 3 + 1].repeat_interleave(3, -1)[..., : size[-1]]
    logits = 2 * torch.randn(2, 5, *size, dtype=torch.float64)
    background, ignore_index = pick([0, None]), pick([None, 1])
    options = {"background": background, "ignore_index": ignore_index}
    target = tritonaff.instance_affinity_target(ids, offsets, **options)
    counted = target != 255
    return logits, ids, offsets, options, (target == 1).double(), counted


def by_channel(values):
    """(K, all voxels), as torch-em's flatten_samples."""
    return values.transpose(0, 1).flatten(1)


@given(drawn())
def test_dice_is_torch_ems(values):
    """torch_em.loss.DiceLoss of masked affinities, where 1 is a boundary."""
    logits, ids, offsets, options, same, counted = values
    p, boundary = by_channel(logits.sigmoid() * counted), by_channel((1 - same) * counted)
    numerator, denominator = (p * boundary).sum(-1), (p * p).sum(-1) + (boundary**2).sum(-1)
    scores = 2 * (numerator / denominator.clamp(min=1e-7))
    some = by_channel(counted).any(-1)  # ours is 0 where nothing counts, torch-em's 1
    result = tritonaff.instance_affinity_loss(
        logits, ids, offsets, **options, loss="dice", invert=True, channels="sum"
    )
    torch.testing.assert_close(result, ((1 - scores) * some).sum())
    pooled = tritonaff.instance_affinity_loss(
        logits, ids, offsets, **options, loss="dice", invert=True, channels="pooled"
    )
    score = 2 * numerator.sum() / denominator.sum().clamp(min=1e-7)
    torch.testing.assert_close(pooled, (1 - score) * some.any())


@given(drawn())
def test_dice_of_affinities(values):
    logits, ids, offsets, options, same, counted = values
    p, y = by_channel(logits.sigmoid() * counted), by_channel(same * counted)
    scores = 2 * (p * y).sum(-1) / ((p * p).sum(-1) + y.sum(-1)).clamp(min=1e-7)
    some = by_channel(counted).any(-1)
    result = tritonaff.instance_affinity_loss(logits, ids, offsets, **options, loss="dice")
    torch.testing.assert_close(result, ((1 - scores) * some).mean())


@given(drawn())
def test_mse_is_bootstrappers(values):
    """WeightedMSELoss of LSD and bootstrapper, with the scale of gunpowder's BalanceLabels."""
    logits, ids, offsets, options, same, counted = values
    scale = counted.double()
    for image, mask, target in zip(scale, counted, same, strict=True):
        positive = target[mask].sum() / mask.sum().clamp(min=1)
        for value, fraction in ((0, 1 - positive), (1, positive)):
            image[mask & (target == value)] *= 1 / (2 * fraction.clamp(0.05, 0.95))
    errors = scale * (logits.sigmoid() - same) ** 2
    result = tritonaff.instance_affinity_loss(
        logits, ids, offsets, **options, loss="mse", balance="clipped", channels="pooled"
    )
    torch.testing.assert_close(result, errors[scale > 0].mean())


def channel_means(losses, counted):
    pairs = map(by_channel, (losses, counted))
    return torch.stack([x[c].sum() / c.sum().clamp(min=1) for x, c in zip(*pairs, strict=True)])


@given(drawn())
def test_bce_is_pytcs(values):
    """The positive weight is the ratio of a channel's targets, at most 10."""
    logits, ids, offsets, options, same, counted = values
    weights = []
    for target, mask in zip(*map(by_channel, (same, counted)), strict=True):
        positive, negative = target[mask].sum(), (1 - target[mask]).sum()
        weights.append(min(float(negative / positive), 10.0) if positive else 1.0)
    weight = torch.tensor(weights, dtype=torch.float64).view(-1, *(1 for _ in ids.shape[1:]))
    losses = F.binary_cross_entropy_with_logits(logits, same, pos_weight=weight, reduction="none")
    result = tritonaff.instance_affinity_loss(logits, ids, offsets, **options, balance="positive")
    torch.testing.assert_close(result, channel_means(losses, counted).mean())


@given(drawn())
def test_inverse_balance(values):
    """Each target's cross-entropy over its own pairs, halved, channel by channel."""
    logits, ids, offsets, options, same, counted = values
    losses = F.binary_cross_entropy_with_logits(logits, same, reduction="none")
    total = 0.0
    for loss, target, mask in zip(*map(by_channel, (losses, same, counted)), strict=True):
        for value in (0, 1):
            chosen = mask & (target == value)
            total = total + 0.5 * loss[chosen].sum() / chosen.sum().clamp(min=1)
    result = tritonaff.instance_affinity_loss(logits, ids, offsets, **options, balance="inverse")
    torch.testing.assert_close(result, total / len(offsets))


@given(drawn())
def test_plain_losses(values):
    logits, ids, offsets, options, same, counted = values
    bce = F.binary_cross_entropy_with_logits(logits, same, reduction="none")
    miss = (logits.sigmoid() - same).abs()
    for name, losses in (("bce", bce), ("mse", miss**2), ("focal", miss**1.5 * bce)):
        for channels, expected in (
            ("mean", channel_means(losses, counted).mean()),
            ("sum", channel_means(losses, counted).sum()),
            ("pooled", losses[counted].mean()),
        ):
            result = tritonaff.instance_affinity_loss(
                logits, ids, offsets, **options, loss=name, gamma=1.5, channels=channels
            )
            torch.testing.assert_close(result, expected)


OPTIONS = [
    {"loss": loss, "balance": balance, "channels": channels, "invert": invert}
    for loss, balance, channels, invert in zip(
        itertools.cycle(LOSSES),
        itertools.cycle(["none", "inverse", "clipped", "positive"]),
        itertools.cycle(["mean", "pooled", "sum"]),
        [False, True, False, True, True, False] * 4,
        strict=False,
    )
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_inverted_channels_are_negated_logits(options):
    """Except for Dice and the positive weight, which take the side of the channels' own ones."""
    logits, ids = CASE.make_inputs((2, 12, 13, 14), torch.float64)
    one_sided = "dice" in options["loss"] or options["balance"] == "positive"

    def loss(logits, invert):
        chosen = {**options, "invert": invert}
        return tritonaff.instance_affinity_loss(logits, ids, INSTANCE_OFFSETS[2], **chosen)

    assert torch.allclose(loss(logits, True), loss(-logits, False)) != one_sided


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_losses_of_images(options):
    """reduction="none" is the loss of each image."""
    logits, ids = CASE.make_inputs((3, 12, 13, 14), torch.float64)
    ids[1] = 255
    options = {**options, "ignore_index": 255}
    losses = tritonaff.instance_affinity_loss(
        logits, ids, INSTANCE_OFFSETS[2], **options, reduction="none"
    )
    for i, loss in enumerate(losses):
        image = slice(i, i + 1)
        expected = tritonaff.instance_affinity_loss(
            logits[image], ids[image], INSTANCE_OFFSETS[2], **options
        )
        torch.testing.assert_close(loss, expected)
    assert losses[1] == 0


@pytest.mark.parametrize("options", [x for x in OPTIONS if "dice" not in x["loss"]], ids=str)
def test_parts_of_a_batch_add_up(options):
    """With the normalizer of all parts, for all losses that are sums over images."""
    if options["balance"] == "positive":
        options = {**options, "balance": "none"}
    logits, ids = CASE.make_inputs((4, 12, 13, 14), torch.float64)
    loss_fn = tritonaff.InstanceAffinityLoss(INSTANCE_OFFSETS[2], **options, ignore_index=255)
    normalizer = loss_fn.normalizer(ids[:1]) + loss_fn.normalizer(ids[1:])
    parts = loss_fn(logits[:1], ids[:1], normalizer) + loss_fn(logits[1:], ids[1:], normalizer)
    torch.testing.assert_close(parts, loss_fn(logits, ids))


def test_a_channel_in_which_nothing_counts_is_0(backend, device):
    logits, ids = CASE.make_inputs((1, 12, 9, 9), device=device)
    logits = logits[:, :2].contiguous().requires_grad_()
    for loss in LOSSES:
        with tritonaff.use_backend(backend):
            value = tritonaff.instance_affinity_loss(
                logits, ids, [(0, 1), (0, 20)], loss=loss, channels="sum"
            )
            expected = tritonaff.instance_affinity_loss(logits[:, :1], ids, [(0, 1)], loss=loss)
        (gradient,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(value, expected)
        assert not gradient[:, 1].any()


@pytest.mark.parametrize("dtype", ID_DTYPES, ids=str)
def test_numbers_that_are_no_ids_of_the_dtype(any_backend, device, dtype):
    """-1 is no uint16 and must not wrap around to 65535."""
    largest = 1 if dtype == torch.bool else torch.iinfo(dtype).max
    ids = torch.full((1, 4, 5), largest, dtype=dtype, device=device)
    logits = torch.zeros(1, 1, 4, 5, device=device)

    def count(**options):
        with tritonaff.use_backend(any_backend):
            terms = tritonaff.instance_affinity_terms(logits, ids, [(0, 1)], **options)
        return terms.count.flatten().tolist()

    bits = 1 if dtype == torch.bool else torch.iinfo(dtype).bits
    wrapped = -1 if dtype == torch.int64 else largest - (1 << bits)
    assert count(background=wrapped, ignore_index=wrapped) == [0, 16]
    assert count(background=largest) == [16, 0]
    assert count(ignore_index=largest) == [0, 0]


@pytest.mark.parametrize(("name", "number"), [("nearest_2d", 2), ("nearest_3d", 3)])
def test_nearest_offsets(name, number):
    offsets = tritonaff.instance_offsets(name)
    assert [offset.index(-1) for offset in offsets] == list(range(number))


def test_offsets_of_the_mutex_watershed():
    images, volumes = map(tritonaff.instance_offsets, ("mutex_watershed_2d", "mutex_watershed_3d"))
    assert (len(images), len(volumes)) == (12, 17)
    assert len(set(images)) == 12
    assert volumes[7:] == tuple((0, *offset) for offset in images[2:])
    with pytest.raises(ValueError, match=r"name must be one of .*nearest_2d.* got 'mws'"):
        tritonaff.instance_offsets("mws")


# --- Bad input ------------------------------------------------------------------------------------

LOGITS, IDS = torch.zeros(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.long)
BAD_TENSORS = {
    "logits no tensor": ([[0.0]], IDS, TypeError, "logits must be a tensor, got list"),
    "logits integer": (LOGITS.long(), IDS, TypeError, "logits must have dtype .*int64"),
    "logits rank": (LOGITS[0], IDS, ValueError, r"logits must have shape \(N, K, H, W\), got"),
    "logits channels": (
        LOGITS.repeat(1, 2, 1, 1),
        IDS,
        ValueError,
        r"\(N, K, H, W\) = \(2, 1, 4, 5\) of K = 1 offsets and ids \(2, 4, 5\), got \(2, 2, 4, 5\)",
    ),
    "ids floating": (LOGITS, IDS.float(), TypeError, "ids must have dtype .* float32"),
    "ids rank": (LOGITS, IDS[0], ValueError, r"ids must have shape \(N, H, W\)"),
    "ids volumes": (LOGITS, IDS[:, None].expand(-1, 2, -1, -1), ValueError, r"shape \(N, H, W\)"),
    "ids size": (LOGITS, IDS[:, :3], ValueError, r"logits must have the shape .*\(2, 1, 3, 5\)"),
    "empty": (LOGITS[..., :0], IDS[..., :0], ValueError, "ids must have at least one voxel"),
    "devices": (LOGITS, IDS.to("meta"), ValueError, "one device, got cpu and meta"),
}
BAD_PAIRS = {
    "offsets": ({"offsets": 1}, TypeError, "offsets must be a sequence of pairs or triples"),
    "offsets flat": ({"offsets": (1.0, 0)}, TypeError, "an offset's steps must be a sequence"),
    "offsets float": ({"offsets": [(0.5, 0)]}, TypeError, "an offset's steps must be an int"),
    "offsets empty": ({"offsets": []}, ValueError, "offsets must be pairs .* at least one"),
    "offsets zero": ({"offsets": [(0, 1), (0, 0)]}, ValueError, "none of them 0"),
    "offsets mixed": ({"offsets": [(0, 1), (0, 0, 1)]}, ValueError, "all of one length"),
    "offsets long": ({"offsets": [(0, 0, 0, 1)]}, ValueError, "all of one length"),
    "background": ({"background": 0.5}, TypeError, "background must be an int or None, got float"),
    "ignore_index": ({"ignore_index": 2**64}, ValueError, "ignore_index must fit 64 bits"),
    "anchor": ({"anchor": "middle"}, ValueError, "anchor must be one of .* got 'middle'"),
    "invert": ({"invert": 1}, TypeError, "invert must be a bool, got int"),
}
BAD_LOSSES = {
    **BAD_PAIRS,
    "gamma": ({"gamma": -1}, ValueError, r"gamma must be in \[0, inf\), got -1"),
    "loss": ({"loss": "ce"}, ValueError, "loss must be one of .* got 'ce'"),
    "loss of several": ({"loss": {"bce": 1, "ce": 1}}, ValueError, "loss must be one of"),
    "loss of none": ({"loss": {}}, ValueError, "loss must name distinct losses, at least one"),
    "loss type": ({"loss": 3}, TypeError, "loss must be a sequence of str, a mapping"),
    "loss weight": ({"loss": {"bce": -1}}, ValueError, r"the weight of 'bce' must be in \[0"),
    "balance": ({"balance": "all"}, ValueError, "balance must be one of .* got 'all'"),
    "channels": ({"channels": "none"}, ValueError, "channels must be one of .* got 'none'"),
    "reduction": (
        {"reduction": "sum"},
        ValueError,
        "reduction must be 'mean' or 'none', got 'sum'",
    ),
    "process_group": ({"process_group": 3}, TypeError, "process_group must be None or"),
}


def cases(table):
    return pytest.mark.parametrize("bad", table.values(), ids=table.keys())


FUNCTIONS = {
    "terms": lambda *tensors: tritonaff.instance_affinity_terms(*tensors, [(0, 1)]),
    "loss": lambda *tensors: tritonaff.instance_affinity_loss(*tensors, [(0, 1)]),
    "module": tritonaff.InstanceAffinityLoss([(0, 1)]),
}


@cases(BAD_TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors(backend, function, bad):
    logits, ids, error, message = bad
    with tritonaff.use_backend(backend), pytest.raises(error, match=message):
        function(logits, ids)


@cases(BAD_PAIRS)
def test_options_of_terms_and_targets(bad):
    options, error, message = bad
    options = {"offsets": [(0, 1)], **options}
    with pytest.raises(error, match=message):
        tritonaff.instance_affinity_terms(LOGITS, IDS, **options)
    with pytest.raises(error, match=message):
        tritonaff.instance_affinity_target(IDS, **options)


@cases({name: bad for name, bad in BAD_TENSORS.items() if name.startswith(("ids", "empty"))})
def test_ids_alone(bad):
    _, ids, error, message = bad
    if "logits" in message:
        pytest.skip("of two tensors")
    with pytest.raises(error, match=message):
        tritonaff.instance_affinity_target(ids, [(0, 1)])
    with pytest.raises(error, match=message):
        tritonaff.InstanceAffinityLoss([(0, 1)]).normalizer(ids)


@cases(BAD_LOSSES)
def test_options_of_the_loss(bad):
    options, error, message = bad
    options = {"offsets": [(0, 1)], **options}
    with pytest.raises(error, match=message):
        tritonaff.instance_affinity_loss(LOGITS, IDS, **options)
    with pytest.raises(error, match=message):
        tritonaff.InstanceAffinityLoss(**options)


def test_normalizer():
    count = torch.ones(1, 2, dtype=torch.long)
    for normalizer, options, error, message in (
        (count.float(), {}, TypeError, "normalizer must have dtype .* float32"),
        (count[0], {}, ValueError, r"normalizer must have shape \(1, 2\)"),
        (count.to("meta"), {}, ValueError, "one device, got meta and cpu"),
        (count, {"loss": "dice"}, ValueError, "a normalizer must be of a sum .* loss 'dice'"),
        (count, {"reduction": "none"}, ValueError, "normalizer must be None with the reduction"),
    ):
        with pytest.raises(error, match=message):
            tritonaff.instance_affinity_loss(
                LOGITS, IDS, [(0, 1)], normalizer=normalizer, **options
            )
