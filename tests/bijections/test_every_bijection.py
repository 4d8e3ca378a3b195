"""One test for every bijection: shapes, round trip, and log-determinant against the autograd Jacobian in float64."""

from collections.abc import Callable

import pytest
import torch
from helpers.flows import continuous, perturbed
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.coupling import CheckerboardCoupling, HalfCoupling
from flowtrain.bijections.linear import Affine, InvertibleLinear, Permutation
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.scale import ActNorm, BatchNorm, Standardize
from flowtrain.bijections.spline import Spline
from flowtrain.bijections.squeeze import FactorOut, Squeeze
from flowtrain.models.ffjord import ffjord
from flowtrain.models.glow import glow
from flowtrain.models.maf import maf
from flowtrain.models.nsf import nsf
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.conditioners import ConvNet
from flowtrain.ode import ode_solver


def standardize(d: int) -> Bijection:
    bijection = Standardize((d,))
    bijection.fit(torch.randn(d), torch.rand(d) + 0.5)
    return bijection


def stack(d: int, **arguments: object) -> Bijection:
    return perturbed(realnvp((d,), layers=3, hidden=(8,), **arguments).bijection)  # type: ignore[arg-type]


BIJECTIONS: dict[str, Callable[[int], Bijection]] = {
    "affine": lambda d: perturbed(Affine(d)),
    "actnorm": lambda d: perturbed(ActNorm(d)),
    "standardize": standardize,
    "permutation": lambda d: Permutation(torch.randperm(d)),
    "batchnorm": lambda d: initialized(BatchNorm(d), (d,)),
    "linear": lambda d: perturbed(InvertibleLinear(d), 0.1),
    "linear from a permutation": lambda d: perturbed(InvertibleLinear(d, "permutation"), 0.1),
    "logit": lambda d: Logit(17, 0.05),
    "realnvp alternate": lambda d: stack(d),
    "realnvp permutation": lambda d: stack(d, mixing="permutation", actnorm=False),
    "realnvp batchnorm": lambda d: initialized(stack(d, batch_norm=True), (d,)),
    "glow": lambda d: perturbed(glow((d,), steps=2, hidden=(8,)).bijection, 0.1),
    "glow of splines": lambda d: perturbed(
        glow((d,), steps=2, hidden=(8,), coupling="spline", bins=3, input_bound=3.0).bijection, 0.1
    ),
    "nsf": lambda d: perturbed(nsf((d,), layers=2, hidden=(8,), bins=4, bound=2.0).bijection, 0.2),
    "nsf alternate": lambda d: perturbed(nsf((d,), layers=3, hidden=(8,), mixing="alternate").bijection, 0.2),
    "nsf permutation": lambda d: perturbed(nsf((d,), layers=3, hidden=(8,), mixing="permutation").bijection, 0.2),
    "maf": lambda d: perturbed(maf((d,), layers=2, hidden=(8,)).bijection),
    "maf linear": lambda d: perturbed(
        maf((d,), layers=2, hidden=(8,), mixing="linear", input_bound=3.0).bijection, 0.2
    ),
    "maf of splines": lambda d: perturbed(maf((d,), layers=2, hidden=(8,), transform="spline").bijection, 0.2),
    "maf in two passes": lambda d: perturbed(maf((d,), layers=2, hidden=(8,), passes=min(d, 2)).bijection),
    "continuous dopri5": lambda d: continuous(d, ode_solver("dopri5", rtol=1e-8)),
    "continuous rk4": lambda d: continuous(d, ode_solver("rk4", step_size=0.02)),
    "continuous dopri8": lambda d: continuous(d, ode_solver("dopri8", rtol=1e-10)),
    "continuous torchdiffeq": lambda d: continuous(d, ode_solver("dopri5", "adjoint", rtol=1e-8)),
    "chain": lambda d: Chain([perturbed(Affine(d)), continuous(d, ode_solver("dopri8", rtol=1e-9)), standardize(d)]),
}


def initialized(bijection: Bijection, event_shape: tuple[int, ...]) -> Bijection:
    """Initializes the bijection and fixes evaluation mode, because batch norm maps whole batches in training."""
    bijection.initialize(3 * torch.randn(64, *event_shape) + 1)
    bijection.eval()
    bijection.train = lambda mode=True: bijection  # type: ignore[method-assign]
    return bijection


