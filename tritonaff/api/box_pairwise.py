"""Box-supervised pairwise loss: pixels of similar colours in an instance's box get one label."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from tritonaff import checks
from tritonaff.api.module import Loss
from tritonaff.distributed import all_reduce
from tritonaff.ops import box_pairwise as ops
from tritonaff.options import BoxPairwiseOptions, ColorSpace, Reduction, box_pairwise_options
from tritonaff.portable.blocks import at_least_float32


class BoxPairwiseTerms(NamedTuple):
    """Sums and counts of pairs by mask."""

    count: Tensor  # type: ignore[assignment]
    """(M,): number of pairs; int64."""
    log_loss: Tensor
    """(M,): sum of -log P, of -log(1 - P) where labels differ; float32, float64 for float64 logits,
    differentiable.
    """


def color_similarity(
    images: Tensor,
    *,
    dilation: int = 2,
    color_space: ColorSpace = "lab",
    stride: int = 1,
    valid: Tensor | None = None,
    threshold: float | None = None,
) -> Tensor:
    r"""Similarity of each pixel's colour to the colours of 8 neighbours.

    With c the colours and j the 8 neighbours of pixel i at a distance of ``dilation`` rows and
    columns:

    .. math::

        s_{ij} = \exp(-\lVert c_i - c_j \rVert_2 / 2)

    and 0 where j is outside the image or not valid. All masks of an image share its similarity.

    Args:
        images: (N, 3, H', W') of uint8, or of float16, bfloat16, float32 or float64 in [0, 1]; R,
            G, B. With ``color_space="rgb"`` any range and number of channels.
        dilation: distance of the neighbours in pixels of the masks, at least 1.
        color_space: ``"lab"``: colours are CIE L, a, b of sRGB at the white of D65; ``"rgb"``: the
            images as they are, bytes divided by 255.
        stride: pixels of the images for one of the masks, H = H' / stride rounded down: a mask's
            pixel has their mean colour.
        valid: (N, H', W') of bool or numbers, not 0 in the true image: batches are padded. With a
            stride, the pixel at ``stride // 2`` is looked at. None: all pixels.
        threshold: None for values, a number in [0, 1] for bits.

    Returns:
        Values (N, 8, H, W) in [0, 1], float32, float64 for float64 images: channels by neighbour,
        row by row. With a threshold, uint8 (N, H, W): bit k is 1 where the value of neighbour k is
        at least the threshold. Not differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; on a CPU, floating colours outside [0, 1].

    Paper: "BoxInst: High-Performance Instance Segmentation with Box Annotations" (CVPR 2021),
    Eq. 6. Its code rounds mean colours down to bytes before the conversion to L, a, b.

    Example:
        >>> import torch, tritonaff
        >>> images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        >>> tritonaff.color_similarity(images, stride=4).shape
        torch.Size([2, 8, 16, 24])
        >>> bits = tritonaff.color_similarity(images, stride=4, threshold=0.3)
        >>> bits.shape, bits.dtype
        (torch.Size([2, 16, 24]), torch.uint8)
    """
    dilation = checks.check_int("dilation", dilation, at_least=1)
    stride = checks.check_int("stride", stride, at_least=1)
    color_space = checks.check_option("color_space", color_space, ops.COLOR_SPACES)
    if threshold is not None:
        threshold = checks.check_number("threshold", threshold, at_least=0, at_most=1)
    if color_space == "lab":
        colors = checks.check_colors(images)
    else:
        colors = checks.check_images(images)
        colors = colors / 255 if images.dtype == torch.uint8 else colors
    if min(colors.shape[2:]) < stride:
        raise ValueError(
            f"stride must be at most the images' rows and columns {tuple(colors.shape[2:])}, "
            f"got {stride}"
        )
    if valid is not None:
        shape = len(colors), *colors.shape[2:]
        valid = checks.check_tensor("valid", valid, tuple(checks.TARGET_DTYPES), shape) != 0
        checks.check_one_device("images", colors, "valid", valid)
        height, width = (size // stride for size in colors.shape[2:])
        valid = valid[:, stride // 2 :: stride, stride // 2 :: stride][:, :height, :width]
    colors = at_least_float32(colors.detach())
    colors = F.avg_pool2d(colors, stride) if stride > 1 else colors
    return ops.similarity(colors, valid, dilation, color_space, threshold)


def box_pairwise_terms(
    mask_logits: Tensor,
    similarity: Tensor | None,
    boxes: Tensor,
    image_index: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    threshold: float = 0.3,
    dilation: int = 2,
    stride: int = 1,
) -> BoxPairwiseTerms:
    r"""Sums and counts from which the box-supervised pairwise loss is computed, in one pass.

    With x the logits of a mask, p their sigmoid, and q = 1 - p, the probability that pixels i and j
    have one label is

    .. math::

        P = p_i p_j + q_i q_j

    A pair (i, j) of a pixel in the mask's box and one of its 8 neighbours counts if their colours
    are similar. The tables hold the number of pairs that count and the sum of -log P; two pixels
    that are both in the box are two pairs. All terms and their gradients are finite for every
    finite logit.

    Args:
        mask_logits: (M, H, W) or (M, 1, H, W) of float16, bfloat16, float32 or float64, any
            strides: M instances of N images together. Half precision is read as it is and computed
            in float32. Logits of pixels in no pair that counts may be NaN.
        similarity: of :func:`color_similarity` at the same ``dilation`` and ``stride``: values (N,
            8, H, W), of which ``threshold`` makes bits, or bits (N, H, W) of uint8. Or the images
            themselves, (N, 3, stride H, stride W), of which every pixel is valid. None, with
            ``labels``: every pair inside the image.
        boxes: (M, 4), floating point, int32 or int64: left, top, right, bottom in pixels of the
            images. With a stride, a mask's pixel stands for the image's pixel at ``stride // 2``;
            it is in the box if this pixel is, edges included: floor(left) <= column <=
            floor(right).
        image_index: (M,) of int32 or int64: the image of each mask. None if there is one image.
        labels: (M, H, W) or (M, 1, H, W), the true masks, not 0 inside, for full supervision: pairs
            of different labels have -log(1 - P).
        threshold: the least similarity of a pair that counts.
        dilation: distance of the neighbours in pixels of the masks.
        stride: pixels of the images for one of the masks.

    Returns:
        :class:`BoxPairwiseTerms`. Differentiable with respect to the logits: once, in reverse mode.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: a wrong shape, device or range; neither similarity nor labels; on a CPU, an
            image_index that is no image's.

    Paper: "BoxInst: High-Performance Instance Segmentation with Box Annotations" (CVPR 2021),
    Eq. 5 and 7. On a GPU, a mask whose image_index is no image's has no pairs.

    Example:
        >>> import torch, tritonaff
        >>> images = torch.zeros(1, 3, 8, 8)  # one colour
        >>> boxes = torch.tensor([[2.0, 2.0, 4.0, 3.0]])  # three columns, two rows
        >>> mask_logits = torch.zeros(1, 8, 8)
        >>> terms = tritonaff.box_pairwise_terms(mask_logits, images, boxes)
        >>> terms.count.tolist(), (terms.log_loss / terms.count).tolist()  # P is 1 / 2
        ([48], [0.6931471824645996])
    """
    options = box_pairwise_options(threshold=threshold, dilation=dilation, stride=stride)
    return _terms(mask_logits, similarity, boxes, image_index, labels, options)


def box_pairwise_loss(
    mask_logits: Tensor,
    similarity: Tensor | None,
    boxes: Tensor,
    image_index: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    warmup: float | Tensor | None = None,
    threshold: float = 0.3,
    dilation: int = 2,
    stride: int = 1,
    reduction: Reduction = "mean",
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    r"""BoxInst's pairwise loss: similar colours in a box mean one label.

    With the pairs (i, j) of :func:`box_pairwise_terms` of all masks together:

    .. math::

        L = \frac{\sum -\log P_{ij}}{\max(1, \text{number of pairs})}, \quad
        P_{ij} = p_i p_j + (1 - p_i)(1 - p_j)

    With ``labels`` and without similarity, the fully supervised form: -log(1 - P) where the true
    labels of i and j differ, over all pairs of a pixel in the box and a neighbour in the image.

    Args:
        mask_logits: (M, H, W) or (M, 1, H, W) of float16, bfloat16, float32 or float64: M instances
            of N images together.
        similarity: of :func:`color_similarity` at the same ``dilation`` and ``stride``, (N, 8, H,
            W) or bits (N, H, W); or the images themselves, (N, 3, stride H, stride W). None, with
            ``labels``: every pair inside the image.
        boxes: (M, 4), left, top, right, bottom in pixels of the images, floating point or integers.
        image_index: (M,) of int32 or int64: the image of each mask. None if there is one image.
        labels: (M, H, W) or (M, 1, H, W), the true masks, not 0 inside, for full supervision.
        warmup: a factor in [0, 1] of the loss, a number or a tensor: BoxInst takes
            ``min(iteration / 10000, 1)``. None: 1.
        threshold: the least similarity of a pair that counts.
        dilation: distance of the neighbours in pixels of the masks.
        stride: pixels of the images for one of the masks.
        reduction: ``"mean"``: the pairs of all masks are one batch. ``"sum"``: not divided.
            ``"none"``: the loss of each mask over its own pairs.
        process_group: None: the masks of this process. A group: the masks of all its processes as
            one batch, for which every process must call; the gradient is multiplied by the number
            of processes, a factor that averaging of gradients cancels.

    Returns:
        A scalar, or (M,) with ``reduction="none"``: float32, float64 for float64 logits. 0, with a
        zero gradient, without a pair.

    Raises:
        TypeError, ValueError: as :func:`box_pairwise_terms`; a warmup outside [0, 1] (not checked
            on a GPU); an unknown reduction; a process_group with ``reduction="none"``.

    Paper: "BoxInst: High-Performance Instance Segmentation with Box Annotations" (CVPR 2021),
    Eq. 5 and 7; the paper's loss of projections is not part of it. docs/box_pairwise.md has both.

    Example:
        >>> import torch, tritonaff
        >>> images = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
        >>> boxes = torch.tensor([[4.0, 4.0, 40.0, 50.0], [30.0, 9.0, 80.0, 60.0]])
        >>> image_index = torch.tensor([0, 1])
        >>> mask_logits = torch.randn(2, 16, 24, requires_grad=True)  # an image's 4 x 4 pixels each
        >>> loss = tritonaff.box_pairwise_loss(
        ...     mask_logits, images, boxes, image_index, stride=4, warmup=0.5
        ... )
        >>> loss.backward()
    """
    options = box_pairwise_options(
        threshold=threshold, dilation=dilation, stride=stride, reduction=reduction
    )
    return _loss(
        mask_logits, similarity, boxes, image_index, labels, warmup, options, process_group
    )


class BoxPairwiseLoss(Loss):
    """:func:`tritonaff.box_pairwise_loss` with fixed options.

    Args:
        threshold: the least similarity of a pair that counts.
        dilation: distance of the neighbours in pixels of the masks.
        stride: pixels of the images for one of the masks.
        reduction: ``"mean"``: the pairs of all masks are one batch. ``"sum"``: not divided.
            ``"none"``: the loss of each mask, (M,).
        process_group: None: the masks of this process. A group: the masks of all its processes as
            one batch, for which every process must call; the gradient is multiplied by the number
            of processes, a factor that averaging of gradients cancels.

    Shapes:
        ``loss(mask_logits, similarity, boxes)``, and more arguments of :meth:`forward`, with
        mask logits (M, H, W) or (M, 1, H, W), similarity (N, 8, H, W), its bits (N, H, W) or the
        images (N, 3, stride H, stride W), and boxes (M, 4) gives a scalar, or (M,) with
        ``reduction="none"``.

    Raises:
        TypeError, ValueError: a wrong option when the module is made, wrong tensors when it is
            called.

    Example:
        >>> import torch, tritonaff
        >>> loss_fn = tritonaff.BoxPairwiseLoss(threshold=0.3, dilation=2)
        >>> images, boxes = torch.rand(1, 3, 16, 24), torch.tensor([[2, 3, 9, 12]])
        >>> mask_logits = torch.randn(1, 16, 24, requires_grad=True)
        >>> loss_fn(mask_logits, images, boxes, warmup=0.1).backward()
    """

    def __init__(
        self,
        threshold: float = 0.3,
        dilation: int = 2,
        *,
        stride: int = 1,
        reduction: Reduction = "mean",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        options = box_pairwise_options(
            threshold=threshold, dilation=dilation, stride=stride, reduction=reduction
        )
        super().__init__(options, process_group)

    def forward(
        self,
        mask_logits: Tensor,
        similarity: Tensor | None,
        boxes: Tensor,
        image_index: Tensor | None = None,
        labels: Tensor | None = None,
        warmup: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch.

        Args:
            mask_logits: (M, H, W) or (M, 1, H, W) of float16, bfloat16, float32 or float64: M
                instances of N images together.
            similarity: of :func:`color_similarity` at the same ``dilation`` and ``stride``, (N, 8,
                H, W) or bits (N, H, W); or the images themselves, (N, 3, stride H, stride W). None,
                with ``labels``: every pair inside the image.
            boxes: (M, 4), left, top, right, bottom in pixels of the images.
            image_index: (M,) of int32 or int64: the image of each mask. None if there is one image.
            labels: (M, H, W) or (M, 1, H, W), the true masks, not 0 inside, for full supervision.
            warmup: a factor in [0, 1] of the loss, a number or a tensor: BoxInst takes
                ``min(iteration / 10000, 1)``. None: 1.

        Returns:
            A scalar, or (M,) with ``reduction="none"``: float32, float64 for float64 logits.
        """
        return _loss(
            mask_logits, similarity, boxes, image_index, labels, warmup, self.options,
            self.process_group,
        )  # fmt: skip


