"""The calls of docs/instance_affinity.md in the training loops of other projects, against these
projects' own code where it is installed.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tritonaff
from tritonaff.testing import INSTANCE_OFFSETS


def cells(*size):
    """Ids of boxes, of which one in five is background."""
    torch.manual_seed(0)
    ids = torch.randint(0, 5, size)
    for axis in range(1, len(size)):
        ids = ids.repeat_interleave(3, axis).narrow(axis, 0, size[axis])
    return ids


@pytest.mark.parametrize("dimensions", [2, 3])
def test_torch_em(dimensions):
    """Its own loss on its own targets, and our loss inside its wrapper on a loader's labels."""
    torch_em = pytest.importorskip("torch_em.loss", exc_type=ImportError)
    transforms = pytest.importorskip("torch_em.transform.label", exc_type=ImportError)
    offsets = INSTANCE_OFFSETS[dimensions]
    ids = cells(2, *(4, 30, 33)[-dimensions:])  # longer than any offset
    logits = torch.randn(2, len(offsets), *ids.shape[1:], requires_grad=True)

    transform = transforms.AffinityTransform(offsets, add_mask=True)
    target = torch.stack([torch.from_numpy(transform(image.numpy())) for image in ids])
    mask = torch_em.ApplyAndRemoveMask(masking_method="multiply")
    expected = torch_em.LossWrapper(torch_em.DiceLoss(), mask)(logits.sigmoid(), target.float())

    loss_fn = tritonaff.InstanceAffinityLoss(
        offsets, loss="dice", channels="sum", invert=True, background=None
    )
    wrapped = torch_em.LossWrapper(loss_fn, transform=lambda x, labels: (x, labels[:, 0]))
    loss = wrapped(logits, ids[:, None])
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-7)


class Logits(nn.Module):
    """A network whose logits (N, K, D, H, W) are its parameters."""

    def __init__(self, *shape):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape))

    def forward(self, raw):
        return self.logits * 1.0


