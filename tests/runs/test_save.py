"""A saved and loaded flow has the same density and samples, for every way to build it."""

import copy
import inspect
import math
import pickle
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowtrain
from flowtrain import Ensemble, Flow, bases, bijections, models, ode
from flowtrain import nn as parts
from flowtrain.bijections import ActNorm, Bijection, Chain, Continuous, HalfCoupling, Permutation
from flowtrain.cli.config_files import compose_defaults
from flowtrain.data.base import Samples
from flowtrain.ode import Tableau, ode_solver
from flowtrain.runs.build import build_flow
from flowtrain.runs.descriptions import PARTS
from flowtrain.training import checkpoint
from flowtrain.utils.errors import CheckpointError, ConfigError, FlowtrainError

pytestmark = pytest.mark.usefixtures("float32")
RALSTON = Tableau(order=2, c=(0.0, 2 / 3), a=((2 / 3,),), b=(0.25, 0.75))


def net(n_in: int, n_out: int) -> nn.Module:
    hidden = [
        nn.Linear(n_in, 6),
        nn.LayerNorm(6),
        nn.SiLU(),
        nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 6, bias=False)),
    ]
    return nn.Sequential(*hidden, nn.LeakyReLU(0.2), nn.Linear(6, n_out))


def conv(n_in: int, n_out: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(n_in, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.GELU("tanh"), nn.Conv2d(4, n_out, 1))


def flow_of(*steps: Bijection, shape: int | tuple[int, ...] = 3, **more: Any) -> Flow:
    return Flow(shape, Chain(steps), **more)


def ode_block(solver: ode.Solver | None = None, d: int = 3, **keys: Any) -> Continuous:
    return Continuous(parts.MLPField(d, [5], **keys), solver)


IMAGE = (2, 4, 4)
# smaller models, built from the same parts as the defaults
SMALLER: dict[str, dict[str, Any]] = {
    "glow": {"steps": 2, "hidden": [8]},
    "maf": {"layers": 2},
    "nsf": {"layers": 2},
    "realnvp": {"layers": 2, "hidden": [8]},
}
BUILDERS: dict[str, Callable[[], Flow]] = {
    "ActNorm": lambda: flow_of(ActNorm(3)),
    "ActNorm per pixel": lambda: flow_of(ActNorm(IMAGE), shape=IMAGE),
    "BatchNorm": lambda: flow_of(bijections.BatchNorm(3, momentum=0.5, eps=0.1)),
    "Affine": lambda: flow_of(bijections.Affine(3)),
    "one bijection": lambda: Flow(3, bijections.Affine(3)),
    "InvertibleLinear": lambda: flow_of(bijections.InvertibleLinear(3, "permutation")),
    "Permutation": lambda: flow_of(Permutation(torch.tensor([2, 0, 1])), ActNorm(3)),
    "Standardize": lambda: flow_of(bijections.Standardize(3)),
    "offset": lambda: flow_of(bijections.Standardize((3,), offset=True), centered=True),
    "IndexCoupling": lambda: flow_of(bijections.IndexCoupling(torch.tensor([True, False, True]), net(2, 2), 1.5)),
    "bounded": lambda: flow_of(HalfCoupling(3, True, parts.MLP(1, [4], 4), input_bound=3.0)),
    "HalfCoupling": lambda: flow_of(HalfCoupling(3, swap=False, conditioner=parts.MLP(2, [4], 2, "tanh", dropout=0.3))),
    "CheckerboardCoupling": lambda: flow_of(
        bijections.CheckerboardCoupling((4, 4), True, conditioner=conv(2, 4)), shape=IMAGE
    ),
    "Squeeze": lambda: flow_of(
        bijections.Squeeze(Chain([ActNorm(8), bijections.FactorOut(HalfCoupling(4, False, parts.ConvNet(2, [4], 4)))])),
        shape=IMAGE,
    ),
    "ResidualNet": lambda: flow_of(
        HalfCoupling(2, False, parts.ResidualNet(1, [4, 4], 2, size=(4, 4), batch_norm=True)), shape=IMAGE
    ),
    "InformedConv": lambda: flow_of(HalfCoupling(2, False, parts.InformedConv(1, 2, None, (4, 4))), shape=IMAGE),
    "GaussianStart": lambda: flow_of(bijections.GaussianStart(3), ActNorm(3)),
    "Preconditioned": lambda: flow_of(bijections.Preconditioned(ode_block(), 3)),
    "FromGaussian": lambda: flow_of(bijections.FromGaussian(Chain([ActNorm(3)]), d=3)),
    "ToSupport": lambda: flow_of(
        bijections.ToSupport([0.0, -math.inf, 0.0], [1.0, math.inf, math.inf], scale=[0.0, 0.0, 2.0])
    ),
    "Logit": lambda: flow_of(bijections.Logit(16), integer_valued=True, levels=16),
    "MLPField": lambda: flow_of(ode_block()),
    "two fields, two solvers": lambda: flow_of(
        ode_block(ode_solver("rk4", steps=3)), ode_block(ode_solver("midpoint", steps=5), layer="time_embedding")
    ),
    "ConvField": lambda: flow_of(
        Continuous(parts.ConvField(2, [3], "concat", "softplus", 1), trace=parts.TraceRule(evaluate="hutchinson")),
        shape=IMAGE,
    ),
    "adjoint": lambda: flow_of(ode_block(ode_solver("dopri5", gradient="adjoint", rtol=1e-4))),
    "torchdiffeq": lambda: flow_of(ode_block(ode_solver("heun3", step_size=0.25))),
    "custom tableau": lambda: flow_of(ode_block(ode_solver("ralston", tableau=RALSTON, steps=7))),
    "StudentT": lambda: Flow(bases.StudentT(3, df=torch.tensor([2.0, 3.0, 4.0])), ActNorm(3)),
    "trainable StudentT": lambda: Flow(bases.StudentT((3,), trainable=True), ActNorm(3)),
    "UniformBox": lambda: Flow(bases.UniformBox([-90.0, -90.0], torch.tensor([90.0, 95.0])), ActNorm(2)),
    "NormalUniform": lambda: Flow(bases.NormalUniform(2, [0]), bijections.WrapAngles(2, [0])),
    "OnColumns": lambda: flow_of(bijections.OnColumns(ActNorm(2), [0, 2])),
    "PeriodicField": lambda: flow_of(Continuous(parts.PeriodicField(3, [1], [4]))),
    "CircularSpline": lambda: flow_of(
        bijections.IndexCoupling(
            torch.tensor([True, False, False]),
            net(1, 2 + 14),
            transform=bijections.RealThenCircular(1, bijections.ScaleShift(), bijections.CircularSpline(4)),
            n_circular=1,
        )
    ),
    "Preconditioned, circular": lambda: flow_of(bijections.Preconditioned(ode_block(), 3, circular=[1])),
    "GaussianMixture": lambda: Flow(bases.GaussianMixture(2, 3), ActNorm(2)),
    "diagonal": lambda: Flow(bases.GaussianMixture((2,), components=3, covariance="diagonal"), ActNorm(2)),
    "ConditionalMixture": lambda: models.mixture(3, components=2, hidden=[4], conditional=True, classes=3),
    "ContextShift": lambda: models.affine(3, conditional=True, classes=3),
    "StandardNormal": lambda: Flow(base=bases.StandardNormal([2]), bijection=ActNorm(2), noisy=(1,)),
    "event_shape keyword": lambda: Flow(event_shape=(2,), bijection=ActNorm(2)),
    "conditional": lambda: models.ffjord(2, hidden=[4], conditional=True, classes=3),
    "couplings": lambda: models.realnvp(2, layers=2, hidden=[4], conditional=True, classes=3, mixing="permutation"),
    **{name: partial(getattr(models, name), 3, **SMALLER.get(name, {})) for name in models.__all__},
    **{
        f"image {name}": partial(getattr(models, name), (1, 8, 8), **SMALLER.get(name, {}))
        for name in ("affine", "glow", "realnvp")
    },
    "image ffjord": partial(models.ffjord, (1, 8, 8), hidden=[3], solver=ode_solver("rk4", steps=2)),
    "Ensemble": lambda: Ensemble(
        [
            flow_of(ActNorm(3)),
            flow_of(ode_block(ode_solver("rk4", steps=3))),
            flow_of(ode_block()),
            flow_of(bijections.Affine(3)),
        ],
        [0.3, 0.1, 0.2, 0.0],
    ),
    "conditional ensemble": lambda: Ensemble(
        [models.realnvp(2, layers=n, hidden=[4], conditional=True, classes=3) for n in (1, 2)], names=["one", "two"]
    ),
    "integer-valued ensemble": lambda: Ensemble(
        [flow_of(bijections.Logit(16), integer_valued=True, levels=16, class_counts=()) for _ in range(2)]
    ),
}


@pytest.fixture
def float32() -> None:
    torch.set_default_dtype(torch.float32)


def perturbed(flow: Flow) -> Flow:
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return flow.eval()


def example_flow(name: str) -> Flow:
    return perturbed(BUILDERS[name]())


def label_of(flow: Flow, n: int) -> Tensor | None:
    return None if flow.classes is None else flow.cycled_labels(n)


def assert_same(flow: Flow, again: Flow) -> None:
    """Checks that both flows give bitwise equal results."""
    assert not again.training
    assert again.event_shape == flow.event_shape
    label = label_of(flow, 5)
    x = flow.quantized(flow.sample(5, label=label))
    torch.manual_seed(1)
    before = flow.log_prob(x, label)
    torch.manual_seed(1)
    assert torch.equal(again.log_prob(x, label), before)
    assert before.isfinite().all()
    drawn = []
    for f in (flow, again):
        torch.manual_seed(2)
        drawn.append(f.sample(3))
    assert torch.equal(*drawn)


numbers = count()


def saved_and_loaded(flow: Flow, tmp_path: Path, **keys: Any) -> Flow:
    path = tmp_path / f"{next(numbers)}.pt"
    flow.save(path)
    assert list(tmp_path.glob(f"*{path.stem}*")) == [path]
    return flowtrain.load(path, **keys)


def test_test_cases_cover_every_public_part() -> None:
    used = {type(m) for make in BUILDERS.values() for m in make().modules()} | {Tableau, parts.TraceRule}
    assert not {name for name, kind in PARTS.items() if not inspect.isabstract(kind)} - {
        name for name, kind in PARTS.items() if kind in used
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUILDERS)
def test_saved_flow_is_bitwise_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    flow = example_flow(name).to(dtype)
    again = saved_and_loaded(flow, tmp_path)
    kinds = [[(n, type(m)) for n, m in f.named_modules()] for f in (flow, again)]
    assert kinds[0] == kinds[1]
    for k, w in flow.state_dict().items():
        assert torch.equal(again.state_dict()[k], w)
        assert again.state_dict()[k].dtype == w.dtype
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in flow.parameters()]
    data = ("integer_valued", "levels", "centered", "noisy", "class_counts", "classes")
    assert [getattr(again, key) for key in data] == [getattr(flow, key) for key in data]
    solvers = [[block.solver.settings for block in f.ode_blocks] for f in (flow, again)]
    assert solvers[0] == solvers[1]
    assert_same(flow, again)
    # saving the loaded flow again changes nothing
    assert_same(flow, saved_and_loaded(again, tmp_path))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f)), copy.copy])
