"""One FFJORD training step with a convolutional field on 28x28 images, by flowtrain and by torchdiffeq.

    python scripts/bench/conv.py                                  # batch 64, hidden 64-64-64, softplus, all cores
    python scripts/bench/conv.py --activation tanh --batch 16 --threads 1
    python scripts/bench/conv.py --device cuda

The field is concatsquash. Its last layer is random and scaled (--head) so that a solve has about the NFE of a trained
field; the table shows the NFE. x is a batch of standard normal images. All engines use Hutchinson's trace with the same
Rademacher draw.

All engines take turns in rounds. The script prints a Markdown table of median times and of their ratios to the first
engine in the same round. The gradient on the whole batch is compared with the gradient of the first engine.
On the first --rows rows, errors of the gradient (relative) and of the NLL (nats) are measured against float64 at rtol
1e-8. flowtrain has its default control=state, so it excludes the log-determinant from the step control. The other
engines include it.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from common import cores, keep_freed_memory, machine, progress, use_threads

if TYPE_CHECKING:
    from steps import Contestant, Problem


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--side", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    parser.add_argument("--hidden", default="64,64,64")
    parser.add_argument("--activation", default="softplus", help="softplus | tanh | swish")
    parser.add_argument("--head", type=float, default=4.0, help="scale of the last layer; 10 roughly doubles the NFE")
    parser.add_argument("--rtol", type=float, default=1e-5, help="relative and absolute tolerance")
    parser.add_argument("--method", default="dopri5")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4, help="number of rows of the batch for measuring errors")
    return parser.parse_args()


def conv_problem(
    batch: int, side: int, channels: int, hidden: str, activation: str, head: float, **solver: object
) -> "Problem":
    """Returns a field with a random last layer, images and noise, all from fixed seeds."""
    import torch
    from steps import Problem, fixed_noise, randomize_last_layer

    from flowtrain.nn import conv_field

    torch.manual_seed(0)
    field = conv_field.ConvField(channels, [int(h) for h in hidden.split(",")], "concatsquash", activation)
    randomize_last_layer(field, head)
    x = torch.randn(batch, channels, side, side)
    return Problem(field, x, fixed_noise(x), torch.randn_like(x), dict(solver))


def contestants() -> dict[str, Callable[["Problem"], "Contestant"]]:
    from steps import flowtrain_step, torchdiffeq_step

    return {
        "flowtrain gradient=replay": partial(flowtrain_step, gradient="replay"),
        "flowtrain gradient=direct": partial(flowtrain_step, gradient="direct"),
        "flowtrain gradient=adjoint": partial(flowtrain_step, gradient="adjoint"),
        "torchdiffeq adjoint, autograd trace": partial(torchdiffeq_step, adjoint=True),
        "torchdiffeq direct, autograd trace": partial(torchdiffeq_step, adjoint=False),
    }


def main() -> None:
    args = arguments()
    use_threads(args.threads, args.device)
    keep_freed_memory()
    from steps import Problem, compare, reference

    shape = {k: getattr(args, k) for k in ("batch", "side", "channels", "hidden", "activation", "head")}
    problem = conv_problem(**shape, method=args.method, rtol=args.rtol).to(args.device)
    assert problem.noise is not None
    n = args.rows
    few = Problem(problem.field, problem.x[:n], problem.noise[:n], problem.before[:n], problem.solver)
    progress(f"computing the reference on {args.rows} rows")
    true = reference(few, rows=args.rows, rtol=1e-8)
    print(f"{machine(args.device)}; {args.threads} threads")
    print(
        f"\n{args.channels}x{args.side}x{args.side}, batch {args.batch}, hidden {args.hidden.replace(',', '-')}, "
        f"{args.activation}, {args.method}, rtol = atol = {args.rtol:g}, Hutchinson, 1 Rademacher draw; "
        f"last layer random, scaled by {args.head:g}\n"
    )
    print(compare(contestants(), problem, true, args.repeats, few))


if __name__ == "__main__":
    main()
