"""Training steps of `nsf` and `maf` compared with zuko and nflows models of the same size, alternating in one process.

    python scripts/bench/splines.py               # on one thread; half a minute
    python scripts/bench/splines.py --repeats 50 --cases "8 columns"
    python scripts/bench/splines.py --scoring     # log p without gradients in place of training steps
    python scripts/bench/splines.py --flows maf --cpu-time

Needs `pip install zuko nflows` (nflows needs UMNN). A step is log p of a batch of 512 rows, its gradient and a fused
Adam update. All networks have matrices of the same shapes: input, two square hidden layers, output. Ratios are medians
over rounds of the other library's time divided by ours. With `--scoring`, log p of 2000 rows is computed in evaluation
mode without gradients.

- nsf has spline couplings with LU layers, like nflows' NSF. zuko's NSF is autoregressive: each layer
  maps all columns, while couplings map half of them.
- maf and zuko's MAF are autoregressive and affine.
- maf with splines maps all columns, like zuko's NSF.
"""

import argparse
import statistics
from collections.abc import Callable

from common import interleave, keep_freed_memory, machine, table, use_threads

LAYERS, BATCH, SCORED = 5, 512, 2000
CASES = {"2 columns": (2, 16), "8 columns": (8, 8), "43 columns": (43, 8)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--scoring", action="store_true", help="measures log p without gradients")
    parser.add_argument("--cpu-time", action="store_true", help="measures CPU time, which other jobs affect less")
    parser.add_argument("--flows", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    args = parser.parse_args()
    use_threads(args.threads)
    keep_freed_memory()
    print(f"{machine()}\n")
    rows = []
    for case in args.cases:
        peers_of = {ours: PEERS[ours] for ours in args.flows}
        every = contestants(*CASES[case], args.width, args.scoring)
        steps = {name: every[name] for ours, peers in peers_of.items() for name in (ours, *peers)}
        for step in steps.values():
            step()
        times = interleave(steps, args.repeats, args.cpu_time)
        for ours, peers in peers_of.items():
            for peer in peers:
                ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
                medians = [statistics.median(times[name]) for name in (ours, peer)]
                rows.append([case, ours, peer, *(f"{m:.2f}" for m in medians), f"{statistics.median(ratios):.2f}"])
    print(table(["case", "ours", "peer", "ours, ms", "peer, ms", "peer / ours"], rows))


PEERS = {
    "nsf": ["zuko NSF", "nflows NSF"],
    "spline maf": ["zuko NSF"],
    "maf": ["zuko MAF"],
}


def contestants(d: int, bins: int, width: int, scoring: bool) -> dict[str, Callable[[], None]]:
    """Returns a training step of each model, or the scoring of a batch."""
    import torch
    import zuko
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet
    from nflows.transforms import CompositeTransform, LULinear, PiecewiseRationalQuadraticCouplingTransform
    from nflows.utils import create_alternating_binary_mask

    import flowtrain

    torch.manual_seed(0)
    x = torch.randn(SCORED if scoring else BATCH, d)
    layers = []
    for i in range(LAYERS):
        coupling = PiecewiseRationalQuadraticCouplingTransform(
            create_alternating_binary_mask(d, i % 2 == 0),
            lambda n_in, n_out: ResidualNet(n_in, n_out, width, num_blocks=1),
            num_bins=bins,
            tails="linear",
            tail_bound=5.0,
        )
        layers += [LULinear(d), coupling]
    ours = {"layers": LAYERS, "hidden": [width], "bins": bins}
    models = {
        "nsf": flowtrain.models.nsf(d, **ours),
        "spline maf": flowtrain.models.maf(d, **ours, transform="spline"),
        "maf": flowtrain.models.maf(d, **ours),
        "nflows NSF": Flow(CompositeTransform(layers), StandardNormal([d])),
        "zuko NSF": zuko.flows.NSF(d, bins=bins, transforms=LAYERS, hidden_features=[width] * 3),
        "zuko MAF": zuko.flows.MAF(d, transforms=LAYERS, hidden_features=[width] * 3),
    }

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
        of_zuko = isinstance(model, zuko.flows.Flow)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            loss = -(model().log_prob(x) if of_zuko else model.log_prob(x)).mean()
            loss.backward()
            optimizer.step()

        for _ in range(3):
            step()
        return step

    def score_of(model: torch.nn.Module) -> Callable[[], None]:
        # a new flow is the identity
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.1)
        model.eval()
        of_zuko = isinstance(model, zuko.flows.Flow)

        def score() -> None:
            with torch.no_grad():
                _ = model().log_prob(x) if of_zuko else model.log_prob(x)

        return score

    return {name: score_of(model) if scoring else step_of(model) for name, model in models.items()}


if __name__ == "__main__":
    main()