@pytest.mark.parametrize("name", ["couplings", "MLPField", "Preconditioned", "GaussianMixture", "Squeeze"])
def test_copies_can_be_saved(name: str, copied: Callable[[Flow], Flow], tmp_path: Path) -> None:
    flow = example_flow(name)
    assert_same(flow, saved_and_loaded(copied(flow), tmp_path))


def test_modified_copy_is_saved_with_its_changes(tmp_path: Path) -> None:
    flow = example_flow("MLPField")
    other = copy.deepcopy(flow)
    other.bijection.bijections.append(ActNorm(3))
    torch.nn.init.normal_(other.bijection.bijections[1].shift)
    assert_same(other, saved_and_loaded(other, tmp_path))
    assert_same(flow, saved_and_loaded(flow, tmp_path))


@pytest.mark.parametrize("name", ["MLPField", "Preconditioned", "image ffjord", "two fields, two solvers"])
def test_current_solver_is_saved(name: str, tmp_path: Path) -> None:
    flow, solver = example_flow(name), ode_solver("tsit5", rtol=1e-2, control="all", max_nfe=900)
    view = flow.with_solver(solver)
    again = saved_and_loaded(view, tmp_path)
    assert {block.solver.settings["rtol"] for block in again.ode_blocks} == {1e-2}
    assert {block.solver.settings["method"] for block in again.ode_blocks} == {"tsit5"}
    assert_same(view, again)
    assert_same(flow, saved_and_loaded(flow, tmp_path))
    flow.use_solver(solver)
    assert_same(flow, saved_and_loaded(flow, tmp_path))
    # the solver is modified after its construction
    flow.use_solver(solver.replace(rtol=1e-3, atol=1e-2))
    again = saved_and_loaded(flow, tmp_path)
    assert (again.solver.rtol, again.solver.atol) == (1e-3, 1e-2)


