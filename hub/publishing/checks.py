"""What must not go to the Hub: pickles, secrets, paths of this machine, training state, links that lead elsewhere.

Every file is looked at, and every fault is named with what to do, so that one round of mending is enough.
"""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from tqdm.auto import tqdm

from hub.publishing.contents import PICKLES, UNREADABLE, HiddenPickle, texts_of
from hub.publishing.secrets import LOCAL_PATH, own_folders, secrets_in


@dataclass(frozen=True)
class Fault:
    """Why a file can't be published.

    Attributes:
        file: its path below the folder.
        what: is wrong with it.
        remedy: what to do.
    """

    file: str
    what: str
    remedy: str


class RefusedError(ValueError):
    """Something can't be published; `faults` says all that is wrong with it."""

    def __init__(self, faults: list[Fault]):
        self.faults = faults
        super().__init__("\n".join(f"{fault.file}: {fault.what}. {fault.remedy}" for fault in faults))


NOT_PUBLISHED = {".git", ".cache", "__pycache__", ".DS_Store", ".ipynb_checkpoints"}
"""Names that are left out silently: nobody wants them on the Hub."""

STATE_FILE = re.compile(
    r"(?:optimizer|scheduler|scaler|rng_state|training_args|trainer_state|zero_pp_rank|mp_rank).*\.(?:pt|pth|bin|json|safetensors|distcp)"
    r"|.*\.distcp|zero_to_fp32\.py|pytorch_model_fsdp.*|events\.out\.tfevents\..*"
)
STATE_FOLDER = re.compile(r"checkpoint-\d+|global_step\d+|(?:optimizer|pytorch_model_fsdp)_\d+")
TRAINING_STATE = "Only needed to go on with a training: delete it, or publish the run's model folder."

VOCABULARIES = {"tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "added_tokens.json"}
"""Lists of tokens, among which pieces of any text occur: only this machine's own folders are looked for in them."""


def folder_files(folder: Path) -> tuple[dict[str, Path], list[Fault]]:
    """Files below a folder by their path there, and faults of those that can't be taken."""
    files: dict[str, Path] = {}
    faults: list[Fault] = []
    root = folder.resolve()
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            faults.append(
                Fault(name, f"a link out of the folder, to {os.readlink(path)}", "Put the file itself there.")
            )
        elif path.is_symlink() and not path.exists():
            faults.append(Fault(name, f"a link to {os.readlink(path)}, which isn't there", "Delete it."))
        elif path.is_symlink() and path.is_dir():
            faults.append(Fault(name, "a link to a folder", "Put the files themselves there."))
        elif path.is_file():
            files[name] = path
    return files, faults


def _walk(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.name not in NOT_PUBLISHED:
            if path.is_dir() and not path.is_symlink():
                yield from _walk(path)
            else:
                yield path


def file_faults(files: Mapping[str, Path], folder: Path | None = None) -> list[Fault]:
    """All faults of files that were read off a folder or made for publishing.

    Args:
        files: by path in the repository.
        folder: they came from; its place on this machine must not occur in them.
    """
    here = own_folders(folder)
    faults: list[Fault] = []
    for name, path in tqdm(sorted(files.items()), desc="Checking files", unit="file", leave=False):
        faults += [*_state_faults(name)] or [*_content_faults(name, path, here)]
    return faults


def _state_faults(name: str) -> Iterator[Fault]:
    *parents, last = name.split("/")
    state_folder = next((part for part in parents if STATE_FOLDER.fullmatch(part)), None)
    if state_folder:
        yield Fault(name, f"part of the training checkpoint {state_folder}", TRAINING_STATE)
    elif STATE_FILE.fullmatch(last):
        yield Fault(name, "state of a training (optimizer, schedule, random numbers or arguments)", TRAINING_STATE)


def _content_faults(name: str, path: Path, here: re.Pattern[str]) -> Iterator[Fault]:
    """Pickles, secrets and paths of this machine, wherever in the file they stand."""
    as_data = "Save weights as safetensors (model.save_pretrained does), anything else as JSON or Parquet."
    if path.suffix.lower() in PICKLES:
        yield Fault(name, f"a {path.suffix} file, which is or may be a pickle", as_data)
        return
    try:
        for where, text in texts_of(path):
            yield from _text_faults(name, where, text, here)
    except HiddenPickle as error:
        yield Fault(name, str(error), as_data)
    except (SafetensorError, *UNREADABLE) as error:
        kind = "safetensors file" if path.suffix.lower() == ".safetensors" else "file of its kind"
        yield Fault(name, f"not a readable {kind} ({error})", "Save it again, or leave it out.")


def _text_faults(name: str, where: str, text: str, here: re.Pattern[str]) -> Iterator[Fault]:
    def place(at: int) -> str:
        line = f"line {text.count(chr(10), 0, at) + 1}"
        return f"{where}, {line}" if where else line

    for what, at in secrets_in(text):
        yield Fault(name, f"{place(at)}: what looks like {what}", "Take it out and have it revoked.")
    match = here.search(text) or (None if Path(name).name in VOCABULARIES else LOCAL_PATH.search(text))
    if match:
        path = f"{place(match.start())}: a path of this machine, {match[0]}"
        yield Fault(name, path, "Write a Hub id or a relative path.")
