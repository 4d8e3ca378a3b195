"""The section Extending of flowtrain/README.md: the files are used as printed, the commands with fewer steps."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers import Run
from helpers.files import normal
from torch import Tensor

from flowtrain.cli.config_files import compose_defaults
from flowtrain.ode import Problem, Tableau, ode_solver
from flowtrain.runs.build import build_data, build_flow, build_objective
from flowtrain.training import checkpoint
from flowtrain.utils.errors import CheckpointError, ConfigError
from flowtrain.utils.files import config_dir

ROOT = Path(__file__).resolve().parents[1]
SECTION = (ROOT / "flowtrain/README.md").read_text().partition("\n## Extending\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, re.S)
FILES = {text.split()[1]: text for _, text in BLOCKS if re.match(r"# (mypkg|conf)/\S+\.(py|yaml)\n", text)}
COMMANDS = [text for language, text in BLOCKS if language == "bash"]
SHORT = [
    "trainer.steps=4",
    "trainer.batch_size=16",
    "trainer.log_every=1",
    "trainer.plot_every=null",
    "data.n_val=20",
    "data.n_test=40",
]


def fast_overrides(line: str) -> list[str]:
    """Returns overrides that make a command fast if it uses the default model."""
    return [] if "model=" in line else ["model.hidden=[8]", "trainer.ema=null"]


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Creates a working directory with the files of the section. Other tests cannot import the package in it."""
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    monkeypatch.setattr(sys, "argv", ["flowtrain", "--config-dir", "conf"])
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mypkg"]:
        del sys.modules[name]


def package_module(name: str) -> ModuleType:
    """Imports a module of the package in the working directory."""
    sys.path.append(str(Path.cwd()))
    return importlib.import_module(f"mypkg.{name}")


def test_readme_section_has_an_example_of_each_group() -> None:
    names = {group: [Path(f).stem for f in FILES if f"conf/{group}/" in f] for group in ("model", "data", "solver")}
    names["regularizer"] = [Path(f).stem for f in FILES if "conf/regularizer/" in f]
    assert all(f"mypkg/{name}.py" in FILES for [name] in names.values())
    assert len(COMMANDS) == len(names)


@pytest.mark.parametrize("commands", COMMANDS, ids=[c.split("=")[0].split()[-1] for c in COMMANDS])
def test_example_commands_run(run: Run, project: Path, commands: str) -> None:
    run_dir = ""
    for line in commands.splitlines():
        command, *arguments = [word.replace("RUN_DIR", run_dir) for word in shlex.split(line, comments=True)]
        resumed = any(a.startswith("resume=") for a in arguments)
        short = ["trainer.steps=6"] if resumed else [*SHORT, *fast_overrides(line)] if command == "flowtrain" else []
        code, out, err = run(command, *arguments, *short)
        assert code == 0, err
        if command == "flowtrain":
            run_dir = out.splitlines()[-1]
    assert json.loads((Path(run_dir) / "result.json").read_text())["n"] == 40
    for command in ("floweval", "flowsample"):
        code, _, err = run(command, f"ckpt={run_dir}", "trust=[mypkg]")
        assert code == 0, err
    code, out, err = run("flowtrain", f"resume={run_dir}", "trust=[mypkg]", "trainer.steps=8")
    assert code == 0, err
    assert json.loads((Path(run_dir) / "result.json").read_text())["steps"] == 8


@pytest.mark.parametrize("d", [1, 2, 5])
def test_likelihood_of_the_example_model_matches_its_jacobian(project: Path, d: int) -> None:
    flow = package_module("sinh_arcsinh").sinh_arcsinh((d,), layers=3)
    for p in flow.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = 2 * torch.randn(7, d)
    z = flow.inverse(x)
    jacobians = torch.stack([torch.autograd.functional.jacobian(lambda r: flow.inverse(r[None])[0], row) for row in x])
    base = -(z.square().sum(1) + d * math.log(2 * math.pi)) / 2
    torch.testing.assert_close(flow.log_prob(x), base + torch.linalg.slogdet(jacobians)[1])
    torch.testing.assert_close(flow.forward(z), x)
    z, log_det = flow.bijection.inverse(x)
    torch.testing.assert_close(flow.bijection.forward(z)[1], -log_det)


@pytest.mark.parametrize("bend", [0.0, 1.0, -2.5])
def test_entropy_of_the_example_data(project: Path, bend: float) -> None:
    data = package_module("banana").Banana(bend=bend, n_val=10, n_test=20_000)
    log_p = data.log_prob(data.test)
    assert abs(-log_p.mean() - data.entropy) < 4 * log_p.std() / len(log_p) ** 0.5
    grid = torch.linspace(-16, 16, 801)
    at = torch.cartesian_prod(grid, 4 * grid)
    assert data.log_prob(at).exp().sum() * (4 * 0.04**2) == pytest.approx(1, abs=1e-6)