def test_each_ode_block_keeps_its_solver(tmp_path: Path) -> None:
    flow = perturbed(flow_of(ode_block(), ode_block()))
    # no constructor was called with these solvers
    flow.ode_blocks[1].solver = ode_solver("rk4", steps=3)
    again = saved_and_loaded(flow, tmp_path)
    assert [block.solver.method for block in again.ode_blocks] == ["dopri5", "rk4"]
    assert_same(flow, again)


def test_replaced_parts_are_saved(tmp_path: Path) -> None:
    flow = example_flow("HalfCoupling")
    flow.bijection.bijections[0].conditioner = net(2, 2)
    flow.base = bases.StudentT(3)
    assert_same(flow, saved_and_loaded(flow.eval(), tmp_path))
    other = flow.with_data(Chain([flow.bijection, bijections.Logit(8)]), levels=8, integer_valued=True)
    assert_same(other, saved_and_loaded(other, tmp_path))


def change_shape(flow: Flow) -> None:
    flow.bijection.bijections[0].log_scale = nn.Parameter(torch.zeros(4))


def add_module(flow: Flow) -> None:
    flow.bijection.extra = nn.Linear(2, 2)


def weight_norm(flow: Flow) -> None:
    nn.utils.parametrizations.weight_norm(flow.bijection.bijections[1].conditioner[0])


