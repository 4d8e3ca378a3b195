"""Downloads MNIST or Fashion-MNIST: the four IDX files that data=mnist and data=fashion_mnist read.

    python scripts/download_mnist.py
    python scripts/download_mnist.py mnist fashion_mnist --root ~/data
    python scripts/download_mnist.py --mirror http://my.server/mnist/

The script needs only Python. It writes files into ROOT/NAME/. The default ROOT is the folder that flowtrain
reads. A file gets its name only after its SHA-256 has been verified. An incomplete download is kept as NAME.part, and
the next mirror or the next run continues it.
"""

import argparse
import hashlib
import os
import sys
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import IO, NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

MIRRORS = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
    ),
    "fashion_mnist": (
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
    ),
}


class Sum(NamedTuple):
    """The expected length of a file in bytes and its SHA-256 in hexadecimal."""

    size: int
    sha256: str


FILES = {
    "mnist": {
        "train-images-idx3-ubyte.gz": Sum(9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        "train-labels-idx1-ubyte.gz": Sum(28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        "t10k-images-idx3-ubyte.gz": Sum(1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        "t10k-labels-idx1-ubyte.gz": Sum(4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    },
    "fashion_mnist": {
        "train-images-idx3-ubyte.gz": Sum(26421880, "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        "train-labels-idx1-ubyte.gz": Sum(29515, "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        "t10k-images-idx3-ubyte.gz": Sum(4422102, "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        "t10k-labels-idx1-ubyte.gz": Sum(5148, "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    },
}

# seconds without data after which a mirror is abandoned
TIMEOUT = 30.0
# largest number of attempts per mirror. An attempt that receives no data is the last
TRIES = 4
BLOCK = 1 << 16


class MismatchError(OSError):
    """A complete file with wrong content."""


def default_root() -> Path:
    """Returns $FLOWTRAIN_DATA, or flowtrain's folder in the user's cache, like flowtrain.data.images."""
    if given := os.environ.get("FLOWTRAIN_DATA"):
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "flowtrain"


def obtain(target: Path, expected: Sum, urls: Sequence[str], timeout: float = TIMEOUT) -> str:
    """Ensures that the expected file is at `target`, from the first URL that serves it.

    Returns:
        A description of the result.

    Raises:
        OSError: no URL serves the file. The message gives the reason for each, and `target` is unchanged.
    """
    if verifies(target, expected):
        return "already downloaded"
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part")
    if verifies(part, expected):
        install(part, target)
        return "completed from its .part file"
    failures = []
    for url in urls:
        try:
            fetch(url, part, expected, timeout)
        except (OSError, HTTPException, ValueError) as error:
            failures.append(f"{url}: {reason(error)}")
        else:
            install(part, target)
            return f"{expected.size} bytes from {url}"
    raise OSError(
        f"{target} could not be downloaded. {'; '.join(failures)}. Try again later, which continues the download, "
        "or name another mirror with --mirror URL"
    )


def fetch(url: str, part: Path, expected: Sum, timeout: float) -> None:
    """Downloads the expected file to `part`. After an attempt that received data, another attempt continues it.

    Raises:
        OSError, HTTPException, ValueError: this URL does not serve the file.
    """
    for left in reversed(range(TRIES)):
        begun = length(part)
        if begun >= expected.size:
            part.unlink()
            begun = 0
        try:
            transfer(url, part, begun, expected.size, timeout)
            verify(part, expected)
            return
        except MismatchError:
            part.unlink()
            # the beginning of the file may be wrong, if another mirror sent it or if the disk is damaged
            if not begun or not left:
                raise
        except (OSError, HTTPException):
            if length(part) <= begun or not left:
                raise


def transfer(url: str, part: Path, begun: int, size: int, timeout: float) -> None:
    """Appends the bytes after the first `begun` to `part`, or writes all bytes if the server sends the whole file.

    Raises:
        OSError, HTTPException, ValueError: no answer, another file, or an end before `size` bytes.
    """
    headers = {"User-Agent": "flowtrain", "Accept-Encoding": "identity"}
    if begun:
        headers["Range"] = f"bytes={begun}-"
    with urlopen(Request(url, headers=headers), timeout=timeout) as answer:
        resumed = answer.status == 206
        offered = answer.headers.get("Content-Range", "")
        if resumed and not offered.startswith(f"bytes {begun}-"):
            raise OSError(f"bytes from {begun} on were requested, but the server sends {offered or 'others'}")
        start = begun if resumed else 0
        rest = answer.headers.get("Content-Length")
        # checked before opening the part, because an error page must not overwrite it
        if rest is not None and start + int(rest) != size:
            raise OSError(f"the server's file has {start + int(rest)} bytes, but {size} are expected")
        with part.open("ab" if resumed else "wb") as file:
            copy(answer, file, size - start)


def copy(source: IO[bytes], target: IO[bytes], count: int) -> None:
    """Copies exactly `count` bytes, each block as soon as it arrives."""
    left = count
    # read1 is used, because read would lose its buffered bytes when the connection breaks
    while block := source.read1(BLOCK):  # type: ignore[attr-defined]
        if len(block) > left:
            raise MismatchError("the server sends more bytes than expected")
        target.write(block)
        left -= len(block)
    if left:
        raise OSError(f"the connection ended {left} bytes before the end of the file")


def verifies(path: Path, expected: Sum) -> bool:
    """Returns whether `path` is the expected file."""
    return length(path) == expected.size and digest(path) == expected.sha256


def verify(path: Path, expected: Sum) -> None:
    found = digest(path)
    if found != expected.sha256:
        raise MismatchError(f"the server's file has the SHA-256 {found}, but {expected.sha256} is expected")


def digest(path: Path) -> str:
    """Returns the SHA-256 of the file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def length(path: Path) -> int:
    """Returns the number of bytes in the file, or 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def install(part: Path, target: Path) -> None:
    """Flushes `part` to the disk and renames it to `target`."""
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(target)
    try:
        folder = os.open(target.parent, os.O_RDONLY)
    except PermissionError:
        # Windows cannot open directories
        return
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def reason(error: Exception) -> str:
    """Returns the text of an error, and closes the open response of an HTTPError."""
    if isinstance(error, HTTPError):
        error.close()
        return f"HTTP {error.code} {error.reason}"
    if isinstance(error, URLError):
        return str(error.reason)
    return str(error) or type(error).__name__


def main(arguments: Sequence[str] | None = None) -> int:
    """Downloads the named data sets and prints one line per file. Returns 1 after a message if a download fails."""
    parser = argparse.ArgumentParser(description="Downloads MNIST or Fashion-MNIST.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"data sets, {' or '.join(FILES)}; default: mnist")
    parser.add_argument("--root", type=Path, help="the folder for the data sets")
    parser.add_argument(
        "--mirror", action="append", metavar="URL", help="a folder to download from instead; may be repeated"
    )
    options = parser.parse_args(arguments)
    names = options.names or ["mnist"]
    if unknown := [name for name in names if name not in FILES]:
        parser.error(f"unknown data set: {unknown[0]}. Choose {' or '.join(FILES)}")
    root = options.root.expanduser() if options.root else default_root()
    try:
        for name in names:
            for file, expected in FILES[name].items():
                target = root / name / file
                urls = [f"{mirror.rstrip('/')}/{file}" for mirror in options.mirror or MIRRORS[name]]
                print(f"{target}: {obtain(target, expected, urls)}", flush=True)
    except OSError as error:
        print(f"download_mnist: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("download_mnist: stopped; the next run continues the download", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
