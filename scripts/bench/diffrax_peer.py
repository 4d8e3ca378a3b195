"""diffrax as an engine: the same concatsquash field with the same weights, jitted, with common settings.

Dopri5, PIDController(rtol=atol) and RecursiveCheckpointAdjoint. The whole batch has one step size, as in all engines
here.
"""

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import torch
from steps import Contestant, Problem, Skip, Step

from flowtrain.nn.mlp_field import ConcatSquash, MLPField

ACTIVATIONS = {"tanh": jnp.tanh, "softplus": jax.nn.softplus, "swish": jax.nn.silu}
# in the order of ConcatSquash's parameters, so that gradients are comparable
NAMES = ("linear.weight", "linear.bias", "gate.weight", "gate.bias", "shift.weight")

Layers = list[dict[str, jax.Array]]


def weights_of(field: MLPField) -> Layers:
    layers = [*field.body, field.head]
    if not all(isinstance(layer, ConcatSquash) for layer in layers):
        raise Skip("needs a concatsquash field")
    return [{n: jnp.asarray(layer.get_parameter(n).numpy(force=True)) for n in NAMES} for layer in layers]


def velocity(layers: Layers, activation: str, t: jax.Array, x: jax.Array) -> jax.Array:
    for i, p in enumerate(layers):
        gate = jax.nn.sigmoid(p["gate.weight"][:, 0] * t + p["gate.bias"])
        x = (x @ p["linear.weight"].T + p["linear.bias"]) * gate + p["shift.weight"][:, 0] * t
        if i < len(layers) - 1:
            x = ACTIVATIONS[activation](x)
    return x


def diffrax_step(problem: Problem) -> Contestant:
    """Compiles the step in advance, so that timed steps do not include compilation.

    Raises:
        Skip: the field is not a concatsquash MLP.
    """
    field = problem.field
    if not isinstance(field, MLPField):
        raise Skip("needs a concatsquash MLP")
    activation, rtol, d = type(field.activation).__name__.lower(), problem.solver["rtol"], problem.x.shape[1]
    noise = None if problem.noise is None else jnp.asarray(problem.noise.numpy(force=True))
    x0 = jnp.asarray(problem.x.numpy(force=True))

    def augmented(t: Any, state: Any, layers: Any) -> Any:
        def f(y: jax.Array) -> jax.Array:
            return velocity(layers, activation, t, y)

        x, _ = state
        if noise is not None:
            v, je = jax.jvp(f, (x,), (noise,))
            return v, (je * noise).sum(1)
        # with one jvp per column, XLA computes the primal only once. This takes half the time of jax.linearize or
        # jax.vmap
        trace = jnp.zeros(len(x), x.dtype)
        for i in range(d):
            v, je = jax.jvp(f, (x,), (jnp.zeros_like(x).at[:, i].set(1.0),))
            trace = trace + je[:, i]
        return v, trace

    def loss(layers: Layers, counted: bool = False) -> Any:
        seen: Any = augmented
        if counted:

            def seen(t: Any, state: Any, args: Any) -> Any:
                jax.debug.callback(lambda: count.append(1))
                return augmented(t, state, args)

        controller = diffrax.PIDController(rtol=rtol, atol=rtol)
        start = (x0, jnp.zeros(len(x0), x0.dtype))
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(seen), diffrax.Dopri5(), 1.0, 0.0, None, start, layers, stepsize_controller=controller
        )
        z, log_det = solution.ys[0][-1], solution.ys[1][-1]
        return (0.5 * (z**2).sum(1) + 0.5 * d * np.log(2 * np.pi) - log_det).mean()

    count: list[int] = []
    layers = weights_of(field)
    jax.block_until_ready(jax.jit(lambda p: loss(p, counted=True))(layers))
    jax.effects_barrier()
    nfe = len(count)
    value_and_gradient = jax.jit(jax.value_and_grad(loss))

    def step() -> Step:
        value, found = jax.block_until_ready(value_and_gradient(layers))
        flat = np.concatenate([np.asarray(layer[n]).ravel() for layer in found for n in NAMES])
        return Step(float(value), torch.from_numpy(flat), nfe, None)

    step()
    return step
