"""Base distributions of flows: the density of the latents z before a bijection maps them to data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn

from flowtrain.nn.conditioners import ACTIVATIONS, MLP
from flowtrain.utils.arguments import number, one_of, shape_of, whole, widths
from flowtrain.utils.autograd import needs_autograd
from flowtrain.utils.circle import circular_indices, wrap
from flowtrain.utils.em import fit_mixture
from flowtrain.utils.errors import ConfigError, FlowtrainError
from flowtrain.utils.linear_algebra import solve_lower
from flowtrain.utils.recorded import Recorded

__all__ = ["Base", "ConditionalMixture", "GaussianMixture", "NormalUniform", "StandardNormal", "StudentT", "UniformBox"]

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
COVARIANCES = ("full", "diagonal")
# the number of elements of the Jacobians that `GaussianMixture.rsample` computes at once
PART = 2**22
# EM in `initialize` stops below this gain, in nats per row. Smaller gains did not lower the validation NLL
INITIALIZE_TOLERANCE = 1e-3
# `ConditionalMixture` multiplies its initial scales by at most exp(CAP). Without a bound, the likelihood of repeated
# rows is unbounded
CAP = 6.0
# the largest number of weights in the last layer of a `ConditionalMixture`
MOST_WEIGHTS = 2**26
# the largest number of terms of the continued fraction of the incomplete beta function
MOST_TERMS = 10_000


class Base(Recorded, nn.Module, ABC):
    """A distribution of latents z with a density in closed form.

    A subclass defines `log_prob`, `rsample` and `to_uniform`. d is the number of elements of z. Results of shape (B, d)
    have the elements in the order of `z.flatten(1)`.

    Args:
        event_shape: shape of one z, or a number d for vectors of length d.

    Attributes:
        circular: the indices of the columns of z that are angles in radians. A flow with such a base has the same
            circular columns in x. () for other bases.

    Example:
        >>> class Laplace(Base):
        ...     def log_prob(self, z):
        ...         return -z.abs().flatten(1).sum(1) - z[0].numel() * math.log(2)
        ...
        ...     def rsample(self, n, generator=None, temperature=1.0, like=None):
        ...         u = torch.rand(n, *self.event_shape, generator=generator) - 0.5
        ...         return -temperature * u.sign() * (1 - 2 * u.abs()).log()
        ...
        ...     def to_uniform(self, z):
        ...         z = z.flatten(1)
        ...         return 0.5 - 0.5 * z.sign() * torch.expm1(-z.abs())
        >>> Laplace((2,)).log_prob(torch.zeros(1, 2))  # -2 log 2
        tensor([-1.3863])
    """

    circular: tuple[int, ...] = ()

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__()
        self.event_shape = shape_of(event_shape)

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """Returns log p0(z) in nats, (B,), for z (B, *event_shape)."""

    @abstractmethod
    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        """Draws n samples z (n, *event_shape), with gradients to the parameters of the base.

        Args:
            n: the number of samples.
            generator: the random generator. None: the global generator of the device.
            temperature: multiplies the noise around the mode, or around the mean of a mixture component. 1 draws from
                the distribution.
            like: the samples have the dtype and device of this tensor. None: dtype and device of the parameters, or the
                defaults of torch if there are no parameters.

        Raises:
            FlowtrainError: a temperature other than 1, for a base that has no temperature.
        """

    @abstractmethod
    def to_uniform(self, z: Tensor) -> Tensor:
        """Returns the probability integral transform u (B, d) of z (B, *event_shape).

        u_j = F(z_j | z_1, ..., z_(j-1)) with the conditional distribution function F (Rosenblatt 1952, Remarks on a
        multivariate transformation). If z ~ p0, all u_j are independent and uniform.
        """

    def to_normal(self, z: Tensor) -> Tensor:
        """Returns the normal scores Phi^-1(u) (B, d) of u = `to_uniform(z)`.

        If z ~ p0, the scores are independent and standard normal.
        """
        y: Tensor = torch.special.ndtri(self.to_uniform(z))
        return y

    @torch.no_grad()
    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        """Draws n samples z (n, *event_shape) without gradients, see `rsample`."""
        return self.rsample(n, generator, temperature, like)

    def given(self, context: Tensor | None) -> "Base":
        """Returns the distribution of z for the context of a batch: labels (B,) or features (B, F).

        By default, the density does not depend on a context, and the result is this base. Otherwise, the methods of the
        result need one z for each row of the context: z of shape (B, *event_shape), or n = B.
        """
        return self

    def initialize(self, z: Tensor) -> None:
        """Sets data-dependent parameters from z (n, *event_shape), training rows mapped to the base.

        The default does nothing.
        """

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}"


class StandardNormal(Base):
    """The standard normal distribution N(0, I), without parameters: log p0(z) = -(|z|^2 + d log 2 pi) / 2.

    Example:
        >>> round(StandardNormal((2,)).log_prob(torch.zeros(1, 2)).item(), 4)  # -log(2 pi)
        -1.8379
    """

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.flatten(1)
        # -(|z|^2 + d log 2 pi) / 2 in one operation
        return torch.rsub(z.square().sum(1), -0.5 * z.shape[1] * math.log(2 * math.pi), alpha=0.5)

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        shape = (n, *self.event_shape)
        if like is None:
            z = torch.randn(shape, generator=generator)
        elif generator is None and like.shape == shape:
            # randn_like keeps the memory format of `like`, which need not be contiguous
            z = torch.randn_like(like)
        else:
            z = torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
        return z if temperature == 1 else temperature * z

    def to_uniform(self, z: Tensor) -> Tensor:
        u: Tensor = torch.special.ndtr(z.flatten(1))
        return u

    def to_normal(self, z: Tensor) -> Tensor:
        return z.flatten(1)


class StudentT(Base):
    """Independent Student t distributions. Their tails are heavier than the tails of a normal distribution.

    p0(z) = prod_j c(nu_j) (1 + z_j^2 / nu_j)^(-(nu_j + 1) / 2), with c(nu) = Gamma((nu + 1) / 2) / (sqrt(nu pi)
    Gamma(nu / 2)). A Lipschitz bijection cannot make the tails of its base heavier. So a flow with a standard normal
    base cannot model polynomial tails (Jaini et al. 2020, Tails of Lipschitz triangular flows, theorem 4).

    Args:
        event_shape: shape of one z.
        df: degrees of freedom nu > 0: one number, or a tensor of `event_shape`.
        trainable: whether `log_df` is a parameter; otherwise it is a buffer.

    Raises:
        FlowtrainError: df <= 0, not finite, or of another shape.

    Example:
        >>> round(StudentT((1,), df=1.0).log_prob(torch.zeros(1, 1)).item(), 4)  # Cauchy: -log(pi)
        -1.1447
    """

    log_df: Tensor

    def __init__(self, event_shape: int | Sequence[int], df: float | Tensor = 4.0, trainable: bool = False) -> None:
        super().__init__(event_shape)
        given = torch.as_tensor(df, dtype=torch.get_default_dtype())
        if given.dim() and given.shape != self.event_shape:
            raise FlowtrainError(f"df has shape {tuple(given.shape)}: give one number, or shape {self.event_shape}")
        if not _all_true((given > 0) & given.isfinite()):
            raise FlowtrainError(f"df={df}: give degrees of freedom greater than 0")
        log_df = given.log().expand(self.event_shape).clone()
        if trainable:
            self.log_df = nn.Parameter(log_df)
        else:
            self.register_buffer("log_df", log_df)

    @property
    def df(self) -> Tensor:
        """The degrees of freedom nu, with the shape `event_shape`."""
        return self.log_df.exp()

    def log_prob(self, z: Tensor) -> Tensor:
        df = self.df
        if self.training:
            log_factor = torch.log1p(z.square() / df)
        else:
            # y squared could overflow, although its logarithm is finite. The second term is 0 for y up to the limit
            y = z.abs() / df.sqrt()
            limit = torch.finfo(y.dtype).max ** 0.25
            log_factor = torch.log1p(y.clamp(max=limit).square()) + 2 * (y.clamp(min=limit) / limit).log()
        return (log_peak(df) - (0.5 * df + 0.5) * log_factor).flatten(1).sum(1)

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        """Draws z = e sqrt(nu / chi), with e ~ N(0, 1) and chi = 2 Gamma(nu / 2), which is chi-square distributed."""
        df = (self.df if like is None else self.df.to(like)).expand(n, *self.event_shape)
        normal = torch.randn(df.shape, generator=generator, dtype=df.dtype, device=df.device)
        gamma = torch._standard_gamma(df / 2, generator).clamp_min(torch.finfo(df.dtype).tiny)
        return temperature * normal * (df / (2 * gamma)).sqrt()

    @torch.no_grad()
    def to_uniform(self, z: Tensor) -> Tensor:
        """Returns u = F(z) (B, d). For z_j < 0, F(z_j) = I(nu / (nu + z_j^2); nu / 2, 1 / 2) / 2.

        I is the incomplete beta function. The computation is in float64, without gradients.
        """
        df, z64 = self.df.double().flatten(), z.flatten(1).double()
        tail = 0.5 * incomplete_beta(df / 2, torch.full_like(df, 0.5), df / (df + z64.square()))
        return torch.where(z64 < 0, tail, 1 - tail).to(z.dtype)


def log_peak(df: Tensor) -> Tensor:
    """Computes log c(nu) = log Gamma((nu + 1) / 2) - log Gamma(nu / 2) - log(nu pi) / 2, without cancellation.

    Let a = nu / 2 and r(a) = log Gamma(a + 1 / 2) - log Gamma(a). The recurrence r(a) = r(a + 1) - log(1 + 1 / (2 a))
    gives r(a) from r(a + n). The asymptotic series of r(a) - log(a) / 2 in 1 / a gives r(a + n). Two values of
    torch.lgamma would have a difference with an error of 0.003 at nu = 10,000 in float32, and ONNX has no lgamma.

    Example:
        >>> log_peak(torch.tensor([1.0, 1e9]))  # -log(pi), and the normal distribution: -log(2 pi) / 2
        tensor([-1.1447, -0.9189])
    """
    # r(a) from r(a + n), whose series has an error of 5e-11 after two terms
    a, n = 0.5 * df, 32
    shifts = torch.arange(n, dtype=df.dtype, device=df.device).view(n, *(1,) * df.dim())
    inverse = (a + n).reciprocal()
    series = inverse * (1 / 8 - inverse * inverse / 192)
    ratio = 0.5 * torch.log1p(n / a) - torch.log1p(0.5 / (a + shifts)).sum(0)
    return ratio - series - 0.5 * math.log(2 * math.pi)


def incomplete_beta(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Computes the regularized incomplete beta function I(x; a, b) for a, b > 0 and x in [0, 1], in float64.

    This evaluates the continued fraction 8.17.22 of the NIST Digital Library of Mathematical Functions with the
    modified Lentz algorithm. The fraction converges fast for x < (a + 1) / (a + b + 2). For larger x,
    I(x; a, b) = 1 - I(1 - x; b, a) is used. The shapes of a, b and x broadcast.

    Example:
        >>> half = torch.tensor(0.5, dtype=torch.float64)
        >>> round(incomplete_beta(half, half, half).item(), 12)  # 2 / pi asin(sqrt(x))
        0.5
    """
    a, b, x = torch.broadcast_tensors(a, b, x)  # type: ignore[no-untyped-call]
    swapped = x > (a + 1) / (a + b + 2)
    a, b, x = torch.where(swapped, b, a), torch.where(swapped, a, b), torch.where(swapped, 1 - x, x)
    log_front = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b) + torch.xlogy(a, x) + torch.xlogy(b, 1 - x)
    tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
    d = 1 / (1 - (a + b) * x / (a + 1))
    c, fraction = torch.ones_like(x), d
    for m in range(1, MOST_TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / _avoid_zero(1 + term * d, tiny)
            c = _avoid_zero(1 + term / c, tiny)
            fraction = fraction * c * d
        # the loop also ends if elements are NaN
        if not bool(((c * d - 1).abs() > 4 * eps).any()):
            break
    found = (log_front.exp() * fraction / a).clamp(0, 1)
    return torch.where(swapped, 1 - found, found)


def _avoid_zero(x: Tensor, tiny: float) -> Tensor:
    return torch.where(x.abs() < tiny, tiny, x)


def _all_true(condition: Tensor) -> bool:
    """Whether all elements are true. Tensors on the meta device have no values and are not checked."""
    return condition.is_meta or bool(condition.all())


class UniformBox(Base):
    """The uniform distribution on a box: p0(z) = prod_j 1 / (high_j - low_j) for low <= z <= high, and 0 outside.

    log_prob is -inf outside of the box. So the inverse of the bijection must map every data point into the box. Because
    of rounding, a sample near the edge of the box may be outside of the box after a round trip.

    Args:
        low, high: the lower and upper corners. Both have the event shape.

    Raises:
        FlowtrainError: corners of different shapes or without dimensions, not finite, or low >= high.

    Example:
        >>> UniformBox([0.0, 0.0], [2.0, 1.0]).log_prob(torch.tensor([[1.0, 0.5], [3.0, 0.5]]))  # -log 2
        tensor([-0.6931,    -inf])
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Tensor | Sequence[float], high: Tensor | Sequence[float]) -> None:
        dtype = torch.get_default_dtype()
        given = [torch.as_tensor(corner, dtype=dtype).clone() for corner in (low, high)]
        if given[0].shape != given[1].shape or not given[0].dim():
            shapes = " and ".join(str(tuple(corner.shape)) for corner in given)
            raise FlowtrainError(f"low and high have the shapes {shapes}: give both the shape of one sample")
        if not _all_true((given[0] < given[1]) & torch.stack(given).isfinite().all(0)):
            raise FlowtrainError("low must be less than high in every element, and both must be finite")
        super().__init__(given[0].shape)
        self.register_buffer("low", given[0])
        self.register_buffer("high", given[1])

    def log_prob(self, z: Tensor) -> Tensor:
        volume = (self.high - self.low).log().sum().to(z.dtype)
        inside = ((z >= self.low) & (z <= self.high)).flatten(1).all(1)
        found = torch.where(inside, -volume, -torch.inf)
        return torch.where(z.isnan().flatten(1).any(1), torch.nan, found)

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        if temperature != 1:
            raise FlowtrainError(
                f"temperature={temperature}: a uniform base has no mode, so only temperature=1 is possible"
            )
        low, high = (self.low, self.high) if like is None else (self.low.to(like), self.high.to(like))
        u = torch.rand(n, *self.event_shape, generator=generator, dtype=low.dtype, device=low.device)
        # rounding can give a value above `high`
        return torch.minimum(low + (high - low) * u, high)

    def to_uniform(self, z: Tensor) -> Tensor:
        return ((z - self.low) / (self.high - self.low)).clamp(0, 1).flatten(1)


class NormalUniform(Base):
    """Vectors with standard normal real columns and uniform circular columns, all independent.

    log p0(z) = -(|z_real|^2 + (d - m) log 2 pi) / 2 - m log 2 pi for m circular columns. These are angles in radians.
    Angles that differ by 2 pi are the same point, so log p0 is periodic in them. Samples lie in [-pi, pi).

    A uniform distribution has no mode, so the base has no temperature.

    Args:
        event_shape: d or (d,).
        circular: the indices of the circular columns.

    Raises:
        FlowtrainError: samples that are not vectors.
        ConfigError: an invalid index.

    Example:
        >>> NormalUniform(2, circular=[1]).log_prob(torch.zeros(1, 2))  # -1.5 log(2 pi)
        tensor([-2.7568])
    """

    is_circular: Tensor

    def __init__(self, event_shape: int | Sequence[int], circular: Sequence[int]) -> None:
        super().__init__(event_shape)
        if len(self.event_shape) != 1:
            raise FlowtrainError(f"event_shape={self.event_shape}: only vectors have circular columns, so give (d,)")
        self.circular = circular_indices(circular, *self.event_shape)
        is_circular = torch.tensor([i in self.circular for i in range(self.event_shape[0])], device="cpu")
        # checkpoints do not contain this buffer, because `circular` determines it
        self.register_buffer("is_circular", is_circular, persistent=False)

    def log_prob(self, z: Tensor) -> Tensor:
        m = len(self.circular)
        # z - z is 0, but NaN if z is NaN or infinite
        real = torch.where(self.is_circular, z - z, z)
        return -0.5 * (real.square().sum(1) + (z.shape[1] + m) * math.log(2 * math.pi))

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        if temperature != 1:
            raise FlowtrainError(
                f"temperature={temperature}: the base is uniform in circular columns and has no mode there, so only "
                "temperature=1 is possible"
            )
        like = torch.zeros((), device=self.is_circular.device) if like is None else like
        z = torch.randn(n, *self.event_shape, generator=generator, dtype=like.dtype, device=like.device)
        u = torch.rand(z.shape, generator=generator, dtype=z.dtype, device=z.device)
        return torch.where(self.is_circular, wrap(2 * math.pi * u), z)

    def to_uniform(self, z: Tensor) -> Tensor:
        turned = (wrap(z) / (2 * math.pi) + 0.5).clamp(0, 1)
        return torch.where(self.is_circular, turned, torch.special.ndtr(z))

    def to_normal(self, z: Tensor) -> Tensor:
        return torch.where(self.is_circular, super().to_normal(z), z)

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, circular={self.circular}"


class _Mixture(Base):
    """A Gaussian mixture sum_k w_k N(z; m_k, L_k L_k^T), whose parameters may differ from row to row.

    Attributes:
        logits: log w_k up to a constant, (K,) or (B, K).
        means: m_k, (K, d) or (B, K, d).
        log_scale: log L_k,jj, with the shape of `means`.
        lower: the elements below the diagonal that determine the correlations, or None for a diagonal mixture.
    """

    logits: Tensor
    means: Tensor
    log_scale: Tensor
    lower: Tensor | None

    @abstractmethod
    def _noise(self, z: Tensor) -> Tensor:
        """Returns e_k = L_k^-1 (z - m_k), (B, K, d), for z (B, d)."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None, temperature: float, like: Tensor) -> Tensor:
        """Draws z = m_k + T L_k e with k ~ w and e ~ N(0, I), (n, d), without gradients. T is the temperature."""

    @abstractmethod
    def _jacobian(self, z: Tensor) -> Tensor:
        """Returns du/dz of u = `_conditional_cdf(z)`, (B, d, d), without gradients."""

    def _log_terms(self, e: Tensor) -> Tensor:
        """Returns the log density of z_j in component k given z_1 .. z_(j-1), (B, K, d).

        This is log N(e_kj; 0, 1) - log L_k,jj, for e (B, K, d) from `_noise`.
        """
        return -0.5 * e.square() - HALF_LOG_2PI - self.log_scale

    def log_prob(self, z: Tensor) -> Tensor:
        return self._log_joint(z.flatten(1)).logsumexp(1)

    def _log_joint(self, z: Tensor) -> Tensor:
        """Returns log w_k N(z; m_k, L_k L_k^T), (B, K), for z (B, d)."""
        constant = self.logits.log_softmax(-1) - self.log_scale.sum(-1) - z.shape[1] * HALF_LOG_2PI
        return constant - 0.5 * self._noise(z).square().sum(-1)

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        """Draws z = m_k + T L_k e with k ~ w and e ~ N(0, I). T is the temperature.

        The draw of k has no derivative, so the gradients are implicit (Figurnov et al. 2018, Implicit
        reparameterization gradients, eq. 7): u = `to_uniform(z)` is held fixed, so that
        dz = -(du/dz)^-1 du/dparameters. The weights get gradients too. The cost is d backward passes, and there are no
        second derivatives.

        Raises:
            FlowtrainError: gradients are required at a temperature other than 1.
        """
        z = self._draw(n, generator, temperature, self.means if like is None else like)
        parameters = (self.logits, self.means, self.log_scale, self.lower)
        if torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in parameters):
            if temperature != 1:
                raise FlowtrainError(
                    f"temperature={temperature}: samples of a mixture only have gradients at temperature 1; use sample"
                )
            z = self._implicit(z)
        return z.view(n, *self.event_shape)

    def _implicit(self, z: Tensor) -> Tensor:
        """Returns z (n, d) with implicit gradients, see `rsample`."""
        jacobian, u = self._jacobian(z), self._conditional_cdf(z)
        change: Tensor = torch.linalg.solve_triangular(jacobian.tril(), (u - u.detach()).unsqueeze(-1), upper=False)
        return z - change.squeeze(-1).to(z.dtype)

    def _conditional_cdf(self, z: Tensor) -> Tensor:
        """Returns F(z_j | z_1 .. z_(j-1)) = sum_k q_jk Phi(e_kj), (B, d).

        q_jk is the probability of component k given z_1 .. z_(j-1), proportional to w_k N(z_1 .. z_(j-1); component k).
        """
        e = self._noise(z)
        terms = self._log_terms(e)
        before = torch.nn.functional.pad(terms.cumsum(-1)[..., :-1], (1, 0))
        q = (self.logits.log_softmax(-1).unsqueeze(-1) + before).softmax(1)
        u: Tensor = (q * torch.special.ndtr(e)).sum(1)
        return u

    def to_uniform(self, z: Tensor) -> Tensor:
        return self._conditional_cdf(z.flatten(1)).clamp(0, 1)


