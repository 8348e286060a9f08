"""What the data sets share: find a file, read and verify it, download it, cut it into batches.

Every fault of a file or of the network is a `DataError` whose text is one line for the user. Files
that are there already are only ever read: nothing here overwrites or deletes them.
"""

import gzip
import hashlib
import io
import math
import os
import socket
import tempfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

PIXELS = 784  # 28 x 28
PROBE_SECONDS = 5.  # for all servers together to accept a connection
SILENCE_SECONDS = 10.  # longest wait for the next bytes of a download
WHITE_SPACE = b' \t\r\n\v\f'

Split = tuple[np.ndarray, np.ndarray | None]  # images (N, 784) uint8, labels (N,) or none


class DataError(OSError):
    """A data set cannot be had; the text is one line that says what is wrong and where."""


class Loader:
    """Batches of a data set that lives on the device: a permutation, an index and a cast.

    Yields x (B, 784) float32, or (x, y) with y (B,) int64 where there are labels; the last batch
    may be smaller. The permutation comes from torch's default generator of that device, so that
    whoever seeds an epoch decides its order.
    """

    def __init__(self, images: Tensor, labels: Tensor | None, batch_size: int, shuffle: bool,
                 source: dict):
        if batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, not {batch_size}')
        self.images = images  # (N, 784) uint8: a quarter of the memory, and of the traffic
        self.labels = labels  # (N,) int64
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.source = source

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        arrange = torch.randperm if self.shuffle else torch.arange
        order = arrange(len(self.images), device=self.images.device)
        for index in order.split(self.batch_size):
            x = self.images.index_select(0, index).float()  # thrice as fast as images[index]
            yield x if self.labels is None else (x, self.labels.index_select(0, index))

    def head(self, n: int, batch_size: int | None = None) -> 'Loader':
        """The first n images, never shuffled: for curves on a fixed part, and for dry runs."""
        return Loader(self.images[:n], None if self.labels is None else self.labels[:n],
                      batch_size or self.batch_size, shuffle=False, source=self.source)


def make_loaders(splits: list[Split], source: dict, batch_size: int,
                 device: str | torch.device) -> tuple[Loader, ...]:
    """Train, validation and test loaders on `device`; only the first one shuffles."""
    loaders = []
    for images, labels in splits:
        x = torch.from_numpy(images).to(device)
        y = None if labels is None else torch.from_numpy(labels).to(device, torch.int64)
        loaders.append(Loader(x, y, batch_size, shuffle=not loaders, source=source))
    return tuple(loaders)


def find(folders: list[Path], name: str) -> Path | None:
    """The first of folder/name and folder/name.gz that exists in any shape, even as a folder."""
    for path in (folder / (name + suffix) for folder in folders for suffix in ('', '.gz')):
        try:
            path.lstat()
            return path
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise DataError(f'{path}: expected a readable file, found: {error.strerror}') from None
    return None


