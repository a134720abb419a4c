"""uvicorn as this project's commands end: a port that is taken is one line, SIGTERM answers what has arrived and exits 0."""

import asyncio
import contextlib
import errno
import signal
import socket
from collections.abc import Iterator

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol


STOP_SECONDS = 60
"""What has arrived is answered within this time of a signal, or never."""


IDLE_SECONDS = 75
"""A connection without a request is kept longer than by the proxies before it (most: 60 s), which else meet a closed one."""
PORT_FAULTS = {
    errno.EADDRINUSE: "another program listens there: end it, or choose another --port (0: a free one)",
    errno.EACCES: "only an administrator's programs may listen there: choose a --port of 1024 or above",
    errno.EADDRNOTAVAIL: "this machine has no such address: choose another --host (0.0.0.0: all of its own)",
}
"""Why a port can't be had, by the number of the system's error, and what to do."""


class Server(uvicorn.Server):
    """Says where it listens, and ends well after a signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            with named(host, port):  # of two servers that have taken a port at once, one is told here
                bound.listen()
        await super().startup(sockets)
        for bound in sockets or []:
            host, port = bound.getsockname()[:2]
            host = f"[{host}]" if ":" in host else host
            print(f"Listening at http://{host}:{port} (pages about it: /docs)", flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take the signals that ask to stop, but for one that is ignored; unlike uvicorn's, never raise them again."""
        numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def bind(host: str, port: int) -> socket.socket:
    """Take a port, before a model is loaded for it; 0: a free one.

    Raises:
        ValueError: where it can't be had, naming it.
    """
    with named(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    return bound


@contextlib.contextmanager
def named(host: str, port: int) -> Iterator[None]:
    """Say in plain words why a port can't be had.

    Raises:
        ValueError: for every error of the system.
    """
    try:
        yield
    except socket.gaierror as error:
        raise ValueError(f"Host {host!r} is unknown here: pass an address of this machine as --host.") from error
    except OSError as error:
        raise ValueError(f"Port {port} at {host}: {PORT_FAULTS.get(error.errno or 0, error.strerror)}.") from error


class HeadInTime(H11Protocol):
    """Closes a connection on which no request's head arrives in time; uvicorn alone waits for ever."""

    head_seconds = 30.0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Wait on while the head is not whole."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(self.head_seconds, self.timeout_keep_alive_handler)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def listen(app: FastAPI, bound: socket.socket, head_seconds: float) -> None:
    """Answer until a signal asks to stop; what has arrived by then is answered.

    Args:
        app: the application.
        bound: of `bind`.
        head_seconds: until a request's head must have arrived.
    """
    config = uvicorn.Config(
        app,
        http=type("Protocol", (HeadInTime,), {"head_seconds": head_seconds}),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=STOP_SECONDS,
        timeout_keep_alive=IDLE_SECONDS,
        server_header=False,
    )
    Server(config).run(sockets=[bound])
