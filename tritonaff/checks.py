"""The checks that public functions share, so that the same mistake gets the same words everywhere.

TypeError for a wrong type or dtype, ValueError for a wrong shape, device or value; each message
names the expected and the given value.
"""

from __future__ import annotations

import math
import numbers
import operator
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd import forward_ad

Option = TypeVar("Option", bound=str)
# Labels in these dtypes are read as they are; other labels are converted first.
LABEL_DTYPES = (torch.uint8, torch.int32, torch.int64)
# Dtypes of labels, each with the dtype that it is read as.
TARGET_DTYPES = {
    **{dtype: dtype for dtype in LABEL_DTYPES},
    torch.bool: torch.uint8,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
    torch.uint16: torch.int32,
    torch.uint32: torch.int64,
    torch.uint64: torch.int64,
    torch.float16: torch.int64,
    torch.bfloat16: torch.int64,
    torch.float32: torch.int64,
    torch.float64: torch.int64,
}
# Stands for ignore_index=None: no image holds this label.
NO_LABEL = -(2**63)
COUNT_DTYPES = (torch.int32, torch.int64)
# Labels that are compared alone.
ID_DTYPES = tuple(dtype for dtype in TARGET_DTYPES if not dtype.is_floating_point)
# An affinity matrix is for people to look at: a larger matrix is taken for a mistake.
MAX_MATRIX_BYTES = 8 * 10**9
# Points of grids: more points would take seconds, and are taken for a mistake.
MAX_POINTS = 1 << 24
NO_PIXEL_WEIGHTS = (
    "pairs of pixels have no weights of pixels; to leave pixels out, as hard example mining does, "
    "pass target.masked_fill(~mask, ignore_index), and compute a weighted cross-entropy beside the "
    "loss"
)
LOGITS_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Opt-in: wrong labels fail an assertion on a device whose values may not be read.
ASSERT_LABELS = os.environ.get("TRITONAFF_CHECK") == "1"


def check_logits(value: Any, name: str = "logits", activation: str = "softmax") -> Tensor:
    logits = check_tensor(name, value, LOGITS_DTYPES, ("N", "C", "H", "W"))
    if any(size < 1 for size in logits.shape[1:]):
        raise ValueError(
            f"{name} must have at least one class, row and column, got shape {tuple(logits.shape)}"
        )
    if logits.shape[1] == 1 and activation == "softmax":
        background = "1 - probs" if name == "probs" else f"torch.zeros_like({name})"
        remedy = "" if name == "probs" else "activation='sigmoid' where there is one, or "
        raise ValueError(
            f"{name} must have at least two classes, got 1: a distribution over one class is 1 "
            f"everywhere; pass {remedy}torch.cat(({background}, {name}), dim=1)"
        )
    return logits


def check_target(value: Any, name: str = "target") -> Tensor:
    """The labels (N, H, W) of uint8, int32 or int64, from labels (N, H, W) or (N, 1, H, W) of any
    integer dtype, bool, or floating point that holds whole numbers.
    """
    target = check_tensor(name, value, tuple(TARGET_DTYPES), ("N", "H", "W"), with_channel=True)
    return _labels(target, name)


def _labels(target: Tensor, name: str = "target") -> Tensor:
    dtype = TARGET_DTYPES[target.dtype]
    if target.dtype != dtype:
        labels = target.to(dtype)
        if target.is_floating_point() and may_look_into(target):
            wrong = labels != target
            if wrong.any():
                raise ValueError(
                    f"{name} must hold whole numbers, got {target[wrong][:5].tolist()} at "
                    f"{int(wrong.sum())} pixels: pass labels, not probabilities"
                )
        target = labels
    if any(size < 1 for size in target.shape[-2:]):
        raise ValueError(
            f"{name} must have at least one row and column, got shape {tuple(target.shape)}"
        )
    return target


