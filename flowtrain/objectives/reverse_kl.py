"""Variational inference: the reverse KL divergence of a flow to a target."""

import math

import torch
from torch import Tensor

from flowtrain.bijections.regularizers import Regularizer
from flowtrain.data.targets.base import Target
from flowtrain.flow import Flow
from flowtrain.objectives.base import Objective
from flowtrain.ode import AS_CONFIGURED, SolveOptions
from flowtrain.utils.arguments import number, one_of, share
from flowtrain.utils.errors import ConfigError, FlowtrainError, NonFiniteError

GRADIENTS = ("path", "total")


class ReverseKL(Objective):
    """The reverse KL divergence KL(q || p) = E_q[log q(x) - log p~(x)] + log Z of a flow q to a target p = p~ / Z.

    The loss is E_z[log q(x) - beta log p~(x)] in nats, with base points z and samples x = f(z) of the flow f. beta is 1
    after annealing. The loss then is the negative evidence lower bound (ELBO). There are two estimates of the gradient:

    - total: d/dtheta of the loss, through x and through the parameters of log q
    - path (sticking the landing, Roeder et al. 2017, section 3): E_z[(d/dx log q(x) - beta d/dx log p~(x)) dx/dtheta],
      through x only. It leaves out the score term E_q[d/dtheta log q(x)], which is zero. If q = p, the path gradient of
      every sample is zero.

    The path gradient needs log q as a function of x, and so an inverse pass in each step.

    Args:
        flow: a flow without context.
        regularizer: path regularizers of a continuous flow.
        target: the target.
        steps: the number of steps of the run.
        gradient: path | total, the estimate of the gradient.
        anneal: the length of the annealing, in which beta grows linearly from `anneal_from` to 1: below 1, a share of
            `steps`; otherwise, a number of steps.
        anneal_from: the initial beta, between 0 and 1.

    Raises:
        ConfigError: a setting is out of range, or see `check_target`.
    """

    uses_target = True
    raises_log_prob = False

    def __init__(
        self,
        flow: Flow,
        regularizer: Regularizer,
        target: Target,
        steps: int,
        gradient: str = "path",
        anneal: float = 0.5,
        anneal_from: float = 0.1,
    ) -> None:
        super().__init__(flow, regularizer)
        check_target(flow, target, regularizer)
        self.target, self.gradient = target, one_of("objective.gradient", gradient, GRADIENTS)
        anneal = number("objective.anneal", anneal, inclusive=True)
        self.anneal_steps = round(anneal * steps if anneal < 1 else anneal)
        self.anneal_from = share("objective.anneal_from", anneal_from)
        self.beta = 1.0

    def follow_schedule(self, position: float) -> None:
        """Sets beta at a position of the schedule."""
        done = min(1.0, position / self.anneal_steps) if self.anneal_steps else 1.0
        self.beta = self.anneal_from + done * (1 - self.anneal_from)

    def rows_to_check(self, x: Tensor) -> Tensor:
        """Returns as many samples of the flow as the batch x has rows."""
        with torch.no_grad():
            return self.flow.sample_pass(self._base_points(len(x))).x

    def diagnose_failure(self, x: Tensor) -> FlowtrainError | None:
        """Returns an error that names a sample of the flow at which log p~ is not finite. None if log p~ is finite."""
        return failure_of_target(self.target, self.rows_to_check(x))

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        options: SolveOptions = AS_CONFIGURED,
        weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and its terms: nll, the negative ELBO without annealing, and penalties.

        The loss is computed from B new samples of the flow, with B the number of rows of x.
        """
        drawn = self.flow.sample_pass(self._base_points(len(x)), options=self.regularizer.options(options))
        if self.gradient == "total":
            log_target = self.target(drawn.x)
            loss = (drawn.log_p - self.beta * log_target).mean()
        else:
            loss, log_target = self._with_path_gradient(drawn.x, options)
        nll = (drawn.log_p - log_target).mean()
        penalties = {
            name: torch.stack([q[:, i].mean() for q in drawn.integrals]).sum()
            for i, name in enumerate(self.regularizer.paths)
        }
        loss, penalties = self.regularized(loss, penalties)
        return loss, {"nll": nll.detach(), **penalties}

    def _base_points(self, n: int) -> Tensor:
        return self.flow.base.rsample(n, like=self.flow.like)

    def _with_path_gradient(self, x: Tensor, options: SolveOptions) -> tuple[Tensor, Tensor]:
        """Returns a scalar with the value of the loss and the path gradient, and log p~(x), for samples x (B, d)."""
        at = x.detach().requires_grad_()
        log_target: Tensor = self.target(at)
        loss: Tensor = self.flow.density_pass(at, options=options).log_p - self.beta * log_target
        # only the derivatives with respect to x are computed, so the parameters of log q are constant
        [slope] = torch.autograd.grad(loss.sum(), at)
        surrogate: Tensor = (slope * x).sum() / len(x)
        return loss.mean().detach() + surrogate - surrogate.detach(), log_target.detach()


def failure_of_target(target: Target, x: Tensor) -> NonFiniteError | None:
    """Returns an error that names a point of x (B, d) at which log p~ is not finite. None if log p~ is finite."""
    with torch.no_grad():
        log_p = target(x)
    bad = (~log_p.isfinite() & x.isfinite().all(1)).nonzero().flatten()
    if not len(bad):
        return None
    at = ", ".join(f"{v:.4g}" for v in x[bad[0]].tolist()[:5]) + (", ..." if x.shape[1] > 5 else "")
    return NonFiniteError(
        f"the log density of the target is not finite at {len(bad)} of {len(x)} samples of the flow: it is "
        f"{log_p[bad[0]].item()} at x = ({at}). Give the range in which the density is positive with target.types, or "
        "move the initial distribution closer to it with target.loc and target.scale."
    )


def check_target(flow: Flow, target: Target, regularizer: Regularizer) -> None:
    """Checks that a flow can be trained on a target with a regularizer.

    Raises:
        ConfigError: the flow is conditional, the numbers of columns differ, the modes of the target have another shape,
            the trace is estimated in training, the flow has no ODE to regularize, or the regularizer is steer.
    """
    if flow.conditional:
        raise ConfigError("a target has no context, but the flow is conditional: set model.conditional=false")
    if flow.event_shape != (target.dim,):
        raise ConfigError(f"the flow has samples of shape {flow.event_shape}, but the target has {target.dim} columns")
    target.check()
    d = math.prod(flow.event_shape)
    if not all(block.trace.is_exact(d, training=True) for block in flow.ode_blocks):
        raise ConfigError(
            "model.trace: the trace is estimated in training, and the exponential of an estimate of log q is biased; "
            "use model.trace=exact"
        )
    if regularizer.active and not flow.ode_blocks:
        raise ConfigError(
            "regularizer: this flow has no ODE, so it has no paths to regularize; use regularizer=none or model=ffjord"
        )
    if regularizer.end_time:
        raise ConfigError(
            "regularizer=steer is not possible for a target, because samples and log q would have different end "
            "times; use another regularizer"
        )
