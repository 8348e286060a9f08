"""The handwritten digits that ship with the project, in the shapes and sizes of MNIST.

1,797 images of 8 x 8 pixels (see data/README.md) are enlarged to MNIST's 28 x 28, in many copies,
each turned, stretched, sheared and shifted at random. No original is in two splits.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from datasets.common import PIXELS, read_file

FILE = Path(__file__).resolve().parents[2] / 'data' / 'digits.npz'
DIGEST = 'b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e'
SIZES = (50_000, 10_000, 10_000)
SEED = 1998  # of the division and the changes: part of the data set, not of a run

CELL = 2.5  # side of an original pixel in new ones: 8 of them fill MNIST's box of 20
BLACK, WHITE = 0.33, 0.8  # grey stretched to 0 and 255: strokes as crisp and thick as MNIST's
TURN = math.radians(12)
STRETCH, SHEAR, SHIFT = 0.1, 0.2, 1.5  # shares of the size, and pixels


def load_digits() -> tuple[list[tuple[np.ndarray, np.ndarray]], dict]:
    """The images and labels of the training, validation and test set, and their source."""
    arrays = np.load(io.BytesIO(read_file(FILE, DIGEST)))
    labels, random = arrays['labels'], np.random.RandomState(SEED)
    padded = F.pad(torch.from_numpy(arrays['images'])[:, None].float() / 16, (1, 1, 1, 1))
    blurred = F.interpolate(padded, scale_factor=4, mode='bicubic', align_corners=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second; several threads on a busy machine take ten
    splits = [(distort(blurred[originals], random), labels[originals])
              for originals in divide(labels, random)]
    torch.set_num_threads(threads)
    description = ('the 1,797 optical digits of UCI that ship with the project, '
                   f'enlarged by random affine changes, seed {SEED}')
    return splits, {'dataset': 'digits', 'description': description,
                    'sha256': {FILE.name: DIGEST}}


def divide(labels: np.ndarray, random: np.random.RandomState) -> list[np.ndarray]:
    """For each split, the indices of the originals of its images; no original is in two splits."""
    cuts = np.cumsum(SIZES)[:-1] / sum(SIZES)
    classes = [random.permutation(np.flatnonzero(labels == label)) for label in range(10)]
    shares = [np.split(members, (cuts * len(members)).round().astype(int)) for members in classes]
    parts = [np.concatenate(part) for part in zip(*shares, strict=True)]
    return [random.permutation(np.resize(random.permutation(part), size))
            for part, size in zip(parts, SIZES, strict=True)]


def distort(blurred: torch.Tensor, random: np.random.RandomState) -> np.ndarray:
    """A random affine change of each of (N, 1, 40, 40), as (N, 784) uint8."""
    turn, stretch_x, stretch_y, shear, shift_x, shift_y = torch.from_numpy(
        random.uniform(-1, 1, (6, len(blurred))).astype(np.float32))
    cos, sin, shear = (turn * TURN).cos(), (turn * TURN).sin(), shear * SHEAR
    stretch_x, stretch_y = 1 + stretch_x * STRETCH, 1 + stretch_y * STRETCH
    # Each map takes a new pixel's place to its place in the original, both from -1 to 1. So the
    # factor is the ratio of the sides: 28 pixels, and 10 original pixels of size CELL.
    maps = torch.stack([cos * stretch_x, (cos * shear - sin) * stretch_y, shift_x * SHIFT / 14,
                        sin * stretch_x, (sin * shear + cos) * stretch_y, shift_y * SHIFT / 14])
    maps = maps.T.reshape(-1, 2, 3) * 28 / (10 * CELL)
    batches = []
    for images, theta in zip(blurred.split(500), maps.split(500), strict=True):  # fits the cache
        grid = F.affine_grid(theta, [len(images), 1, 28, 28], align_corners=False)
        grey = F.grid_sample(images, grid, align_corners=False).view(-1, PIXELS)
        batches.append(((grey - BLACK) * (255 / (WHITE - BLACK))).clamp(0, 255).round().byte())
    return torch.cat(batches).numpy()
