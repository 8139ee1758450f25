"""Every public function, every kind of bad input: the class of the error and its message."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from versions import not_in_torch_2_6, wording

import tritonaff
from tritonaff.testing import CASES

LOGITS = torch.zeros(2, 3, 4, 5)
NO_CLASSES, ONE_CLASS = LOGITS[:, :0], LOGITS[:, :1]
TARGET = torch.zeros(2, 4, 5, dtype=torch.long)

BAD_TENSORS = {
    "logits no tensor": ([[0.0]], TARGET, TypeError, "logits must be a tensor, got list"),
    "logits integer": (LOGITS.long(), TARGET, TypeError, "logits must have dtype .* got int64"),
    "logits complex": (LOGITS + 0j, TARGET, TypeError, "logits must have dtype .* got complex64"),
    "logits sparse": (LOGITS.to_sparse(), TARGET, TypeError, "logits must be a dense tensor"),
    "logits rank": (LOGITS[0], TARGET, ValueError, r"logits must have shape \(N, C, H, W\), got"),
    "logits empty": (LOGITS[..., :0], TARGET[..., :0], ValueError, "at least one class, row and"),
    "no classes": (NO_CLASSES, TARGET, ValueError, "at least one class, row and column"),
    "target no tensor": (LOGITS, [[0]], TypeError, "target must be a tensor, got list"),
    "target complex": (LOGITS, TARGET + 0j, TypeError, "target must have dtype .* got complex64"),
    "target soft": (
        LOGITS,
        TARGET + 0.5,
        ValueError,
        r"target must hold whole .* got \[0.5.* at 40",
    ),
    "target nan": (LOGITS, TARGET / 0.0, ValueError, "target must hold whole numbers, got .nan"),
    "one class": (ONE_CLASS, TARGET, ValueError, r"two classes, got 1.*cat\(\(torch.zeros_like"),
    "target rank": (LOGITS, TARGET[0], ValueError, r"target must have shape \(N, H, W\), got"),
    "target channels": (LOGITS, LOGITS.long(), ValueError, r"must have shape \(N, H, W\), got"),
    "target size": (LOGITS, TARGET[:, :3], ValueError, r"\(2, 4, 5\) of logits .* got \(2, 3, 5\)"),
    "target batch": (LOGITS, TARGET[:1], ValueError, r"\(2, 4, 5\) of logits .* got \(1, 4, 5\)"),
    "label too large": (LOGITS, TARGET + 3, ValueError, r"classes in \[0, 3\).*got \[3\] at 40"),
    "label negative": (LOGITS, TARGET - 1, ValueError, r"classes in \[0, 3\).*got \[-1\]"),
    "label -100": (LOGITS, TARGET - 100, ValueError, "torch's own .* pass ignore_index=-100"),
    "devices": (LOGITS, TARGET.to("meta"), ValueError, "one device, got cpu and meta"),
}
BAD_OPTIONS = {
    "sizes no sequence": ({"kernel_sizes": 3.0}, TypeError, "kernel_sizes must be a sequence"),
    "sizes a string": ({"kernel_sizes": "35"}, TypeError, "kernel_sizes must be a sequence"),
    "sizes no int": ({"kernel_sizes": (3.0,)}, TypeError, "kernel_sizes must be an int, got float"),
    "sizes empty": ({"kernel_sizes": ()}, ValueError, "kernel_sizes must be odd, at least 3"),
    "sizes even": ({"kernel_sizes": (3, 4)}, ValueError, r"must be odd.*got \(3, 4\)"),
    "sizes small": ({"kernel_sizes": (1,)}, ValueError, "must be odd, at least 3"),
    "sizes twice": ({"kernel_sizes": (3, 3)}, ValueError, "distinct"),
    "sizes huge": ({"kernel_sizes": (2**64 + 1,)}, ValueError, "must fit 64 bits, got"),
    "margin": ({"margin": -1.0}, ValueError, r"margin must be in \[0, inf\), got -1.0"),
    "margin nan": ({"margin": float("nan")}, ValueError, "margin must be in"),
    "margin infinite": ({"margin": float("inf")}, ValueError, "margin must be in"),
    "margin type": ({"margin": "3"}, TypeError, "margin must be a number, got str"),
    "eps zero": ({"eps": 0.0}, ValueError, r"eps must be in .*, 0.5\), got 0.0"),
    "eps half": ({"eps": 0.5}, ValueError, r"eps must be in .*, 0.5\), got 0.5"),
    "ignore_index": ({"ignore_index": 1.5}, TypeError, "ignore_index must be an int, got float"),
    "ignore_index huge": ({"ignore_index": 2**70}, ValueError, "ignore_index must fit 64 bits"),
    "variant": ({"variant": "other"}, ValueError, "variant must be one of .* got 'other'"),
}
BAD_LOSS_OPTIONS = {
    **BAD_OPTIONS,
    "edge_lambda": ({"edge_lambda": -1}, ValueError, r"edge_lambda must be in \[0"),
    "non_edge_lambda": ({"non_edge_lambda": None}, TypeError, "must be a number, got NoneType"),
}
BAD_WEIGHTS = {
    "no tensor": (1.0, TypeError, "must be a tensor, got float"),
    "integer": (torch.ones(3, 1, dtype=torch.long), TypeError, "must have dtype .* got int64"),
    "shape": (torch.ones(3, 2), ValueError, r"must have shape \(3, 1\), got \(3, 2\)"),
    "device": (torch.ones(3, 1, device="meta"), ValueError, "one device, got meta and cpu"),
}


FUNCTIONS = {
    "terms": tritonaff.affinity_field_terms,
    "loss": tritonaff.affinity_field_loss,
    "module": tritonaff.AffinityFieldLoss(),
    "adaptive module": tritonaff.AdaptiveAffinityFieldLoss(3),
    "regression terms": tritonaff.affinity_regression_terms,
    "regression loss": tritonaff.affinity_regression_loss,
    "regression module": tritonaff.AffinityRegressionLoss(),
}


def cases(table):
    return pytest.mark.parametrize("bad", table.values(), ids=table.keys())


@cases(BAD_TENSORS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_tensors(function, bad):
    logits, target, error, message = bad
    adaptive = isinstance(function, tritonaff.AdaptiveAffinityFieldLoss)
    if adaptive and (logits is NO_CLASSES or logits is ONE_CLASS):
        message = f"num_classes = 3 classes, got {logits.shape[1]}"
    with pytest.raises(error, match=message):
        function(logits, target)


@cases(BAD_OPTIONS)
def test_options_of_terms(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        tritonaff.affinity_field_terms(LOGITS, TARGET, **options)


@cases(BAD_LOSS_OPTIONS)
def test_options_of_the_loss(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        tritonaff.affinity_field_loss(LOGITS, TARGET, **options)


@cases(BAD_LOSS_OPTIONS)
def test_options_of_the_modules(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        tritonaff.AffinityFieldLoss(**options)
    with pytest.raises(error, match=message):
        tritonaff.AdaptiveAffinityFieldLoss(3, **options)


BAD_GRIDS = {
    "no sequence": (
        {"grid_sizes": 12.0},
        TypeError,
        "grid_sizes must be a sequence of int or None",
    ),
    "a string": ({"grid_sizes": "12"}, TypeError, "grid_sizes must be a sequence of int or None"),
    "no int": ({"grid_sizes": (6.0,)}, TypeError, "grid_sizes must be an int, got float"),
    "empty": ({"grid_sizes": ()}, ValueError, "at least one size, or be None"),
    "zero": ({"grid_sizes": (12, 0)}, ValueError, "grid_sizes must be at least 1, got 0"),
    "huge": ({"grid_sizes": (12, 5000)}, ValueError, "at most 16777216 points, got 25000144"),
    "negative": ({"grid_sizes": (-6,)}, ValueError, "grid_sizes must be at least 1, got -6"),
}


@cases(BAD_GRIDS)
def test_grid_sizes(bad):
    options, error, message = bad
    for function in (tritonaff.affinity_regression_terms, tritonaff.affinity_regression_loss):
        with pytest.raises(error, match=message):
            function(LOGITS, TARGET, **options)
    with pytest.raises(error, match=message):
        tritonaff.AffinityRegressionLoss(**options)
    with pytest.raises(error, match=message):
        tritonaff.square_root_affinity(LOGITS, **options)
    with pytest.raises(error, match=message):
        tritonaff.label_affinity(TARGET, **options)


def test_ignore_index_of_affinity_regression():
    for function in (
        lambda ignore_index: tritonaff.AffinityRegressionLoss(ignore_index=ignore_index),
        lambda ignore_index: tritonaff.affinity_regression_loss(
            LOGITS, TARGET, ignore_index=ignore_index
        ),
        lambda ignore_index: tritonaff.label_affinity(TARGET, ignore_index=ignore_index),
    ):
        with pytest.raises(TypeError, match="ignore_index must be an int, got float"):
            function(1.5)


@pytest.mark.parametrize("name", ["logits no tensor", "logits integer", "logits rank"])
def test_logits_of_the_square_root_affinity(name):
    logits, _, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message):
        tritonaff.square_root_affinity(logits)
    with pytest.raises(ValueError, match="logits must have at least one class, row and column"):
        tritonaff.square_root_affinity(NO_CLASSES)


def test_target_of_the_label_affinity():
    with pytest.raises(ValueError, match="target must hold whole numbers"):
        tritonaff.label_affinity(TARGET + 0.5)
    with pytest.raises(ValueError, match=r"target must have shape \(N, H, W\)"):
        tritonaff.label_affinity(TARGET[0])
    with pytest.raises(ValueError, match="target must have at least one row and column"):
        tritonaff.label_affinity(TARGET[:, :0])
    with pytest.raises(ValueError, match=r"classes in \[0, inf\) or ignore_index 255, got \[-1\]"):
        tritonaff.label_affinity(TARGET - 1)
    tritonaff.label_affinity(TARGET - 1, ignore_index=-1)


@cases(BAD_WEIGHTS)
@pytest.mark.parametrize("name", ["edge_weight", "non_edge_weight"])
def test_weights(name, bad):
    weight, error, message = bad
    with pytest.raises(error, match=f"{name}.*{message}"):
        tritonaff.affinity_field_loss(LOGITS, TARGET, **{name: weight})


def test_number_of_classes_of_the_adaptive_module():
    with pytest.raises(TypeError, match="num_classes must be an int, got float"):
        tritonaff.AdaptiveAffinityFieldLoss(3.0)
    with pytest.raises(ValueError, match=r"at least 2, got 1: .*sigmoid.* torch.cat"):
        tritonaff.AdaptiveAffinityFieldLoss(1)
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        tritonaff.AffinityFieldLoss().normalizer(TARGET, 0)
    with pytest.raises(ValueError, match="num_classes = 4 classes, got 3"):
        tritonaff.AdaptiveAffinityFieldLoss(4)(LOGITS, TARGET)


@pytest.mark.parametrize(
    ("progress", "error"),
    [
        (-0.1, ValueError),
        (1.1, ValueError),
        ("half", TypeError),
        (torch.zeros(2), ValueError),
        (torch.tensor(True), TypeError),
        (torch.tensor(5.0), ValueError),
        (torch.tensor(-0.1), ValueError),
    ],
)
def test_progress(progress, error):
    with pytest.raises(error, match="progress must"):
        tritonaff.AffinityFieldLoss()(LOGITS, TARGET, progress)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=not_in_torch_2_6("drops assertions"))]
)
def test_labels_are_asserted_where_they_may_not_be_looked_at(monkeypatch, backend):
    """The assertions of TRITONAFF_CHECK=1, without a graph break."""
    monkeypatch.setattr(tritonaff.checks, "ASSERT_LABELS", True)

    def loss(logits, target):
        affinity_logits = torch.zeros(2, 8, 4, 5)
        terms = tritonaff.affinity_field_loss(logits, target, ignore_index=9)
        return terms + tritonaff.dilated_affinity_loss(affinity_logits, target, 1, ignore_index=9)

    with tritonaff.use_backend("portable"):
        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        assert compiled(LOGITS, TARGET + 2) == loss(LOGITS, TARGET + 2)
        assert compiled(LOGITS, TARGET + 9) == 0
        for wrong in (3, -1):
            with pytest.raises(RuntimeError, match=r"target must hold classes in \[0, 3\)"):
                compiled(LOGITS, TARGET + wrong)
        compiled = torch.compile(tritonaff.dilated_affinity_loss, backend=backend, fullgraph=True)
        with pytest.raises(RuntimeError, match=r"target must hold classes in \[0, inf\)"):
            compiled(torch.zeros(2, 8, 4, 5), TARGET - 1, 1)


def test_labels_of_a_subclass_are_looked_at_too():
    class Mask(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=r"got \[3\] at 40 pixels"):
        tritonaff.affinity_field_loss(LOGITS, (TARGET + 3).as_subclass(Mask))


def test_tensors_without_values_are_not_looked_into():
    with FakeTensorMode():
        logits, affinity_logits = torch.empty(2, 3, 4, 5), torch.empty(2, 8, 4, 5)
        target, progress = torch.empty(2, 4, 5, dtype=torch.long), torch.empty(())
        losses = (
            tritonaff.AffinityFieldLoss()(logits, target, progress),
            tritonaff.affinity_regression_loss(logits, target),
            tritonaff.dilated_affinity_loss(affinity_logits, target, [1]),
        )
    assert [loss.shape for loss in losses] == [()] * 3


def test_learning_rate():
    with pytest.raises(ValueError, match="lr must be in"):
        tritonaff.AdaptiveAffinityFieldLoss(3).optimizer_group(-1.0)


def test_labels_outside_the_classes_are_ignored_by_the_authors_variant_and_under_compile():
    torch.manual_seed(0)
    logits = torch.randn(1, 3, 6, 6)
    target = torch.randint(0, 3, (1, 6, 6))
    void, wrong = target.clone(), target.clone()
    void[0, 2, 3], wrong[0, 2, 3] = 255, 77
    for function, variant in (
        (tritonaff.affinity_field_loss, "authors"),
        (torch.compile(tritonaff.affinity_field_loss, backend="eager"), "paper"),
    ):
        result = function(logits, wrong, variant=variant)
        assert torch.equal(result, function(logits, void, variant=variant))


AFFINITY = torch.zeros(2, 8, 4, 5)
BAD_PROPAGATION_TENSORS = {
    "probs no tensor": ([[0.5]], AFFINITY, TypeError, "probs must be a tensor, got list"),
    "probs integer": (LOGITS.long(), AFFINITY, TypeError, "probs must have dtype .* got int64"),
    "probs rank": (LOGITS[0], AFFINITY, ValueError, r"probs must have shape \(N, C, H, W\), got"),
    "no classes": (NO_CLASSES, AFFINITY, ValueError, "probs must have at least one class, row"),
    "affinity no tensor": (LOGITS, 1.0, TypeError, "affinity must be a tensor, got float"),
    "affinity bool": (LOGITS, AFFINITY > 0, TypeError, "affinity must have dtype .* got bool"),
    "affinity sparse": (LOGITS, AFFINITY.to_sparse(), TypeError, "must be a dense tensor"),
    "affinity rank": (LOGITS, AFFINITY[0], ValueError, r"must have shape \(N, 8 R, H, W\), got"),
    "affinity channels": (
        LOGITS,
        AFFINITY[:, :7],
        ValueError,
        r"\(2, 8, 4, 5\) of R = 1 rates and probs \(2, 3, 4, 5\), got \(2, 7, 4, 5\)",
    ),
    "affinity size": (LOGITS, AFFINITY[..., :4], ValueError, r"got \(2, 8, 4, 4\)"),
    "affinity batch": (LOGITS, AFFINITY[:1], ValueError, r"got \(1, 8, 4, 5\)"),
    "devices": (LOGITS, AFFINITY.to("meta"), ValueError, "probs and affinity must be on one dev"),
}
BAD_PROPAGATION_OPTIONS = {
    "rates": ({"rates": 8.0}, TypeError, "rates must be a sequence"),
    "rates empty": ({"rates": []}, ValueError, "rates must be at least 1 and distinct"),
    "rates twice": ({"rates": [(2, 2), 2]}, ValueError, "rates must be at least 1 and distinct"),
    "iterations": ({"iterations": -1}, ValueError, "iterations must be at least 0, got -1"),
    "iterations type": ({"iterations": 1.0}, TypeError, "iterations must be an int, got float"),
    "self_weight": ({"self_weight": -1}, ValueError, r"self_weight must be in \[0, inf\), got -1"),
    "self_weight type": ({"self_weight": "6"}, TypeError, "self_weight must be a number, got str"),
    "steepness": ({"steepness": 1.0}, ValueError, r"steepness must be in \(1, inf\), got 1.0"),
    "steepness infinite": ({"steepness": float("inf")}, ValueError, "steepness must be in"),
    "from_logits": ({"from_logits": 1}, TypeError, "from_logits must be a bool, got int"),
    "normalize": ({"normalize": None}, ValueError, "normalize must be one of .* got None"),
    "border": ({"border": "reflect"}, ValueError, "border must be one of .* got 'reflect'"),
}


@cases(BAD_PROPAGATION_TENSORS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_tensors_of_propagation(backend, bad):
    probs, affinity, error, message = bad
    with tritonaff.use_backend(backend), pytest.raises(error, match=message):
        tritonaff.affinity_propagation(probs, affinity, [1])
    with tritonaff.use_backend(backend), pytest.raises(error, match=message):
        tritonaff.AffinityPropagation([1])(probs, affinity)


@cases(BAD_PROPAGATION_OPTIONS)
def test_options_of_propagation(bad):
    options, error, message = bad
    options = {"rates": [1], **options}
    with pytest.raises(error, match=message):
        tritonaff.affinity_propagation(LOGITS, AFFINITY, **options)
    with pytest.raises(error, match=message):
        tritonaff.AffinityPropagation(**options)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()


@wording
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["logits integer", "logits rank", "target size", "target complex"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_the_same_error_under_compile(name, function):
    logits, target, error, message = BAD_TENSORS[name]
    with pytest.raises(error, match=message):
        torch.compile(function, backend="eager")(logits, target)


@wording
@pytest.mark.usefixtures("fresh_compiler")
@cases(
    {**BAD_LOSS_OPTIONS, "weight": ({"edge_weight": torch.ones(2, 2)}, ValueError, "edge_weight")}
)
def test_the_same_error_of_options_under_compile(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        torch.compile(tritonaff.affinity_field_loss, backend="eager")(LOGITS, TARGET, **options)


@wording
@pytest.mark.usefixtures("fresh_compiler")
@cases(BAD_PROPAGATION_OPTIONS)
def test_the_same_error_of_propagation_options_under_compile(bad):
    options, error, message = bad
    with pytest.raises(error, match=message):
        torch.compile(tritonaff.affinity_propagation, backend="eager")(
            LOGITS, AFFINITY, **{"rates": [1], **options}
        )


@wording
@pytest.mark.usefixtures("fresh_compiler")
@cases(BAD_PROPAGATION_TENSORS)
def test_the_same_error_of_propagation_tensors_under_compile(bad):
    probs, affinity, error, message = bad
    with pytest.raises(error, match=message):
        torch.compile(tritonaff.affinity_propagation, backend="eager")(probs, affinity, [1])


def test_numpy_numbers_are_numbers():
    numpy = pytest.importorskip("numpy")
    sizes = [numpy.int64(3), numpy.int32(5)]
    loss = tritonaff.AdaptiveAffinityFieldLoss(
        numpy.int64(3), sizes, ignore_index=numpy.uint8(255), margin=numpy.float32(2)
    )
    # Rounding: logits are all equal, and equal numbers are added up and subtracted.
    assert loss(LOGITS, TARGET).abs() < 1e-7


@wording
@pytest.mark.usefixtures("fresh_compiler")
def test_fullgraph_errors_carry_the_message():
    compiled = torch.compile(tritonaff.affinity_field_loss, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="kernel_sizes must be odd"):
        compiled(LOGITS, TARGET, kernel_sizes=(4,))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_mode_derivatives(case):
    """A custom op would give 0."""
    inputs = case.make_inputs((1, 8, 6, 6) if "dilated" in case.name else (1, 3, 6, 6))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(TypeError, match="must be no dual tensor"):
            case.loss(dual, *inputs[1:])


def test_a_nested_tensor():
    with pytest.raises(TypeError, match="must be a dense tensor, got a nested tensor"):
        tritonaff.affinity_field_loss(torch.nested.nested_tensor([LOGITS[0]]), TARGET)


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        ([1.0, 2.0], ValueError, r"weight must have shape \(3,\), got \(2,\)"),
        ("12", TypeError, "weight must be a tensor, got str"),
        (torch.ones(3, 1), ValueError, r"weight must have shape \(C,\), got \(3, 1\)"),
    ],
)
def test_class_weights(weight, error, message):
    with pytest.raises(error, match=message):
        tritonaff.AdaptiveAffinityFieldLoss(3, cross_entropy=True, weight=weight)


def test_the_old_name_of_weight_warns():
    with pytest.warns(DeprecationWarning, match="class_weight is now weight"):
        loss = tritonaff.AffinityFieldLoss(cross_entropy=True, class_weight=[1.0, 2.0, 0.5])
    assert loss.weight.tolist() == [1.0, 2.0, 0.5]
    with (
        pytest.warns(DeprecationWarning, match="class_weight is now weight"),
        pytest.raises(ValueError, match="class_weight and weight are one argument"),
    ):
        tritonaff.AdaptiveAffinityFieldLoss(
            3, cross_entropy=True, weight=[1.0, 2.0, 0.5], class_weight=[1.0, 2.0, 0.5]
        )


def test_weights_of_another_number_of_classes():
    loss = tritonaff.AffinityFieldLoss(cross_entropy=True, weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=r"^weight must have shape \(3,\), got \(2,\)"):
        loss(LOGITS, TARGET)
    with pytest.raises(ValueError, match=r"^weight must have shape \(3,\), got \(2,\)"):
        tritonaff.affinity_field_cross_entropy(LOGITS, TARGET, weight=torch.ones(2))


def test_weights_elsewhere_say_what_to_do():
    loss = tritonaff.AdaptiveAffinityFieldLoss(3).to("meta")
    with pytest.raises(ValueError, match=r"got meta and cpu; .* loss.to\(device\)"):
        loss(LOGITS, TARGET)
