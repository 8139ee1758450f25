"""Metrics against hand-made images and pixel-by-pixel definitions."""

import itertools
import math
import pickle
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("torchmetrics")
pytest.importorskip("scipy")
import torchmetrics
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

import tritonaff
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU, RefinementReport


def boundary_pixels(label, target, c, ignore_index):
    """(row, column) of the boundary pixels of class c in one image of labels or predictions."""
    height, width = target.shape
    found = []
    for y, x in itertools.product(range(height), range(width)):
        if label[y, x] != c or target[y, x] == ignore_index:
            continue
        for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if (
                (0 <= ny < height and 0 <= nx < width)
                and target[ny, nx] != ignore_index
                and label[ny, nx] != c
            ):
                found.append((y, x))
                break
    return found


def pixels_in_reach(pixels, others, tolerance):
    """True for pairs of pixels within the tolerance."""
    return [[max(abs(y - v), abs(x - u)) <= tolerance for v, u in others] for y, x in pixels]


def score_by_definition(predictions, targets, num_classes, tolerance, ignore_index):
    counts = torch.zeros(4, num_classes)
    for prediction, target in zip(predictions, targets, strict=True):
        for c in range(num_classes):
            predicted = boundary_pixels(prediction, target, c, ignore_index)
            true = boundary_pixels(target, target, c, ignore_index)
            counts[:, c] += torch.tensor(
                [
                    len(predicted),
                    sum(map(any, pixels_in_reach(predicted, true, tolerance))),
                    len(true),
                    sum(map(any, pixels_in_reach(true, predicted, tolerance))),
                ]
            )
    return counts


@given(
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)),
    st.integers(0, 3),
    st.integers(0, 2**16),
)
def test_counts_are_those_of_the_definition(shape, tolerance, seed):
    torch.manual_seed(seed)
    prediction, target = torch.randint(0, 3, (2, *shape))
    target[torch.rand(shape) < 0.1] = 255
    score = BoundaryScore(3, tolerance)
    score.update(prediction, target)
    expected = score_by_definition(prediction, target, 3, tolerance, 255)
    assert torch.equal(score.counts.float(), expected)


def largest_one_to_one_matching(prediction, target, c, tolerance, ignore_index):
    predicted = boundary_pixels(prediction, target, c, ignore_index)
    true = boundary_pixels(target, target, c, ignore_index)
    if not predicted or not true:
        return 0
    graph = csr_array(pixels_in_reach(predicted, true, tolerance))
    partners = maximum_bipartite_matching(graph, perm_type="column")
    return int((partners >= 0).sum())


@given(
    st.tuples(st.integers(1, 10), st.integers(1, 10)),
    st.integers(0, 2),
    st.sampled_from([0.1, 0.5]),
    st.integers(0, 2**16),
)
def test_one_to_one_matching_finds_no_more_and_not_much_less(shape, tolerance, density, seed):
    """At most (2 tolerance + 1)^2 pixels are in reach of a pixel, and may share it as partner."""
    torch.manual_seed(seed)
    prediction, target = (torch.rand((2, 1, *shape)) < density).long()
    target[torch.rand((1, *shape)) < 0.1] = 255
    score = BoundaryScore(2, tolerance)
    score.update(prediction, target)
    for c in range(2):
        _, predicted_matched, _, true_matched = score.counts[:, c].tolist()
        matched = largest_one_to_one_matching(prediction[0], target[0], c, tolerance, 255)
        assert matched <= min(predicted_matched, true_matched)
        assert max(predicted_matched, true_matched) <= (2 * tolerance + 1) ** 2 * matched


def test_straight_boundaries_match_one_to_one():
    prediction, target = two_halves(8), two_halves(10)
    score = BoundaryScore(2, tolerance=2)
    score.update(prediction, target)
    for c in range(2):
        matched = largest_one_to_one_matching(prediction[0], target[0], c, 2, 255)
        assert score.counts[:, c].tolist() == [10, matched, 10, matched] == [10] * 4


