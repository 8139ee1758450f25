"""Conventions of other libraries: reductions, terms for logs, label smoothing, classes left
out, weights of pixels.
"""

import pytest
import torch
from torch.nn import functional as F

import tritonaff
from tritonaff.testing import INSTANCE_OFFSETS, make_inputs, make_instance_affinity_inputs

RATES = ((1, 1), (2, 3))


@pytest.fixture(autouse=True)
def portable():
    """The tests are about arithmetic on tables: one backend stands for all."""
    with tritonaff.use_backend("portable"):
        yield


def affinity_logits(dtype=torch.float32):
    torch.manual_seed(0)
    target = make_inputs((3, 4, 9, 10))[1]
    target[1] = 255
    return torch.randn(3, 16, 9, 10, dtype=dtype), target


def classes(dtype=torch.float32):
    logits, target = make_inputs((3, 4, 9, 10), dtype)
    target[1] = 255
    return logits, target


def channels(dtype=torch.float32):
    logits, target = classes(dtype)
    return logits, torch.stack((target, target.flip(2), target, target), dim=1).clamp(max=1)


def volumes(dtype=torch.float32):
    return make_instance_affinity_inputs((3, 12, 9, 10), dtype)


FIELD, REGRESSION = tritonaff.AffinityFieldLoss, tritonaff.AffinityRegressionLoss
# A module of the options, and inputs of which one image does not count at all.
LOSSES = {
    "field": (lambda **options: FIELD((3, 5), edge_lambda=2.0, **options), classes),
    "field and cross-entropy": (
        lambda **options: FIELD(
            cross_entropy=True, weight=[1.0, 2.0, 0.0, 3.0], label_smoothing=0.1, **options
        ),
        classes,
    ),
    "adaptive": (lambda **options: tritonaff.AdaptiveAffinityFieldLoss(4, **options), classes),
    "authors": (lambda **options: FIELD(variant="authors", **options), classes),
    "sigmoid": (
        lambda **options: FIELD(
            cross_entropy=True, activation="sigmoid", pos_weight=[1.0, 2.0, 0.5, 3.0], **options
        ),
        channels,
    ),
    "regression": (lambda **options: REGRESSION((3, 2), **options), classes),
    "dilated": (lambda **options: tritonaff.DilatedAffinityLoss(RATES, **options), affinity_logits),
    "instance": (
        lambda **options: tritonaff.InstanceAffinityLoss(
            INSTANCE_OFFSETS[2], loss={"bce": 0.5, "dice": 2.0}, ignore_index=255, **options
        ),
        volumes,
    ),
}
OF_TERMS = [name for name in LOSSES if name != "regression"]


@pytest.mark.parametrize("name", LOSSES)
def test_none_is_each_image_as_a_batch_of_its_own(device, name):
    module, inputs = LOSSES[name]
    logits, target = (x.to(device) for x in inputs())
    logits.requires_grad_()
    mean, none = module().to(device), module(reduction="none").to(device)
    factor = torch.tensor([1.0, 2.0, 3.0], device=device)
    losses = none(logits, target)
    (gradient,) = torch.autograd.grad((factor * losses).sum(), logits)
    expected = torch.stack([mean(logits[i : i + 1], target[i : i + 1]) for i in range(3)])
    (expected_gradient,) = torch.autograd.grad((factor * expected).sum(), logits)
    assert none(logits[:0], target[:0]).shape == (0,)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(gradient, expected_gradient)
    assert losses.min() >= 0
    assert len(losses.unique()) == 3


def test_sum_is_over_images(device):
    logits, target = (x.to(device) for x in classes())
    losses = REGRESSION((3, 2), reduction="none")(logits, target)
    assert losses.count_nonzero() == 2
    torch.testing.assert_close(REGRESSION((3, 2), reduction="sum")(logits, target), losses.sum())
    torch.testing.assert_close(REGRESSION((3, 2))(logits, target), losses.sum() / 2)
    logits, target = (x.to(device) for x in channels())
    losses = REGRESSION((3, 2), reduction="none", activation="sigmoid")(logits, target)
    assert losses.shape == (3, 4)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OF_TERMS)