def plain_module(flow: Flow) -> None:
    flow.bijection.bijections[1].conditioner = nn.Bilinear(2, 2, 2)


def named_modules(flow: Flow) -> None:
    flow.bijection.bijections[1].conditioner = nn.Sequential()
    flow.bijection.bijections[1].conditioner.add_module("last", nn.Linear(2, 2))


def removed(flow: Flow) -> None:
    del flow.bijection.bijections[1].conditioner


@pytest.mark.parametrize("change", [change_shape, add_module, weight_norm, plain_module, named_modules, removed])
def test_flows_that_cannot_be_rebuilt_are_refused(change: Callable[[Flow], None], tmp_path: Path) -> None:
    flow = flow_of(ActNorm(3), HalfCoupling(3, False, net(2, 2)))
    change(flow)
    path = tmp_path / "flow.pt"
    with pytest.raises(CheckpointError, match="cannot be saved"):
        flow.save(path)
    assert not path.exists()


class Local(Bijection):
    """A class in a test module, which cannot be imported by name."""

    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    inverse = forward


def test_classes_that_cannot_be_imported_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inner(Local):
        pass

    monkeypatch.setattr(Local, "__module__", "__main__")
    for bijection in (Local(), Inner()):
        with pytest.raises(CheckpointError, match=r"mypkg\.py"):
            flow_of(ActNorm(3), bijection).save(tmp_path / "flow.pt")
    assert not list(tmp_path.iterdir())


