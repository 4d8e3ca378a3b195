"""log p on a grid: axes, order of the axes, mass, and refusals."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flowtrain.bijections import Bijection, Standardize
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.support import ToSupport
from flowtrain.data.context import ContextColumn
from flowtrain.data.types import ColumnType
from flowtrain.flow import Flow
from flowtrain.plotting.density_grid import check_has_grid, density_grid
from flowtrain.utils.errors import ConfigError, FlowtrainError


def gaussian(mean: list[float], std: list[float]) -> Flow:
    standardize = Standardize(len(mean))
    standardize.fit(mean=torch.tensor(mean), std=torch.tensor(std))
    return Flow((len(mean),), standardize).eval()


def log_normal(x: np.ndarray, mean: float, std: float) -> np.ndarray:
    return -(((x - mean) / std) ** 2) / 2 - np.log(std) - np.log(2 * np.pi) / 2


def test_grid_of_two_columns_has_the_exact_density() -> None:
    mean, std = [3.0, -20.0], [0.5, 7.0]
    x = torch.tensor(mean) + torch.tensor(std) * torch.randn(2000, 2, generator=torch.Generator().manual_seed(0))
    found = density_grid(gaussian(mean, std), x, 61, ("a", "b"))
    assert (found["x"].shape, found["y"].shape, found["columns"].tolist()) == ((61,), (61,), ["a", "b"])
    expected = log_normal(found["x"], mean[0], std[0])[:, None] + log_normal(found["y"], mean[1], std[1])[None]
    np.testing.assert_allclose(found["log_prob"], expected, atol=1e-4)
    for axis, (m, s) in zip("xy", zip(mean, std, strict=True), strict=True):
        assert found[axis][0] < m - 2.4 * s < m + 2.4 * s < found[axis][-1]
    mass = np.trapezoid(np.trapezoid(np.exp(found["log_prob"]), found["y"]), found["x"])
    assert 0.98 < mass < 1.001


def test_grid_does_not_leave_the_support_of_a_type() -> None:
    types = (ColumnType.parse("circular(360)"), ColumnType.parse("positive"))
    to_support = ToSupport(*zip(*(one.support for one in types), strict=True), circular=[0])
    flow = Flow((2,), to_support, types=types).eval()
    x = torch.rand(500, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([360.0, 1.0])
    found = density_grid(flow, x, 11)
    assert (found["x"][0], found["x"][-1], found["y"][0]) == (0, 360, 0)
    assert found["y"][-1] > 1


def test_grid_of_one_column_keeps_float64() -> None:
    flow = gaussian([1e6], [1.0]).double()
    flow.centered = True
    x = 1e6 + torch.randn(500, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = density_grid(flow, x, 11)
    assert found.keys() == {"x", "log_prob", "columns"}
    np.testing.assert_allclose(found["log_prob"], log_normal(found["x"], 1e6, 1.0), atol=1e-8)
    assert found["columns"].tolist() == ["c0"]


class Shift(Bijection):
    """x = z + 3 label."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert label is not None
        return z + 3 * label[:, None], z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert label is not None
        return x - 3 * label[:, None], x.new_zeros(len(x))


def test_grid_of_a_class_and_of_the_mean_over_classes() -> None:
    flow = Flow((1,), Shift(), classes=2, class_counts=(3, 1)).eval()
    x = torch.linspace(-2, 5, 100)[:, None]
    both = [density_grid(flow, x, 9, context=label) for label in (0, 1)]
    for label, found in enumerate(both):
        np.testing.assert_allclose(found["log_prob"], log_normal(found["x"], 3.0 * label, 1.0), atol=1e-4)
        assert found["context"] == label
    mean = density_grid(flow, x, 9)
    np.testing.assert_array_equal(mean["x"], both[0]["x"])
    expected = 0.75 * np.exp(both[0]["log_prob"]) + 0.25 * np.exp(both[1]["log_prob"])
    np.testing.assert_allclose(np.exp(mean["log_prob"]), expected, rtol=1e-5)
    assert "context" not in mean


def test_whole_numbers_have_density_zero_outside_their_range() -> None:
    flow = Flow((1,), Logit(4, 1e-3), integer_valued=True, levels=4).eval()
    x = torch.randint(4, (300, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = density_grid(flow, x, 400)
    outside = (found["x"] < 0) | (found["x"] > 4)
    assert outside.sum() > 10
    np.testing.assert_array_equal(found["log_prob"][outside], -np.inf)
    assert np.isfinite(found["log_prob"][~outside]).all()
    assert abs(np.trapezoid(np.exp(found["log_prob"]), found["x"]) - 1) < 0.02
    again = density_grid(flow, x, 400)
    np.testing.assert_array_equal(again["x"], found["x"])


def test_impossible_grids_are_refused() -> None:
    for shape in ((3,), (1, 2, 2)):
        with pytest.raises(ConfigError, match="one or two"):
            check_has_grid(Flow(shape, Standardize(shape)), "g.npz")
    with pytest.raises(FlowtrainError, match="conditional"):
        check_has_grid(gaussian([0.0], [1.0]), "g.npz", 1)


class ShiftByContext(Bijection):
    """x = z + 2 c for the standardised context c."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return z + 2 * context, z.new_zeros(len(z))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        assert context is not None
        return x - 2 * context, x.new_zeros(len(x))


def test_grid_of_a_flow_with_context_columns_needs_a_context() -> None:
    flow = Flow((1,), ShiftByContext(), context=(ContextColumn("mass", mean=1.0, std=0.5),)).eval()
    with pytest.raises(ConfigError, match="mass"):
        check_has_grid(flow, "g.npz")
    found = density_grid(flow, torch.zeros(3, 1), 5, context={"mass": 2.0})
    np.testing.assert_allclose(found["log_prob"], log_normal(found["x"], 4.0, 1.0), atol=1e-4)
    assert found["context"].tolist() == [2.0]
