"""Affinity fields: neighbours of one label agree, neighbours of two labels differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from tritonaff import checks
from tritonaff.api.module import Loss, LossAndTerms, by_image
from tritonaff.distributed import all_reduce
from tritonaff.ops import affinity_field as ops
from tritonaff.options import (
    Activation,
    AffinityFieldOptions,
    Reduction,
    Variant,
    affinity_field_options,
)
from tritonaff.portable.blocks import at_least_float32, counted_labels, precision


class AffinityFieldTerms(NamedTuple):
    """Sums and counts of the affinity field by class and neighbourhood size, each of shape (C, K).

    The tables of a batch are the sums of its images' tables.
    """

    edge_sum: Tensor
    """Sum of max(0, margin - KL) over edge entries; float32, float64 for float64 logits.
    Differentiable.
    """
    non_edge_sum: Tensor
    """Sum of KL over non-edge entries; the same dtype. Differentiable."""
    edge_count: Tensor
    """Number of edge entries; int64."""
    non_edge_count: Tensor
    """Number of non-edge entries; int64."""


def affinity_field_terms(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] | int = (3,),
    *,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int | None = 255,
    variant: Variant = "paper",
    activation: Activation = "softmax",
) -> AffinityFieldTerms:
    r"""Sums and counts from which affinity field losses are computed, in one pass over the logits.

    Let p = softmax(logits), clamped to [eps, 1 - eps]. Each pixel i, each of its 8 neighbours j at
    distance d = (k - 1) / 2 (in rows and in columns: a dilated 3 x 3) and each class c make an
    entry (i, j, c) with

    .. math:: f = KL(p_j(c) \| p_i(c)) = p_j \log(p_j / p_i) + (1 - p_j) \log((1 - p_j) / (1 - p_i))

    The entry is an *edge* if exactly one of the two pixels has label c, and adds max(0, margin - f)
    to ``edge_sum[c, k]``. Every other entry is a *non-edge* and adds f to ``non_edge_sum[c, k]``.
    Pairs with a pixel that is ignored or outside the image do not count.

    With ``activation="sigmoid"`` each channel is a question of its own: p = sigmoid(logits), the
    labels of a channel are 0 and 1, and a pair counts in a channel if both pixels count there.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode). With ``activation="sigmoid"`` labels
            0 and 1, (N, C, H, W); for one channel (N, H, W) too.
        kernel_sizes: K distinct odd sizes, each at least 3; an int is one size.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least the machine epsilon (float32 1.2e-7, float64
            2.2e-16) and below 0.5.
        ignore_index: label of the pixels to leave out, even where a class has this number; None if
            there is no such label. The default is 255; torch's own losses have -100.
        variant: ``"paper"``, the equations above; ``"authors"``, the published TensorFlow code: all
            channels of a pair go to the table row of the centre's label, a pair counts only if the
            pixel opposite to j counts as well, p and 1 - p are clamped to [eps, 1] separately, and
            every label outside [0, C) is ignored.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel (vessels, cracks,
            membranes) or several labels per pixel. Not with variant "authors".

    Returns:
        :class:`AffinityFieldTerms`. Differentiable with respect to the logits: once, in
        reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; with softmax fewer than two classes. A label
            outside [0, C) other than ignore_index raises in eager mode on the CPU (variant
            "paper"); elsewhere such pixels are ignored, unless TRITONAFF_CHECK=1 asserts labels on
            the device.

    Paper: Ke, Hwang, Liu, Yu, "Adaptive Affinity Fields for Semantic Segmentation", ECCV 2018, Eq.
    3. We clamp p so that p and 1 - p stay a distribution, and count exactly the pairs that exist.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.zeros(1, 2, 1, 2)  # two undecided pixels
        >>> target = torch.tensor([[[0, 1]]])  # of two classes: both pairs, both channels are edges
        >>> terms = tritonaff.affinity_field_terms(logits, target)
        >>> terms.edge_sum.tolist(), terms.edge_count.tolist(), terms.non_edge_count.tolist()
        ([[6.0], [6.0]], [[2], [2]], [[0], [0]])
    """
    options = affinity_field_options(
        kernel_sizes,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
        activation=activation,
    )
    logits, target = checks.check_logits_and_target(logits, target, activation)
    counted = _count(logits, target, options)
    edge_sum, non_edge_sum = counted.sums()[0].unbind()
    return AffinityFieldTerms(edge_sum, non_edge_sum, *counted.entry_counts())


def affinity_field_loss(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] | int = (3,),
    *,
    edge_weight: Tensor | None = None,
    non_edge_weight: Tensor | None = None,
    edge_lambda: float = 1.0,
    non_edge_lambda: float = 1.0,
    affinity_lambda: float = 1.0,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int | None = 255,
    variant: Variant = "paper",
    activation: Activation = "softmax",
    include_background: bool = True,
    reduction: Reduction = "mean",
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""The affinity field loss: neighbours of one label agree, neighbours of two labels differ.

    .. math::

        L = \lambda \sum_k \lambda_e
            \frac{\sum_c w^e_{ck} \, edge\_sum_{ck}}{\sum_c edge\_count_{ck}} + \lambda_n
            \frac{\sum_c w^n_{ck} \, non\_edge\_sum_{ck}}{\sum_c non\_edge\_count_{ck}}

    with the tables of :func:`affinity_field_terms`. A size without edges (or without non-edges)
    contributes 0 with a zero gradient.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode). With ``activation="sigmoid"`` labels
            0 and 1, (N, C, H, W); for one channel (N, H, W) too.
        kernel_sizes: K distinct odd sizes, each at least 3; an int is one size.
        edge_weight: (C, K) floating, weight of each class and size in the edge term; rows usually
            sum to 1. Default 1/K. Differentiable.
        non_edge_weight: (C, K), likewise for the non-edge term.
        edge_lambda: factor of the edge term, at least 0.
        non_edge_lambda: factor of the non-edge term, at least 0.
        affinity_lambda: factor of both terms, at least 0.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least the logits' machine epsilon and below 0.5.
        ignore_index: label of the pixels to leave out, even where a class has this number; None if
            there is no such label. The default is 255; torch's own losses have -100.
        variant: ``"paper"``, the equations; ``"authors"``, the published TensorFlow code, from
            which :func:`affinity_field_terms` tells the differences.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel (vessels, cracks,
            membranes) or several labels per pixel. Not with variant "authors".
        include_background: False leaves row 0 out of the tables, in sums and in counts: the channel
            of class 0. The other channels still have edges towards class 0.
        reduction: ``"mean"``: all images are one batch of pairs. ``"none"``: the loss of each image
            as a batch of its own, with as many launches as there are images. No ``"sum"``: edges
            and non-edges are means over numbers of their own.
        normalizer: (2, K) of int32 or int64, the numbers of edge and of non-edge entries to divide
            by, in place of the batch's own; :meth:`AffinityFieldLoss.normalizer` counts them. If
            every part of a batch is divided by the numbers of the full batch, the losses of the
            parts add up to the loss of the batch.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call this function; see
            :func:`distributed.all_reduce`. The loss is the same in every process, and its gradient
            is multiplied by the number of processes, a factor that the averaging of
            DistributedDataParallel and FSDP cancels.

    Returns:
        A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`affinity_field_terms`; weights or a normalizer of a wrong
            type, dtype, shape or device; a wrong process_group; both with ``reduction="none"``.

    Paper: Ke et al., ECCV 2018, Eq. 7 with given weights; lambda is 1 there, added to
    cross-entropy. :class:`AdaptiveAffinityFieldLoss` learns the weights. The authors' code gives
    NaN on a batch without edges.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 16, 16))
        >>> loss = torch.nn.functional.cross_entropy(logits, target, ignore_index=255)
        >>> loss = loss + tritonaff.affinity_field_loss(logits, target, kernel_sizes=(3, 5))
        >>> loss.backward()
    """
    options = affinity_field_options(
        kernel_sizes,
        edge_lambda=edge_lambda,
        non_edge_lambda=non_edge_lambda,
        affinity_lambda=affinity_lambda,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
        activation=activation,
        include_background=include_background,
        reduction=reduction,
    )
    loss, _ = _loss(
        logits,
        target,
        options,
        edge_weight=edge_weight,
        non_edge_weight=non_edge_weight,
        normalizer=normalizer,
        process_group=process_group,
    )
    return loss


