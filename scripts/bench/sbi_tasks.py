"""Tasks of the benchmark of simulation-based inference: priors, simulators, likelihoods, and C2ST.

Lueckmann et al. 2021, Benchmarking simulation-based inference, appendix T. All priors are uniform on a box.
"""

import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

Array = NDArray[np.float64]

# the folder that contains sbibm, with observations and reference posteriors of the benchmark
DATA = Path(os.environ.get("FLOWTRAIN_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")


class Task(ABC):
    """A prior on a box, a simulator and its likelihood.

    Attributes:
        d: the number of parameters.
        bound: the prior is uniform on [-bound, bound]^d.
    """

    d: ClassVar[int]
    bound: ClassVar[float]

    def prior(self, n: int, rng: np.random.Generator) -> Array:
        """Draws parameters, (n, d)."""
        return rng.uniform(-self.bound, self.bound, (n, self.d))

    def unbounded(self, theta: Array) -> Array:
        """Returns y = Phi^-1((theta / bound + 1) / 2), (n, d). The prior of y is a standard normal distribution."""
        return ndtri((theta / self.bound + 1) / 2)

    def bounded(self, y: Array) -> Array:
        """Returns theta (n, d) for y = unbounded(theta)."""
        return self.bound * (2 * ndtr(y) - 1)

    def log_slope(self, theta: Array) -> Array:
        """Returns log|det dy/dtheta|, (n,)."""
        return -log_normal(self.unbounded(theta), 0, 1).sum(1) - self.d * np.log(2 * self.bound)

    @abstractmethod
    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        """Draws one observation for each row of theta (n, d). Returns (n, k)."""

    @abstractmethod
    def log_likelihood(self, theta: Array, x: Array) -> Array:
        """Returns log p(x | theta) in nats, (n,), for theta (n, d) and one observation x (k,)."""

    def proposal(self, x: Array, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        """Draws parameters (n, d), and returns them with log(p(theta) p(x | theta) / q(theta)) + a constant, (n,).

        q is their density, here the prior.
        """
        theta = self.prior(n, rng)
        return theta, self.log_likelihood(theta, x)

    def posterior(self, x: Array, n: int, rng: np.random.Generator) -> Array:
        """Draws from p(theta | x), (n, d), by importance resampling of proposals.

        The number of proposals grows until their effective number, (sum w)^2 / sum w^2, is at least 5 n.
        """
        theta, log_w = np.empty((0, self.d)), np.empty(0)
        while True:
            more, log_more = self.proposal(x, 1_000_000, rng)
            theta, log_w = np.concatenate([theta, more]), np.concatenate([log_w, log_more])
            # the other weights are too small to change the result
            near = log_w > log_w.max() - 30
            theta, log_w = theta[near], log_w[near]
            w = np.exp(log_w - log_w.max())
            if w.sum() ** 2 >= 5 * n * np.square(w).sum():
                return theta[rng.choice(len(w), n, p=w / w.sum())]


class TwoMoons(Task):
    """Two parameters. The posterior has two crescents (Greenberg et al. 2019).

    x = (r cos a + 1/4, r sin a) + (-|theta_1 + theta_2|, theta_2 - theta_1) / sqrt 2 with a ~ U(-pi/2, pi/2) and
    r ~ N(0.1, 0.01^2).
    """

    d, bound = 2, 1.0

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        a, r = rng.uniform(-np.pi / 2, np.pi / 2, len(theta)), rng.normal(0.1, 0.01, len(theta))
        return np.stack([r * np.cos(a) + 0.25, r * np.sin(a)], 1) + self.shift(theta)

    def log_likelihood(self, theta: Array, x: Array) -> Array:
        # p = (r cos a, r sin a) has the density N(r; 0.1, 0.01^2) / (pi r) where p_1 > 0
        p = x - self.shift(theta) - np.array([0.25, 0.0])
        r = np.hypot(p[:, 0], p[:, 1])
        return np.where(p[:, 0] > 0, log_normal(r, 0.1, 0.01) - np.log(np.pi * r), -np.inf)

    @staticmethod
    def shift(theta: Array) -> Array:
        """Returns the part of x without noise, (n, 2), up to a constant."""
        return np.stack([-np.abs(theta.sum(1)), theta[:, 1] - theta[:, 0]], 1) / np.sqrt(2)


class SLCP(Task):
    """Simple likelihood, complex posterior: five parameters, eight observed numbers (Papamakarios et al. 2019).

    x contains four independent draws from N(m, S) with m = (theta_1, theta_2) and
    S = [[s_1^2, rho s_1 s_2], [rho s_1 s_2, s_2^2]], s_1 = theta_3^2, s_2 = theta_4^2, rho = tanh theta_5.
    """

    d, bound = 5, 3.0

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        m, (s1, s2, rho) = theta[:, None, :2], (v[:, None] for v in self.shape(theta))
        e = rng.standard_normal((len(theta), 4, 2))
        y = np.stack([s1 * e[..., 0], s2 * (rho * e[..., 0] + np.sqrt(1 - rho**2) * e[..., 1])], 2)
        return (m + y).reshape(-1, 8)

    def log_likelihood(self, theta: Array, x: Array) -> Array:
        s1, s2, rho = self.shape(theta)
        total = np.zeros(len(theta))
        for y1, y2 in x.reshape(4, 2):
            u = (y1 - theta[:, 0]) / s1
            v = ((y2 - theta[:, 1]) / s2 - rho * u) / np.sqrt(1 - rho**2)
            total += log_normal(u, 0, 1) + log_normal(v, 0, 1) - np.log(s1 * s2 * np.sqrt(1 - rho**2))
        return total

    def proposal(self, x: Array, n: int, rng: np.random.Generator) -> tuple[Array, Array]:
        # given S, the likelihood is proportional to N(m; mean of x, S / 4)
        theta, e = self.prior(n, rng), rng.standard_normal((n, 2))
        s1, s2, rho = self.shape(theta)
        y = np.stack([s1 * e[:, 0], s2 * (rho * e[:, 0] + np.sqrt(1 - rho**2) * e[:, 1])], 1)
        theta[:, :2] = x.reshape(4, 2).mean(0) + y / 2
        log_q = log_normal(e, 0, 1).sum(1) - np.log(s1 * s2 * np.sqrt(1 - rho**2))
        inside = (np.abs(theta) <= self.bound).all(1)
        return theta, np.where(inside, self.log_likelihood(theta, x) - log_q, -np.inf)

    @staticmethod
    def shape(theta: Array) -> tuple[Array, Array, Array]:
        """Returns the standard deviations s_1, s_2 and the correlation, (n,) each."""
        return theta[:, 2] ** 2, theta[:, 3] ** 2, np.tanh(theta[:, 4])


class GaussianMixture(Task):
    """Two parameters, the common mean of a wide and a narrow normal distribution with equal weights.

    x ~ N(theta, I) / 2 + N(theta, 0.1^2 I) / 2, with a new choice of the component for each draw.
    """

    d, bound = 2, 10.0

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        std = np.where(rng.random((len(theta), 1)) < 0.5, 1.0, 0.1)
        return theta + std * rng.standard_normal(theta.shape)

    def log_likelihood(self, theta: Array, x: Array) -> Array:
        terms = [log_normal(x, theta, std).sum(1) for std in (1.0, 0.1)]
        return np.logaddexp(*terms) - np.log(2)


class GaussianLinearUniform(Task):
    """Ten parameters, x ~ N(theta, 0.1 I). The posterior is a normal distribution that the prior truncates."""

    d, bound = 10, 1.0
    std = 0.1**0.5

    def simulate(self, theta: Array, rng: np.random.Generator) -> Array:
        return theta + self.std * rng.standard_normal(theta.shape)

    def log_likelihood(self, theta: Array, x: Array) -> Array:
        return log_normal(x, theta, self.std).sum(1)

    def posterior(self, x: Array, n: int, rng: np.random.Generator) -> Array:
        # the columns are independent, so each is drawn by rejection
        theta = np.empty((n, self.d))
        for column, mean in zip(theta.T, x, strict=True):
            draws = np.empty(0)
            while len(draws) < n:
                more = rng.normal(mean, self.std, 4 * n)
                draws = np.concatenate([draws, more[np.abs(more) <= self.bound]])
            column[:] = draws[:n]
        return theta


TASKS: dict[str, Task] = {
    "two_moons": TwoMoons(),
    "slcp": SLCP(),
    "gaussian_mixture": GaussianMixture(),
    "gaussian_linear_uniform": GaussianLinearUniform(),
}
# mean C2ST of NPE with 10,000 simulations over observations 1, 2 and 3 (results repository of the benchmark)
PUBLISHED = {
    "two_moons": (0.542, 0.571, 0.646),
    "slcp": (0.944, 0.938, 0.799),
    "gaussian_mixture": (0.661, 0.560, 0.670),
    "gaussian_linear_uniform": (0.557, 0.556, 0.587),
}


def log_normal(x: Array, mean: Array | float, std: Array | float) -> Array:
    """Returns log N(x; mean, std^2), elementwise."""
    return -0.5 * np.square((x - mean) / std) - np.log(std) - 0.5 * np.log(2 * np.pi)


class Observation(NamedTuple):
    """An observation of the benchmark: x (k,), its parameters (d,), and posterior samples (10,000, d)."""

    x: Array
    theta: Array
    reference: Array


def observation(task: str, number: int, data: Path = DATA) -> Observation:
    """Reads an observation of the benchmark, numbered from 1."""
    folder = data / "sbibm" / task / str(number)
    x, theta = (read(folder / f"{name}.csv")[0] for name in ("observation", "true_parameters"))
    return Observation(x, theta, read(folder / "reference_posterior_samples.csv.bz2"))


def simulated(task: Task, seed: int, n: int = 10_000) -> Observation:
    """Simulates an observation, with n samples of its exact posterior."""
    rng = np.random.default_rng(10**7 + seed)
    theta = task.prior(1, rng)
    x = task.simulate(theta, rng)[0]
    return Observation(x, theta[0], task.posterior(x, n, rng))


def read(path: Path) -> Array:
    """Reads a CSV file with one header line, also compressed by bzip2, as (rows, columns)."""
    return np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)


def c2st(reference: Array, samples: Array, seed: int = 1) -> float:
    """Returns the accuracy of a classifier that separates two sets, (n, d) and (m, d): 0.5 if they are equal.

    As in the benchmark: columns standardised by the reference, a network of two layers of 10 d units, and the mean
    accuracy over 5 folds.
    """
    from sklearn.model_selection import KFold, cross_val_score
    from sklearn.neural_network import MLPClassifier

    mean, std = reference.mean(0), reference.std(0, ddof=1)
    x = np.concatenate([(part - mean) / std for part in (reference, samples)])
    y = np.repeat([0, 1], [len(reference), len(samples)])
    width = 10 * x.shape[1]
    network = MLPClassifier((width, width), activation="relu", solver="adam", max_iter=1000, random_state=seed)
    folds = KFold(5, shuffle=True, random_state=seed)
    return float(cross_val_score(network, x.astype(np.float32), y, cv=folds, scoring="accuracy").mean())