def check_labels_and_size(target: Any, size: Any) -> tuple[Tensor, tuple[int, ...]]:
    """Labels or ids of any shape, and the size that their last axes shall have."""
    target = check_tensor("target", target, tuple(TARGET_DTYPES), getattr(target, "shape", ()))
    sizes = _integers("size", size, at_least=1)
    if isinstance(size, numbers.Integral):
        sizes = sizes * 2
    if len(sizes) not in (2, 3) or len(sizes) > target.dim():
        raise ValueError(
            "size must be (H, W), or (D, H, W) for ids of volumes, of a target with these axes, "
            f"got {tuple(size) if is_sequence(size) else size} for {tuple(target.shape)}"
        )
    if 0 in target.shape[-len(sizes) :]:
        raise ValueError(
            f"target must have at least one row and column, got shape {tuple(target.shape)}"
        )
    return target, sizes


def check_logits_and_target(
    logits: Any, target: Any, activation: str = "softmax"
) -> tuple[Tensor, Tensor]:
    """With ``activation="sigmoid"`` the returned target is (N, C, H, W)."""
    logits = check_logits(logits, activation=activation)
    if activation == "sigmoid":
        return logits, check_target_by_channel(target, logits)
    target = check_target(target)
    check_one_device("logits", logits, "target", target)
    n, _, height, width = logits.shape
    if tuple(target.shape) != (n, height, width):
        raise ValueError(
            f"target must have the shape (N, H, W) = {(n, height, width)} "
            f"of logits {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
    return logits, target


def check_target_by_channel(value: Any, logits: Tensor, name: str = "target") -> Tensor:
    """The target (N, C, H, W) of yes-or-no labels; (N, H, W) is a target of one channel."""
    num_channels = logits.shape[1]
    if num_channels == 1:
        target = check_target(value, name)[:, None]
    else:
        shape = "N", num_channels, "H", "W"
        target = _labels(check_tensor(name, value, tuple(TARGET_DTYPES), shape), name)
    check_one_device("logits", logits, name, target)
    if target.shape != logits.shape:
        raise ValueError(
            f"{name} must have the shape (N, C, H, W) = {tuple(logits.shape)} of logits with "
            f"activation='sigmoid', got {tuple(target.shape)}"
        )
    return target


def check_probs_and_affinity(
    probs: Any, affinity: Any, num_rates: int, normalize: str
) -> tuple[Tensor, Tensor]:
    # A single class is 1 after normalisation, and any number without it.
    probs = check_logits(probs, "probs", "softmax" if normalize == "sum" else "sigmoid")
    affinity = check_tensor("affinity", affinity, LOGITS_DTYPES, ("N", "8 R", "H", "W"))
    check_one_device("probs", probs, "affinity", affinity)
    _check_affinity_shape("affinity", affinity, num_rates, "probs", probs)
    return probs, affinity


def check_images(value: Any, name: str = "images") -> Tensor:
    """Images (N, C, H, W), floating; bytes become float32."""
    images = check_tensor(name, value, (torch.uint8, *LOGITS_DTYPES), ("N", "C", "H", "W"))
    if any(size < 1 for size in images.shape[1:]):
        raise ValueError(
            f"{name} must have at least one channel, row and column, got shape "
            f"{tuple(images.shape)}"
        )
    return images.to(torch.float32) if images.dtype == torch.uint8 else images


def check_images_and_masks(images: Any, masks: Any) -> tuple[Tensor, Tensor]:
    images = check_images(images)
    masks = check_logits(masks, "masks", "sigmoid")
    check_one_device("images", images, "masks", masks)
    if len(masks) != len(images):
        raise ValueError(f"masks must be of {len(images)} images, got {len(masks)}")
    return images, masks


def check_colors(images: Any, name: str = "images") -> Tensor:
    """RGB images (N, 3, H, W) in [0, 1], from bytes or floats."""
    is_bytes = isinstance(images, Tensor) and images.dtype == torch.uint8
    colors = check_images(images, name)
    if colors.shape[1] != 3:
        raise ValueError(f"{name} must have three channels, R, G, B, got {colors.shape[1]}")
    if is_bytes:
        return colors.div(255)
    if may_look_into(colors) and colors.numel():
        least, most = (float(value) for value in colors.aminmax())
        if least < 0 or most > 1:
            raise ValueError(
                f"{name} in floating point must hold colours in [0, 1], got {least:g} to {most:g}: "
                "divide by 255, and undo a normalisation by mean and standard deviation"
            )
    return colors


def check_masks(mask_logits: Any, boxes: Any, labels: Any) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mask logits (M, H, W), boxes (M, 4), and labels (M, H, W) of bool or None."""
    shape: tuple[str | int, ...] = ("M", "H", "W")
    logits = check_tensor("mask_logits", mask_logits, LOGITS_DTYPES, shape, with_channel=True)
    if any(size < 1 for size in logits.shape[1:]):
        raise ValueError(
            f"mask_logits must have at least one row and column, got shape {tuple(logits.shape)}"
        )
    boxes = check_tensor("boxes", boxes, (*LOGITS_DTYPES, *COUNT_DTYPES), (len(logits), 4))
    check_one_device("mask_logits", logits, "boxes", boxes)
    if labels is not None:
        dtypes, shape = tuple(TARGET_DTYPES), tuple(logits.shape)
        labels = check_tensor("labels", labels, dtypes, shape, with_channel=True)
        labels = _labels(labels, "labels") != 0
        check_one_device("mask_logits", logits, "labels", labels)
    return logits, boxes, labels


def check_image_index(value: Any, mask_logits: Tensor, num_images: int) -> Tensor:
    """The number of each mask's image, (M,) of int64; None if there is one image."""
    m = len(mask_logits)
    if value is None:
        if num_images != 1:
            raise ValueError(
                f"image_index must be given for {num_images} images: (M,), the number of each "
                "mask's image"
            )
        return torch.zeros(m, dtype=torch.int64, device=mask_logits.device)
    index = check_tensor("image_index", value, COUNT_DTYPES, (m,))
    check_one_device("mask_logits", mask_logits, "image_index", index)
    if m and num_images == 0:
        raise ValueError(f"image_index must be of no mask without an image, got {m}")
    if m and may_look_into(index):
        least, most = (int(number) for number in index.aminmax())
        if least < 0 or most >= num_images:
            raise ValueError(
                f"image_index must hold numbers in [0, {num_images}), got {least} to {most}"
            )
    return index.to(torch.int64)


def check_affinity_logits_and_target(
    affinity_logits: Any, target: Any, num_rates: int
) -> tuple[Tensor, Tensor]:
    name = "affinity_logits"
    affinity_logits = check_tensor(name, affinity_logits, LOGITS_DTYPES, ("N", "8 R", "H", "W"))
    target = check_target(target)
    check_one_device(name, affinity_logits, "target", target)
    _check_affinity_shape(name, affinity_logits, num_rates, "target", target)
    return affinity_logits, target


def _check_affinity_shape(
    name: str, affinity: Tensor, num_rates: int, images_name: str, images: Tensor
) -> None:
    expected = images.shape[0], 8 * num_rates, *images.shape[-2:]
    if tuple(affinity.shape) != expected:
        raise ValueError(
            f"{name} must have the shape (N, 8 R, H, W) = {expected} of R = {num_rates} rates "
            f"and {images_name} {tuple(images.shape)}, got {tuple(affinity.shape)}"
        )


def check_ids(value: Any, dimensions: int) -> Tensor:
    """Ids (N, H, W) or (N, D, H, W), as many dimensions as the offsets have; a channel of size 1
    after N is dropped.
    """
    axes = ("D", "H", "W")[-dimensions:]
    ids = check_tensor("ids", value, ID_DTYPES, ("N", *axes), with_channel=True)
    if any(size < 1 for size in ids.shape[1:]):
        raise ValueError(f"ids must have at least one voxel, got shape {tuple(ids.shape)}")
    return ids


def check_logits_and_ids(
    logits: Any, ids: Any, offsets: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor]:
    """Logits with a channel for every offset, and ids of the same images or volumes."""
    dimensions = len(offsets[0])
    axes = ("D", "H", "W")[-dimensions:]
    logits = check_tensor("logits", logits, LOGITS_DTYPES, ("N", "K", *axes))
    ids = check_ids(ids, dimensions)
    check_one_device("logits", logits, "ids", ids)
    expected = ids.shape[0], len(offsets), *ids.shape[1:]
    if tuple(logits.shape) != expected:
        raise ValueError(
            f"logits must have the shape (N, K, {', '.join(axes)}) = {expected} of K = "
            f"{len(offsets)} offsets and ids {tuple(ids.shape)}, got {tuple(logits.shape)}"
        )
    return logits, ids


def check_statistics(
    statistics: Any, rates: tuple[tuple[int, int], ...], ignore_index: int | None
) -> tuple[Tensor, Tensor] | None:
    """Counts of pixels (R, 9) and of signals (R, 9, 2), from a pair or an object that has both."""
    if statistics is None:
        return None
    for name, mine in (("rates", rates), ("ignore_index", ignore_index)):
        theirs = getattr(statistics, name, mine)
        if theirs != mine:
            raise ValueError(f"statistics must be of the loss's {name} {mine}, got {theirs}")
    if hasattr(statistics, "pixel_count") and hasattr(statistics, "signal_count"):
        statistics = statistics.pixel_count, statistics.signal_count
    expected = "two tensors or arrays, or NeighborStatistics"
    pair = _sequence("statistics", statistics, expected=expected)
    if len(pair) != 2:
        raise ValueError(f"statistics must be (pixel_count, signal_count), got {len(pair)} of them")
    names = "statistics' pixel_count", "statistics' signal_count"
    shapes: tuple[tuple[int, ...], ...] = (len(rates), 9), (len(rates), 9, 2)
    pixel_count, signal_count = (
        check_tensor(name, _tensor(count), COUNT_DTYPES, shape)
        for name, count, shape in zip(names, pair, shapes, strict=True)
    )
    return pixel_count, signal_count


def check_class_weight(name: str, weight: Any, num_classes: int | None = None) -> Tensor:
    """The weight as a floating tensor (C,), from a tensor, an array or a sequence of C numbers."""
    if is_sequence(weight):
        numbers_ = [check_number(f"every one of {name}", number) for number in weight]
        weight = torch.tensor(numbers_, dtype=torch.float32)
    shape = ("C",) if num_classes is None else (num_classes,)
    return check_tensor(name, weight, LOGITS_DTYPES, shape)


def check_normalizer(value: Any, shape: tuple[int, ...], name: str, tensor: Tensor) -> Tensor:
    """The normalizer as int64: a total over processes may not fit int32."""
    normalizer = check_tensor("normalizer", value, COUNT_DTYPES, shape)
    check_one_device("normalizer", normalizer, name, tensor)
    return normalizer.to(torch.int64)


def check_together(
    reduction: str, normalizer: Tensor | None, process_group: dist.ProcessGroup | None
) -> None:
    """ValueError for a total of several batches where each image is a batch of its own, and for a
    divisor where nothing is divided.
    """
    for name, value, reductions in (
        ("normalizer", normalizer, ("none", "sum")),
        ("process_group", process_group, ("none",)),
    ):
        if value is not None and reduction in reductions:
            raise ValueError(f"{name} must be None with the reduction {reduction!r}")


def check_process_group(group: Any) -> None:
    if group is None:
        return
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "process_group must be None or a torch.distributed.ProcessGroup, "
            f"got {type(group).__name__}"
        )


