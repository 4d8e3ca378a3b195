"""Probes of the divergence, and the choice between an exact and an estimated trace."""

import pytest
import torch
from helpers.equations import random_field

from flowtrain.nn.divergence import Probes, TraceRule, divergence
from flowtrain.utils.errors import ConfigError


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased(noise: str) -> None:
    field, x, t = random_field(3), torch.randn(2, 3), torch.tensor(0.4)
    _, exact = divergence(field, t, x, Probes.exact(x))
    draws = 20_000
    estimates = torch.stack([divergence(field, t, x, Probes.hutchinson(x, noise, draws // 20))[1] for _ in range(20)])
    stderr = estimates.std(0) / 20**0.5
    assert ((estimates.mean(0) - exact).abs() < 4 * stderr).all()


@pytest.mark.parametrize(
    ("d", "training", "exact"), [(8, True, True), (9, True, False), (128, False, True), (129, False, False)]
)
def test_auto_trace_depends_on_dimension_and_mode(d: int, training: bool, exact: bool) -> None:
    assert TraceRule().is_exact(d, training) is exact


@pytest.mark.parametrize("bad", [{"train": "exacty"}, {"evaluate": "no"}, {"noise": "uniform"}, {"noise_samples": 0}])
def test_invalid_trace_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="model"):
        TraceRule(**bad)  # type: ignore[arg-type]
