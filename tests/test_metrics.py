"""Metrics against hand-made images and pixel-by-pixel definitions."""

import itertools
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

torchmetrics = pytest.importorskip("torchmetrics")
import tritonaff
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU, RefinementReport


def score_by_definition(predictions, targets, num_classes, tolerance, ignore_index):
    counts = torch.zeros(4, num_classes)
    for prediction, target in zip(predictions, targets, strict=True):
        height, width = target.shape

        def boundary(label, c, target=target, height=height, width=width):
            found = set()
            for y, x in itertools.product(range(height), range(width)):
                if label[y, x] != c or target[y, x] == ignore_index:
                    continue
                for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                    if 0 <= ny < height and 0 <= nx < width:
                        counts_too = target[ny, nx] != ignore_index
                        if counts_too and label[ny, nx] != c:
                            found.add((y, x))
            return found

        for c in range(num_classes):
            predicted, true = boundary(prediction, c), boundary(target, c)

            def matched(pixels, others):
                return sum(
                    any(max(abs(y - v), abs(x - u)) <= tolerance for v, u in others)
                    for y, x in pixels
                )

            counts[:, c] += torch.tensor(
                [len(predicted), matched(predicted, true), len(true), matched(true, predicted)]
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


def two_halves(column):
    label = torch.zeros(1, 10, 20, dtype=torch.uint8)
    label[:, :, column:] = 1
    return label


def test_perfect_prediction():
    score = BoundaryScore(2, tolerance=0)
    score.update(two_halves(8), two_halves(8))
    for values in score.compute():
        assert values.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("tolerance", "expected"), [(0, 0.0), (2, 0.0), (3, 1.0)])
def test_a_boundary_that_is_three_pixels_off(tolerance, expected):
    score = BoundaryScore(2, tolerance)
    score.update(two_halves(8), two_halves(11))
    assert score.compute().f.tolist() == [expected, expected]


def test_half_a_boundary_has_half_the_recall():
    prediction = two_halves(8)
    prediction[:, 5:] = 0
    score = BoundaryScore(2, tolerance=1)
    score.update(prediction, two_halves(8))
    # Rows 0 to 4 are found, row 5 is within the tolerance of row 4.
    assert score.compute().recall[1] == 0.6


def test_classes_without_a_boundary_are_nan_and_leave_the_mean_alone():
    score = BoundaryScore(4, tolerance=1)
    score.update(two_halves(8), two_halves(8))
    result = score.compute()
    assert result.f.isnan().tolist() == [False, False, True, True]
    assert result.f.nanmean() == 1


def test_a_class_missed_or_invented_scores_zero():
    target = two_halves(8)
    for prediction, truth in (
        (torch.zeros_like(target), target),
        (target, torch.zeros_like(target)),
    ):
        score = BoundaryScore(2)
        score.update(prediction, truth)
        assert score.compute().f.tolist() == [0.0, 0.0]


def test_ignored_pixels_make_no_boundary():
    target = two_halves(8)
    target[:, :, 6:10] = 255
    score = BoundaryScore(2)
    score.update(two_halves(8), target)
    assert score.compute().f.isnan().all()


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
    expected = "needs torchmetrics: pip install tritonaff[metrics]"
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
    result = accuracy.compute()
    counts = tritonaff.functional.neighbor_counts(target, rates)
    exists = counts.signal_count.sum(dim=-1).cpu() > 0
    assert result.by_category[exists].tolist() == [1.0] * exists[0].sum() + [0.0] * exists[1].sum()
    assert result.by_category[~exists].isnan().all()
    signals = counts.signal_count.sum(dim=(1, 2)).double()
    assert result.overall.item() == pytest.approx((signals[0] / signals.sum()).item())


def test_accuracy_adds_up_and_resets():
    torch.manual_seed(0)
    target = torch.randint(0, 2, (3, 9, 9))
    logits = torch.randn(3, 8, 9, 9, requires_grad=True)
    together, apart = AffinityAccuracy([2]), AffinityAccuracy([2])
    together.update(logits, target)
    for i in range(3):
        apart.update(logits[i : i + 1], target[i : i + 1])
    assert torch.equal(together.correct_count, apart.correct_count)
    assert together.compute().overall == apart.compute().overall
    apart.reset()
    apart.update(logits, torch.full_like(target, 255))
    assert apart.compute().by_category.isnan().all()
    assert apart.compute().overall.isnan()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AffinityAccuracy(8), TypeError, "rates must be a sequence"),
        (lambda: AffinityAccuracy([1], "a"), TypeError, "ignore_index must be an int, got str"),
        (lambda: RefinementReport(8), TypeError, "distances must be a sequence of int, got int"),
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
            TypeError,
            "after must have dtype uint8, int32, int64, got float32",
        ),
    ],
)
def test_bad_input_of_the_torchmetrics(make, error, message):
    with pytest.raises(error, match=message):
        make()


# What a refinement changes


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
    result = report.compute()
    assert torch.equal(torch.stack(result[1:]), expected)
    assert torch.equal(result.changed, expected[1:].sum(dim=0))


def test_an_ignored_band_does_not_hide_a_boundary():
    target = two_halves(8)
    target[:, :, 6:10] = 255
    report = RefinementReport((4, 5))
    report.update(target, target, target)
    # 1, 5 and 5 columns aside: columns 5 and 10 are 5 apart.
    assert report.compute().pixel_count.tolist() == [0, 20, 140]


def test_fractions_and_table():
    target = two_halves(8)
    before, after = target.clone(), target.clone()
    before[0, 0, 7] = after[0, 1, 8] = 3  # one became right, one wrong
    before[0, 2, 7], after[0, 2, 7] = 3, 4  # one stays wrong
    before[0, 3, 0] = 1  # far away, became right
    before[0, 4, 0] = after[0, 4, 0] = 1  # wrong, but not changed
    report = RefinementReport((1, 2))
    report.update(before, after, target)
    result = report.compute()
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


def test_the_torchmetrics_move_collect_and_pickle(device):
    """As others do: in a collection, with their states on the device, and saved."""
    import pickle

    collection = torchmetrics.MetricCollection({"affinity": AffinityAccuracy([1])}).to(device)
    target = two_halves(8).to(device)
    collection.update(perfect_logits(target, [1]), target)
    assert collection["affinity"].correct_count.device.type == device.type
    again = pickle.loads(pickle.dumps(collection["affinity"]))
    assert again.compute().overall == 1
    report = RefinementReport().to(device)
    forward = report(target, target, target)
    assert torch.equal(forward.pixel_count, report.compute().pixel_count)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index"),
    [(torch.uint8, 156, -100), (torch.uint8, 0, 256), (torch.int32, 0, 2**32)],
)
def test_an_ignore_index_that_the_target_cannot_hold_ignores_nothing(dtype, label, ignore_index):
    target = torch.full((1, 2, 6), label).to(dtype)
    target[..., 3:] = 3
    score = BoundaryScore(200, tolerance=0, ignore_index=ignore_index)
    score.update(target, target)
    assert score.compute().recall[[label, 3]].tolist() == [1, 1]
    report = RefinementReport((1,), ignore_index=ignore_index)
    report.update(target, target, target)
    assert report.compute().pixel_count.tolist() == [4, 8]


def test_boundaries_between_labels_that_float32_does_not_tell_apart():
    target = torch.tensor([[[2**24, 2**24, 2**24, 2**24 + 1, 2**24 + 1]]])
    report = RefinementReport((1, 2**40))
    report.update(target, target, target)
    assert report.compute().pixel_count.tolist() == [2, 3, 0]