def test_terms_add_up_to_the_loss(device, name, reduction):
    module, inputs = LOSSES[name]
    logits, target = (x.to(device) for x in inputs())
    loss_fn = module(reduction=reduction).to(device)
    logits.requires_grad_()
    loss, terms = loss_fn(logits, target, return_terms=True)
    expected = loss_fn(logits, target)
    assert torch.equal(loss, expected)
    assert loss.requires_grad
    assert not any(term.requires_grad for term in terms.values())
    torch.testing.assert_close(sum(terms.values()), loss.detach())


def test_names_of_terms():
    logits, target = classes()
    options = {"edge_lambda": 2.0, "non_edge_lambda": 0.0, "affinity_lambda": 0.5}
    loss_fn = FIELD(cross_entropy=True, **options)
    _, terms = loss_fn(logits, target, progress=1.0, return_terms=True)
    assert list(terms) == ["edge", "non_edge", "cross_entropy"]
    assert terms["non_edge"] == 0
    expected = F.cross_entropy(logits, target, ignore_index=255)
    torch.testing.assert_close(terms["cross_entropy"], expected)
    tables = tritonaff.affinity_field_terms(logits, target)
    edge = tables.edge_sum.sum() / tables.edge_count.sum()
    torch.testing.assert_close(terms["edge"], edge / 10)
    logits, target = affinity_logits()
    _, terms = tritonaff.DilatedAffinityLoss(RATES)(logits, target, return_terms=True)
    assert list(terms) == ["rate 1 x 1", "rate 2 x 3"]
    _, terms = LOSSES["instance"][0]()(*volumes(), return_terms=True)
    assert list(terms) == ["bce", "dice"]


def test_one_factor_of_the_affinity_field():
    logits, target = classes()
    loss = tritonaff.affinity_field_loss(logits, target, affinity_lambda=0.3, edge_lambda=2.0)
    expected = tritonaff.affinity_field_loss(logits, target, edge_lambda=0.6, non_edge_lambda=0.3)
    torch.testing.assert_close(loss, expected)


def test_progress_may_be_set_before():
    logits, target = classes()
    loss_fn = FIELD(cross_entropy=True)
    expected = loss_fn(logits, target, 0.5)
    start = loss_fn(logits, target)
    loss_fn.set_progress(0.25)
    buffer = loss_fn.progress
    loss_fn.set_progress(torch.tensor(0.5))
    assert loss_fn.progress is buffer
    torch.testing.assert_close(loss_fn(logits, target), expected)
    torch.testing.assert_close(loss_fn(logits, target, 0.0), start)
    assert not loss_fn.state_dict()
    loss_fn.set_progress(None)
    assert loss_fn(logits, target) == start
    with pytest.raises(ValueError, match=r"progress must be in \[0"):
        loss_fn.set_progress(1.5)


# --- Cross-entropy ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("smoothing", "weight", "offset"),
    [(0.1, None, 1e3), (0.2, [0.5, 2.0, 0.0, 1.0], 0.0), (1.0, [0.5, 2.0, 0.0, 1.0], 0.0)],
)
def test_label_smoothing_is_torchs(any_backend, device, smoothing, weight, offset):
    logits, target = (x.to(device) for x in classes())
    logits = (3 * logits + offset).requires_grad_()
    x = logits.detach().double().requires_grad_()
    w = None if weight is None else torch.tensor(weight, device=device)
    expected = F.cross_entropy(
        x,
        target,
        weight=None if w is None else w.double(),
        ignore_index=255,
        label_smoothing=smoothing,
    )
    (exact,) = torch.autograd.grad(expected, x)
    with torch.no_grad():
        logits.masked_fill_((target == 255)[:, None], torch.nan)  # never looked at
    options = {"edge_lambda": 0.0, "non_edge_lambda": 0.0, "label_smoothing": smoothing}
    module = FIELD(cross_entropy=True, weight=weight, **options).to(device)
    with tritonaff.use_backend(any_backend):
        loss = module(logits, target)
        (gradient,) = torch.autograd.grad(loss, logits)
        function = tritonaff.affinity_field_cross_entropy(logits, target, weight=w, **options)
        assert torch.equal(function, loss)
    torch.testing.assert_close(loss.double(), expected, rtol=2e-6, atol=0)
    assert (gradient - exact).norm() <= 2e-6 * exact.norm()


