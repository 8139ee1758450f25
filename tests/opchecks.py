"""torch.library.opcheck for an op of any backend."""

import torch


def opcheck(op, arguments, backend="portable", **options):
    """All checks for the portable backend. Autograd and tracing are the same for every backend, and
    slow: the others are checked for schema and fake tensors alone, unless there is a GPU.
    """
    if backend != "portable" and not torch.cuda.is_available():
        options = {"test_utils": ("test_schema", "test_faketensor")}
    torch.library.opcheck(op, arguments, **options)


def image_size(backend):
    """Rows and columns of an image that shows each layout, small for interpreted tiles."""
    return (3, 5) if backend == "triton" else (9, 11)
