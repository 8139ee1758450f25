"""One training in several processes, as torchrun starts them, that computes what one would."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn
from torch import distributed as dist

# Private, but differentiable and traced by torch.compile: no public collective is both.
from torch.distributed._functional_collectives import all_reduce


def join() -> torch.device:
    """Meets the other processes, if torchrun has started any; the device to compute on."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        dist.barrier()  # all are connected before the first one may leave
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()  # or an exit now and then aborts in gloo's threads


def group() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def add_up(table: Tensor) -> Tensor:
    """Over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(table)
    return table


class BatchNorm2d(nn.BatchNorm2d):
    """Normalises by mean and variance over the images of all processes. torch.nn.SyncBatchNorm does
    so on GPUs alone.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        count = x.new_tensor([x.numel() / x.shape[1]])
        total = all_reduce(torch.cat((x.sum(dim=(0, 2, 3)), count)), "sum", dist.group.WORLD)
        count = total[-1]
        mean = total[:-1] / count
        squares = (x - mean[:, None, None]).square().sum(dim=(0, 2, 3))
        variance = all_reduce(squares, "sum", dist.group.WORLD) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return x * scale[:, None, None] + shift[:, None, None]
