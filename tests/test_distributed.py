"""What two processes count, with unequal numbers of images, is what one process counts."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("torchmetrics")
from tritonaff import NeighborStatistics
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU, RefinementReport

RATES = [1, (2, 3)]
SCRIPT = """
import os
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from tritonaff import NeighborStatistics
from tritonaff.metrics import AffinityAccuracy, BoundaryScore, InstanceMeanIoU, RefinementReport

rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.set_num_threads(1)
dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
logits, before, after, target = (x[rank::2] for x in torch.load(folder / "inputs.pt"))
statistics, accuracy = NeighborStatistics(RATES), AffinityAccuracy(RATES)
report, boundary, instances = RefinementReport((1, 3)), BoundaryScore(2), InstanceMeanIoU(2)
for i in range(len(target)):
    images = slice(i, i + 1)
    statistics.update(target[images])
    accuracy.update(logits[images], target[images])
    report.update(before[images], after[images], target[images])
    boundary.update(before[images], target[images])
    instances.update(before[images], target[images], after[images])
statistics.all_reduce()
metrics = accuracy, report, boundary, instances
result = statistics.state_dict(), *(tuple(metric.compute()) for metric in metrics)
torch.save(result, folder / f"{rank}.pt")
dist.barrier()
dist.destroy_process_group()
os._exit(0)  # an ordinary exit now and then aborts in gloo's threads
"""


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 16, 9, 11, generator=generator)
    before, after, target = torch.randint(0, 2, (3, 3, 9, 11), generator=generator)
    return logits, before, after, target.masked_fill(logits[:, 0] > 1, 255)


@pytest.fixture(scope="module", params=[0, 1])
def rank(request):
    return request.param


@pytest.fixture(scope="module")
def results(inputs, tmp_path_factory):
    """Of each rank: a state dict of the statistics, accuracies, refinement, scores, IoUs."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(inputs, folder / "inputs.pt")
    command = [sys.executable, "-c", SCRIPT.replace("RATES", str(RATES))]
    processes = [
        subprocess.Popen([*command, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def test_statistics(inputs, results, rank):
    one = NeighborStatistics(RATES)
    one.update(inputs[-1])
    two = NeighborStatistics(RATES)
    two.load_state_dict(results[rank][0])
    assert torch.equal(two.pixel_count, one.pixel_count)
    assert torch.equal(two.signal_count, one.signal_count)


def test_affinity_accuracy(inputs, results, rank):
    one = AffinityAccuracy(RATES)
    one.update(inputs[0], inputs[-1])
    for values, expected in zip(results[rank][1], one.compute(), strict=True):
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def test_refinement_report(inputs, results, rank):
    one = RefinementReport((1, 3))
    one.update(*inputs[1:])
    distances, *counts = results[rank][2]
    expected_distances, *expected = one.compute()
    assert distances == expected_distances
    for values, by_one in zip(counts, expected, strict=True):
        assert torch.equal(values, by_one)


def test_boundary_score(inputs, results, rank):
    one = BoundaryScore(2)
    one.update(inputs[1], inputs[-1])
    for values, expected in zip(results[rank][3], one.compute(), strict=True):
        assert torch.equal(values, expected)


def test_instance_mean_iou(inputs, results, rank):
    """Rounding aside: IoUs are added up in another order."""
    _, prediction, ids, target = inputs
    one = InstanceMeanIoU(2)
    one.update(prediction, target, ids)
    for values, expected in zip(results[rank][4], one.compute(), strict=True):
        torch.testing.assert_close(values, expected, rtol=1e-15, atol=0)
