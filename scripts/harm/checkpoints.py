"""Damaged checkpoints must be refused in one line, or load as the original flow."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

import flowtrain
from flowtrain.utils.errors import CheckpointError
from harm.compare import value_differences
from harm.damage import damaged
from harm.forks import forked
from harm.part import Part, Verdict


class Original(NamedTuple):
    """The content of a checkpoint file, the weights of the flow in the file, and log p at a few points."""

    content: bytes
    state: dict[str, torch.Tensor]
    log_p: torch.Tensor


def read_original(path: Path) -> Original:
    flow = flowtrain.load(path)
    return Original(path.read_bytes(), dict(flow.state_dict()), flow.log_prob(_points()))


def _points() -> torch.Tensor:
    return torch.linspace(-2, 2, 10, dtype=torch.float32).view(5, 2)


def load_verdict(path: Path, known: Original) -> Verdict:
    """Returns the result of loading a damaged file."""
    try:
        flow = flowtrain.load(path)
    except CheckpointError as e:
        several = len(str(e).splitlines()) > 1
        return Verdict(f"a message of several lines: {e!r}" if several else "refused", wrong=several)
    except Exception as e:  # only CheckpointError is allowed
        return Verdict(f"{type(e).__name__}: {e}", wrong=True)
    if value_differences(dict(flow.state_dict()), known.state, ""):
        return Verdict("loaded with other weights", wrong=True)
    if value_differences(flow.log_prob(_points()), known.log_p, ""):
        return Verdict("loaded as another flow", wrong=True)
    return Verdict("unharmed")


def corruptions(files: Sequence[Path], part: Part) -> None:
    folder = part.out / "corruptions"
    folder.mkdir()
    originals = [read_original(path) for path in files]
    for i in part.tries():
        known = originals[i % len(originals)]
        kind, content = damaged(part.rng, known.content)
        # in a separate folder, so that no previous checkpoint can replace it
        path = folder / f"case{i}.pt"
        path.write_bytes(content)
        outcome = forked(partial(_print_loading, path, known), folder)
        words, _, wrong = outcome.out.partition("\n")
        verdict = Verdict(words, wrong=bool(wrong)) if outcome.code == 0 else Verdict(outcome.words, wrong=True)
        if not verdict.wrong:
            path.unlink()
        part.count(verdict, f"{path} ({kind})")


def _print_loading(path: Path, known: Original) -> None:
    verdict = load_verdict(path, known)
    print(" ".join(verdict.words.split()), end="\nwrong" if verdict.wrong else "")
