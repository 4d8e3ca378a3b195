"""Rectified flow: a trained flow's own pairs of base point and sample, joined by straight lines."""

import logging
import time

import torch
from torch import Tensor

from flowtrain.checks import number, whole
from flowtrain.flow import Flow, rows_at_a_time
from flowtrain.objectives.matching import Ends, Matching
from flowtrain.regularizers import Regularizer
from flowtrain.seeding import seeded

log = logging.getLogger("flowtrain")


class Rectified(Matching):
    """Reflow: lines between the ends of a teacher's paths, x0 and x1 = x0 + int_0^1 v(t, x_t) dt; see `Matching`.

    The paths become straighter with each round, and few steps solve them, while the distribution at t = 1 stays
    (Liu et al. 2023, Flow straight and fast, section 2.2 and theorem 3.5). The data are not looked at again: what the
    teacher has wrong, its student has too.

    Args:
        teacher: the trained flow, with the same bijections around its continuous part as `flow`.
        pairs: how many pairs are drawn from it, once, before training.
        rtol: tolerance of the solves that draw them.
        seed: of the pairs.

    Raises:
        ConfigError: what `Matching` refuses, of either flow, or a setting out of range.
    """

    # it is the teacher, whose likelihood may well be better, but whose paths are not straight
    start_counts = False

    def __init__(
        self, flow: Flow, regularizer: Regularizer, teacher: Flow, seed: int, pairs: int = 100_000, rtol: float = 1e-4
    ) -> None:
        super().__init__(flow, regularizer)
        whole("objective.pairs", pairs)
        begun = time.perf_counter()
        with seeded(seed, teacher.like.device):
            self.pool = drawn(teacher, pairs, number("objective.rtol", rtol))
        log.info("%d pairs drawn from the teacher in %.1f s", pairs, time.perf_counter() - begun)

    def pairs(self, x: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        x0, x1, labels = self.pool
        rows = torch.randint(len(x0), (len(x),), device=x0.device)
        return x0[rows], x1[rows], None if labels is None else labels[rows]


@torch.no_grad()
def drawn(teacher: Flow, n: int, rtol: float) -> tuple[Tensor, Tensor, Tensor | None]:
    """n pairs (x0, x1) of the ends of a flow's continuous part, (n, *event) each, and their labels (n,) or None."""
    ends, like, solver = Ends(teacher), teacher.like, teacher.solver
    assert solver is not None
    z = torch.randn(n, *teacher.event_shape, dtype=like.dtype, device=like.device)
    labels = None if teacher.classes is None else teacher.drawn_labels(n)
    x0 = ends.from_base(z, labels)
    x1 = []
    # a fixed-step method keeps its steps
    with solver.using(**({"rtol": rtol, "atol": rtol} if solver.adaptive else {})):
        for rows in torch.split(torch.arange(n, device=like.device), rows_at_a_time(teacher.event_shape)):
            x1.append(ends.continuous.map_forward(x0[rows], None if labels is None else labels[rows]))
    return x0, torch.cat(x1), labels