def test_a_tolerance_forgives_noise():
    """The figures of docs/metrics.md: random labels match other random labels."""
    torch.manual_seed(0)
    prediction, target = torch.randint(0, 4, (2, 1, 100, 100))
    strict, lenient = BoundaryScore(4, tolerance=0), BoundaryScore(4, tolerance=1)
    for score in (strict, lenient):
        score.update(prediction, target)
    assert strict.by_class().f.mean().item() == pytest.approx(0.25, abs=0.01)
    assert lenient.by_class().f.mean().item() == pytest.approx(0.92, abs=0.01)


def two_halves(column):
    label = torch.zeros(1, 10, 20, dtype=torch.uint8)
    label[:, :, column:] = 1
    return label


def test_perfect_prediction():
    score = BoundaryScore(2, tolerance=0)
    score.update(two_halves(8), two_halves(8))
    for values in score.by_class():
        assert values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("tolerance", "expected"), [(0, 0.0), (2, 0.0), (3, 1.0)])
def test_a_boundary_that_is_three_pixels_off(tolerance, expected):
    score = BoundaryScore(2, tolerance)
    score.update(two_halves(8), two_halves(11))
    assert score.by_class().f.tolist() == [expected, expected]


def test_half_a_boundary_has_half_the_recall():
    prediction = two_halves(8)
    prediction[:, 5:] = 0
    score = BoundaryScore(2, tolerance=1)
    score.update(prediction, two_halves(8))
    # Rows 0 to 4 are found, row 5 is within the tolerance of row 4.
    assert score.by_class().recall[1] == 0.6


def test_classes_without_a_boundary_are_nan_and_leave_the_mean_alone():
    score = BoundaryScore(4, tolerance=1)
    score.update(two_halves(8), two_halves(8))
    assert score.by_class().f.isnan().tolist() == [False, False, True, True]
    assert score.compute()["boundary_f"] == 1


def test_a_class_missed_or_invented_scores_zero():
    target = two_halves(8)
    for prediction, truth in (
        (torch.zeros_like(target), target),
        (target, torch.zeros_like(target)),
    ):
        score = BoundaryScore(2)
        score.update(prediction, truth)
        assert score.by_class().f.tolist() == [0.0, 0.0]


def test_ignored_pixels_make_no_boundary():
    target = two_halves(8)
    target[:, :, 6:10] = 255
    score = BoundaryScore(2)
    score.update(two_halves(8), target)
    assert score.by_class().f.isnan().all()


def test_batches_add_up_and_reset_forgets():
    torch.manual_seed(0)
    prediction, target = torch.randint(0, 3, (2, 4, 9, 9))
    together, apart = BoundaryScore(3), BoundaryScore(3)
    together.update(prediction, target)
    for i in range(4):
        apart.update(prediction[i : i + 1], target[i : i + 1])
    assert torch.equal(together.counts, apart.counts)
    apart.reset()
    assert not apart.counts.any()


# Mean IoU over pixels and over instances


@given(
    st.integers(0, 2**16), st.sampled_from([255, 1]), st.sampled_from([torch.uint8, torch.int64])
)
def test_mean_iou_and_pixel_accuracy_are_those_of_torchmetrics(seed, ignore_index, dtype):
    """torchmetrics, used as in the module's docstring, computes the numbers that papers report:
    classes in neither truth nor prediction are left out of the mean, and are 0 by class.
    """
    torch.manual_seed(seed)
    prediction = torch.randint(0, 4, (2, 3, 5)).to(dtype)
    target = torch.randint(0, 3, (2, 3, 5)).to(dtype)
    prediction[prediction == 2] = 0
    target[torch.rand(target.shape) < 0.3] = ignore_index
    pixels = [
        (p, t)
        for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True)
        if t != ignore_index
    ]
    ious = {}
    for c in range(5):
        union = sum(c in pixel for pixel in pixels)
        if union and c != ignore_index:
            ious[c] = pixels.count((c, c)) / union
    options = {"num_classes": 5, "ignore_index": ignore_index}
    metrics = torchmetrics.MetricCollection(
        {
            "mean": MulticlassJaccardIndex(**options),
            "by class": MulticlassJaccardIndex(average="none", **options),
            "accuracy": MulticlassAccuracy(average="micro", **options),
        }
    )
    for i in range(2):
        metrics.update(prediction[i : i + 1], target[i : i + 1])
    result = metrics.compute()
    assert result["mean"].item() == pytest.approx(sum(ious.values()) / len(ious))
    assert result["by class"].tolist() == pytest.approx([ious.get(c, 0) for c in range(5)])
    right = sum(p == t for p, t in pixels)
    assert result["accuracy"].item() == pytest.approx(right / len(pixels))


