"""`flowsample`: draws samples from a checkpoint, animates them, or measures their quality by solver steps."""

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowtrain.cli.load_run import LoadedRun, load_run, set_name
from flowtrain.cli.output_files import check_outputs, written_as
from flowtrain.cli.sample import LOG_WEIGHT
from flowtrain.cli.sample_weights import draw_weighted, has_target, target_of, weights_path
from flowtrain.data.base import Dataset, Samples, changes
from flowtrain.data.context import context_text, context_values, example_of
from flowtrain.data.tables.context_file import read_context
from flowtrain.data.tables.output import NAMED, check_can_write, named_columns, write_columns
from flowtrain.data.targets.base import TargetData
from flowtrain.evaluation import check_fits, roundtrip_error, rows_of_checks
from flowtrain.evaluation.log_likelihood import check_samples
from flowtrain.evaluation.sample_quality import quality
from flowtrain.flow import Density
from flowtrain.plotting.animation import KINDS, can_write_mp4, check_writable
from flowtrain.plotting.evaluation_figures import Distances, draw_quality
from flowtrain.plotting.pictures import draw
from flowtrain.plotting.target_pictures import as_data
from flowtrain.plotting.transport_pictures import animate, check_animated
from flowtrain.runs.compose import read_yaml
from flowtrain.utils.arguments import flag, number, shortened, whole
from flowtrain.utils.errors import ConfigError, DataError
from flowtrain.utils.files import write_json, write_npy
from flowtrain.utils.process import own_settings
from flowtrain.utils.status import status

log = logging.getLogger("flowtrain")


def report_quality(own: Mapping[str, Any], overrides: Sequence[str], seed: int) -> int:
    """Compares samples by several numbers of steps with test data: a table, JSON and a figure. Returns the exit code.

    Raises:
        ConfigError: options that are not used with quality, or numbers of steps that are not whole numbers.
    """
    unused = [key for key in ("n", "label", "context") if own[key] is not None] + ["temperature"] * (
        own["temperature"] != 1.0
    )
    if unused:
        raise ConfigError(
            f"{unused[0]}: not used with quality, which draws as many samples as there are rows; leave this option out"
        )
    given = written_as("out", own["out"], ".json")
    steps = own["quality"]
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"quality={steps}: give a list of numbers of steps, as in [1,2,4,8]")
    steps = [whole(f"quality[{i}]", k) for i, k in enumerate(steps)]
    loaded_run = load_run(own, overrides)
    if has_target(loaded_run):
        raise ConfigError(
            "quality compares samples with test data, but this run has a target instead of data; use floweval, which "
            "gives the effective sample size, also with other solvers, such as solver=euler solver.steps=4"
        )
    flow = loaded_run.single_flow("quality", "flowsample {} quality=[1,2,4,8]")
    name = set_name(loaded_run, "test", overrides)
    out = given or loaded_run.run_dir / f"quality{name and f'-{name}'}.json"
    picture = out.with_suffix(".png") if given else out.parent / f"plots/quality{name and f'-{name}'}.png"
    options = loaded_run.plot_options
    check_outputs([out, *options.files(picture)], loaded_run.inputs)
    with status("reading the data"):
        data = loaded_run.build()
    if change := changes(loaded_run.samples.record, data.record, ["val", "test"], samples_only=True):
        log.warning("since the run was trained, %s: the samples may be compared with training rows", change)
    with status("comparing samples with the data"):
        found = quality(flow, data, steps, seed)
    write_json(out, found.to_dict())
    lines: dict[str, Distances] = {}
    for row in found.rows:
        line = lines.setdefault(row.method, Distances([], [], []))
        line.nfe.append(row.nfe)
        line.values.append(row.sliced_wasserstein)
        line.errors.append(row.stderr)
    exact = (found.exact.nfe, found.exact.sliced_wasserstein, found.exact.stderr)
    title = loaded_run.titled("sample quality by NFE")
    with status("drawing quality"):
        draw_quality(
            picture, lines=lines, exact=exact, data=(found.data, found.data_stderr), title=title, options=options
        )
    print(f"{found.table()}\nwritten to {out}, picture in {_listed(options.files(picture))}")
    return 0