class GaussianMixture(_Mixture):
    """A Gaussian mixture p0(z) = sum_k w_k N(z; m_k, L_k L_k^T), k = 1 .. K, with trainable w, m and L.

    w = softmax(logits). L_k is lower triangular, with the diagonal exp(log_scale_k). `lower` contains the elements
    below the diagonal, row by row. A diagonal mixture has no such elements. A new mixture has equal weights, L_k = I
    and means drawn from N(0, I). `fit` sets the parameters from data by EM.

    Args:
        event_shape: shape of one z.
        components: the number K of components.
        covariance: full | diagonal.
        prior: the strength of a prior on the covariances in `fit`. The prior has the effect of `prior` additional rows
            in each component, with the pooled within-cluster covariance of k-means.

    Attributes:
        logits: (K,).
        means, log_scale: (K, d).
        lower: (K, d (d - 1) / 2), or None.

    Raises:
        ConfigError: a setting out of range.

    Example:
        >>> mixture = GaussianMixture(1, 2)
        >>> _ = mixture.fit(torch.tensor([[-1.0], [-2.0], [4.0], [6.0]]))
        >>> mixture.means.flatten().sort().values, mixture.weights  # two points each
        (tensor([-1.5000,  5.0000], grad_fn=<SortBackward0>), tensor([0.5000, 0.5000], grad_fn=<SoftmaxBackward0>))
    """

    def __init__(
        self, event_shape: int | Sequence[int], components: int, covariance: str = "full", prior: float = 0.0
    ) -> None:
        super().__init__(event_shape)
        self.prior = number("prior", prior, inclusive=True)
        k, d = whole("components", components), math.prod(self.event_shape)
        full = one_of("covariance", covariance, COVARIANCES) == "full"
        self.logits = nn.Parameter(torch.zeros(k))
        self.means = nn.Parameter(torch.randn(k, d))
        self.log_scale = nn.Parameter(torch.zeros(k, d))
        self.lower = nn.Parameter(torch.zeros(k, d * (d - 1) // 2)) if full else None

    @property
    def weights(self) -> Tensor:
        """The weights w, (K,)."""
        return self.logits.softmax(0)

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factors L, (K, d, d)."""
        found = torch.diag_embed(self.log_scale.exp())
        if self.lower is None:
            return found
        d = found.shape[1]
        rows, columns = torch.tril_indices(d, d, -1, device=found.device)
        return found.index_put((torch.arange(len(found), device=found.device)[:, None], rows, columns), self.lower)

    def _noise(self, z: Tensor) -> Tensor:
        """Returns e_k = L_k^-1 (z - m_k), (B, K, d), for z (B, d)."""
        off = z.unsqueeze(1) - self.means
        if self.lower is None:
            return off * (-self.log_scale).exp()
        # one solve per component with B right-hand sides is ten times faster than one per component and row
        return solve_lower(self.scale_tril.to(off.dtype), off.permute(1, 2, 0)).permute(2, 0, 1)

    def log_prob(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled() or needs_autograd(z):
            return super().log_prob(z)
        x, means, log_scale, lower = z.flatten(1), self.means, self.log_scale, self.lower
        log_w = self.logits.log_softmax(0)
        if lower is None and len(x) == 1:
            # a single row needs fewer operations
            e = (x - means).div_(log_scale.exp())
            # the last element of `logcumsumexp` is `logsumexp`, which takes three times as long for few components
            log_p = (log_w - torch.addcmul(log_scale, e, e, value=0.5).sum(1)).logcumsumexp(0)[-1:]
        else:
            constant = log_w - log_scale.sum(1)
            # one column for each row of z: sums over K and d are then fast
            e = x.T.contiguous() - means.unsqueeze(2)
            if lower is None:
                e = e.mul_((-log_scale).exp_().unsqueeze(2))
            else:
                # torch.func cannot transform these operations, but they are faster than `scale_tril`
                below = torch.ones(e.shape[1], e.shape[1], dtype=torch.bool, device=e.device).tril(-1)
                factor = torch.diag_embed(log_scale.exp()).masked_scatter_(below, lower)
                e = solve_lower(factor.to(e.dtype), e)
            log_p = torch.add(constant.unsqueeze(1), e.square_().sum(1), alpha=-0.5).logsumexp(0)
        return log_p.sub_(x.shape[1] * HALF_LOG_2PI)

    @torch.no_grad()
    def _draw(self, n: int, generator: torch.Generator | None, temperature: float, like: Tensor) -> Tensor:
        k = torch.multinomial(self.weights, n, replacement=True, generator=generator)
        e = torch.randn(n, self.means.shape[1], generator=generator, dtype=like.dtype, device=like.device)
        if self.lower is None:
            off = self.log_scale.exp().to(e)[k] * e
        else:
            off = (self.scale_tril.to(e)[k] @ e.unsqueeze(-1)).squeeze(-1)
        return self.means.to(e)[k] + temperature * off

    @torch.no_grad()
    def _jacobian(self, z: Tensor) -> Tensor:
        k, d = self.means.shape

        def of_row(row: Tensor) -> Tensor:
            return self._conditional_cdf(row.unsqueeze(0))[0]

        rows = max(1, PART // (k * d * d))
        found: Tensor = torch.func.vmap(torch.func.jacrev(of_row), chunk_size=rows)(z)
        return found

    def initialize(self, z: Tensor) -> None:
        """Fits the mixture to z. The result depends on the seed of torch, but not on the order of the rows.

        So with at most 10,000 training rows, training begins with the mixture that `flowtrain.runs.components`
        validated.
        """
        order = np.lexsort(z.flatten(1).double().cpu().numpy().T)
        seed = torch.Generator().manual_seed(torch.initial_seed())
        self.fit(z[torch.from_numpy(order).to(z.device)], tolerance=INITIALIZE_TOLERANCE, generator=seed)

    @torch.no_grad()
    def fit(
        self,
        x: Tensor,
        steps: int = 200,
        tolerance: float = 1e-6,
        floor: float = 1e-6,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Fits the parameters to x (n, *event_shape) with EM in float64. Returns the mixture.

        EM finds a local maximum of the log-likelihood, or of the log posterior if `prior` is not 0, see
        `flowtrain.utils.em.fit_mixture`. The columns are standardised before EM.

        Args:
            x: the data.
            steps: the largest number of EM steps.
            tolerance: EM ends when a step raises the objective by less than this, in nats per row.
            floor: the smallest eigenvalue of a covariance, as a fraction of the variance of the columns. Without it the
                likelihood is unbounded, because a component on a single row has variance 0.
            generator: the random generator of k-means++, on the CPU. None: the global generator.

        Raises:
            FlowtrainError: x of another shape, without rows, or not finite.
        """
        if x.shape[1:] != self.event_shape or x.dim() != 1 + len(self.event_shape) or not len(x):
            shape = ", ".join(map(str, ("n", *self.event_shape)))
            raise FlowtrainError(f"x has shape {tuple(x.shape)}: this base needs ({shape}) with at least one row")
        x = x.flatten(1).double()
        if not bool(x.isfinite().all()):
            raise FlowtrainError("x has values that are NaN or infinite: remove these rows")
        mean, std = x.mean(0), x.std(0, correction=0)
        std = torch.where(std > torch.finfo(x.dtype).eps * mean.abs(), std, 1.0)
        found = fit_mixture(
            (x - mean) / std,
            len(self.logits),
            self.lower is None,
            prior_rows=self.prior,
            steps=steps,
            tolerance=tolerance,
            floor=floor,
            generator=generator,
        )
        self._set(found.log_weights, mean + std * found.means, std.unsqueeze(1) * found.scale_tril())
        return self

    def _set(self, logits: Tensor, means: Tensor, scale_tril: Tensor) -> None:
        self.logits.copy_(logits)
        self.means.copy_(means)
        self.log_scale.copy_(scale_tril.diagonal(dim1=1, dim2=2).log())
        if self.lower is not None:
            d = means.shape[1]
            rows, columns = torch.tril_indices(d, d, -1, device=means.device)
            self.lower.copy_(scale_tril[:, rows, columns])

    def extra_repr(self) -> str:
        covariance = "diagonal" if self.lower is None else "full"
        return f"event_shape={self.event_shape}, components={len(self.logits)}, covariance={covariance}"


class ConditionalMixture(Base):
    """A mixture density network (Bishop 1994, Mixture density networks): a Gaussian mixture that depends on a context.

    p0(z | c) = sum_k w_k N(z; m_k, L_k L_k^T), k = 1 .. K. A parameter of the mixture is the sum of a parameter of this
    base, which does not depend on c, and an output of a multilayer perceptron of c. L_k is given by

        (I - R_k) (z - m_k) = D_k e,    L_k = (I - R_k)^-1 D_k,    D_k = diag(exp(s_k)),

    with strictly lower triangular R_k and e ~ N(0, I) (Pourahmadi 1999, Joint mean-covariance models). For any R_k and
    s_k this is a covariance, and the density needs no triangular solve. A network output y adds 6 tanh(y / 6) to s_k.

    The outputs of the network are initially zero. `initialize` fits the mixture of all rows, without the context, by
    EM. `given(context)` computes the mixtures of a batch.

    Args:
        event_shape: shape of one z.
        components: the number K of components.
        classes: the size of the context: the number of classes, or of features.
        covariance: full | diagonal. A diagonal mixture has no R.
        prior: the strength of the prior in EM, see `GaussianMixture`.
        hidden: widths of the hidden layers of the network.
        activation: relu | tanh | swish.

    Raises:
        ConfigError: a setting out of range, or a network with more than 2^26 weights in its last layer.

    Example:
        >>> base = ConditionalMixture(2, components=3, classes=4)
        >>> base.given(torch.tensor([0, 3])).log_prob(torch.zeros(2, 2)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        components: int,
        classes: int,
        covariance: str = "full",
        prior: float = 0.0,
        hidden: Sequence[int] = (64, 64),
        activation: str = "swish",
    ) -> None:
        super().__init__(event_shape)
        self.prior, self.covariance = number("prior", prior, inclusive=True), covariance
        k, d = whole("components", components), math.prod(self.event_shape)
        full = one_of("covariance", covariance, COVARIANCES) == "full"
        # the numbers of parameters of each component: logit, mean, log scale, R
        self.sizes = [1, d, d, d * (d - 1) // 2 if full else 0]
        layers = widths("hidden", hidden)
        if sum(self.sizes) * k * layers[-1] > MOST_WEIGHTS:
            raise ConfigError(
                f"a mixture of {k} components over {d} columns with {covariance} covariances that depend on a context "
                f"needs a network with {sum(self.sizes) * k * layers[-1]:,} weights in its last layer: use "
                "covariance=diagonal, or fewer components"
            )
        self.logits = nn.Parameter(torch.zeros(k))
        self.means = nn.Parameter(torch.randn(k, d))
        self.log_scale = nn.Parameter(torch.zeros(k, d))
        self.lower = nn.Parameter(torch.zeros(k, self.sizes[3])) if full else None
        self.net = MLP(0, layers, k * sum(self.sizes), one_of("activation", activation, ACTIVATIONS), classes)

    def given(self, context: Tensor | None) -> "Base":
        """Returns the mixture of each row of a context.

        Raises:
            FlowtrainError: no context.
        """
        if context is None:
            raise FlowtrainError("the density of this base depends on a context: call base.given(context)")
        y = self.net(self.means.new_empty(context.shape[0], 0), context).unflatten(1, (len(self.means), -1))
        logits, means, scale, lower = y.split(self.sizes, 2)
        return MixtureOfRows(
            self.event_shape,
            self.logits + logits.squeeze(2),
            self.means + means,
            self.log_scale + CAP * torch.tanh(scale / CAP),
            None if self.lower is None else self.lower + lower,
        )

    def log_prob(self, z: Tensor) -> Tensor:
        return self.given(None).log_prob(z)

    def rsample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        temperature: float = 1.0,
        like: Tensor | None = None,
    ) -> Tensor:
        return self.given(None).rsample(n, generator, temperature, like)

    def to_uniform(self, z: Tensor) -> Tensor:
        return self.given(None).to_uniform(z)

    @torch.no_grad()
    def initialize(self, z: Tensor) -> None:
        fitted = GaussianMixture(self.event_shape, len(self.logits), self.covariance, self.prior).to(z)
        fitted.initialize(z)
        self.logits.copy_(fitted.logits)
        self.means.copy_(fitted.means)
        self.log_scale.copy_(fitted.log_scale)
        if self.lower is not None:
            # R = I - D L^-1
            factor = fitted.scale_tril.double()
            inverse = solve_lower(factor, torch.eye(factor.shape[1]).to(factor).expand(factor.shape))
            scaled = factor.diagonal(dim1=1, dim2=2).unsqueeze(2) * inverse
            self.lower.copy_(-scaled[:, *_below_diagonal(scaled)])

    def extra_repr(self) -> str:
        return f"event_shape={self.event_shape}, components={len(self.logits)}, covariance={self.covariance}"


class MixtureOfRows(_Mixture):
    """The Gaussian mixtures of a `ConditionalMixture` for the rows of a context.

    Args:
        event_shape: shape of one z.
        logits: (B, K).
        means, log_scale: m and s, (B, K, d).
        lower: the elements of R below the diagonal, row by row, (B, K, d (d - 1) / 2), or None.
    """

    def __init__(
        self, event_shape: tuple[int, ...], logits: Tensor, means: Tensor, log_scale: Tensor, lower: Tensor | None
    ) -> None:
        super().__init__(event_shape)
        self.logits, self.means, self.log_scale, self.lower = logits, means, log_scale, lower

    @property
    def scale_tril(self) -> Tensor:
        """The Cholesky factors L, (B, K, d, d)."""
        return _factor(self.log_scale, self.lower)

    def _noise(self, z: Tensor) -> Tensor:
        off = z.unsqueeze(1) - self.means
        if self.lower is not None:
            rows, columns = _below_diagonal(off)
            off = off - torch.zeros_like(off).index_add(2, rows, self.lower * off[:, :, columns])
        return off * (-self.log_scale).exp()

    @torch.no_grad()
    def _draw(self, n: int, generator: torch.Generator | None, temperature: float, like: Tensor) -> Tensor:
        k = torch.multinomial(self.logits.softmax(1), 1, generator=generator).squeeze(1)
        rows = torch.arange(n, device=k.device)
        e = torch.randn(n, self.means.shape[2], generator=generator, dtype=like.dtype, device=like.device)
        factor = _factor(self.log_scale[rows, k], None if self.lower is None else self.lower[rows, k]).to(e)
        return self.means[rows, k].to(e) + temperature * (factor @ e.unsqueeze(-1)).squeeze(-1)

    def _jacobian(self, z: Tensor) -> Tensor:
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            u = self._conditional_cdf(z)
            # a row of u depends only on the same row of z
            rows = [torch.autograd.grad(u_j.sum(), z, retain_graph=True)[0] for u_j in u.unbind(1)]
        return torch.stack(rows, 1)


def _below_diagonal(like: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the rows and the columns of the elements below the diagonal, row by row, for d = like.shape[-1]."""
    d = like.shape[-1]
    rows, columns = torch.tril_indices(d, d, -1, device=like.device)
    return rows, columns


def _factor(log_scale: Tensor, lower: Tensor | None) -> Tensor:
    """Returns L = (I - R)^-1 D, (..., d, d), for log_scale (..., d) and the elements of R below the diagonal."""
    scale = torch.diag_embed(log_scale.exp())
    if lower is None:
        return scale
    unit = torch.diag_embed(torch.ones_like(log_scale))
    unit[..., *_below_diagonal(log_scale)] = -lower
    return solve_lower(unit, scale)
