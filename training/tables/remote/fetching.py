"""Fetches many addresses at once: a bounded number, each again after a fault that may pass, none for longer than it may take."""

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from training.tables.remote import buckets
from training.tables.remote.limits import Limits
from training.tables.remote.places import Allowed, RemoteError, host_of, is_web
from training.tables.remote.web import PassingError, Web


TRIES = 4
PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds before the second try, doubled with each further one and drawn from its upper half; and the most a host may ask for."""
AT_ONCE = 16
"""Addresses that a process fetches at once."""
SILENT = 8
"""Addresses of a host that may stay unanswered, one after another, before it is asked no more."""

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """An address, the file that its content is written to, and headers of the request (http)."""

    address: str
    place: Path
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fetched:
    """What became of an address.

    Attributes:
        changed: whether its content was written; False where it is said that nothing has changed.
        headers: of the answer (http).
        error: why it could not be fetched.
    """

    changed: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    error: RemoteError | None = None


_unanswered: Counter[str] = Counter()
"""By host, in this process: addresses in a row that got no answer."""


def fetch_all(
    wanted: Iterable[Wanted], allowed: Allowed, limits: Limits, done: Callable[[], Any] = lambda: None
) -> dict[str, Fetched]:
    """Fetch addresses, side by side; what can't be fetched has its error.

    Args:
        limits: of each.
        done: called after each.

    Raises:
        OSError: when a file can't be written.
    """
    return _run(_fetch_all(list(wanted), allowed, limits, done))


async def _fetch_all(
    wanted: list[Wanted], allowed: Allowed, limits: Limits, done: Callable[[], Any]
) -> dict[str, Fetched]:
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(each: Wanted, web: Web) -> Fetched:
        async with turn:
            try:
                return await _fetch(each, web, limits)
            except RemoteError as error:
                return Fetched(error=error)
            finally:
                done()

    async with Web(allowed, AT_ONCE) as web:
        results = await asyncio.gather(*(one(each, web) for each in wanted))
    return {each.address: result for each, result in zip(wanted, results, strict=True)}


async def _fetch(wanted: Wanted, web: Web, limits: Limits) -> Fetched:
    web.allowed.check(wanted.address)
    host = host_of(wanted.address)[0] if is_web(wanted.address) else wanted.address.partition("://")[0]
    for number in range(TRIES):
        if _unanswered[host] >= SILENT:
            raise RemoteError(f"{host} left {SILENT} addresses in a row unanswered and is asked no more in this run")
        try:
            result = await _once(wanted, web, limits)
        except PassingError as error:
            if number + 1 == TRIES:
                _unanswered[host] = 0 if error.answered else _unanswered[host] + 1
                raise RemoteError(f"{error}, asked {TRIES} times") from error
            pause = PAUSE * 2**number * random.uniform(0.5, 1)
            await asyncio.sleep(min(max(pause, error.wait), LONGEST_PAUSE))
        except RemoteError:
            _unanswered[host] = 0
            raise
        else:
            _unanswered[host] = 0
            return result
    raise AssertionError("the last try returns or raises")


async def _once(wanted: Wanted, web: Web, limits: Limits) -> Fetched:
    with wanted.place.open("wb") as stream:
        if not is_web(wanted.address):
            await asyncio.to_thread(_copy, wanted.address, stream.write, limits)
            return Fetched(changed=True)
        headers = await web.get(wanted.address, limits, stream.write, wanted.headers)
        return Fetched() if headers is None else Fetched(True, dict(headers))


def _copy(address: str, sink: Callable[[bytes], Any], limits: Limits) -> None:
    size, until = 0, time.monotonic() + limits.seconds
    with closing(buckets.pieces(address)) as pieces:
        for piece in pieces:
            size += len(piece)
            if size > limits.size:
                raise RemoteError(f"{address} has more than {limits.size:,} bytes")
            if time.monotonic() > until:
                raise RemoteError(f"{address} did not arrive within {limits.seconds:g} s")
            sink(piece)


def _run(work: Coroutine[Any, Any, T]) -> T:
    """Run to its end what waits for the network, also in a notebook, whose own loop runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


def _forget() -> None:
    _unanswered.clear()


os.register_at_fork(after_in_child=_forget)