@pytest.mark.parametrize("backend", ["reference", "portable"])
def test_label_smoothing_in_float64(backend):
    logits, target = classes(torch.float64)
    logits.requires_grad_()
    weight = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    expected = F.cross_entropy(logits, target, weight=weight, ignore_index=255, label_smoothing=0.2)
    expected = expected + tritonaff.affinity_field_loss(logits, target)
    (exact,) = torch.autograd.grad(expected, logits)
    with tritonaff.use_backend(backend):
        loss = tritonaff.affinity_field_cross_entropy(
            logits, target, weight=weight, label_smoothing=0.2
        )
        (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, exact, rtol=1e-9, atol=1e-14)


def test_smoothing_of_no_pixel():
    logits, target = classes()
    loss = tritonaff.affinity_field_cross_entropy(
        logits.requires_grad_(), torch.full_like(target, 255), label_smoothing=0.5
    )
    assert loss == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


# --- Classes and pixels left out ----------------------------------------------------------------


@pytest.mark.parametrize("variant", ["paper", "authors"])
def test_without_the_background(device, variant):
    logits, target = (x.to(device) for x in classes())
    options = {"variant": variant, "kernel_sizes": (3, 5)}
    module = FIELD(include_background=False, **options)
    edge_weight = torch.rand(4, 2, device=device)
    loss = tritonaff.affinity_field_loss(
        logits, target, include_background=False, edge_weight=edge_weight, **options
    )
    tables = tritonaff.affinity_field_terms(logits, target, **options)
    edge, non_edge, edges, non_edges = (table[1:] for table in tables)
    expected = (edge_weight[1:] * edge / edges.sum(dim=0)).sum()
    expected = expected + (non_edge / non_edges.sum(dim=0)).sum() / 2
    normalizer = module.normalizer(target, 4)
    assert torch.equal(normalizer, torch.stack((edges.sum(dim=0), non_edges.sum(dim=0))))
    parts = sum(
        module(x, y, normalizer=normalizer)
        for x, y in zip(logits.split(1), target.split(1), strict=True)
    )
    torch.testing.assert_close(parts, module(logits, target))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("shape", [(3, 9, 10), (3, 1, 9, 10)])
def test_weights_of_pixels_have_a_remedy(shape):
    logits, target = classes()
    weight, message = torch.ones(shape), r"masked_fill\(~mask, ignore_index\)"
    with pytest.raises(ValueError, match=message):
        tritonaff.affinity_field_cross_entropy(logits, target, weight=weight)
    with pytest.raises(ValueError, match=message):
        tritonaff.affinity_field_loss(logits, target, edge_weight=weight)
    with pytest.raises(ValueError, match=message):
        FIELD()(logits, target, weight)


FIELD_REFUSED = {
    "sum": ({"reduction": "sum"}, "reduction must be 'mean' or 'none', got 'sum'.*add up the"),
    "reduction": ({"reduction": "average"}, "reduction must be one of .* got 'average'"),
    "smoothing": ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0.*1\], got 1.5"),
    "smoothing alone": ({"label_smoothing": 0.1}, "label_smoothing needs cross_entropy=True"),
    "smoothing of yes and no": (
        {"label_smoothing": 0.1, "cross_entropy": True, "activation": "sigmoid"},
        "label_smoothing needs activation='softmax', got 'sigmoid'",
    ),
    "lambda": ({"affinity_lambda": -1.0}, r"affinity_lambda must be in \[0"),
}


