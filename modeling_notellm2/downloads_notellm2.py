"""Downloaded weights are what the Hub says they are, or loading them is an error.

huggingface_hub compares sizes alone. Its cache names a large file by the SHA-256 that the Hub gave for it
(`snapshots/COMMIT/model.safetensors` links to `blobs/SHA256`), so that the content can be held against its name, each time
it is loaded. Other files are not checked: those of a folder, and where the file system has no links.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


SHA256 = re.compile("[0-9a-f]{64}")


def check_downloads(files: Iterable[str | os.PathLike]) -> None:
    """Hashes files of the Hub's cache, several at once (some 2 s for each GB of the largest on a common CPU).

    Raises:
        OSError: for the first file whose content is not the one that the Hub named.
    """
    named = [(path, expected) for path in map(Path, files) if (expected := sha256_in_cache(path))]
    with ThreadPoolExecutor(max_workers=8) as pool:
        for (path, expected), found in zip(named, pool.map(_sha256, [path for path, _ in named]), strict=True):
            if found != expected:
                raise OSError(
                    f"{path} is damaged or was tampered with: its SHA-256 is {found}, the Hub names {expected}. "
                    f"Delete {path.resolve()} and load again."
                )


def sha256_in_cache(path: Path) -> str | None:
    """What the Hub says of a file in its cache; None for any other file."""
    target = Path(os.readlink(path)) if path.is_symlink() else path
    return target.name if target.parent.name == "blobs" and SHA256.fullmatch(target.name) else None


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
