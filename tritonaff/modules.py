"""The losses and operations as modules: options, and the weights that a loss learns, in one
place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from tritonaff import checks
from tritonaff.functional import (
    VARIANTS,
    WEIGHTINGS,
    affinity_field_and_cross_entropy,
    affinity_field_counts,
    affinity_propagation,
    affinity_regression_loss,
    affinity_regression_terms,
    dilated_affinity_loss,
    neighbor_counts,
)
from tritonaff.rates import DIRECTIONS
from tritonaff.statistics import NeighborStatistics


class _Loss(nn.Module):
    """What all losses have: a process_group, which copies of a module share, as those that average
    weights are: a group is the processes themselves.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        super().__init__()
        checks.check_process_group(process_group)
        self.process_group = process_group

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loss:
        memo[id(self.process_group)] = self.process_group
        copied = memo[id(self)] = type(self).__new__(type(self))
        state = copy.deepcopy(self.__getstate__(), memo)  # type: ignore[no-untyped-call]
        copied.__setstate__(state)  # type: ignore[no-untyped-call]
        return copied


class AffinityFieldLoss(_Loss):
    """:func:`tritonaff.affinity_field_loss` with fixed options and the papers' decay.

    Args:
        kernel_sizes: K distinct odd sizes, each at least 3.
        edge_lambda, non_edge_lambda, margin, eps, ignore_index, variant, process_group: see
            :func:`tritonaff.affinity_field_loss`.
        cross_entropy: add cross-entropy, as :func:`tritonaff.affinity_field_cross_entropy` does.
        class_weight: (C,) floating, or a sequence of C numbers: the weights of the classes in it.
            Default 1.

    Shapes:
        ``forward(logits, target, progress=None, normalizer=None)`` with logits (N, C, H, W) and
        target (N, H, W) gives a scalar. ``progress`` in [0, 1], the fraction of training done,
        multiplies it by 10 ** -progress as the authors do, but not cross-entropy. (A tensor is
        held to that range where labels are looked at: on a CPU, in eager mode.) Under
        torch.compile pass a 0-d tensor: a Python float that changes compiles a second time. In a
        CUDA graph it must be on the logits' device: another is read once, when it is captured.
        ``normalizer``, (2, K), is that of :func:`tritonaff.affinity_field_loss`; cross-entropy,
        which divides by another number, must then be computed beside the loss.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.AffinityFieldLoss(kernel_sizes=(3, 5))
        >>> logits = torch.randn(1, 3, 8, 8, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 8, 8))
        >>> loss_fn(logits, target, progress=0.5).backward()
    """

    def __init__(
        self,
        kernel_sizes: Sequence[int] = (3,),
        *,
        edge_lambda: float = 1.0,
        non_edge_lambda: float = 1.0,
        margin: float = 3.0,
        eps: float = 1e-4,
        ignore_index: int = 255,
        variant: str = "paper",
        cross_entropy: bool = False,
        class_weight: Tensor | Sequence[float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group)
        self.kernel_sizes = checks.check_kernel_sizes(kernel_sizes)
        self.edge_lambda = checks.check_number("edge_lambda", edge_lambda, at_least=0)
        self.non_edge_lambda = checks.check_number("non_edge_lambda", non_edge_lambda, at_least=0)
        self.margin = checks.check_number("margin", margin, at_least=0)
        self.eps = checks.check_number("eps", eps, above=0, below=0.5)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        checks.check_option("variant", variant, VARIANTS)
        self.variant = variant
        self.cross_entropy = checks.check_bool("cross_entropy", cross_entropy)
        if class_weight is not None:
            class_weight = checks.check_class_weight("class_weight", class_weight)
            if not cross_entropy:
                raise ValueError("class_weight needs cross_entropy=True")
        self.class_weight: Tensor | None
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        return self._loss(logits, target, progress, normalizer=normalizer)

    def normalizer(self, target: Tensor, num_classes: int) -> Tensor:
        """(2, K) int64: how many edge and non-edge entries labels (N, H, W) of C classes have.

        It adds up over the parts of a batch, and ``forward`` of a part divides by it: gradients are
        accumulated to those of the batch.
        """
        num_classes = checks.check_num_classes(num_classes)
        target = checks.check_target(target)
        n, height, width = target.shape
        blank = torch.zeros((), device=target.device).expand(n, num_classes, height, width)
        totals, _, _ = affinity_field_counts(
            blank,
            target,
            self.kernel_sizes,
            margin=0.0,  # counts do not know it, nor eps
            eps=0.25,
            ignore_index=self.ignore_index,
            variant=self.variant,
        )
        return totals

    def _loss(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None,
        normalizer: Tensor | None,
        edge_weight: Tensor | None = None,
        non_edge_weight: Tensor | None = None,
    ) -> Tensor:
        if self.cross_entropy and normalizer is not None:
            raise ValueError(
                "normalizer must be None with cross_entropy=True, which divides by another number: "
                "compute cross-entropy beside the loss"
            )
        return affinity_field_and_cross_entropy(
            logits,
            target,
            self.kernel_sizes,
            progress=progress,
            cross_entropy=self.cross_entropy,
            weight=self.class_weight,
            weight_name="class_weight",
            edge_weight=edge_weight,
            non_edge_weight=non_edge_weight,
            edge_lambda=self.edge_lambda,
            non_edge_lambda=self.non_edge_lambda,
            margin=self.margin,
            eps=self.eps,
            ignore_index=self.ignore_index,
            variant=self.variant,
            normalizer=normalizer,
            process_group=self.process_group,
        )

    def extra_repr(self) -> str:
        return (
            f"kernel_sizes={self.kernel_sizes}, edge_lambda={self.edge_lambda}, "
            f"non_edge_lambda={self.non_edge_lambda}, margin={self.margin}, eps={self.eps}, "
            f"ignore_index={self.ignore_index}, variant={self.variant!r}, "
            f"cross_entropy={self.cross_entropy}"
        )


class AdaptiveAffinityFieldLoss(AffinityFieldLoss):
    """The adaptive affinity field loss: each class learns its sizes, in a minimax game.

    The weights of the edge and of the non-edge term are softmaxes over the K sizes of free
    parameters (C, K) that start at 0. The network minimises the loss and the weights maximise it;
    the gradient of the weights is reversed inside, so one ordinary optimiser step does both. Give
    the weights no weight decay: :meth:`optimizer_group`.

    The weights are parameters of this module: move it to the logits' device. With a process_group
    their gradients are the same in all processes, inside a wrapped module or beside it. Without
    one, compute the loss inside the module that DistributedDataParallel wraps, or the processes'
    weights drift apart.

    Args:
        num_classes: C, at least 2.
        kernel_sizes: K distinct odd sizes, each at least 3.
        edge_lambda, non_edge_lambda, margin, eps, ignore_index, variant, process_group: see
            :func:`tritonaff.affinity_field_loss`.
        cross_entropy, class_weight: see :class:`AffinityFieldLoss`.

    Shapes:
        ``forward(logits, target, progress=None, normalizer=None)`` as :class:`AffinityFieldLoss`;
        logits must have C classes.

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
        kernel_sizes: Sequence[int] = (3, 5, 7),
        *,
        edge_lambda: float = 1.0,
        non_edge_lambda: float = 1.0,
        margin: float = 3.0,
        eps: float = 1e-4,
        ignore_index: int = 255,
        variant: str = "paper",
        cross_entropy: bool = False,
        class_weight: Tensor | Sequence[float] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(
            kernel_sizes,
            edge_lambda=edge_lambda,
            non_edge_lambda=non_edge_lambda,
            margin=margin,
            eps=eps,
            ignore_index=ignore_index,
            variant=variant,
            cross_entropy=cross_entropy,
            class_weight=class_weight,
            process_group=process_group,
        )
        self.num_classes = checks.check_num_classes(num_classes)
        if self.class_weight is not None:
            checks.check_class_weight("class_weight", self.class_weight, self.num_classes)
        shape = self.num_classes, len(self.kernel_sizes)
        self.edge_scores = nn.Parameter(torch.zeros(shape))
        self.non_edge_scores = nn.Parameter(torch.zeros(shape))

    @property
    def edge_weight(self) -> Tensor:
        """(C, K) weights of the sizes in the edge term; each row sums to 1. Sharded by FSDP they
        are gathered: all processes must ask for them.
        """
        return _full(self.edge_scores).softmax(dim=1)

    @property
    def non_edge_weight(self) -> Tensor:
        """(C, K) weights of the sizes in the non-edge term, as :attr:`edge_weight`."""
        return _full(self.non_edge_scores).softmax(dim=1)

    def effective_kernel_size(self) -> tuple[Tensor, Tensor]:
        """The mean kernel size of every class, (C,), by the edge weights and by the non-edge
        weights (paper, 5.4).
        """
        edge_weight, non_edge_weight = self.edge_weight.detach(), self.non_edge_weight.detach()
        sizes = edge_weight.new_tensor(self.kernel_sizes)
        return edge_weight @ sizes, non_edge_weight @ sizes

    def optimizer_group(self, lr: float) -> dict[str, Any]:
        """The weights as a parameter group for a torch optimiser: this learning rate and no weight
        decay.
        """
        checks.check_number("lr", lr, at_least=0)
        return {"params": [self.edge_scores, self.non_edge_scores], "lr": lr, "weight_decay": 0.0}

    def normalizer(self, target: Tensor, num_classes: int | None = None) -> Tensor:
        """See :meth:`AffinityFieldLoss.normalizer`."""
        return super().normalizer(target, self.num_classes if num_classes is None else num_classes)

    def forward(
        self,
        logits: Tensor,
        target: Tensor,
        progress: float | Tensor | None = None,
        normalizer: Tensor | None = None,
    ) -> Tensor:
        if isinstance(logits, Tensor) and logits.dim() == 4 and logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits must have num_classes = {self.num_classes} classes, got {logits.shape[1]}"
            )
        return self._loss(
            logits,
            target,
            progress,
            edge_weight=_adversarial_softmax(self.edge_scores),
            non_edge_weight=_adversarial_softmax(self.non_edge_scores),
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, {super().extra_repr()}"


class AffinityRegressionLoss(_Loss):
    """:func:`tritonaff.affinity_regression_loss` with fixed options.

    The paper adds it to cross-entropy with the weight 0.1, for fine-tuning, when training with
    cross-entropy alone has reached its peak.

    Args:
        grid_sizes, ignore_index, process_group: see :func:`tritonaff.affinity_regression_loss`.

    Shapes:
        ``forward(logits, target, normalizer=None)`` with logits (N, C, H, W) and target (N, H, W)
        gives a scalar.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.AffinityRegressionLoss(grid_sizes=(12, 6))
        >>> logits = torch.randn(1, 3, 48, 64, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 48, 64))
        >>> (0.1 * loss_fn(logits, target)).backward()
    """

    def __init__(
        self,
        grid_sizes: Sequence[int] | None = (12, 6),
        ignore_index: int = 255,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group)
        self.grid_sizes = checks.check_grid_sizes(grid_sizes)
        self.ignore_index = checks.check_ignore_index(ignore_index)

    def forward(self, logits: Tensor, target: Tensor, normalizer: Tensor | None = None) -> Tensor:
        return affinity_regression_loss(
            logits,
            target,
            self.grid_sizes,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            process_group=self.process_group,
        )

    def normalizer(self, target: Tensor) -> Tensor:
        """int64 scalar: how many of the labels (N, H, W) have a point that counts. It adds up over
        the parts of a batch, and ``forward`` of a part divides by it.
        """
        target = checks.check_target(target)
        void = (target.to(torch.int64) == self.ignore_index).to(torch.int64)
        n, height, width = void.shape
        blank = torch.zeros((), device=target.device).expand(n, 2, height, width)
        terms = affinity_regression_terms(blank, void, self.grid_sizes, ignore_index=1)
        return (terms.pair_count > 0).sum()

    def extra_repr(self) -> str:
        return f"grid_sizes={self.grid_sizes}, ignore_index={self.ignore_index}"


class DilatedAffinityHead(nn.Conv2d):
    """Predicts dilated affinity from features: a 1 x 1 convolution whose first prediction is the
    frequency of "same label".

    Args:
        in_channels: of the features, at least 1.
        rates: R distinct rates, those of the loss and the propagation.
        positive_frequency: fraction of the signals whose target is "same", in (0, 1): one for all
            rates, R of them, or a :class:`tritonaff.NeighborStatistics` of the same rates, whose
            counts n are then n + 1, so that never or always is finite too. None: 0.5.

    Shapes:
        ``forward(features)`` with features (N, in_channels, H, W) gives logits (N, 8 R, H, W),
        with the channels of :func:`tritonaff.dilated_affinity_target`.

    Raises:
        TypeError, ValueError: a wrong option when the module is made.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Sec. 4.1. It prints the bias as
    -log(pi / (1 - pi)), after RetinaNet, whose formula is -log((1 - pi) / pi): only the latter
    predicts pi, the frequency of positive signals. As in RetinaNet, weights start with a deviation
    of 0.01, so that they hardly disturb it.

    Example:
        >>> import torch, tritonaff
        >>> head = tritonaff.DilatedAffinityHead(256, rates=[8, 16], positive_frequency=[0.9, 0.8])
        >>> head(torch.zeros(1, 256, 4, 4)).sigmoid()[0, ::8, 0, 0].tolist()
        [0.8999999761581421, 0.800000011920929]
    """

    def __init__(
        self,
        in_channels: int,
        rates: Sequence[int | tuple[int, int]],
        positive_frequency: float | Sequence[float] | Tensor | NeighborStatistics | None = None,
    ) -> None:
        in_channels = checks.check_int("in_channels", in_channels, at_least=1)
        self.rates = checks.check_rates(rates)
        # Set before Conv2d's __init__, which calls reset_parameters.
        self.positive_frequency = _check_positive_frequency(positive_frequency, self.rates)
        super().__init__(in_channels, len(self.rates) * len(DIRECTIONS), kernel_size=1)

    def reset_parameters(self) -> None:
        assert self.bias is not None
        nn.init.normal_(self.weight, std=0.01)
        # On the host, whatever the default device: not every one has float64.
        frequency = torch.tensor(self.positive_frequency, dtype=torch.float64, device="cpu")
        bias = frequency.logit().repeat_interleave(len(DIRECTIONS))
        with torch.no_grad():
            self.bias.copy_(_like(bias, self.bias))

    def extra_repr(self) -> str:
        frequency = ", ".join(f"{x:.4g}" for x in self.positive_frequency)
        return f"{self.in_channels}, rates={self.rates}, positive_frequency=({frequency})"


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The same tensor in all processes, on the parameter's device and in its dtype, as a DTensor
    where the parameter is one (FSDP).
    """
    tensor = tensor.to(parameter.dtype).to(parameter.device)
    if not hasattr(parameter, "device_mesh"):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


