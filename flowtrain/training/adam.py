"""Adam and AdamW with less overhead per step than in torch."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Adam(torch.optim.Adam):
    """`torch.optim.Adam` with the fused kernel, for a single group of parameters.

    A step of torch collects the tensors of all parameters again, and adds 1 to a step count of each parameter. For 144
    small parameters this takes six times as long as the update. Here the tensors are collected once, and parameters
    with the same step count share the tensor of the count. The values are the same to the last bit.

    The methods of `torch.optim.Optimizer` import the compiler of torch, which takes a second. Here they do not.

    Args:
        parameters: the parameters.
        lr: the learning rate.
        weight_decay: the weight decay.
        decoupled: whether the weight decay is decoupled from the gradient, as in `torch.optim.AdamW`.
    """

    # `inspect.unwrap` returns the methods without the decorator that imports the compiler
    add_param_group = inspect.unwrap(Optimizer.add_param_group)
    state_dict = inspect.unwrap(Optimizer.state_dict)

    def __init__(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, decoupled: bool) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True, decoupled_weight_decay=decoupled)
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        # the tensors of the parameters that have a gradient, which parameters these are, and their step counts
        self._lists: Lists | None = None
        self._trained: list[bool] = []
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def update(self) -> None:
        """Updates the parameters that have a gradient, as `step`. Hooks of `step` are not called."""
        group = self.param_groups[0]
        found = [p.grad for p in group["params"]]
        trained = [g is not None for g in found]
        if self._lists is None or not self.state or trained != self._trained:
            self._begin()
            self._collect(trained)
        assert self._lists is not None
        # torch refuses empty lists. With `Muon`, all parameters may be matrices
        if not self._counts:
            return
        torch._foreach_add_(self._counts, 1)
        parameters, averages, squares, steps = self._lists
        beta1, beta2 = group["betas"]
        self._kernel(
            parameters,
            [g for g in found if g is not None],
            averages,
            squares,
            [],
            steps,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )

    def moments_of(self, parameter: Tensor) -> tuple[str, ...]:
        """Returns the names of the averages in the state of a parameter. They have the shape of the parameter."""
        return "exp_avg", "exp_avg_sq"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Sets all gradients to None."""
        for p in self.param_groups[0]["params"]:
            p.grad = None

    def load_state_dict(self, state_dict: Any) -> None:
        inspect.unwrap(Optimizer.load_state_dict)(self, state_dict)
        self._lists = None

    def _begin(self) -> None:
        """Creates the state of each parameter that has a gradient. Each state has a separate step count."""
        for state in self.state.values():
            state["step"] = state["step"].clone()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None and not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )

    def _collect(self, trained: list[bool]) -> None:
        """Collects the tensors of the parameters that have a gradient. Equal step counts become one tensor."""
        parameters: list[Tensor] = [p for p, has in zip(self.param_groups[0]["params"], trained, strict=True) if has]
        states = [self.state[p] for p in parameters]
        counts = [state["step"] for state in states]
        # one read, because each read waits for a GPU
        numbers: list[float] = torch.stack(counts).tolist() if counts else []
        shared: dict[float, Tensor] = {}
        for state, number, count in zip(states, numbers, counts, strict=True):
            state["step"] = shared.setdefault(number, count)
        self._lists = parameters, *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq", "step"))  # type: ignore[assignment]
        self._trained, self._counts = trained, list(shared.values())
