"""How commands end: exit codes, one line for each mistake, signals, and text that looks like markup."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest
import torch
from rich.table import Table
from safetensors import safe_open

from training.tables.commands.handler import (
    DONE_WITH_REJECTS,
    FileError,
    OptionError,
    Stopped,
    about,
    command,
    describe,
    parse,
    plain_console,
)


ROOT = Path(__file__).resolve().parents[4]


@dataclass
class Options:
    """Of the command below."""

    k: int = field(default=1, metadata={"help": "How many."})

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"--k is {self.k}, but must be at least 1.")


def ending(capsys, action, options=()) -> tuple[object, str]:
    """How a command ends whose work is `action`: exit code, and stderr with a line that Python would print."""

    @command("it.py", go_on="Once more.")
    def main(options=None):
        (arguments,) = parse(Options, options=options, prog="it.py")
        return action(arguments)

    code: object
    try:
        code = main(list(options))
    except SystemExit as end:
        code = end.code
    error = capsys.readouterr().err
    return (1, f"{error}{code}\n") if isinstance(code, str) else (code, error)


def raising(error: BaseException):
    def action(arguments):
        raise error

    return action


def test_exit_codes(capsys):
    assert ending(capsys, lambda arguments: None) == (0, "")
    assert ending(capsys, lambda arguments: DONE_WITH_REJECTS) == (3, "")
    assert ending(capsys, raising(ValueError("a\nb"))) == (1, "it.py: a b\n")
    assert ending(capsys, raising(OptionError("either --a or --b"))) == (2, "it.py: either --a or --b\n")
    for options, message in [
        (["--k", "0"], "--k is 0, but must be at least 1."),
        (["--kk", "2"], "unknown option --kk 2"),
        (["--k", "two"], "invalid int value: 'two'"),
    ]:
        code, error = ending(capsys, lambda arguments: None, options)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1


def test_traceback_on_request(capsys):
    code, error = ending(capsys, raising(KeyError("width")))
    assert (code, error) == (1, "it.py: unexpected KeyError: 'width' (--traceback shows where)\n")
    code, error = ending(capsys, raising(KeyError("width")), ["--traceback"])
    assert code == 1
    assert "Traceback" in error and "raise error" in error


def test_stopped_from_outside(capsys):
    assert ending(capsys, raising(KeyboardInterrupt())) == (130, "it.py: stopped. Once more.\n")
    assert ending(capsys, raising(Stopped(signal.SIGTERM, "Resume."))) == (143, "it.py: stopped. Resume.\n")
    before = signal.getsignal(signal.SIGTERM)

    def hides_it(arguments):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("Query interrupted") from error

    assert ending(capsys, hides_it) == (143, "it.py: stopped. Once more.\n")
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_an_error_names_file_and_remedy(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    (tmp_path / "file").write_text("")

    def of(action) -> str:
        try:
            action()
        except Exception as error:
            return describe(error)
        raise AssertionError("no error")

    assert re.search(r"/none: .*no such file or folder", of(lambda: (tmp_path / "none").read_text()))
    assert "A file is where a folder should be" in of(lambda: (tmp_path / "file" / "x").mkdir(parents=True))
    assert "A folder is where a file should be" in of(lambda: tmp_path.read_text())
    assert "cut off or damaged" in of(lambda: safe_open(tmp_path / "cut.safetensors", "pt"))
    assert "unexpected" not in of(lambda: pq.read_table(tmp_path / "cut.parquet"))
    assert "unexpected" not in of(lambda: duckdb.sql("select nothing"))
    assert "disk is full" in of(lambda: Path("/dev/full").write_text("x"))
    assert "disk full" in of(lambda: torch.save(torch.zeros(9), "/dev/full"))
    assert "port is taken" in describe(OSError(errno.EADDRINUSE, "Address already in use"))
    assert "port is taken" in describe(OSError("Cannot find empty port in range: 7860-7860."))  # as Gradio says it

    def cut() -> None:
        with about(tmp_path / "cut.safetensors", "Copy it again."):
            safe_open(tmp_path / "cut.safetensors", "pt")

    with pytest.raises(FileError, match=r"cut.safetensors: .* Copy it again\."):
        cut()


WORKING = """
import sys, time
import torch
from torch.utils.data import DataLoader
from training.tables.commands.handler import command

class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 1000
    def __getitem__(self, index):
        time.sleep(0.05)
        return index

@command("slow.py", go_on="Start it again.")
def main(options=None):
    for number, _ in enumerate(DataLoader(Slow(), num_workers=2)):
        if number == 3:
            print("working", flush=True)

sys.exit(main())
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_command_and_workers_with_one_line(tmp_path, number, code):
    (tmp_path / "slow.py").write_text(WORKING)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches the whole group
    else:
        process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (code, "slow.py: stopped. Start it again.\n")
    time.sleep(0.2)
    with pytest.raises(ProcessLookupError):  # no worker is left
        os.killpg(process.pid, 0)


def test_text_is_text():
    console = plain_console()
    console.file = io.StringIO()
    table = Table(title="a [/x] b")
    table.add_column("[bold]")
    table.add_row(":smile: [/red]")
    console.print(table)
    console.print("Report: runs/[/x]/report.html")
    printed = console.file.getvalue()
    assert all(text in printed for text in ("a [/x] b", "[bold]", ":smile: [/red]", "runs/[/x]/report.html"))


KILLED = """
import multiprocessing, os, time
from torch.utils.data import DataLoader
from training.tables.commands.handler import describe

batches = iter(DataLoader(range(4), batch_size=2, num_workers=1))
time.sleep(1)
try:
    multiprocessing.active_children()[0].kill()
    list(batches)
except (ConnectionError, EOFError, RuntimeError) as error:
    print(describe(error), flush=True)
os._exit(0)
"""
"""In a process of its own: torch raises a worker's death at whatever its parent is doing when the signal arrives."""


def test_a_worker_that_was_killed_with_a_batch_in_its_hands():
    """The batch is announced and its memory can't be fetched: the error speaks of a connection."""
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, capture_output=True, text=True)
    assert "A worker process" in done.stdout and "use fewer --num_workers" in done.stdout, done.stderr


LET_GO = """
import multiprocessing, sys, threading
from multiprocessing.connection import Client
from multiprocessing.resource_sharer import DupFd
from training.tables.commands.handler import command

def share(pipe, error):
    pipe.send(vars(DupFd(1))["_id"][0])
    pipe.recv()
    sys.excepthook(type(error), error, None)

@command("let_go.py")
def main(options=None):
    for error in (ValueError("of the worker's own"), ConnectionResetError(104, "Connection reset by peer")):
        pipe, others = multiprocessing.Pipe()
        worker = multiprocessing.get_context("fork").Process(target=share, args=(others, error))
        worker.start()
        address = pipe.recv()
        for _ in range(3):
            Client(address, authkey=multiprocessing.current_process().authkey).close()
        pipe.send("end")
        worker.join()

sys.exit(main())
"""


def test_a_worker_is_silent_about_a_process_that_let_go_of_it():
    """As after Ctrl-C while a batch's memory is being fetched; whatever else ends a thread is printed."""
    done = subprocess.run([sys.executable, "-c", LET_GO], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "ValueError: of the worker's own\n")
