"""IDX files are read with and without gzip. The error for a damaged file names the file."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Refused
from helpers.files import bytes_of, idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from flowtrain.data.images import read_idx
from flowtrain.utils.errors import DataError


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=arrays(np.uint8, array_shapes(min_dims=1, max_dims=4, max_side=5)), gz=st.booleans())
def test_idx_round_trip(tmp_path: Path, values: np.ndarray, gz: bool) -> None:
    path = tmp_path / "f"
    path.write_bytes(gzip.compress(idx(values)) if gz else idx(values))
    found = read_idx(path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == np.uint8
    # torch warns about read-only arrays
    torch.from_numpy(found)


def test_gzip_is_detected_from_the_content(tmp_path: Path) -> None:
    (tmp_path / "f.gz").write_bytes(idx(bytes_of(3, 2)))
    (tmp_path / "f").write_bytes(gzip.compress(idx(bytes_of(3, 2))))
    np.testing.assert_array_equal(read_idx(tmp_path / "f.gz"), bytes_of(3, 2))
    np.testing.assert_array_equal(read_idx(tmp_path / "f"), bytes_of(3, 2))


GOOD = idx(bytes_of(7, 5, 3))
ZIPPED = gzip.compress(GOOD)
BIG = gzip.compress(idx(bytes_of(500, 10, 10)), compresslevel=1)

DAMAGED = {
    "empty": (b"", ["is not an IDX file", "is empty"]),
    "HTML page": (b"<!DOCTYPE html>", ["is not an IDX file", "b'<!DO'"]),
    "truncated magic number": (b"\0\0\x08", ["is not an IDX file", r"b'\x00\x00\x08'"]),
    "unknown type": (b"\0\0\x07\x01" + GOOD[4:], ["is not an IDX file"]),
    "rank 0": (b"\0\0\x08\0\x01", ["is not an IDX file", "rank of 1 to 4"]),
    "rank 5": (idx(bytes_of(1, 1, 1, 1, 1)), ["is not an IDX file", "rank of 1 to 4"]),
    "integers": (idx(np.zeros((2, 2), ">i4"), 0x0C), ["contains int32", "0x0c", "uint8", "0x08"]),
    "doubles": (idx(np.zeros(2), 0x0E), ["contains float64"]),
    "truncated header": (GOOD[:13], ["cut short", "12 bytes for 3 sizes", "9 follow"]),
    "truncated": (GOOD[:-1], ["cut short", "7 x 5 x 3 = 105 bytes"]),
    "truncated, gzipped": (gzip.compress(GOOD[:-1]), ["cut short", "7 x 5 x 3 = 105 bytes", "104 follow"]),
    "header only": (GOOD[:16], ["cut short", "105 bytes"]),
    "too long": (GOOD + b"\0", ["is damaged", "7 x 5 x 3 = 105 bytes", "more"]),
    "too long, gzipped": (gzip.compress(GOOD + b"\0"), ["is damaged", "105 bytes", "more"]),
    "no images": (idx(bytes_of(0, 28, 28)), ["is empty", "0 x 28 x 28"]),
    "huge sizes": (struct.pack(">I4I", 0x804, *[2**32 - 1] * 4) + b"\0" * 9, ["4294967295 x", "room for 29 "]),
    "huge sizes, gzipped": (gzip.compress(struct.pack(">I2I", 0x802, 2**20, 2**20)), ["1099511627776", "room for"]),
    "gzip magic only": (b"\x1f\x8b", ["damaged gzip file", "4 more bytes are expected"]),
    "truncated gzip": (BIG[:-2000], ["damaged gzip file", "50000 more bytes are expected", "ended before"]),
    "gzip without trailer": (ZIPPED[:-8], ["damaged gzip file", "ended before"]),
    "wrong gzip checksum": (ZIPPED[:-8] + b"1234" + ZIPPED[-4:], ["damaged gzip file", "CRC"]),
    "damaged gzip stream": (ZIPPED[:10] + b"\xff" + ZIPPED[11:], ["damaged gzip file", "invalid block type"]),
    "trailing bytes after gzip": (ZIPPED + b"more", ["damaged gzip file"]),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_refused(tmp_path: Path, case: str, refused: Refused) -> None:
    content, fragments = DAMAGED[case]
    path = tmp_path / "some-file"
    path.write_bytes(content)
    refused(lambda: read_idx(path, "ask for it again"), DataError, [str(path), *fragments, "; ask for it again"])


def test_header_with_a_huge_shape_allocates_no_memory(tmp_path: Path, refused: Refused) -> None:
    # the declared size is possible for gzip, but far larger than the content
    path = tmp_path / "f.gz"
    noise = np.random.default_rng(0).bytes(600_000)
    path.write_bytes(gzip.compress(struct.pack(">I2I", 0x802, 60_000, 10_000) + noise, compresslevel=1))
    tracemalloc.start()
    try:
        refused(lambda: read_idx(path), DataError, ["cut short", "600000000 bytes", "600000 follow"])
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


def test_missing_file_and_directory_errors_name_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.chdir(tmp_path)
    refused(lambda: read_idx(Path("no"), "get it"), DataError, [f"no file {tmp_path / 'no'}", "; get it"])
    refused(lambda: read_idx(tmp_path, "get it"), DataError, [str(tmp_path), "directory", "; get it"])
