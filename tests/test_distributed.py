"""What several processes compute, with unequal numbers of images and of pixels that count, is what
one process computes of all of them.
"""

import pytest
import torch
from processes import run_processes
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tritonaff import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
    AffinityRegressionLoss,
    DilatedAffinityHead,
    DilatedAffinityLoss,
    NeighborStatistics,
    affinity_field_loss,
    affinity_regression_loss,
    dilated_affinity_loss,
)
from tritonaff.distributed import all_reduce

RATES = [1, (2, 3)]


@pytest.fixture(scope="module", params=[2, 3])
def size(request):
    return request.param


def shares(size):
    """Unequal parts of six images; the third process has none."""
    return [slice(0, 4), slice(4, 6), slice(6, 6)][:size]


# ------------------------------------------------------------------------------------ losses


class Segmenter(nn.Module):
    """A network with an affinity head, and a loss of what they say."""

    def __init__(self, loss_fn):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.features = nn.Conv2d(3, 6, 3, padding=1)
        self.classify = nn.Conv2d(6, 4, 1)
        self.affinity = DilatedAffinityHead(6, RATES)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)
        self.loss_fn = loss_fn

    def forward(self, images, target):
        features = self.features(images).relu()
        head = self.affinity if isinstance(self.loss_fn, DilatedAffinityLoss) else self.classify
        return self.loss_fn(head(features), target)


def make_segmenters(group):
    losses = {
        "affinity field": AffinityFieldLoss((3, 5), process_group=group),
        "adaptive": AdaptiveAffinityFieldLoss(4, (3, 7), process_group=group),
        "authors": AffinityFieldLoss((3, 5), variant="authors", process_group=group),
        "regression": AffinityRegressionLoss((4, 3), process_group=group),
        "dilated": DilatedAffinityLoss(RATES, process_group=group),
    }
    # One optimiser step away from the start, where all sizes weigh the same.
    for scores in losses["adaptive"].parameters():
        nn.init.normal_(scores, generator=torch.Generator().manual_seed(1))
    return {name: Segmenter(loss_fn).double() for name, loss_fn in losses.items()}


def make_batch():
    """Images that differ in what counts: one of a single label, one of none, few pixels of one."""
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(6, 3, 12, 14, dtype=torch.float64, generator=generator)
    target = torch.randint(0, 4, (6, 4, 7), generator=generator)
    target = target.repeat_interleave(3, dim=1).repeat_interleave(2, dim=2)
    target[1] = 2
    target[3] = 255
    target[4, 3:] = 255
    return images, target


def plain(segmenter):
    return segmenter


def distributed_data_parallel(segmenter):
    # A network with two heads and one loss: one of them gets no gradient.
    return DistributedDataParallel(segmenter, find_unused_parameters=True)


def fully_sharded(segmenter):
    from torch.distributed.fsdp import fully_shard

    fully_shard(segmenter, mesh=torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),)))
    return segmenter


def step(module, images, target):
    """The loss, and the gradients of all parameters, averaged over the processes."""
    module.zero_grad()
    loss = module(images, target)
    loss.backward()
    grads = {}
    for name, parameter in module.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if hasattr(grad, "full_tensor"):
            grad = grad.full_tensor()
        elif dist.is_initialized() and not isinstance(module, DistributedDataParallel):
            dist.all_reduce(grad)
            grad /= dist.get_world_size()
        grads[name.removeprefix("module.")] = grad.detach().clone()
    return loss.detach(), grads


def losses_of(rank, size, folder):
    images, target = (part[shares(size)[rank]] for part in make_batch())
    results = {}
    for wrap in (plain, distributed_data_parallel, fully_sharded):
        for name, segmenter in make_segmenters(dist.group.WORLD).items():
            results[wrap.__name__, "eager", name] = step(wrap(segmenter), images, target)
            torch.compiler.reset()
            fast = make_segmenters(dist.group.WORLD)[name]
            fast.compile(fullgraph=True, backend="aot_eager")
            results[wrap.__name__, "compiled", name] = step(wrap(fast), images, target)
    return results


@pytest.fixture(scope="module")
def results(size, tmp_path_factory):
    return run_processes(__name__, "losses_of", size, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("wrap", ["plain", "distributed_data_parallel", "fully_sharded"])
@pytest.mark.parametrize("name", list(make_segmenters(None)))
def test_losses(results, name, wrap, mode):
    loss, grads = step(make_segmenters(None)[name], *make_batch())
    assert loss > 0.01
    assert sum(grad.abs().max() > 1e-4 for grad in grads.values()) >= 4
    for by_rank in results:
        value, averages = by_rank[wrap, mode, name]
        torch.testing.assert_close(value, loss, rtol=1e-12, atol=0)
        assert averages.keys() == grads.keys()
        for key, grad in grads.items():
            torch.testing.assert_close(averages[key], grad, rtol=1e-9, atol=1e-14)