@pytest.mark.parametrize("name", FIELD_REFUSED)
def test_refused(name):
    options, message = FIELD_REFUSED[name]
    with pytest.raises(ValueError, match=message):
        FIELD(**options)


def test_refused_elsewhere():
    logits, target = classes()
    with pytest.raises(ValueError, match="reduction must be 'mean' or 'none', got 'sum'"):
        tritonaff.DilatedAffinityLoss([1], reduction="sum")
    with pytest.raises(TypeError, match="include_background must be a bool, got int"):
        FIELD(include_background=0)
    with pytest.raises(ValueError, match="needs at least two channels, got 1"):
        tritonaff.affinity_field_loss(
            logits[:, :1], target.clamp(max=1), activation="sigmoid", include_background=False
        )
    with pytest.raises(TypeError, match="return_terms must be a bool, got int"):
        FIELD()(logits, target, return_terms=1)
    for reduction in ("sum", "none"):
        with pytest.raises(ValueError, match=f"normalizer must be None with .* '{reduction}'"):
            REGRESSION(reduction=reduction)(logits, target, torch.tensor(3))
    with pytest.raises(ValueError, match="normalizer must be None with the reduction 'none'"):
        FIELD(reduction="none")(logits, target, normalizer=torch.ones(2, 1).long())


# --- Other resolutions --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.bool, torch.int16, torch.uint16, torch.uint64, torch.int64, torch.float32],
)
def test_labels_resized_to_any_size(dtype):
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 300, (2, 1, 12, 17), generator=generator).to(dtype)
    for size in ((12, 17), (3, 5), (1, 1), (40, 2), (7, 17)):
        result = tritonaff.resize_labels(target, size)
        expected = F.interpolate(target.to(torch.float64), size, mode="nearest-exact")
        assert result.dtype == dtype
        assert torch.equal(result.to(torch.float64), expected)
        assert torch.equal(tritonaff.resize_labels(target[:, 0], size), result[:, 0])


def test_which_pixel_of_513_is_taken():
    target = torch.arange(513, dtype=torch.int32).expand(1, 513, 513)
    assert tritonaff.resize_labels(target, 129, align_corners=True)[0, 0].tolist() == [
        *range(0, 513, 4)
    ]
    taken = tritonaff.resize_labels(target, (129, 129))[0, 0].tolist()
    assert (taken[0], taken[1], taken[-1]) == (1, 5, 511)
    assert torch.equal(
        tritonaff.resize_labels(target[..., :512], (128, 128)),
        target[:, 2:512:4, 2:512:4],
    )
    target = target.mT
    assert tritonaff.resize_labels(target, (129, 1), align_corners=True).flatten().tolist() == [
        *range(0, 513, 4)
    ]
    assert tritonaff.resize_labels(target, (1, 1), align_corners=True).item() == 0
    # 11 to 4: 0, 3.33, 6.67 and 10 round to the nearest.
    eleven = torch.arange(11).expand(1, 11, 11)
    taken = tritonaff.resize_labels(eleven, (1, 4), align_corners=True)
    assert taken.flatten().tolist() == [0, 3, 7, 10]


def test_ids_of_volumes_are_resized():
    ids = torch.arange(2 * 6 * 8 * 10).view(2, 6, 8, 10)
    result = tritonaff.resize_labels(ids, (3, 4, 5))
    assert torch.equal(result, ids[:, 1::2, 1::2, 1::2])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1]], 2), TypeError, "target must be a tensor, got list"),
        ((torch.zeros(1, 2, 2) + 0j, 2), TypeError, "target must have dtype .* got complex64"),
        ((torch.zeros(1, 2, 2), 2.0), TypeError, "size must be a sequence of int"),
        ((torch.zeros(1, 2, 2), (2, 0)), ValueError, "size must be at least 1, got 0"),
        ((torch.zeros(1, 2, 2), (2,)), ValueError, r"size must be \(H, W\), or .* got \(2,\)"),
        ((torch.zeros(2, 2), (2, 2, 2)), ValueError, r"got \(2, 2, 2\) for \(2, 2\)"),
        ((torch.zeros(1, 2, 0), (2, 2)), ValueError, "at least one row and column, got shape"),
    ],
)
def test_sizes_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        tritonaff.resize_labels(*arguments)


