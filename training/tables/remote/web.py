"""One answer over http or https, from an address that was checked.

A name is looked up, all its addresses must be such as may be asked, and the connection goes to one of those that were
checked: a name that means another machine a moment later reaches nothing inside. A redirect is a new address, which is
checked in the same way. No proxy is used, and no cookie kept.
"""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import httpx

from training.tables.remote.limits import Limits
from training.tables.remote.places import (
    PORTS,
    Allowed,
    RemoteError,
    addresses_of,
    checked_address,
    host_of,
    is_web,
    shown,
)


PASSING = frozenset({408, 425, 429, *range(500, 600)})
"""Answers after which another try may be answered better."""
REDIRECTS = frozenset({301, 302, 303, 307, 308})
NOT_MODIFIED = 304


class PassingError(RemoteError):
    """A fault that may be over soon.

    Args:
        wait: seconds after which the host asks to be asked again, if it says so.
        answered: whether there was any answer.
    """

    def __init__(self, message: str, wait: float = 0.0, answered: bool = False):
        super().__init__(message)
        self.wait, self.answered = wait, answered


@dataclass
class Web:
    """Asks allowed hosts; to be closed by `async with`.

    Args:
        allowed: hosts.
        connections: to one host at once.
        transport: of httpx; None: its own.
    """

    allowed: Allowed
    connections: int = 8
    transport: httpx.AsyncBaseTransport | None = None
    clients: dict[tuple[str, ...], httpx.AsyncClient] = field(default_factory=dict, init=False)

    async def __aenter__(self) -> "Web":
        return self

    async def __aexit__(self, *error: object) -> None:
        for client in self.clients.values():
            await client.aclose()

    async def get(
        self, address: str, limits: Limits, sink: Callable[[bytes], Any], headers: Mapping[str, str] | None = None
    ) -> httpx.Headers | None:
        """Give the body of what lies at an address to `sink`, piece by piece.

        Args:
            headers: of the request, beside our own.

        Returns:
            Headers of the answer; None where it is said that nothing has changed.

        Raises:
            PassingError: for a fault that may be over soon.
            RemoteError: for what is not allowed, too large, or not there.
        """
        try:
            async with asyncio.timeout(limits.seconds):
                return await self._follow(address, limits, sink, headers or {})
        except TimeoutError as error:
            raise PassingError(f"{shown(address)} did not answer within {limits.seconds:g} s") from error
        except httpx.TimeoutException as error:
            raise PassingError(f"{shown(address)} did not answer within {limits.silence:g} s") from error
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise PassingError(f"{shown(address)} could not be fetched ({reason})") from error
        except (httpx.InvalidURL, UnicodeError) as error:
            raise RemoteError(f"{shown(address)}: no address ({error})") from error

    async def _follow(
        self, address: str, limits: Limits, sink: Callable[[bytes], Any], headers: Mapping[str, str]
    ) -> httpx.Headers | None:
        for _ in range(limits.redirects + 1):
            async with self._answer(address, limits, headers) as answer:
                if answer.status_code == NOT_MODIFIED and headers:
                    return None
                if answer.status_code in REDIRECTS and limits.redirects:
                    target = str(httpx.URL(address).join(answer.headers.get("Location", "")))
                    if not is_web(target):
                        raise RemoteError(f"{shown(address)} redirects to {shown(target)}, which is no web address")
                    address = target
                    continue
                await _read(answer, address, limits, sink)
                return answer.headers
        raise RemoteError(f"{shown(address)}: more than {limits.redirects} redirects")

    @contextlib.asynccontextmanager
    async def _answer(self, address: str, limits: Limits, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """What is answered at an address, asked of the machine that was checked."""
        self.allowed.check(address)
        host, port = host_of(address)
        url = httpx.URL(address)
        checked = checked_address(host, await _found(host, port), self.allowed)
        name = url.raw_host.decode() if port == PORTS[url.scheme] else f"{url.raw_host.decode()}:{port}"
        fixed = {"Host": name, "Accept-Encoding": "identity"}
        async with self._client(url.scheme, host, str(port), checked).stream(
            "GET",
            url.copy_with(host=checked),
            headers={**headers, **fixed},
            extensions={"sni_hostname": host},
            timeout=httpx.Timeout(limits.silence),
        ) as answer:
            yield answer

    def _client(self, *origin: str) -> httpx.AsyncClient:
        """One for each name: else a connection whose certificate is that of one could serve another at the same machine."""
        if origin not in self.clients:
            self.clients[origin] = httpx.AsyncClient(
                transport=self.transport,
                verify=_certificates(),
                trust_env=False,
                follow_redirects=False,
                limits=httpx.Limits(max_connections=self.connections),
            )
        return self.clients[origin]


async def _found(host: str, port: int) -> list[str]:
    try:
        return await asyncio.get_running_loop().run_in_executor(None, addresses_of, host, port)
    except OSError as error:
        raise PassingError(f"{host} is not known ({error})") from error


async def _read(answer: httpx.Response, address: str, limits: Limits, sink: Callable[[bytes], Any]) -> None:
    status = answer.status_code
    if status in PASSING:
        wait = answer.headers.get("Retry-After", "")
        raise PassingError(f"{shown(address)} answered {status}", float(wait) if wait.isdecimal() else 0.0, True)
    if status in REDIRECTS:
        raise RemoteError(f"{shown(address)} answered {status}; redirects are not followed")
    if status != 200:
        raise RemoteError(f"{shown(address)} answered {status}")
    if answer.headers.get("Content-Encoding", "identity") != "identity":
        raise RemoteError(f"{shown(address)} answered {status} with {answer.headers['Content-Encoding']}, unasked")
    size = 0
    async for piece in answer.aiter_bytes():
        size += len(piece)
        if size > limits.size:
            raise RemoteError(f"{shown(address)} has more than {limits.size:,} bytes")
        sink(piece)


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    return httpx.create_ssl_context()