def check_one_device(
    name: str, tensor: Tensor, other_name: str, other: Tensor, remedy: str = ""
) -> None:
    if tensor.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device, got {tensor.device} and {other.device}"
            f"{remedy}"
        )


def check_weight(name: str, weight: Any, shape: tuple[int, ...], logits: Tensor) -> Tensor | None:
    if weight is None:
        return None
    if isinstance(weight, Tensor) and weight.dim() >= 3:
        raise ValueError(
            f"{name} must have shape {shape}, got {tuple(weight.shape)}: {NO_PIXEL_WEIGHTS}"
        )
    plain = check_tensor(name, weight, LOGITS_DTYPES, shape)
    remedy = "; a loss with weights of its own moves with loss.to(device)"
    check_one_device(name, plain, "logits", logits, remedy)
    return plain


def check_progress(progress: Any, name: str = "progress") -> float | Tensor | None:
    """None, a number in [0, 1], or a 0-d tensor of such a number."""
    if progress is None:
        return None
    if not isinstance(progress, Tensor):
        return check_number(name, progress, at_least=0, at_most=1)
    if isinstance(progress, Tensor) and progress.dim() >= 3:
        raise ValueError(
            f"{name} must be a number, got shape {tuple(progress.shape)}: {NO_PIXEL_WEIGHTS}"
        )
    plain = check_tensor(name, progress, LOGITS_DTYPES, ())
    if may_look_into(plain):
        check_number(name, plain.item(), at_least=0, at_most=1)
    return plain


