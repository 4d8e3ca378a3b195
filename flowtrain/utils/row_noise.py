"""Random numbers that depend only on a key and on the number of a row, and not on the batch that the row is in."""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

# the increment and the multipliers of SplitMix64, as signed numbers
INCREMENT, FACTOR_1, FACTOR_2 = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# the largest number of values that `uniform_rows` draws at once for rows that are skipped
SKIPPED = 1_000_000
_FIRST: ContextVar[int] = ContextVar("number of the first row", default=0)


@contextmanager
def rows_from(first: int) -> Iterator[None]:
    """Counts the rows of a batch from `first` inside the context. Without this context, they count from 0."""
    token = _FIRST.set(first)
    try:
        yield
    finally:
        _FIRST.reset(token)


def first_row() -> int:
    """Returns the number of the first row of a batch, see `rows_from`."""
    return _FIRST.get()


def random_bits(key: int, first: int, rows: int, n: int, device: torch.device) -> Tensor:
    """Returns 64 random bits for each of n places in the rows first, first + 1, ..., as int64 (rows, n).

    The generator is SplitMix64 (Steele, Lea and Flood 2014, Fast splittable pseudorandom number generators). Each row
    has a state that is a hash of the key and the number of the row.

    Example:
        >>> a = random_bits(7, 0, 5, 3, torch.device("cpu"))
        >>> bool((a[2:] == random_bits(7, 2, 3, 3, torch.device("cpu"))).all())
        True
    """
    numbers = torch.arange(first, first + rows, device=device).unsqueeze(1)
    states = _scrambled(_scrambled(torch.full_like(numbers, key)) + (numbers + 1) * INCREMENT)
    return _scrambled(states + torch.arange(1, n + 1, device=device) * INCREMENT)


def uniform_rows(
    sizes: Iterable[int], shape: Sequence[int], dtype: torch.dtype, seed: int, draws: int = 1, first: int = 0
) -> Iterator[list[Tensor]]:
    """Yields uniform noise in [0, 1) for consecutive parts of a set of rows, on the CPU: K tensors (B, *shape) a part.

    Each draw k has a generator, whose seed depends on (seed, k). The generator of draw 0 has the seed `seed`. Row i has
    the numbers i d to (i + 1) d - 1 of this generator, with d the number of elements of a row. The noise of a row
    depends on `dtype`, but not on the sizes of the parts.

    Args:
        sizes: the number of rows of each part.
        shape: the shape of a row.
        dtype: the dtype of the noise.
        seed: the seed.
        draws: K.
        first: the number of the first row. The noise of the rows before it is drawn and discarded.

    Example:
        >>> [[both]] = uniform_rows([5], (2,), torch.float32, seed=0)
        >>> [[last]] = uniform_rows([2], (2,), torch.float32, seed=0, first=3)
        >>> bool((both[3:] == last).all())
        True
    """
    seeds = [seed, *random_bits(seed, 0, 1, draws - 1, torch.device("cpu")).flatten().tolist()]
    generators = [torch.Generator().manual_seed(one) for one in seeds]
    for generator in generators:
        left = first * math.prod(shape)
        while left > 0:
            torch.rand(min(left, SKIPPED), dtype=dtype, generator=generator)
            left -= SKIPPED
    for n in sizes:
        yield [torch.rand(n, *shape, dtype=dtype, generator=generator) for generator in generators]


def rademacher_of(bits: Tensor) -> Tensor:
    """Returns -1 or 1 from the highest bit, float32."""
    return 1 + 2 * (bits >> 63).float()


def gaussian_of(bits: Tensor) -> Tensor:
    """Returns standard normal numbers, float32 (Box and Muller 1958)."""
    high, low = (((bits >> shift) & (2**26 - 1)).double().add_(0.5).mul_(2.0**-26) for shift in (38, 12))
    return ((-2 * high.log()).sqrt() * (2 * math.pi * low).cos()).float()


def _scrambled(z: Tensor) -> Tensor:
    # products of int64 wrap around, and shifts copy the sign, which the masks remove
    z = (z ^ ((z >> 30) & (2**34 - 1))) * FACTOR_1
    z = (z ^ ((z >> 27) & (2**37 - 1))) * FACTOR_2
    return z ^ ((z >> 31) & (2**33 - 1))
