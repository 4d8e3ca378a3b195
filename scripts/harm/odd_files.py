"""Array and text files that are complete but unusual."""

import io
import random
import struct
import zipfile
from typing import Any

import numpy as np


def random_table(rng: random.Random) -> np.ndarray:
    """Returns a valid table."""
    shape = (rng.choice([40, 60]), rng.choice([1, 2, 3]))
    return np.random.default_rng(rng.getrandbits(32)).normal(rng.choice([0, 100]), rng.choice([1, 1e-3, 50]), shape)


def npy_of(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def npz_of(compressed: bool = False, **members: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **members)
    return file.getvalue()


def csv_of(values: np.ndarray, delimiter: str = ",", header: bool = False, ending: str = "\n") -> str:
    names = [delimiter.join(f"x{i}" for i in range(values.shape[1]))] if header else []
    return ending.join([*names, *(delimiter.join(map(repr, row)) for row in values.tolist())]) + ending


def forged(header: str, version: bytes = b"\x01\x00", length: int | None = None, data: bytes = bytes(640)) -> bytes:
    """Returns an .npy file with any header, which may claim any length."""
    text = header.encode() + b"\n"
    size = len(text) if length is None else length
    field = struct.pack("<H", size % 2**16) if version == b"\x01\x00" else struct.pack("<I", size % 2**32)
    return b"\x93NUMPY" + version + field + text + data


def header(descr: str = "'<f8'", order: str = "False", shape: str = "(40, 2)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


HEADERS = [
    header(shape="(1000000000000, 1000000)"), header(shape="(-1, 2)"), header(shape="(40.0, 2)"),
    header(shape="40"), header(shape="()"), header(shape="(0, 2)"), header(shape="(40, 0)"),
    header(shape="(True, 80)"), header(shape="(2,) * 999999999"), header(shape="(" * 3000), header(shape="None"),
    header(shape=f"({'1, ' * 70})"), header(shape=f"(1{'0' * 5000}, 2)"), header(shape="(9223372036854775807, 2)"),
    header(descr="'|O'"), header(descr="'|V8'"), header(descr="'|V999999999999'"), header(descr="'<f80'"),
    header(descr="'<f0'"), header(descr="''"), header(descr="None"), header(descr="[('a', '<f8'), ('a', '<f8')]"),
    header(descr="[('a', '<f8', (1000000, 1000000))]"), header(descr="'<U9'"), header(descr="'<M8[D]'"),
    header(descr="'<c16'"), header(descr="('<f8', (3,))"), header(order="True"), header(order="2"),
    "{", "", "{}", "[]", "__import__('os').system('true')", "{'descr': '<f8'}", "\x00" * 90, "ü" * 40,
]  # fmt: skip
DTYPES = ["?", "i1", "u8", "f2", "f4", ">f4", ">i2", "c8", "U5", "S5", "O", "g"]
CELLS = [
    "", "nan", "inf", "-", "NA", "1e999", "1e308", "1e39", "1_000", "0x10", "1,5", "word", '"', "'", '"1"', "#", "\x00",
    "\ufeff", "\uff11\uff12", "\u0661", "\u22121", "1e", "True", "2020-01-01", "9" * 400, "0." + "0" * 400 + "1",
    "x" * 200_000, "1" * 140_000,
]  # fmt: skip
TEXTS = ["", "\n", ",", ",,,\n,,,\n", "a,b\n", "1", "1,2\n", "1\n2\n3\n", '"', "," * 100_000]
ENCODINGS = [*["utf-8"] * 12, "utf-8-sig", "utf-16", "utf-32", "latin-1"]
ALPHABET = "0123456789.,;-+eE \t\n\r\"'#nai_x\x00é"


def odd_npy(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        version = rng.choice([b"\x01\x00", b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x09"])
        return forged(rng.choice(HEADERS), version, rng.choice([None, None, None, 0, 1, 2**16 - 1, 2**32 - 1]))
    values = random_table(rng)
    one_odd = values.copy()
    where = rng.randrange(len(values)), rng.randrange(values.shape[1])
    one_odd[where] = rng.choice([np.nan, np.inf, -np.inf, 1e308, 1e39, 1e30, 1e15, -1e15])
    with np.errstate(all="ignore"):
        cast = values.astype(rng.choice(DTYPES))
    choices = [
        one_odd, cast, np.asfortranarray(values), values[: rng.randint(0, 4)], values[:, :0], values[0, 0],
        values[:, 0], values[None], np.round(values), np.zeros_like(values), values[:1].repeat(40, 0), values * 1e37,
        values * 1e-30, values * 1e-300, np.column_stack([values, values]), np.eye(40),
        np.column_stack([values, values[:, :1] + 1]), np.array([{"a": 1}, None], dtype=object),
        np.zeros(40, dtype=[("a", "f8"), ("b", "i4")]),
    ]  # fmt: skip
    return npy_of(choices[rng.randrange(len(choices))])


def odd_npz(rng: random.Random) -> bytes:
    values = random_table(rng)
    if rng.random() < 0.5:
        several = {"a": values, "b": values}
        members = [several, {}, {"a": np.array([None], dtype=object)}, {"a": values, "key": np.zeros(3)}, {"a": values}]
        return npz_of(rng.random() < 0.5, **rng.choice(members))
    name = rng.choice(["a.npy", "a", "../../a.npy", "/tmp/a.npy", "a/b.npy", "a" * 300 + ".npy", "a.npy\x00b"])
    # sixteen megabytes of zeros are sixteen kilobytes in an archive
    zeros = forged(header(shape="(1048576, 2)"), data=bytes(2**24))
    content = rng.choice([odd_npy(rng), b"", b"\x93NUMPY", npz_of(a=values), zeros])
    file = io.BytesIO()
    how = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
    with zipfile.ZipFile(file, "w", how) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def odd_text(rng: random.Random) -> bytes:
    ending = rng.choice(["\n", "\n", "\n", "\r\n", "\r", "\n\n", "\x0b"])
    rows = csv_of(random_table(rng), rng.choice(",,,;;\t\t  |:"), rng.random() < 0.5, ending).split("\n")
    for _ in range(rng.randint(0, 3)):
        i, cell = rng.randrange(len(rows)), rng.choice(CELLS)
        rows[i] = rng.choice([cell, f"{rows[i]},{cell}", f"{cell},{rows[i]}", rows[i].replace("1", cell, 1), ""])
    noise = "".join(rng.choice(ALPHABET) for _ in range(rng.randint(0, 200)))
    text = rng.choice(["\n".join(rows)] * 6 + [noise, rng.choice(TEXTS)])
    return text.encode(rng.choice(ENCODINGS), errors="replace")
