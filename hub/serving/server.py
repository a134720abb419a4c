"""uvicorn as this project's commands end: a port that is taken is one line, SIGTERM answers what has arrived and exits 0."""

import contextlib
import signal
import socket
from collections.abc import Iterator

import uvicorn
from fastapi import FastAPI


STOP_SECONDS = 60
"""What has arrived is answered within this time of a signal, or never."""


class Server(uvicorn.Server):
    """Says where it listens, and ends well after a signal."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
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
        OSError: where it is taken or the host is none of this machine's.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.bind(address)
    return bound


def listen(app: FastAPI, bound: socket.socket) -> None:
    """Answer until a signal asks to stop; what has arrived by then is answered."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOP_SECONDS, server_header=False
    )
    Server(config).run(sockets=[bound])
