"""Block sizes for Triton's interpreter, whose time depends on the number of programs and of
operations, not on their size.

Processes that interpret kernels enter ``override(**BLOCKS)``, as conftest.py does. Without these
sizes results are the same, and slow.
"""

BLOCKS = {
    "affinity_field": {
        "rows": 64,
        "strip_classes": 64,
        "unroll": 1,
        "patch": (32, 64),
        "part": (16, 64),
        "pixels": 2048,
        "pixel_classes": 64,
    },
    "affinity_regression": {
        "points": 128,
        "pixels": 512,
        "gram_pixels": 1024,  # few, for they are added up in float32
        "gradient_points": 128,
        "statistics_pixels": 512,
        "many_pixels": 128,
        "matrix_points": 128,
    },
    "affinity_propagation": {"pixels": 1 << 12, "elements": 1 << 15, "gate_pixels": 1 << 12},
    "box_pairwise": {"pixels": 1 << 12},
    "dilated_affinity": {"pixels": 1 << 12, "tables_pixels": 1 << 12},
    "instance_affinity": {"voxels": 1 << 14, "tables_voxels": 1 << 14},
}


def smaller_if_interpreted(shape, backend, device):
    """The shape, for a GPU with many programs at once; a few pixels where programs take turns."""
    if backend == "triton" and device.type == "cpu":
        return *shape[:2], *(min(size, 9) for size in shape[2:])
    return shape
