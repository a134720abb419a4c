"""What numbers an option may be, said in its type and checked in one place:

@dataclass
class EncodeArguments:
    batch_size: AtLeastOne = field(default=32, ...)
    ks: list[Annotated[int, Bounds(1, 1000)]] = field(...)

    def __post_init__(self) -> None:
        check_bounds(self)
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_type_hints

from training.tables.commands.handler import OptionError


@dataclass(frozen=True)
class Bounds:
    """The least and the most that a number may be.

    Attributes:
        open: whether the bounds themselves are too little and too much.
    """

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def hold(self, value: float) -> bool:
        """Whether a number lies within; NaN never does."""
        return self.least < value < self.most if self.open else self.least <= value <= self.most

    def __str__(self) -> str:
        low, high = ("above", "below") if self.open else ("at least", "at most")
        words = [f"{low} {self.least:,g}"] * (self.least > -math.inf) + [f"{high} {self.most:,g}"] * (
            self.most < math.inf
        )
        return " and ".join(words)


AtLeastOne = Annotated[int, Bounds(1)]
NotNegative = Annotated[int, Bounds(0)]


def check_bounds(options: Any) -> None:
    """Check the numbers of a dataclass against the bounds in its types; None is not a number.

    Raises:
        OptionError: naming the first option that is out of bounds.
    """
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name)
        for bounds in _bounds_in(kind):
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not bounds.hold(number):
                    raise OptionError(f"--{name} is {number}; it must be {bounds}.")


def _bounds_in(kind: Any) -> list[Bounds]:
    """The bounds of a type, of its list's members, or of the part that isn't None."""
    own = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Bounds)]
    return own + [bounds for part in get_args(kind) if not isinstance(part, Bounds) for bounds in _bounds_in(part)]


__all__ = ["AtLeastOne", "Bounds", "NotNegative", "check_bounds"]
