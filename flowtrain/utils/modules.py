"""Fast iteration over the submodules of a module.

`nn.Module.modules` also builds names and a set, which takes longer than log p of a single row.
"""

from collections.abc import Container, Iterator

from torch import Tensor, nn


def submodules(module: nn.Module, closed: Container[type] = ()) -> Iterator[nn.Module]:
    """Yields a module and all modules inside it, in the order of `nn.Module.modules`.

    A shared module is yielded several times. Modules inside a module of a class in `closed` are not yielded.

    Example:
        >>> [type(m).__name__ for m in submodules(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))]
        ['Sequential', 'Linear', 'ReLU']
    """
    stack: list[nn.Module] = [module]
    while stack:
        found = stack.pop()
        yield found
        if found._modules and type(found) not in closed:
            stack.extend(m for m in reversed(found._modules.values()) if m is not None)


def first_floating(module: nn.Module) -> Tensor | None:
    """Returns the first floating-point parameter of a module, else its first floating-point buffer, else None.

    Example:
        >>> first_floating(nn.Linear(1, 2)).shape
        torch.Size([2, 1])
    """
    for part in submodules(module):
        for parameter in part._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                return parameter
    for part in submodules(module):
        for buffer in part._buffers.values():
            if buffer is not None and buffer.is_floating_point():
                return buffer
    return None


def parameters_of(module: nn.Module) -> tuple[nn.Parameter, ...]:
    """Returns the parameters of a module, each once, in the order of `nn.Module.parameters`.

    Example:
        >>> [tuple(p.shape) for p in parameters_of(nn.Linear(1, 2))]
        [(2, 1), (2,)]
    """
    found = (p for part in submodules(module) for p in part._parameters.values() if p is not None)
    return tuple(dict.fromkeys(found))