OWN = """
import torch
from torch import nn
from flowtrain import Flow
from flowtrain.bases import Base, StandardNormal
from flowtrain.bijections import Bijection
from flowtrain.nn import Field, Recorded

class Spin(Field):
    def __init__(self, speed, *more, **options):
        super().__init__()
        self.angle = nn.Parameter(torch.tensor([float(speed), *map(float, more)]))
        self.sign = -1 if options.get("back") else 1

    def forward(self, t, x):
        return self.sign * self.angle[0] * torch.stack([-x[..., 1], x[..., 0]], -1)

    def jvp(self, t, x, tangents):
        return self(t, x), self(t, tangents.expand(len(tangents), *x.shape))

class Net(Recorded, nn.Module):
    def __init__(self, layers, scale):
        super().__init__()
        self.network = nn.Sequential(*layers)
        self.scale = scale

    def forward(self, x, label=None):
        return self.scale * self.network(x)

class Pair(Bijection):
    def __init__(self, inside, order, period=0):
        super().__init__()
        self.parts, self.order = nn.ModuleDict(inside), order

    def forward(self, z, label=None):
        (x, a), (x, b) = [(z, 0), (z, 0)] if not self.order else (self.parts["a"](z), self.parts["b"](z))
        return x, b

    def inverse(self, x, label=None):
        return self.parts["b"].inverse(x)

class Own(Flow):
    def __init__(self, d, bijection):
        super().__init__(StandardNormal(d), bijection)
"""


