"""Objects that other libraries hand over: subclasses of tensors, sequences of configurations."""

from collections import UserList

import pytest
import torch

import tritonaff
from tritonaff.testing import CASES, evaluate, make_inputs


class Strict(torch.Tensor):
    """A tensor of another library, whose methods are not torch's: one size, given as a tuple."""

    def new_empty(self, size, *, dtype=None, device=None):
        raise TypeError("new_empty of another library")

    new_zeros = new_ones = new_full = new_tensor = new_empty

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.shape.__get__:
            return tuple(result)
        return result


def metatensor(tensor):
    return pytest.importorskip("monai.data").MetaTensor(tensor)


SUBCLASSES = {"strict": lambda tensor: tensor.as_subclass(Strict), "MONAI": metatensor}


@pytest.fixture(params=SUBCLASSES.values(), ids=SUBCLASSES)
def subclass(request):
    return request.param


@pytest.fixture
def portable():
    with tritonaff.use_backend("portable"):
        yield


@pytest.mark.parametrize("backend", ["reference", "portable"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_subclasses_of_tensors(backend, device, subclass, case):
    """Behind the checks, which all backends share, there are plain tensors."""
    inputs = case.make_inputs((2, 32 if "dilated" in case.name else 3, 9, 8), device=device)
    expected = evaluate(case, backend, *inputs)
    result = evaluate(case, backend, *(subclass(x) for x in inputs))
    for name, value in expected.items():
        assert torch.equal(result[name].as_subclass(torch.Tensor), value), name


@pytest.mark.usefixtures("portable")
def test_subclasses_in_everything_else(subclass):
    logits, target = CASES["affinity_field"].make_inputs((2, 3, 9, 8))
    weight = torch.rand(3)
    edge_weight = torch.rand(3, 2)

    def results(of):
        loss = tritonaff.AdaptiveAffinityFieldLoss(3, (3, 5), cross_entropy=True, weight=of(weight))
        dilated = tritonaff.DilatedAffinityLoss([1])
        counted = tritonaff.NeighborStatistics([1])
        counted.update(of(target))
        signals = torch.zeros(2, 8, 9, 8)
        return [
            loss(of(logits), of(target), of(torch.tensor(0.5))),
            loss.normalizer(of(target)),
            tritonaff.affinity_field_loss(
                of(logits),
                of(target),
                (3, 5),
                edge_weight=of(edge_weight),
                normalizer=of(torch.full((2, 2), 100)),
            ),
            dilated(of(signals), of(target), dilated.normalizer(of(target))),
            counted.pixel_count,
            tritonaff.square_root_affinity(of(logits)),
            *tritonaff.label_affinity(of(target)),
            tritonaff.dilated_affinity_target(of(target), [1]),
            tritonaff.neighbor_categories(of(target), [1]),
        ]

    for result, expected in zip(results(subclass), results(lambda x: x), strict=True):
        assert type(result) is torch.Tensor
        assert torch.equal(result, expected)


def configuration(values):
    return pytest.importorskip("omegaconf").OmegaConf.create(list(values))


def array(values):
    return pytest.importorskip("numpy").array(list(values))


@pytest.mark.parametrize("of", [UserList, tuple, configuration, array])
@pytest.mark.usefixtures("portable")
def test_sequences_of_any_kind(of):
    logits, target = CASES["affinity_field"].make_inputs((1, 3, 9, 8))
    affinity_logits = torch.zeros(1, 16, 9, 8)
    rates = of([1, 2])
    pairs = [of([1, 1]), of([2, 2])]
    for given in (rates, UserList(pairs), pairs, *([array(pairs)] if of is array else [])):
        assert tritonaff.expand_rates(given) == ((1, 1), (2, 2))
    tritonaff.dilated_affinity_loss(affinity_logits, target, rates)
    assert tritonaff.AffinityFieldLoss(of([3, 5])).kernel_sizes == (3, 5)
    assert tritonaff.AffinityRegressionLoss(of([3, 2])).grid_sizes == (3, 2)
    loss = tritonaff.AffinityFieldLoss(cross_entropy=True, weight=of([1.0, 2.0, 0.5]))
    assert loss.weight.tolist() == [1.0, 2.0, 0.5]
    head = tritonaff.DilatedAffinityHead(4, rates, of([0.9, 0.8]))
    assert head.positive_frequency == (0.9, 0.8)
    loss(logits, target)


def test_one_integer_is_a_sequence_of_it():
    assert tritonaff.AffinityFieldLoss(3).kernel_sizes == (3,)
    assert tritonaff.AffinityRegressionLoss(12).grid_sizes == (12,)
    assert tritonaff.DilatedAffinityLoss(8).rates == ((8, 8),)
    assert tritonaff.AffinityFieldLoss(range(3, 8, 2)).kernel_sizes == (3, 5, 7)


def test_statistics_are_any_pair_of_counts():
    numpy = pytest.importorskip("numpy")
    logits, target = torch.randn(1, 8, 9, 8), torch.randint(0, 3, (1, 9, 8))
    counts = torch.arange(9)[None], torch.arange(18).view(1, 9, 2)
    expected = tritonaff.dilated_affinity_loss(logits, target, 1, statistics=counts)
    for statistics in (
        UserList(counts),
        [numpy.asarray(count) for count in counts],
    ):
        result = tritonaff.dilated_affinity_loss(logits, target, 1, statistics=statistics)
        assert torch.equal(result, expected)
    for wrong in ("ab", {1: 2, 3: 4}, torch.zeros(2, 9)):
        with pytest.raises(TypeError, match="statistics must be a sequence of two tensors"):
            tritonaff.dilated_affinity_loss(logits, target, 1, statistics=wrong)


DTYPES = (
    "int8",
    "int16",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
)


OTHERS = (
    "affinity_field_sigmoid", "affinity_propagation", "box_pairwise", "instance_affinity",
    "refinement",
)  # fmt: skip
OF_CLASSES = [name for name in CASES if name not in OTHERS]


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("case", [CASES[name] for name in OF_CLASSES], ids=OF_CLASSES)
def test_targets_as_other_libraries_have_them(device, case):
    """nnU-Net's int16, MONAI's channel, masks that are floating point."""
    logits, target, *others = case.make_inputs(
        (1, 32 if "dilated" in case.name else 3, 6, 7), device=device
    )
    target[target == 255] = 0
    expected = case.loss(logits, target, *others)
    for dtype in DTYPES:
        other = target.to(getattr(torch, dtype))
        assert torch.equal(case.loss(logits, other, *others), expected), dtype
        assert torch.equal(case.loss(logits, other[:, None], *others), expected), dtype
    two = target.clamp(max=1)
    assert torch.equal(case.loss(logits, two.bool(), *others), case.loss(logits, two, *others))


@pytest.mark.parametrize("name", ["affinity_field", "affinity_regression", "dilated_affinity"])
def test_nothing_is_ignored(any_backend, device, name):
    """ignore_index=None: every label counts, 255 too, which is no class."""
    make = {
        "affinity_field": lambda index: tritonaff.AffinityFieldLoss((3, 5), ignore_index=index),
        "affinity_regression": lambda index: tritonaff.AffinityRegressionLoss(ignore_index=index),
        "dilated_affinity": lambda index: tritonaff.DilatedAffinityLoss([1, 2], ignore_index=index),
    }[name]
    shape = (2, 16, 9, 8)
    logits, target = make_inputs(shape, device=device)
    target[target == 255] = 0
    with tritonaff.use_backend(any_backend):
        loss = make(None)(logits, target)
        assert torch.equal(loss, make(-7)(logits, target))
        assert not torch.equal(loss, make(3)(logits, target))
    assert "ignore_index=None" in repr(make(None))
    if name != "dilated_affinity":  # where every label of at least 0 counts
        with pytest.raises(ValueError, match=r"target must hold classes in \[0, 16\), got \[255\]"):
            make(None)(logits.cpu(), torch.full_like(target, 255).cpu())
