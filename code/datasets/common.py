"""What the data sets share: finding, reading and downloading files, and batches of images."""

import gzip
import hashlib
import io
import math
import multiprocessing.pool
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

import torch
from torch import Tensor

PIXELS = 784  # 28 x 28
SILENCE_SECONDS = 5.  # longest wait for a server's answer, and for the next bytes of a download


class DataError(OSError):
    """A data set cannot be loaded; the text is one line that says what is wrong and where."""


@dataclass(eq=False)
class Loader:
    """Batches of x (B, 784) float32, or of (x, y) with labels y (B,) if there are any.

    The last batch may be smaller. Shuffling draws on torch's default generator; after it, other
    processes than the first draw from a stream of their own. Of a batch that has less than two
    images for each, every process gets the whole, and an epoch's averages count it as often.
    """

    images: Tensor  # (N, 784) uint8, all of them in the device's memory
    labels: Tensor | None  # (N,) int64
    batch_size: int
    shuffle: bool
    source: dict  # the name of the data set, a description and the sha256 of its files
    part: tuple[int, int] = 0, 1  # the process, and the number of them, that share each batch

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f'batch_size must be at least 1, not {self.batch_size}')

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def __iter__(self) -> Iterator[Tensor | tuple[Tensor, Tensor]]:
        arrange = torch.randperm if self.shuffle else torch.arange
        order = arrange(len(self.images), device=self.images.device)
        rank, size = self.part
        if rank:
            torch.manual_seed(torch.initial_seed() + rank)
        for batch in order.split(self.batch_size):
            index = batch.tensor_split(size)[rank] if len(batch) >= 2 * size else batch
            x = self.images.index_select(0, index).float()  # thrice as fast as images[index]
            yield x if self.labels is None else (x, self.labels.index_select(0, index))

    def head(self, n: int, batch_size: int | None = None) -> 'Loader':
        """A loader of the first n images, which does not shuffle them."""
        return Loader(self.images[:n], None if self.labels is None else self.labels[:n],
                      batch_size or self.batch_size, shuffle=False, source=self.source)


def make_loaders(splits: list[tuple], source: dict, batch_size: int,
                 device: str | torch.device) -> tuple[Loader, ...]:
    """A loader for each split, which is images and labels or None; only the first one shuffles."""
    loaders = []
    for images, labels in splits:
        x = torch.from_numpy(images).to(device)
        y = None if labels is None else torch.from_numpy(labels).to(device, torch.int64)
        loaders.append(Loader(x, y, batch_size, shuffle=not loaders, source=source))
    return tuple(loaders)


def find(folders: list[Path], name: str) -> Path | None:
    """The first of folder/name and folder/name.gz that exists, even if it cannot be read."""
    for path in (folder / (name + suffix) for folder in folders for suffix in ('', '.gz')):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError:
            pass  # such as a folder that may not be searched: reading the file reports it
        return path
    return None


def read_file(path: Path, digest: str | None = None) -> bytes:
    """The file's content, unpacked if its name ends in .gz; its sha256 must be `digest`."""
    try:
        content = path.read_bytes()
        if path.suffix == '.gz':
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f'{path}: expected a whole, readable file, found: {error}') from None
    found = hashlib.sha256(content).hexdigest()
    if digest not in (None, found):
        raise DataError(f'{path}: expected sha256 {digest}, found {found}')
    return content


def fetch(mirrors: list[str], digests: dict[str, str], folder: Path) -> None:
    """Download name.gz for each name in `digests` from the first mirror that has all of them."""
    failures = []
    for mirror in mirrors:
        try:
            fetch_from(mirror, digests, folder)
            return
        # A bad proxy is a ValueError; torchvision built for another torch fails with the last two.
        except (OSError, HTTPException, multiprocessing.TimeoutError, ValueError, RuntimeError,
                ImportError) as error:
            failures.append(f'{mirror}: {" ".join(str(error).split()) or "no answer"}')
    raise DataError('; '.join(failures))


def fetch_from(mirror: str, digests: dict[str, str], folder: Path) -> None:
    """Download all files from one mirror; none reaches `folder` unless all are verified."""
    # A network that drops packets can block a name lookup for minutes, and no timeout applies to
    # that. So a first request runs in a thread, which is abandoned when its time is up.
    request = Request(f'{mirror}{next(iter(digests))}.gz', method='HEAD')
    with multiprocessing.pool.ThreadPool(1) as pool:
        pool.apply_async(urlopen, [request]).get(SILENCE_SECONDS).close()
    from torchvision.datasets.utils import download_url  # here because this import takes seconds
    # On the same disk as `folder`, which may not exist yet, so that moving a file is atomic.
    nearest = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE_SECONDS)  # since torchvision sets none
    try:
        with (tempfile.TemporaryDirectory(prefix='.download-', dir=nearest) as temporary,
              redirect_stderr(io.StringIO())):  # hides a progress bar
            for name, digest in digests.items():
                download_url(f'{mirror}{name}.gz', temporary)
                read_file(Path(temporary, f'{name}.gz'), digest)
            folder.mkdir(parents=True, exist_ok=True)
            for path in Path(temporary).iterdir():
                path.replace(folder / path.name)
    finally:
        socket.setdefaulttimeout(timeout)
