"""Runs every operation on tensors whose elements are more than 2^31 apart, in Triton's interpreter:
an offset that overflows 32 bits ends in a segmentation fault or in another result.

    TRITON_INTERPRET=1 python tools/far_offsets.py      # tests/nightly/test_offsets.py does it

The address space is reserved, the pages are not: only touched pages take memory. Every case runs in
a process of its own. The results go to the standard output, as JSON.
"""

import json
import mmap
import os
import signal
import sys
import traceback
from pathlib import Path

import torch

import tritonaff
from tritonaff import checks
from tritonaff.kernels.blocks import override

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from interpreted import BLOCKS

# Whole tables in one program of the last kernel, and every patch in a program of its own.
LAST_PROGRAM = {"partial_sums": 1 << 20, "patches_in_a_program": 1, "count_programs": 1 << 30}
# Twice this is beyond 32 bits.
FAR = (1 << 30) + 8


def sparse(shape, stride, dtype):
    """Zeros that take address space alone."""
    if 0 in shape:
        return torch.zeros(shape, dtype=dtype)
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, span * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, stride)


def stretched(tensor, planes=False):
    """The same values, FAR apart along every dimension, or along all but height and width."""
    steps = [FAR + 8**place for place in reversed(range(tensor.dim()))]  # no two at one place
    if planes:
        steps[-2:] = tensor.stride()[-2:]
    return sparse(tensor.shape, steps, tensor.dtype).copy_(tensor)


def far_apart(tensor):
    return sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def allocate_sparsely():
    """Lets launchers allocate zeros that have the layout of their model and take memory only where
    they are written.
    """

    empty_like = torch.empty_like

    def like(tensor, *, dtype=None, memory_format=None, device=None):
        if device == "meta":
            return empty_like(tensor, device=device)
        stride = tensor.stride()
        if 0 in stride or far_apart(tensor) < FAR or memory_format is torch.contiguous_format:
            stride = torch.empty(tensor.shape, device="meta").stride()
        return sparse(tensor.shape, stride, dtype or tensor.dtype)

    def new(tensor, *shape, dtype=None, device=None):
        shape = tuple(shape[0]) if isinstance(shape[0], (tuple, list)) else shape
        stride = torch.empty(shape, device="meta").stride()
        return sparse(shape, stride, dtype or tensor.dtype)

    torch.empty_like = torch.zeros_like = like
    torch.Tensor.new_empty = torch.Tensor.new_zeros = new


def interpret_the_last_program_alone():
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_dim, set_idx, run = builder.set_grid_dim, builder.set_grid_idx, interpreter.GridExecutor
    call = run.__call__

    def run_last(executor, *args, **kwargs):
        grid = executor.grid
        last = [size - 1 for size in grid] + [0] * (3 - len(grid))
        programs = [last]
        if executor.fn.__name__ == "finish_kernel":  # its first programs add up the tables of all
            sums = args[executor.arg_names.index("SUMS")]
            programs = [*([i, 0, 0] for i in range(sums)), last]
        executor.grid = (1,) * len(grid)
        builder.set_grid_dim = lambda *_: set_dim(*(place + 1 for place in last))
        for program in programs:
            builder.set_grid_idx = lambda *_, program=program: set_idx(*program)
            call(executor, *args, **kwargs)

    run.__call__ = run_last


def affinity_field(logits, target):
    """Tables of the affinity field and of cross-entropy, with their gradient, and counts."""
    op, ones = torch.ops.tritonaff, torch.ones(2, 3, 2)
    totals, counts, *pixels = op.affinity_field_statistics(
        logits.detach(), target, (3, 5), 255, "paper", "triton"
    )
    options = (3, 5), 3.0, 1e-4, "paper", "triton"
    sums, log_loss, zero, _ = op.affinity_field_with_gradient(
        logits, ones, ones[0, :, 0], *pixels, *options
    )
    return [sums + zero, log_loss + zero, totals + counts.sum() + zero]


def tables(terms):
    return [table for table in terms if table.is_floating_point()]


def box_pairwise(mask_logits, similarity):
    """Every mask has the whole image as its box."""
    n, height, width = mask_logits.shape
    boxes = torch.tensor([[0, 0, width, height]]).expand(n, 4)
    terms = tritonaff.box_pairwise_terms(mask_logits, similarity, boxes, torch.arange(n))
    return tables(terms)


