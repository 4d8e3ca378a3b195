"""Scoring and sampling of each model beside zuko, nflows and normflows, alternating in one process.

    python scripts/bench/scoring.py                                   # every model at d = 2, 8, 64 and 784
    python scripts/bench/scoring.py --models maf nsf --d 8 64 --turns 9
    python scripts/bench/scoring.py --threads 2 --device cuda

Needs `pip install zuko nflows normflows` (nflows also needs UMNN). All models are in evaluation mode, without
gradients. The tasks are log p and sampling, of a batch and of a single row. The time is the CPU time of the process
(`time.process_time`) on one thread of a CPU, and the wall time otherwise. The ratio is the time of the peer divided by
the time of flowtrain in the same turn.

The peers have the same architecture: the same number and order of layers, hidden widths and bins.

- affine: a Gaussian with full covariance. zuko: a mixture of one component. nflows and normflows: a linear map with LU
  factors.
- realnvp: 8 affine couplings with MLPs of two hidden layers of 64 units, without ActNorm, which zuko lacks.
- nsf: 10 LU layers and spline couplings of 16 bins, with one residual block of 64 units. flowtrain also has an ActNorm.
- maf: 5 affine autoregressive maps with one residual block of 64 units, in alternating orders. zuko's network has
  plain layers with matrices of the same shapes. flowtrain also has an ActNorm.
- glow: 8 steps of ActNorm, an LU layer and an affine coupling, as in realnvp. zuko is measured without ActNorm.
- mixture: 16 components with full covariances. normflows has diagonal covariances only, so it is compared with
  `mixture, diagonal`. nflows has no mixture with fixed weights.
- ffjord: zuko's continuous flow with the field of flowtrain in plain torch, Dormand-Prince at rtol = atol = 1e-5. The
  trace is exact for d <= 128, and estimated with one probe otherwise. flowtrain controls the error of each row. zuko
  controls the largest error of the batch, and allows a hundred times the error of log p. nflows and normflows have no
  continuous flow.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from common import keep_freed_memory, machine, progress, table, use_threads

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH, BOUND, RTOL = 64, 5.0, 1e-5
ROWS = 2000
# fewer rows at 784 columns, because zuko makes a matrix for each row, and nflows samples of maf take minutes
FEWER = {"affine": 100, "nsf": 100, "maf": 50, "glow": 100, "mixture": 50, "ffjord": 50}
# the weights of the last layer of a field are multiplied by this, so that a solve needs as many evaluations as if
# trained
STEEP = 30
# the shortest time of a measurement, in seconds
LEAST = 0.02


class Contestant(NamedTuple):
    """The two tasks of a model: log p of rows, and sampling n rows."""

    log_prob: "Callable[[Tensor], Any]"
    sample: Callable[[int], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--d", nargs="+", type=int, default=[2, 8, 64, 784])
    parser.add_argument("--rows", type=int, help=f"rows of a batch; default: {ROWS}, fewer for 784 columns")
    parser.add_argument("--tasks", nargs="+", default=["log_prob", "sample"], choices=["log_prob", "sample"])
    parser.add_argument("--batches", nargs="+", default=["batch", "single"], choices=["batch", "single"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    use_threads(args.threads, args.device)
    keep_freed_memory()
    import torch

    print(f"{machine(args.device)}\n", flush=True)
    rows = []
    for model in args.models:
        for d in args.d:
            torch.manual_seed(0)
            contestants = {name: prepared(one, args.device) for name, one in MODELS[model](d).items()}
            n = args.rows or (FEWER.get(model, ROWS) if d >= 784 or (d >= 64 and model == "ffjord") else ROWS)
            for batch in args.batches:
                size = n if batch == "batch" else 1
                x = torch.randn(size, d, device=args.device)
                for task in args.tasks:
                    cases = {name: partial(getattr(c, task), x if task == "log_prob" else size)
                             for name, c in contestants.items()}  # fmt: skip
                    with torch.no_grad():
                        times = in_turns(cases, args.turns, args.device, args.threads)
                    rows.append(row_of([model, str(d), task, str(size)], times))
                    progress(" | ".join(rows[-1]))
    print(table(["model", "d", "task", "rows", "ms", "rows/s", *PEERS], rows))


PEERS = ("zuko", "nflows", "normflows")


def row_of(head: list[str], times: dict[str, list[float]]) -> list[str]:
    """Returns a row of the table: medians of flowtrain, and for each peer the median ratio and 10% to 90%."""
    ours = times["flowtrain"]
    median, cells = statistics.median(ours), []
    for peer in PEERS:
        if peer not in times:
            cells.append("-")
            continue
        ratios = sorted(b / a for a, b in zip(ours, times[peer], strict=True))
        cut = len(ratios) // 10
        cells.append(f"{statistics.median(ratios):.2f} ({ratios[cut]:.2f} to {ratios[-1 - cut]:.2f})")
    return [*head, f"{1e3 * median:.3g}", f"{int(head[-1]) / median:,.0f}", *cells]


def in_turns(cases: dict[str, Callable[[], Any]], turns: int, device: str, threads: int) -> dict[str, list[float]]:
    """Returns the seconds of a call of each case, by turn. A turn repeats a call for at least LEAST seconds."""
    import torch

    clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter

    def seconds(case: Callable[[], Any], repeats: int) -> float:
        begun = clock()
        for _ in range(repeats):
            case()
        if device == "cuda":
            torch.cuda.synchronize()
        return (clock() - begun) / repeats

    for case in cases.values():
        case()
    repeats = {name: max(1, round(LEAST / seconds(case, 1))) for name, case in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    for turn in range(turns):
        # the first contestant changes from turn to turn
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            times[name].append(seconds(cases[name], repeats[name]))
    return times


def prepared(model: "nn.Module", device: str) -> Contestant:
    """Randomizes the networks of a model, because new flows are the identity, and returns its tasks."""
    import torch
    from torch import nn
    from zuko.lazy import LazyDistribution
    from zuko.nn import Linear

    from flowtrain.nn.mlp_field import ConcatSquash

    continuous = any(isinstance(module, ConcatSquash) for module in model.modules())
    for module in model.modules():
        # the fields of continuous flows keep their initial weights
        if isinstance(module, nn.Linear | Linear) and not continuous:
            nn.init.normal_(module.weight, std=0.5 / module.weight.shape[-1] ** 0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    model = model.to(device).eval()
    if isinstance(model, LazyDistribution):
        return Contestant(lambda x: model().log_prob(x), lambda n: model().sample((n,)))
    if isinstance(model, torch.distributions.Distribution):
        return Contestant(model.log_prob, lambda n: model.sample((n,)))
    return Contestant(model.log_prob, model.sample)


def affine(d: int) -> dict[str, Any]:
    import flowtrain

    return {
        "flowtrain": flowtrain.models.affine(d),
        "zuko": _zuko().flows.GMM(d, components=1),
        "nflows": _nflows(d, [_nflows_transforms().LULinear(d, identity_init=False)]),
        "normflows": _normflows(d, [_normflows_flows().mixing._LULinear(d, identity_init=False)]),
    }


def realnvp(d: int) -> dict[str, Any]:
    import flowtrain

    swapped = [i % 2 == 1 for i in range(8)]
    flows = _normflows_flows()
    return {
        "flowtrain": flowtrain.models.realnvp(d, layers=8, hidden=[WIDTH] * 2, actnorm=False),
        "zuko": _zuko().flows.RealNVP(d, transforms=8, hidden_features=[WIDTH] * 2),
        "nflows": _nflows(d, [_nflows_coupling(d, swap) for swap in swapped]),
        "normflows": _normflows(d, [f for _ in swapped for f in (_normflows_coupling(d), flows.Permute(d, "swap"))]),
    }


def glow(d: int) -> dict[str, Any]:
    import torch

    import flowtrain

    zuko, transforms, flows = _zuko(), _nflows_transforms(), _normflows_flows()
    first = torch.arange(d) < (d + 1) // 2
    lu, coupling = zuko.transforms.LULinearTransform, zuko.flows.GeneralCouplingTransform
    of_zuko, of_nflows, of_normflows = [], [], []
    for _ in range(8):
        of_zuko += [
            zuko.lazy.UnconditionalTransform(lu, torch.linalg.lu_factor(torch.linalg.qr(torch.randn(d, d))[0])[0].T),
            coupling(d, mask=first, hidden_features=[WIDTH] * 2),
        ]
        of_nflows += [transforms.ActNorm(d), transforms.LULinear(d), _nflows_coupling(d, False)]
        of_normflows += [_normflows_coupling(d), flows.LULinearPermute(d), flows.ActNorm(d)]
    return {
        "flowtrain": flowtrain.models.glow(d, steps=8, hidden=[WIDTH] * 2),
        "zuko": zuko.flows.Flow(of_zuko, _zuko_base(d)),
        "nflows": _nflows(d, of_nflows),
        "normflows": _normflows(d, of_normflows),
    }


def nsf(d: int) -> dict[str, Any]:
    import torch
    from nflows.nn.nets import ResidualNet
    from nflows.utils import create_alternating_binary_mask

    import flowtrain

    bins, zuko, transforms, flows = 16, _zuko(), _nflows_transforms(), _normflows_flows()
    spline = partial(zuko.transforms.MonotonicRQSTransform, slope=1e-3)
    shapes = [(bins,), (bins,), (bins - 1,)]
    of_zuko, of_nflows, of_normflows = [], [], []
    for i in range(10):
        of_zuko += [
            zuko.lazy.UnconditionalTransform(zuko.transforms.LULinearTransform, torch.eye(d)),
            zuko.flows.GeneralCouplingTransform(
                d, univariate=spline, shapes=shapes, hidden_features=[WIDTH] * 3, mask=torch.arange(d) % 2 == i % 2
            ),
        ]
        coupling = transforms.PiecewiseRationalQuadraticCouplingTransform(
            create_alternating_binary_mask(d, i % 2 == 0),
            lambda n_in, n_out: ResidualNet(n_in, n_out, WIDTH, num_blocks=1),
            num_bins=bins,
            tails="linear",
            tail_bound=BOUND,
        )
        of_nflows += [transforms.LULinear(d), coupling]
        spline_coupling = flows.CoupledRationalQuadraticSpline(
            d, 1, WIDTH, num_bins=bins, tail_bound=BOUND, reverse_mask=i % 2 == 1
        )
        # by default, normflows maps the other half of the columns too
        spline_coupling.prqct.unconditional_transform = None
        of_normflows += [spline_coupling, flows.LULinearPermute(d)]
    return {
        "flowtrain": flowtrain.models.nsf(d, layers=10, hidden=[WIDTH], bins=bins, bound=BOUND),
        "zuko": zuko.flows.Flow(of_zuko, _zuko_base(d)),
        "nflows": _nflows(d, of_nflows),
        "normflows": _normflows(d, of_normflows),
    }


def maf(d: int) -> dict[str, Any]:
    import flowtrain

    transforms, flows = _nflows_transforms(), _normflows_flows()
    of_nflows, of_normflows = [], []
    for _ in range(5):
        of_nflows += [
            transforms.MaskedAffineAutoregressiveTransform(d, WIDTH, num_blocks=1),
            transforms.ReversePermutation(d),
        ]
        # without Reverse, normflows computes log p column by column, and samples in one pass
        reversed_map = flows.Reverse(flows.MaskedAffineAutoregressive(d, WIDTH, num_blocks=1))
        of_normflows += [reversed_map, flows.Permute(d, "swap")]
    return {
        "flowtrain": flowtrain.models.maf(d, layers=5, hidden=[WIDTH]),
        "zuko": _zuko().flows.MAF(d, transforms=5, hidden_features=[WIDTH] * 3),
        "nflows": _nflows(d, of_nflows),
        "normflows": _normflows(d, of_normflows),
    }


def mixture(d: int) -> dict[str, Any]:
    import flowtrain

    return {"flowtrain": flowtrain.models.mixture(d, components=16), "zuko": _zuko().flows.GMM(d, components=16)}


def diagonal_mixture(d: int) -> dict[str, Any]:
    import normflows

    import flowtrain

    base = normflows.distributions.GaussianMixture(16, d).float()
    return {
        "flowtrain": flowtrain.models.mixture(d, components=16, covariance="diagonal"),
        "zuko": _zuko().flows.GMM(d, components=16, covariance_type="diagonal"),
        "normflows": normflows.NormalizingFlow(base, []),
    }


def ffjord(d: int) -> dict[str, Any]:
    import torch

    import flowtrain
    from flowtrain.ode import ode_solver

    zuko = _zuko()
    flow = flowtrain.models.ffjord(d, hidden=[WIDTH] * 3, solver=ode_solver("dopri5", rtol=RTOL))
    (block,) = flow.ode_blocks
    # the last layer of a new field is zero
    block.field.head.linear.reset_parameters()
    with torch.no_grad():
        block.field.head.linear.weight.mul_(STEEP)
    make = zuko.transforms.FreeFormJacobianTransform
    transform = zuko.lazy.UnconditionalTransform(make, _plain_field(block.field), 1.0, 0.0, (), RTOL, RTOL, d <= 128)
    return {"flowtrain": flow, "zuko": zuko.flows.Flow(transform, _zuko_base(d))}


def _plain_field(field: Any) -> Any:
    """Returns the field in plain operations of torch, with the same parameters."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(field.layers)

        def forward(self, t: Any, x: Any) -> Any:
            t = t.reshape(1, 1)
            for i, layer in enumerate(self.layers):
                x = torch.tanh(x) if i else x
                x = layer.linear(x) * torch.sigmoid(layer.gate(t)) + layer.shift(t)
            return x

    return Plain()


