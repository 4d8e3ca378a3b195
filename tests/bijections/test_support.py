"""ToSupport: log-determinants, inverses, the ends of the supports, and values outside of them."""

import math

import numpy as np
import pytest
import torch

from flowtrain.bijections.support import ToSupport
from flowtrain.data.types import ColumnType, on_line
from flowtrain.utils.errors import FlowtrainError

LOW = (-math.inf, 0.0, 2.0, 0.0, 0.0, -math.inf, 5.0, 1.0, -math.inf)
HIGH = (math.inf, math.inf, 5.0, 360.0, math.inf, 3.0, math.inf, 7.0, 3.0)
SCALE = (0.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.5, 0.0, 1.5)
CIRCULAR, WHOLE = (3,), (4, 7)


def support() -> ToSupport:
    return ToSupport(LOW, HIGH, CIRCULAR, WHOLE, SCALE)


def test_log_determinant_is_that_of_the_jacobian_and_inverse_is_exact() -> None:
    z = 1.5 * torch.randn(40, len(LOW), dtype=torch.float64)
    z[:, 3] = z[:, 3].clamp(-3.1, 3.1)
    x, log_det = support()(z)
    back, log_det_back = support().inverse(x)
    torch.testing.assert_close(back, z, atol=1e-10, rtol=0)
    torch.testing.assert_close(log_det, -log_det_back, atol=1e-9, rtol=0)
    jacobians = [torch.autograd.functional.jacobian(lambda row: support().inverse(row[None])[0][0], row) for row in x]
    expected = torch.linalg.slogdet(torch.stack(jacobians)).logabsdet
    torch.testing.assert_close(log_det_back, expected, atol=1e-10, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_far_points_stay_in_the_support(dtype: torch.dtype) -> None:
    z = torch.cat([s * torch.logspace(0, 6, 30, dtype=dtype).unsqueeze(1).expand(30, len(LOW)) for s in (-1, 1)])
    x, _ = support()(z)
    assert x.isfinite().all()
    for i, (low, high) in enumerate(zip(LOW, HIGH, strict=True)):
        assert (x[:, i].double() >= low).all()
        assert (x[:, i].double() <= high).all()
    assert (x[:, 1] > 0).all()
    assert (x[:, 3] < 360).all()
    assert (x[:, 7].floor() <= 6).all()


def test_ends_that_float32_rounds_outwards_are_avoided() -> None:
    # float32 rounds 0.7 down and 0.1 up
    x, _ = ToSupport([0.7, 0.0], [1.0, 0.1])(torch.tensor([[-200.0, 200.0]]))
    assert x[0, 0].double() >= 0.7
    assert x[0, 1].double() <= 0.1


def test_density_outside_of_the_support_is_zero_and_z_is_finite() -> None:
    inside = torch.tensor([[0.0, 1.0, 3.0, 90.0, 2.5, 1.0, 6.0, 3.5, 1.0]])
    for column, value in [(1, -1.0), (1, 0.0), (2, 1.9), (2, 5.1), (4, -0.1), (5, 3.0), (6, 4.0), (7, 0.5), (7, 7.5)]:
        x = inside.clone()
        x[0, column] = value
        z, log_det = support().inverse(x)
        assert z.isfinite().all()
        assert log_det.item() == -math.inf
    assert support().inverse(inside)[1].isfinite().all()


def test_values_at_closed_ends_have_a_density() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 1.0, 6.0, 1.0, 1.0], [0.0, 1.0, 5.0, 360.0, 0.0, 1.0, 6.0, 7.0, 1.0]])
    z, log_det = support().inverse(x)
    assert z.isfinite().all()
    assert log_det.isfinite().all()


def test_angles_are_wrapped() -> None:
    x = torch.tensor([[10.0], [370.0], [-350.0]], dtype=torch.float64)
    z, log_det = ToSupport([0.0], [360.0], [0]).inverse(x)
    torch.testing.assert_close(z, torch.full_like(z, math.radians(10) - math.pi))
    torch.testing.assert_close(log_det, torch.full_like(log_det, math.log(math.pi / 180)))


def test_gradients_are_finite_at_the_ends() -> None:
    x = torch.tensor([[0.0, 0.0, 2.0, 0.0, 0.0, 3.0, 5.0, 1.0, 3.0]], requires_grad=True)
    support().inverse(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_moments_of_the_data_use_the_same_map() -> None:
    z = torch.randn(20, len(LOW), dtype=torch.float64)
    x, _ = support()(z)
    kinds = ["real", "positive", "interval", "circular", "positive", "interval", "interval", "interval", "interval"]
    types = [ColumnType(k, a, b, scale=s) for k, a, b, s in zip(kinds, LOW, HIGH, SCALE, strict=True)]
    np.testing.assert_allclose(on_line(types, x.numpy()), support().inverse(x)[0].numpy(), atol=1e-10)


def test_bounds_in_another_order_are_refused() -> None:
    with pytest.raises(FlowtrainError):
        ToSupport([1.0], [0.0])
