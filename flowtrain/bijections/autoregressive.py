"""Masked autoregressive maps: the map of each element depends on the elements before it (Papamakarios et al. 2017)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.bijections import evaluation, implicit_gradient, sequential
from flowtrain.bijections.conditioned_gradient import Conditioned
from flowtrain.bijections.coupling import conditioned, conditioner_inputs
from flowtrain.bijections.elementwise import Elementwise, ScaleShift
from flowtrain.nn.conditioners import zero
from flowtrain.nn.residual_mlp import MaskedLinear, MaskedMLP


class Autoregressive(Conditioned):
    """An autoregressive map of vectors, x_i = f(z_i; theta_i(x)), where theta_i depends only on smaller groups.

    The log-determinant is sum_i log f'(z_i). The direction from data to base, which log p(x) uses, needs one evaluation
    of the conditioner. The direction from base to data needs one evaluation for each group: d if each element is a
    group, and 2 for a coupling. For the conditioners of this package, `sequential` computes this direction faster, and
    `implicit_gradient` its gradient.

    f and `input_bound` have the same meaning as in `Coupling`. With a bound B, x_i = f(z_i; theta_i(c)) + (W x)_i with
    c = B tanh(x / B), and W has the mask of the conditioner.

    Args:
        groups: the group of each element, (d,), whole numbers from 0.
        conditioner: (x, context) -> theta (B, size * d), see `Elementwise`. theta of element i may depend only on
            elements of smaller groups. `MaskedMLP(groups, hidden, groups.repeat(size))` has this mask.
        cap: bound on the log-scale of the default f.
        input_bound: B. None: no bound and no W.
        transform: f. None: `ScaleShift(cap)`.
        n_circular: the number of elements at the end of the vectors that are angles in radians. The inputs of the
            conditioner are then the real elements, the cosines and the sines of the angles, as in `Coupling`. The
            cosine and the sine of an angle have the group of the angle.

    Example:
        >>> from flowtrain.nn.residual_mlp import MaskedMLP
        >>> groups = torch.arange(3)
        >>> flow = Autoregressive(groups, MaskedMLP(groups, [8], groups.repeat(2)))
        >>> x, log_det = flow(torch.tensor([[1.0, 2.0, 3.0]]))  # the identity before training
        >>> x.tolist(), log_det.tolist()
        ([[1.0, 2.0, 3.0]], [0.0])
    """

    def __init__(
        self,
        groups: Tensor,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        transform: Elementwise | None = None,
        n_circular: int = 0,
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.input_bound, self.n_circular = input_bound, n_circular
        self.transform = ScaleShift(cap) if transform is None else transform
        self.passes = int(groups.max()) + 1
        self.register_buffer("groups", groups)
        real = groups[: len(groups) - n_circular]
        # torch warns about layers without inputs
        bounded = input_bound is not None and len(real)
        self.linear = zero(MaskedLinear(real, real - 1, bias=False)) if bounded else None

    groups: Tensor
    # cache of `steps`: the groups, their version, the network, and whether there is no W; and the result
    _steps: tuple[tuple[Tensor, int, nn.Module, bool], sequential.Plan | None] | None = None

    def steps(self) -> sequential.Plan | None:
        """Returns the steps of `forward` without gradients, or None if the masks of the conditioner differ."""
        groups, net = self.groups, self.conditioner
        if not isinstance(net, MaskedMLP):
            return None
        version = -1 if groups.is_inference() else groups._version
        merge = self.linear is None
        before = self._steps
        if before is not None and version >= 0:
            of_groups, *others = before[0]
            if of_groups is groups and others == [version, net, merge]:
                return before[1]
        found = sequential.plan(groups, net, merge)
        self._steps = (groups, version, net, merge), found
        return found

    def column_parts(self) -> tuple[None, None]:
        return None, None

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return b

    def gradient_of_split(self, g: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        return of_a + of_b

    def gradient_of_join(self, g: Tensor) -> Tensor:
        return g

    def has_angles(self) -> bool:
        return self.n_circular > 0

    def theta(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns the parameters of f. Under autocast the output of the conditioner is converted to the dtype of x."""
        inputs = conditioner_inputs(x, self.input_bound, self.n_circular)
        return conditioned(self.conditioner, inputs, context).to(x.dtype)

    def linear_term(self, x: Tensor) -> Tensor | None:
        """Returns W x with zeros for angles, or None if there is no W."""
        if self.linear is None:
            return None
        m = self.n_circular
        found: Tensor = self.linear(x[:, : x.shape[1] - m] if m else x)
        return F.pad(found, (0, m)) if m else found

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is None and (found := evaluation.mapped(self, x, to_base=True)) is not None:
            return found
        if (found := self.by_hand(x, context)) is not None:
            return found
        term = self.linear_term(x)
        y = x if term is None else x - term.to(x.dtype)
        z, log_slope = self.transform.to_base(y, self.theta(x, context))
        return z, log_slope.sum(1)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is None:
            for compute in (sequential.to_data, implicit_gradient.to_data):
                if (found := compute(self, z)) is not None:
                    return found
        return self.group_by_group(z, lambda x: self.theta(x, context), self.linear_term)

    def group_by_group(
        self, z: Tensor, theta: Callable[[Tensor], Tensor], linear_term: Callable[[Tensor], Tensor | None]
    ) -> tuple[Tensor, Tensor]:
        """Computes `forward` with one call of `theta` (x -> theta) and of `linear_term` (x -> W x) for each group."""
        x, log_slope = torch.zeros_like(z), torch.zeros_like(z)
        for group in range(self.passes):
            y, log_slopes = self.transform.to_data(z, theta(x))
            if (term := linear_term(x)) is not None:
                y = y + term.to(x.dtype)
            # only the elements of this group are final
            now = self.groups == group
            x, log_slope = torch.where(now, y, x), torch.where(now, log_slopes, log_slope)
        return x, log_slope.sum(1)
