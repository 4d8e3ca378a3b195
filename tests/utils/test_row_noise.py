"""Random numbers of a row depend on its number only, and have the stated distributions."""

import pytest
import torch

from flowtrain.utils.row_noise import first_row, gaussian_of, rademacher_of, random_bits, rows_from, uniform_rows

CPU = torch.device("cpu")


def test_bits_are_those_of_splitmix64() -> None:
    """Compares with SplitMix64 in Python's integers, from the state that is a hash of key and row."""
    mask = 2**64 - 1

    def scrambled(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    golden, key, row = 0x9E3779B97F4A7C15, 123456789, 41
    state = scrambled((scrambled(key) + (row + 1) * golden) & mask)
    expected = [scrambled((state + i * golden) & mask) for i in (1, 2, 3)]
    found = random_bits(key, 40, 5, 3, CPU)[1]
    assert [n % 2**64 for n in found.tolist()] == expected


@pytest.mark.parametrize("of", [rademacher_of, gaussian_of])
def test_numbers_have_independent_rows_with_mean_0_and_variance_1(of: object) -> None:
    assert callable(of)
    x = torch.cat([of(random_bits(key, 0, 2000, 50, CPU)) for key in (0, 1)]).double()
    n = x.numel()
    assert abs(float(x.mean())) < 5 / n**0.5
    assert abs(float(x.square().mean()) - 1) < 10 / n**0.5
    for other in (x.roll(1, 0), x.roll(1, 1), x.roll(2000, 0)):
        assert abs(float((x * other).mean())) < 5 / n**0.5
    assert set(rademacher_of(random_bits(0, 0, 9, 9, CPU)).unique().tolist()) == {-1.0, 1.0}


def test_gaussian_numbers_have_the_quantiles_of_a_normal_distribution() -> None:
    u = torch.special.ndtr(gaussian_of(random_bits(5, 0, 1000, 100, CPU)).double()).flatten().sort().values
    expected = (torch.arange(len(u), dtype=torch.float64) + 0.5) / len(u)
    assert float((u - expected).abs().max()) < 2 / len(u) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uniform_noise_of_a_row_does_not_depend_on_the_parts(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowtrain.utils.row_noise.SKIPPED", 7)
    [whole] = uniform_rows([10], (2, 3), dtype, seed=4, draws=3)
    parts = [torch.cat(one) for one in zip(*uniform_rows([1, 4, 5], (2, 3), dtype, seed=4, draws=3), strict=True)]
    [end] = uniform_rows([3], (2, 3), dtype, seed=4, draws=3, first=7)
    for k in range(3):
        assert torch.equal(whole[k], parts[k])
        assert torch.equal(whole[k][7:], end[k])
    with torch.random.fork_rng():
        torch.manual_seed(4)
        assert torch.equal(whole[0], torch.rand(10, 2, 3, dtype=dtype))
    assert len(torch.stack(whole).unique()) == 180


def test_rows_are_counted_from_the_first_row() -> None:
    assert first_row() == 0
    with rows_from(7):
        assert first_row() == 7
    assert first_row() == 0
