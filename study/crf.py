"""A dense CRF after training, as a step of inference: Kraehenbuehl and Koltun, NeurIPS 2011."""

from __future__ import annotations

import numpy as np

# Numbers of the AAF paper, 4.3; iterations as DeepLab, whose code the paper follows.
APPEARANCE = {"compat": 1.0, "sxy": 40.0, "srgb": 3.0}
SMOOTHNESS = {"compat": 1.0, "sxy": 1.0}
ITERATIONS = 10


def refined(probs: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Probabilities (C, H, W) float32 of an image (H, W, 3) uint8, after mean-field inference:
    pixels that are near, and pixels that are near and alike in colour, agree.
    """
    from pydensecrf.densecrf import DenseCRF2D  # optional, and compiled on installation

    count, height, width = probs.shape
    model = DenseCRF2D(width, height, count)
    cost = -np.log(np.clip(probs, 1e-8, 1)).reshape(count, -1).astype(np.float32)
    model.setUnaryEnergy(np.ascontiguousarray(cost))
    model.addPairwiseGaussian(**SMOOTHNESS)
    model.addPairwiseBilateral(rgbim=np.array(image, order="C"), **APPEARANCE)
    return np.array(model.inference(ITERATIONS), np.float32).reshape(probs.shape)
