"""Two runs of one command into one place: the second is refused with one line, and the first never notices."""

import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from tests.support.jobs import JOBS, prepare, read_lines, result_of, run_job, start_job


def stop_with_the_lock() -> None:
    """Stop this process as soon as it has locked its output."""
    lock = fcntl.lockf

    def locked(*arguments):
        lock(*arguments)
        fcntl.lockf = lock
        os.kill(os.getpid(), signal.SIGSTOP)

    fcntl.lockf = locked


def is_stopped(process: int) -> bool:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@pytest.mark.parametrize("name", [name for name in JOBS if JOBS[name].result])
def test_a_second_run_is_refused(name, processes, inputs, undisturbed, tmp_path):
    _, result = undisturbed(name)
    prepare(name, inputs, tmp_path)
    first, errors = start_job(processes, name, inputs, tmp_path, stop_with_the_lock)
    try:
        while not is_stopped(first.pid):
            assert first.is_alive()
            time.sleep(0.005)
        code, lines = run_job(processes, name, inputs, tmp_path)
    finally:
        os.kill(first.pid, signal.SIGCONT)
    read_lines(errors)
    first.join()
    assert code == 1, lines
    assert "another process is writing there; wait until it ends" in lines[-1]
    assert "Traceback" not in "\n".join(lines)
    assert first.exitcode in (0, 3)
    assert result_of(name, tmp_path) == result