def may_look_into(tensor: Tensor) -> bool:
    """True if values can be read cheaply: on a CPU, in eager mode. Elsewhere a read would stall the
    stream or break the graph.
    """
    # While a graph is traced, stand-ins take the place of tensors and hold no values.
    holds_values = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return holds_values and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_label_values(target: Tensor, num_classes: int | None, ignore_index: int | None) -> None:
    """ValueError for a label that is neither a class nor ignore_index, where labels may be read.

    Elsewhere such pixels are ignored, or with TRITONAFF_CHECK=1 an assertion on the device fails.
    Without a number of classes every label of at least 0 is a class.
    """
    looked_at = may_look_into(target)
    if not (looked_at or ASSERT_LABELS):
        return
    label, ignored = target.to(torch.int64), label_to_ignore(ignore_index)
    if looked_at and label.numel():

        def are_classes(labels: Tensor) -> bool:
            least, most = labels.aminmax()
            return bool(least >= 0) and (num_classes is None or bool(most < num_classes))

        # One pass over the labels where none is ignored, and three elsewhere.
        if are_classes(label) or are_classes(label.where(label != ignored, 0)):
            return
    wrong = label < 0
    if num_classes is not None:
        wrong = wrong | (label >= num_classes)
    wrong = wrong & (label != ignored)
    end = "inf" if num_classes is None else num_classes
    expected = f"target must hold classes in [0, {end})"
    if ignore_index is not None:
        expected = f"{expected} or ignore_index {ignore_index}"
    if not looked_at:
        torch._assert_async(~wrong.any(), expected)
    elif wrong.any():
        labels = torch.unique(label[wrong])[:5].tolist()
        remedy = ""
        if -100 in labels:
            remedy = "; torch's own losses ignore -100: pass ignore_index=-100"
        raise ValueError(f"{expected}, got {labels} at {int(wrong.sum())} pixels{remedy}")


