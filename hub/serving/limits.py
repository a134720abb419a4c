"""What a stranger may send, and how a refusal reads: in OpenAI's form of an error, which its clients understand.

Bodies are read before anything else sees them, so that a large, slow or broken one costs no more than its own bytes.
"""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


@dataclass(frozen=True)
class Limits:
    """What is refused before it costs much.

    Attributes:
        body_bytes: of a request, and of a picture from elsewhere.
        all_bodies: bytes of all requests that are being read or answered.
        containers: lists and objects of a body, by its brackets; to read millions of them would hold up all others.
        body_seconds: until a request's body must have arrived.
        pixels: of all pictures of an item, which are open at once.
        characters: of all texts of an item.
        pictures: of an item.
        parts: of an item in OpenAI's form.
        items: of a request.
    """

    body_bytes: int = 32 * 2**20
    all_bodies: int = 512 * 2**20
    containers: int = 500_000
    body_seconds: float = 30.0
    pixels: int = 25_000_000
    characters: int = 100_000
    pictures: int = 16
    parts: int = 256
    items: int = 256


class RequestError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: what is wrong and what to do.
        where: the part of the request, e.g. `input[3]`.
        code: OpenAI's word for it, where it has one.
        retry_after: seconds after which it may be sent again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        where: str | None = None,
        code: str | None = None,
        retry_after: float | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.where, self.code = status, message, where, code
        self.retry_after = retry_after

    def response(self) -> JSONResponse:
        """The answer: `{"error": {"message", "type", "param", "code"}}`."""
        message = self.message if self.where is None else f"{self.where}: {self.message}"
        kind = "server_error" if self.status >= 500 else KINDS.get(self.status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": self.where, "code": self.code}
        # A user's half of a surrogate pair is no UTF-8.
        valid = {name: text and text[:LONGEST].encode("utf-8", "replace").decode() for name, text in error.items()}
        headers = {} if self.retry_after is None else {"Retry-After": str(max(1, math.ceil(self.retry_after)))}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": valid}, self.status, headers)


LONGEST = 1000
"""Characters of a message, which may quote what was sent."""
KINDS = {401: "authentication_error", 429: "rate_limit_error"}
"""OpenAI's type of an error by HTTP's status."""


class WholeBodies:
    """Middleware: gives the application a request only once its body is there, within its limits.

    Args:
        app: the application.
        limits: of bodies.
    """

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        chunks: list[bytes] = []
        try:
            try:
                async with asyncio.timeout(self.limits.body_seconds):
                    arrived = await self._read(scope, receive, chunks)
                body = b"".join(chunks)
                if body.count(b"[") + body.count(b"{") > self.limits.containers:
                    raise RequestError(400, f"the body has more than {self.limits.containers:,} brackets.")
            except TimeoutError:
                late = f"the body did not arrive within {self.limits.body_seconds:g} s."
                arrived = await _refuse(RequestError(408, late), scope, receive, send)
            except RequestError as error:
                arrived = await _refuse(error, scope, receive, send)
            if arrived:
                whole = iter([{"type": "http.request", "body": body, "more_body": False}])

                async def receive_whole() -> Message:
                    return next(whole, None) or await receive()

                await self.app(scope, receive_whole, send)
        finally:
            self._held -= sum(map(len, chunks))

    async def _read(self, scope: Scope, receive: Receive, chunks: list[bytes]) -> bool:
        """Whether the whole body came into `chunks`; not so when the client has gone."""
        size, more = declared_bytes(scope), True
        while more:
            if size > self.limits.body_bytes:
                raise RequestError(413, f"the body has more than {self.limits.body_bytes:,} bytes; send fewer items.")
            message = await receive()
            if message["type"] == "http.disconnect":
                return False
            chunks.append(message.get("body", b""))
            self._held += len(chunks[-1])
            if self._held > self.limits.all_bodies:
                raise RequestError(429, "too many bytes are being answered; send it again.", retry_after=1)
            size, more = max(size, sum(map(len, chunks))), message.get("more_body", False)
        return True


def declared_bytes(scope: Scope) -> int:
    """What `Content-Length` says; 0 without one."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    return int(length) if length.isdigit() else 0


async def _refuse(error: RequestError, scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer; the connection ends, as the rest of the body is not read."""
    response = error.response()
    response.headers["Connection"] = "close"
    await response(scope, receive, send)
    return False


def describe_validation(errors: list[Any]) -> RequestError:
    """The first fault of a body that is not what a route takes."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return RequestError(400, f"the body is not JSON ({first['ctx']['error']}).")
    place = [part for part in first["loc"] if part != "body"]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
    return RequestError(400, f"{first['msg'].removeprefix('Value error, ')}.", where or None)


__all__ = ["Limits", "RequestError", "WholeBodies", "declared_bytes", "describe_validation"]
