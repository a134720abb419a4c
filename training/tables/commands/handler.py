"""How every command starts and ends: options, exit codes, one line for each mistake, signals, and text as text.

    @command("hub/encode.py", go_on="Start it again with the same options.")
    def main(options: Sequence[str] | None = None) -> int | None:
        (arguments,) = parse(EncodeArguments, options=options)
        ...

    if __name__ == "__main__":
        sys.exit(main())

Exit codes: 0 done; 1 failed, with one line on stderr; 2 wrong options; 3 done, with rejects; 130 and 143: stopped by
Ctrl-C and by SIGTERM. `--traceback`, an option of every command, shows where an error arose.
"""

import errno
import functools
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NoReturn

from rich.console import Console
from transformers import HfArgumentParser
from transformers.hf_argparser import DataClassType


DONE, FAILED, WRONG_OPTIONS, DONE_WITH_REJECTS = 0, 1, 2, 3

TRACEBACK = "--traceback"
LONGEST_MESSAGE = 1000
"""Characters of an error that are shown; a model that doesn't fit its weights lists hundreds of names."""

REMEDIES = {
    errno.ENOSPC: "The disk is full: make room, or choose another folder.",
    errno.EDQUOT: "Your quota of the disk is used up: make room, or choose another folder.",
    errno.EFBIG: "A file may not grow this large here (ulimit -f).",
    errno.EROFS: "It is read-only: choose another folder.",
    errno.EACCES: "It may not be read or written by you: change its rights, or choose another.",
    errno.EPERM: "It may not be read or written by you: change its rights, or choose another.",
    errno.ENOTDIR: "A file is where a folder should be: remove it, or choose another.",
    errno.EEXIST: "A file is where a folder should be: remove it, or choose another.",
    errno.EISDIR: "A folder is where a file should be: remove it, or choose another.",
    errno.ENOENT: "There is no such file or folder: check the path.",
    errno.EADDRINUSE: "The port is taken: choose another --port.",
    errno.EMFILE: "Too many files are open: raise `ulimit -n`.",
}
"""What to do about an error of the operating system."""

REMEDIES_BY_TEXT = {
    "No space left on device": REMEDIES[errno.ENOSPC],
    "os error 28": REMEDIES[errno.ENOSPC],
    "Disk quota exceeded": REMEDIES[errno.EDQUOT],
    "os error 27": REMEDIES[errno.EFBIG],
    "Read-only file system": REMEDIES[errno.EROFS],
    "PytorchStreamWriter failed": "A file could not be written whole: is the disk full?",
    "iostream error": "A file could not be written whole: is the disk full?",
    "unexpected pos": "A file could not be written whole: is the disk full?",
    "Cannot find empty port": REMEDIES[errno.EADDRINUSE],
    "exited unexpectedly": "A worker process ended, often for lack of memory: use fewer --num_workers, or smaller batches.",
    "is killed by signal": "A worker process was killed, often for lack of memory: use fewer --num_workers, or smaller batches.",
    "out of memory": "Use smaller batches.",
    "incomplete metadata": "The file was cut off or damaged: copy or write it again.",
    "Error while deserializing header": "The file was cut off or damaged: copy or write it again.",
}
"""The same for libraries that report it in words of their own."""

WARNINGS_OF_OTHERS = (
    # Nobody reads a Lance table in a forked process: it is copied before one starts.
    "lance is not fork-safe.",
    # peft reads an attribute of models that transformers has renamed.
    "`is_gradient_checkpointing` is deprecated and will be removed in v6. Use `is_activation_checkpointing` instead.",
)
"""Warnings of libraries about each other: whoever runs a command can do nothing about them."""

EXPLAINED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError)
"""Errors whose message alone says what is wrong."""
EXPLAINED_LIBRARIES = ("_duckdb", "duckdb", "httpx", "huggingface_hub", "ibis", "pyarrow", "safetensors_rust", "yaml")


class OptionError(ValueError):
    """Options that don't go together or have an impossible value: exit code 2."""


class FileError(ValueError):
    """A file or folder that can't be used, by name, with what to do about it."""


class Stopped(KeyboardInterrupt):
    """Ends a command from outside.

    Args:
        signal_number: SIGINT or SIGTERM.
        go_on: how to go on; None: as the command says.
    """

    def __init__(self, signal_number: int, go_on: str | None = None):
        super().__init__(signal_number)
        self.signal_number, self.go_on = signal_number, go_on


def plain_console(stderr: bool = False) -> Console:
    """Give a console that prints text as it is: `[/x]` in a path or a title is no markup, `:x:` no emoji."""
    return Console(markup=False, emoji=False, highlight=False, stderr=stderr)


class OptionParser(HfArgumentParser):
    """Reads dataclasses from options; a wrong option ends with one line and exit code 2.

    Args:
        kinds: the dataclasses.
    """

    def __init__(self, *kinds: type, **settings: Any):
        super().__init__([DataClassType(kind) for kind in kinds], **settings)
        self.add_argument(TRACEBACK, action="store_true", help="Show where an error arose.")

    def read(self, options: Sequence[str] | None = None) -> tuple[Any, ...]:
        """Give an object of each dataclass, from the command line if `options` is None."""
        try:
            *read, _, unknown = self.parse_args_into_dataclasses(
                options, return_remaining_strings=True, look_for_args_file=False
            )
        except ValueError as error:  # of a dataclass' own checks
            self.error(str(error))
        if unknown:
            self.error(f"unknown option {' '.join(unknown)}")
        return tuple(read)

    def error(self, message: str) -> NoReturn:
        """End with the message and where the options are listed."""
        self.exit(WRONG_OPTIONS, f"{self.prog}: {_in_one_line(message)} (--help lists the options)\n")


