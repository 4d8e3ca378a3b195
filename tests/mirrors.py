"""Servers on this machine that scripts/download_mnist.py downloads from."""

import hashlib
import importlib.util
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
CONTENT = np.random.default_rng(0).bytes(300_000)
HALF = 150_000


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("download_mnist", ROOT / "scripts" / "download_mnist.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


download = script()
EXPECTED = download.Sum(len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@dataclass
class Mirror:
    """A server of one content under every path.

    Attributes:
        ranges: whether it answers Range requests with a part, instead of with all.
        cuts: after how many bytes each of the first answers breaks off.
        stalls: whether it then keeps the connection open in silence.
        code: an error to answer with instead.
        length: whether it says how much it sends.
        shift: how far the part it sends is off the one it was asked for.
        asked: the (path, Range header) of every request.
    """

    content: bytes = CONTENT
    ranges: bool = True
    cuts: list[int] = field(default_factory=list)
    stalls: bool = False
    code: int | None = None
    length: bool = True
    shift: int = 0
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    url: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def asked_ranges(self) -> list[str | None]:
        return [header for _, header in self.asked]

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        header = handler.headers.get("Range")
        self.asked.append((handler.path, header))
        if self.code is not None:
            handler.send_error(self.code)
            return
        found = re.fullmatch(r"bytes=(\d+)-", header or "")
        start = int(found[1]) + self.shift if found and self.ranges else 0
        body = self.content[start:]
        handler.send_response(206 if start else 200)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}")
        if self.length:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        if self.stalls:
            handler.wfile.flush()
            self.over.wait(10)


Serve = Callable[..., Mirror]


def dead() -> str:
    """The url of a port that no one listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


@contextmanager
def serving() -> Iterator[Serve]:
    """Starts mirrors, and stops them at the end."""
    running: list[tuple[Mirror, ThreadingHTTPServer, threading.Thread]] = []

    def start(**options: Any) -> Mirror:
        mirror = Mirror(**options)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        mirror.url = f"http://127.0.0.1:{server.server_port}/data/"
        running.append((mirror, server, thread))
        return mirror

    try:
        yield start
    finally:
        for mirror, server, thread in running:
            mirror.over.set()
            server.shutdown()
            server.server_close()
            thread.join(10)
            assert not thread.is_alive()
