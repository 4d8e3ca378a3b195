"""`flowsample quality=[1,2,4]`: how near samples come to the data by the number of steps."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from flowtrain.checks import whole
from flowtrain.cli.files import check_outputs, paths_of, run_dir_of, written_as
from flowtrain.cli.opened import open_checkpoint, set_name
from flowtrain.data.record import changes
from flowtrain.errors import ConfigError
from flowtrain.files import write_json
from flowtrain.plots import draw_quality
from flowtrain.quality import quality
from flowtrain.status import status

log = logging.getLogger("flowtrain")


def report_quality(own: Mapping[str, Any], overrides: Sequence[str], seed: int) -> int:
    """A table, JSON and a figure; the exit code.

    Raises:
        ConfigError: keys that have no use here, or no numbers of steps.
    """
    unused = [key for key in ("n", "label") if own[key] is not None] + ["temperature"] * (own["temperature"] != 1.0)
    if unused:
        raise ConfigError(f"{unused[0]}: has no use beside quality, which takes as many samples as there are data")
    given = written_as("out", own["out"], ".json")
    steps = own["quality"]
    if not isinstance(steps, list) or not steps:
        raise ConfigError(f"quality={steps}: give a list of numbers of steps, as in [1,2,4,8]")
    steps = [whole(f"quality[{i}]", k) for i, k in enumerate(steps)]
    opened = open_checkpoint(own, overrides)
    flow, config = opened.flow, opened.config
    name = set_name(opened, "test", overrides)
    out = given or run_dir_of(opened.path) / f"quality{name and f'-{name}'}.json"
    picture = out.with_suffix(".png") if given else out.parent / f"plots/quality{name and f'-{name}'}.png"
    check_outputs([out, picture], [opened.path, *paths_of(config["data"])])
    with status("reading the data"):
        data = opened.build()
    if change := changes(opened.samples.record, data.record, ["val", "test"]):
        log.warning("since the run was trained, %s: the samples are compared with rows it was trained on", change)
    with status("comparing samples with the data"):
        found = quality(flow, data, steps, seed)
    write_json(out, found.to_dict())
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for row in found.rows:
        nfe, distance = lines.setdefault(row.method, ([], []))
        nfe.append(row.nfe)
        distance.append(row.sliced_wasserstein)
    exact = (found.exact.nfe, found.exact.sliced_wasserstein)
    title = opened.titled("samples by few steps")
    with status("drawing quality"):
        draw_quality(picture, lines=lines, exact=exact, data=found.data, title=title)
    print(f"{found.table()}\nwritten to {out}, picture in {picture}")
    return 0
