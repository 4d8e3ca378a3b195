"""The public names of the package: the modules that they import, their defaults, and their types."""

import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import torch

import flowtrain
from flowtrain import bases, bijections, data, models, nn, ode
from flowtrain.cli.config_files import compose_defaults, options
from flowtrain.ode import Solver
from flowtrain.utils.errors import FlowtrainError

MODULES = ("bases", "bijections", "data", "models", "nn", "objectives", "ode")
TOYS = [name for name in options("data") if name not in ("array", "mnist", "fashion_mnist")]
CHOICES = [
    *(("model", name) for name in options("model")),
    *(("objective", name) for name in options("objective")),
    ("solver", "dopri5"),
    ("regularizer", "none"),
    *(("data", name) for name in TOYS),
]
# a few rows, as the models for vectors expect
VECTORS = torch.tensor([[0.0, 0.0], [1.0, -2.0], [0.3, 0.4]])

TYPED = """
import torch
import flowtrain as ft
from flowtrain import bases, bijections, models, nn, ode
from flowtrain.bijections import Chain, Continuous
from flowtrain.models.realnvp import Couplings

flow: ft.Flow = models.realnvp(2, hidden=[8])
same: ft.Flow = ft.models.ffjord((2,), solver=ode.ode_solver(rtol=1e-4))
built = ft.Flow(bases.StandardNormal(2), Chain([Continuous(nn.MLPField(2)), bijections.ActNorm(2)]))
old = ft.Flow(event_shape=(2,), bijection=built.bijection)
log_p: torch.Tensor = ft.load("flow.pt", trust=["mypkg"]).log_prob(flow.sample(3))
settings: type[Couplings] = Couplings
moons: ft.data.Dataset = ft.data.Moons()
reveal_type(ft.models.realnvp(2))
reveal_type(flow.log_prob(log_p))
"""


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_documented(name: str) -> None:
    module = import_module(f"flowtrain.{name}")
    assert getattr(flowtrain, name) is module
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert all(
        getattr(module, n).__doc__ for n in module.__all__ if not isinstance(getattr(module, n), ode.SolveOptions)
    )


def test_package_imports_lazily_and_fits_without_hydra() -> None:
    code = """
import sys, flowtrain
assert {"Flow", "load", "models"} <= set(dir(flowtrain))
assert "torch" not in sys.modules
flowtrain.models, flowtrain.data, flowtrain.objectives, flowtrain.load
avoided = {"hydra", "omegaconf", "matplotlib", "torchdiffeq"}
assert not avoided & set(sys.modules), "of the names"
import numpy as np
flowtrain.fit(np.random.default_rng(0).normal(size=(50, 2)), model="affine", steps=2, progress=False)
assert not avoided & set(sys.modules), "of a fit"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError):
        _ = flowtrain.nothing  # type: ignore[attr-defined]


def test_model_functions_and_modules_are_importable_by_name() -> None:
    # each module can be the first import. torch is imported only once, because its import takes most of the time
    code = """
import sys, torch
from importlib import import_module
from pkgutil import resolve_name
for first in ("flowtrain.models.realnvp", "flowtrain.models", "flowtrain.models.multiscale"):
    for name in [name for name in sys.modules if name.partition(".")[0] == "flowtrain"]:
        del sys.modules[name]
    import_module(first)
    from flowtrain import models
    from flowtrain.models.realnvp import Couplings
    import flowtrain.models.glow
    assert all(resolve_name(f"flowtrain.models.{n}.{n}") is getattr(models, n) for n in models.__all__), first
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def parameters(target: str) -> Mapping[str, inspect.Parameter]:
    """Returns the parameters of a config's target, and for solvers also the parameters of the base class."""
    found: Callable[..., Any] = resolve_name(target)
    more = inspect.signature(Solver.__init__).parameters if found is ode.ode_solver else {}
    return {**more, **inspect.signature(found).parameters}


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_python_defaults_equal_config_defaults(group: str, name: str) -> None:
    config = compose_defaults([f"{group}={name}"])[group]
    if name == "auto":
        # `auto` stands for a choice that depends on the data
        assert "_target_" not in config
        return
    known = parameters(config["_target_"])
    keys = [key for key in config if key not in ("name", "_target_")]
    assert set(keys) <= set(known)
    for key in keys:
        default = known[key].default
        assert default is not inspect.Parameter.empty, key
        assert (list(default) if isinstance(default, tuple) else default) == config[key], key
    # the configs contain every parameter that users can set
    of_models = ("event_shape", "solver", "classes", "context", "circular")
    given = ("self", *of_models, "flow", "regularizer", "teacher", "contexts", "seed", "steps", "tableau")
    rest = [k for k, p in known.items() if p.default is not p.empty and k not in (*keys, *given)]
    assert not rest