def instance_mean_iou_by_definition(predictions, targets, ids, num_classes, ignore_index, variant):
    """Values by class and their mean: images, classes, instances and pixels one after the other."""
    weighted, count = [0.0] * num_classes, [0] * num_classes
    for image in zip(predictions, targets, ids, strict=True):
        pixels = list(zip(*(part.flatten().tolist() for part in image), strict=True))
        counted = [(p, t, i) for p, t, i in pixels if t != ignore_index and t in range(num_classes)]
        instances = [0] * num_classes
        if variant == "paper":
            for c in range(num_classes):
                instances[c] = len({i for _, t, i in counted if t == c})
        else:
            for position, instance in enumerate(sorted({i for _, _, i in pixels})):
                if position < 255:
                    votes = [0] * num_classes
                    for _, t, i in counted:
                        votes[t] += i == instance
                    instances[votes.index(max(votes))] += 1
        for c in range(num_classes):
            last = variant == "authors" and c == num_classes - 1
            said = (c, num_classes) if last else (c,)  # pixels that count as predictions of c
            hits = sum(p == t == c for p, t, _ in counted)
            missed = sum(p != c and t == c for p, t, _ in counted)
            invented = sum(p in said and not p == t == c for p, t, _ in counted)
            union = hits + missed + invented
            if variant == "authors":
                weighted[c] += instances[c] * hits / (union + 1e-12)
            elif instances[c]:
                weighted[c] += instances[c] * hits / union
            count[c] += instances[c]
    if variant == "authors":
        values = [w / (n + 1e-12) for w, n in zip(weighted, count, strict=True)]
        return values, sum(values) / num_classes
    values = [w / n if n else math.nan for w, n in zip(weighted, count, strict=True)]
    present = [v for v in values if not math.isnan(v)]
    return values, sum(present) / len(present) if present else math.nan


@given(
    st.sampled_from(["paper", "authors"]),
    st.tuples(st.integers(0, 3), st.integers(1, 6), st.integers(1, 8)),
    st.integers(1, 4),
    st.sampled_from([(torch.uint8, 250), (torch.int32, 2**24), (torch.int64, 2**53)]),
    st.sampled_from([-100, 0, 1, 255]),
    st.integers(0, 2**16),
)
def test_instance_mean_iou_is_that_of_the_definition(
    variant, shape, num_classes, id_type, ignore_index, seed
):
    """With ids that float32 or float64 does not tell apart, in batches, and for the authors'
    variant with labels and predictions beyond the classes.
    """
    torch.manual_seed(seed)
    dtype, first_id = id_type
    target = torch.randint(0, num_classes + 2 * (variant == "authors"), shape)
    target[torch.rand(shape) < 0.2] = ignore_index
    guess = torch.randint(0, num_classes + 2, shape)
    prediction = torch.where(torch.rand(shape) < 0.5, target, guess).to(torch.int32)
    ids = (torch.randint(0, 5, shape) + first_id).to(dtype)
    metric = InstanceMeanIoU(num_classes, ignore_index, variant)
    metric.update(prediction[:1], target[:1], ids[:1])
    metric.update(prediction[1:], target[1:], ids[1:])
    result, found_mean = metric.by_class(), metric.compute()["instance_miou"]
    by_class, mean = instance_mean_iou_by_definition(
        prediction, target, ids, num_classes, ignore_index, variant
    )
    assert result.dtype == found_mean.dtype == torch.float64
    assert result.tolist() == pytest.approx(by_class, abs=1e-14, nan_ok=True)
    assert found_mean.item() == pytest.approx(mean, abs=1e-14, nan_ok=True)