@pytest.fixture
def mypkg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "mypkg").mkdir()
    (tmp_path / "mypkg/__init__.py").write_text("")
    (tmp_path / "mypkg/parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    import mypkg.parts  # type: ignore[import-not-found]

    yield mypkg.parts
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def test_loading_user_classes_requires_trust(mypkg: Any, tmp_path: Path) -> None:
    pair = mypkg.Pair(
        {"a": ActNorm(2), "b": HalfCoupling(2, False, mypkg.Net([nn.Linear(1, 2)], scale=0.5))}, order=[1], period=10**6
    )
    spin = Continuous(mypkg.Spin(0.3, 1, 2, back=True), ode_solver("rk4", steps=4))
    flow = perturbed(mypkg.Own(2, Chain([spin, pair])))
    flow.save(tmp_path / "own.pt")
    again = flowtrain.load(tmp_path / "own.pt", trust=("mypkg",))
    assert type(again) is mypkg.Own
    assert again.bijection.bijections[0].field.sign == -1
    assert_same(flow, again)
    for trust in ((), ("other",), ("my",), "mypkg.other"):
        with pytest.raises(CheckpointError, match="would run mypkg"):
            flowtrain.load(tmp_path / "own.pt", trust=trust)
    # the object does not keep this argument as a submodule
    hidden = flow_of(ActNorm(2), shape=2)
    hidden.bijection.bijections[0] = mypkg.Pair({"a": ActNorm(2), "b": ActNorm(2)}, order=[nn.Linear(1, 1)])
    with pytest.raises(CheckpointError, match="cannot be saved"):
        hidden.save(tmp_path / "hidden.pt")


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Saves a checkpoint as a run does."""
    config = compose_defaults(["model=ffjord", "model.hidden=[5]", "data.n_val=20", "data.n_test=20", "seed=7"])
    samples = Samples((2,), standardized=True, columns=("a", "b"))
    flow = perturbed(build_flow(config, samples))
    described = {"levels": None, "standardized": True, "columns": ["a", "b"]}
    content = {"config": config, "event_shape": [2], "samples": described, "step": 12, "weights": flow.state_dict()}
    path = tmp_path / "run/checkpoints/best.pt"
    checkpoint.save(path, {**content, "ema": None})
    return path


def test_saved_run_flow_keeps_config_and_sample_spec(run_file: Path, tmp_path: Path) -> None:
    flow, before = flowtrain.load(run_file), checkpoint.load(run_file)
    assert flow.record is not None
    again = saved_and_loaded(copy.deepcopy(flow), tmp_path)
    assert_same(flow, again)
    assert again.record.config == before["config"]
    assert (list(again.record.samples.columns), again.record.step) == (["a", "b"], 12)


def test_saved_run_flow_has_the_current_solver(run_file: Path, tmp_path: Path) -> None:
    flow = flowtrain.load(run_file)
    view = flow.with_solver(flow.solver.replace(rtol=1e-2))
    again = saved_and_loaded(view, tmp_path)
    assert (again.solver.rtol, again.solver.atol) == (1e-2, flow.solver.atol)
    assert again.record.config["model"] == flow.record.config["model"]
    assert_same(view, again)


@pytest.mark.parametrize("change", ["layer", "base", "data", "attribute", "width"])
def test_changed_run_flow_is_saved_as_a_description(change: str, run_file: Path, tmp_path: Path) -> None:
    flow = flowtrain.load(run_file)
    if change == "layer":
        flow.bijection.bijections.append(ActNorm(2).eval())
    elif change == "base":
        flow.base = bases.UniformBox([-99.0, -99.0], [99.0, 99.0])
    elif change == "data":
        flow = flow.with_data(Chain([flow.bijection, bijections.Logit(9)]), levels=9, integer_valued=True).eval()
    elif change == "attribute":
        flow = flow.with_data(flow.bijection, noisy=(1,)).eval()
    else:
        flow.ode_blocks[0].field = parts.MLPField(2, [3]).eval()
    again = saved_and_loaded(flow, tmp_path)
    assert again.record is None
    assert again.noisy == flow.noisy
    assert_same(flow, again)


def test_saving_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, first, second = tmp_path / "flow.pt", example_flow("ActNorm"), example_flow("Affine")
    first.save(path)
    second.save(str(path))
    assert_same(second, flowtrain.load(path))
    assert list(tmp_path.iterdir()) == [path]

    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("flowtrain.training.checkpoint.torch.save", full)
    with pytest.raises(CheckpointError, match="no space left"):
        first.save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert_same(second, flowtrain.load(path))


def test_invalid_save_paths_are_refused(tmp_path: Path) -> None:
    flow = example_flow("ActNorm")
    (tmp_path / "a.pt").mkdir()
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "a.pt", tmp_path / "flow", tmp_path / "flow.onnx"):
        with pytest.raises(ConfigError):
            flow.save(path)
    wrong: list[Any] = [tmp_path / "file/flow.pt", f"{tmp_path}/{'a' * 300}.pt", "a\0.pt", "", None, 5, b"a.pt"]
    for path in wrong:
        with pytest.raises(FlowtrainError):
            flow.save(path)
        with pytest.raises(FlowtrainError):
            flowtrain.load(path)
    flow.save(tmp_path / "new/folder/flow.pt")
    assert_same(flow, flowtrain.load(tmp_path / "new/folder/flow.pt"))


def test_tilde_in_a_save_path_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    flow = example_flow("ActNorm")
    flow.save("~/flow.pt")
    assert_same(flow, flowtrain.load("~/flow.pt"))


def test_saving_and_loading_leave_the_random_state_unchanged(tmp_path: Path) -> None:
    flow = example_flow("realnvp")
    before = torch.get_rng_state()
    saved_and_loaded(flow, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    flow.train()
    flow.save(tmp_path / "training.pt")
    assert flow.training
