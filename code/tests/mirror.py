"""Files in the formats of MNIST, and a mirror that serves them, for several test modules."""

import gzip
import http.server
import threading
from pathlib import Path

import numpy as np


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim, *np.array(array.shape, '>i4').tobytes()]) + array.tobytes()


def amat(bits: np.ndarray, space: str = ' ', end: str = ' \n') -> bytes:
    return ''.join(space.join(map(str, row)) + end for row in bits).encode()


def packed(contents: dict[str, bytes]) -> dict[str, bytes]:
    return {f'/{name}.gz': gzip.compress(content) for name, content in contents.items()}


def write(contents: dict[str, bytes], folder: Path, gzipped: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (packed(contents) if gzipped else contents).items():
        (folder / name.lstrip('/')).write_bytes(content)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
            for path in folder.rglob('*')}


class Server(http.server.ThreadingHTTPServer):
    """A mirror, or a proxy, that answers with `files` by their path or address.

    The training images wait until `together` clients have asked for them. Of each file the last
    `promised` bytes, which its length includes, never arrive.
    """

    def __init__(self, files: dict[str, bytes], promised: int = 0, together: int = 1):
        super().__init__(('127.0.0.1', 0), Handler)
        self.files, self.promised, self.requests = files, promised, []
        self.barrier = threading.Barrier(together)
        self.address = f'http://127.0.0.1:{self.server_port}/'
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def __exit__(self, *error) -> None:
        self.barrier.abort()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(200)
        self.end_headers()

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        if 'train-images' in self.path:
            try:
                self.server.barrier.wait(60)
            except threading.BrokenBarrierError:
                return  # its test is over: a message now would be on another's stderr
        body = self.server.files.get(self.path, b'<html>not here</html>')
        self.send_response(200)
        self.send_header('Content-Length', str(len(body) + self.server.promised))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args) -> None:
        pass