MODELS: dict[str, Callable[[int], dict[str, Any]]] = {
    "affine": affine,
    "realnvp": realnvp,
    "nsf": nsf,
    "maf": maf,
    "glow": glow,
    "mixture": mixture,
    "mixture, diagonal": diagonal_mixture,
    "ffjord": ffjord,
}


def _zuko() -> Any:
    import zuko

    return zuko


def _zuko_base(d: int) -> Any:
    import torch
    from zuko.distributions import DiagNormal
    from zuko.lazy import UnconditionalDistribution

    return UnconditionalDistribution(DiagNormal, loc=torch.zeros(d), scale=torch.ones(d), buffer=True)


def _nflows_transforms() -> Any:
    from nflows import transforms

    return transforms


def _nflows(d: int, transforms: list[Any]) -> Any:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow

    return Flow(_nflows_transforms().CompositeTransform(transforms), StandardNormal([d]))


def _nflows_coupling(d: int, swap: bool) -> Any:
    from nflows.utils import create_alternating_binary_mask
    from torch import nn

    class Net(nn.Sequential):
        def forward(self, x: Any, context: Any = None) -> Any:
            return super().forward(x)

    return _nflows_transforms().AffineCouplingTransform(
        create_alternating_binary_mask(d, swap), lambda n_in, n_out: Net(*_layers(n_in, n_out))
    )


def _layers(n_in: int, n_out: int) -> list[Any]:
    """Returns the layers of an MLP with two hidden layers."""
    from torch import nn

    return [nn.Linear(n_in, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, n_out)]


def _normflows_flows() -> Any:
    from normflows import flows

    return flows


def _normflows(d: int, flows: list[Any]) -> Any:
    import normflows

    return normflows.NormalizingFlow(normflows.distributions.DiagGaussian(d, trainable=False), flows)


def _normflows_coupling(d: int) -> Any:
    from torch import nn

    return _normflows_flows().AffineCouplingBlock(nn.Sequential(*_layers((d + 1) // 2, d // 2 * 2)))


if __name__ == "__main__":
    main()