def test_convergence_order_of_the_example_solver(project: Path) -> None:
    """dx/dt = -2 t x^2, x(0) = 1: x(1) = 1/2."""
    make = package_module("three_eighths").three_eighths

    def error(steps: int) -> float:
        solver = make(method="three_eighths", steps=steps)
        problem = Problem(lambda t, x: -2 * t * x**2, None, torch.ones(1, 1), 0.0, 1.0)
        return abs(solver.solve(problem).x.item() - 0.5)

    assert math.log2(error(16) / error(32)) == pytest.approx(4, abs=0.2)
    assert make(method="three_eighths", steps=3).describe()["method"] == "three_eighths"
    with pytest.raises(ConfigError, match="unknown key nope"):
        make(method="three_eighths", steps=3, nope=1)
    with pytest.raises(ConfigError, match="tableau=rk4"):
        ode_solver("mine", tableau="rk4", steps=3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="adjoint"):
        make(method="three_eighths", steps=3, gradient="adjoint")


@pytest.mark.parametrize(
    ("change", "words"),
    [({"b": (0.5, 0.4)}, "b must sum"), ({"a": ((0.3,),)}, "must sum"), ({"c": (0, 1, 1)}, "b has 2 numbers")],
)
def test_invalid_tableau_is_refused(change: dict[str, tuple[float, ...]], words: str) -> None:
    heun = {"order": 2, "c": (0, 1), "a": ((1,),), "b": (0.5, 0.5)}
    with pytest.raises(ConfigError, match=words):
        Tableau(**{**heun, **change})  # type: ignore[arg-type]


def test_value_of_the_example_regularizer(run: Run, project: Path) -> None:
    arguments = ["regularizer=speed_limit", "regularizer.limit=1e-3", *fast_overrides("")]
    code, out, err = run("flowtrain", "--config-dir", "conf", *arguments, *SHORT)
    assert code == 0, err
    rows = [json.loads(line) for line in (Path(out.splitlines()[-1]) / "metrics.jsonl").read_text().splitlines()]
    terms = [row["speeding"] for row in rows if row["split"] == "train"]
    assert all(math.isfinite(term) and term >= 0 for term in terms)
    assert terms[-1] > 0
    # flow matching integrates no paths
    code, _, err = run("flowtrain", "--config-dir", "conf", "regularizer=speed_limit", "objective=flow_matching")
    assert code == 2
    assert [name for name in ("acceleration", "speeding", "end_time") if name not in err] == []


