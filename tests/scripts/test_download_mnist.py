"""scripts/download_mnist.py: resumed downloads, broken or wrong mirrors, atomic files, and the command line."""

import hashlib
import importlib.util
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from flowtrain.data.images import default_root

ROOT = Path(__file__).resolve().parents[2]
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
    """A server that serves the same content under every path.

    Attributes:
        ranges: whether the server answers Range requests with the requested part. Otherwise, it sends the whole
            content.
        cuts: the number of bytes after which each of the first answers is cut off.
        stalls: whether the connection then stays open without data.
        code: an HTTP error code, which the server sends instead of content.
        length: whether the answers have a Content-Length header.
        shift: offset of the sent part from the requested part, in bytes.
        asked: (path, Range header) of every request.
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


def unreachable_url() -> str:
    """Returns the URL of a port without a listener."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Returns a function that starts mirrors, and stops them after the test."""
    monkeypatch.setenv("no_proxy", "*")
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


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnist" / "f.gz"


def write_part(target: Path, content: bytes) -> Path:
    """Writes the partial download of an earlier run."""
    part = target.with_name("f.gz.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    return part


def obtain(target: Path, *mirrors: Mirror | str) -> str:
    urls = [(mirror if isinstance(mirror, str) else mirror.url) + target.name for mirror in mirrors]
    return str(download.obtain(target, EXPECTED, urls, timeout=5.0))


def is_whole(target: Path) -> bool:
    return target.read_bytes() == CONTENT and [p.name for p in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("length", [True, False])
def test_file_is_downloaded_in_one_request(serve: Serve, target: Path, length: bool) -> None:
    mirror = serve(length=length)
    assert obtain(target, mirror) == f"300000 bytes from {mirror.url}f.gz"
    assert is_whole(target)
    assert mirror.asked == [("/data/f.gz", None)]


def test_existing_valid_file_is_not_downloaded(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    before = target.stat()
    assert obtain(target, unreachable_url()) == "already downloaded"
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_interrupted_connection_is_resumed(serve: Serve, target: Path) -> None:
    mirror = serve(cuts=[100_000, 50_000])
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_next_mirror_resumes_a_partial_download(serve: Serve, target: Path) -> None:
    broken, good = serve(cuts=[100_000, 0]), serve()
    assert good.url in obtain(target, broken, good)
    assert is_whole(target)
    assert good.asked_ranges == ["bytes=100000-"]


def test_next_run_resumes_a_partial_download(serve: Serve, target: Path) -> None:
    with pytest.raises(OSError, match="connection ended 200000 bytes before the end"):
        obtain(target, serve(cuts=[100_000, 0]))
    assert target.with_name("f.gz.part").read_bytes() == CONTENT[:100_000]
    assert not target.exists()
    mirror = serve()
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == ["bytes=100000-"]


def test_mirror_without_progress_is_abandoned(serve: Serve, target: Path) -> None:
    mirror = serve(cuts=[10] * 100)
    with pytest.raises(OSError, match="connection ended"):
        obtain(target, mirror)
    assert len(mirror.asked) == download.TRIES


def test_server_without_range_support_restarts_the_download(serve: Serve, target: Path) -> None:
    write_part(target, CONTENT[:HALF])
    mirror = serve(ranges=False)
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == [f"bytes={HALF}-"]


def test_complete_partial_file_needs_no_request(target: Path) -> None:
    write_part(target, CONTENT)
    assert obtain(target, unreachable_url()) == "completed from its .part file"
    assert is_whole(target)


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (CONTENT + b"more", [None]),
        (b"x" * len(CONTENT), [None]),
        (b"x" * HALF, [f"bytes={HALF}-", None]),
        (b"", [None]),
    ],
    ids=["too long", "wrong content", "wrong prefix", "empty"],
)
def test_invalid_partial_file_is_discarded(serve: Serve, target: Path, part: bytes, asked: list[str | None]) -> None:
    write_part(target, part)
    mirror = serve()
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == asked


WRONG = {
    "same length": (b"y" * len(CONTENT), True, "SHA-256"),
    "shorter": (CONTENT[:-1], True, "has 299999 bytes, but 300000 are expected"),
    "longer": (CONTENT + b"y", True, "has 300001 bytes, but 300000 are expected"),
    "longer than announced": (CONTENT + b"y", False, "more bytes than expected"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mirror_with_a_wrong_file_is_skipped(serve: Serve, target: Path, case: str) -> None:
    content, length, message = WRONG[case]
    target.parent.mkdir()
    target.write_bytes(b"damaged")
    wrong, good = serve(content=content, length=length), serve()
    with pytest.raises(OSError, match=message):
        obtain(target, wrong)
    assert target.read_bytes() == b"damaged"
    assert good.url in obtain(target, wrong, good)
    assert is_whole(target)


def test_wrong_content_range_is_not_appended(serve: Serve, target: Path) -> None:
    part = write_part(target, CONTENT[:HALF])
    with pytest.raises(OSError, match=f"from {HALF} on were requested, but the server sends bytes {HALF + 5}-"):
        obtain(target, serve(shift=5))
    assert part.read_bytes() == CONTENT[:HALF]


def test_error_page_does_not_replace_the_partial_file(serve: Serve, target: Path) -> None:
    part = write_part(target, CONTENT[:HALF])
    with pytest.raises(OSError, match="HTTP 503"):
        obtain(target, serve(code=503))
    with pytest.raises(OSError, match="has 6 bytes"):
        obtain(target, serve(content=b"<html>", ranges=False))
    assert part.read_bytes() == CONTENT[:HALF]


def test_stalled_server_times_out_and_keeps_the_partial_file(serve: Serve, target: Path) -> None:
    silent, good = serve(cuts=[1000, 0], stalls=True), serve()
    with pytest.raises(OSError, match="timed out"):
        download.obtain(target, EXPECTED, [f"{silent.url}f.gz"], timeout=0.2)
    obtain(target, good)
    assert is_whole(target)
    assert good.asked_ranges == ["bytes=1000-"]


# The command

SUMS = ROOT.parent / "shared" / "data" / "SHA256SUMS"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "FILES", {name: {"a.gz": EXPECTED, "b.gz": EXPECTED} for name in download.FILES})


@pytest.mark.usefixtures("small")
def test_command_prints_one_line_per_file(serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mirror = serve()
    arguments = ["mnist", "fashion_mnist", "--root", str(tmp_path), "--mirror", mirror.url.rstrip("/")]
    assert download.main(arguments) == 0
    files = [tmp_path / name / file for name in ("mnist", "fashion_mnist") for file in ("a.gz", "b.gz")]
    assert [file.read_bytes() == CONTENT for file in files] == [True] * 4
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines() == [f"{file}: 300000 bytes from {mirror.url}{file.name}" for file in files]
    assert download.main(arguments) == 0
    assert capsys.readouterr().out.splitlines() == [f"{file}: already downloaded" for file in files]
    assert len(mirror.asked) == 4


@pytest.mark.usefixtures("small")
def test_unreachable_mirrors_give_one_message_and_keep_files(
    serve: Serve, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mnist").mkdir()
    kept = {"a.gz": b"damaged", "a.gz.part": CONTENT[:HALF], "b.gz": b"damaged too"}
    for name, content in kept.items():
        (tmp_path / "mnist" / name).write_bytes(content)
    mirrors = [unreachable_url(), serve(code=404).url, "nonsense"]
    asked = [word for mirror in mirrors for word in ("--mirror", mirror)]
    assert download.main([*asked, "mnist", "--root", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    reasons = ["Connection refused", "HTTP 404 Not Found", "unknown url type"]
    assert [part for part in (*mirrors, *reasons, str(tmp_path / "mnist/a.gz"), "--mirror") if part not in err] == []
    assert {p.name: p.read_bytes() for p in (tmp_path / "mnist").iterdir()} == kept


@pytest.mark.usefixtures("small")
def test_default_mirrors_are_tried_in_order(
    serve: Serve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = serve()
    monkeypatch.setattr(download, "MIRRORS", {"mnist": (unreachable_url(), good.url), "fashion_mnist": ()})
    monkeypatch.setenv("FLOWTRAIN_DATA", str(tmp_path))
    assert download.main([]) == 0
    assert (tmp_path / "mnist" / "b.gz").read_bytes() == CONTENT
    assert capsys.readouterr().err == ""


def test_unwritable_root_gives_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert download.main(["--root", str(tmp_path / "file"), "--mirror", unreachable_url()]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_unknown_dataset_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        download.main(["cifar"])
    assert "unknown data set: cifar. Choose mnist or fashion_mnist" in capsys.readouterr().err


def test_default_root_equals_the_flowtrain_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FLOWTRAIN_DATA", "~/here"), ("FLOWTRAIN_DATA", ""), ("XDG_CACHE_HOME", "/cache")):
        monkeypatch.setenv(name, value)
        assert download.default_root() == default_root()


def test_checksums_match_the_published_files(capsys: pytest.CaptureFixture[str]) -> None:
    if not SUMS.exists():
        pytest.skip(f"{SUMS} not found")
    published = {name: digest for digest, name in (line.split() for line in SUMS.read_text().splitlines())}
    stated = {f"{name}/{file}": s.sha256 for name, files in download.FILES.items() for file, s in files.items()}
    assert stated == {name: digest for name, digest in published.items() if name.endswith("ubyte.gz")}
    assert download.main([*download.FILES, "--root", str(SUMS.parent), "--mirror", unreachable_url()]) == 0
    assert capsys.readouterr().out.count("already downloaded") == 8