def test_layer_defaults_equal_model_defaults() -> None:
    of_model, of_field = inspect.signature(models.ffjord).parameters, inspect.signature(nn.MLPField).parameters
    for model, field in (("hidden", "hidden"), ("field", "layer"), ("activation", "activation")):
        assert of_model[model].default == of_field[field].default
        assert of_model[model].default == inspect.signature(nn.ConvField).parameters[field].default
    assert of_model["init_scale"].default == of_field["init_scale"].default
    rule, logit = inspect.signature(nn.TraceRule).parameters, inspect.signature(bijections.Logit).parameters
    assert (rule["train"].default, rule["evaluate"].default) == ("auto", of_model["eval_trace"].default)
    assert logit["alpha"].default == data.Samples((1,)).alpha


@pytest.mark.parametrize("name", models.__all__)
@pytest.mark.parametrize("event_shape", [3, (3,), [3], torch.Size([3])])
def test_models_need_only_an_event_shape(name: str, event_shape: Any) -> None:
    flow = getattr(models, name)(event_shape)
    assert flow.event_shape == (3,)
    assert flow.log_prob(flow.sample(2)).isfinite().all()


@pytest.mark.parametrize("event_shape", [0, (2, -1), 2.5, "2", None])
def test_invalid_event_shapes_are_refused(event_shape: Any) -> None:
    with pytest.raises(FlowtrainError):
        models.realnvp(event_shape)
    with pytest.raises(FlowtrainError):
        bases.StandardNormal(event_shape)


def test_flow_constructor_accepts_every_signature() -> None:
    part = bijections.Continuous(nn.MLPField(2))
    torch.nn.init.normal_(part.field.head.linear.weight)
    chain = bijections.Chain([part, bijections.ActNorm(2)])
    flows = [
        flowtrain.Flow((2,), chain),
        flowtrain.Flow(2, chain),
        flowtrain.Flow(bases.StandardNormal(2), chain),
        flowtrain.Flow(event_shape=(2,), bijection=chain),
        flowtrain.Flow(base=bases.StandardNormal((2,)), bijection=chain),
    ]
    log_p = [flow.eval().log_prob(VECTORS) for flow in flows]
    assert all(torch.equal(found, log_p[0]) for found in log_p)
    assert part.solver.describe() == ode.ode_solver("dopri5", rtol=1e-5).describe()


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [((), {}), ((2,), {}), ((2, 3), {}), ((2, bijections.ActNorm(2)), {"event_shape": 2}), ((2,), {"event_shape": 2})],
)
def test_incomplete_flow_arguments_are_refused(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
    with pytest.raises(FlowtrainError):
        flowtrain.Flow(*arguments, **keywords)


@pytest.mark.slow
def test_typed_project_passes_mypy(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    assert (Path(flowtrain.__file__).parent / "py.typed").exists()
    project = tmp_path / "project.py"
    project.write_text(TYPED)
    # caching torch's types, which mypy reads in ten seconds, makes later test runs faster
    cache = tmp_path / "cache" if getattr(request.config, "cache", None) is None else request.config.cache.mkdir("mypy")
    # check the package as installed, without reporting its own errors or reading its settings
    arguments = ["--strict", "--config-file=", f"--cache-dir={cache}", str(project)]
    command = [sys.executable, "-m", "mypy", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    types = re.findall(r'Revealed type is "([\w.]+)"', done.stdout)
    assert types == ["flowtrain.flow.Flow", "torch._tensor.Tensor"]
