"""Skips the figures of a run in tests that do not need them: drawing takes most of the time of a short run."""

import pytest

from flowtrain.plotting import pictures
from flowtrain.runs import finish


def skip_figures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pictures, "draw", lambda *arguments, **named: None)
    patch.setattr(pictures, "draw_other_figures", lambda *arguments, **named: [])
    patch.setattr(pictures, "draw_evaluation", lambda *arguments, **named: [])
    patch.setattr(finish, "draw_context_pictures", lambda *arguments, **named: [])
    patch.setattr(finish, "draw_curves", lambda *arguments, **named: None)
    patch.setattr(finish, "draw_target_figures", lambda *arguments, **named: [])
