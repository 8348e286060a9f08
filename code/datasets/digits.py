"""The handwritten digits that ship with the project, in the shapes and sizes of MNIST.

1,797 images of 8 x 8 pixels (data/README.md has their source) become 50,000 / 10,000 / 10,000 of
28 x 28: drawn as large as MNIST's digits, with MNIST's contrast, each copy turned, stretched,
sheared and shifted at random. The originals are divided first, so no split sees another's.
"""

import io
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.common import PIXELS, Split, read_verified

FILE = Path(__file__).resolve().parents[2] / 'data' / 'digits.npz'
FILES = {'digits.npz': 'b2dab7b501728c22e9119ad76740b2e17c77a231e42d1e592380d90886f1a05e'}
SIZES = (50_000, 10_000, 10_000)
SEED = 1998  # of the division and the changes: part of the data set, not of a run

CELL = 2.5  # side of an original pixel in new ones: 8 of them fill MNIST's box of 20
BLACK, WHITE = 0.33, 0.8  # grey stretched to 0 and 255: strokes as crisp and thick as MNIST's
TURN = math.radians(12)
STRETCH, SHEAR, SHIFT = 0.1, 0.2, 1.5  # shares of the size, and pixels


def load_digits() -> tuple[list[Split], dict]:
    """Train, validation and test splits with labels, and where they come from."""
    arrays = np.load(io.BytesIO(read_verified(FILE, 'digits.npz', FILES)))
    images, labels = arrays['images'], arrays['labels']
    random = np.random.RandomState(SEED)
    blurred = enlarge(torch.from_numpy(images))
    # A second here, on one thread; several wait for one another at each small step, on a busy
    # machine for ten times as long.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        splits = [(distort(blurred[originals], random), labels[originals])
                  for originals in divide(labels, random)]
    finally:
        torch.set_num_threads(threads)
    source = {'dataset': 'digits',
              'description': 'the 1,797 optical digits of UCI that ship with the project, '
                             f'enlarged by random affine changes, seed {SEED}',
              'sha256': dict(FILES)}
    return splits, source


def divide(labels: np.ndarray, random: np.random.RandomState) -> list[np.ndarray]:
    """For each split the original of each of its images: disjoint sets, in random order.

    Each class is divided in the proportion of SIZES, and each original of a split is used equally
    often, give or take one.
    """
    cuts = np.cumsum(SIZES)[:-1] / sum(SIZES)
    parts = [[] for _ in SIZES]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = np.split(members, (cuts * len(members)).round().astype(int))
        for part, share in zip(parts, shares, strict=True):
            part.append(share)
    return [random.permutation(np.resize(random.permutation(np.concatenate(part)), size))
            for part, size in zip(parts, SIZES, strict=True)]


def enlarge(images: Tensor) -> Tensor:
    """(N, 8, 8) of 0 to 16 to (N, 1, 40, 40) of 0 to 1: smooth, with a margin of one old pixel."""
    padded = F.pad(images[:, None].float() / 16, (1, 1, 1, 1))
    return F.interpolate(padded, scale_factor=4, mode='bicubic', align_corners=False)


def distort(blurred: Tensor, random: np.random.RandomState) -> np.ndarray:
    """One random affine change of each of (N, 1, 40, 40), as (N, 784) uint8."""
    N = len(blurred)
    turn, stretch_x, stretch_y, shear, shift_x, shift_y = torch.from_numpy(
        random.uniform(-1, 1, (6, N)).astype(np.float32))
    cos, sin = (turn * TURN).cos(), (turn * TURN).sin()
    stretch_x, stretch_y = 1 + stretch_x * STRETCH, 1 + stretch_y * STRETCH
    shear = shear * SHEAR
    rows = [torch.stack([cos * stretch_x, (cos * shear - sin) * stretch_y, shift_x * SHIFT / 14]),
            torch.stack([sin * stretch_x, (sin * shear + cos) * stretch_y, shift_y * SHIFT / 14])]
    # The map takes each new pixel to its place in the old image; both measure from -1 to 1, so the
    # factor is the ratio of the sides: 28 pixels, and 10 old ones of CELL each.
    maps = torch.stack(rows).permute(2, 0, 1) * 28 / (10 * CELL)  # (N, 2, 3)
    centres = F.affine_grid(torch.eye(2, 3)[None], [1, 1, 28, 28], align_corners=False)
    centres = torch.cat([centres.view(PIXELS, 2), torch.ones(PIXELS, 1)], dim=1).T  # (3, 784)
    out = torch.empty(N, PIXELS, dtype=torch.uint8)
    for batch in torch.arange(N).split(500):  # small enough for the processor's cache
        # One matrix product; affine_grid itself takes one an image, three times as long.
        grid = (maps[batch].view(-1, 3) @ centres).view(-1, 2, 28, 28).permute(0, 2, 3, 1)
        grey = F.grid_sample(blurred[batch], grid, align_corners=False).view(-1, PIXELS)
        out[batch] = grey.sub_(BLACK).mul_(255 / (WHITE - BLACK)).clamp_(0, 255).round_().byte()
    return out.numpy()