def check_kernel_sizes(kernel_sizes: Any) -> tuple[int, ...]:
    sizes = _integers("kernel_sizes", kernel_sizes)
    if not sizes or len(set(sizes)) != len(sizes) or any(s < 3 or s % 2 == 0 for s in sizes):
        raise ValueError(
            "kernel_sizes must be odd, at least 3 and distinct, at least one of them, "
            f"got {kernel_sizes}"
        )
    return sizes


def check_distances(distances: Any) -> tuple[int, ...]:
    values = _integers("distances", distances, at_least=1)
    if not values or list(values) != sorted(set(values)):
        raise ValueError(
            f"distances must be ascending and distinct, at least one of them, got {distances}"
        )
    return values


def check_dilations(dilations: Any) -> tuple[int, ...]:
    values = _integers("dilations", dilations, at_least=1)
    if not values or len(set(values)) != len(values):
        raise ValueError(f"dilations must be distinct, at least one of them, got {dilations}")
    return values


def check_grid_sizes(grid_sizes: Any) -> tuple[int, ...] | None:
    if grid_sizes is None:
        return None
    sizes = _integers("grid_sizes", grid_sizes, expected="int or None", at_least=1)
    if not sizes:
        raise ValueError("grid_sizes must hold at least one size, or be None for every pixel")
    points = sum(size * size for size in sizes)
    if points > MAX_POINTS:
        raise ValueError(f"grid_sizes must be of at most {MAX_POINTS} points, got {points}")
    return sizes


def check_matrices_fit(images: Tensor, grid_sizes: Sequence[int] | None) -> None:
    """ValueError if affinity matrices of these images would be too large."""
    n, height, width = images.shape[0], images.shape[-2], images.shape[-1]
    points = height * width if grid_sizes is None else sum(size * size for size in grid_sizes)
    size = n * points * points * (8 if images.dtype == torch.float64 else 4)
    if size > MAX_MATRIX_BYTES:
        raise ValueError(
            f"affinity matrices must take at most {MAX_MATRIX_BYTES // 10**9} GB, got {n} of "
            f"{points} x {points}, {_gigabytes(size)}: choose smaller grid_sizes or images; "
            "affinity_regression_terms and affinity_regression_loss need no matrix "
            "(except with the backend 'reference')"
        )


