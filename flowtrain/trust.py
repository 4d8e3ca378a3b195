"""What a config that comes out of a file may have built: flowtrain's own classes, each group's from its own package."""

from collections.abc import Iterator, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any

from flowtrain.errors import CheckpointError

# the package that each config group draws from, when the config comes out of a file
PACKAGES = {
    "model": "models",
    "data": "data",
    "solver": "solvers",
    "objective": "objectives",
    "regularizer": "regularizers",
}


def check_targets(config: Mapping[str, Any], trust: Sequence[str] = ()) -> None:
    """Refuses a config read from a file that names anything outside flowtrain's own groups and `trust`.

    Raises:
        CheckpointError: a foreign `_target_`, or an interpolation.
    """
    if isinstance(trust, str):
        trust = [trust]
    for where, value in leaves(config):
        if isinstance(value, str) and "${" in value:
            raise CheckpointError(f"the checkpoint's config has an interpolation at {'.'.join(where)}: refused")
        if where[-1] != "_target_":
            continue
        roots = [f"flowtrain.{PACKAGES[where[0]]}"] if where[0] in PACKAGES else []
        roots += list(trust)
        if not _under(value, roots) or not _under(_home(value), roots):
            raise CheckpointError(
                f"the checkpoint's config would run {value} ({'.'.join(where)}); only {', '.join(roots) or 'nothing'} "
                "is trusted there. If it is your own package, name it: trust=[mypkg]"
            )


def _home(target: str) -> str | None:
    """The module in which the object of that name was defined: `flowtrain.models.x.torch.load` is torch's."""
    try:
        return getattr(resolve_name(target), "__module__", None)
    except Exception as e:  # importing by name can fail in any way
        raise CheckpointError(f"the checkpoint's config names {target}, which is not to be had here: {e}") from e


def _under(name: Any, roots: Sequence[str]) -> bool:
    return isinstance(name, str) and any(name == root or name.startswith(root + ".") for root in roots)


def leaves(node: Any, where: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The plain values in nested mappings and lists, each with the keys that lead to it."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from leaves(value, (*where, str(key)))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from leaves(value, (*where, str(i)))
    else:
        yield where, node
