"""Several processes, with unequal numbers of images and of counted pixels, compute the same as one
process with all images.
"""

import importlib.util

import pytest
import torch
from processes import end_processes, run_processes
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tritonaff
from tritonaff import DilatedAffinityHead, NeighborStatistics, affinity_field_loss
from tritonaff.distributed import all_reduce

RATES = [1, (2, 3)]


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.nightly)])
def size(request):
    return request.param


def share(rank, size, *tensors, in_first=4):
    """Unequal parts of six images; a third process has none."""
    part = [slice(0, in_first), slice(in_first, 6), slice(6, 6)][:size][rank]
    return [tensor[part] for tensor in tensors]


def make_batch():
    """Images with different counts: one has a single label, one nothing, one a few pixels."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(6, 3, 12, 14, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 4, (6, 4, 7), generator=generator)
    target = target.repeat_interleave(3, dim=1).repeat_interleave(2, dim=2)
    target[1] = 2
    target[3] = 255
    target[4, 3:] = 255
    return images, target


def results_of(rank, size):
    return losses_of(rank, size), facts_of(rank, size)


@pytest.fixture(scope="module")
def results(size, tmp_path_factory):
    """Losses and facts of each process."""
    return run_processes(__name__, "results_of", size, tmp_path_factory.mktemp("ranks"))


# ------------------------------------------------------------------------------------ losses

OFFSETS = [(0, 1), (1, 0), (-2, 1), (0, -3)]
LOSSES = {
    "affinity field": lambda group: tritonaff.AffinityFieldLoss((3, 5), process_group=group),
    "adaptive": lambda group: tritonaff.AdaptiveAffinityFieldLoss(4, (3, 7), process_group=group),
    "cross-entropy": lambda group: tritonaff.AffinityFieldLoss(
        (3, 5), cross_entropy=True, process_group=group
    ),
    "authors": lambda group: tritonaff.AffinityFieldLoss(
        (3, 5), variant="authors", process_group=group
    ),
    "regression": lambda group: tritonaff.AffinityRegressionLoss((4, 3), process_group=group),
    "dilated": lambda group: tritonaff.DilatedAffinityLoss(RATES, process_group=group),
    "dilated, signal": lambda group: tritonaff.DilatedAffinityLoss(
        RATES, weighting="signal", process_group=group
    ),
    "instances": lambda group: tritonaff.InstanceAffinityLoss(
        OFFSETS, loss={"bce": 1.0, "mse": 2.0}, balance="clipped", process_group=group
    ),
    "boxes": lambda group: MasksOfImages(group),
    "instances, Dice": lambda group: tritonaff.InstanceAffinityLoss(
        OFFSETS, loss="dice", channels="pooled", process_group=group
    ),
}
# Cross-entropy divides by another number, which a normalizer does not hold; Dice is no sum.
ACCUMULATED = [name for name in LOSSES if name not in ("cross-entropy", "boxes", "instances, Dice")]


class MasksOfImages(nn.Module):
    """The loss of masks from boxes: the first channel is the mask of a box in each image."""

    def __init__(self, group):
        super().__init__()
        self.loss = tritonaff.BoxPairwiseLoss(process_group=group)

    def forward(self, logits, target):
        n = len(logits)
        boxes = torch.tensor([[1, 2, 5, 7]]).expand(n, 4)
        return self.loss(logits[:, 0], target.to(torch.uint8), boxes, torch.arange(n))


class Segmenter(nn.Module):
    """A network with one of the losses; all parameters are random, the same in every process."""

    def __init__(self, name, group=None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.head = DilatedAffinityHead(6, RATES) if "dilated" in name else nn.Conv2d(6, 4, 1)
        self.loss = LOSSES[name](group)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.double()

    def forward(self, images, target):
        return self.loss(self.head(self.features(images).relu()), target)


def plain(module):
    return module


def fully_sharded(module):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    return fully_shard(module, mesh=mesh)


# On CPUs FSDP takes a module through a training step since torch 2.7.
FSDP_STEPS = torch.__version__ >= (2, 7)

WRAPPERS = {"plain": plain, "DDP": DistributedDataParallel, "FSDP2": fully_sharded}


def step(module, images, target):
    """The loss, and the gradients of all parameters, averaged over the processes."""
    loss = module(images, target)
    loss.backward()
    grads = {}
    for name, parameter in module.named_parameters():
        grad = parameter.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        elif dist.is_initialized() and not isinstance(module, DistributedDataParallel):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        grads[name.removeprefix("module.")] = grad
    return loss.detach(), grads


def combinations(size):
    """Some combinations of loss, wrapper and mode; all combinations would take minutes. The wrapped
    module has parameters of its own, "adaptive", or none.
    """
    for name in LOSSES:
        yield name, "plain", "eager"
        yield name, "plain", "no image in the second process"
    if size > 2:
        return
    for name in ("adaptive", "dilated"):
        yield name, "DDP", "eager"
        if FSDP_STEPS:
            yield name, "FSDP2", "eager"
    for name in ("adaptive", "regression", "dilated"):
        yield name, "plain", "compiled"
    yield "adaptive", "DDP", "compiled"
    if FSDP_STEPS:
        yield "adaptive", "FSDP2", "compiled"


def losses_of(rank, size):
    results = {}
    for name, wrapper, mode in combinations(size):
        in_first = 6 if mode.startswith("no image") else 4
        images, target = share(rank, size, *make_batch(), in_first=in_first)
        module = Segmenter(name, dist.group.WORLD)
        if mode == "compiled":
            torch.compiler.reset()
            module.compile(fullgraph=True, backend="aot_eager")
        results[name, wrapper, mode] = step(WRAPPERS[wrapper](module), images, target)
    return results


def test_losses_and_their_gradients(results, size):
    for combination in combinations(size):
        loss, grads = step(Segmenter(combination[0]), *make_batch())
        assert loss > 0.01
        assert all(grad.abs().max() > 1e-5 for grad in grads.values())
        for losses, _ in results:
            value, averages = losses[combination]
            torch.testing.assert_close(value, loss, rtol=1e-12, atol=0, msg=str(combination))
            assert averages.keys() == grads.keys()
            for key, grad in grads.items():
                torch.testing.assert_close(averages[key], grad, rtol=1e-9, atol=1e-14)


# ----------------------------------------------------------------------- around a loss


def facts_of(rank, size):
    """The results that the tests below compare, by name."""
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    facts = {}
    tables = torch.tensor([2**51 + rank, rank]), torch.tensor(0.5 + rank), torch.ones(1, 2, 1)
    facts["tables"] = all_reduce(tables, dist.group.WORLD)

    images, target = share(rank, size, *make_batch())
    with CommDebugMode() as forward:
        loss = Segmenter("adaptive", dist.group.WORLD)(images, target)
    with CommDebugMode() as backward:
        loss.backward()
    facts["collectives"] = forward.get_total_counts(), backward.get_total_counts()

    facts["accumulated"] = accumulated(rank, size)
    facts["copied"] = copies_of(images, target)

    alone, _ = dist.new_subgroups(group_size=1)
    logits = torch.randn(len(target), 4, 12, 14)
    facts["alone"] = [affinity_field_loss(logits, target, process_group=g) for g in (alone, None)]

    facts["some"] = [
        affinity_field_loss(x, target, process_group=dist.group.WORLD).detach()
        for x in (logits, logits.clone().requires_grad_(rank == 0))
    ]

    mesh = dist.init_device_mesh("cpu", (size,))
    sharded = DTensor.from_local(logits, mesh, [Shard(0)])
    facts["errors"] = []
    for loss_fn in (affinity_field_loss, torch.compile(affinity_field_loss, backend="eager")):
        try:
            loss_fn(sharded, target)
        except TypeError as error:
            facts["errors"].append(str(error))
    group = mesh.get_group()
    facts["to_local"] = [
        affinity_field_loss(x, target, process_group=group) for x in (sharded.to_local(), logits)
    ]

    with torch.device("meta"):
        head = DilatedAffinityHead(6, RATES, [0.9, 0.7])
    fully_sharded(head).to_empty(device="cpu")
    head.reset_parameters()
    facts["head"] = [x.detach().full_tensor() for x in (head.bias, head.weight)]

    facts["sharded weights"] = weights_of(fully_sharded(adaptive_loss()))

    if importlib.util.find_spec("torchmetrics"):
        facts["counts"] = counts_of(*share(rank, size, *predictions()))
    return facts


def accumulated(rank, size):
    """Sums of the losses of two micro-batches, with the numbers that this process has counted."""
    images, target = share(rank, size, *make_batch())
    losses = []
    for name in ACCUMULATED:
        module = Segmenter(name, dist.group.WORLD)
        classes = () if name not in ("affinity field", "authors") else (4,)
        normalizer = module.loss.normalizer(target, *classes).int()
        logits = module.head(module.features(images).relu())
        parts = [
            module.loss(logits[part], target[part], normalizer=normalizer)
            for part in (slice(0, 1), slice(1, None))
        ]
        losses.append(sum(parts).detach())
    return losses


def copies_of(images, target):
    """The loss of a module, and the loss of its AveragedModel."""
    module = Segmenter("adaptive", dist.group.WORLD)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    assert averaged.module.loss.process_group is dist.group.WORLD
    assert averaged.module.loss.edge_scores is not module.loss.edge_scores
    return [f(images, target).detach() for f in (module, averaged)]


def adaptive_loss():
    """Fewer classes than there may be processes."""
    loss = tritonaff.AdaptiveAffinityFieldLoss(2, (3, 5, 7))
    generator = torch.Generator().manual_seed(0)
    for parameter in loss.parameters():
        nn.init.normal_(parameter, generator=generator)
    return loss


def weights_of(loss):
    """The weights of the sizes and the sizes in effect, before and after a step."""
    optimizer = torch.optim.SGD([loss.optimizer_group(lr=0.5)], lr=0.1)
    values = []
    for _ in range(2):
        values += [loss.edge_weight, loss.non_edge_weight, *loss.effective_kernel_size()]
        for parameter in loss.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    return [value.detach() for value in values]


def predictions():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 16, 9, 11, generator=generator)
    before, after, target = torch.randint(0, 2, (3, 6, 9, 11), generator=generator)
    return logits, before, after, target.masked_fill(logits[:, 0] > 1, 255)


def counts_of(*tensors):
    """The counts of statistics and metrics, image by image."""
    from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU, RefinementReport

    statistics, accuracy = NeighborStatistics(RATES), AffinityAccuracy(RATES)
    report, boundary, instances = RefinementReport((1, 3)), BoundaryScore(2), InstanceMeanIoU(2)
    for logits, before, after, target in zip(*tensors, strict=True):
        statistics.update(target[None])
        accuracy.update(logits[None], target[None])
        report.update(before[None], after[None], target[None])
        boundary.update(before[None], target[None])
        instances.update(before[None], target[None], after[None])
    if dist.is_initialized():
        statistics.all_reduce()
    counts = statistics.pixel_count, statistics.signal_count
    metrics = accuracy, report, boundary, instances
    scalars = [value for metric in metrics for value in metric.compute().values()]
    by_class = *boundary.by_class(), instances.by_class()
    return [*counts, *scalars, accuracy.by_category(), *report.report()[1:], *by_class]


@pytest.fixture
def facts(results):
    return [facts for _, facts in results]


def test_counts_are_exact_and_tables_keep_shape_and_dtype(facts, size):
    ranks = sum(range(size))
    expected = (
        torch.tensor([size * 2**51 + ranks, ranks]),
        torch.tensor(0.5 * size + ranks),
        torch.full((1, 2, 1), float(size)),
    )
    for by_rank in facts:
        for table, total in zip(by_rank["tables"], expected, strict=True):
            torch.testing.assert_close(table, total, rtol=0, atol=0)


def test_collectives_of_a_loss_and_none_for_its_gradient(facts):
    """The all-reduces of the affinity field: counts, then sums."""
    for by_rank in facts:
        assert by_rank["collectives"] == (2, 0)


def test_normalizers_of_several_processes(facts):
    for by_rank in facts:
        for name, value in zip(ACCUMULATED, by_rank["accumulated"], strict=True):
            loss = Segmenter(name)(*make_batch()).detach()
            torch.testing.assert_close(value, loss, rtol=1e-12, atol=0, msg=name)


def test_copies_share_the_group(facts):
    for by_rank in facts:
        torch.testing.assert_close(*by_rank["copied"], rtol=0, atol=0)


def test_a_group_of_one_process_changes_nothing(facts):
    for by_rank in facts:
        torch.testing.assert_close(*by_rank["alone"])


def test_some_processes_may_want_no_gradient(facts):
    """Processes without a gradient send as many numbers as the others."""
    for by_rank in facts:
        torch.testing.assert_close(*by_rank["some"])


def test_distributed_logits_are_refused_with_the_remedy(facts):
    for by_rank in facts:
        assert len(by_rank["errors"]) == 2
        for message in by_rank["errors"]:
            assert "logits must be a tensor of this process alone, got a DTensor" in message
            assert "pass logits.to_local(); a loss takes all processes" in message
        torch.testing.assert_close(*by_rank["to_local"], rtol=0, atol=0)


def test_a_sharded_head_starts_as_an_ordinary_one(facts):
    expected = DilatedAffinityHead(6, RATES, [0.9, 0.7])
    for by_rank in facts:
        bias, weight = by_rank["head"]
        torch.testing.assert_close(bias, expected.bias.detach(), rtol=0, atol=0)
        assert weight.std().item() == pytest.approx(0.01, rel=0.3)


def test_a_sharded_loss_shows_its_weights(facts):
    expected = weights_of(adaptive_loss())
    assert not torch.equal(expected[0], expected[4])
    for by_rank in facts:
        torch.testing.assert_close(by_rank["sharded weights"], expected, rtol=0, atol=0)


def test_statistics_and_metrics(facts):
    pytest.importorskip("torchmetrics")
    expected = counts_of(*predictions())
    for by_rank in facts:
        for values, by_one in zip(by_rank["counts"], expected, strict=True):
            # Counts are exact; IoUs are added up in another order.
            torch.testing.assert_close(values, by_one, rtol=1e-15, atol=0, equal_nan=True)


def refusals(group):
    """Calls of the losses with one wrong argument each, by the mistake."""
    logits, affinity_logits = torch.zeros(1, 3, 4, 5), torch.zeros(1, 8, 4, 5)
    target = torch.zeros(1, 4, 5, dtype=torch.long)
    wrong = torch.ones(7)

    def field(**options):
        tritonaff.affinity_field_cross_entropy(logits, target, process_group=group, **options)

    def dilated(**options):
        options = {"rates": [1], "process_group": group, **options}
        tritonaff.dilated_affinity_loss(affinity_logits, target, **options)

    module = tritonaff.AffinityFieldLoss(process_group=group)
    regression = tritonaff.AffinityRegressionLoss(process_group=group)
    there = torch.zeros(1, 9, device="meta").long(), torch.zeros(1, 9, 2, device="meta").long()
    return {
        "edge_weight": lambda: field(edge_weight=wrong),
        "non_edge_weight": lambda: field(non_edge_weight=wrong),
        "weight": lambda: field(weight=wrong),
        "margin": lambda: field(margin=-1.0),
        "eps": lambda: field(eps=1.0),
        "variant": lambda: field(variant="other"),
        "edge_lambda": lambda: field(edge_lambda=-1.0),
        "ignore_index": lambda: field(ignore_index=1.5),
        "progress": lambda: module(logits, target, progress=2.0),
        "normalizer": lambda: module(logits, target, normalizer=wrong),
        "normalizer of regression": lambda: regression(logits, target, normalizer=wrong),
        "normalizer of dilated": lambda: dilated(normalizer=wrong),
        "statistics": lambda: dilated(statistics=(wrong, wrong)),
        "statistics elsewhere": lambda: dilated(statistics=there),
        "gamma": lambda: dilated(gamma=-1.0),
        "beta": lambda: dilated(beta=-1.0),
        "weighting": lambda: dilated(weighting="other"),
    }


def refused_alone(rank, size):
    """The second process refuses all bad calls; the first process makes no call."""
    if rank == 1:
        for name, call in refusals(dist.group.WORLD).items():
            with pytest.raises((TypeError, ValueError), match=f"^{name.split()[0]}"):
                call()


def test_everything_is_checked_before_the_first_collective(tmp_path):
    """An extra collective would wait for the other process, and meet its next collective."""
    run_processes(__name__, "refused_alone", 2, tmp_path)


def wrong_in_one(rank, size):
    weight = torch.ones(3 - rank, 1)
    target = torch.zeros(1, 4, 5, dtype=torch.long)
    return affinity_field_loss(
        torch.zeros(1, 3, 4, 5), target, edge_weight=weight, process_group=dist.group.WORLD
    )


def test_a_process_that_refuses_lets_the_others_end(tmp_path):
    (right, lost), (wrong, refused) = end_processes(__name__, "wrong_in_one", 2, tmp_path)
    assert right != 0
    assert wrong != 0
    assert "edge_weight must have shape (3, 1), got (2, 1)" in refused
    assert "edge_weight" not in lost.splitlines()[-1]


@pytest.mark.parametrize("group", ["world", 3, object()])
def test_what_is_no_group(group):
    with pytest.raises(TypeError, match="process_group must be None or a"):
        affinity_field_loss(
            torch.zeros(1, 2, 3, 3), torch.zeros(1, 3, 3).long(), process_group=group
        )
    for make_loss in LOSSES.values():
        with pytest.raises(TypeError, match="process_group must be None or a"):
            make_loss(group)