# By the name in LOSSES; outputs at the target's resolution, at half and at a third of it.
@pytest.mark.parametrize("name", LOSSES)
def test_deep_supervision_is_a_weighted_sum(device, name):
    module, inputs = LOSSES[name]
    logits, target = (x.to(device) for x in inputs())
    loss_fn = module().to(device)
    outputs = [logits, logits[..., ::2, ::2], logits[..., 1::3, 1::3]]
    targets = [tritonaff.resize_labels(target, x.shape[2:]) for x in outputs]
    losses = torch.stack([loss_fn(x, y) for x, y in zip(outputs, targets, strict=True)])
    weights = losses.new_tensor([4.0, 2.0, 1.0]) / 7
    deep = tritonaff.DeepSupervision(loss_fn)
    torch.testing.assert_close(deep(outputs, target), losses @ weights)
    torch.testing.assert_close(deep(outputs, targets), losses @ weights)
    assert deep(logits, target) == losses[0]
    given = tritonaff.DeepSupervision(loss_fn, [0.0, 3.0, 0.5])
    unreadable = [None, *outputs[1:]]
    torch.testing.assert_close(given(unreadable, target), 3 * losses[1] + losses[2] / 2)


def test_deep_supervision_of_volumes_and_in_one_graph():
    offsets = [(0, 0, -1), (1, 0, 0)]
    loss_fn = tritonaff.DeepSupervision(tritonaff.InstanceAffinityLoss(offsets))
    torch.manual_seed(0)
    outputs = [torch.randn(1, 2, s, 2 * s, 8) for s in (8, 4, 2)]
    ids = torch.randint(0, 3, (1, 8, 16, 8))
    compiled = torch.compile(loss_fn, backend="aot_eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(outputs, ids), loss_fn(outputs, ids))


def test_deep_supervision_hands_progress_on_and_learns_sizes():
    logits, target = classes()
    adaptive = tritonaff.AdaptiveAffinityFieldLoss(4, (3, 5))
    loss_fn = tritonaff.DeepSupervision(adaptive, align_corners=True)
    outputs = [logits, logits[:, :, ::2, ::3]]
    loss = loss_fn(outputs, target, progress=1.0)
    torch.testing.assert_close(loss, loss_fn(outputs, target) / 10)
    second = adaptive(outputs[1], tritonaff.resize_labels(target, (5, 4), align_corners=True))
    expected = (2 * adaptive(logits, target) + second) / 30
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert adaptive.edge_scores.grad.any()
    assert sum(1 for _ in loss_fn.parameters()) == 2


def test_deep_supervision_refused():
    logits, target = classes()
    with pytest.raises(TypeError, match="loss must be a module, got function"):
        tritonaff.DeepSupervision(tritonaff.affinity_field_loss)
    with pytest.raises(ValueError, match="weights must be in"):
        tritonaff.DeepSupervision(FIELD(), [1.0, -1.0])
    with pytest.raises(ValueError, match="weights must have a number above 0"):
        tritonaff.DeepSupervision(FIELD(), [0.0, 0.0])
    with pytest.raises(TypeError, match="weights must be a sequence of numbers"):
        tritonaff.DeepSupervision(FIELD(), 1.0)
    with pytest.raises(ValueError, match="as many as targets and weights, got 1, 1 and 2"):
        tritonaff.DeepSupervision(FIELD(), [1.0, 1.0])([logits], target)
    with pytest.raises(ValueError, match="as many as targets and weights, got 2, 1 and 2"):
        tritonaff.DeepSupervision(FIELD())([logits, logits], [target])