RATES = ((1, 1), (2, 1))
OFFSETS = ((0, 1), (-1, 0), (2, -1))
# Every operation: its channels, whether it takes a target, and a function of its results.
OPS = {
    "affinity_field": (3, affinity_field),
    "affinity_regression": (
        3,
        lambda logits, target: tables(tritonaff.affinity_regression_terms(logits, target, (4, 2))),
    ),
    "affinity_regression_every_pixel": (
        3,
        lambda logits, target: tables(tritonaff.affinity_regression_terms(logits, target, None)),
    ),
    "affinity_regression_many_classes": (
        65,
        lambda logits, target: tables(tritonaff.affinity_regression_terms(logits, target, None)),
    ),
    "dilated_affinity": (
        16,
        lambda logits, target: tables(tritonaff.dilated_affinity_terms(logits, target, RATES)),
    ),
    "box_pairwise": (1, box_pairwise),
    "instance_affinity": (
        3,
        lambda logits, ids: tables(tritonaff.instance_affinity_terms(logits, ids, OFFSETS)),
    ),
    "affinity_propagation": (
        3,
        lambda probs, affinity: [
            tritonaff.affinity_propagation(probs, affinity, RATES, iterations=2)
        ],
    ),
    "square_root_affinity": (
        3,
        lambda logits: [tritonaff.square_root_affinity(logits, None)],
    ),
}


def inputs(op, n, height, width):
    """Inputs by name. Values depend on columns and, in a small image, on rows."""
    generator = torch.Generator().manual_seed(0)
    channels, _ = OPS[op]
    logits = torch.randn(n, channels, height, width, generator=generator)
    if op == "affinity_propagation":
        affinity = torch.randn(n, 8 * len(RATES), height, width, generator=generator)
        return {"probs": logits.softmax(dim=1), "affinity": affinity}
    if op == "square_root_affinity":
        return {"logits": logits}
    if op == "box_pairwise":
        bits = torch.randint(0, 256, (n, height, width), generator=generator, dtype=torch.uint8)
        return {"mask_logits": logits[:, 0], "similarity": bits}
    target = torch.randint(0, 3, (n, height, width), generator=generator, dtype=torch.uint8)
    return {"logits": logits, "target": target}


def evaluate(op, arguments):
    """Results of the operation, and its gradients."""
    _, function = OPS[op]
    leaves = [x.requires_grad_() for x in arguments.values() if x.is_floating_point()]
    results = function(*arguments.values())
    if op == "square_root_affinity":  # no tile computes its gradient
        return results, []
    ones = [torch.ones((), dtype=x.dtype).expand_as(x) for x in results]
    return results, torch.autograd.grad(results, leaves, ones)


def far_strides(op):
    near = inputs(op, 3, 5, 6)
    # If pixels do not follow one another, these tiles take a copy.
    planes = op == "affinity_field" or op.startswith("affinity_regression_")
    far = {name: stretched(tensor, planes) for name, tensor in near.items()}
    expected = evaluate(op, near)
    allocate_sparsely()
    for result, exact in zip(evaluate(op, far), expected, strict=True):
        torch.testing.assert_close(list(result), list(exact))


def far_pixels(op):
    """2^28 pixels in more than 8 channels, and more than 2^31 pixels (or matrix elements). The last
    programs compute the same values as in a small image with the same end.
    """
    interpret_the_last_program_alone()
    allocate_sparsely()
    checks.check_label_values = checks.check_matrices_fit = lambda *_: None
    width = 1 if op == "square_root_affinity" else 8
    rows = 1 << 12

    def tall(row, height):
        if op in ("dilated_affinity", "square_root_affinity"):
            return row.expand(*row.shape[:-2], height, width)
        # Pixels that follow one another, which are not copied: only the last ones take memory.
        shape = *row.shape[:-2], height, width
        image = sparse(shape, torch.empty(shape, device="meta").stride(), row.dtype)
        image[..., -2 * rows :, :] = row
        return image

    def result(more):
        height = more + rows + 100
        row = inputs(op, 1, 1, width)
        far = {name: tall(x, height) for name, x in row.items()}
        results, grads = evaluate(op, {name: x.detach() for name, x in far.items()})
        assert more == 0 or sum(x.numel() for x in (*results, *grads)) > FAR >> 1
        if op == "square_root_affinity":
            results = [x[:, -100:, -100:] for x in results]
        elif op == "affinity_propagation":
            results = [x[..., -rows:, :] for x in results]
        assert all(bool(x.any()) for x in results)
        return [*results, *(x[..., -rows:, :] for x in grads)]

    # One block of voxels in every program, however many there are.
    with override(affinity_field=LAST_PROGRAM, instance_affinity={"max_steps": 1}):
        near = result(0)
        # Whole blocks more: powers of 2, or 10 bands of 64 rows for the affinity field's strips.
        for more in (45 * 1024,) if width == 1 else (5 << 23, 5 << 26):
            torch.testing.assert_close(result(more), near)


def cases():
    for op in OPS:
        yield f"{op}-strides", far_strides, op
        # Points of grids are few at any number of pixels.
        if op != "affinity_regression":
            yield f"{op}-pixels", far_pixels, op


def in_a_process_of_its_own(function, op):
    """ "right", or the fault."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            function(op)
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        error = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return error or "right"


def main(wanted):
    torch.set_num_threads(1)
    with tritonaff.use_backend("triton"), override(**BLOCKS):
        for op in wanted or OPS:
            evaluate(op, inputs(op, 1, 2, 2))  # for modules that Python loads on first use
        results = {
            name: in_a_process_of_its_own(function, op)
            for name, function, op in cases()
            if op in (wanted or OPS)
        }
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1:])