SPLINE = Spline(bins=4, bound=2.0)


def net(n_in: int, n_out: int) -> nn.Module:
    return ConvNet(n_in, [6], n_out, "tanh")


IMAGES: dict[str, tuple[Callable[[int, int, int], Bijection], list[tuple[int, int, int]]]] = {
    "affine": (lambda c, h, w: perturbed(Affine(c * h * w)), [(2, 2, 3)]),
    "actnorm of channels": (lambda c, h, w: perturbed(ActNorm(c)), [(3, 2, 3)]),
    "actnorm of pixels": (lambda c, h, w: perturbed(ActNorm((c, h, w))), [(3, 2, 3)]),
    "batchnorm": (lambda c, h, w: initialized(BatchNorm(c), (c, h, w)), [(3, 2, 3)]),
    "permutation": (lambda c, h, w: Permutation(torch.randperm(c)), [(4, 2, 3)]),
    "linear": (lambda c, h, w: perturbed(InvertibleLinear(c), 0.1), [(1, 3, 2), (4, 2, 3)]),
    "logit": (lambda c, h, w: Logit(256, 1e-2), [(1, 3, 2)]),
    "squeezed": (lambda c, h, w: Squeeze(perturbed(ActNorm(4 * c))), [(1, 2, 4), (2, 4, 2)]),
    "on half": (lambda c, h, w: FactorOut(perturbed(Affine(c // 2 * h * w))), [(2, 2, 3), (4, 3, 1)]),
    "half": (lambda c, h, w: perturbed(HalfCoupling(c, False, net((c + 1) // 2, c // 2 * 2))), [(2, 3, 4), (3, 3, 2)]),
    "half, swapped": (
        lambda c, h, w: perturbed(HalfCoupling(c, True, net(c // 2, (c + 1) // 2 * 2))),
        [(2, 3, 4), (3, 3, 2)],
    ),
    "half of splines": (
        lambda c, h, w: perturbed(
            HalfCoupling(c, False, net((c + 1) // 2, c // 2 * SPLINE.size), transform=SPLINE), 0.5
        ),
        [(2, 3, 4), (3, 1, 2)],
    ),
    "checkerboard of splines": (
        lambda c, h, w: perturbed(CheckerboardCoupling((h, w), True, net(c, c * SPLINE.size), transform=SPLINE), 0.5),
        [(1, 3, 3), (2, 1, 2)],
    ),
    "checkerboard": (
        lambda c, h, w: perturbed(CheckerboardCoupling((h, w), False, net(c, 2 * c))),
        [(1, 3, 3), (2, 3, 2), (1, 1, 5)],
    ),
    "checkerboard, swapped": (
        lambda c, h, w: perturbed(CheckerboardCoupling((h, w), True, net(c, 2 * c))),
        [(1, 3, 3), (2, 1, 2)],
    ),
    "realnvp": (
        lambda c, h, w: perturbed(realnvp((c, h, w), layers=2, hidden=(6,), positional_bias=True).bijection, 0.2),
        [(1, 4, 4), (1, 3, 5), (2, 2, 4), (1, 8, 8)],
    ),
    "realnvp batchnorm": (
        lambda c, h, w: initialized(
            perturbed(realnvp((c, h, w), layers=2, hidden=(6,), batch_norm=True, scales=(h + 1) % 2).bijection, 0.2),
            (c, h, w),
        ),
        [(1, 4, 4), (1, 3, 5)],
    ),
    "glow": (
        lambda c, h, w: perturbed(
            glow((c, h, w), steps=2, hidden=(6, 6), scales=2 if h > 2 else 0, positional_bias=True).bijection, 0.1
        ),
        [(1, 4, 8), (2, 2, 3)],
    ),
    "glow of splines": (
        lambda c, h, w: perturbed(
            glow((c, h, w), steps=2, hidden=(6, 6), coupling="spline", bins=4, bound=2.0, scales=h // 2).bijection, 0.2
        ),
        [(1, 4, 4), (2, 1, 3)],
    ),
    "ffjord": (
        lambda c, h, w: perturbed(
            ffjord(
                (c, h, w),
                solver=ode_solver("dopri8", rtol=1e-8),
                hidden=(6,),
                scales=1 if h % 2 == 0 else 0,
                actnorm=True,
                positional_bias=True,
                trace="exact",
            ).bijection,
            0.1,
        ),
        [(1, 2, 4), (2, 3, 1)],
    ),
}

IMAGE_CASES = [(name, shape) for name, (_, shapes) in IMAGES.items() for shape in shapes]


@pytest.mark.parametrize(("name", "shape"), IMAGE_CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_image_bijection_round_trip_and_log_det(name: str, shape: tuple[int, int, int], training: bool) -> None:
    bijection = IMAGES[name][0](*shape).train(training)
    check(bijection, torch.randn(2, *shape), moves=name != "permutation")


LABELLED = {
    "nsf": lambda shape, **rest: nsf(shape, layers=2, hidden=(6,), bins=4, **rest),
    "maf": lambda shape, **rest: maf(shape, layers=2, hidden=(6,), **rest),
    "realnvp": lambda shape, **rest: realnvp(shape, layers=2, hidden=(6,), **rest),
    "glow": lambda shape, **rest: glow(shape, steps=2, hidden=(6,), **rest),
    "ffjord": lambda shape, **rest: ffjord(
        shape, solver=ode_solver("dopri8", rtol=1e-8), hidden=(6,), trace="exact", **rest
    ),
}


OF_VECTORS = ("nsf", "maf")
LABELLED_CASES = [
    (model, shape)
    for model in LABELLED
    for shape in ([(1,), (3,)] if model in OF_VECTORS else [(3,), (1, 2, 2), (2, 3, 1)])
]


@pytest.mark.parametrize(("model", "shape"), LABELLED_CASES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_conditional_bijection_depends_on_the_label(model: str, shape: tuple[int, ...], training: bool) -> None:
    scales = {"scales": 1} if shape == (1, 2, 2) else {}
    places = {} if model in OF_VECTORS else {"positional_bias": True}
    flow = LABELLED[model](shape, conditional=True, classes=3, **places, **scales)
    bijection = perturbed(flow.bijection, 0.2).train(training)
    z, label = torch.randn(3, *shape), torch.tensor([2, 0, 2])
    check(bijection, z, label)
    x = bijection.map_forward(z, label)
    # rows do not depend on each other's labels
    for i in range(3):
        torch.testing.assert_close(bijection.map_forward(z[i : i + 1], label[i : i + 1])[0], x[i])
    assert (bijection.map_forward(z, torch.tensor([1, 1, 1])) - x).abs().amin(0).amax() > 1e-3


@pytest.mark.parametrize("name", list(BIJECTIONS))
@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("training", [True, False])
def test_vector_bijection_round_trip_and_log_det(name: str, d: int, training: bool) -> None:
    if d == 1 and name.startswith(("realnvp", "glow")):
        pytest.skip("couplings need two halves")
    check(BIJECTIONS[name](d).train(training), torch.randn(2, d), moves="permutation" not in name)


def check(bijection: Bijection, z: Tensor, label: Tensor | None = None, moves: bool = True) -> None:
    """Checks shapes, the round trip, and the log-determinant against the autograd Jacobian, for z (B, *event)."""
    x, log_det = bijection.forward(z, label)
    back, back_log_det = bijection.inverse(x, label)
    assert x.shape == z.shape
    assert log_det.shape == back_log_det.shape == (len(z),)
    torch.testing.assert_close(back, z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(back_log_det, -log_det, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_forward(z, label), x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(bijection.map_inverse(x, label), back, rtol=1e-6, atol=1e-6)
    assert x.sub(z).abs().max() > 1e-3 or not moves
    # rows are independent, so the Jacobian of the sum over rows contains each row's Jacobian
    jacobian = torch.autograd.functional.jacobian(lambda y: bijection.forward(y, label)[0].sum(0), z)
    assert isinstance(jacobian, Tensor)
    rows = jacobian.reshape(z[0].numel(), len(z), -1).transpose(0, 1)
    torch.testing.assert_close(torch.linalg.slogdet(rows)[1], log_det, rtol=1e-6, atol=1e-6)
