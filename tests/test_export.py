"""`Flow.export`: exported programs agree with the flow in a process without flowtrain, or no file is written."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import OnlyPrograms
from helpers.flows import perturbed
from torch import Tensor, nn

from flowtrain import export
from flowtrain.bases import Base, GaussianMixture, StudentT, UniformBox
from flowtrain.bijections.base import Bijection, Chain
from flowtrain.bijections.continuous import Continuous
from flowtrain.bijections.linear import Affine, InvertibleLinear
from flowtrain.bijections.logit import Logit
from flowtrain.bijections.scale import ActNorm, Standardize
from flowtrain.bijections.table_chain import TableChain
from flowtrain.data.context import CATEGORICAL, ContextColumn
from flowtrain.flow import Flow
from flowtrain.models.ffjord import ffjord
from flowtrain.models.glow import glow
from flowtrain.models.maf import maf
from flowtrain.models.mixture import mixture
from flowtrain.models.nsf import nsf
from flowtrain.models.realnvp import realnvp
from flowtrain.nn.divergence import TraceRule
from flowtrain.ode import ode_solver
from flowtrain.utils.errors import ConfigError, ExportError, FlowtrainError

pytestmark = pytest.mark.usefixtures("float32")

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(find_spec(name) is None for name in PACKAGES), reason="needs the extra onnx: pip install 'flowtrain[onnx]'"
)
# conversion to ONNX takes seconds
SLOW_ONNX = ["pt2", pytest.param("onnx", marks=[needs_onnx, pytest.mark.slow])]
ROWS = 1000

RUN = """
import sys

import numpy as np

folder, name = sys.argv[1:]
inputs = np.load(f"{folder}/inputs.npz")
for program, first in (("", "x"), (".inverse", "x"), (".sample", "z")):
    path = f"{folder}/{name}".replace(".", f"{program}.")
    rows = inputs[first]
    if name.endswith(".pt2"):
        import torch

        run = torch.export.load(path).module()
        found = {n: run(torch.tensor(rows[:n])).detach().numpy() for n in (1, 2, 7, len(rows))}
    else:
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        (given,) = session.get_inputs()
        found = {n: session.run(None, {given.name: rows[:n]})[0] for n in (1, 2, 7, len(rows))}
    np.savez(f"{folder}/found{program}.npz", **{str(n): y for n, y in found.items()})
