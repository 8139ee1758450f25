"""The boundary score against hand-made images and a pixel-by-pixel definition."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tritonaff.metrics import BoundaryScore


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