def test_gunpowder(tmp_path, monkeypatch):
    """Affinities, balance and mean squared error of its nodes, and our loss in its Train node."""
    gp = pytest.importorskip("gunpowder", exc_type=ImportError)
    from gunpowder.torch import Train

    monkeypatch.chdir(tmp_path)  # where Train looks for checkpoints
    offsets = [(-1, 0, 0), (0, -1, 0), (0, 0, -1), (0, -3, 0), (0, 0, 4)]
    ids = cells(6, 20, 23)
    raw, labels, mask, affinities, affinities_mask, weights, logits = (
        gp.ArrayKey(name)
        for name in ("RAW", "IDS", "MASK", "AFFS", "AFFS_MASK", "WEIGHTS", "LOGITS")
    )
    roi = gp.Roi((0, 0, 0), ids.shape)
    arrays = {
        raw: ids.float().numpy(),
        labels: ids.numpy().astype("uint32"),
        mask: torch.ones_like(ids).numpy().astype("uint8"),
    }

    class Source(gp.BatchProvider):
        def setup(self):
            for key, values in arrays.items():
                interpolatable = values.dtype.kind == "f"
                spec = gp.ArraySpec(roi, (1, 1, 1), interpolatable, dtype=values.dtype)
                self.provides(key, spec)

        def provide(self, request):
            batch = gp.Batch()
            for key, spec in request.items():
                slices = tuple(map(slice, spec.roi.begin, spec.roi.end))
                found = self.spec[key].copy()
                found.roi = spec.roi
                batch[key] = gp.Array(arrays[key][slices], found)
            return batch

    def batch_of(pipeline, *wanted):
        request = gp.BatchRequest()
        for key in wanted:
            request[key] = gp.ArraySpec(roi=roi)
        with gp.build(pipeline):
            return pipeline.request_batch(request)

    # Beyond the volume the mask is 0: pairs with a voxel there are masked.
    theirs = batch_of(
        Source()
        + gp.Pad(labels, None)
        + gp.Pad(mask, None)
        + gp.AddAffinities(
            offsets, labels, affinities, labels_mask=mask, affinities_mask=affinities_mask
        )
        + gp.BalanceLabels(affinities, weights, mask=affinities_mask),
        affinities,
        affinities_mask,
        weights,
    )
    weight, target = (torch.from_numpy(theirs[key].data) for key in (weights, affinities))
    network = Logits(1, len(offsets), *ids.shape)
    scale = weight * (network.logits.detach()[0].sigmoid() - target) ** 2
    expected = scale[weight > 0].mean()

    loss_fn = tritonaff.InstanceAffinityLoss(
        offsets, loss="mse", balance="clipped", channels="pooled"
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    train = Train(
        network, loss_fn, optimizer,
        inputs={0: raw}, outputs={0: logits}, loss_inputs={0: logits, 1: labels}, device="cpu",
    )  # fmt: skip
    before = network.logits.detach().clone()
    ours = batch_of(Source() + gp.Stack(1) + train, raw, labels, logits)
    torch.testing.assert_close(torch.tensor(ours.loss), expected)
    assert not torch.equal(network.logits, before)


@dataclass(frozen=True)
class LossMetadata:
    """The fields of PyTorch Connectomics' class of this name that its training loop looks at."""

    name: str
    call_kind: str = "pred_target"
    target_kind: str = "dense"
    spatial_weight_arg: str | None = None
    gt_seg_arg: str | None = None


@pytest.mark.parametrize("shape", [(2, 1, 4, 12, 13), (2, 4, 12, 13)], ids=str)
def test_pytorch_connectomics(shape):
    """Per-channel cross-entropy with a positive weight, as its training loop calls a loss. The
    package is not on the index: its formula and its call are written out.
    """

    class InstanceAffinityLoss(nn.Module):
        _connectomics_loss_metadata = LossMetadata(
            "InstanceAffinityLoss", spatial_weight_arg="mask", gt_seg_arg="gt_seg"
        )

        def __init__(self, offsets):
            super().__init__()
            self.loss = tritonaff.InstanceAffinityLoss(
                offsets, balance="positive", channels="sum", ignore_index=-1, anchor="destination"
            )

        def forward(self, pred, target, mask=None, gt_seg=None):
            return self.loss(pred, gt_seg.long().reshape(-1, *pred.shape[2:]))

    offsets = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 9)]
    ids = cells(2, 4, 12, 13)
    pred = torch.randn(2, len(offsets), *ids.shape[1:])
    expected = 0.0
    for k, (dz, dy, dx) in enumerate(offsets):
        inside = ids[:, dz:, dy:, dx:]
        other = ids[:, : ids.shape[1] - dz, : ids.shape[2] - dy, : ids.shape[3] - dx]
        target = ((inside == other) & (inside > 0)).float()
        ratio = ((target == 0).sum() / target.sum()).clamp(max=10.0)
        x = pred[:, k, dz:, dy:, dx:]
        expected = expected + F.binary_cross_entropy_with_logits(x, target, pos_weight=ratio)
    loss = InstanceAffinityLoss(offsets)(pred, None, mask=None, gt_seg=ids.view(shape))
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("clip", [0.0, 0.01])
def test_deepem(clip):
    """Each target weighed by the share of the other target, edge by edge: on the tables."""
    edges = [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 5)]
    ids = cells(2, 4, 12, 13)
    x = torch.randn(2, len(edges), *ids.shape[1:])
    total, number = 0.0, 0
    for k, (dz, dy, dx) in enumerate(edges):
        inside = ids[:, dz:, dy:, dx:]
        other = ids[:, : ids.shape[1] - dz, : ids.shape[2] - dy, : ids.shape[3] - dx]
        target = ((inside == other) & (inside > 0)).float()
        share = target.mean()
        weight = torch.where(target == 1, 1 - share, share).clamp(clip, 1 - clip)
        total = total + F.binary_cross_entropy_with_logits(
            x[:, k, dz:, dy:, dx:], target, weight=weight, reduction="sum"
        )
        number += target.numel()

    terms = tritonaff.instance_affinity_terms(x, ids, edges, anchor="destination")
    count, log_loss = terms.count.sum(0), terms.log_loss.sum(0)  # (K, 2)
    share = count / count.sum(-1, keepdim=True).clamp(min=1)
    loss = (share.flip(-1).clamp(clip, 1 - clip) * log_loss).sum() / count.sum().clamp(min=1)
    torch.testing.assert_close(loss, total / number)


@pytest.mark.parametrize("dimensions", [2, 3])
def test_mutex_watershed(dimensions):
    """The segmentation of the targets is the ids: anchor and sign are those of mwatershed."""
    mwatershed = pytest.importorskip("mwatershed")
    offsets = INSTANCE_OFFSETS[dimensions]
    size = (3, 30, 31)[-dimensions:]  # longer than any offset
    # Boxes, each of an id of its own: an instance is in one piece.
    places = torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), dim=-1)
    boxes = places // torch.tensor((2, 7, 9)[-dimensions:])
    ids = 1 + (boxes * torch.tensor((100, 10, 1)[-dimensions:])).sum(-1)
    target = tritonaff.instance_affinity_target(ids[None], offsets)[0]
    affinities = torch.where(target == 255, 0.5, target.double()) - 0.5
    segments = mwatershed.agglom(affinities.numpy(), offsets)
    pairs = set(zip(segments.ravel().tolist(), ids.flatten().tolist(), strict=True))
    assert len(pairs) == len(ids.unique()) == len({segment for segment, _ in pairs})
