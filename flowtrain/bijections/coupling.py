"""Couplings: one part of the dimensions determines the map of the other part (Dinh et al. 2017, Real NVP, eq. 7-8)."""

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowtrain.bijections import evaluation
from flowtrain.bijections.base import take
from flowtrain.bijections.conditioned_gradient import Conditioned, bounded
from flowtrain.bijections.elementwise import Elementwise, ScaleShift
from flowtrain.nn.conditioners import zero


class Coupling(Conditioned):
    """A coupling, x_a = z_a and x_b = f(z_b; theta(z_a)) elementwise, with log-determinant sum_b log f'(z_b).

    Part a is unchanged, and it determines the map of part b. Subclasses define the parts. By default f is
    x = z exp(s) + m with |s| < `cap` (Real NVP, see `ScaleShift`). f may also be a `Spline`.

    With an `input_bound` B the conditioner receives c = B tanh(z_a / B), and x_b = f(z_b; theta(c)) + W z_a. Far from
    the data the coupling is then an affine map: theta is constant, f is affine, and W keeps the linear correlations.
    For a stack of such couplings, -log p grows quadratically along rays from the data, as for a Gaussian, with a factor
    bounded by `cap`. Without a bound the conditioner extrapolates, and s reaches its cap in every coupling.

    Args:
        conditioner: (a, context) -> theta of b, see `Elementwise`. For `ScaleShift` theta contains the raw log-scales
            and the shifts, concatenated along dimension 1. A module of torch, such as `nn.Sequential`, is called
            without the context.
        cap: bound on the log-scale of the default f.
        input_bound: B. None: the conditioner receives z_a, and there is no W.
        sizes: the numbers of elements of a and b. They are needed for W.
        transform: f. None: `ScaleShift(cap)`.
        n_circular: for vectors, the numbers of elements at the end of a and of b that are angles in radians. The
            conditioner receives the real elements of a, then the cosines and then the sines of its angles. W maps real
            elements to real elements only. `transform` must map the angles, see `RealThenCircular`.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        sizes: tuple[int, int] | None = None,
        transform: Elementwise | None = None,
        n_circular: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.input_bound, self.n_circular = input_bound, n_circular
        self.transform = ScaleShift(cap) if transform is None else transform
        self.linear = None
        if input_bound is not None:
            assert sizes is not None
            n_in, n_out = sizes[0] - n_circular[0], sizes[1] - n_circular[1]
            # torch warns about layers without inputs or outputs
            self.linear = zero(nn.Linear(n_in, n_out, bias=False)) if n_in and n_out else None

    def has_angles(self) -> bool:
        return any(self.n_circular)

    def theta(self, a: Tensor, context: Tensor | None) -> Tensor:
        """Returns the parameters of f. Under autocast the output of the conditioner is converted to the dtype of a."""
        inputs = conditioner_inputs(a, self.input_bound, self.n_circular[0])
        return conditioned(self.conditioner, inputs, context).to(a.dtype)

    def linear_term(self, a: Tensor) -> Tensor | None:
        """Returns W z_a with zeros for angles, or None if there is no W."""
        if self.linear is None:
            return None
        kept, changed = self.n_circular
        found: Tensor = self.linear(a[:, : a.shape[1] - kept] if kept else a)
        return F.pad(found, (0, changed)) if changed else found

    def of_b(self, log_slope: Tensor) -> Tensor:
        """Returns the log-slopes with zeros for elements that do not belong to b."""
        return log_slope

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is None and (found := evaluation.mapped(self, z, to_base=False)) is not None:
            return found
        a, b = self.split(z)
        b, log_slope = self.transform.to_data(b, self.theta(a, context))
        if (term := self.linear_term(a)) is not None:
            b = b + term.to(b.dtype)
        return self.join(z, a, b), self.of_b(log_slope).flatten(1).sum(1)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if context is None and (found := evaluation.mapped(self, x, to_base=True)) is not None:
            return found
        if (found := self.by_hand(x, context)) is not None:
            return found
        a, b = self.split(x)
        if (term := self.linear_term(a)) is not None:
            b = b - term.to(b.dtype)
        b, log_slope = self.transform.to_base(b, self.theta(a, context))
        return self.join(x, a, b), self.of_b(log_slope).flatten(1).sum(1)


# the old name of `Coupling` is kept, because classes in the code of users may derive from it
AffineCoupling = Coupling


def conditioner_inputs(x: Tensor, bound: float | None, n_circular: int) -> Tensor:
    """Returns the inputs of a conditioner: bounded real elements, and cosine and sine of angles.

    Args:
        x: (B, n, ...). For vectors, the last n_circular elements are angles in radians.
        bound: see `bounded`.
    """
    if not n_circular:
        return bounded(x, bound)
    real, angle = x[:, :-n_circular], x[:, -n_circular:]
    return torch.cat([bounded(real, bound), angle.cos(), angle.sin()], 1)


def conditioned(conditioner: nn.Module, x: Tensor, context: Tensor | None) -> Tensor:
    """Calls a conditioner. Modules of torch are called without the context."""
    of_torch = type(conditioner).__module__.startswith("torch.nn.")
    answer: Tensor = conditioner(x) if of_torch else conditioner(x, context)
    return answer


class IndexCoupling(Coupling):
    """A coupling of vectors. Part a consists of the elements for which a mask is true.

    Args:
        mask: bool (d,). It is stored as two buffers of indices.
        conditioner, cap, input_bound, transform: as in `Coupling`.
        n_circular: the number of elements at the end of the vectors that are angles in radians.
    """

    def __init__(
        self,
        mask: Tensor,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        transform: Elementwise | None = None,
        n_circular: int = 0,
    ) -> None:
        ends = mask[len(mask) - n_circular :]
        sizes, of_angles = [(int(part.sum()), int((~part).sum())) for part in (mask, ends)]
        super().__init__(conditioner, cap, input_bound, sizes, transform, of_angles)
        self.register_buffer("kept", mask.nonzero().squeeze(1))
        self.register_buffer("changed", (~mask).nonzero().squeeze(1))

    kept: Tensor
    changed: Tensor
    # cache of `column_parts`: the buffers with their versions, and the result
    _parts: tuple[tuple[Any, ...], tuple[slice | Tensor, slice | Tensor]] | None = None

    def column_parts(self) -> tuple[slice | Tensor, slice | Tensor]:
        kept, changed = self.kept, self.changed
        if kept.is_inference() or changed.is_inference():
            return kept, changed
        now = kept, changed, kept._version, changed._version
        before = self._parts
        if before is None or before[0][0] is not kept or before[0][1] is not changed or before[0][2:] != now[2:]:
            self._parts = before = now, (as_slice(kept), as_slice(changed))
        return before[1]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return take(x, self.kept), take(x, self.changed)

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return x.T.index_copy(0, self.changed, b.T).T

    def gradient_of_split(self, g: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        return g.T.index_copy(0, self.changed, of_b.T).index_add_(0, self.kept, of_a.T).T

    def gradient_of_join(self, g: Tensor) -> Tensor:
        return take(g, self.changed)


def as_slice(index: Tensor) -> slice | Tensor:
    """Returns indices (n,) as a slice if they are equally spaced, else the indices.

    Example:
        >>> as_slice(torch.tensor([1, 3, 5])), as_slice(torch.tensor([0, 1, 3]))
        (slice(1, 6, 2), tensor([0, 1, 3]))
    """
    numbers = index.tolist()
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if not numbers or step < 1 or numbers != list(range(numbers[0], numbers[-1] + 1, step)):
        return index
    return slice(numbers[0], numbers[-1] + 1, step)


class HalfCoupling(Coupling):
    """A coupling in which part a is the first half of the channels, or the second half with `swap`.

    After a `Squeeze` the two halves of the channels are the two colours of a checkerboard. So this is a coupling with a
    checkerboard mask, and its conditioner only computes with the pixels of part a.

    Args:
        channels: C. If C is odd, the first half is larger.
        swap: whether part a is the second half.
        conditioner, cap, input_bound, transform: as in `Coupling`.

    Example:
        >>> from flowtrain.nn.conditioners import MLP
        >>> coupling = HalfCoupling(3, swap=False, conditioner=MLP(2, [8], 2, "relu"))
        >>> x, log_det = coupling(torch.tensor([[1.0, 2.0, 3.0]]))  # the identity before training
        >>> x.tolist(), log_det.tolist()
        ([[1.0, 2.0, 3.0]], [0.0])
    """

    def __init__(
        self,
        channels: int,
        swap: bool,
        conditioner: nn.Module,
        cap: float = 2.0,
        input_bound: float | None = None,
        transform: Elementwise | None = None,
    ) -> None:
        first = (channels + 1) // 2
        second = channels - first
        super().__init__(conditioner, cap, input_bound, (second, first) if swap else (first, second), transform)
        self.sizes, self.swap = [first, second], swap

    def column_parts(self) -> tuple[slice, slice]:
        first, second = slice(0, self.sizes[0]), slice(self.sizes[0], None)
        return (second, first) if self.swap else (first, second)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = torch.split(x, self.sizes, 1)
        return (second, first) if self.swap else (first, second)

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        parts = [b, a] if self.swap else [a, b]
        # in column-major order, see `take`
        return torch.cat([part.T for part in parts]).T if x.dim() == 2 else torch.cat(parts, 1)

    def gradient_of_split(self, g: Tensor, of_a: Tensor, of_b: Tensor) -> Tensor:
        return self.join(g, self.split(g)[0] + of_a, of_b)


class CheckerboardCoupling(Coupling):
    """A coupling of images. Part a consists of the pixels with row + column even, or odd with `swap`.

    The conditioner receives the whole image with zeros in place of b (Dinh et al. 2017, section 3.4). Images with even
    sides can use `Squeeze` and `HalfCoupling` instead.

    Args:
        size: (H, W).
        swap: whether part a has the odd pixels.
        conditioner, cap, transform: as in `Coupling`.
    """

    def __init__(
        self,
        size: tuple[int, int],
        swap: bool,
        conditioner: nn.Module,
        cap: float = 2.0,
        transform: Elementwise | None = None,
    ) -> None:
        super().__init__(conditioner, cap, transform=transform)
        rows, columns = (torch.arange(n) for n in size)
        even = (rows.unsqueeze(1) + columns) % 2 == 0
        self.register_buffer("mask", even ^ swap)

    mask: Tensor

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * self.mask, x

    def of_b(self, log_slope: Tensor) -> Tensor:
        return log_slope * ~self.mask

    def join(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.where(self.mask, x, b)


def coupling_order(i: int, d: int, changed: int, shift: int) -> Tensor:
    """Returns the permutation (d,) of the columns before coupling i of a stack.

    The permutation is random for i = 0, n, 2n, ... with n = ceil(d / changed), and a shift for every other i. If the
    shift moves the transformed columns to positions that are kept, each group of n couplings transforms all columns.
    With a random permutation before each coupling, a flow of few layers would transform some columns too rarely.

    Args:
        i: the number of the coupling, from 0.
        d: the number of columns.
        changed: the number of columns that each coupling transforms.
        shift: the number of positions of a shift.
    """
    return torch.randperm(d) if i % ceil(d / changed) == 0 else torch.arange(d).roll(shift)