def _gigabytes(size: int) -> str:
    # Whole numbers, as under torch.compile a size may be a symbol, which has no digits to format.
    return f"{size // 10**12} TB" if size >= 10**13 else f"{size // 10**9} GB"


def check_rates(rates: Any) -> tuple[tuple[int, int], ...]:
    """Pairs (vertical, horizontal): an int r stands for (r, r), a pair for itself alone."""
    if isinstance(rates, numbers.Integral):
        rates = (rates,)
    entries = _sequence("rates", rates, expected="int and pairs of int")
    pairs = tuple(_check_rate(entry) for entry in entries)
    if not pairs or len(set(pairs)) != len(pairs) or any(min(pair) < 1 for pair in pairs):
        raise ValueError(
            f"rates must be at least 1 and distinct, at least one of them, got {rates}"
        )
    return pairs


def _check_rate(rate: Any) -> tuple[int, int]:
    if not is_sequence(rate):
        integer = check_int("every one of rates that is no pair", rate)
        return integer, integer
    if len(rate) != 2:
        raise ValueError(f"every one of rates must be an int or a pair of int, got {rate}")
    down, across = (check_int("both of a pair of rates", part) for part in rate)
    return down, across


def check_offsets(offsets: Any) -> tuple[tuple[int, ...], ...]:
    """Steps in voxels, (dy, dx) for images or (dz, dy, dx) for volumes, one for each channel."""
    entries = _sequence("offsets", offsets, expected="pairs or triples of int")
    least = 1 - 2**63  # so that the opposite step fits 64 bits too
    steps = tuple(_integers("an offset's steps", entry, at_least=least) for entry in entries)
    sizes = {len(step) for step in steps}
    if sizes not in ({2}, {3}) or not all(any(step) for step in steps):
        raise ValueError(
            "offsets must be pairs (dy, dx) or triples (dz, dy, dx), all of one length and none of "
            f"them 0, at least one of them, got {offsets}"
        )
    return steps


def _integers(
    name: str, value: Any, *, expected: str = "int", at_least: int = -(2**63)
) -> tuple[int, ...]:
    """A sequence of integers; a single integer stands for a sequence of one."""
    if isinstance(value, numbers.Integral):
        value = (value,)
    entries = _sequence(name, value, expected=expected)
    return tuple(check_int(f"every one of {name}", x, at_least=at_least) for x in entries)


def _sequence(name: str, value: Any, *, expected: str) -> list[Any]:
    if not is_sequence(value):
        raise TypeError(f"{name} must be a sequence of {expected}, got {type(value).__name__}")
    return list(value)


def is_sequence(value: Any) -> bool:
    """True for any type of sequence, NumPy's arrays and configuration libraries' lists included."""
    if isinstance(value, (str, bytes, Mapping, Tensor)):
        return False
    return isinstance(value, Sequence) or getattr(value, "ndim", 0) > 0


def _tensor(value: Any) -> Any:
    """A NumPy array as a tensor; every other value as it is."""
    is_array = hasattr(value, "__array__") and not isinstance(value, Tensor)
    return torch.as_tensor(value) if is_array else value


def check_ignore_index(value: Any) -> int | None:
    return None if value is None else check_int("ignore_index", value)


def label_to_ignore(ignore_index: int | None) -> int:
    return NO_LABEL if ignore_index is None else ignore_index


def check_id(name: str, value: Any) -> int | None:
    """None, or an id of any dtype of 64 bits."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int or None, got {type(value).__name__}")
    integer: int = operator.index(value)
    if not -(2**63) <= integer < 2**64:
        raise ValueError(f"{name} must fit 64 bits, got {integer}")
    return integer


def check_weighted(name: str, value: Any, options: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Pairs of an option and its weight, from one option, a mapping, or pairs."""
    if isinstance(value, str):
        value = {value: 1.0}
    if isinstance(value, Mapping):
        value = tuple(value.items())
    entries = _sequence(name, value, expected="str, a mapping, or pairs of str and number")
    pairs = tuple((check_option(name, option, options), weight) for option, weight in entries)
    if not pairs or len(dict(pairs)) != len(pairs):
        raise ValueError(f"{name} must name distinct losses, at least one of them, got {value}")
    return tuple(
        (option, check_number(f"the weight of {option!r}", weight, at_least=0))
        for option, weight in pairs
    )


