"""hub/serve.py in a process of its own, and what it says of itself."""

import base64
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx


ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Running:
    """A server's process and its address."""

    process: subprocess.Popen
    url: str

    def metric(self, name: str, **labels: str) -> float:
        """What a line of /metrics says; 0 without it."""
        inner = ",".join(f'{label}="{value}"' for label, value in labels.items())
        line = f"notellm2_{name}{{{inner}}} " if inner else f"notellm2_{name} "
        text = httpx.get(f"{self.url}/metrics").text
        return float(next((row.removeprefix(line) for row in text.splitlines() if row.startswith(line)), 0))

    @property
    def address(self) -> tuple[str, int]:
        """For a socket."""
        url = httpx.URL(self.url)
        assert url.port is not None
        return url.host, url.port


@contextmanager
def serving(model: Path, *options: object, **environment: str) -> Iterator[Running]:
    """A server on a free port, in float32, until the block ends."""
    command = [sys.executable, ROOT / "hub" / "serve.py", "--model", model, "--port", 0, "--dtype", "float32", *options]
    variables = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    with started(list(map(str, command)), variables) as running:
        yield running


@contextmanager
def started(command: Sequence[str], environment: Mapping[str, str], folder: Path | None = None) -> Iterator[Running]:
    """A server that a command starts in a folder, until the block ends."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=folder
        ) as process,
    ):
        try:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                lines.append(line)
                if address := re.search(r"Listening at (\S+)", line):
                    yield Running(process, address[1])
                    break
            else:
                errors.seek(0)
                raise AssertionError(f"the server did not start: {''.join(lines)}{errors.read()[-3000:]}")
        finally:
            process.kill()


def data_url(picture: bytes) -> str:
    """A picture as it stands in a request."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
