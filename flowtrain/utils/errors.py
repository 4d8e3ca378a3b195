"""Errors that a user can cause. A message gives the mistake, its place, and a remedy."""


class FlowtrainError(ValueError):
    """The base class of errors. The commands print only the message and exit with `exit_code`."""

    exit_code = 2


class DataError(FlowtrainError):
    """A data file or an array that cannot be used."""


class ConfigError(FlowtrainError):
    """An invalid key, option or combination of options."""


class CheckpointError(FlowtrainError):
    """A checkpoint that is missing or damaged, or that needs code that is not trusted."""


class SolverError(FlowtrainError):
    """An ODE solve that failed."""

    exit_code = 1


class NonFiniteError(FlowtrainError):
    """A loss, gradient or sample that is NaN or infinite."""

    exit_code = 1


class ExportError(FlowtrainError):
    """A flow that cannot be exported, or an exported program that differs from its flow."""

    exit_code = 1


class UnfinishedError(FlowtrainError):
    """A run whose training is finished and saved, but whose result is not written yet."""

    exit_code = 1


def out_of_memory(error: Exception) -> bool:
    """Whether an error of NumPy, or of torch on any device, means that memory could not be allocated."""
    if isinstance(error, MemoryError):
        return True
    words = ("can't allocate memory", "out of memory", "invalid size of storage", "Storage size calculation overflowed")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)


def first_line(error: Exception) -> str:
    """Returns the first line of the message of an error, or the name of its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
