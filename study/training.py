"""Training a decoder on the features of the frozen backbone."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import torch
from architecture import STRIDE, Network
from evaluation import confusion, mean_iou
from images import Data, Item, batches
from losses import LOSSES, Batch, CrossEntropy, Facts, Output
from plan import Run
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import affinity_regression_loss
from tritonaff.bench.machine import describe
from tritonaff.version import __version__

LOOKS = 3  # at the validation split, evenly: ce+ar changes its loss right after the second
CURVE = 20  # steps for a point of the curve


def make(
    run: Run, data: Data, backbone: nn.Module, device: torch.device
) -> tuple[Network, CrossEntropy]:
    """Network and loss as a run starts."""
    folder = data.folder
    targets = [folder.target(item, False, run.stride) for item in data.train]
    facts = Facts(len(folder.classes), folder.ignore_index, run.stride, targets)
    criterion = LOSSES[run.loss](facts, run.weight, **dict(run.options))
    torch.manual_seed(run.seed)
    network = Network(backbone, len(folder.classes), criterion.neighbors)
    return network.to(device, memory_format=torch.channels_last), criterion.to(device)


def objective(
    network: Network, criterion: CrossEntropy, x: Any, batch: Batch, progress: Tensor
) -> Tensor:
    output = network(x)
    if output.logits.shape[2:] != batch.target.shape[1:]:
        logits = F.interpolate(output.logits, batch.target.shape[1:], mode="bilinear")
        output = output._replace(logits=logits)
    return criterion(output, batch, progress)


@cache
def compiled_objective() -> Callable:
    """One step for all runs: runs that differ in seed or weight alone share the compiled code."""
    torch._dynamo.config.recompile_limit = 100  # kinds of runs
    return torch.compile(objective, fullgraph=True, dynamic=False)


def make_optimizer(network: Network, criterion: CrossEntropy, run: Run) -> torch.optim.Optimizer:
    groups = [{"params": network.parameters()}, *criterion.optimizer_groups(run.learning_rate)]
    return torch.optim.AdamW(groups, run.learning_rate, weight_decay=1e-4)


def train(
    run: Run,
    data: Data,
    backbone: nn.Module,
    device: torch.device,
    compiled: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Network]:
    """Trains a network: the content of the run's file, and the network."""
    network, criterion = make(run, data, backbone, device)
    optimizer = make_optimizer(network, criterion, run)
    poly = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: (1 - k / run.steps) ** 0.9)
    # Inductor of torch 2.13 loses an order in the backward pass of upsampling on a CPU
    # (pytorch/pytorch#185509): all gradients would be 0.
    compiled = compiled and run.resolution == "logits"
    forward = compiled_objective() if compiled else objective
    source = batches(data, run, device)
    start, times, losses, val = time.perf_counter(), [], [], []
    network.train()
    for step in range(run.steps):
        x, batch = next(source)
        # The progress is a tensor: a Python number that changes would compile again.
        progress = torch.tensor(step / run.steps, device=device)
        before = time.perf_counter()
        loss = forward(network, criterion, x, batch, progress)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())  # waits for the device
        times.append(time.perf_counter() - before)
        poly.step()
        if (step + 1) * LOOKS // run.steps > step * LOOKS // run.steps:
            val.append({"step": step + 1, **look(network, data, device)})
        say(f"step {step + 1}/{run.steps}  loss {losses[-1]:.3f}")
    result = {
        "run": asdict(run),
        "curve": [round(statistics.mean(x), 4) for x in chunks(losses, CURVE)],
        "val": val,
        "parameters": sum(p.numel() for p in network.parameters()),
        "compile_s": round(times[0], 1),
        "step_ms": round(1000 * statistics.median(times), 1),
        "seconds": round(time.perf_counter() - start, 1),
        "machine": machine(device, compiled),
    }
    if run.loss == "ce+aaf":
        result["edge_weight"] = rounded(criterion.field.edge_weight)
        result["non_edge_weight"] = rounded(criterion.field.non_edge_weight)
    return result, network


def chunks(values: Sequence, size: int) -> Iterator[Sequence]:
    return (values[k : k + size] for k in range(0, len(values), size))


def machine(device: torch.device, compiled: bool) -> dict[str, Any]:
    return {
        "device": describe(device),
        "torch": torch.__version__,
        "tritonaff": __version__,
        "compiled": compiled,
    }


def rounded(values: Tensor, digits: int = 4) -> Any:
    """For JSON, null for NaN."""
    if values.dim():
        return [rounded(row, digits) for row in values]
    return None if values.isnan() else round(values.item(), digits)


@torch.inference_mode()
def outputs(
    network: Network, data: Data, items: list[Item], device: torch.device
) -> Iterator[tuple[list[Item], Output]]:
    """Outputs of the network for images, eight at a time."""
    network.eval()
    for some in chunks(items, 8):
        views = [(item, False) for item in some]
        yield some, network(data.folder.features_of(views, device))
    network.train()


def look(network: Network, data: Data, device: torch.device) -> dict[str, float]:
    """The validation split at the logits' resolution: mean IoU, and affinity regression."""
    folder, num_classes = data.folder, len(data.folder.classes)
    table, regression, images = torch.zeros(num_classes, num_classes, dtype=torch.int64), 0.0, 0
    for items, output in outputs(network, data, data.val, device):
        target = np.stack([folder.target(item, False, STRIDE) for item in items])
        prediction = output.logits.argmax(dim=1).cpu()
        table += confusion(prediction, target, num_classes, folder.ignore_index)
        loss = affinity_regression_loss(
            output.logits.cpu(), torch.from_numpy(target), ignore_index=folder.ignore_index
        )
        regression += loss.item() * len(items)
        images += len(items)
    return {"miou": round(mean_iou(table).item(), 5), "ar": round(regression / images, 5)}
