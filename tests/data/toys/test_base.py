"""Every toy in configs/data: batches, held-out sets, and log p at any point."""

import math
from collections.abc import Callable

import pytest
import torch

from flowtrain.data.toys.base import Toy
from flowtrain.utils.errors import ConfigError, DataError


def test_batches_depend_on_seed_and_step_alone(
    name: str, toy: Callable[[str], Toy], toys: dict[str, type[Toy]]
) -> None:
    batch = toy(name).train_batch(step=3, batch_size=64, seed=7)
    assert batch.shape == (64, 2)
    assert batch.dtype == torch.float32
    assert torch.equal(batch, toys[name](seed=1).train_batch(3, 64, 7))
    for other in (toy(name).train_batch(4, 64, 7), toy(name).train_batch(3, 64, 8)):
        assert not torch.isin(batch, other).any(dim=0).all()


def test_held_out_sets_are_fixed_and_apart(name: str, toy: Callable[[str], Toy], toys: dict[str, type[Toy]]) -> None:
    data, again, other = toy(name), toys[name](), toys[name](seed=1)
    assert torch.equal(data.val, again.val)
    assert torch.equal(data.test, again.test)
    assert data.val.shape == (2000, 2)
    assert data.test.shape == (10_000, 2)
    assert data.val.dtype == data.test.dtype == torch.float32
    assert not torch.equal(data.val, other.val)


def test_no_sample_is_in_two_sets(name: str, toys: dict[str, type[Toy]]) -> None:
    """All sets have the same size, because draws of different sizes differ even from the same generator."""
    data = toys[name](n_val=512, n_test=512)
    batches = [data.train_batch(step, 512, seed) for step in range(4) for seed in range(4)]
    rows = torch.cat([data.val, data.test, *batches]).tolist()
    assert len({tuple(row) for row in rows}) >= len(rows) - 1


def test_empty_held_out_sets_are_refused(name: str, toys: dict[str, type[Toy]]) -> None:
    assert len(toys[name](n_val=1, n_test=1).test) == 1
    with pytest.raises(ConfigError, match=r"data\.n_val=0"):
        toys[name](n_val=0)
    with pytest.raises(ConfigError, match=r"data\.n_test=-1"):
        toys[name](n_test=-1)


def test_float32_input_and_default_dtype_change_nothing(
    name: str, toy: Callable[[str], Toy], toys: dict[str, type[Toy]]
) -> None:
    x = toy(name).test[:300]
    expected = toy(name).log_prob(x.double())
    torch.set_default_dtype(torch.float32)
    fresh = toys[name]()
    assert torch.equal(fresh.test[:300], x)
    actual = fresh.log_prob(x)
    assert actual.dtype == torch.float64
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


def test_scores_do_not_depend_on_the_batch(name: str, toy: Callable[[str], Toy]) -> None:
    x = toy(name).test[:70].double()
    together = toy(name).log_prob(x)
    alone = torch.cat([toy(name).log_prob(row[None]) for row in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    assert toy(name).log_prob(x[:0]).shape == (0,)
    assert not toy(name).log_prob(x.requires_grad_()).requires_grad


def test_far_points_are_finite_and_ever_less_likely(name: str, toy: Callable[[str], Toy]) -> None:
    direction = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8], [-0.8, 0.6]])
    scores = torch.stack([toy(name).log_prob(r * direction) for r in (7.0, 9.99, 10.2, 20.0, 1e3, 1e6, 1e30)])
    if name == "checkerboard":
        assert (scores == -torch.inf).all()
        return
    assert scores.isfinite().all()
    assert (scores.diff(dim=0)[2:] < 0).all()
    assert (scores[0] < -20).all()


def test_nan_and_infinite_points_are_scored_as_such(name: str, toy: Callable[[str], Toy]) -> None:
    x = torch.tensor([[math.nan, 0.0], [math.inf, 0.0], [0.0, -math.inf], [math.inf, math.nan]])
    score = toy(name).log_prob(x)
    assert score.isnan().tolist() == [True, False, False, True]
    assert (score[1:3] == -torch.inf).all()
    with pytest.raises(DataError, match=r"\(B, 2\)"):
        toy(name).log_prob(torch.zeros(4, 3))


def test_edge_of_the_checkerboard_has_density(toy: Callable[[str], Toy]) -> None:
    x = torch.tensor([[-4.0, -4.0], [0.0, 1.0], [2.0, 2.0], [3.0, 4.0], [4.0, 3.0]])
    assert toy("checkerboard").log_prob(x).tolist() == pytest.approx([-math.log(32)] * 5)
    assert toy("checkerboard").log_prob(torch.tensor([[-3.0, 3.0], [4.0001, 3.0]])).tolist() == [-math.inf] * 2