def check_num_classes(value: Any, activation: str = "softmax") -> int:
    num_classes = check_int("num_classes", value, at_least=1)
    if num_classes < 2 and activation == "softmax":
        raise ValueError(
            f"num_classes must be at least 2, got {num_classes}: pass activation='sigmoid', or "
            "give the background a channel of its own, torch.cat((torch.zeros_like(logits), "
            "logits), dim=1)"
        )
    return num_classes


def renamed(old_name: str, old: Any, name: str, value: Any) -> Any:
    """The value of an argument that had another name; the old name warns."""
    if old is None:
        return value
    warnings.warn(f"{old_name} is now {name}", DeprecationWarning, stacklevel=4)
    if value is not None:
        raise ValueError(f"{old_name} and {name} are one argument: pass {name} alone")
    return old


def check_factors(name: str, value: Any) -> tuple[float, ...]:
    """Factors of at least 0, one of them above 0."""
    entries = _sequence(name, value, expected="numbers")
    factors = tuple(check_number(f"every one of {name}", x, at_least=0) for x in entries)
    if not any(factors):
        raise ValueError(f"{name} must have a number above 0, got {value}")
    return factors


def check_number(
    name: str,
    value: Any,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
) -> float:
    """A finite number within the bounds, as a Python float; NumPy's numbers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    number = float(value)
    if not (at_least <= number <= at_most and above < number < below):
        low = f"[{at_least}" if at_least > above else f"({above}"
        high = f"{at_most}]" if at_most < below else f"{below})"
        raise ValueError(f"{name} must be in {low}, {high}, got {value}")
    return number


def check_int(name: str, value: Any, *, at_least: int = -(2**63)) -> int:
    """An integer of 64 bits, as a Python int; NumPy's integers too."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    integer: int = operator.index(value)
    if integer < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {integer}")
    if integer >= 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {integer}")
    return integer


def check_bool(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def check_option(name: str, value: Any, options: Sequence[Option]) -> Option:
    if value not in options:
        raise ValueError(f"{name} must be one of {tuple(options)}, got {value!r}")
    option: Option = value
    return option


def check_tensor(
    name: str,
    value: Any,
    dtypes: Sequence[torch.dtype],
    shape: Sequence[str | int],
    *,
    with_channel: bool = False,
) -> Tensor:
    """A dense tensor of one of the dtypes and this rank; ints in ``shape`` are exact sizes. With
    ``with_channel`` a second dimension of size 1 is taken too, and dropped.

    Returns it as a plain torch.Tensor: a subclass may have methods that behave differently.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "device_mesh"):
        raise TypeError(
            f"{name} must be a tensor of this process alone, got a DTensor: pass "
            f"{name}.to_local(); a loss takes all processes' batches as one with process_group="
        )
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {got}")
    if not torch.compiler.is_compiling():
        dual = forward_ad.unpack_dual(value)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:  # a custom op would drop it
            raise TypeError(f"{name} must be no dual tensor: there are no forward-mode derivatives")
    if value.dtype not in dtypes:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name} must have dtype {expected}, got {str(value.dtype).removeprefix('torch.')}"
        )
    sizes = tuple(value.shape)
    if with_channel and len(sizes) == len(shape) + 1 and sizes[1] == 1:
        value = _plain(value).squeeze(1)
        sizes = tuple(value.shape)
    fits = all(
        not isinstance(want, int) or want == size for want, size in zip(shape, sizes, strict=False)
    )
    if len(sizes) != len(shape) or not fits:
        comma = "," if len(shape) == 1 else ""
        expected = f"({', '.join(map(str, shape))}{comma})"
        raise ValueError(f"{name} must have shape {expected}, got {sizes}")
    return _plain(value)


def _plain(tensor: Tensor) -> Tensor:
    # Subclasses with a dispatch of their own are the tracers' stand-ins, and stay as they are.
    kind = type(tensor)
    is_subclass = kind is not Tensor and kind is not torch.nn.Parameter
    if is_subclass and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return tensor.as_subclass(Tensor)
    return tensor
