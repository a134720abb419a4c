"""Hashes of files: by SHA-256 results name what they describe, as the Hub names its files; by XXH3 damage is seen.

On one core of a server SHA-256 takes 0.7 s for a GB, XXH3 0.1 s, which counts where all is checked at each start.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from training.tables.commands.handler import FileError


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, as hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_xxh3(path: Path) -> str:
    """XXH3 of 128 bits of a file's content: against damage, not against forgers."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, xxhash.xxh3_128).hexdigest()


def weights_of(model: Path) -> dict[str, str] | None:
    """SHA-256 of each file of weights in the folder of a model or an adapter; None where it is no folder, but an id."""
    return {path.name: file_sha256(path) for path in sorted(model.glob("*.safetensors"))} if model.is_dir() else None


def check_weights(name: str | Path, result: Mapping[str, Any], weights: Mapping[str, str] | None) -> None:
    """Refuse what was measured on other weights than these. Where either are unknown there is nothing to compare.

    Args:
        name: of the file with the result.
        result: content of metrics.json or evaluation.json.
        weights: what `weights_of` gives for a model.

    Raises:
        FileError: naming the file.
    """
    named = result.get("weights")
    if named and weights and named != weights:
        raise FileError(f"{name}: its figures are of other weights; measure these with training/evaluate.py.")


def changes(hashes: Mapping[str, str], folder: Path) -> list[str]:
    """In words, which files of a folder are missing or have another XXH3 than was written down; they are read for that."""
    missing = [f"{name} is missing" for name in hashes if not (folder / name).is_file()]
    there = [name for name in hashes if (folder / name).is_file()]
    return [*missing, *(f"{name} has changed" for name in there if file_xxh3(folder / name) != hashes[name])]
