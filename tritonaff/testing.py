"""Inputs and a yardstick of correctness for every operation: for tests, the bench, and for fuzzing
your own kernels against the reference.

A :class:`Case` makes inputs for an operation and knows its tables and its loss.
:func:`check_parity` compares an implementation with the float64 reference and raises
:class:`ParityError` where the implementation is further off than eager mode may be:

>>> from dataclasses import replace
>>> from tritonaff.testing import CASES, check_parity
>>> case = CASES["affinity_field"]
>>> for seed in range(2):  # N x C x H x W = 2 x 5 x 12 x 17
...     inputs = case.make_inputs((2, 5, 12, 17), confidence=3 * seed, seed=seed)
...     check_parity(case, "portable", *inputs)

An implementation is a backend of this library, or your own functions in a copy of the case:

>>> mine = replace(case, loss=lambda logits, target: 1.01 * case.loss(logits, target))
>>> check_parity(case, mine, *inputs)  # doctest: +ELLIPSIS
Traceback (most recent call last):
tritonaff.testing.ParityError: affinity_field replaced: loss is off by ...
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tritonaff.functional import (
    affinity_field_cross_entropy,
    affinity_field_loss,
    affinity_field_terms,
    affinity_propagation,
    affinity_regression_loss,
    affinity_regression_terms,
    box_pairwise_loss,
    box_pairwise_terms,
    color_similarity,
    dilated_affinity_loss,
    dilated_affinity_terms,
    instance_affinity_loss,
    instance_affinity_target,
    instance_affinity_terms,
)
from tritonaff.modules import PAR
from tritonaff.offsets import instance_offsets
from tritonaff.ops.backend import use_backend
from tritonaff.options import Backend
from tritonaff.rates import rate_offsets

Shape = tuple[int, ...]


def make_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) and a target (N, H, W) of patches about a sixth of the image wide.

    At 256 x 512 some 6 % of the neighbouring pixels then differ, as in street scenes; 1 % of the
    pixels are ignored. ``confidence`` is the height of the true class's logit above unit noise: 0
    is a network at its start, 9 a confident network.
    """
    n, c, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    cell = max(4, min(height, width) // 6)
    patches = (-(-height // cell), -(-width // cell))
    target = torch.randint(0, c, (n, *patches), generator=generator)
    target = target.repeat_interleave(cell, dim=1).repeat_interleave(cell, dim=2)
    target = target[:, :height, :width].contiguous()
    one_hot = F.one_hot(target, c).movedim(-1, 1).contiguous()
    logits = confidence * one_hot + torch.randn(shape, generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.01] = 255
    return logits.to(device, dtype), target.to(device)


def make_sigmoid_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (N, C, H, W) and a target of 0, 1 and 255, of the same shape: in every channel patches
    as in :func:`make_inputs`, half of them 1.
    """
    n, c, height, width = shape
    logits, target = make_inputs((n * c, 2, height, width), confidence=confidence, seed=seed)
    logits, target = logits[:, 1] - logits[:, 0], target.view(shape)
    return logits.view(shape).to(device, dtype), target.to(device)


def make_propagation_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, C, H, W) and a target (N, H, W) as from :func:`make_inputs`, and affinity logits
    (N, 8 R, H, W) of R = 4 rates, which are as close to the target as the logits are.
    """
    logits, target = make_inputs(shape, dtype, "cpu", confidence=confidence, seed=seed)
    affinity = _affinity_logits(target, confidence, seed + 1)
    return logits.to(device), target.to(device), affinity.to(device, dtype)


def make_dilated_affinity_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Affinity logits (N, 8 R, H, W) of R = 4 rates and a target (N, H, W) of 21 classes. The
    logits are as close to the target as in :func:`make_inputs`. The C of ``shape`` is ignored.
    """
    n, _, height, width = shape
    _, target = make_inputs((n, 21, height, width), confidence=confidence, seed=seed)
    affinity = _affinity_logits(target, confidence, seed + 1)
    return affinity.to(device, dtype), target.to(device)


def _affinity_logits(target: Tensor, confidence: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    offsets = rate_offsets(AFFINITY_RATES)
    same = torch.stack(
        [
            target == target.roll((-dy, -dx), dims=(1, 2))
            for dy, dx in zip(offsets[::2], offsets[1::2], strict=True)
        ],
        dim=1,
    )
    return confidence * (same.float() - 0.5) + torch.randn(same.shape, generator=generator)


def make_instance_affinity_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits (N, 12, H, W) or (N, 12, D, H, W) at the offsets of ``INSTANCE_OFFSETS``, and ids of
    boxes, of which one in 21 is background; 1 % of the voxels are ignored. The logits are as close
    to the targets as in :func:`make_inputs`. The C of ``shape`` is ignored.
    """
    n, _, *depth, height, width = shape
    _, ids = make_inputs((n, 21, height, width), confidence=confidence, seed=seed)
    if depth:
        # Ids change every three planes: boxes are three planes deep.
        planes = torch.arange(depth[0]) // 3
        ids = torch.where(ids[:, None] == 255, 255, (ids[:, None] + planes.view(-1, 1, 1)) % 21)
    target = instance_affinity_target(ids, INSTANCE_OFFSETS[len(shape) - 2], ignore_index=255)
    generator = torch.Generator().manual_seed(seed + 1)
    logits = confidence * (target.clamp(max=1).float() - 0.5)
    logits += torch.randn(logits.shape, generator=generator)
    return logits.to(device, dtype), ids.to(device)


def make_images(target: Tensor, generator: torch.Generator) -> Tensor:
    """Images (N, 3, H, W) of bytes: a colour for each label of a target (N, H, W), and noise."""
    colors = torch.rand(256, 3, generator=generator)[target].movedim(-1, 1)
    noise = 0.01 * torch.randn(colors.shape, generator=generator)
    return (255 * (0.8 * colors + 0.1 + noise).clamp(0, 1)).to(torch.uint8)


def make_refinement_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Masks (N, C, H, W), a target (N, H, W) as from :func:`make_inputs`, and images of bytes whose
    colours go by the target.
    """
    logits, target = make_inputs(shape, confidence=confidence, seed=seed)
    images = make_images(target, torch.Generator().manual_seed(seed + 1))
    return logits.softmax(dim=1).to(device, dtype), target.to(device), images.to(device)


def make_box_pairwise_inputs(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    confidence: float = 2.0,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits (N C, H, W) of C masks in each image, bits of similarity (N, H, W) of colours in
    patches, boxes (N C, 4), a third of an image wide on average, and numbers of images (N C,).
    """
    n, c, height, width = shape
    logits, masks = make_inputs((n * c, 2, height, width), confidence=confidence, seed=seed)
    logits = logits[:, 1] - logits[:, 0]
    generator = torch.Generator().manual_seed(seed + 1)
    similarity = color_similarity(make_images(masks[:n], generator), threshold=0.3)
    center, extent = torch.rand(2, n * c, 2, generator=generator)
    low, high = center - 0.05 - extent / 3, center + 0.05 + extent / 3
    boxes = torch.cat((low, high), dim=1) * torch.tensor([width, height, width, height])
    image_index = torch.arange(n * c) % max(1, n)
    return (
        logits.to(device, dtype), similarity.to(device), boxes.to(device, torch.int64),
        image_index.to(device),
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation: its inputs, its loss, which is timed, and its tables, which are compared."""

    name: str
    shapes: tuple[Shape, ...]
    """N, C, H, W, or N, C, D, H, W, of the bench, whose ``--quick`` takes ``quick_shapes``."""
    quick_shapes: tuple[Shape, ...]
    loss: Callable[..., Tensor]
    """Computes a scalar from the inputs; the bench times and differentiates the scalar."""
    tables: Callable[..., tuple[Tensor, ...]]
    """Computes the operation's own results from the inputs; a NamedTuple names them."""
    largest_term: float
    """Largest size of a term of the sums and of their derivatives. A term is off by at most the
    rounding of this number.
    """
    rounds_pixels: bool = False
    """True if ``largest_term`` bounds the norm of a pixel's derivatives, all channels together."""
    make_inputs: Callable[..., tuple[Tensor, ...]] = make_inputs
    """Called with (N, C, H, W), a dtype, a device, ``confidence`` and ``seed``: makes logits, a
    target and any further inputs. Inputs in floating point have gradients.
    """
    loss_of_tables: Callable[..., Tensor] | None = None
    """Computes the loss from the tables, if the loss has no computation of its own."""
    yardstick: Callable[..., tuple[Callable[..., Tensor], tuple[Tensor, ...]]] | None = None
    """Makes a loss of torch and its inputs, which the bench measures beside the operation, from the
    operation's inputs. None: cross-entropy of logits and target.
    """
    nearby: Case | None = None
    """A copy whose options are a few roundings off, where the gradient jumps at an option, as a
    hinge's does at its margin. None: the case itself.
    """

    @classmethod
    def of_tables(
        cls,
        name: str,
        tables: Callable[..., tuple[Tensor, ...]],
        loss: Callable[..., Tensor],
        largest_term: float,
    ) -> Case:
        """A case for comparison alone: the loss is computed from the same tables."""

        def loss_of_inputs(*inputs: Tensor) -> Tensor:
            return loss(*tables(*inputs))

        return cls(name, (), (), loss_of_inputs, tables, largest_term, loss_of_tables=loss)


def propagation_loss(logits: Tensor, target: Tensor, affinity: Tensor) -> Tensor:
    """Minus the mean probability of the true class, in the dtype of the probabilities, so that
    their rounding shows.
    """
    (refined,) = propagation_tables(logits, target, affinity)
    at_least_float32 = torch.promote_types(refined.dtype, torch.float32)
    loss = F.nll_loss(refined.to(at_least_float32), target, ignore_index=255)
    return loss.to(refined.dtype)


def propagation_tables(logits: Tensor, target: Tensor, affinity: Tensor) -> tuple[Tensor]:
    return (affinity_propagation(logits.softmax(dim=1), affinity, AFFINITY_RATES),)


def refinement_loss(masks: Tensor, target: Tensor, images: Tensor) -> Tensor:
    """Minus the mean value of the true class; see :func:`propagation_loss`."""
    (refined,) = refinement_tables(masks, target, images)
    at_least_float32 = torch.promote_types(refined.dtype, torch.float32)
    return F.nll_loss(refined.to(at_least_float32), target, ignore_index=255).to(refined.dtype)


def refinement_tables(masks: Tensor, target: Tensor, images: Tensor) -> tuple[Tensor]:
    return (REFINE(images, masks),)


REFINE = PAR(dilations=(1, 2, 4, 8, 12, 24), num_iter=10)


AFFINITY_FIELD_SIZES = (3, 5, 7)
AFFINITY_RATES = ((8, 8), (16, 16), (32, 32), (64, 64))

# By the number of axes of an image or a volume: 12 offsets each.
INSTANCE_OFFSETS = {
    2: instance_offsets("mutex_watershed_2d"),
    3: instance_offsets("mutex_watershed_3d")[:3] + instance_offsets("mutex_watershed_3d")[8:],
}


def instance_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """A sum of two losses, which uses three of the tables."""
    offsets = INSTANCE_OFFSETS[ids.dim() - 1]
    loss = {"bce": 1.0, "dice": 1.0}
    return instance_affinity_loss(logits, ids, offsets, loss=loss, ignore_index=255)


def instance_tables(logits: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
    return instance_affinity_terms(logits, ids, INSTANCE_OFFSETS[ids.dim() - 1], ignore_index=255)


def binary_yardstick(
    logits: Tensor, target: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Binary cross-entropy, whose target is floating point and which cannot ignore an entry."""
    labels = (target == 1).to(logits.dtype)
    return lambda logits: F.binary_cross_entropy_with_logits(logits, labels), (logits,)


def instance_yardstick(
    logits: Tensor, ids: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Binary cross-entropy whose targets somebody else has made."""
    target = instance_affinity_target(ids, INSTANCE_OFFSETS[ids.dim() - 1], ignore_index=255)
    same = (target == 1).to(logits.dtype)
    return lambda logits: F.binary_cross_entropy_with_logits(logits, same), (logits,)


def box_yardstick(
    mask_logits: Tensor, *_: Tensor
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """Binary cross-entropy with true masks."""
    truth = (mask_logits.detach() > 0).to(mask_logits.dtype)
    return lambda logits: F.binary_cross_entropy_with_logits(logits, truth), (mask_logits,)


CASES = {
    "affinity_field": Case(
        name="affinity_field",
        shapes=((2, 21, 60, 60), (2, 19, 90, 90), (1, 19, 256, 512)),
        quick_shapes=((1, 5, 32, 32),),
        loss=lambda logits, target: affinity_field_loss(logits, target, AFFINITY_FIELD_SIZES),
        tables=lambda logits, target: affinity_field_terms(logits, target, AFFINITY_FIELD_SIZES),
        largest_term=9.2,  # log(1 / eps), the divergence of two confident, different pixels
    ),
    "affinity_field_cross_entropy": Case(
        name="affinity_field_cross_entropy",
        shapes=((1, 19, 256, 512),),
        quick_shapes=((1, 5, 32, 32),),
        loss=lambda logits, target: affinity_field_cross_entropy(
            logits, target, AFFINITY_FIELD_SIZES
        ),
        tables=lambda logits, target: affinity_field_terms(logits, target, AFFINITY_FIELD_SIZES),
        largest_term=9.2,
    ),
    "affinity_field_sigmoid": Case(
        name="affinity_field_sigmoid",
        shapes=((8, 1, 512, 512), (4, 8, 512, 512)),
        quick_shapes=((1, 2, 32, 32),),
        loss=lambda logits, target: affinity_field_loss(
            logits, target, AFFINITY_FIELD_SIZES, activation="sigmoid"
        ),
        tables=lambda logits, target: affinity_field_terms(
            logits, target, AFFINITY_FIELD_SIZES, activation="sigmoid"
        ),
        largest_term=9.2,
        make_inputs=make_sigmoid_inputs,
        yardstick=binary_yardstick,
    ),
    "affinity_regression": Case(
        name="affinity_regression",
        shapes=((2, 21, 60, 60), (1, 19, 256, 512), (1, 19, 1024, 2048)),
        quick_shapes=((1, 5, 32, 32),),
        loss=affinity_regression_loss,
        tables=affinity_regression_terms,
        largest_term=2.0,  # the derivative of a square of at most 1
    ),
    "affinity_regression_every_pixel": Case(
        name="affinity_regression_every_pixel",
        shapes=((2, 21, 60, 60), (1, 19, 90, 90), (1, 19, 256, 512), (1, 19, 1024, 2048)),
        quick_shapes=((1, 5, 32, 32),),
        loss=lambda logits, target: affinity_regression_loss(logits, target, None),
        tables=lambda logits, target: affinity_regression_terms(logits, target, None),
        largest_term=2.0,
    ),
    "affinity_propagation": Case(
        name="affinity_propagation",
        shapes=((1, 21, 65, 65), (1, 21, 257, 257)),
        quick_shapes=((1, 5, 32, 32),),
        loss=propagation_loss,
        tables=propagation_tables,
        largest_term=1.0,
        make_inputs=make_propagation_inputs,
    ),
    "dilated_affinity": Case(
        name="dilated_affinity",
        shapes=((1, 32, 65, 65), (1, 32, 257, 257)),
        quick_shapes=((1, 32, 32, 32),),
        loss=lambda logits, target: dilated_affinity_loss(logits, target, AFFINITY_RATES),
        tables=lambda logits, target: dilated_affinity_terms(logits, target, AFFINITY_RATES),
        largest_term=10.0,  # a sure logit on the wrong side, and noise
        make_inputs=make_dilated_affinity_inputs,
    ),
    "instance_affinity": Case(
        name="instance_affinity",
        shapes=((1, 12, 256, 256), (2, 12, 32, 160, 160)),
        quick_shapes=((1, 12, 32, 32),),
        loss=instance_loss,
        tables=instance_tables,
        largest_term=10.0,  # a sure logit on the wrong side, and noise
        make_inputs=make_instance_affinity_inputs,
        yardstick=instance_yardstick,
    ),
    "box_pairwise": Case(
        name="box_pairwise",
        shapes=((2, 20, 200, 336),),
        quick_shapes=((1, 5, 32, 32),),
        loss=box_pairwise_loss,
        tables=box_pairwise_terms,
        largest_term=20.0,  # two sure logits on different sides, and noise
        make_inputs=make_box_pairwise_inputs,
        yardstick=box_yardstick,
    ),
    "refinement": Case(
        name="refinement",
        shapes=((1, 21, 224, 224),),
        quick_shapes=((1, 5, 32, 32),),
        loss=refinement_loss,
        tables=refinement_tables,
        largest_term=1.2,  # ten sums of weights 1.01
        make_inputs=make_refinement_inputs,
    ),
}


class ParityError(AssertionError):
    """The results of an implementation differ from the reference's."""


def obstacle(case: Case, shape: Shape) -> str | None:
    """The reason why the reference cannot run at this shape, compiled or not: its matrices exceed
    any memory. None if the reference can run.
    """
    n, c, *size = shape
    inputs = (
        torch.empty(*_of_size(x.shape, size), dtype=x.dtype, device="meta")
        for x in case.make_inputs((n, c, *(1 for _ in size)))
    )
    try:
        with use_backend("reference"):
            case.loss(*inputs)
    except ValueError as error:
        return str(error)
    return None


def _of_size(shape: Shape, size: list[int]) -> Shape:
    """The shape with this size in place of its last axes, if it is of images of one pixel."""
    axes = len(size)
    is_image = len(shape) > axes and all(length == 1 for length in shape[-axes:])
    return (*shape[:-axes], *size) if is_image else shape


def evaluate(case: Case, backend: Backend, *inputs: Tensor) -> dict[str, Tensor]:
    """Tables, "loss" and gradients by name. "gradient" is the gradient of the first input, the
    logits, and "gradient 1" of the next floating-point input; each has the shape of its input.
    """
    inputs = tuple(
        x.detach().requires_grad_(x.is_floating_point())  # strides and all
        for x in inputs
    )
    with use_backend(backend):
        tables = case.tables(*inputs)
        loss = case.loss_of_tables(*tables) if case.loss_of_tables else case.loss(*inputs)
        grads = torch.autograd.grad(loss, differentiable(inputs), materialize_grads=True)
    names = getattr(tables, "_fields", range(len(tables)))
    results = {str(name): table.detach() for name, table in zip(names, tables, strict=True)}
    results["loss"] = loss.detach()
    return {**results, **{f"gradient {i}" if i else "gradient": g for i, g in enumerate(grads)}}


def differentiable(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x for x in inputs if x.is_floating_point())


def check_parity(case: Case, implementation: Backend | Case, *inputs: Tensor) -> None:
    """Raises ParityError unless an implementation is about as close to the float64 reference as
    eager mode is. ``implementation`` is the name of a backend, "portable", "native" or "triton", or
    a copy of the case with another ``loss`` and ``tables``. ``inputs`` have any strides, on any
    device.

    Counts must be equal. Any other result, as a whole tensor so that borders count, may be off by
    twice the sum of

    - the error of the eager reference in the logits' dtype,
    - the change of the exact result when its inputs, or options (:attr:`Case.nearby`), are off by a
      few float32 roundings (where the exact result is nearly 0, eager mode may be right by luck),

    plus a few roundings of the result's own dtype, plus the rounding of one term per counted entry
    of a sum, which may come from a subtraction and is then off by its terms' rounding even where it
    is 0. The loss is a mean over entries: its gradient is that much smaller per logit (or pixel).

    The loss is a weighted sum of tables whose terms are not negative: relative to its value it may
    also be off by as much as the reference's tables are, for eager mode's errors may cancel in it
    by luck.
    """
    logits = inputs[0]
    # For float64 logits the yardstick itself is off: its 1 - p gives a q of 1e-4 to 1e-12 only.
    rounding = 1e-12 if logits.dtype == torch.float64 else torch.finfo(torch.float32).eps
    exact = evaluate(case, "reference", *(_double(x) for x in inputs))
    eager = evaluate(case, "reference", *inputs)
    moved = (_a_few_roundings_off(x) for x in inputs)
    nearby = evaluate(case.nearby or case, "reference", *moved)
    if isinstance(implementation, Case):
        ours, name_of_ours = evaluate(implementation, "auto", *inputs), "replaced"
    else:
        ours, name_of_ours = evaluate(case, implementation, *inputs), implementation
    entries = sum(int(table.sum()) for table in exact.values() if not table.is_floating_point())
    off = {
        name: 2 * (_distance(eager[name], value) + _distance(nearby[name], value))
        for name, value in exact.items()
        if value.is_floating_point()
    }
    tables = [name for name in off if name != "loss" and not name.startswith("gradient")]
    size_of_tables = sum(float(exact[name].norm()) for name in tables)
    if size_of_tables:
        relative = sum(off[name] for name in tables) / size_of_tables
        off["loss"] += relative * abs(float(exact["loss"]))
    for name, result in ours.items():
        if result.dtype != eager[name].dtype or result.shape != eager[name].shape:
            raise ParityError(
                f"{case.name} {name_of_ours}: {name} is {result.dtype} {tuple(result.shape)}, "
                f"expected {eager[name].dtype} {tuple(eager[name].shape)}"
            )
        if not result.is_floating_point():
            if not torch.equal(result, exact[name]):
                raise ParityError(f"{case.name} {name_of_ours}: {name} differs from the reference")
            continue
        error = _distance(result, exact[name])
        budget = off[name] + 4 * torch.finfo(result.dtype).eps * float(exact[name].norm())
        scale = 1.0 if name == "loss" else entries
        if name.startswith("gradient"):
            terms = result[:, :1] if case.rounds_pixels else result
            scale = max(1, terms.numel()) ** -0.5
        budget += rounding * case.largest_term * scale
        if not error <= budget:
            raise ParityError(
                f"{case.name} {name_of_ours}: {name} is off by {error:.1e} from float64, "
                f"allowed are {budget:.1e} of {float(exact[name].norm()):.1e}"
            )


def check_agreement(what: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Raises ParityError unless loss and gradients agree in the digits that both should have.

    This check is coarser than :func:`check_parity`, for inputs too large for float64: the check
    finds blocks that are left out or counted twice. Confident float32 gradients are 1e-3 off.
    """
    for i, (ours, theirs) in enumerate(zip(result, expected, strict=True)):
        allowed = max(2e-3, 8 * torch.finfo(ours.dtype).eps) * float(theirs.double().norm())
        if not _distance(ours, theirs) <= allowed:
            name = "gradient" if i else "loss"
            raise ParityError(f"{what}: {name} of the inputs to time is off")


def _double(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _a_few_roundings_off(x: Tensor) -> Tensor:
    if not x.is_floating_point():
        return x
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    sign = torch.randint(0, 2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    step = 4 * torch.finfo(dtype).eps * x.double().abs().clamp(min=1)
    return x.double() + sign.to(x.device) * step


def _distance(result: Tensor, exact: Tensor) -> float:
    return float((result.double() - exact.double()).norm())
