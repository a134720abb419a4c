"""A local web server whose answers a test chooses, and which notes what it was asked.

with WebServer() as web:
    web.answers["/a.png"] = [503, (200, png(1))]  # the first time, and from then on
    fetch(f"{web.url}/a.png", allow_remote=web.host)
    assert web.asked == ["/a.png", "/a.png"]
"""

import contextlib
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WebServer(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 as long as the block lasts.

    Attributes:
        answers: by path: a status; (status, body); (status, body, headers); a number of seconds as float, to wait before a
            404; or a list of these for one request after another, of which the last one stays. Bodies have an ETag.
        asked: paths, in order.
        most_at_once: requests that were being answered at one time.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []
        self.lock = threading.Lock()
        self.at_once = self.most_at_once = 0

    @property
    def host(self) -> str:
        """As `--allow_remote` names it."""
        return f"127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        """Of its root."""
        return f"http://{self.host}"

    def __enter__(self) -> "WebServer":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.shutdown()
        self.server_close()

    def answer_to(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """The next answer of a path."""
        with self.lock:
            self.asked.append(path)
            answer = self.answers.get(path.partition("?")[0], 404)
            if isinstance(answer, list):
                answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if isinstance(answer, float):
            time.sleep(answer)
            answer = 404
        status, *more = answer if isinstance(answer, tuple) else (answer,)
        body, headers = (*more, *(b"", {})[len(more) :])
        return status, body, headers


class _Handler(BaseHTTPRequestHandler):
    server: WebServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.at_once += 1
            server.most_at_once = max(server.most_at_once, server.at_once)
        try:
            status, body, headers = server.answer_to(self.path)
            tag = sha256(body).hexdigest()[:16]
            if status == 200 and self.headers.get("If-None-Match") == tag:
                status, body = 304, b""
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "ETag": tag, **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            if headers:  # a length that isn't the body's
                self.close_connection = True
        finally:
            with server.lock:
                server.at_once -= 1

    def handle(self) -> None:
        """A client that was given up on may be gone."""
        with contextlib.suppress(ConnectionError):
            super().handle()

    def log_message(self, *arguments: Any) -> None:
        """Says nothing."""
