"""Affinities of pixels by their colours, and the refinement of masks with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from tritonaff import checks
from tritonaff.api.affinity_propagation import affinity_propagation
from tritonaff.api.module import OptionsModule
from tritonaff.ops import image_affinity as ops
from tritonaff.options import ImageAffinityMode, RefinementOptions, refinement_options


def image_affinity(
    images: Tensor, dilations: Sequence[int] | int, *, mode: ImageAffinityMode = "pamr"
) -> Tensor:
    r"""Weights with which a pixel takes over masks from neighbours of similar colours.

    With x the image, j the 8 neighbours of pixel i at every dilation (outside the image its border
    pixels go on), :math:`r_j` their distances in pixels, and means over the channels:

    .. math::

        \text{pamr:}\quad & k_{ij} = \operatorname{softmax}_j \Big( -\operatorname{mean}
            \frac{|x_i - x_j|}{10^{-8} + 0.1 \, s_i} \Big) \\
        \text{par:}\quad & k_{ij} = \operatorname{softmax}_j \Big( -\operatorname{mean}
            \Big(\frac{|x_i - x_j|}{0.3 \, (s_i + 10^{-8})}\Big)^2 \Big)
            + 0.01 \operatorname{softmax}_j \Big(
            -\Big(\frac{r_j}{0.3 \, (s_r + 10^{-8})}\Big)^2 \Big)

    where s are unbiased standard deviations, one for each channel: of the neighbours' colours, in
    ``"pamr"`` together with the pixel's own colour once for every dilation; of the distances.

    Args:
        images: (N, C, H, W) of uint8, float16, bfloat16, float32 or float64, any strides, of any
            range and number of channels. Half precision is read as it is and computed in float32.
        dilations: D distinct distances in pixels, each at least 1.
        mode: ``"pamr"`` or ``"par"``.

    Returns:
        (N, 8 D, H, W) in the dtype of the images, float32 for uint8: channels by dilation, then by
        neighbour, row by row, as :func:`affinity_propagation` takes them. The weights of a pixel
        sum to 1, in ``"par"`` to 1.01. Differentiable with respect to the images: once, in reverse
        mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, dilation or mode.

    Papers: "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020), pixel-adaptive mask
    refinement; "Learning Affinity from Attention" (CVPR 2022) and "Token Contrast" (CVPR 2023),
    pixel-adaptive refinement; each as its published code has it.

    Example:
        >>> import torch, tritonaff
        >>> images = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8)
        >>> weights = tritonaff.image_affinity(images, [1, 2])
        >>> weights.shape, torch.allclose(weights.sum(dim=1), torch.ones(1, 8, 8))
        (torch.Size([1, 16, 8, 8]), True)
    """
    dilations = checks.check_dilations(dilations)
    mode = checks.check_option("mode", mode, ops.MODES)
    return ops.weights(checks.check_images(images), dilations, mode)


class PAMR(OptionsModule):
    """Pixel-adaptive mask refinement: arguments and results of ``PAMR`` of 1-stage-wseg.

    Every iteration replaces a pixel of the masks by the weighted mean of its neighbours, with the
    weights of :func:`tritonaff.image_affinity` in the mode ``"pamr"``.

    Args:
        num_iter: number of iterations.
        dilations: distances of the neighbours in pixels; the project's are 1, 2, 4, 8, 12, 24.

    Shapes:
        ``forward(x, mask)`` with images x (N, K, H, W) and mask (N, C, h, w), any numbers, gives
        the refined masks (N, C, H, W), in the dtype of mask. Masks of another size are first
        resized, bilinearly, with aligned corners. Differentiable with respect to both, once.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Checkpoints may hold the kernels of the original module: loading ignores them.

    Example:
        >>> import torch, tritonaff
        >>> refine = tritonaff.PAMR(num_iter=10, dilations=[1, 2, 4])
        >>> images, masks = torch.rand(2, 3, 32, 32), torch.rand(2, 21, 8, 8)
        >>> refine(images, masks).shape
        torch.Size([2, 21, 32, 32])
    """

    def __init__(self, num_iter: int = 1, dilations: Sequence[int] | int = (1,)) -> None:
        super().__init__(refinement_options(num_iter, dilations))
        self.register_load_state_dict_pre_hook(_drop_kernels)  # type: ignore[no-untyped-call]

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The masks (N, C, H, W), refined by the images.

        Args:
            x: images (N, K, H, W), uint8 or floating.
            mask: masks (N, C, h, w), floating, any numbers; another size is first resized.
        """
        return _refine(x, mask, "pamr", self.options)


class PAR(OptionsModule):
    """Pixel-adaptive refinement: arguments and results of ``PAR`` of AFA and ToCo.

    Every iteration replaces a pixel of the masks by the weighted sum of its neighbours, with the
    weights of :func:`tritonaff.image_affinity` in the mode ``"par"``. These sum to 1.01, as in the
    original: ten iterations multiply the masks by 1.1, which no argmax sees.

    Args:
        dilations: distances of the neighbours in pixels; both projects have 1, 2, 4, 8, 12, 24.
        num_iter: number of iterations; both projects have 10.

    Shapes:
        ``forward(imgs, masks)`` with imgs (N, K, H, W) and masks (N, C, h, w), any numbers, gives
        the refined masks (N, C, H, W), in the dtype of masks. Masks of another size are first
        resized, bilinearly, with aligned corners. Differentiable with respect to both, once.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> refine = tritonaff.PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
        >>> images, masks = torch.rand(1, 3, 32, 32), torch.rand(1, 2, 32, 32)
        >>> refine(images, masks).shape
        torch.Size([1, 2, 32, 32])
    """

    def __init__(self, dilations: Sequence[int] | int, num_iter: int) -> None:
        super().__init__(refinement_options(num_iter, dilations))
        self.register_load_state_dict_pre_hook(_drop_kernels)  # type: ignore[no-untyped-call]

    def forward(self, imgs: Tensor, masks: Tensor) -> Tensor:
        """The masks (N, C, H, W), refined by the images.

        Args:
            imgs: images (N, K, H, W), uint8 or floating.
            masks: masks (N, C, h, w), floating, any numbers; another size is first resized.
        """
        return _refine(imgs, masks, "par", self.options)


def _refine(
    images: Tensor, masks: Tensor, mode: ImageAffinityMode, options: RefinementOptions
) -> Tensor:
    images, masks = checks.check_images_and_masks(images, masks)
    size = images.shape[2:]
    if masks.shape[2:] != size:
        masks = F.interpolate(masks, size=size, mode="bilinear", align_corners=True)
    return affinity_propagation(
        masks,
        ops.weights(images, options.dilations, mode),
        options.dilations,
        iterations=options.num_iter,
        self_weight=0,
        from_logits=False,
        normalize="none",
        border="replicate",
    )


def _drop_kernels(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    """The original modules keep constant convolution kernels among their state."""
    for name in [name for name in state if name.startswith(prefix) and name.endswith("kernel")]:
        del state[name]
