"""How much, and for how long, an address may answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What an answer may be.

    Attributes:
        size: bytes of its body.
        seconds: until it must be there as a whole.
        silence: seconds without a byte of it.
        redirects: how many are followed.
    """

    size: int
    seconds: float
    silence: float
    redirects: int = 0


PICTURE = Limits(size=32 * 2**20, seconds=30, silence=10, redirects=5)
TABLE = Limits(size=2**40, seconds=12 * 3600, silence=60, redirects=5)
