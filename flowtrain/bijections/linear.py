"""Linear maps, permutations, and the Gaussian at which a flow is initialized."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from flowtrain.bijections.base import Bijection, Chain, check_sample, elements_per_channel, initialized, take, varies
from flowtrain.bijections.columns import OnColumns
from flowtrain.nn.conditioners import embedded, with_context
from flowtrain.utils.autograd import needs_autograd
from flowtrain.utils.errors import DataError, FlowtrainError
from flowtrain.utils.linear_algebra import solve_lower
from flowtrain.utils.precision import full_precision
from flowtrain.utils.products import product
from flowtrain.utils.weighting import effective_rows

# number of values converted to float64 at a time: 32 MiB
_COVARIANCE_CHUNK = 2**22
# smallest eigenvalue of a correlation matrix of rows with negative weights
LEAST_CORRELATION = 1e-3


def shrunk_covariance(x: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the mean (d,) and the shrunk covariance (d, d) of rows x (n, d), in float64 on the device of x.

    The correlation matrix R is shrunk towards the identity, Sigma = D ((1 - s) R + s I) D with the standard deviations
    on the diagonal of D. The result therefore does not depend on the units of the columns. The intensity s minimises
    the expected squared Frobenius error (Ledoit and Wolf 2004, A well-conditioned estimator for large-dimensional
    covariance matrices), as in `sklearn.covariance.LedoitWolf` for standardised columns. The intensity is at least 1/n,
    so that Sigma is positive definite for any number of rows. (The estimate of Ledoit and Wolf is zero for two rows.)

    A constant column gets the variance 1 and no correlation with other columns. Moments are divided by n, not n - 1.

    With weights (n,), all moments are weighted means, and the intensity is computed with `effective_rows` in place of
    n. If weights are negative, R may have negative eigenvalues, which are raised, see `definite`.

    Raises:
        DataError: x has no rows with a weight other than 0.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
        >>> mean, covariance = shrunk_covariance(x)
        >>> mean.tolist()
        [1.5, 15.0]
        >>> [round(c, 3) for c in covariance.diagonal().tolist()]  # not shrunk
        [1.25, 125.0]
        >>> 0 < float(covariance[0, 1]) < 12.5  # shrunk
        True
    """
    if weights is not None:
        kept = weights != 0
        x, weights = x[kept], weights[kept].double()
    n, d = x.shape
    if n == 0:
        raise DataError("the data have no rows: a covariance needs at least one row")
    # each column is divided by its largest value, because squares overflow float64 above 1e154
    largest = x.abs().amax(0).double()
    unit = torch.where(largest > 0, largest, 1.0)
    parts = torch.split(x, max(1, _COVARIANCE_CHUNK // max(1, d)))
    shares = [None] * len(parts) if weights is None else torch.split(weights, len(parts[0]))
    pairs = list(zip(parts, shares, strict=True))
    total = float(n if weights is None else weights.sum())
    mean = torch.stack([_sum(part.double() / unit, w) for part, w in pairs]).sum(0) / total
    square = torch.stack([_sum((part.double() / unit - mean).square(), w) for part, w in pairs]).sum(0) / total
    square = square.clamp_min(0)
    # because of rounding, the standard deviation of a constant column is up to float64's epsilon times its mean
    is_constant = square.sqrt() <= 64 * torch.finfo(torch.float64).eps * mean.abs()
    std = torch.where(is_constant, 1.0, square.sqrt())

    correlation = torch.zeros(d, d, dtype=torch.float64, device=x.device)
    fourth = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, w in pairs:
        z = ((part.double() / unit - mean) / std).masked_fill(is_constant, 0.0)
        correlation += z.T @ z if w is None else (w.unsqueeze(1) * z).T @ z
        fourth += _sum(z.square().sum(1).square(), w)
    correlation /= total
    rows = n if weights is None else effective_rows(weights)
    shrunk = (1 - _intensity(correlation, fourth / total, rows)) * correlation
    shrunk.fill_diagonal_(1.0)
    if weights is not None:
        shrunk = definite(shrunk, weights)
    scale = torch.where(is_constant, 1.0, unit * std)
    return unit * mean, scale[:, None] * shrunk * scale


def definite(covariance: Tensor, weights: Tensor | None) -> Tensor:
    """Returns a covariance (d, d) of weighted rows, made positive definite if some weights (n,) are negative.

    Eigenvalues of the correlation matrix below LEAST_CORRELATION are raised to it. The variances do not change.
    """
    if weights is None or not bool((weights < 0).any()):
        return covariance
    scale = covariance.diagonal().clamp_min(torch.finfo(covariance.dtype).tiny).sqrt()
    values, vectors = torch.linalg.eigh(covariance / scale[:, None] / scale)
    raised: Tensor = vectors * values.clamp_min(LEAST_CORRELATION) @ vectors.T
    scale = scale / raised.diagonal().sqrt()
    return scale[:, None] * raised * scale


def _sum(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.sum(0)
    found: Tensor = torch.tensordot(weights, values, dims=1)
    return found


def gaussian_log_prob(x: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Returns the log density of N(mean, covariance) at rows x (n, d), in nats, (n,), float64.

    Example:
        >>> gaussian_log_prob(torch.zeros(1, 2), torch.zeros(2), torch.eye(2)).tolist()
        [-1.8378770664093453]
    """
    # columns are divided by their standard deviations so that the factorisation neither overflows nor underflows
    scale = covariance.double().diagonal().sqrt()
    factor = torch.linalg.cholesky(covariance.double() / scale[:, None] / scale)
    z = torch.linalg.solve_triangular(factor, ((x.double() - mean) / scale).T, upper=False)
    constant = 0.5 * len(scale) * math.log(2 * math.pi) + factor.diagonal().log().sum() + scale.log().sum()
    log_p: Tensor = -0.5 * z.square().sum(0) - constant
    return log_p


def _intensity(correlation: Tensor, fourth: Tensor, n: float) -> Tensor:
    """Returns the shrinkage intensity, in [1/n, 1]. `fourth` is the mean of |z|^4 over the standardised rows z.

    In the notation of Ledoit and Wolf, the intensity is b^2 / d^2. The squared error of R is
    b^2 = (mean |z|^4 - |R|^2) / n, and its squared distance to the target is d^2 = |R - I|^2.
    """
    distance = (correlation - correlation.diag().diag()).square().sum()
    error = (fourth - correlation.square().sum()) / n
    # without any correlation, R is equal to the target
    return (error / distance).clamp(1 / n, 1.0) if distance > 0 else torch.ones_like(error)


class Affine(Bijection):
    """The affine map x = L z + m with a lower triangular L, for samples of d elements. Images are flattened.

    log|det dx/dz| = sum_i log L_ii. With a standard normal base, x has the mean m and the covariance L L^T.
    `initialize` sets the maximum-likelihood Gaussian of the data.

    Example:
        >>> affine = Affine(1)
        >>> z = affine.initialize(torch.tensor([[1.0], [5.0]]))
        >>> round(affine.mean.item(), 3), round(affine.factor().item(), 3)
        (3.0, 2.0)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(d))
        self.log_diagonal = nn.Parameter(torch.zeros(d))
        self.below_diagonal = nn.Parameter(torch.zeros(d, d))

    def factor(self) -> Tensor:
        """Returns L, (d, d)."""
        return torch.diagonal_scatter(self.below_diagonal.tril(-1), self.log_diagonal.exp())

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled() or needs_autograd(z):
            x = z.flatten(1) @ self.factor().T + self.mean
        else:
            x = product(z.flatten(1), self.factor(), self.mean)
        return x.view_as(z), self.log_diagonal.sum().expand(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = solve_lower(self.factor(), (x.flatten(1) - self.mean).T).T
        return z.view_as(x), -self.log_diagonal.sum().expand(x.shape[0])

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        check_sample(x)
        flat = x.flatten(1)
        w = None if weights is None else (weights.double() / weights.double().sum()).unsqueeze(1)
        mean = flat.mean(0) if w is None else (w * flat).sum(0).to(flat.dtype)
        centred = (flat - mean).double()
        covariance = centred.T @ centred / len(x) if w is None else definite((w * centred).T @ centred, weights)
        # constant columns keep a scale of 1
        variance = covariance.diagonal()
        variance.copy_(variance.where(varies(variance.sqrt(), mean), 1))
        # the covariance is singular if there are fewer rows than columns, or linearly dependent columns
        covariance.diagonal().mul_(1 + 1e-6).add_(1e-30)
        factor = torch.linalg.cholesky(covariance)
        self.mean.copy_(mean)
        self.log_diagonal.copy_(factor.diagonal().log())
        self.below_diagonal.copy_(factor.tril(-1))
        return self.map_inverse(x, context)


class ContextShift(Bijection):
    """The translation x = z + A c by a linear function of the context, log|det dx/dz| = 0. Images are flattened.

    c is a one-hot label, or a vector of features. `initialize` sets A by least squares of the data on the context, with
    an intercept that is not part of the map. The latents are then the residuals of the regression plus the intercept.

    Args:
        d: the number of elements of a sample.
        classes: the size of the context: the number of classes, or of features.

    Attributes:
        embedding: the transpose of A, (classes, d), initially zero.

    Example:
        >>> shift, x = ContextShift(1, classes=2), torch.tensor([[1.0], [3.0], [8.0]])
        >>> shift.initialize(x, torch.tensor([0, 0, 1])).round(decimals=4).flatten().tolist()  # class means 2 and 8
        [4.0, 6.0, 5.0]
    """

    def __init__(self, d: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.zeros(classes, d))

    def shift(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Returns A c with the shape of x."""
        assert context is not None
        return embedded(context, self.embedding).view_as(x)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z + self.shift(z, context), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x - self.shift(x, context), x.new_zeros(x.shape[0])

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        check_sample(x)
        flat = x.flatten(1).double()
        w = flat.new_full((len(x), 1), 1 / len(x))
        if weights is not None:
            w = (weights.double() / weights.double().sum()).unsqueeze(1)
        c = with_context(flat[:, :0], context, len(self.embedding))
        c = c - (w * c).sum(0)
        # the pseudo-inverse is needed, because one-hot columns sum to 1 and features may be constant
        inverse = torch.linalg.pinv((w * c).T @ c, hermitian=True)
        self.embedding.copy_(inverse @ ((w * c).T @ (flat - (w * flat).sum(0))))
        return self.map_inverse(x, context)


# the smallest eigenvalue of a covariance, relative to the largest one. float32 cannot resolve smaller eigenvalues
LEAST_EIGENVALUE = 1e-8


class InvertibleLinear(Bijection):
    """The linear map z = W x of the channels, W = P L (U + diag(s)). For images it is a 1x1 convolution.

    P is a fixed permutation, L is unit lower triangular, U is strictly upper triangular, and s = sign exp(log|s|) has
    fixed signs. log|det dz/dx| = H W sum log|s| (Glow, eq. 10 and 11). W maps data to base, the direction of training.
    The other direction computes the inverse of W in float64 at each call.

    Args:
        channels: C.
        start: the initial W. `rotation`: a random rotation. `permutation`: a random permutation, so that the columns of
            a table are not mixed before training. A tensor (C,): this permutation, so that z_i = x_{start[i]}.

    Raises:
        FlowtrainError: an unknown `start`.

    Example:
        >>> linear, x = InvertibleLinear(3), torch.randn(2, 3, 4, 4)
        >>> z, log_det = linear.inverse(x)
        >>> torch.allclose(linear(z)[0], x, atol=1e-4), bool((log_det.abs() < 1e-3).all())  # initially a rotation
        (True, True)
    """

    def __init__(self, channels: int, start: str | Tensor = "rotation") -> None:
        super().__init__()
        if isinstance(start, str) and start not in ("rotation", "permutation"):
            raise FlowtrainError(
                f"InvertibleLinear(start={start!r}): choose 'rotation', 'permutation' or a tensor with a permutation"
            )
        if start == "rotation":
            first = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        else:
            order = torch.randperm(channels) if isinstance(start, str) else start
            first = torch.eye(channels, dtype=torch.float64)[order]
        p, lower, upper = torch.linalg.lu(first)
        s, dtype = upper.diagonal(), torch.get_default_dtype()
        self.register_buffer("permutation", p.to(dtype))
        self.register_buffer("sign", s.sign().to(dtype))
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.log_scale = nn.Parameter(s.abs().log().to(dtype))

    permutation: Tensor
    sign: Tensor

    def weight(self) -> Tensor:
        """Returns W, (C, C)."""
        upper = torch.diagonal_scatter(self.upper.triu(1), self.sign * self.log_scale.exp())
        return torch.addmm(self.permutation, self.permutation, self.lower.tril(-1)) @ upper

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        # `map_forward` of a subclass may call `forward`
        return InvertibleLinear.map_forward(self, z), -self.log_det(z)

    def map_forward(self, z: Tensor, context: Tensor | None = None) -> Tensor:
        with full_precision(z.device):
            if not self._is_by_factors(z):
                return channel_map(torch.linalg.inv(self.weight().double()).to(z.dtype), z)
            if z.dim() == 2 and len(z) < len(self.lower):
                return self._solved(z.T).to(z.dtype).T
            back = self._solved(torch.eye(len(self.lower), dtype=z.dtype, device=z.device)).to(z.dtype)
            return channel_map(back, z)

    def _is_by_factors(self, x: Tensor) -> bool:
        """Whether no gradient is needed, so that the factors of W can be used. A subclass may have another W."""
        return type(self) is InvertibleLinear and not torch.is_grad_enabled() and not needs_autograd(x)

    def _solved(self, z: Tensor) -> Tensor:
        """Returns W^-1 z for z (C, n), float64, without a gradient."""
        ordered = self._permuted(z, 0).double()
        y = torch.linalg.solve_triangular(self.lower.double(), ordered, upper=False, unitriangular=True)
        upper = torch.diagonal_scatter(self.upper, self.sign * self.log_scale.exp())
        found: Tensor = torch.linalg.solve_triangular(upper.double(), y, upper=True)
        return found

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return InvertibleLinear.map_inverse(self, x), self.log_det(x)

    def map_inverse(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        # TF32 would add an error to z that the log-determinant does not contain
        with full_precision(x.device):
            if self._is_by_factors(x) and x.dim() == 2 and len(x) < len(self.lower):
                y = torch.diagonal_scatter(self.upper.triu(1), self.sign * self.log_scale.exp()) @ x.T
                return self._permuted(torch.addmm(y, self.lower.tril(-1), y), 1).T
            return channel_map(self.weight(), x)

    def _permuted(self, y: Tensor, dim: int) -> Tensor:
        """Returns P y if dim is 1, else P^T y, for y (C, n), without a gradient."""
        matrix = self.permutation if dim else self.permutation.T
        if min(len(y) // 4, y.shape[1]) < 16:
            # exact in any precision
            return matrix.to(y.dtype) @ y
        # for many elements, indices are faster. A product with 0, 1, .., C - 1 finds them faster than `argmax`. Half
        # precision does not represent these numbers
        exact = torch.promote_types(matrix.dtype, torch.float32)
        numbers = torch.arange(len(y), dtype=exact, device=matrix.device)
        return y[(matrix.to(exact) @ numbers).long()]

    def log_det(self, x: Tensor) -> Tensor:
        """Returns log|det dz/dx| for each row of x (B, C, ...), (B,)."""
        return (elements_per_channel(x) * self.log_scale.sum()).expand(x.shape[0])


def channel_map(weight: Tensor, x: Tensor) -> Tensor:
    """Multiplies the channels of x (B, C, ...) by W at every pixel. Vectors are returned in column-major order."""
    if x.dim() > 2:
        return torch.matmul(weight, x.flatten(2)).view_as(x)
    if torch.is_grad_enabled() or needs_autograd(x):
        return (weight @ x.T).T
    return product(weight, x).T


class GaussianStart(Bijection):
    """The map x = F z + m with fixed F and m, F F^T = C. It maps a standard normal base to the Gaussian N(m, C).

    If the other bijections of a flow are initially affine, `FromGaussian` can start the flow at the Gaussian of the
    training rows. F is the symmetric square root of C, which keeps z_i close to the standardised x_i.
    log|det dx/dz| = log det C / 2.

    Args:
        d: length of the vectors.

    Example:
        >>> start = GaussianStart(2)
        >>> start.fit(torch.tensor([1.0, 2.0]), torch.tensor([[4.0, 0.0], [0.0, 9.0]]))
        >>> x, log_det = start(torch.ones(1, 2))
        >>> x, round(float(log_det), 4)  # log 6
        (tensor([[3., 5.]]), 1.7918)
    """

    def __init__(self, d: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("factor", torch.eye(d))
        self.register_buffer("inverse_factor", torch.eye(d))
        self.register_buffer("log_volume", torch.zeros(()))

    mean: Tensor
    factor: Tensor
    inverse_factor: Tensor
    log_volume: Tensor

    def fit(self, mean: Tensor, covariance: Tensor) -> None:
        """Sets the mean (d,) and the positive semidefinite covariance (d, d) of the Gaussian."""
        values, vectors = torch.linalg.eigh(covariance.double())
        roots = values.clamp_min(LEAST_EIGENVALUE * values.max()).sqrt()
        self.mean.copy_(mean)
        self.factor.copy_(vectors * roots @ vectors.T)
        self.inverse_factor.copy_(vectors / roots @ vectors.T)
        self.log_volume.copy_(roots.log().sum())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = self.factor.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.factor.dtype == torch.float64 != before and self.factor.device.type != "meta":
            # the stored matrices were rounded to float32 separately, so F F^-1 is not I in float64. log p does not
            # change, because it uses inverse_factor and log_volume
            self.factor.copy_(torch.linalg.inv(self.inverse_factor))
        return self

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(z.device):
            return z @ self.factor.T + self.mean, self.log_volume.expand(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with full_precision(x.device):
            return (x - self.mean) @ self.inverse_factor.T, -self.log_volume.expand(x.shape[0])


def _start(d: int, circular: Sequence[int]) -> Bijection:
    """Returns a `GaussianStart` of the columns that are not circular."""
    if not circular:
        return GaussianStart(d)
    real = [i for i in range(d) if i not in set(circular)]
    return OnColumns(GaussianStart(len(real)), real)


def _real_columns(start: Bijection, x: Tensor) -> Tensor:
    """Returns the columns of x (B, d) to which a bijection from `_start` applies."""
    return x[:, start.columns] if isinstance(start, OnColumns) else x


def _fit(start: Bijection, mean: Tensor, covariance: Tensor) -> None:
    """Sets the Gaussian of a bijection from `_start`."""
    start = start.inner if isinstance(start, OnColumns) else start
    assert isinstance(start, GaussianStart)
    start.fit(mean, covariance)


class Preconditioned(Chain):
    """A model of vectors (B, d) for whitened data. The data are whitened with their shrunk covariance.

    If the model is initially the identity, the flow starts at the Gaussian of the data. All directions of the whitened
    data have the same scale, which makes an ODE easier to learn. Couplings perform better on columns that are not
    whitened, see `FromGaussian`.

    Args:
        model: maps the base to the whitened data.
        d: length of the vectors.
        circular: the indices of circular columns, which are not whitened.
    """

    def __init__(self, model: Bijection, d: int, circular: Sequence[int] = ()) -> None:
        super().__init__([model, _start(d, circular)])

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        model, start = self
        _fit(start, *shrunk_covariance(_real_columns(start, x), weights))
        return initialized(model, start.map_inverse(x), context, weights)


class FromGaussian(Chain):
    """A model of vectors (B, d) with a Gaussian base instead of a standard normal.

    `initialize` sets this Gaussian such that the flow starts at N(m, C), with the mean and the shrunk covariance of the
    data x (see `shrunk_covariance`). The model must initially be affine, as all models of flowtrain are. The inverse
    z = J (x - m) + o of the model then maps N(m, C) to the Gaussian N(o, J C J^T). If the model ends with a
    `ContextShift`, all rows are first shifted to the context of the first row, so that C is the covariance given the
    context.

    Args:
        model: maps this base to the data.
        d: length of the vectors.
        diagonal: sets the correlations in C to zero, so that the columns are not mixed. This is better for a base that
            is fitted to the data. For example, the NLL of a mixture of diagonal Gaussians on pendigits is higher by
            12 nats if the columns are whitened.
        circular: the indices of circular columns, to which the Gaussian does not apply. In these columns,
            the base is unchanged.
    """

    def __init__(self, model: Bijection, d: int, diagonal: bool = False, circular: Sequence[int] = ()) -> None:
        super().__init__([_start(d, circular), model])
        self.diagonal = diagonal

    @torch.no_grad()
    def initialize(self, x: Tensor, context: Tensor | None = None, weights: Tensor | None = None) -> Tensor:
        start, model = self
        initialized(model, x, context, weights)

        def first_context(n: int) -> Tensor | None:
            return None if context is None else context[:1].expand(n, *context.shape[1:])

        parts = list(model) if isinstance(model, Chain) else []
        if parts and isinstance(parts[-1], ContextShift):
            rows = parts[-1].map_forward(parts[-1].map_inverse(x, context), first_context(len(x)))
        else:
            rows = x
        mean, covariance = shrunk_covariance(_real_columns(start, rows), weights)
        if self.diagonal:
            covariance = covariance.diagonal().diag()
        std = covariance.diagonal().sqrt()
        steps = torch.cat([torch.zeros_like(std).unsqueeze(0), std.diag()])
        was_training = model.training
        # evaluation mode: batch norm uses its running statistics, and dropout is off
        model.eval()
        points = (mean + steps).to(x)
        if isinstance(start, OnColumns):
            # the model initially maps real columns independently of the angles
            points = x.new_zeros(len(points), x.shape[1]).index_copy(1, start.columns, points)
        moved = _real_columns(start, model.map_inverse(points, first_context(len(steps)))).double()
        model.train(was_training)
        jacobian = (moved[1:] - moved[0]).T / std
        _fit(start, moved[0], jacobian @ covariance @ jacobian.T)
        return self.map_inverse(x, context)


class Permutation(Bijection):
    """The permutation x_i = z_{p(i)} along dimension 1. Its log-determinant is 0.

    p is a buffer, because checkpoints must contain it.

    Example:
        >>> Permutation(torch.tensor([2, 0, 1]))(torch.tensor([[0.0, 1.0, 2.0]]))[0]
        tensor([[2., 0., 1.]])
    """

    def __init__(self, order: Tensor) -> None:
        super().__init__()
        self.register_buffer("order", order)
        self.register_buffer("back", torch.argsort(order))

    order: Tensor
    back: Tensor

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return take(z, self.order), z.new_zeros(z.shape[0])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return take(x, self.back), x.new_zeros(x.shape[0])
