"""The losses that the study compares: each is cross-entropy and something beside it or inside it.

A loss is called with the network's output, the batch and the progress in [0, 1), a 0-d tensor. Its
weight and its other options come from the study's plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import (
    AdaptiveAffinityFieldLoss,
    AffinityFieldLoss,
    AffinityRegressionLoss,
    DilatedAffinityLoss,
    NeighborStatistics,
    expand_rates,
)
from tritonaff.options import Activation


class Output(NamedTuple):
    logits: Tensor  # (N, C, H, W)
    features: Tensor  # (N, D, H, W), the input of the classifier
    affinity: Tensor | None  # (N, 8 R, H, W), logits of the head for dilated affinity


class Batch(NamedTuple):
    target: Tensor  # (N, H, W)
    distance: Tensor | None  # (N, H, W), see boundary_distance; None if the loss does not need it


class Facts(NamedTuple):
    """Facts about a data set that losses need."""

    channels: int  # of the logits: one for each class; one alone is label 1 against label 0
    ignore_index: int
    stride: int  # pixels of the image for one of the target
    targets: Sequence[np.ndarray]  # training labels at the compared resolution

    @property
    def activation(self) -> Activation:
        return "sigmoid" if self.channels == 1 else "softmax"


class CrossEntropy(nn.Module):
    neighbors: NeighborStatistics | None = None  # for an affinity head, if there is one
    needs_distance = False  # in its batches

    def __init__(self, facts: Facts, weight: float = 1.0) -> None:
        super().__init__()
        self.ignore_index = facts.ignore_index
        # A tensor: another number would compile again.
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        loss = log_loss(output.logits, batch.target, self.ignore_index)
        return loss.sum() / (batch.target != self.ignore_index).sum().clamp(min=1)

    def optimizer_groups(self, lr: float) -> list[dict]:
        """Groups of the parameters that the loss itself learns."""
        return []


def log_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Minus the log-probability of each pixel's label (N, H, W); 0 where the label is ignored."""
    if logits.shape[1] > 1:
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    yes = (target == 1).to(logits.dtype)
    loss = F.binary_cross_entropy_with_logits(logits[:, 0], yes, reduction="none")
    return loss * (target != ignore_index)


class Affinity(CrossEntropy):
    """Affinity fields of fixed sizes; AAF paper, Eq. 3. Cross-entropy alone before ``start``, a
    fraction of training.
    """

    def __init__(
        self,
        facts: Facts,
        weight: float,
        kernel_sizes: Sequence[int] = (3,),
        margin: float = 3.0,
        start: float = 0.0,
        decay: bool = True,
    ) -> None:
        super().__init__(facts, weight)
        self.start, self.decay = start, decay
        self.field = AffinityFieldLoss(
            kernel_sizes,
            margin=margin,
            ignore_index=facts.ignore_index,
            activation=facts.activation,
        )

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        field = self.field(output.logits, batch.target, progress if self.decay else None)
        weight = self.weight * (progress >= self.start)
        return super().forward(output, batch, progress) + weight * field


class AdaptiveAffinity(Affinity):
    """Adaptive affinity fields; AAF paper, Eq. 7."""

    def __init__(
        self, facts: Facts, weight: float, kernel_sizes: Sequence[int] = (3, 5, 7)
    ) -> None:
        super().__init__(facts, weight)
        self.field = AdaptiveAffinityFieldLoss(
            facts.channels,
            kernel_sizes,
            ignore_index=facts.ignore_index,
            activation=facts.activation,
        )

    def optimizer_groups(self, lr: float) -> list[dict]:
        return [self.field.optimizer_group(lr)]


REGRESSION_FROM = 2 / 3  # of the progress


class AffinityRegression(CrossEntropy):
    """Cross-entropy alone first, affinity regression beside it in the last third of the steps. The
    paper adds the loss when the network has reached its peak and trains on; here every loss has the
    same number of steps.
    """

    def __init__(self, facts: Facts, weight: float) -> None:
        super().__init__(facts, weight)
        self.regression = AffinityRegressionLoss(
            ignore_index=facts.ignore_index, activation=facts.activation
        )

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        # A weight of 0, not an "if": that would read the progress back and compile twice.
        weight = self.weight * (progress >= REGRESSION_FROM)
        regression = self.regression(output.logits, batch.target)
        return super().forward(output, batch, progress) + weight * regression