def write_animation(
    own: Mapping[str, Any],
    overrides: Sequence[str],
    n: int | None,
    seed: int,
    temperature: float,
    label: int | None,
    context: Any,
) -> int:
    """Writes an animation of n samples from the base to the data. Returns the exit code.

    For two columns, the animation shows the density beside the samples.

    Args:
        context: one context, see `contexts_of`. None: a typical context of the data.

    Raises:
        ConfigError: a flow that cannot be animated, a file of contexts, or a file format that cannot be written here.
        DataError: the data, which determine the limits of the axes, cannot be read.
        FlowtrainError: a label that the flow does not have.
        NonFiniteError: samples that are not finite. No file is written.
    """
    given = written_as("out", own["out"], *KINDS)
    if given is not None:
        check_writable(given)
    loaded_run = load_run(own, overrides)
    flow = loaded_run.single_flow("animate=true", "flowsample {} animate=true")
    check_animated(flow, n)
    # a wrong label is refused before anything is read
    if label is not None:
        flow.check_label(label)
    if isinstance(context, str):
        raise ConfigError("animate=true shows a single context: give one by names, as in 'context={mass: 1.5}'")
    contexts = None if context is None and label is None else contexts_of(flow, context, label)
    out = loaded_run.run_dir / "animation.gif"
    paths = [given] if given else [out, *([out.with_suffix(".mp4")] if can_write_mp4() else [])]
    check_outputs(paths, loaded_run.inputs)
    with status("reading the data"):
        data = loaded_run.build()
    check_fits(flow, data)
    if isinstance(data, TargetData):
        data = as_data(flow, data.target)
    words = "" if label is None else f"class {label}"
    title = loaded_run.titled(words if contexts is None else context_text(flow.context, contexts[0].tolist()))
    options = loaded_run.plot_options
    animate(
        flow,
        data,
        paths,
        title,
        n=n,
        seed=seed,
        temperature=temperature,
        label=label,
        options=options,
        context=contexts,
    )
    print("\n".join(f"written to {path}" for path in paths))
    return 0


@own_settings(torch.device("cpu"))
def run(own: dict[str, Any], overrides: Sequence[str]) -> int:
    """Runs the command. Returns the exit code.

    Args:
        own: the values of the options of the command.
        overrides: overrides of the saved config.
    """
    own = {**own, "context": _as_mapping(own["context"])}
    seed = whole("seed", own["seed"], least=0)
    temperature = number("temperature", own["temperature"], inclusive=True)
    log_scale, animate = flag("log_scale", own["log_scale"]), flag("animate", own["animate"])
    log_weights, resampled = own["weights"] is True, flag("resample", own["resample"])
    if isinstance(own["weights"], bool):
        # other values are the weights of the members of an ensemble
        own = {**own, "weights": None}
    if log_weights and resampled:
        raise ConfigError(
            "weights=true and resample=true exclude each other, because resampled samples have equal weights; give one "
            "of them"
        )
    if log_weights or resampled:
        what = "weights=true" if log_weights else "resample=true"
        if animate or own["quality"] is not None:
            raise ConfigError(f"{what} is not possible with animate or quality; leave this option out")
        if temperature != 1:
            raise ConfigError(f"{what} needs temperature=1, because the weights use the density of the flow")
    if animate and own["quality"] is not None:
        raise ConfigError("animate=true and quality exclude each other; give one of them")
    if log_scale and (animate or own["quality"] is not None):
        raise ConfigError("log_scale=true: only for the picture of samples; leave this option out")
    if own["quality"] is not None:
        return report_quality(own, overrides, seed)
    n = None if own["n"] is None else whole("n", own["n"])
    label = None if own["label"] is None else whole("label", own["label"], least=0)
    if label is not None and own["context"] is not None:
        raise ConfigError("label and context exclude each other; give one of them")
    if animate:
        return write_animation(own, overrides, n, seed, temperature, label, own["context"])
    given = written_as("out", own["out"], ".npy", *NAMED)
    return write_samples(
        load_run(own, overrides), given, n, seed, temperature, label, own["context"], log_scale, log_weights, resampled
    )


