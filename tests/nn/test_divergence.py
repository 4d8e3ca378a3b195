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


def test_exact_divergence_without_gradients_equals_the_trace_of_autograd() -> None:
    field, x, t = random_field(3), torch.randn(5, 3), torch.rand(5)
    whole = torch.func.vmap(torch.func.jacrev(lambda t, y: field(t, y[None])[0], argnums=1))(t, x)
    expected = whole.diagonal(dim1=1, dim2=2).sum(1).detach()
    for times in (t, t[:1]):
        with torch.no_grad():
            found = divergence(field, times, x, Probes.exact(x))[1]
        torch.testing.assert_close(found, divergence(field, times, x, Probes.exact(x))[1].detach())
        if len(times) == 5:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("d", "training", "exact"), [(8, True, True), (9, True, False), (128, False, True), (129, False, False)]
)
def test_auto_trace_depends_on_dimension_and_mode(d: int, training: bool, exact: bool) -> None:
    assert TraceRule().is_exact(d, training) is exact


@pytest.mark.parametrize("bad", [{"train": "exacty"}, {"evaluate": "no"}, {"noise": "uniform"}, {"noise_samples": 0}])
def test_invalid_trace_options_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="model"):
        TraceRule(**bad)  # type: ignore[arg-type]
