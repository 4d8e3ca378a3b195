"""scripts/download_mnist.py, a file at a time: resuming, broken and lying mirrors, atomic files."""

from pathlib import Path

import pytest
from mirrors import CONTENT, EXPECTED, HALF, Mirror, Serve, dead, download


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "mnist" / "f.gz"


def part_of(target: Path, content: bytes) -> Path:
    """What an earlier run left."""
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
def test_a_whole_download(serve: Serve, target: Path, length: bool) -> None:
    mirror = serve(length=length)
    assert obtain(target, mirror) == f"300000 bytes from {mirror.url}f.gz"
    assert is_whole(target)
    assert mirror.asked == [("/data/f.gz", None)]


def test_what_is_there_and_right_is_left_alone(target: Path) -> None:
    target.parent.mkdir()
    target.write_bytes(CONTENT)
    before = target.stat()
    assert obtain(target, dead()) == "is there already"
    assert (target.stat().st_ino, target.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_cut_connection_is_resumed(serve: Serve, target: Path) -> None:
    mirror = serve(cuts=[100_000, 50_000])
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == [None, "bytes=100000-", "bytes=150000-"]


def test_the_next_mirror_goes_on_where_one_stopped(serve: Serve, target: Path) -> None:
    broken, good = serve(cuts=[100_000, 0]), serve()
    assert good.url in obtain(target, broken, good)
    assert is_whole(target)
    assert good.asked_ranges == ["bytes=100000-"]


def test_the_next_run_goes_on_where_one_stopped(serve: Serve, target: Path) -> None:
    with pytest.raises(OSError, match="connection ended 200000 bytes before the end"):
        obtain(target, serve(cuts=[100_000, 0]))
    assert target.with_name("f.gz.part").read_bytes() == CONTENT[:100_000]
    assert not target.exists()
    mirror = serve()
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == ["bytes=100000-"]


def test_a_mirror_that_never_gets_on_is_given_up(serve: Serve, target: Path) -> None:
    mirror = serve(cuts=[10] * 100)
    with pytest.raises(OSError, match="connection ended"):
        obtain(target, mirror)
    assert len(mirror.asked) == download.TRIES


def test_a_server_without_ranges_sends_all_again(serve: Serve, target: Path) -> None:
    part_of(target, CONTENT[:HALF])
    mirror = serve(ranges=False)
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == [f"bytes={HALF}-"]


def test_a_part_that_is_whole_needs_no_server(target: Path) -> None:
    part_of(target, CONTENT)
    assert obtain(target, dead()) == "had been downloaded whole"
    assert is_whole(target)


@pytest.mark.parametrize(
    ("part", "asked"),
    [
        (CONTENT + b"more", [None]),
        (b"x" * len(CONTENT), [None]),
        (b"x" * HALF, [f"bytes={HALF}-", None]),
        (b"", [None]),
    ],
    ids=["too long", "as long and wrong", "a wrong beginning", "empty"],
)
def test_a_part_that_is_wrong_is_thrown_away(serve: Serve, target: Path, part: bytes, asked: list[str | None]) -> None:
    part_of(target, part)
    mirror = serve()
    obtain(target, mirror)
    assert is_whole(target)
    assert mirror.asked_ranges == asked


WRONG = {
    "as long": (b"y" * len(CONTENT), True, "SHA-256"),
    "shorter": (CONTENT[:-1], True, "has 299999 bytes where 300000 are expected"),
    "longer": (CONTENT + b"y", True, "has 300001 bytes where 300000 are expected"),
    "longer, unannounced": (CONTENT + b"y", False, "more bytes than the file has"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_mirror_with_another_file_is_passed_over(serve: Serve, target: Path, case: str) -> None:
    content, length, message = WRONG[case]
    target.parent.mkdir()
    target.write_bytes(b"damaged")
    wrong, good = serve(content=content, length=length), serve()
    with pytest.raises(OSError, match=message):
        obtain(target, wrong)
    assert target.read_bytes() == b"damaged"
    assert good.url in obtain(target, wrong, good)
    assert is_whole(target)


def test_a_part_of_another_range_is_not_appended(serve: Serve, target: Path) -> None:
    part = part_of(target, CONTENT[:HALF])
    with pytest.raises(OSError, match=f"from {HALF} on, it sends bytes {HALF + 5}-"):
        obtain(target, serve(shift=5))
    assert part.read_bytes() == CONTENT[:HALF]


def test_an_error_page_does_not_replace_what_has_come(serve: Serve, target: Path) -> None:
    part = part_of(target, CONTENT[:HALF])
    with pytest.raises(OSError, match="HTTP 503"):
        obtain(target, serve(code=503))
    with pytest.raises(OSError, match="has 6 bytes"):
        obtain(target, serve(content=b"<html>", ranges=False))
    assert part.read_bytes() == CONTENT[:HALF]


def test_a_silent_server_is_given_up_and_what_came_is_kept(serve: Serve, target: Path) -> None:
    silent, good = serve(cuts=[1000, 0], stalls=True), serve()
    with pytest.raises(OSError, match="timed out"):
        download.obtain(target, EXPECTED, [f"{silent.url}f.gz"], timeout=0.2)
    obtain(target, good)
    assert is_whole(target)
    assert good.asked_ranges == ["bytes=1000-"]
