"""The replay buffer: frequencies of draws, corrections of weights, the newest rows, and damaged states."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowtrain.objectives.replay_buffer import ReplayBuffer, effective_share
from flowtrain.utils.errors import CheckpointError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(n: int = 50, size: int = 100) -> ReplayBuffer:
    torch.manual_seed(0)
    buffer = ReplayBuffer(size, torch.zeros(1), 3)
    buffer.add(torch.randn(n, 3), torch.randn(n), torch.randn(n))
    return buffer


def test_rows_are_drawn_by_their_weights() -> None:
    buffer = ReplayBuffer(4, torch.zeros(1), 1)
    buffer.add(torch.zeros(4, 1), torch.tensor([0.1, 0.2, 0.3, 0.4]).log() + 500, torch.zeros(4))
    shared, n = generator(), 4000
    pairs = torch.stack([buffer.draw(2, shared) for _ in range(n)])
    first = torch.bincount(pairs[:, 0], minlength=4) / n
    torch.testing.assert_close(first, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=4 * 0.5 / n**0.5)
    assert bool((pairs[:, 0] != pairs[:, 1]).all())
    # without replacement, the second row is drawn by the weights of the other rows, such as 0.4 / 0.7 after row 2
    after = pairs[pairs[:, 0] == 2, 1]
    assert (after == 3).double().mean().item() == pytest.approx(0.4 / 0.7, abs=4 * 0.5 / len(after) ** 0.5)


def test_a_draw_of_more_rows_than_there_are_repeats_them() -> None:
    drawn = filled(5).draw(12, generator())
    assert len(drawn) == 12
    assert torch.bincount(drawn, minlength=5).max() <= 3


def test_a_large_buffer_keeps_the_newest_rows() -> None:
    buffer = ReplayBuffer(5, torch.zeros(1), 1)
    for start in (0.0, 3.0, 6.0):
        values = torch.arange(start, start + 3)
        buffer.add(values[:, None], values, -values)
    for key in (buffer.x[:, 0], buffer.log_w, -buffer.log_q):
        assert key.tolist() == [4, 5, 6, 7, 8]


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_corrected_weights_belong_to_the_new_flow(power: float) -> None:
    """For rows with density r, the weight is p^alpha q^(1 - alpha) / r, here with alpha = 1 + power."""
    log_p, log_r, old, new = torch.randn(4, 50).float()
    buffer = ReplayBuffer(50, torch.zeros(1), 3)
    buffer.add(torch.randn(50, 3), (1 + power) * log_p - power * old - log_r, old)
    rows = torch.arange(0, 50, 2)
    buffer.correct(rows, new[rows], power)
    q = old.clone()
    q[rows] = new[rows]
    torch.testing.assert_close(buffer.log_w, (1 + power) * log_p - power * q - log_r)
    torch.testing.assert_close(buffer.log_q, q)


def test_state_is_a_copy_that_can_be_loaded() -> None:
    buffer = filled()
    state = buffer.state()
    before = buffer.x.clone()
    buffer.correct(torch.arange(3), torch.zeros(3), 1.0)
    buffer.add(torch.ones(60, 3), torch.ones(60), torch.ones(60))
    again = ReplayBuffer(100, torch.zeros(1), 3)
    again.load(state)
    assert torch.equal(again.x, before)
    smaller = ReplayBuffer(20, torch.zeros(1), 3)
    smaller.load(state)
    assert torch.equal(smaller.x, before[-20:])


def of(key: str, change: Callable[[Tensor], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda state: {**state, key: change(state[key])}


def with_nan(value: Tensor) -> Tensor:
    value = value.clone()
    value[-1] = torch.nan
    return value


@pytest.mark.parametrize(
    "damage",
    [
        of("x", lambda v: v[:-1]), of("x", lambda v: v[:, :2]), of("x", with_nan), of("x", lambda v: v.double()),
        of("x", lambda v: v.tolist()), of("log_w", with_nan), of("log_w", lambda v: v[:-1]),
        of("log_q", lambda v: v + torch.inf), of("log_q", lambda v: None), of("x", lambda v: torch.tensor(1.0)),
        lambda state: {},
    ],
)  # fmt: skip
def test_damaged_states_are_refused(damage: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    state = damage(filled().state())
    buffer = filled()
    before = buffer.state()
    with pytest.raises(CheckpointError, match="damaged"):
        buffer.load(state)
    assert all(torch.equal(value, buffer.state()[key]) for key, value in before.items())


def test_effective_sample_size() -> None:
    assert effective_share(torch.full((7,), 900.0)) == pytest.approx(1)
    assert effective_share(torch.tensor([0.0, -1e9, 0.0, -1e9])) == pytest.approx(0.5)
