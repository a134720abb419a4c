"""What must not go to the Hub: pickles, secrets, paths of this machine, training state, links that lead elsewhere.

Every file is looked at, and every fault is named with what to do, so that one round of mending is enough.
"""

import os
import re
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from tqdm.auto import tqdm


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

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npz"}
PICKLE_HEAD = re.compile(rb"\x80[\x02-\x05](?:\x95.{8})?[\x00-\x7f\x80-\x9f]", re.DOTALL)
STATE_FILE = re.compile(
    r"(?:optimizer|scheduler|scaler|rng_state|training_args|trainer_state|zero_pp_rank|mp_rank).*\.(?:pt|pth|bin|json|safetensors|distcp)"
    r"|.*\.distcp|zero_to_fp32\.py|pytorch_model_fsdp.*"
)
STATE_FOLDER = re.compile(r"checkpoint-\d+|global_step\d+|(?:optimizer|pytorch_model_fsdp)_\d+")
TRAINING_STATE = "Only needed to go on with a training: delete it, or publish the run's model folder."

SECRETS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "an AWS access key": r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",
    "a private key": r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----",
    "a GitHub token": r"\b(?:ghp|gho|ghs|ghu|github_pat)_[A-Za-z0-9_]{30,}\b",
    "an API key": r"\bsk-(?:[a-z]+-)?[A-Za-z0-9_-]{20,}\b",
    "a Google API key": r"\bAIza[0-9A-Za-z_-]{35}\b",
    "a Slack token": r"\bxox[abprs]-[0-9A-Za-z-]{10,}\b",
    "a key or password": (
        r"(?im)\b[\w-]*(?:(?:api|access|private|secret)[_-]?key|secret|(?:access|auth)_?token|password|passwd)[\"']?\s*[:=]\s*"
        r"(?:[\"'][A-Za-z0-9+/=_-]{16,}[\"']|(?=\S*\d)[A-Za-z0-9+/=_-]{16,}\s*$)"
    ),
    "a login in an address": r"\bhttps?://[^\s/:@\"']+:[^\s/:@\"']{4,}@",
}
SECRET_PATTERNS = {name: re.compile(pattern.encode()) for name, pattern in SECRETS.items()}

ROOTS = "home|Users|root|tmp|mnt|data|workspace|scratch|opt|var|srv|media|private|content|gpfs|lustre"
START = r"(?:(?<![\w./:~<)-])|(?<=file://))"
"""Before an absolute path: nothing that makes it the rest of an address or of a relative path."""
REST = r"/[\w.~-]+(?:/[\w.~-]+)*"
LOCAL_PATH = re.compile(
    rf"{START}/(?:{ROOTS}){REST}".encode() + rb"|(?<![\w])[A-Za-z]:\\{1,2}(?:Users|Documents|data|temp|tmp)\\[\w.~\\-]+"
)
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
        weight_faults = [*_state_faults(name)] or [*_pickle_faults(name, path)]
        faults += [*weight_faults, *_text_faults(name, path, here)]
    return faults


def own_folders(folder: Path | None) -> re.Pattern[bytes]:
    """Matches this machine's folders: home, working folder, temporary folder, and the one that is published."""
    places = {Path.home(), Path.cwd(), Path(tempfile.gettempdir()), *([folder.resolve()] if folder else [])}
    names = sorted({str(place) for place in places if len(place.parts) > 1}, key=len, reverse=True)
    return re.compile(f"{START}(?:{'|'.join(map(re.escape, names))}){REST}".encode())


def _state_faults(name: str) -> Iterator[Fault]:
    *parents, last = name.split("/")
    state_folder = next((part for part in parents if STATE_FOLDER.fullmatch(part)), None)
    if state_folder:
        yield Fault(name, f"part of the training checkpoint {state_folder}", TRAINING_STATE)
    elif STATE_FILE.fullmatch(last):
        yield Fault(name, "state of a training (optimizer, schedule, random numbers or arguments)", TRAINING_STATE)


def _pickle_faults(name: str, path: Path) -> Iterator[Fault]:
    """A pickle runs code when it is read, whatever its file is called."""
    remedy = "Save weights as safetensors (model.save_pretrained does), anything else as JSON or Parquet."
    if path.suffix.lower() == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            yield Fault(name, f"not a readable safetensors file ({error})", "Save the model again.")
        return
    with path.open("rb") as stream:
        head = stream.read(16)
    if path.suffix.lower() in PICKLES:
        yield Fault(name, f"a {path.suffix} file, which is or may be a pickle", remedy)
    elif PICKLE_HEAD.match(head):
        yield Fault(name, "a pickle by its content", remedy)
    elif zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [member for member in archive.namelist() if member.endswith((".pkl", ".pickle", ".pt", ".bin"))]
        if inside:
            yield Fault(name, f"an archive with the pickle {inside[0]}", remedy)


def secrets_in(content: bytes, here: re.Pattern[bytes]) -> Iterator[str]:
    """What a text that users wrote holds and nobody else should read: secrets, and folders of this machine.

    Args:
        content: the text in UTF-8.
        here: as `own_folders` gives it.
    """
    for what, pattern in SECRET_PATTERNS.items():
        if pattern.search(content):
            yield f"what looks like {what}"
    if match := here.search(content):
        yield f"a path of this machine, {match[0].decode(errors='replace')}"


def _text_faults(name: str, path: Path, here: re.Pattern[bytes]) -> Iterator[Fault]:
    with path.open("rb") as stream:
        if b"\0" in stream.read(8192):
            return  # not a text
        stream.seek(0)
        content = stream.read()
    for what, pattern in SECRET_PATTERNS.items():
        if match := pattern.search(content):
            line = content.count(b"\n", 0, match.start()) + 1
            yield Fault(name, f"line {line}: what looks like {what}", "Take it out and have it revoked.")
    match = here.search(content) or (None if path.name in VOCABULARIES else LOCAL_PATH.search(content))
    if match:
        line = content.count(b"\n", 0, match.start()) + 1
        local_path = match[0].decode(errors="replace")
        yield Fault(name, f"line {line}: a path of this machine, {local_path}", "Write a Hub id or a relative path.")