def read_file(path: Path) -> bytes:
    """The file's content, unpacked if its name ends in .gz."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f'{path}: expected a readable file, found: {error.strerror}') from None
    if path.suffix != '.gz':
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: expected a whole gzip file, found {len(content):,} bytes '
                        f'starting {content[:8]!r} ({error})') from None


def read_verified(path: Path, name: str, digests: dict[str, str]) -> bytes:
    """The unpacked content of `name` at `path`, whose sha256 must be digests[name]."""
    content = read_file(path)
    found = hashlib.sha256(content).hexdigest()
    if found != digests[name]:
        others = [f', the content of {other}' for other in digests if digests[other] == found]
        raise DataError(f'{path}: expected sha256 {digests[name]}, '
                        f'found {found}{"".join(others)} ({len(content):,} bytes)')
    return content


def read_idx(content: bytes) -> np.ndarray:
    """The uint8 array of an IDX file: magic 0, 0, 8, rank; big-endian sizes; the values."""
    rank = content[3]
    shape = np.frombuffer(content, '>i4', rank, offset=4)
    # The copy is writable, as torch wants its memory.
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()


def read_amat(path: Path, n_rows: int) -> np.ndarray:
    """The (n_rows, 784) array of 0 and 1 in a text file of one image a line.

    White space differs between the copies in circulation, so tokens are held against it, not
    bytes: whatever separates the values, each line holds 784 of them and each is 0 or 1.
    """
    text = read_file(path)
    # Whole-buffer operations: the training set has 39 million values in 78 MB.
    strange = text.translate(None, b'01' + WHITE_SPACE)
    if strange:
        raise DataError(f'{path}: expected only the values 0 and 1, found {strange[:20]!r}')
    printed = np.frombuffer(text, np.uint8) > ord(' ')
    if (printed[1:] & printed[:-1]).any():
        raise DataError(f'{path}: expected values apart, found digits that touch')
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        row = line.translate(None, WHITE_SPACE)
        if len(row) not in (0, PIXELS):
            raise DataError(f'{path}: expected {PIXELS} columns, found {len(row)} '
                            f'in line {number}')
        if row:
            rows.append(row)
    if len(rows) != n_rows:
        raise DataError(f'{path}: expected {n_rows:,} rows, found {len(rows):,}')
    return np.frombuffer(b''.join(rows), np.uint8).reshape(n_rows, PIXELS) - ord('0')


def bits_digest(bits: np.ndarray) -> str:
    """The sha256 of an array of 0 and 1, eight to a byte, the first one highest."""
    return hashlib.sha256(np.packbits(bits)).hexdigest()


def download(mirrors: list[str], names: list[str], folder: Path,
             verify: Callable[[Path, str], object]) -> None:
    """Put each of `names`, as mirror + name + .gz, into `folder`: all of them verified, or none.

    `verify(path, name)` raises DataError for a file that is not what it should be. Files arrive
    in a temporary folder and move to their names whole, so two processes may do this at once.
    """
    failures = []
    for mirror in answering(mirrors):
        try:
            download_from(mirror, names, folder, verify)
            return
        # torchvision raises RuntimeError for a bad file, and so does one built for another torch.
        except (OSError, HTTPException, RuntimeError, ImportError) as error:
            failures.append(f'{mirror}: {" ".join(str(error).split()) or type(error).__name__}')
    hosts = ', '.join(urlsplit(mirror).netloc for mirror in mirrors)
    raise DataError('; '.join(failures) or f'no answer from {hosts}')


def download_from(mirror: str, names: list[str], folder: Path,
                  verify: Callable[[Path, str], object]) -> None:
    # Imported here because it takes seconds, and few runs download.
    from torchvision.datasets.utils import download_url

    # On the same disk as its destination, where a move is atomic, without making that folder yet.
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # torchvision passes none of its own
    try:
        with tempfile.TemporaryDirectory(prefix='.download-', dir=nearest) as temporary:
            for name in names:
                packed = Path(temporary, name + '.gz')
                with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                    download_url(mirror + packed.name, temporary, packed.name)
                verify(packed, name)
            folder.mkdir(parents=True, exist_ok=True)
            for name in names:
                os.replace(Path(temporary, name + '.gz'), folder / (name + '.gz'))
    finally:
        socket.setdefaulttimeout(timeout)


def answering(mirrors: list[str]) -> Iterator[str]:
    """Those mirrors, in order, that accept a connection within PROBE_SECONDS of the first call.

    A network that swallows packets holds a name lookup for minutes, and no timeout reaches
    into it; hence the threads, which are left behind when time is up.
    """
    alive = set()

    def probe(mirror: str) -> None:
        try:
            socket.create_connection(server_of(mirror), timeout=PROBE_SECONDS).close()
            alive.add(mirror)
        except (OSError, ValueError):  # ValueError: a proxy that is no address
            pass

    deadline = time.monotonic() + PROBE_SECONDS
    probes = [threading.Thread(target=probe, args=(mirror,), daemon=True) for mirror in mirrors]
    for thread in probes:
        thread.start()
    for mirror, thread in zip(mirrors, probes, strict=True):
        thread.join(max(0., deadline - time.monotonic()))
        if mirror in alive:
            yield mirror


def server_of(url: str) -> tuple[str, int]:
    """Host and port that a request for `url` goes to first: the proxy's where one is set."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.netloc):
        parts = urlsplit(proxy if '://' in proxy else f'//{proxy}')
    return parts.hostname or '', parts.port or (443 if parts.scheme == 'https' else 80)