class Dilated(CrossEntropy):
    """Dilated affinity, for a head beside the classifier. Rates are in pixels of the image."""

    def __init__(
        self,
        facts: Facts,
        weight: float,
        rates: Sequence = (8, 16),
        weighting: str = "sqrt",
    ) -> None:
        super().__init__(facts, weight)
        self.rates = [(r1 // facts.stride, r2 // facts.stride) for r1, r2 in expand_rates(rates)]
        self.neighbors = NeighborStatistics(self.rates, facts.ignore_index)
        for target in facts.targets:
            self.neighbors.update(torch.from_numpy(target)[None])
        self.dilated = DilatedAffinityLoss(
            self.rates,
            weighting=weighting,
            statistics=self.neighbors,
            ignore_index=facts.ignore_index,
        )

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        dilated = self.dilated(output.affinity, batch.target)
        return super().forward(output, batch, progress) + self.weight * dilated


class Contrastive(CrossEntropy):
    """Contrastive loss of the pixels' embedding; AAF paper, Eq. 9."""

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        loss = contrastive_loss(output.features, batch.target, self.ignore_index)
        return super().forward(output, batch, progress) + self.weight * loss


def contrastive_loss(
    features: Tensor, target: Tensor, ignore_index: int, margin: float = 0.2
) -> Tensor:
    """Mean of d over the pairs with equal labels (N, H, W), plus mean of max(0, margin - d) over
    the pairs with different labels. A pair is a pixel and one of its 8 neighbours, neither ignored;
    d = |f_i - f_j|^2, f the features (N, D, H, W) of length 1.

    The paper says "over the feature map" and leaves the pairs open: here they are the pairs of its
    affinity field with the size 3, and the two kinds are averaged apart as there.
    """
    f = F.normalize(features, dim=1)
    counted = target != ignore_index
    height, width = target.shape[1:]
    sums = [features.new_zeros(()) for _ in range(4)]
    # d is symmetric: half of the 8 directions gives the same means.
    for down, right in ((0, 1), (1, -1), (1, 0), (1, 1)):
        left, right = max(-right, 0), max(right, 0)
        here = ..., slice(height - down), slice(left, width - right)
        there = ..., slice(down, height), slice(right, width - left)
        d = (f[here] - f[there]).square().sum(dim=1)
        valid, same = counted[here] & counted[there], target[here] == target[there]
        alike, apart = valid & same, valid & ~same
        terms = (d * alike).sum(), alike.sum(), ((margin - d).relu() * apart).sum(), apart.sum()
        sums = [total + term for total, term in zip(sums, terms, strict=True)]
    return sums[0] / sums[1].clamp(min=1) + sums[2] / sums[3].clamp(min=1)


class Dice(CrossEntropy):
    """Cross-entropy and soft Dice, 1 - 2 sum p y / (sum p + sum y), sums over the batch: the mean
    over the classes that occur in the labels; of one channel, label 1 alone.
    """

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        dice = dice_loss(output.logits, batch.target, self.ignore_index)
        return super().forward(output, batch, progress) + self.weight * dice


def dice_loss(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    counted, channels = target != ignore_index, logits.shape[1]
    if channels == 1:
        probs, true = logits.sigmoid(), (target == 1)[:, None]
    else:
        probs = logits.softmax(dim=1)
        true = F.one_hot(target * counted, channels).movedim(-1, 1) == 1
    probs, true = probs * counted[:, None], true & counted[:, None]
    hits, predicted, labelled = (x.sum(dim=(0, 2, 3)) for x in (probs * true, probs, true))
    occurs = labelled > 0
    loss = 1 - 2 * hits / (predicted + labelled).clamp(min=1e-6)
    return (loss * occurs).sum() / occurs.sum().clamp(min=1)


class Adversarial(CrossEntropy):
    """Cross-entropy and a discriminator D that tells patches of labels y from patches of predicted
    probabilities; AAF paper, Eq. 8. D maximises log D(y) + log(1 - D(p)), both means over patches;
    the network minimises weight * log(1 - D(p)). As for AAF's sizes, one step does both: the
    gradient is reversed between D and the network.

    The paper says nothing of D's layers. Here D sees patches of 15 of the logits.
    """

    def __init__(self, facts: Facts, weight: float) -> None:
        super().__init__(facts, weight)
        with torch.random.fork_rng(devices=[]):  # the network starts as with any other loss
            torch.manual_seed(0)
            self.discriminator = nn.Sequential(
                nn.Conv2d(facts.channels, 32, kernel_size=3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
                nn.LeakyReLU(0.2),
                nn.Conv2d(64, 1, kernel_size=3, padding=1),
            )

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        target, channels = batch.target, output.logits.shape[1]
        counted = target != self.ignore_index
        true = F.one_hot(target * counted, channels).movedim(-1, 1).to(output.logits.dtype)
        probs = output.logits.softmax(dim=1)
        # The value is the value of probs; the gradient, -weight times the gradient.
        reversed_probs = (1 + self.weight) * probs.detach() - self.weight * probs
        real, fake = (
            self.discriminator(maps * counted[:, None]) for maps in (true, reversed_probs)
        )
        discriminator = -F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()
        return super().forward(output, batch, progress) + discriminator

    def optimizer_groups(self, lr: float) -> list[dict]:
        return [{"params": self.discriminator.parameters(), "lr": lr / 10}]


BOUNDARY_SIGMA = 5.0  # pixels of the image, as in U-Net


class BoundaryWeights(CrossEntropy):
    """Cross-entropy that weighs a pixel by its distance d to the nearest other label, as U-Net:
    1 + w0 exp(-d^2 / (2 sigma^2)), here w0 = weight.

    U-Net adds the distances to the two nearest cells. Segments of a label map leave no gap: the
    distance to the nearest segment, the pixel's own, is 0. U-Net's class weights are left out, as
    no other loss here has class weights.
    """

    needs_distance = True

    def __init__(self, facts: Facts, weight: float) -> None:
        super().__init__(facts, weight)
        self.sigma = BOUNDARY_SIGMA / facts.stride

    def forward(self, output: Output, batch: Batch, progress: Tensor) -> Tensor:
        loss = log_loss(output.logits, batch.target, self.ignore_index)
        weight = 1 + self.weight * torch.exp(-0.5 * (batch.distance / self.sigma) ** 2)
        weight = weight * (batch.target != self.ignore_index)
        return (weight * loss).sum() / weight.sum().clamp(min=1)


def boundary_distance(labels: np.ndarray, ignore_index: int) -> np.ndarray:
    """Distances (H, W) float32 of each pixel's centre to the centre of the nearest pixel that
    counts and has another label. Infinite where there is none, 0 where the pixel itself is ignored.
    """
    distance = np.zeros(labels.shape, np.float32)
    for label in np.unique(labels[labels != ignore_index]):
        other = (labels != label) & (labels != ignore_index)
        far = ndimage.distance_transform_edt(~other) if other.any() else np.inf
        distance = np.where(labels == label, far, distance)
    return distance.astype(np.float32)


LOSSES: dict[str, type[CrossEntropy]] = {
    "ce": CrossEntropy,
    "ce+affinity": Affinity,
    "ce+aaf": AdaptiveAffinity,
    "ce+ar": AffinityRegression,
    "ce+dilated": Dilated,
    "ce+contrastive": Contrastive,
    "ce+gan": Adversarial,
    "ce+dice": Dice,
    "unet": BoundaryWeights,
}

TITLES = {
    "ce": "cross-entropy",
    "ce+affinity": "+ affinity, size 3",
    "ce+aaf": "+ AAF, sizes 3, 5, 7",
    "ce+ar": "+ affinity regression",
    "ce+dilated": "+ dilated affinity",
    "ce+contrastive": "+ contrastive",
    "ce+gan": "+ GAN",
    "ce+dice": "+ Dice",
    "unet": "weighted at boundaries",
}