def _check_positive_frequency(value: Any, rates: tuple[tuple[int, int], ...]) -> tuple[float, ...]:
    """One for each rate."""
    if isinstance(value, NeighborStatistics):
        if value.rates != rates:
            raise ValueError(f"positive_frequency must be of the rates {rates}, got {value.rates}")
        different, same = (value.signal_count.cpu().double().sum(dim=1) + 1).unbind(dim=1)
        return tuple((same / (same + different)).tolist())
    if value is None:
        value = 0.5
    if isinstance(value, Tensor):
        value = value.tolist()
    if not checks.is_sequence(value):
        value = [value] * len(rates)
    if len(value) != len(rates):
        raise ValueError(
            f"positive_frequency must be a number or one for each of {len(rates)} rates, "
            f"got {len(value)} numbers"
        )
    return tuple(checks.check_number("positive_frequency", x, above=0, below=1) for x in value)


class DilatedAffinityLoss(_Loss):
    """:func:`tritonaff.dilated_affinity_loss` with fixed options.

    Args:
        rates, weighting, statistics, gamma, beta, ignore_index, process_group: see
            :func:`tritonaff.dilated_affinity_loss`. The counts of the statistics are copied into
            buffers, which move with the module.

    Shapes:
        ``forward(affinity_logits, target, normalizer=None)`` with affinity_logits (N, 8 R, H, W)
        and target (N, H, W) gives a scalar.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> rates = tritonaff.expand_rates([2, (2, 4)])
        >>> loss_fn = tritonaff.DilatedAffinityLoss(rates, beta=0.1)
        >>> affinity_logits = torch.randn(1, 8 * len(rates), 16, 16, requires_grad=True)
        >>> target = torch.randint(0, 3, (1, 16, 16))
        >>> loss_fn(affinity_logits, target).backward()
    """

    pixel_count: Tensor | None
    signal_count: Tensor | None

    def __init__(
        self,
        rates: Sequence[int | tuple[int, int]],
        *,
        weighting: str = "sqrt",
        statistics: Any = None,
        gamma: float = 2.0,
        beta: float = 1.0,
        ignore_index: int = 255,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(process_group)
        self.rates = checks.check_rates(rates)
        checks.check_option("weighting", weighting, WEIGHTINGS)
        self.weighting = weighting
        self.gamma = checks.check_number("gamma", gamma, at_least=0)
        self.beta = checks.check_number("beta", beta, at_least=0)
        self.ignore_index = checks.check_ignore_index(ignore_index)
        given = checks.check_statistics(statistics, self.rates, self.ignore_index)
        for name, count in zip(("pixel_count", "signal_count"), given or (None, None), strict=True):
            self.register_buffer(name, None if count is None else count.detach().clone())

    def forward(
        self, affinity_logits: Tensor, target: Tensor, normalizer: Tensor | None = None
    ) -> Tensor:
        counts = self.pixel_count, self.signal_count
        return dilated_affinity_loss(
            affinity_logits,
            target,
            self.rates,
            weighting=self.weighting,
            statistics=None if self.pixel_count is None else counts,
            gamma=self.gamma,
            beta=self.beta,
            ignore_index=self.ignore_index,
            normalizer=normalizer,
            process_group=self.process_group,
        )

    def normalizer(self, target: Tensor) -> Tensor:
        """(R, 9, 3) int64: how many pixels, and signals of different and of same labels, the labels
        (N, H, W) have. It adds up over the parts of a batch, and ``forward`` of a part uses it.
        """
        counts = neighbor_counts(target, self.rates, ignore_index=self.ignore_index)
        return torch.cat((counts.pixel_count[..., None], counts.signal_count), dim=-1)

    def extra_repr(self) -> str:
        return (
            f"rates={self.rates}, weighting={self.weighting!r}, "
            f"statistics={'batch' if self.pixel_count is None else 'given'}, gamma={self.gamma}, "
            f"beta={self.beta}, ignore_index={self.ignore_index}"
        )


class AffinityPropagation(nn.Module):
    """:func:`tritonaff.affinity_propagation` with fixed options.

    Args:
        rates, iterations, self_weight, steepness, from_logits: see
            :func:`tritonaff.affinity_propagation`.

    Shapes:
        ``forward(probs, affinity)`` with probs (N, C, H, W) and affinity (N, 8 R, H, W) gives the
        refined probs, (N, C, H, W).

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> propagate = tritonaff.AffinityPropagation(rates=[1, (2, 3)])
        >>> probs, affinity = torch.randn(1, 4, 8, 8).softmax(dim=1), torch.randn(1, 16, 8, 8)
        >>> propagate(probs, affinity).shape
        torch.Size([1, 4, 8, 8])
    """

    def __init__(
        self,
        rates: Sequence[int | tuple[int, int]],
        *,
        iterations: int = 10,
        self_weight: float = 6.0,
        steepness: float = 7.0,
        from_logits: bool = True,
    ) -> None:
        super().__init__()
        self.rates = checks.check_rates(rates)
        self.iterations = checks.check_int("iterations", iterations, at_least=0)
        self.self_weight = checks.check_number("self_weight", self_weight, above=0)
        self.steepness = checks.check_number("steepness", steepness, above=1)
        self.from_logits = checks.check_bool("from_logits", from_logits)

    def forward(self, probs: Tensor, affinity: Tensor) -> Tensor:
        return affinity_propagation(
            probs,
            affinity,
            self.rates,
            iterations=self.iterations,
            self_weight=self.self_weight,
            steepness=self.steepness,
            from_logits=self.from_logits,
        )

    def extra_repr(self) -> str:
        return (
            f"rates={self.rates}, iterations={self.iterations}, self_weight={self.self_weight}, "
            f"steepness={self.steepness}, from_logits={self.from_logits}"
        )


def _full(parameter: Tensor) -> Tensor:
    """The parameter in full, where FSDP has shared it out."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    full: Tensor = parameter.full_tensor()
    return full


def _adversarial_softmax(scores: Tensor) -> Tensor:
    """The softmax, with the negated gradient: what the loss's minimiser does to it maximises."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    # Exactly the scores. An autograd.Function would lose its gradient in torch.export.
    return (2 * scores.detach() - scores).softmax(dim=1)
