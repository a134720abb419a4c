"""What numbers an option may be, said in its type and checked in one place:

@dataclass
class EncodeArguments:
    batch_size: AtLeastOne = field(default=32, ...)
    ks: list[Annotated[int, Bounds(1, 1000)]] = field(...)

    def __post_init__(self) -> None:
        check_bounds(self)
"""

import math
from collections.abc import Mapping
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


MANY = 1_000_000_000
"""More of anything is a slip of the keyboard."""
AtLeastOne = Annotated[int, Bounds(1, MANY)]
NotNegative = Annotated[int, Bounds(0, MANY)]
Processes = Annotated[int, Bounds(0, 1000)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]


def check_bounds(options: Any, inherited: Mapping[str, Bounds] | None = None) -> None:
    """Check the numbers of a dataclass against the bounds in its types; None is not a number.

    Args:
        inherited: bounds of fields whose types are another library's.

    Raises:
        OptionError: naming the first option that is out of bounds.
    """
    for name, kind in get_type_hints(type(options), include_extras=True).items():
        value = getattr(options, name, None)
        for bounds in [*bounds_in(kind), *([inherited[name]] if inherited and name in inherited else [])]:
            for number in value if isinstance(value, list) else [value]:
                if number is not None and not bounds.hold(number):
                    raise OptionError(f"--{name} is {number}; it must be {bounds}.")


def bounds_in(kind: Any) -> list[Bounds]:
    """The bounds of a type, of its list's members, or of the part that isn't None."""
    own = [mark for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, Bounds)]
    return own + [bounds for part in get_args(kind) if not isinstance(part, Bounds) for bounds in bounds_in(part)]


__all__ = ["MANY", "AtLeastOne", "Bounds", "NotNegative", "Processes", "Seed", "bounds_in", "check_bounds"]
