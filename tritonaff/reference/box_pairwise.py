"""Box-supervised pairwise loss as Tian, Shen, Wang and Chen define it ("BoxInst", CVPR 2021), in
eager PyTorch.

This file is the specification: every other implementation is tested against it in float64. The code
is written to be read beside the paper and never optimised.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.reference.affinity_field import DIRECTIONS, shifted

# From linear RGB with the primaries of sRGB to X, Y, Z relative to the white of D65.
XYZ_OF_RGB = (
    (0.412453, 0.357580, 0.180423),
    (0.212671, 0.715160, 0.072169),
    (0.019334, 0.119193, 0.950227),
)
WHITE = 0.95047, 1.0, 1.08883


def lab_of_rgb(images: Tensor) -> Tensor:
    """CIE L, a, b (N, 3, H, W) of sRGB images in [0, 1]."""
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    matrix = torch.tensor(XYZ_OF_RGB, dtype=images.dtype, device=images.device)
    white = torch.tensor(WHITE, dtype=images.dtype, device=images.device)
    xyz = torch.einsum("ij,njhw->nihw", matrix, linear) / white[:, None, None]
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    f_x, f_y, f_z = f.unbind(dim=1)
    return torch.stack((116 * f_y - 16, 500 * (f_x - f_y), 200 * (f_y - f_z)), dim=1)


def color_similarity(
    images: Tensor, valid: Tensor | None, *, dilation: int, color_space: str
) -> Tensor:
    """exp(-|c_i - c_j| / 2) of the 8 neighbours (N, 8, H, W); 0 where j is outside the image or not
    valid (N, H, W).
    """
    x = images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
    colors = lab_of_rgb(x) if color_space == "lab" else x
    inside = torch.ones_like(x[:, 0]) if valid is None else valid.to(x.dtype)
    values = []
    for dy, dx in DIRECTIONS:
        there = shifted(colors, dilation * dy, dilation * dx, 0)
        distance = (colors - there).square().sum(dim=1).sqrt()
        values.append((-distance / 2).exp() * shifted(inside, dilation * dy, dilation * dx, 0))
    return torch.stack(values, dim=1)


def box_pairwise_tables(
    mask_logits: Tensor,
    similarity: Tensor,
    boxes: Tensor,
    image_index: Tensor,
    labels: Tensor | None,
    *,
    dilation: int,
) -> tuple[Tensor, Tensor]:
    """Sums of -log P, or with labels of -(y log P + (1 - y) log(1 - P)), and counts of pairs, by
    mask: (M,) each.

    mask_logits and labels (M, H, W); similarity (N, H, W), bit k for neighbour k; boxes (M, 4),
    first row and column, and the row and column after the last ones; image_index (M,).
    """
    half = mask_logits.dtype in (torch.float16, torch.bfloat16)
    x = mask_logits.float() if half else mask_logits
    rows = torch.arange(x.shape[1], device=x.device)[:, None]
    columns = torch.arange(x.shape[2], device=x.device)
    top, left, bottom, right = boxes[:, :, None, None].unbind(dim=1)
    in_box = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    inside = torch.ones_like(in_box, dtype=torch.uint8)
    log_loss, count = x.new_zeros(len(x)), torch.zeros_like(image_index)
    for k, (dy, dx) in enumerate(DIRECTIONS):
        step = dilation * dy, dilation * dx
        similar = (similarity[image_index] >> k) & 1 & shifted(inside, *step, 0)
        pair = (similar == 1) & in_box
        # Logits of pixels in no pair may be NaN.
        x_i, x_j = x.where(pair, 0), shifted(x, *step, 0).where(pair, 0)
        log_p_i, log_q_i, log_p_j, log_q_j = (F.logsigmoid(t) for t in (x_i, -x_i, x_j, -x_j))
        log_loss_of_pair = -torch.logaddexp(log_p_i + log_p_j, log_q_i + log_q_j)
        if labels is not None:
            y = labels == shifted(labels.to(torch.uint8), *step, 0)
            log_not_p = torch.logaddexp(log_p_i + log_q_j, log_q_i + log_p_j)
            log_loss_of_pair = log_loss_of_pair.where(y, -log_not_p)
        log_loss = log_loss + (log_loss_of_pair * pair).sum(dim=(1, 2))
        count = count + pair.sum(dim=(1, 2))
    return log_loss, count
