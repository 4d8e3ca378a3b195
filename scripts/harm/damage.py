"""Damages the bytes of a file."""

import random
from collections.abc import Callable


def damaged(rng: random.Random, content: bytes) -> tuple[str, bytes]:
    """Returns the kind of damage and the damaged content."""
    kind = rng.choice(list(DAMAGE))
    return kind, DAMAGE[kind](rng, content)


def _flip(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        changed[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _truncate(rng: random.Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content))]


def _zero(rng: random.Random, content: bytes) -> bytes:
    begin, end = _block(rng, content)
    return content[:begin] + bytes(end - begin) + content[end:]


def _overwrite(rng: random.Random, content: bytes) -> bytes:
    begin, end = _block(rng, content, most=64)
    return content[:begin] + _noise(rng, end - begin) + content[end:]


def _insert(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    return content[:at] + _noise(rng, rng.randint(1, 64)) + content[at:]


def _remove(rng: random.Random, content: bytes) -> bytes:
    begin, end = _block(rng, content, most=64)
    return content[:begin] + content[end:]


def _swap(rng: random.Random, content: bytes) -> bytes:
    """Swaps two blocks of equal size."""
    size = rng.randint(1, max(1, min(4096, len(content) // 2)))
    a, b = sorted(rng.randrange(max(1, len(content) - size)) for _ in range(2))
    b = max(b, a + size)
    return content[:a] + content[b : b + size] + content[a + size : b] + content[a : a + size] + content[b + size :]


def _double(rng: random.Random, content: bytes) -> bytes:
    begin, end = _block(rng, content)
    return content[:end] + content[begin:]


DAMAGE: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bits flipped": _flip,
    "cut short": _truncate,
    "a block zeroed": _zero,
    "a block overwritten": _overwrite,
    "bytes inserted": _insert,
    "bytes removed": _remove,
    "blocks swapped": _swap,
    "a block doubled": _double,
}


def _block(rng: random.Random, content: bytes, most: int = 4096) -> tuple[int, int]:
    begin = rng.randrange(len(content))
    return begin, min(len(content), begin + rng.randint(1, most))


def _noise(rng: random.Random, n: int) -> bytes:
    return rng.getrandbits(8 * n).to_bytes(n, "big")
