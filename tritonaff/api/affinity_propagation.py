"""Affinity propagation: refines a segmentation by a predicted affinity."""

from __future__ import annotations

from torch import Tensor

from tritonaff import checks
from tritonaff.api.module import OptionsModule
from tritonaff.ops import affinity_propagation as ops
from tritonaff.options import (
    AffinityPropagationOptions,
    Border,
    Normalize,
    Rates,
    affinity_propagation_options,
)


def affinity_propagation(
    probs: Tensor,
    affinity: Tensor,
    rates: Rates,
    *,
    iterations: int = 10,
    self_weight: float = 6.0,
    steepness: float = 7.0,
    from_logits: bool = True,
    normalize: Normalize = "sum",
    border: Border = "valid",
) -> Tensor:
    r"""Refines a segmentation: every pixel takes over probabilities from its affine neighbours.

    One iteration replaces the class probabilities p of every pixel i by

    .. math::

        p'_i = N\Big(\lambda \, p_i \max_c p_i(c) + \sum_s a_{is} \, p_s\Big), \qquad
        a_{is} = \frac{\mu^{x_{is}}}{1 + \mu^{x_{is}}}

    where s runs over the neighbours at all rates that are inside the image, x is the affinity logit
    and N divides by the sum over classes. A sure pixel keeps its class; an unsure pixel follows its
    neighbours.

    Args:
        probs: (N, C, H, W) of float16, bfloat16, float32 or float64, any strides: probabilities,
            not logits. They need not sum to 1, but should be finite and not negative. Half
            precision is read as it is and iterated in float32.
        affinity: (N, 8 R, H, W) of one of these dtypes, which may differ from the dtype of
            ``probs``. Channels are ordered by rate and, within a rate (r1, r2), by neighbour:
            {-r1, 0, r1} rows x {-r2, 0, r2} columns without the centre, row by row.
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r). No
            rate is too large for an image: pixels outside are no neighbours. The paper's bracket
            notation: :func:`expand_rates`.
        iterations: number of iterations; 0 gives a copy.
        self_weight: lambda, at least 0.
        steepness: mu, above 1; e would be the ordinary sigmoid.
        from_logits: True: ``affinity`` holds the logits x. False: ``affinity`` holds a itself, in
            [0, 1] (not checked), and steepness has no effect.
        normalize: ``"sum"`` is N. ``"none"`` leaves N out: with ``from_logits=False`` and
            ``self_weight=0`` each pixel becomes the sum of its neighbours with the weights a as
            they are, of any sign, and probs may be any numbers, of one class too.
        border: ``"valid"``: there are no neighbours outside the image. ``"replicate"``: the border
            pixels go on outside.

    Returns:
        (N, C, H, W) in the dtype and memory format of ``probs``; sums to 1 over the classes, unless
        ``normalize="none"``. A pixel whose divisor is 0 (its probabilities are all 0, and its
        neighbours add nothing) is 0 in every class, with a zero gradient. Differentiable with
        respect to ``probs`` and ``affinity``: once, in reverse mode. The backward pass computes the
        iterations again and holds them all; with other than the default ``normalize`` and
        ``border`` torch operations compute it, on every device.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range.

    Paper: "Improving Semantic Segmentation via Dilated Affinity", Eq. 6 and 7. Copies of the paper
    that lost the exponent show Eq. 7 as mu x / (1 + mu x); only the power is the steeper sigmoid
    that the text describes. The paper leaves open the border and the derivative of max: we sum over
    the neighbours inside, and max passes its gradient to the first of the largest classes, as
    ``torch.max(dim)`` does. ``normalize`` and ``border`` are for weights that come from elsewhere:
    :func:`image_affinity` has some.

    Example:
        >>> import torch, tritonaff
        >>> probs = torch.tensor([0.9, 0.6, 0.4]).view(1, 1, 1, 3)  # one row of three pixels
        >>> probs = torch.cat((probs, 1 - probs), dim=1)  # the third one is of the other class
        >>> affinity = torch.full((1, 8, 1, 3), 5.0)  # but affine to its neighbour
        >>> tritonaff.affinity_propagation(probs, affinity, rates=[1]).argmax(dim=1).tolist()
        [[[0, 0, 0]]]
    """
    options = affinity_propagation_options(
        rates,
        iterations=iterations,
        self_weight=self_weight,
        steepness=steepness,
        from_logits=from_logits,
        normalize=normalize,
        border=border,
    )
    return _propagate(probs, affinity, options)


class AffinityPropagation(OptionsModule):
    """:func:`tritonaff.affinity_propagation` with fixed options.

    Args:
        rates: R distinct rates; a pair (r1, r2) is r1 rows and r2 columns, an int r is (r, r).
        iterations: number of iterations; 0 gives a copy.
        self_weight: lambda, at least 0: how much a sure pixel keeps its class.
        steepness: mu, above 1; e would be the ordinary sigmoid.
        from_logits: True: the affinity is given as logits. False: as numbers in [0, 1].
        normalize: ``"sum"``: divide by the sum over the classes after each iteration; ``"none"``.
        border: ``"valid"``: there are no neighbours outside the image. ``"replicate"``: the border
            pixels go on outside.

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
        rates: Rates,
        *,
        iterations: int = 10,
        self_weight: float = 6.0,
        steepness: float = 7.0,
        from_logits: bool = True,
        normalize: Normalize = "sum",
        border: Border = "valid",
    ) -> None:
        options = affinity_propagation_options(
            rates,
            iterations=iterations,
            self_weight=self_weight,
            steepness=steepness,
            from_logits=from_logits,
            normalize=normalize,
            border=border,
        )
        super().__init__(options)

    def forward(self, probs: Tensor, affinity: Tensor) -> Tensor:
        """The refined probabilities, (N, C, H, W), in the dtype of probs.

        Args:
            probs: (N, C, H, W) of float16, bfloat16, float32 or float64: probabilities, not logits.
            affinity: (N, 8 R, H, W) of one of these dtypes, by rate and neighbour.
        """
        return _propagate(probs, affinity, self.options)


def _propagate(probs: Tensor, affinity: Tensor, options: AffinityPropagationOptions) -> Tensor:
    probs, affinity = checks.check_probs_and_affinity(
        probs, affinity, len(options.rates), options.normalize
    )
    return ops.propagate(probs, affinity, options)