def parse(*kinds: type, options: Sequence[str] | None = None, **settings: Any) -> tuple[Any, ...]:
    """Read an object of each dataclass from `options`, or from the command line. `settings` are argparse's."""
    return OptionParser(*kinds, **settings).read(options)


Main = Callable[..., int | None]


def command(name: str, go_on: str = "Start it again with the same options.") -> Callable[[Main], Callable[..., int]]:
    """Make a function the entry point of a command.

    Args:
        name: of the command, as it is typed; starts its error line.
        go_on: what to do after the command was stopped.

    Returns:
        A decorator. The function may take the options (None: the command line's) and return an exit code (None: 0). Each
        exception of it becomes SystemExit with the exit code, or with the line for stderr that stands for exit code 1.
    """

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(options: Sequence[str] | None = None) -> int:
            with _signals() as received, warnings.catch_warnings():
                for message in WARNINGS_OF_OTHERS:
                    warnings.filterwarnings("ignore", message=re.escape(message))
                try:
                    code = main(options) or DONE
                    if received:  # a library took the exception for itself, as Gradio's server does
                        _end_stopped(name, Stopped(received[0]), go_on)
                    return code
                except Exception as error:
                    if received:  # a library made its own error of it, as DuckDB does
                        _end_stopped(name, Stopped(received[0]), go_on)
                    _end_failed(name, error, TRACEBACK in (sys.argv if options is None else options))
                except KeyboardInterrupt as stop:
                    reason = stop if isinstance(stop, Stopped) else Stopped(received[0] if received else signal.SIGINT)
                    _end_stopped(name, reason, go_on)

        return run

    return decorate


def _end_failed(name: str, error: Exception, with_traceback: bool) -> NoReturn:
    if with_traceback:
        traceback.print_exception(error)
    _close_progress_bars(error)
    if isinstance(error, BrokenPipeError):  # `| head`; what is flushed at exit would raise it once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    line = f"{name}: {describe(error)}"
    if isinstance(error, OptionError):
        print(line, file=sys.stderr)
        raise SystemExit(WRONG_OPTIONS) from error
    raise SystemExit(line) from error  # Python prints it on stderr and ends with exit code 1


def _end_stopped(name: str, stop: Stopped, go_on: str) -> NoReturn:
    # The next Ctrl-C ends what still tidies up, in silence.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    print(f"{name}: stopped. {stop.go_on or go_on}", file=sys.stderr)
    raise SystemExit(128 + stop.signal_number) from None


def _close_progress_bars(error: BaseException) -> None:
    """Let go of the loops that an error has ended: their bars close now, and not after the error's line or in it."""
    chain: BaseException | None = error
    while chain is not None:
        traceback.clear_frames(chain.__traceback__)
        chain = chain.__cause__ or chain.__context__


def describe(error: BaseException) -> str:
    """Give an error as one line: what is wrong, with which file, and what to do where that is known."""
    message = _in_one_line(str(error))
    remedy = next((remedy for text, remedy in REMEDIES_BY_TEXT.items() if text in message), None)
    if isinstance(error, EOFError | ConnectionError) and _raised_in("torch.multiprocessing", error):
        message, remedy = "a batch did not arrive", REMEDIES_BY_TEXT["is killed by signal"]
    elif isinstance(error, OSError) and error.errno is not None:
        remedy = REMEDIES.get(error.errno, remedy)
        name = error.filename2 or error.filename  # of two, the second is written
        if name is not None:
            message = f"{_path(name)}: {error.strerror}"
    elif isinstance(error, MemoryError):
        message, remedy = "not enough memory" + (f": {message}" if message else ""), "Use smaller batches."
    known = isinstance(error, EXPLAINED) or type(error).__module__.split(".")[0] in EXPLAINED_LIBRARIES
    if not known and remedy is None:
        message = f"unexpected {type(error).__name__}: {message} ({TRACEBACK} shows where)"
    if len(message) > LONGEST_MESSAGE:
        message = f"{message[:LONGEST_MESSAGE]}... ({TRACEBACK} shows all)"
    return f"{message.rstrip('.')}. {remedy}" if remedy and remedy not in message else message or type(error).__name__


def _raised_in(package: str, error: BaseException) -> bool:
    """Whether an error came through a package's code, as one of a process that shares tensors and is gone."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(name.startswith(package) for name in modules)


@contextmanager
def about(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Name the file or folder that is worked on in any error, with what to do; for libraries that don't.

    Raises:
        FileError: for every exception but those that name the path already.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FileError) or (isinstance(error, EXPLAINED) and str(path) in describe(error)):
            raise
        raise FileError(f"{path}: {describe(error).rstrip('.')}. {remedy}") from error


def _path(name: str | bytes | int) -> str:
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else str(name)


def _in_one_line(text: str) -> str:
    """Without line ends and other characters that would steer the terminal."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


_in_command = False
"""Whether processes that are forked now belong to a command."""


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the signals that ask to stop, and raises `Stopped` for each."""
    global _in_command
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    # A shell's background job ignores SIGINT, and goes on ignoring it.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:
            signal.signal(number, stop)
    _in_command = True
    try:
        yield received
    finally:
        _in_command = False
        if not received:
            for number, handler in before.items():
                signal.signal(number, handler)


def _in_forked_process() -> None:
    """Workers leave Ctrl-C, which reaches them too, to the process that started them and ends them."""
    if _in_command:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.excepthook = _print_in_worker


def _print_in_worker(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print what a worker's thread ended with; a process that let go of its worker says itself why it did."""
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


os.register_at_fork(after_in_child=_in_forked_process)