def affinity_field_cross_entropy(
    logits: Tensor,
    target: Tensor,
    kernel_sizes: Sequence[int] | int = (3,),
    *,
    weight: Tensor | None = None,
    edge_weight: Tensor | None = None,
    non_edge_weight: Tensor | None = None,
    edge_lambda: float = 1.0,
    non_edge_lambda: float = 1.0,
    affinity_lambda: float = 1.0,
    margin: float = 3.0,
    eps: float = 1e-4,
    ignore_index: int | None = 255,
    variant: Variant = "paper",
    activation: Activation = "softmax",
    pos_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    include_background: bool = True,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""Cross-entropy plus the affinity field loss, in one operation that reads the logits one time
    fewer than the two losses apart.

    .. math:: L = \frac{\sum_i w_{y_i} \, (-\log p_i(y_i))}{\sum_i w_{y_i}} + L_{affinity}

    The first term is a mean over the pixels i that are not ignored, with p = softmax(logits)
    unclamped; the second term is :func:`affinity_field_loss`. If every pixel is ignored, the loss
    is 0 with a zero gradient, where :func:`torch.nn.functional.cross_entropy` gives NaN.

    With label_smoothing s the first term is, as :func:`torch.nn.functional.cross_entropy` has it,

    .. math:: \frac{(1 - s) \sum_i w_{y_i} \, (-\log p_i(y_i))
        + \frac{s}{C} \sum_{ic} w_c \, (-\log p_i(c))}{\sum_i w_{y_i}}

    With ``activation="sigmoid"`` the first term is binary cross-entropy, a mean over the entries
    (pixel, channel) that are not ignored, in which entries of label 1 have the weight pos_weight.

    Args:
        logits: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides. Half precision
            is read as it is and computed in float32.
        target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that holds
            whole numbers (looked at on a CPU, in eager mode). With ``activation="sigmoid"`` labels
            0 and 1, (N, C, H, W); for one channel (N, H, W) too.
        kernel_sizes: K distinct odd sizes, each at least 3; an int is one size.
        weight: (C,) floating, the weight w of each class in cross-entropy. Default 1. With
            softmax alone.
        edge_weight: (C, K) floating, weight of each class and size in the edge term. Default 1/K.
        non_edge_weight: (C, K), likewise for the non-edge term.
        edge_lambda: factor of the edge term, at least 0.
        non_edge_lambda: factor of the non-edge term, at least 0.
        affinity_lambda: factor of both terms, at least 0.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least the logits' machine epsilon and below 0.5.
        ignore_index: label of the pixels to leave out, even where a class has this number; None if
            there is no such label. The default is 255; torch's own losses have -100.
        variant: ``"paper"``, the equations; ``"authors"``, the published TensorFlow code, from
            which :func:`affinity_field_terms` tells the differences.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel (vessels, cracks,
            membranes) or several labels per pixel. Not with variant "authors".
        include_background: False leaves the channel of class 0 out of the affinity field. The other
            channels still have edges towards class 0; cross-entropy keeps it.
        pos_weight: (C,) floating, the weight of label 1 in each channel's binary cross-entropy, as
            :func:`torch.nn.functional.binary_cross_entropy_with_logits` has it. Default 1. With
            sigmoid alone.
        label_smoothing: in [0, 1], as :func:`torch.nn.functional.cross_entropy` has it. With
            softmax alone. A part of its term is plain torch, which docs/affinity_field.md counts.
        reduction: ``"mean"``: all images are one batch. ``"none"`` is the loss of each image, (N,),
            where torch's cross-entropy has a number for each pixel.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Returns:
        A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits. In nats.

    Raises:
        TypeError, ValueError: as :func:`affinity_field_loss`; ``weight`` of a wrong type, dtype,
            shape or device: weights of pixels, as hard example mining gives, are refused, since
            pairs have none. To leave pixels out, ``target.masked_fill(~mask, ignore_index)``.

    Paper: Ke et al., ECCV 2018, Eq. 7 added to cross-entropy with lambda 1.

    Example:
        >>> import torch, tritonaff
        >>> logits = torch.randn(2, 4, 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 4, (2, 16, 16))
        >>> loss = tritonaff.affinity_field_cross_entropy(logits, target, kernel_sizes=(3, 5))
        >>> loss.backward()
        >>> expected = torch.nn.functional.cross_entropy(logits, target)
        >>> expected += tritonaff.affinity_field_loss(logits, target, kernel_sizes=(3, 5))
        >>> torch.allclose(loss, expected)
        True
    """
    options = affinity_field_options(
        kernel_sizes,
        edge_lambda=edge_lambda,
        non_edge_lambda=non_edge_lambda,
        affinity_lambda=affinity_lambda,
        margin=margin,
        eps=eps,
        ignore_index=ignore_index,
        variant=variant,
        cross_entropy=True,
        activation=activation,
        label_smoothing=label_smoothing,
        include_background=include_background,
        reduction=reduction,
    )
    loss, _ = _loss(
        logits,
        target,
        options,
        weight=weight,
        pos_weight=pos_weight,
        edge_weight=edge_weight,
        non_edge_weight=non_edge_weight,
        process_group=process_group,
    )
    return loss


class AffinityFieldLoss(Loss):
    """:func:`tritonaff.affinity_field_loss` with fixed options and the authors' decay.

    Args:
        kernel_sizes: K distinct odd sizes, each at least 3; an int is one size.
        edge_lambda: factor of the edge term, at least 0.
        non_edge_lambda: factor of the non-edge term, at least 0.
        affinity_lambda: factor of both terms, at least 0.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least the logits' machine epsilon and below 0.5.
        ignore_index: label of the pixels to leave out, even where a class has this number; None if
            there is no such label. The default is 255; torch's own losses have -100.
        variant: ``"paper"``, the equations; ``"authors"``, the published TensorFlow code.
        cross_entropy: add cross-entropy, as :func:`tritonaff.affinity_field_cross_entropy` does.
        weight: (C,) floating, or a sequence of C numbers: the weight of each class in
            cross-entropy. Default 1. (``class_weight`` is its deprecated name.) With softmax alone.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel (vessels, cracks,
            membranes) or several labels per pixel. Not with variant "authors".
        pos_weight: (C,) floating, or a sequence of C numbers: the weight of label 1 in binary
            cross-entropy. Default 1. With sigmoid alone.
        label_smoothing: in [0, 1], in cross-entropy, as torch has it. With softmax alone.
        include_background: False leaves the channel of class 0 out of the affinity field. The other
            channels still have edges towards class 0; cross-entropy keeps it.
        reduction: ``"mean"``: all images are one batch of pairs. ``"none"``: the loss of each
            image, (N,). No ``"sum"``: edges and non-edges are means over numbers of their own.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Shapes:
        ``loss(logits, target)`` with logits (N, C, H, W) and target (N, H, W) gives a scalar, or
        (N,) with ``reduction="none"``; :meth:`forward` has more arguments. Where another library
        calls the loss, :meth:`set_progress` tells it how much of training is done.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.AffinityFieldLoss(kernel_sizes=(3, 5))
        >>> logits = torch.randn(1, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 8, 8))
        >>> loss_fn(logits, target, progress=0.5).backward()
        >>> loss, terms = loss_fn(logits, target, return_terms=True)
        >>> torch.allclose(loss, terms["edge"] + terms["non_edge"])
        True
    """

    def __init__(
        self,
        kernel_sizes: Sequence[int] | int = (3,),
        *,
        edge_lambda: float = 1.0,
        non_edge_lambda: float = 1.0,
        affinity_lambda: float = 1.0,
        margin: float = 3.0,
        eps: float = 1e-4,
        ignore_index: int | None = 255,
        variant: Variant = "paper",
        cross_entropy: bool = False,
        weight: Tensor | Sequence[float] | None = None,
        activation: Activation = "softmax",
        pos_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        include_background: bool = True,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        class_weight: Tensor | Sequence[float] | None = None,
    ) -> None:
        weight = checks.renamed("class_weight", class_weight, "weight", weight)
        options = affinity_field_options(
            kernel_sizes,
            edge_lambda=edge_lambda,
            non_edge_lambda=non_edge_lambda,
            affinity_lambda=affinity_lambda,
            margin=margin,
            eps=eps,
            ignore_index=ignore_index,
            variant=variant,
            cross_entropy=cross_entropy,
            activation=activation,
            label_smoothing=label_smoothing,
            include_background=include_background,
            reduction=reduction,
        )
        super().__init__(options, process_group)
        self.progress: Tensor | None
        self.register_buffer("progress", None, persistent=False)
        self.weight: Tensor | None
        self.pos_weight: Tensor | None
        for name, value in (("weight", weight), ("pos_weight", pos_weight)):
            if value is not None:
                value = checks.check_class_weight(name, value)
                if not options.cross_entropy:
                    raise ValueError(f"{name} needs cross_entropy=True")
                _check_activation_of(name, options)
            self.register_buffer(name, value)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None = None,
        normalizer: Tensor | None = None,
        return_terms: bool = False,
    ) -> Any:
        """The loss of a batch.

        Args:
            logits: (N, C, H, W) of float16, bfloat16, float32 or float64.
            target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that
                holds whole numbers (looked at on a CPU, in eager mode). With
                ``activation="sigmoid"`` labels 0 and 1, (N, C, H, W); for one channel (N, H, W)
                too.
            progress: fraction of training done, in [0, 1]: multiplies the affinity field loss, but
                not cross-entropy, by 10 ** -progress, as the authors do. (The range of a tensor is
                checked where labels are: on a CPU, in eager mode.) Under torch.compile pass a 0-d
                tensor: a Python float that changes compiles a second time. In a CUDA graph the
                tensor must be on the logits' device: a tensor elsewhere is read once, at capture.
            normalizer: (2, K) of int32 or int64, the numbers of edge and of non-edge entries to
                divide by, in place of the batch's own; :meth:`normalizer` counts them.
                Cross-entropy, which divides by another number, must then be computed beside the
                loss.
            return_terms: also return the terms, for logs: a dict of the detached ``"edge"``,
                ``"non_edge"`` and ``"cross_entropy"`` (if asked for), which add up to the loss.

        Returns:
            A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits, in
            nats; with ``return_terms=True`` a pair (loss, terms).
        """
        return self._loss(logits, target, progress, normalizer, return_terms)

    def set_progress(self, progress: float | Tensor | None) -> None:
        """The fraction of training done for the calls of ``forward`` that name none: for trainers
        that call the loss themselves. A number is kept in a buffer, which compiled calls read.
        """
        progress = checks.check_progress(progress)
        if progress is None or self.progress is None:
            self.progress = None if progress is None else torch.as_tensor(progress).clone()
        else:
            self.progress.fill_(progress)

    def normalizer(self, target: Tensor, num_classes: int) -> Tensor:
        """Numbers of edge and non-edge entries, (2, K) int64, in a target of C classes.

        Add up the numbers of a batch's parts and give ``forward`` the total with every part: the
        accumulated gradient is then the gradient of the batch.
        """
        activation = self.options.activation
        num_classes = checks.check_num_classes(num_classes, activation)
        if activation == "softmax":
            target = checks.check_target(target)
        else:
            checks.check_tensor("target", target, tuple(checks.TARGET_DTYPES), target.shape)
        n, (height, width) = len(target), target.shape[-2:]
        blank = torch.zeros((), device=target.device).expand(n, num_classes, height, width)
        blank, target = checks.check_logits_and_target(blank, target, activation)
        return _totals(_count(blank, target, self.options), self.options)

    def _loss(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None,
        normalizer: Tensor | None,
        return_terms: bool,
        **weights: Tensor,
    ) -> Tensor | LossAndTerms:
        if self.cross_entropy and normalizer is not None:
            raise ValueError(
                "normalizer must be None with cross_entropy=True, which divides by another number: "
                "compute cross-entropy beside the loss"
            )
        loss, terms = _loss(
            logits,
            target,
            self.options,
            progress=self.progress if progress is None else progress,
            weight=self.weight,
            pos_weight=self.pos_weight,
            normalizer=normalizer,
            process_group=self.process_group,
            with_terms=checks.check_bool("return_terms", return_terms),
            **weights,
        )
        return (loss, terms) if return_terms else loss


class AdaptiveAffinityFieldLoss(AffinityFieldLoss):
    """The adaptive affinity field loss: each class learns its sizes, in a minimax game.

    The weights of the edge and of the non-edge term are softmaxes over the K sizes of free
    parameters (C, K) that start at 0. The network minimises the loss and the weights maximise it;
    the gradient of the weights is reversed inside, so one ordinary optimiser step does both. Give
    the weights no weight decay: :meth:`optimizer_group`.

    The weights are parameters of this module: move the module to the logits' device. With a
    process_group the gradients of the weights are the same in all processes, whether the loss is
    inside a wrapped module or beside it. Without a process_group, compute the loss inside the
    module that DistributedDataParallel wraps, or the processes' weights drift apart.

    Args:
        num_classes: C, at least 2; with sigmoid the number of channels, at least 1.
        kernel_sizes: K distinct odd sizes, each at least 3; an int is one size.
        edge_lambda: factor of the edge term, at least 0.
        non_edge_lambda: factor of the non-edge term, at least 0.
        affinity_lambda: factor of both terms, at least 0.
        margin: KL divergence, in nats, beyond which an edge is satisfied; at least 0.
        eps: clamp of the probabilities, at least the logits' machine epsilon and below 0.5.
        ignore_index: label of the pixels to leave out, even where a class has this number; None if
            there is no such label. The default is 255; torch's own losses have -100.
        variant: ``"paper"``, the equations; ``"authors"``, the published TensorFlow code.
        cross_entropy: add cross-entropy, as :func:`tritonaff.affinity_field_cross_entropy` does.
        weight: (C,) floating, or a sequence of C numbers: the weight of each class in
            cross-entropy. Default 1. (``class_weight`` is its deprecated name.) With softmax alone.
        activation: ``"softmax"``, one class per pixel; ``"sigmoid"``, one channel (vessels, cracks,
            membranes) or several labels per pixel. Not with variant "authors".
        pos_weight: (C,) floating, or a sequence of C numbers: the weight of label 1 in binary
            cross-entropy. Default 1. With sigmoid alone.
        label_smoothing: in [0, 1], in cross-entropy, as torch has it. With softmax alone.
        include_background: False leaves the channel of class 0 out of the affinity field. The other
            channels still have edges towards class 0; cross-entropy keeps it.
        reduction: ``"mean"``: all images are one batch of pairs. ``"none"``: the loss of each
            image, (N,). No ``"sum"``: edges and non-edges are means over numbers of their own.
        process_group: None: the loss of this process's batch. A group: the loss of all its
            processes' batches as one batch, for which every process must call; its gradient is
            multiplied by the number of processes, a factor that averaging of gradients cancels.

    Shapes:
        ``loss(logits, target)`` with logits (N, C, H, W) and target (N, H, W) gives a scalar, or
        (N,) with ``reduction="none"``; :meth:`forward` has more arguments.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Paper: Ke et al., ECCV 2018, Eq. 6 and 7.

    Example:
        >>> import torch, tritonaff
        >>> net = torch.nn.Conv2d(3, 5, 1)
        >>> aaf = tritonaff.AdaptiveAffinityFieldLoss(num_classes=5)
        >>> groups = [{"params": net.parameters()}, aaf.optimizer_group(lr=0.1)]
        >>> optimizer = torch.optim.SGD(groups, lr=0.1)
        >>> image, target = torch.randn(1, 3, 16, 16), torch.randint(0, 5, (1, 16, 16))
        >>> aaf(net(image), target).backward()
        >>> optimizer.step()
        >>> aaf.edge_weight.shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        num_classes: int,
        kernel_sizes: Sequence[int] | int = (3, 5, 7),
        *,
        edge_lambda: float = 1.0,
        non_edge_lambda: float = 1.0,
        affinity_lambda: float = 1.0,
        margin: float = 3.0,
        eps: float = 1e-4,
        ignore_index: int | None = 255,
        variant: Variant = "paper",
        cross_entropy: bool = False,
        weight: Tensor | Sequence[float] | None = None,
        activation: Activation = "softmax",
        pos_weight: Tensor | Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        include_background: bool = True,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
        class_weight: Tensor | Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            kernel_sizes,
            edge_lambda=edge_lambda,
            non_edge_lambda=non_edge_lambda,
            affinity_lambda=affinity_lambda,
            margin=margin,
            eps=eps,
            ignore_index=ignore_index,
            variant=variant,
            cross_entropy=cross_entropy,
            weight=weight,
            activation=activation,
            pos_weight=pos_weight,
            label_smoothing=label_smoothing,
            include_background=include_background,
            reduction=reduction,
            process_group=process_group,
            class_weight=class_weight,
        )
        self.num_classes = checks.check_num_classes(num_classes, activation)
        for name, value in (("weight", self.weight), ("pos_weight", self.pos_weight)):
            if value is not None:
                checks.check_class_weight(name, value, self.num_classes)
        shape = self.num_classes, len(self.options.kernel_sizes)
        self.edge_scores = nn.Parameter(torch.zeros(shape))
        self.non_edge_scores = nn.Parameter(torch.zeros(shape))

    @property
    def edge_weight(self) -> Tensor:
        """Weights of the sizes in the edge term, (C, K); each row sums to 1. Weights that FSDP has
        sharded are gathered: all processes must read this property.
        """
        return _full(self.edge_scores).softmax(dim=1)

    @property
    def non_edge_weight(self) -> Tensor:
        """Weights of the sizes in the non-edge term, (C, K), as :attr:`edge_weight`."""
        return _full(self.non_edge_scores).softmax(dim=1)

    def effective_kernel_size(self) -> tuple[Tensor, Tensor]:
        """Mean kernel size of every class by the edge weights, (C,), and by the non-edge weights,
        (C,) (paper, 5.4).
        """
        edge_weight, non_edge_weight = self.edge_weight.detach(), self.non_edge_weight.detach()
        sizes = edge_weight.new_tensor(self.kernel_sizes)
        return edge_weight @ sizes, non_edge_weight @ sizes

    def optimizer_group(self, lr: float) -> dict[str, Any]:
        """A parameter group of the weights for a torch optimiser, with this learning rate and no
        weight decay.
        """
        checks.check_number("lr", lr, at_least=0)
        return {"params": [self.edge_scores, self.non_edge_scores], "lr": lr, "weight_decay": 0.0}

    def normalizer(self, target: Tensor, num_classes: int | None = None) -> Tensor:
        """Numbers of edge and non-edge entries, (2, K) int64, in a target of C classes. Add up the
        numbers of a batch's parts and give ``forward`` the total with every part.
        """
        return super().normalizer(target, self.num_classes if num_classes is None else num_classes)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None = None,
        normalizer: Tensor | None = None,
        return_terms: bool = False,
    ) -> Any:
        """The loss of a batch, with the weights as they are now.

        Args:
            logits: (N, C, H, W) of float16, bfloat16, float32 or float64, with C = num_classes.
            target: (N, H, W) or (N, 1, H, W), of an integer dtype, bool, or floating point that
                holds whole numbers (looked at on a CPU, in eager mode). With
                ``activation="sigmoid"`` labels 0 and 1, (N, C, H, W); for one channel (N, H, W)
                too.
            progress: fraction of training done, in [0, 1]: multiplies the affinity field loss, but
                not cross-entropy, by 10 ** -progress, as the authors do. (The range of a tensor is
                checked where labels are: on a CPU, in eager mode.) Under torch.compile pass a 0-d
                tensor: a Python float that changes compiles a second time. In a CUDA graph the
                tensor must be on the logits' device: a tensor elsewhere is read once, at capture.
            normalizer: (2, K) of int32 or int64, the numbers of edge and of non-edge entries to
                divide by, in place of the batch's own; :meth:`normalizer` counts them.
                Cross-entropy, which divides by another number, must then be computed beside the
                loss.
            return_terms: also return the terms, for logs: a dict of the detached ``"edge"``,
                ``"non_edge"`` and ``"cross_entropy"`` (if asked for), which add up to the loss.

        Returns:
            A scalar, or (N,) with ``reduction="none"``: float32, float64 for float64 logits, in
            nats; with ``return_terms=True`` a pair (loss, terms).
        """
        if isinstance(logits, Tensor) and logits.dim() == 4 and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have num_classes = {self.num_classes} classes, got {logits.shape[1]}"
            )
        return self._loss(
            logits,
            target,
            progress,
            normalizer,
            return_terms,
            edge_weight=_adversarial_softmax(self.edge_scores),
            non_edge_weight=_adversarial_softmax(self.non_edge_scores),
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, {super().extra_repr()}"


def _adversarial_softmax(scores: Tensor) -> Tensor:
    """Softmax over the sizes (C, K) whose gradient is reversed: minimising the loss maximises it
    over the scores.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # 2 s - s is exactly s, with the gradient -1. An autograd.Function would lose its gradient in
    # torch.export.
    return (2 * scores.detach() - scores).softmax(dim=1)


def _full(parameter: Tensor) -> Tensor:
    """The full parameter, gathered from all processes if FSDP has sharded it."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    full: Tensor = parameter.full_tensor()
    return full


def _count(logits: Tensor, target: Tensor, options: AffinityFieldOptions) -> ops.Counted:
    checks.check_number("eps", options.eps, at_least=torch.finfo(precision(logits)).eps, below=0.5)
    if options.variant == "paper":
        num_labels = 2 if options.activation == "sigmoid" else logits.shape[1]
        checks.check_label_values(target, num_labels, options.ignore_index)
    return ops.count(logits, target, options)


def _loss(
    logits: Tensor,
    target: Tensor,
    options: AffinityFieldOptions,
    *,
    progress: float | Tensor | None = None,
    weight: Tensor | None = None,
    pos_weight: Tensor | None = None,
    edge_weight: Tensor | None = None,
    non_edge_weight: Tensor | None = None,
    normalizer: Tensor | None = None,
    process_group: dist.ProcessGroup | None = None,
    with_terms: bool = False,
) -> LossAndTerms:
    """The affinity field loss, decayed by progress, plus cross-entropy if options ask for it; and
    its terms, if asked for.
    """
    # Everything is checked before the first collective: a process that raised an error later would
    # leave the others waiting.
    logits, target = checks.check_logits_and_target(logits, target, options.activation)
    c, k = logits.shape[1], len(options.kernel_sizes)
    for name, value in (("weight", weight), ("pos_weight", pos_weight)):
        if value is not None:
            _check_activation_of(name, options)
    weight = checks.check_weight("weight", weight, (c,), logits)
    pos_weight = checks.check_weight("pos_weight", pos_weight, (c,), logits)
    weights = (
        checks.check_weight("edge_weight", edge_weight, (c, k), logits),
        checks.check_weight("non_edge_weight", non_edge_weight, (c, k), logits),
    )
    progress = checks.check_progress(progress)
    if normalizer is not None:
        normalizer = checks.check_normalizer(normalizer, (2, k), "logits", logits)
    checks.check_process_group(process_group)
    checks.check_together(options.reduction, normalizer, process_group)
    if c == 1 and not options.include_background:
        raise ValueError("include_background=False needs at least two channels, got 1")

    def of_batch(logits: Tensor, target: Tensor) -> LossAndTerms:
        counted = _count(logits, target, options)
        totals = _totals(counted, options) if normalizer is None else normalizer
        totals, pixel_count = all_reduce((totals, counted.pixel_count), process_group)
        coefficients = _coefficients(weights, options, totals, logits)
        if progress is not None:
            coefficients = coefficients * _decay(progress, coefficients)
        coefficients = counted.differentiable_once(coefficients)
        log_loss_coefficients, smoothing = None, None
        if options.cross_entropy and options.activation == "sigmoid":
            log_loss_coefficients = _binary_log_loss_coefficients(pos_weight, pixel_count, logits)
        elif options.cross_entropy:
            log_loss_coefficients = _log_loss_coefficients(weight, pixel_count, logits)
            if options.label_smoothing:
                log_loss_coefficients, smoothing = _smoothed(log_loss_coefficients, options)
        if log_loss_coefficients is not None:
            log_loss_coefficients = counted.differentiable_once(log_loss_coefficients)
        sums, log_loss, zero = counted.sums_with_gradient(coefficients, log_loss_coefficients)
        tables = [sums, log_loss]
        if smoothing is not None:
            tables.append(_margins(logits, target, options))
        sums, log_loss, *margins = all_reduce(tables, process_group)
        loss = (coefficients * sums).sum()
        cross_entropy = None
        if log_loss_coefficients is not None:
            cross_entropy = (log_loss_coefficients * log_loss).sum()
            if smoothing is not None:
                cross_entropy = cross_entropy + (smoothing * margins[0]).sum()
            loss = loss + cross_entropy
        if zero is not None:
            # The zero stays out of the collective, for which all processes must have the same
            # tables.
            loss = loss + (zero if process_group is None else process_group.size() * zero)
        if not with_terms:
            return loss, {}
        edge, non_edge = (coefficients * sums).detach().sum(dim=(1, 2)).unbind()
        terms = {"edge": edge, "non_edge": non_edge}
        if cross_entropy is not None:
            terms["cross_entropy"] = cross_entropy.detach()
        return loss, terms

    if options.reduction == "none":
        return by_image(of_batch, logits, target)
    return of_batch(logits, target)


def _totals(counted: ops.Counted, options: AffinityFieldOptions) -> Tensor:
    """Numbers of edge and non-edge entries of each size, (2, K)."""
    if options.include_background:
        return counted.totals
    return torch.stack(counted.entry_counts())[:, 1:].sum(dim=1)


def _decay(progress: float | Tensor, coefficients: Tensor) -> float | Tensor:
    """10 ** -progress, as a tensor if progress is a tensor."""
    if isinstance(progress, Tensor):
        return torch.pow(10.0, -progress).to(coefficients.dtype)
    return float(10.0**-progress)


def _log_loss_coefficients(weight: Tensor | None, pixel_count: Tensor, logits: Tensor) -> Tensor:
    """Coefficients (C,) of the log loss table in a weighted mean over pixels; 0 where the weights
    are 0.
    """
    dtype = precision(logits)
    if weight is None:
        total = pixel_count.sum()
        mean = torch.where(total > 0, total.to(dtype).reciprocal(), 0)
        return mean.expand(pixel_count.shape).contiguous()
    weight = weight.to(dtype)
    total = (pixel_count * weight).sum()
    return weight * torch.where(total != 0, total.reciprocal(), 0)


def _smoothed(mean: Tensor, options: AffinityFieldOptions) -> tuple[Tensor, Tensor]:
    """Coefficients (C,) of the log losses and of the margins in smoothed cross-entropy, from the
    coefficients of the log losses in the weighted mean: docs/affinity_field.md derives them.
    """
    smoothing = mean * (options.label_smoothing / len(mean))
    return mean * (1 - options.label_smoothing) + smoothing.sum(), smoothing


def _margins(logits: Tensor, target: Tensor, options: AffinityFieldOptions) -> Tensor:
    """How far the logit of a pixel's own class lies above the logit of each class, summed over the
    pixels that count: (C,).
    """
    ignore_index = checks.label_to_ignore(options.ignore_index)
    label = counted_labels(target, logits.shape[1], ignore_index)
    logits = at_least_float32(logits)
    above = logits.gather(1, label.clamp(min=0)) - logits
    return above.where(label >= 0, 0).sum(dim=(0, 2, 3))


def _binary_log_loss_coefficients(
    pos_weight: Tensor | None, pixel_count: Tensor, logits: Tensor
) -> Tensor:
    """Coefficients (C, 2) of the log loss table, by channel and answer, in a mean over entries in
    which entries of label 1 are weighted; 0 where nothing counts.
    """
    mean = _log_loss_coefficients(None, pixel_count, logits)
    if pos_weight is None:
        return mean
    return mean * torch.stack((torch.ones_like(pos_weight), pos_weight), dim=1).to(mean.dtype)


def _check_activation_of(name: str, options: AffinityFieldOptions) -> None:
    """ValueError if the weight is of the other activation's cross-entropy."""
    needed = {"weight": "softmax", "pos_weight": "sigmoid"}[name]
    if options.activation != needed:
        other = "pos_weight" if name == "weight" else "weight"
        raise ValueError(
            f"{name} needs activation={needed!r}, got {options.activation!r}: pass {other}"
        )


def _coefficients(
    weights: tuple[Tensor | None, Tensor | None],
    options: AffinityFieldOptions,
    totals: Tensor,
    logits: Tensor,
) -> Tensor:
    """Coefficients (2, C, K) of the table entries in the loss: lambda * weight / the size's total;
    0 where nothing counts.
    """
    lambdas = tuple(
        options.affinity_lambda * x for x in (options.edge_lambda, options.non_edge_lambda)
    )
    dtype, shape = precision(logits), (logits.shape[1], totals.shape[1])
    # The coefficient of an empty size is 0, not 1: the other sizes' coefficients are about 1 /
    # millions, and rounding beside a 1 would drown them.
    scale_by_size = torch.where(totals > 0, totals.to(dtype).reciprocal(), 0)[:, None]
    if lambdas[0] == lambdas[1]:
        scale_by_size = lambdas[0] * scale_by_size
    else:  # a stack of two would be a launch for each of them under torch.compile
        is_edge = torch.arange(2, device=totals.device)[:, None, None] == 0
        scale_by_size = torch.where(is_edge, lambdas[0] * scale_by_size, lambdas[1] * scale_by_size)
    if weights[0] is None and weights[1] is None:
        coefficients = (scale_by_size / shape[1]).expand(2, *shape).contiguous()
    else:
        tables = [
            scale_by_size.new_full(shape, 1 / shape[1]) if weight is None else weight.to(dtype)
            for weight in weights
        ]
        coefficients = torch.stack(tables) * scale_by_size
    if not options.include_background:
        coefficients = F.pad(coefficients[:, 1:], (0, 0, 1, 0))
    return coefficients