def _loss(
    mask_logits: Tensor,
    similarity: Tensor | None,
    boxes: Tensor,
    image_index: Tensor | None,
    labels: Tensor | None,
    warmup: float | Tensor | None,
    options: BoxPairwiseOptions,
    process_group: dist.ProcessGroup | None,
) -> Tensor:
    warmup = checks.check_progress(warmup, "warmup")
    checks.check_process_group(process_group)
    checks.check_together(options.reduction, None, process_group)
    count, log_loss = _terms(mask_logits, similarity, boxes, image_index, labels, options)
    if options.reduction != "none":
        log_loss, count = all_reduce([log_loss.sum(), count.sum()], process_group)
    loss = log_loss if options.reduction == "sum" else log_loss / count.clamp(min=1)
    if warmup is not None:
        loss = loss * (warmup.to(loss) if isinstance(warmup, Tensor) else warmup)
    return loss


def _terms(
    mask_logits: Tensor,
    similarity: Tensor | None,
    boxes: Tensor,
    image_index: Tensor | None,
    labels: Tensor | None,
    options: BoxPairwiseOptions,
) -> BoxPairwiseTerms:
    logits, boxes, labels = checks.check_masks(mask_logits, boxes, labels)
    bits = _bits(similarity, logits, labels, options)
    if similarity is None:  # no image says anything: every mask has the pairs of the one
        image_index = None
    image_index = checks.check_image_index(image_index, logits, len(bits))
    places = _places(boxes, options.stride, logits.shape[1:])
    log_loss, count = ops.tables(logits, bits, places, image_index, labels, options.dilation)
    return BoxPairwiseTerms(count, log_loss)


