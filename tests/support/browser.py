"""Chromium from the system's packages, driven through its debugging pipe: pages that talk to a server need more than a dump."""

import base64
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any


class Browser:
    """One headless page; ends with `close`.

    Args:
        profile: folder for what the browser writes.
        width, height: of the page in pixels.
    """

    def __init__(self, profile: Path, width: int = 1400, height: int = 1300):
        from_test, self._out = os.pipe()
        self._in, to_test = os.pipe()

        def as_three_and_four() -> None:  # where Chromium looks for the pipe
            ours = os.dup(from_test), os.dup(to_test)
            os.dup2(ours[0], 3)
            os.dup2(ours[1], 4)

        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", f"--window-size={width},{height}", "about:blank"]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=False,
            preexec_fn=as_three_and_four,
        )
        os.close(from_test)
        os.close(to_test)
        self._number, self._read = 0, b""
        pages = [one for one in self._call("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self._call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]

    def go(self, url: str) -> None:
        """Opens a page, and waits for its document."""
        self._call("Page.navigate", session=self._session, url=url)
        self.wait("location.href != 'about:blank' && document.readyState == 'complete' && document.body != null")

    def evaluate(self, script: str) -> Any:
        """What a JavaScript expression gives."""
        answer = self._call("Runtime.evaluate", session=self._session, expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> Any:
        """Waits until an expression gives something true, which is returned."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, (
                f"never true: {script}\n{self.evaluate('document.documentElement?.innerText')}"
            )
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path) -> None:
        """Writes what is seen as a PNG file."""
        data = self._call("Page.captureScreenshot", session=self._session, format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        """Ends the browser, which may be gone before it answers; one that is too slow is killed."""
        self._send("Browser.close")
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)
        os.close(self._out)

    def _send(self, method: str, session: str | None = None, **parameters: Any) -> None:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | (
            {"sessionId": session} if session else {}
        )
        os.write(self._out, json.dumps(message).encode() + b"\0")

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._send(method, session, **parameters)
        while True:
            while b"\0" not in self._read:
                part = os.read(self._in, 1 << 20)
                assert part, "Chromium ended"
                self._read += part
            line, _, self._read = self._read.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
