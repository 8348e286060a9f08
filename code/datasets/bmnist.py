"""Static binarised MNIST: 50,000 / 10,000 / 10,000 images of pixels 0 and 1, without labels.

The distributed files (Larochelle and Murray, 2011) if they are present, else MNIST binarised once.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from datasets.common import PIXELS, DataError, Loader, find, make_loaders, read_file
from datasets.mnist import mnist

FILES = {'binarized_mnist_train.amat': 50_000,
         'binarized_mnist_valid.amat': 10_000,
         'binarized_mnist_test.amat': 10_000}
ADDRESS = 'http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/'
SEED = 2008  # of the binarisation: part of the data set, not of a run


def bmnist(root: str | Path = './data/', batch_size: int = 128, download: bool = True,
           dataset: str | None = None, device: str | torch.device = 'cpu') -> tuple[Loader, ...]:
    """Train, validation and test loaders of x (B, 784) in {0., 1.}.

    The arguments are those of `mnist`; the distributed files come first, except for 'digits'.
    """
    folders = [Path(root) / 'BinarizedMNIST', Path(root)]
    paths = {name: find(folders, name) for name in FILES}
    missing = [name for name, path in paths.items() if path is None]
    if dataset == 'digits' or len(missing) == len(FILES):
        grey = mnist(root, download=download, dataset=dataset)
        random = np.random.RandomState(SEED)
        images = [binarise(loader.images.numpy(), random) for loader in grey]
        source = grey[0].source
        source['description'] += f'; binarised once: Bernoulli(x/255), seed {SEED}'
    elif missing:
        raise DataError(f'binarised MNIST is not complete: put {", ".join(missing)} (.gz or not) '
                        f'into {folders[0]}, from {ADDRESS}')
    else:
        images = [read_amat(paths[name], n_rows) for name, n_rows in FILES.items()]
        description = 'static binarised MNIST, the three distributed .amat files'
        source = {'dataset': 'mnist', 'description': description, 'sha256': {}}
    for split, bits in zip(('train', 'valid', 'test'), images, strict=True):
        source['sha256'][f'bits_{split}'] = hashlib.sha256(np.packbits(bits)).hexdigest()
    return make_loaders([(bits, None) for bits in images], source, batch_size, device)


def binarise(grey: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """Bits that are 1 with probability x/255, since x exceeds exactly x of the values 0 to 254."""
    # RandomState, unlike Generator, gives the same numbers in every version of numpy.
    return (grey > random.randint(255, size=grey.shape, dtype=np.uint8)).astype(np.uint8)


def read_amat(path: Path, n_rows: int) -> np.ndarray:
    """The (n_rows, 784) array of 0 and 1 in a text file with an image on each line."""
    rows = []
    for number, line in enumerate(read_file(path).splitlines(), start=1):
        values = line.split()  # at any white space, in which the copies in circulation differ
        row = b''.join(values)
        if row and (not len(values) == len(row) == PIXELS or row.strip(b'01')):
            raise DataError(f'{path}: expected {PIXELS} values, each 0 or 1, found {len(values)} '
                            f'in line {number}: {sorted(set(values))!r:.60}')
        rows.append(row)
    images = np.frombuffer(b''.join(rows), np.uint8).reshape(-1, PIXELS) - ord('0')
    if len(images) != n_rows:
        raise DataError(f'{path}: expected {n_rows:,} rows, found {len(images):,}')
    return images