def write_samples(
    loaded_run: LoadedRun,
    given: Path | None,
    n: int | None,
    seed: int,
    temperature: float,
    label: int | None,
    context: Any,
    log_scale: bool,
    log_weights: bool = False,
    resampled: bool = False,
) -> int:
    """Writes samples to a .npy, .csv or .parquet file and draws a picture of them. Returns the exit code.

    Args:
        context: the option `context`, see `contexts_of`.
        log_weights: whether the log weights log(w_i / sum w) for the target of the run are also written.
        resampled: whether the samples are resampled by their weights for the target of the run.

    Raises:
        ConfigError: a path that cannot be written to, a context that is missing or not expected, or weights for a run
            without a target.
        DataError: a context that cannot be read.
        FlowtrainError: a label that the flow does not have.
        NonFiniteError: samples that are not finite. No file is written.
    """
    flow, images = loaded_run.flow, len(loaded_run.flow.event_shape) == 3
    n = n or (1 if isinstance(context, str) else 100 if images else 10_000)
    tag = loaded_run.tag and f"-{loaded_run.tag}"
    out = given or loaded_run.run_dir / f"samples{tag}.npy"
    options, picture = loaded_run.plot_options, out.with_suffix(".png")
    inputs = [*loaded_run.inputs, context]
    files = list(dict.fromkeys([out, weights_path(out)] if log_weights else [out]))
    check_outputs([*files, *options.files(picture)], inputs)
    check_can_write(out)
    target = target_of(loaded_run, log_weights) if log_weights or resampled else None
    # a wrong label or context is refused before data are read
    contexts = contexts_of(flow, context, label)
    if label is not None:
        flow.check_label(label)
    is_drawn = images or flow.event_shape in ((1,), (2,)) or options.columns is not None
    data = data_for_picture(loaded_run) if is_drawn else None
    if data is not None:
        check_fits(flow, data)
    elif log_scale:
        raise ConfigError(
            "log_scale=true: only for the picture of one or two columns, which is not drawn; leave this option out"
        )
    torch.manual_seed(seed)
    labels = None
    if contexts is not None:
        n *= len(contexts)
        drawn = contexts.repeat_interleave(n // len(contexts), 0)
    elif flow.classes is not None:
        drawn = labels = flow.drawn_labels(n) if label is None else torch.full((n,), label)
    else:
        drawn = None
    samples, log_w, words_of_weights = (
        (flow.sample(n, temperature, context=drawn).cpu(), None, "")
        if target is None
        else draw_weighted(flow, target, n, seed, resampled)
    )
    check_samples(samples)
    _write(out, flow.quantized(samples), loaded_run.samples, labels, drawn if flow.context else None, log_w)
    rows = rows_of_checks(flow.event_shape)
    with status("round trip"):
        error = roundtrip_error(flow, samples[:rows], None if drawn is None else drawn[:rows])
    print(f"{n} samples, round trip error {error:.1e}, written to {_listed(files)}")
    if target is not None:
        print(words_of_weights)
    if data is not None:
        words = f"{n} samples" + ("" if label is None else f" of class {label}") + ", resampled" * resampled
        if contexts is not None:
            one = context_text(flow.context, contexts[0].tolist())
            words += f" at {one if len(contexts) == 1 else f'{len(contexts)} contexts'}"
            drawn = contexts if len(contexts) == 1 else drawn
        title = loaded_run.titled(words if temperature == 1 else f"{words} at temperature {temperature:g}")
        with status("drawing samples"):
            draw(flow, data, picture, title, samples, label, log_scale, options, drawn if flow.context else None)
        print(f"picture in {_listed(options.files(picture))}")
    return 0


def _write(
    out: Path, found: Tensor, samples: Samples, labels: Tensor | None, context: Tensor | None, log_w: Tensor | None
) -> None:
    """Writes samples (n, *event_shape) with their labels, contexts and log weights, (n,), if these are given."""
    if out.suffix in NAMED:
        columns = named_columns(found, samples, labels, context)
        if log_w is not None:
            columns[LOG_WEIGHT if LOG_WEIGHT not in columns else f"{LOG_WEIGHT}_{len(columns)}"] = log_w.numpy()
        write_columns(out, columns)
        return
    write_npy(out, found.numpy())
    if log_w is not None:
        write_npy(weights_path(out), log_w.numpy())


def contexts_of(flow: Density, given: Any, label: int | None = None) -> Tensor | None:
    """Returns the contexts of the option `context`, (rows, k); None for a flow without context columns.

    Args:
        given: the path of a file, see `read_context`; a mapping from names to values; a number if there is one column.
        label: the option `label`.

    Raises:
        ConfigError: a context that is missing or not expected.
        DataError: a file that cannot be read, or a context that the flow does not allow.
    """
    if not flow.context:
        if given is not None:
            advice = "give the class, as in label=0" if flow.classes is not None else "leave this option out"
            raise ConfigError(f"context: the model was trained without data.context; {advice}")
        return None
    names, example = ", ".join(column.name for column in flow.context), f"'context={example_of(flow.context)}'"
    if label is not None:
        raise ConfigError(f"label: the model is conditional on {names}; give {example}")
    if given is None:
        raise ConfigError(
            f"the model is conditional on {names}: give context=FILE, a file with these columns, or one context, as in "
            f"{example}"
        )
    if isinstance(given, str):
        return read_context(given, flow.context)
    if isinstance(given, list):
        raise ConfigError(f"context={shortened(given)}: give a file, or one context by names, as in {example}")
    return context_values(flow.context, given, 1)


def _as_mapping(context: Any) -> Any:
    """Returns the option `context`, parsed as YAML if it is the text of a mapping, see `overrides.quoted`."""
    is_text = isinstance(context, str) and context.startswith("{") and not Path(context).exists()
    return read_yaml(context) if is_text else context


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


def data_for_picture(loaded_run: LoadedRun) -> Dataset | None:
    """Returns the data beside which samples are drawn. If they cannot be read, prints a message and returns None."""
    try:
        with status("reading the data"):
            return loaded_run.build()
    except DataError as e:
        print(f"no picture is drawn, because the data cannot be read: {e}", file=sys.stderr)
        return None
