"""The map from the real line to the support of columns with types."""

from collections.abc import Sequence

from flowtrain.bijections.support import ToSupport
from flowtrain.data.types import ColumnType, circular_columns, whole_columns_of


def support_of(types: Sequence[ColumnType]) -> ToSupport | None:
    """Returns the map from the real line to the supports of columns. None if all columns are unbounded."""
    if not any(one.is_bounded or one.is_circular for one in types):
        return None
    low, high = zip(*(one.support for one in types), strict=True)
    return ToSupport(low, high, circular_columns(types), whole_columns_of(types), [one.scale for one in types])
