"""Fixed Runge-Kutta steps for `torch.export`. They are one loop, so the size of a program is the same for all n."""

import torch
from torch import Tensor

from flowtrain.ode.solver import Problem, Solution, Statistics
from flowtrain.ode.tableaus import Tableau
from flowtrain.ode.tape import Weights, compute_stages_functional, on_device, weighted_sum


def take_steps(tableau: Tableau, problem: Problem, n: int, statistics: Statistics) -> Solution:
    """Returns the solution after n equal steps. The integrals use `stage_nodes` of quadrature.py.

    Values are not checked: a state that is not finite is returned too.
    """
    # scan is a prototype in torch; the exporters to .pt2 and to ONNX support it
    from torch._higher_order_ops.scan import scan

    # every step returns a contiguous state, and all states of a loop must have the same strides
    x, h = problem.x.contiguous(), (problem.t1 - problem.t0) / n
    velocity, integrand = problem.velocity, problem.integrand
    weights = Weights(tableau, x)
    # the tensors that a loop uses must not share memory
    weights.a, weights.b = weights.a.clone(), weights.b.clone()
    c = on_device(tableau.c, x)
    # the integrals use only stages with a nonzero weight
    used = tableau.used
    c_used, b_used = (on_device([row[i] for i in used], x) for row in (tableau.c, tableau.b))

    def step(state: tuple[Tensor, ...], t: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        x = state[0]
        times = t + h * c
        points, slopes = compute_stages_functional(
            x, h, weights, velocity(times[0], x), lambda i, y: velocity(times[i], y)
        )
        x1 = x + weighted_sum(h * weights.b, slopes)
        if integrand is None:
            return (x1,), ()
        _, q = integrand((t + h * c_used).unsqueeze(1), torch.stack([points[i] for i in used]))
        return (x1, state[1] + weighted_sum(h * b_used, q)), ()

    statistics.nfe_forward += n * len(tableau.b)
    statistics.accepted += n
    starts = on_device([problem.t0 + i * h for i in range(n)], x)
    begin = (x,) if integrand is None else (x, x.new_zeros(x.shape[0], problem.n_integrals))
    end, _ = scan(step, begin, starts)
    return Solution(end[0], None if integrand is None else end[1], statistics=statistics)
