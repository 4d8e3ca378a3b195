"""Numbers to as many digits as their error leaves them."""

import math


def with_error(value: float, error: float) -> str:
    """`value +- error`, as in "2.402 +- 0.006": the error to one significant digit, two where the first is a 1.

    Both end at the same decimal. Without an error (NaN, as of one row; or 0, as of an AUROC of 1) the value has four
    decimals.

    Example:
        >>> with_error(2.40213, 0.00581), with_error(2.40213, 0.0147)
        ('2.402 +- 0.006', '2.402 +- 0.015')
    """
    if not math.isfinite(value) or not 0 < error < math.inf:
        return f"{value:.4f}"
    places = decimals(error)
    return f"{round(value, places):.{max(0, places)}f} +- {round(error, places):.{max(0, places)}f}"


def decimals(error: float) -> int:
    """Where a number with that error, above 0, ends: decimals after the point, negative for tens and hundreds."""
    exponent = math.floor(math.log10(error))
    leading = round(error / 10**exponent, 1)
    return 1 - exponent if leading < 1.95 else -exponent


def brief(value: float) -> str:
    """An error to one digit, whole numbers to all of theirs: 12, 0.02, 3e-6."""
    if value == 0:
        return "0"
    size = abs(value)
    words = f"{value:.0e}" if size < 0.001 or size >= 1e6 else f"{value:.0f}" if size >= 9.5 else f"{value:.1g}"
    mantissa, e, exponent = words.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else words