assert "flowtrain" not in sys.modules
"""


def randomized(flow: Flow, std: float = 0.2) -> Flow:
    perturbed(flow.bijection, std)
    return flow.eval()


def with_data(flow: Flow, *bijections: Bijection, **data: Any) -> Flow:
    return flow.with_data(Chain([flow.bijection, *bijections]), **data).eval()


def fixed_step_flow(event_shape: tuple[int, ...] = (2,), method: str = "rk4", steps: int = 2, **keys: Any) -> Flow:
    return randomized(ffjord(event_shape, solver=ode_solver(method, steps=steps), hidden=[6], **keys))


FLOWS: dict[str, Callable[[], Flow]] = {
    "realnvp": lambda: randomized(realnvp((2,), layers=2, hidden=[8])),
    "glow": lambda: with_data(
        randomized(glow((1, 4, 4), steps=1, hidden=[4], scales=1, coupling="spline", bins=3)),
        Logit(16, 0.05),
        integer_valued=True,
        levels=16,
    ),
    "ffjord": fixed_step_flow,
    "nsf": lambda: randomized(nsf((3,), layers=2, hidden=[8], bins=3, mixing="linear")),
    "maf": lambda: randomized(maf((3,), layers=2, hidden=[8], mixing="linear", df=5.0)),
}


def check_without_flowtrain(flow: Flow, folder: Path, name: str) -> None:
    """Checks that the programs agree with the flow on 1,000 rows, in a process that does not import flowtrain."""
    with torch.no_grad():
        x, z = flow.sample(ROWS), flow.base.sample(ROWS, like=flow.like)
        wanted = {"": flow.log_prob(x), ".inverse": flow.inverse(x), ".sample": flow(z)}
    np.savez(folder / "inputs.npz", x=x.numpy(), z=z.numpy())
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, str(folder), name], capture_output=True, text=True, check=False, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    for program, y in wanted.items():
        found = np.load(folder / f"found{program}.npz")
        for n in found:
            assert found[n].dtype == y.numpy().dtype
            np.testing.assert_allclose(found[n], y[: int(n)].numpy(), rtol=1e-5, atol=1e-4)


def metadata_in(path: Path) -> Any:
    """Returns the metadata that the file of a program stores."""
    if path.suffix == ".pt2":
        extra = {export.METADATA: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[export.METADATA])
    import onnx

    (entry,) = onnx.load(str(path)).metadata_props
    return json.loads(entry.value)


class Inverse(nn.Module):
    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow.bijection.inverse(x)


@pytest.mark.parametrize("d", [1, 3])
def test_linear_maps_accept_any_number_of_rows(d: int) -> None:
    flow = randomized(Flow((d,), TableChain([InvertibleLinear(d), ActNorm(d)])))
    with torch.no_grad():
        shapes = {"x": {0: torch.export.Dim("batch")}}
        program = torch.export.export(Inverse(flow), (torch.randn(5, d),), dynamic_shapes=shapes, strict=False).module()
        for rows in (1, 2, 7):
            x = torch.randn(rows, d)
            torch.testing.assert_close(program(x), flow.bijection.inverse(x))


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        *(pytest.param(name, "pt2", marks=pytest.mark.slow) for name in FLOWS),
        *(pytest.param(name, "onnx", marks=[needs_onnx, pytest.mark.slow]) for name in FLOWS),
    ],
)
def test_programs_agree_without_importing_flowtrain(name: str, ending: str, tmp_path: Path) -> None:
    flow = FLOWS[name]()
    state, weights = torch.random.get_rng_state(), {k: v.clone() for k, v in flow.state_dict().items()}
    exported = flow.export(tmp_path / f"flow.{ending}")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(v, weights[k]) for k, v in flow.state_dict().items())
    assert all(m["max_difference"] <= 1e-4 for m in exported.metadata.values())
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in exported.paths.values())
    for program, path in exported.paths.items():
        found = metadata_in(path)
        assert found == exported.metadata[program]
        assert found["program"] == program
        assert found["event_shape"] == list(flow.event_shape)
        # programs contain no paths of this machine
        assert str(Path(export.__file__).parent).encode() not in path.read_bytes()
    check_without_flowtrain(flow, tmp_path, f"flow.{ending}")


@pytest.mark.parametrize("ending", SLOW_ONNX)
@pytest.mark.parametrize("model", [realnvp, mixture])
def test_label_is_a_second_program_input(model: Callable[..., Flow], ending: str, tmp_path: Path) -> None:
    small = {"components": 2} if model is mixture else {"layers": 1}
    flow = randomized(model((2,), hidden=[8], conditional=True, classes=3, **small))
    perturbed(flow.base)
    found, label = exported_programs(flow, tmp_path, ending=ending), torch.arange(ROWS) % 3
    with torch.no_grad():
        x, z = flow.sample(ROWS, label=label), flow.base.given(label).sample(ROWS, like=flow.like)
        for name, given, wanted in (("log_prob", x, flow.log_prob), ("inverse", x, flow.inverse), ("sample", z, flow)):
            torch.testing.assert_close(found[name](given, label), wanted(given, label), rtol=1e-5, atol=1e-4)
            assert not torch.allclose(found[name](given, 2 - label), wanted(given, label), atol=1e-2)


@pytest.mark.parametrize("ending", SLOW_ONNX)
def test_context_is_a_second_program_input(ending: str, tmp_path: Path) -> None:
    columns = [ContextColumn("m", mean=5.0, std=2.0), ContextColumn("k", CATEGORICAL, categories=("blue", "red"))]
    flow = randomized(realnvp(2, layers=1, hidden=[8], context=3)).with_kind(context=tuple(columns))
    context = torch.tensor([[4.0, 1.0], [7.0, 0.0]]).double().repeat(ROWS, 1)[:ROWS]
    found, other = exported_programs(flow, tmp_path, ending=ending), context.flip(0)
    with torch.no_grad():
        x, z = flow.sample(ROWS, context=context), flow.base.sample(ROWS, like=flow.like)
        for name, given, wanted in (("log_prob", x, flow.log_prob), ("inverse", x, flow.inverse), ("sample", z, flow)):
            torch.testing.assert_close(found[name](given, context), wanted(given, context), rtol=1e-5, atol=1e-4)
            assert not torch.allclose(found[name](given, other), wanted(given, context), atol=1e-2)


def exported_programs(flow: Flow, folder: Path, *given: Any, ending: str = "pt2", **keys: Any) -> dict[str, Any]:
    """Exports the flow and returns its programs and the metadata of log_prob."""
    exported = flow.export(folder / f"flow.{ending}", *given, **keys)
    found: dict[str, Any] = {
        name: export.checked_path(path)[1].loaded(path.read_bytes()) for name, path in exported.paths.items()
    }
    return {**found, "metadata": exported.metadata["log_prob"]}


@pytest.mark.slow
def test_labels_reach_the_field_of_a_continuous_flow(tmp_path: Path) -> None:
    flow = fixed_step_flow(conditional=True, classes=3)
    for block in flow.ode_blocks:
        nn.init.normal_(block.field.embedding)  # type: ignore[arg-type, union-attr]
    found = exported_programs(flow, tmp_path)
    x, label = torch.randn(5, 2), torch.tensor([0, 1, 2, 1, 0])
    torch.testing.assert_close(found["log_prob"](x, label), flow.log_prob(x, label).detach(), rtol=1e-5, atol=1e-5)


class Laplace(Base):
    def log_prob(self, z: Tensor) -> Tensor:
        return -z.abs().flatten(1).sum(1) - z[0].numel() * np.log(2.0)

    def rsample(self, n: int, generator: Any = None, temperature: float = 1.0, like: Any = None) -> Tensor:
        u = torch.rand(n, *self.event_shape, generator=generator) - 0.5
        return -temperature * u.sign() * (1 - 2 * u.abs()).log()

    def to_uniform(self, z: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize("ending", SLOW_ONNX)
@pytest.mark.parametrize(
    "base",
    [
        GaussianMixture(2, 3),
        GaussianMixture(2, 3, covariance="diagonal"),
        StudentT((2,), df=3.0),
        UniformBox([-1.0, -2.0], [1.0, 2.0]),
        Laplace((2,)),
    ],
    ids=lambda base: type(base).__name__,
)
def test_every_base_can_be_exported(base: Base, ending: str, tmp_path: Path, only_programs: OnlyPrograms) -> None:
    only_programs("log_prob")
    if isinstance(base, GaussianMixture):
        with torch.no_grad():
            for p in base.parameters():
                p.add_(0.3 * torch.randn_like(p))
    flow = randomized(Flow(base, Affine(2)))
    found = exported_programs(flow, tmp_path, ending=ending)
    # rows inside and outside the box
    x = torch.cat([flow.sample(20), 100 * torch.randn(5, 2)])
    torch.testing.assert_close(found["log_prob"](x), flow.log_prob(x).detach(), rtol=1e-5, atol=1e-5)
    described = found["metadata"]["base"]
    assert described["class"] == type(base).__name__
    assert {k: torch.tensor(v) for k, v in described["parameters"].items()}.keys() == base.state_dict().keys()
    for key, value in base.state_dict().items():
        torch.testing.assert_close(torch.tensor(described["parameters"][key]), value)


@pytest.mark.parametrize("ending", SLOW_ONNX)
@pytest.mark.slow
def test_large_offsets_stay_in_float64(ending: str, tmp_path: Path, only_programs: OnlyPrograms) -> None:
    only_programs("log_prob", "sample")
    standardize = Standardize((2,), offset=True)
    standardize.fit(torch.tensor([1e9, 1.0]), torch.tensor([3600.0, 1.0]), torch.tensor([1e9, 0.0]))
    flow = with_data(randomized(realnvp((2,), layers=2, hidden=[8])), standardize, centered=True)
    found = exported_programs(flow, tmp_path, ending=ending)
    x = flow.sample(10)
    assert x.dtype == torch.float64
    torch.testing.assert_close(found["log_prob"](x), flow.log_prob(x).detach(), rtol=0, atol=1e-4, check_dtype=False)
    torch.testing.assert_close(found["sample"](torch.zeros(1, 2)), flow(torch.zeros(1, 2)).detach(), rtol=0, atol=1e-2)


@pytest.mark.slow
def test_log_prob_outside_the_levels_is_nan(tmp_path: Path) -> None:
    flow = FLOWS["glow"]()
    found = exported_programs(flow, tmp_path)
    x = flow.sample(3)
    x[0, 0, 0, 0], x[1, 0, 0, 0] = -3.0, 20.0
    assert found["log_prob"](x).isnan().tolist() == [True, True, False]
    assert found["metadata"]["levels"] == 16
    assert any("x + u" in note for note in found["metadata"]["notes"])


@pytest.mark.slow
def test_integer_example_rows_are_accepted(tmp_path: Path) -> None:
    x = torch.randint(0, 16, (1, 1, 4, 4))
    found = exported_programs(FLOWS["glow"](), tmp_path, x)
    assert (found["metadata"]["rows"], found["metadata"]["rows_from"]) == (1, "given")


@pytest.mark.slow
def test_bias_equals_the_fixed_step_error_of_the_program(tmp_path: Path, only_programs: OnlyPrograms) -> None:
    only_programs("log_prob")
    # with coarse steps the bias is far above rounding, and the program must reproduce it
    flow = randomized(ffjord((2,), solver=ode_solver("dopri5"), hidden=[6]), 0.8)
    x = flow.sample(200)
    solver = flow.train().solver
    found = exported_programs(flow, tmp_path, x, solver="euler", steps=3)
    assert flow.training
    assert flow.solver is solver
    assert all(p.requires_grad for p in flow.parameters())
    flow.eval()
    bias = found["metadata"]["bias"]
    exact = flow.double().with_solver(ode_solver("dopri5", rtol=1e-9))
    difference = found["log_prob"](x).double() - exact.log_prob(x.double()).detach()
    assert bias["rms"] > 1e-3
    assert bias["mean"] == pytest.approx(float(difference.mean()), rel=1e-2, abs=1e-5)
    assert bias["max"] == pytest.approx(float(difference.abs().max()), rel=1e-2)
    assert bias["rows"] == 200
    assert found["metadata"]["solver"] == {"method": "euler", "steps": 3}


def test_fewest_steps_with_a_small_bias_are_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    flow = randomized(ffjord((2,), solver=ode_solver("dopri5"), hidden=[6]), 0.8)
    x = flow.sample(50)
    rms = {n: export.with_fixed_steps(flow, x, steps=n)[1]["bias"]["rms"] for n in (1, 2, 4)}
    assert rms[1] > rms[2] > rms[4]
    monkeypatch.setattr(export, "STEPS", (1, 2, 4))
    monkeypatch.setattr(export, "LEAST_BIAS", rms[2] * 1.01)
    assert export.with_fixed_steps(flow, x)[1]["solver"]["steps"] == 2
    monkeypatch.setattr(export, "LEAST_BIAS", rms[4] / 10)
    assert export.with_fixed_steps(flow, x)[1]["solver"]["steps"] == 4


def test_fixed_step_solver_of_the_flow_is_kept() -> None:
    flow = fixed_step_flow(method="midpoint", steps=5)
    x = flow.sample(5)
    for given, wanted in (
        ({}, ("midpoint", 5)),
        ({"steps": 2}, ("midpoint", 2)),
        ({"solver": "euler", "steps": 2}, ("euler", 2)),
    ):
        found = export.with_fixed_steps(flow, x, **given)[1]["solver"]  # type: ignore[arg-type]
        assert (found["method"], found["steps"]) == wanted


@pytest.mark.slow
def test_hutchinson_program_uses_the_probes_of_a_single_row(tmp_path: Path) -> None:
    flow = fixed_step_flow((3,), eval_trace="hutchinson", noise_samples=2)
    found = exported_programs(flow, tmp_path)
    x = flow.sample(5)
    one_by_one = torch.cat([flow.log_prob(row[None]) for row in x]).detach()
    torch.testing.assert_close(found["log_prob"](x), one_by_one, rtol=1e-5, atol=1e-5)
    assert found["metadata"]["trace_probes"] == 2


def test_large_samples_use_estimated_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    # the first scale has 144 elements. The second has 72, so its trace is exact
    flow = fixed_step_flow((1, 12, 12), steps=1, scales=1)
    x = flow.sample(3)
    monkeypatch.setitem(export.TIGHT, "rtol", 1e-2)
    steps, about = export.with_fixed_steps(flow, x)
    torch.testing.assert_close(steps.log_prob(x), torch.cat([flow.log_prob(row[None]) for row in x]))
    assert about["trace_probes"] == 1


def test_program_that_differs_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only_programs: OnlyPrograms
) -> None:
    only_programs("log_prob", "sample")
    flow = randomized(Flow((2,), Affine(2)))
    (tmp_path / "flow.pt2").write_text("old")
    forward = export._Sample.forward
    monkeypatch.setattr(export._Sample, "forward", lambda self, z, label=None: forward(self, z, label) + 3e-4)
    with pytest.raises(ExportError, match="sample"):
        flow.export(tmp_path / "flow.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["flow.pt2"]
    assert (tmp_path / "flow.pt2").read_text() == "old"
    exported = flow.export(tmp_path / "flow.pt2", tolerance=1e-2)
    # the table contains the measured difference and the tolerance
    line = next(line for line in exported.table().splitlines() if line.startswith("sample"))
    difference, tolerance = (float(number) for number in re.findall(r"[\d.]+e-\d+", line)[:2])
    assert difference == pytest.approx(exported.metadata["sample"]["max_difference"], rel=0.1)
    assert tolerance == exported.metadata["sample"]["tolerance"] == 1e-2


@torch.no_grad()
def test_rounding_is_the_difference_from_the_flow_in_float64() -> None:
    flow = randomized(Flow((3,), Affine(3)))
    x = 100 * torch.randn(50, 3)
    log_prob, *_ = export._tasks(flow, export._rows_of(flow, x, None, "given"))
    affine, rows = copy.deepcopy(flow.bijection).double(), log_prob.inputs["x"]
    exact = torch.distributions.MultivariateNormal(affine.mean, scale_tril=affine.factor()).log_prob(rows.double())
    expected = (exact - flow.log_prob(rows)).abs().max().item()
    assert log_prob.rounding() == pytest.approx(expected, rel=1e-6)
    assert expected > 1e-4


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_non_finite_program_is_not_written(wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = export._LogProb.forward
    monkeypatch.setattr(export._LogProb, "forward", lambda self, x: torch.where(x[:, 0] > 1, wrong, forward(self, x)))
    with pytest.raises(ExportError, match="finite for different rows"):
        randomized(Flow((2,), Affine(2))).export(tmp_path / "flow.pt2")
    assert not list(tmp_path.iterdir())


class UsesLen(Bijection):
    def forward(self, z: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z, z.new_zeros(len(z))

    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x, x.new_zeros(len(x))


class LooksAtValues(UsesLen):
    def inverse(self, x: Tensor, label: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return (x if x.sum() > 0 else -x), x.new_zeros(x.shape[0])


@pytest.mark.parametrize("bijection", [UsesLen(), LooksAtValues()])
def test_untraceable_code_is_refused(bijection: Bijection, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="len"):
        Flow((2,), bijection).export(tmp_path / "flow.pt2")
    assert not list(tmp_path.iterdir())


class Unknown(nn.Module):
    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return -x


def test_invalid_export_arguments_are_refused(tmp_path: Path) -> None:
    flow, continuous = FLOWS["realnvp"](), fixed_step_flow()
    with pytest.raises(ConfigError, match=r"\.pt2"):
        flow.export(tmp_path / "flow.txt")
    (tmp_path / "there.sample.pt2").mkdir()
    with pytest.raises(ConfigError, match="directory"):
        flow.export(tmp_path / "there.pt2")
    (tmp_path / "there.sample.pt2").rmdir()
    with pytest.raises(ConfigError, match="no ODE"):
        flow.export(tmp_path / "flow.pt2", steps=3)
    with pytest.raises(ConfigError, match="fixed steps"):
        continuous.export(tmp_path / "flow.pt2", solver="dopri5")
    with pytest.raises(ConfigError, match="steps=0"):
        continuous.export(tmp_path / "flow.pt2", steps=0)
    with pytest.raises(FlowtrainError, match="shape"):
        flow.export(tmp_path / "flow.pt2", torch.zeros(3, 5))
    with pytest.raises(FlowtrainError, match="no rows"):
        flow.export(tmp_path / "flow.pt2", torch.full((3, 2), torch.nan))
    with pytest.raises(FlowtrainError, match="not conditional"):
        flow.export(tmp_path / "flow.pt2", torch.zeros(3, 2), 1)
    with pytest.raises(ExportError, match="Unknown"):
        Flow((2,), Continuous(Unknown(), ode_solver("dopri5"), TraceRule())).export(tmp_path / "flow.pt2")
    assert not list(tmp_path.iterdir())


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"flowtrain\[onnx\]"):
        FLOWS["realnvp"]().export(tmp_path / "flow.onnx")
