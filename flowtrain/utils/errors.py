"""The errors a user can cause. Each message says what was wrong, where, and what to do."""


class FlowtrainError(ValueError):
    """A mistake in what was asked for; the commands print its message alone and exit with `exit_code`."""

    exit_code = 2


class DataError(FlowtrainError):
    """A data file or array that cannot be used as it stands."""


class ConfigError(FlowtrainError):
    """A key, an option or a combination of options that does not make a run."""


class CheckpointError(FlowtrainError):
    """A checkpoint that is missing, damaged, or that asks for code which is not trusted."""


class SolverError(FlowtrainError):
    """An ODE solve that could not be finished."""

    exit_code = 1


class NonFiniteError(FlowtrainError):
    """A loss, gradient or sample that is NaN or infinite."""

    exit_code = 1


class ExportError(FlowtrainError):
    """A flow that cannot be exported, or an exported program that differs from its flow."""

    exit_code = 1


class UnfinishedError(FlowtrainError):
    """A run that has trained and is saved, and whose result is still to be written."""

    exit_code = 1


def out_of_memory(error: Exception) -> bool:
    """Whether an error of numpy, or of torch on any device, says that memory was not to be had."""
    if isinstance(error, MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "invalid size of storage", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def first_line(error: Exception) -> str:
    """What an error of another library says, on one line; its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
