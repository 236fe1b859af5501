"""Names of layers in messages."""

from collections.abc import Sequence


def shortened(names: Sequence[str], shown: int = 3) -> str:
    """The first few names, and the number of the others.

    Example:
        >>> shortened(["stem.bn", "head.bn"]), shortened(["a", "b", "c", "d", "e"])
        ('stem.bn, head.bn', 'a, b, c and 2 more')
    """
    rest = len(names) - shown
    return ", ".join(names) if rest < 1 else f"{', '.join(names[:shown])} and {rest} more"