@pytest.mark.parametrize("num_ids", [255, 256, 300])
def test_the_authors_variant_counts_255_ids_of_an_image(num_ids):
    """The authors' variant ignores ids beyond 254: background 0 is one of its 255 ids."""
    ids = torch.arange(300).clamp(max=num_ids - 1).view(1, 15, 20).to(torch.int32)
    target = (ids >= 200).long()
    counts = {}
    for variant in ("paper", "authors"):
        metric = InstanceMeanIoU(2, variant=variant)
        metric.update(target, target, ids)
        counts[variant] = metric.instance_count.tolist()
    assert counts == {"paper": [200, num_ids - 200], "authors": [200, 55]}


def test_the_variants_differ_where_one_id_has_two_classes():
    """The paper's counts an id in both; the authors' in the larger class, in a tie in the lower."""
    target = torch.tensor([[[0, 1, 1], [2, 1, 255], [255, 255, 9]]])
    ids = torch.tensor([[[7, 7, 7], [8, 8, 8], [9, 9, 8]]])
    counts = {}
    for variant in ("paper", "authors"):
        metric = InstanceMeanIoU(3, variant=variant)
        labels = target.where(target != 9, 255) if variant == "paper" else target
        metric.update(labels, labels, ids)
        counts[variant] = metric.instance_count.tolist()
    # By the authors' script 7 has class 1, 8 class 1 before 2, and 9, without a label, class 0.
    assert counts == {"paper": [1, 2, 1], "authors": [1, 2, 0]}


def test_in_the_authors_variant_the_class_after_the_last_is_a_false_positive_of_the_last():
    target = torch.tensor([[[0, 1, 1, 1]]])
    prediction = torch.tensor([[[2, 2, 1, 3]]])
    metric = InstanceMeanIoU(2, variant="authors")
    metric.update(prediction, target, target)
    # 1 found; 2 missed; 2 invented, one of which lies on a missed instance.
    assert metric.by_class().tolist() == pytest.approx([0, 1 / 5], abs=1e-12)


def test_an_instance_counts_as_one_whatever_its_size():
    """A class that is predicted in an image without this class lowers only the other classes."""
    target = torch.zeros(2, 1, 10, dtype=torch.long)
    target[0, 0, 5:] = 1
    ids = target.clone()
    ids[0, 0, 9] = 2  # two instances of class 1: 4 pixels, 1 pixel
    prediction = target.clone()
    prediction[0, 0, 5:7] = 0
    prediction[1, 0, :4] = 1
    metric = InstanceMeanIoU(3)
    metric.update(prediction, target, ids)
    result = metric.by_class()
    expected = [(5 / 7 + 6 / 10) / 2, 3 / 5]
    assert result.tolist() == pytest.approx([*expected, math.nan], nan_ok=True)
    assert metric.compute()["instance_miou"].item() == pytest.approx(sum(expected) / 2)


def test_without_instances():
    """NaN, as a mean over nothing; the authors' script prints 0."""
    nothing = torch.full((1, 3, 3), 255)
    paper, authors = InstanceMeanIoU(2), InstanceMeanIoU(2, variant="authors")
    for metric in (paper, authors):
        metric.update(nothing, nothing, nothing)
    assert paper.by_class().isnan().all()
    assert paper.compute()["instance_miou"].isnan()
    assert authors.by_class().tolist() == [0, 0]
    assert authors.compute()["instance_miou"] == 0


@pytest.mark.parametrize("label", [11, -100])
@pytest.mark.parametrize("make", [BoundaryScore, InstanceMeanIoU])
def test_where_labels_are_not_looked_at_those_of_no_class_are_left_out(make, label, monkeypatch):
    """On a GPU the host does not look at labels."""
    monkeypatch.setattr(tritonaff.checks, "may_look_into", lambda tensor: False)
    torch.manual_seed(0)
    prediction, target, ids = torch.randint(0, 11, (3, 2, 9, 9))
    ids = (ids,) if make is InstanceMeanIoU else ()
    ignored, wrong = make(11), make(11)
    for metric, void in ((ignored, 255), (wrong, label)):
        target[:, 3:5] = void
        metric.update(prediction, target, *ids)
    exactly = {"rtol": 0, "atol": 0, "equal_nan": True}
    torch.testing.assert_close(wrong.compute(), ignored.compute(), **exactly)
    torch.testing.assert_close(wrong.by_class(), ignored.by_class(), **exactly)