def test_loss_includes_the_example_regularizer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path of a field with constant velocity u has the penalty max(0, |u|^2 - c^2)."""
    sys.path.append(str(project))
    config = compose_defaults(["regularizer=speed_limit", "regularizer.limit=2.0", "data.n_val=10", "data.n_test=10"])
    flow = build_flow(config, build_data(config).samples)
    u = torch.tensor([3.0, -1.0])

    class Constant(torch.nn.Module):
        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return u.expand_as(x) + 0 * x

    flow.ode_blocks[0].field = Constant()
    loss, terms = build_objective(config, flow).train()(torch.randn(5, 2))
    assert terms["speeding"].item() == pytest.approx(10 - 4)
    assert loss.item() == pytest.approx(terms["nll"].item() + config["regularizer"]["speeding"] * 6)


def test_untrusted_package_is_not_imported(run: Run, project: Path) -> None:
    code, out, err = run("flowtrain", "--config-dir", "conf", "model=sinh_arcsinh", *SHORT)
    assert code == 0, err
    run_dir = out.splitlines()[-1]
    for name in [name for name in sys.modules if name.startswith("mypkg")]:
        del sys.modules[name]
    sys.path.remove(str(project))
    for command in ("floweval", "flowsample"):
        code, _, err = run(command, f"ckpt={run_dir}")
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert "name it: trust=[mypkg]" in err
    code, _, err = run("flowtrain", f"resume={run_dir}", "trainer.steps=8")
    assert code == 2
    assert "mypkg" not in sys.modules
    assert str(project) not in sys.path
    with pytest.raises(CheckpointError, match="trust"):
        importlib.import_module("flowtrain").load(run_dir)
    # trust in another package does not permit the import of this package
    code, _, err = run("floweval", f"ckpt={run_dir}", "trust=[torch]")
    assert code == 2
    assert "mypkg" not in sys.modules


@pytest.mark.parametrize("trust", ["trust=mypkg", "trust=[torch,mypkg]"])
def test_every_command_takes_trust_as_a_name_or_a_list(run: Run, project: Path, trust: str) -> None:
    short = [*SHORT, "model.layers=2"]
    code, out, err = run("flowtrain", "--config-dir", "conf", "model=sinh_arcsinh", *short)
    assert code == 0, err
    run_dir = out.splitlines()[-1]
    commands = [
        ["floweval", f"ckpt={run_dir}"],
        ["floweval", f"ckpt=[{run_dir},{run_dir}]", "weights=equal", "out=e.json"],
        ["flowsample", f"ckpt={run_dir}", "n=3"],
        ["flowexport", f"ckpt={run_dir}", "out=flow.pt2"],
        ["flowtrain", "--config-dir", "conf", f"from={run_dir}", *SHORT[:4], "hydra.run.dir=again"],
        ["flowtrain", "--config-dir", "conf", "-m", f"from={run_dir}", *SHORT[:4], "seed=1", "hydra.sweep.dir=sweep"],
        ["flowtrain", f"resume={run_dir}", "trainer.steps=8"],
    ]
    for command, *arguments in commands:
        code, _, err = run(command, trust, *arguments)
        assert code == 0, (command, arguments, err)


def test_every_command_finds_user_configs(run: Run, project: Path) -> None:
    """Every command finds the user's configs, also with a checkpoint. Help and error messages list them."""
    own = ("--config-dir", "conf")
    code, out, err = run("flowtrain", *own, "data=banana", "model=affine", *SHORT)
    assert code == 0, err
    run_dir = out.splitlines()[-1]
    for arguments in (["--config-dir=conf", "data=banana", "data.bend=2"], ["-cd", "conf", "solver=three_eighths"]):
        code, _, err = run("floweval", f"ckpt={run_dir}", *arguments, "trust=mypkg")
        assert code == 0, err
    code, out, err = run("flowtrain", *own, f"from={run_dir}", "trust=[mypkg]", *SHORT[:4], "hydra.run.dir=again")
    assert code == 0, err
    assert checkpoint.load(project / "again/checkpoints/last.pt")["config"]["data"]["name"] == "banana"
    code, out, _ = run("flowtrain", *own, "model=sinh_arcsinh", "--help", "model")
    assert code == 0
    assert re.search(r"\* sinh_arcsinh +Sinh-arcsinh bends of each column between linear maps\.", out)
    assert re.search(r"  model\.layers=8 +bends, and as many linear maps", out)
    for arguments, words in (
        (["model=sinh_arcsinh", "model.nope=1"], "keys of model are layers"),
        (["model=nope"], "sinh_arcsinh"),
        (["recipe=nope"], "ffjord_rings"),
    ):
        code, _, err = run("flowtrain", *own, *arguments)
        assert (code, len(err.strip().splitlines())) == (2, 1)
        assert words in err
    for flags in (["--config-dir", "nowhere"], ["--config-dir"]):
        code, _, err = run("flowtrain", *flags)
        assert (code, len(err.strip().splitlines())) == (2, 1)
    # the config folder may have the name of a group
    (project / "conf").rename(project / "model")
    code, out, err = run("flowtrain", "--config-dir", "model", "model=sinh_arcsinh", "--cfg", "job")
    assert code == 0, err
    assert "mypkg.sinh_arcsinh.sinh_arcsinh" in out


def test_installed_commands_find_the_package(project: Path) -> None:
    """Installed commands run in new processes, whose import path does not contain the working directory."""
    script = Path(sys.executable).with_name("flowtrain")
    if not script.exists():
        pytest.skip("not installed")
    # data with one column have the fewest figures
    np.save(project / "x.npy", normal(60, 1))
    given = [*SHORT[:-2], "trainer.steps=2", "data=array", "data.path=x.npy", "hydra.run.dir=here"]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    arguments = [script, "--config-dir", "conf", "model=sinh_arcsinh", *given]
    done = subprocess.run(arguments, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(project / "here")


@pytest.mark.slow
def test_checkout_extension_needs_neither_flag_nor_trust(tmp_path: Path) -> None:
    shutil.copytree(Path(importlib.import_module("flowtrain").__file__ or "").parent, tmp_path / "flowtrain")
    shutil.copytree(config_dir(), tmp_path / "configs", dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "flowtrain/configs", ignore_errors=True)
    (tmp_path / "flowtrain/models/sinh_arcsinh.py").write_text(FILES["mypkg/sinh_arcsinh.py"])
    config = FILES["conf/model/sinh_arcsinh.yaml"].replace("mypkg.", "flowtrain.models.")
    (tmp_path / "configs/model/sinh_arcsinh.yaml").write_text(config)
    commands = f"""
import sys
import pytest
from flowtrain.cli import evaluate, train
from helpers.figures import skip_figures
skip_figures(pytest.MonkeyPatch())
for main, arguments in (train.main, ["model=sinh_arcsinh", *{[*SHORT, "trainer.steps=2"]}]), (evaluate.main, []):
    sys.argv[1:] = [*arguments, "hydra.run.dir=here"] if arguments else ["ckpt=here"]
    try:
        main()
    except SystemExit as e:
        assert not e.code, e.code
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-c", commands], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "here/eval.json").exists()