def _bits(
    similarity: Tensor | None, logits: Tensor, labels: Tensor | None, options: BoxPairwiseOptions
) -> Tensor:
    """Bits (N, H, W) of the pairs that count, from any form of similarity."""
    _, height, width = logits.shape
    if similarity is None:
        if labels is None:
            raise ValueError("similarity must be given where there are no labels, got None")
        return torch.full((1, height, width), 255, dtype=torch.uint8, device=logits.device)
    dtypes = torch.uint8, *checks.LOGITS_DTYPES
    shape = tuple(getattr(similarity, "shape", ()))
    similarity = checks.check_tensor("similarity", similarity, dtypes, shape)
    checks.check_one_device("mask_logits", logits, "similarity", similarity)
    is_bytes = similarity.dtype == torch.uint8
    size = height, width
    if len(shape) == 3 and shape[1:] == size and is_bytes:
        return similarity
    if len(shape) == 4 and shape[1:] == (8, *size) and not is_bytes:
        return ops.bits_of(similarity.detach(), options.threshold)
    pooled = tuple(length // options.stride for length in shape[2:])
    if len(shape) == 4 and shape[1] == 3 and pooled == size:
        return color_similarity(
            similarity,
            dilation=options.dilation,
            stride=options.stride,
            threshold=options.threshold,
        )
    raise ValueError(
        f"similarity must be values (N, 8, H, W), bits (N, H, W) of uint8 or images (N, 3, stride "
        f"H, stride W), with (H, W) = {tuple(size)} of mask_logits and stride {options.stride}, "
        f"got {str(similarity.dtype).removeprefix('torch.')} {shape}"
    )


def _places(boxes: Tensor, stride: int, size: torch.Size) -> Tensor:
    """First row, first column, and the row and column after the last ones, (M, 4) of int64, of the
    pixels whose image pixel is in the box.
    """
    # Numbers beyond any image would not fit int64. A box with NaN is empty.
    far = 1 << 30
    left, top, right, bottom = boxes.detach().floor().clamp(-far, far).unbind(dim=1)
    start, (height, width) = stride // 2, size
    ends = []
    for edge, instead_of_nan, length, past in (
        (top, far, height, stride - 1),
        (left, far, width, stride - 1),
        (bottom, -far, height, stride),
        (right, -far, width, stride),
    ):
        pixel = edge.nan_to_num(instead_of_nan).to(torch.int64) - start + past
        ends.append(torch.div(pixel, stride, rounding_mode="floor").clamp(0, length))
    return torch.stack(ends, dim=1)