def test_states_are_exact_without_float64():
    """Apple's GPUs lack float64; float32 would lose the one image among 2**30."""
    target = torch.tensor([[[0, 0, 0, 1]]])
    metrics = [AffinityAccuracy([1]), BoundaryScore(2), InstanceMeanIoU(2), RefinementReport()]
    for metric in metrics:
        for name in metric.metric_state:
            assert getattr(metric, name).dtype == torch.int64
    metric = InstanceMeanIoU(2)
    metric.update(torch.tensor([[[0, 1, 2, 0]]]), target, target)  # of class 0, 1 of 4
    metric.update(torch.tensor([[[0, 2, 2, 2]]]), target, target)  # 1 of 3
    for state in (metric.weighted_iou, metric.instance_count):
        state *= 2**30
    metric.update(target, target, target)
    result = metric.by_class()
    expected = (2**30 * (Fraction(1, 4) + Fraction(1, 3)) + 1) / (2**31 + 1)
    assert result.tolist() == pytest.approx([float(expected), 1 / (2**31 + 1)], rel=4e-16)


# Affinity accuracy


def test_without_torchmetrics_the_error_names_the_extra():
    script = """
import sys
sys.modules["torchmetrics"] = None  # an import of it fails
from tritonaff import metrics
for name in ("AffinityAccuracy", "BoundaryScore", "InstanceMeanIoU", "RefinementReport"):
    try:
        getattr(metrics, name)(2, sync_on_compute=False)
    except ImportError as error:
        print(error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    expected = "needs torchmetrics: pip install torchmetrics"
    assert result.stdout.splitlines() == [
        f"{name} {expected}"
        for name in ("AffinityAccuracy", "BoundaryScore", "InstanceMeanIoU", "RefinementReport")
    ], result.stderr


def perfect_logits(target, rates):
    signals = tritonaff.dilated_affinity_target(target, rates)
    return (signals == 1).float() - 0.5


def test_accuracy_by_rate_and_category(device):
    """All right at the first rate, all wrong at the second."""
    torch.manual_seed(0)
    rates = [1, (2, 3)]
    target = torch.randint(0, 2, (2, 9, 9), device=device)
    target[:, 0] = 255
    logits = perfect_logits(target, rates)
    logits[:, 8:] *= -1
    accuracy = AffinityAccuracy(rates).to(device)
    accuracy.update(logits, target)
    result = accuracy.by_category()
    counts = tritonaff.functional.neighbor_counts(target, rates)
    exists = counts.signal_count.sum(dim=-1).cpu() > 0
    assert result[exists].tolist() == [1.0] * exists[0].sum() + [0.0] * exists[1].sum()
    assert result[~exists].isnan().all()
    signals = counts.signal_count.sum(dim=(1, 2)).double()
    scalars = accuracy.compute()
    expected = (signals[0] / signals.sum()).item()
    assert scalars["affinity_accuracy"].item() == pytest.approx(expected)
    mean = scalars["affinity_accuracy_by_category"]
    assert mean.item() == pytest.approx(result[exists].mean().item())


def test_accuracy_adds_up_and_resets():
    torch.manual_seed(0)
    target = torch.randint(0, 2, (3, 9, 9))
    logits = torch.randn(3, 8, 9, 9, requires_grad=True)
    together, apart = AffinityAccuracy([2]), AffinityAccuracy([2])
    together.update(logits, target)
    for i in range(3):
        apart.update(logits[i : i + 1], target[i : i + 1])
    assert torch.equal(together.correct_count, apart.correct_count)
    assert together.compute() == apart.compute()
    apart.reset()
    apart.update(logits, torch.full_like(target, 255))
    assert apart.by_category().isnan().all()
    assert all(value.isnan() for value in apart.compute().values())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AffinityAccuracy(8.0), TypeError, "rates must be a sequence"),
        (lambda: AffinityAccuracy([1], "a"), TypeError, "ignore_index must be an int, got str"),
        (
            lambda: RefinementReport(8.0),
            TypeError,
            "distances must be a sequence of int, got float",
        ),
        (lambda: RefinementReport("8"), TypeError, "distances must be a sequence of int, got str"),
        (lambda: RefinementReport([1.0]), TypeError, "every one of distances must be an int"),
        (lambda: RefinementReport([0]), ValueError, "every one of distances must be at least 1"),
        (lambda: RefinementReport([]), ValueError, "ascending and distinct, at least one"),
        (lambda: RefinementReport([2, 1]), ValueError, r"ascending and distinct.* got \[2, 1\]"),
        (lambda: RefinementReport([2, 2]), ValueError, "ascending and distinct"),
        (
            lambda: AffinityAccuracy([1]).update(torch.zeros(1, 9, 3, 3), two_halves(8)),
            ValueError,
            "affinity_logits must have",
        ),
        (
            lambda: RefinementReport().update(*[two_halves(8)] * 2, two_halves(8)[0]),
            ValueError,
            r"target must have shape \(N, H, W\)",
        ),
        (
            lambda: RefinementReport().update(two_halves(8), *[two_halves(8)[:, 1:]] * 2),
            ValueError,
            r"before must have shape \(1, 9, 20\), got \(1, 10, 20\)",
        ),
        (
            lambda: RefinementReport().update(*[two_halves(8), two_halves(8) / 2, two_halves(8)]),
            ValueError,
            "after must hold whole numbers, got",
        ),
        (lambda: BoundaryScore(0), ValueError, "num_classes must be at least 1"),
        (lambda: BoundaryScore(3, tolerance=1.5), TypeError, "tolerance must be an int, got float"),
        (lambda: BoundaryScore(3, tolerance=-1), ValueError, "tolerance must be at least 0"),
        (lambda: BoundaryScore(3, ignore_index=2**63), ValueError, "ignore_index must fit 64 bits"),
        (
            lambda: BoundaryScore(3).update(two_halves(8) / 2, two_halves(8)),
            ValueError,
            "prediction must hold whole numbers, got",
        ),
        (
            lambda: BoundaryScore(3).update(two_halves(8)[:, 1:], two_halves(8)),
            ValueError,
            r"prediction must have shape \(1, 10, 20\), got \(1, 9, 20\)",
        ),
        (
            lambda: BoundaryScore(3).update(two_halves(8).to("meta"), two_halves(8)),
            ValueError,
            "prediction and target must be on one device, got meta and cpu",
        ),
        (lambda: InstanceMeanIoU(0), ValueError, "num_classes must be at least 1"),
        (lambda: InstanceMeanIoU(2, "void"), TypeError, "ignore_index must be an int, got str"),
        (
            lambda: InstanceMeanIoU(2, variant="cityscapes"),
            ValueError,
            r"variant must be one of \('paper', 'authors'\), got 'cityscapes'",
        ),
        (
            lambda: InstanceMeanIoU(2).update(*[two_halves(8)] * 2, two_halves(8)[0]),
            ValueError,
            r"instance_ids must have shape \(N, H, W\), got \(10, 20\)",
        ),
        (
            lambda: InstanceMeanIoU(2).update(*[two_halves(8)] * 2, two_halves(8) + 0.5),
            ValueError,
            "instance_ids must hold whole numbers, got",
        ),
        (
            lambda: InstanceMeanIoU(2).update(*[two_halves(8)] * 2, two_halves(8).to("meta")),
            ValueError,
            "instance_ids and target must be on one device",
        ),
        (
            lambda: InstanceMeanIoU(1).update(*[two_halves(8)] * 3),
            ValueError,
            r"target must hold classes in \[0, 1\) or ignore_index 255, got \[1\] at 120 pixels",
        ),
        (
            lambda: BoundaryScore(11).update(two_halves(8), 11 * two_halves(8)),
            ValueError,
            r"target must hold classes in \[0, 11\) or ignore_index 255, got \[11\] at 120 pixels",
        ),
        (
            lambda: BoundaryScore(11).update(two_halves(8), -100 * two_halves(8).long()),
            ValueError,
            r"target must hold classes in \[0, 11\) or ignore_index 255, got \[-100\]",
        ),
        (
            lambda: RefinementReport().update(*[two_halves(8)] * 2, -100 * two_halves(8).long()),
            ValueError,
            r"target must hold classes in \[0, inf\) or ignore_index 255, got \[-100\]",
        ),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


# Changes by a refinement


def refinement_by_definition(before, after, target, distances, ignore_index):
    """Rows: pixels, became right, became wrong, stayed wrong; a column per bin."""
    counts = torch.zeros(4, len(distances) + 1, dtype=torch.int64)
    for b, a, t in zip(before.tolist(), after.tolist(), target.tolist(), strict=True):
        pixels = [
            (y, x, label)
            for y, row in enumerate(t)
            for x, label in enumerate(row)
            if label != ignore_index
        ]
        for y, x, label in pixels:
            away = [max(abs(y - v), abs(x - u)) for v, u, other in pixels if other != label]
            column = sum(min(away, default=99) > distance for distance in distances)
            counts[0, column] += 1
            if b[y][x] != a[y][x]:
                row = 1 if a[y][x] == label else 2 if b[y][x] == label else 3
                counts[row, column] += 1
    return counts


@given(
    st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([(1,), (1, 2, 4), (3, 20)]),
    st.sampled_from([torch.uint8, torch.int32, torch.int64]),
    st.sampled_from([0, 255]),
    st.integers(0, 2**16),
)
def test_refinement_is_that_of_the_definition(shape, distances, dtype, ignore_index, seed):
    torch.manual_seed(seed)
    before, after = torch.randint(0, 3, (2, *shape)).to(dtype)
    target = (torch.rand(shape) < 0.1).to(dtype) + 1  # mostly one label: boundaries are far
    target[torch.rand(shape) < 0.3] = ignore_index
    report = RefinementReport(distances, ignore_index)
    report.update(before, after, target)
    expected = refinement_by_definition(before, after, target, distances, ignore_index)
    assert torch.equal(report.counts, expected)
    result = report.report()
    assert torch.equal(torch.stack(result[1:]), expected)
    assert torch.equal(result.changed, expected[1:].sum(dim=0))


def test_an_ignored_band_does_not_hide_a_boundary():
    target = two_halves(8)
    target[:, :, 6:10] = 255
    report = RefinementReport((4, 5))
    report.update(target, target, target)
    # 1, 5 and 5 columns aside: columns 5 and 10 are 5 apart.
    assert report.report().pixel_count.tolist() == [0, 20, 140]


def test_fractions_and_table():
    target = two_halves(8)
    before, after = target.clone(), target.clone()
    before[0, 0, 7] = after[0, 1, 8] = 3  # one became right, one wrong
    before[0, 2, 7], after[0, 2, 7] = 3, 4  # one stays wrong
    before[0, 3, 0] = 1  # far away, became right
    before[0, 4, 0] = after[0, 4, 0] = 1  # wrong, but not changed
    report = RefinementReport((1, 2))
    report.update(before, after, target)
    result = report.report()
    scalars = [value.item() for value in report.compute().values()]
    assert scalars == pytest.approx([2 / 200, 1 / 200, 1 / 200])
    assert result.changed.tolist() == [3, 0, 1]
    assert result.changed_fraction.tolist() == [3 / 20, 0, 1 / 160]
    assert result.fractions[:, 0].tolist() == [1 / 3] * 3
    assert result.fractions[:, 1].isnan().all()
    assert result.fractions[:, 2].tolist() == [1, 0, 0]
    lines = str(result).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["<=", "1", "20", "3", "15.00", "33.33", "33.33", "33.33"],
        ["<=", "2", "20", "0", "0.00", "-", "-", "-"],
        [">", "2", "160", "1", "0.62", "100.00", "0.00", "0.00"],
        ["all", "200", "4", "2.00", "50.00", "25.00", "25.00"],
    ]
    assert {len(line) for line in lines} == {len(lines[0])}
    assert len(lines[0]) <= 80


def test_they_move_collect_and_pickle(device):
    """Metrics in a collection, with their states on the device, and saved: as torchmetrics."""
    metrics = [AffinityAccuracy([1]), BoundaryScore(2), InstanceMeanIoU(2), RefinementReport()]
    collection = torchmetrics.MetricCollection(metrics, compute_groups=False).to(device)
    target = two_halves(8).to(device)
    logits = perfect_logits(target, [1])
    inputs = dict.fromkeys(("prediction", "instance_ids", "before", "after", "target"), target)
    collection.update(affinity_logits=logits, **inputs)
    for metric in collection.values():
        for name in metric.metric_state:
            assert getattr(metric, name).device.type == device.type
    computed = collection.compute()
    assert computed == {
        "affinity_accuracy": 1,
        "affinity_accuracy_by_category": 1,
        "boundary_f": 1,
        "boundary_precision": 1,
        "boundary_recall": 1,
        "instance_miou": 1,
        "became_right": 0,
        "became_wrong": 0,
        "stayed_wrong": 0,
    }
    assert all(value.dim() == 0 for value in computed.values())
    again = pickle.loads(pickle.dumps(collection))
    assert again.compute() == computed
    assert again["BoundaryScore"].by_class().f.tolist() == [1, 1]
    assert again["RefinementReport"].report().pixel_count.sum() == 200
    report = RefinementReport().to(device)
    assert report(target, target, target) == report.compute()


def test_lightning_logs_them(tmp_path):
    """``log_dict`` in every step, and the means of the epoch at its end."""
    lightning = pytest.importorskip("pytorch_lightning")

    class Network(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.boundary = BoundaryScore(2, tolerance=0)
            self.accuracy = AffinityAccuracy([1])
            self.scores = torchmetrics.MetricCollection(
                {"boundary": BoundaryScore(2), "instances": InstanceMeanIoU(2)},
                prefix="val_",
                compute_groups=False,
            )

        def validation_step(self, batch, index):
            prediction, target = batch
            self.boundary.update(prediction, target)
            self.accuracy.update(perfect_logits(target, [1]), target)
            inputs = {"prediction": prediction, "target": target, "instance_ids": target}
            self.log_dict(self.scores(**inputs), on_step=False, on_epoch=True)

        def on_validation_epoch_end(self):
            self.log_dict(self.boundary.compute())
            self.log("accuracy", self.accuracy.compute()["affinity_accuracy"])

    data = [(two_halves(8 + k)[0], two_halves(8)[0]) for k in range(2)]
    loader = torch.utils.data.DataLoader(data, batch_size=1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        logger=False,
        enable_model_summary=False,
    )
    (logged,) = trainer.validate(Network(), loader, verbose=False)
    # One image's boundary is right, the other's is a pixel off.
    assert logged["boundary_f"] == pytest.approx(0.5)
    assert logged["accuracy"] == 1
    assert logged["val_boundary_f"] == 1
    ious = [8 / 9, 11 / 12]  # of the second image
    assert logged["val_instance_miou"] == pytest.approx((1 + sum(ious) / 2) / 2)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 156, -100), (torch.uint8, 0, 256), (torch.int32, 0, 2**32)],
)
def test_an_ignore_index_that_the_target_cannot_hold_ignores_nothing(dtype, label, ignore_index):
    target = torch.full((1, 2, 6), label).to(dtype)
    target[..., 3:] = 3
    score = BoundaryScore(200, tolerance=0, ignore_index=ignore_index)
    score.update(target, target)
    assert score.by_class().recall[[label, 3]].tolist() == [1, 1]
    report = RefinementReport((1,), ignore_index=ignore_index)
    report.update(target, target, target)
    assert report.report().pixel_count.tolist() == [4, 8]


def test_boundaries_between_labels_that_float32_does_not_tell_apart():
    target = torch.tensor([[[2**24, 2**24, 2**24, 2**24 + 1, 2**24 + 1]]])
    report = RefinementReport((1, 2**40))
    report.update(target, target, target)
    assert report.report().pixel_count.tolist() == [2, 3, 0]
