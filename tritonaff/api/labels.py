"""Labels at another resolution: a network's logits are often smaller than its labels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tritonaff import checks


def resize_labels(
    target: Tensor, size: Sequence[int] | int, *, align_corners: bool = False
) -> Tensor:
    r"""Labels at the resolution of the logits: the label of the nearest pixel, for any dtype.

    Output pixel i of n takes, along every axis of length m, input pixel

    .. math::

        \lfloor (i + 1/2) \, m / n \rfloor, \quad \text{or with align\_corners} \quad
        \lfloor i \, (m - 1) / (n - 1) + 1/2 \rfloor

    computed in integers. Choose ``align_corners`` as the network's upsampling has it: then the
    label is the one that the upsampled logit would meet. By default a stride of 4 from 512 to 128
    takes the pixels 2, 6, ... 510, the middles of blocks of 4. With ``align_corners=True``, as in
    DeepLab, 513 to 129 takes every fourth pixel, 0, 4, ... 512, where the default takes 1, 5, ...
    511. :func:`torch.nn.functional.interpolate` refuses integers; its mode "nearest-exact" is the
    default here, and "nearest" takes 0, 3, 7, ... 509: at the far end 3 pixels beside.

    Args:
        target: (N, H, W), (N, C, H, W) or (N, D, H, W) of any dtype, or any tensor whose last axes
            are resized.
        size: (H, W), or (D, H, W) for ids of volumes; an int is (H, W) = (size, size).
        align_corners: the pixels of the corners are kept, instead of the image's edges.

    Returns:
        The labels in the target's dtype; its last axes, as many as ``size`` names, have this size.

    Raises:
        TypeError, ValueError: a wrong type or dtype; a size below 1, or of more axes than the
            target has.

    Example:
        >>> import torch, tritonaff
        >>> target = torch.arange(9, dtype=torch.int16).expand(1, 9, 9)
        >>> tritonaff.resize_labels(target, (1, 3))[0, 0].tolist()
        [1, 4, 7]
        >>> tritonaff.resize_labels(target, (1, 3), align_corners=True)[0, 0].tolist()
        [0, 4, 8]
    """
    target, sizes = checks.check_labels_and_size(target, size)
    checks.check_bool("align_corners", align_corners)
    for dim, n in zip(range(-len(sizes), 0), sizes, strict=True):
        m = target.shape[dim]
        i = torch.arange(n, device=target.device)
        if not align_corners:
            nearest = (2 * i + 1) * m // (2 * n)
        else:  # a single output pixel takes the first one
            nearest = (2 * i * (m - 1) + n - 1) // max(2 * (n - 1), 1)
        target = target.index_select(dim, nearest)
    return target
