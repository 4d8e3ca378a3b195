"""The optimizer Muon, whose updates of weight matrices are orthogonal matrices."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowtrain.training.adam import Adam

# decay of the average of the gradients of a matrix
MOMENTUM = 0.9
# the least number of rows and columns of a matrix with orthogonal updates
LEAST_SIDE = 3
# coefficients and number of the Newton-Schulz iterations x <- a x + b (x x^T) x + c (x x^T)^2 x
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Muon(Adam):
    """Updates some weight matrices by Muon, and other parameters by Adam.

    Muon is from Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks. For a weight matrix
    W (m, n) with gradient G, and beta = MOMENTUM:

        M <- beta M + (1 - beta) G
        W <- W - lr sqrt(max(m, n)) orthogonalized(beta M + (1 - beta) G)

    The singular values of the update are about equal, while a gradient has a few large and many small singular values.
    The entries of the update have a root mean square of about lr, as in Adam (Liu et al. 2025, Muon is scalable for LLM
    training, section 2.2, without the factor 0.2). The weight decay is decoupled.

    The state of a matrix is `step` and `exp_avg`, which is M.

    Args:
        parameters: the parameters.
        matrices: the parameters with orthogonal updates, see `hidden_matrices`.
        lr: the learning rate.
        weight_decay: the decoupled weight decay.
    """

    def __init__(
        self,
        parameters: list[nn.Parameter],
        matrices: Sequence[nn.Parameter],
        lr: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parameters, lr, weight_decay, decoupled=True)
        self._ids = {id(p) for p in matrices}
        # matrices of the same shape are orthogonalized together
        self._matrices: dict[tuple[torch.Size, torch.dtype, torch.device], list[nn.Parameter]] = {}
        for p in matrices:
            self._matrices.setdefault((p.shape, p.dtype, p.device), []).append(p)

    @torch.no_grad()
    def update(self) -> None:
        """Updates the parameters that have a gradient."""
        if not self.state:
            self._lists = None
        for matrices in self._matrices.values():
            self._update_matrices([p for p in matrices if p.grad is not None])
        # Adam skips parameters without a gradient
        hidden = [(p, p.grad) for matrices in self._matrices.values() for p in matrices]
        for p, _ in hidden:
            p.grad = None
        super().update()
        for p, gradient in hidden:
            p.grad = gradient

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        return ("exp_avg",) if id(parameter) in self._ids else super().moments_of(parameter)

    def upgraded(self, saved: Any) -> Any:
        """Returns a saved state without the averages that this version cannot continue. These averages start from zero.

        Earlier versions updated other parameters by Muon. A parameter that Muon updates has no `exp_avg_sq`, and a
        parameter that Adam updates has one.
        """
        state = saved.get("state") if isinstance(saved, dict) else None
        if not isinstance(state, dict):
            return saved
        parameters = self.param_groups[0]["params"]
        old = {
            i
            for i, entry in state.items()
            if type(i) is int
            and 0 <= i < len(parameters)
            and isinstance(entry, dict)
            and set(entry)
            == ({"step", "exp_avg", "exp_avg_sq"} if id(parameters[i]) in self._ids else {"step", "exp_avg"})
        }
        return {**saved, "state": {i: entry for i, entry in state.items() if i not in old}}

    def _update_matrices(self, matrices: Sequence[nn.Parameter]) -> None:
        """Updates matrices of one shape."""
        if not matrices:
            return
        for p in matrices:
            if not self.state[p]:
                self.state[p] = {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p)}
        group = self.param_groups[0]
        updated: list[Tensor] = [*matrices]
        gradients = [p.grad for p in matrices if p.grad is not None]
        averages = [self.state[p]["exp_avg"] for p in matrices]
        torch._foreach_add_([self.state[p]["step"] for p in matrices], 1)
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        # (k, m, n), or (k, m, n, 1, 1) for 1x1 convolutions
        gradient = torch.stack(torch._foreach_lerp(gradients, averages, MOMENTUM))
        directions = orthogonalized(gradient.flatten(2))
        if group["weight_decay"]:
            torch._foreach_mul_(updated, 1 - group["lr"] * group["weight_decay"])
        length = group["lr"] * max(directions.shape[1:]) ** 0.5
        torch._foreach_add_(updated, directions.view_as(gradient).unbind(), alpha=-length)


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Returns the weights that `Muon` updates by orthogonal matrices: the square matrices.

    These are the matrices of linear layers and of 1x1 convolutions between hidden layers of equal widths. The matrix W
    of a map with an `input_bound` is also square in autoregressive maps, and in couplings of equal halves. Adam updates
    the other parameters: the first and the last matrix of a network unless they are square, larger kernels, and the
    factors of invertible matrices. This gives a lower NLL than Muon for all matrices, see "Optimizers of flows on
    tables" and "Muon for flows of images" in scripts/bench/README.md.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) or (isinstance(m, nn.Conv2d) and _is_1x1(m))]
    weights = [layer.weight for layer in layers if isinstance(layer.weight, nn.Parameter)]
    found = {id(p): p for p in weights if p.shape[0] == p.shape[1] >= LEAST_SIDE}
    return list(found.values())


def _is_1x1(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.groups == 1


def orthogonalized(matrices: Tensor) -> Tensor:
    """Returns approximations of U V^T, (k, m, n), for matrices (k, m, n) with the decompositions U S V^T (SVD).

    The singular values of the result are between 0.7 and 1.2. Singular values that are tiny relative to the norm of the
    matrix stay smaller. The iteration needs only matrix products. A matrix of zeros stays 0.

    Example:
        >>> x = torch.randn(1, 20, 8, generator=torch.Generator().manual_seed(0))
        >>> values = torch.linalg.svdvals(orthogonalized(x))
        >>> bool((values > 0.65).all() and (values < 1.25).all())
        True
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # in float32, the squares of tiny entries would be 0
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=torch.float64).to(x.dtype)
    x = x / norm.clamp_min(torch.finfo(x.dtype).tiny)
    a, b, c = COEFFICIENTS
    for _ in range(ITERATIONS):
        square = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
