"""Versions of an encoded catalogue: an update is written beside the earlier one and takes its place when it is whole.

Until then readers see the earlier one. What a killed update has done stays in `.NAME.update` beside it, and the next
start of the same update goes on there; that of another begins anew.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub.catalogue.catalogue import Catalogue
from hub.catalogue.earlier import Earlier
from hub.catalogue.shards import MANIFEST, REJECTS, ShardError, differences, read_manifest
from training.tables.commands.files import take_place
from training.tables.commands.outputs import Output, locked


ALL_ANEW = "Update: all items are encoded anew, as"
COMPARED = ("embedding_type", "visual", "dtype", "compile")
"""Settings that decide vectors. The others decide how a table is cut or read, and what is read is compared itself."""


@dataclass(frozen=True)
class Version:
    """Where a version is written, and what it can take from the earlier one.

    Attributes:
        folder: to write into.
        earlier: None where there is none, or nothing of it can be used.
        of: hash of the version that is updated; None without one.
    """

    folder: Path
    earlier: Earlier | None = None
    of: str | None = None

    def started_as(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The job as a killed start is known by: it must have begun with the same earlier version."""
        return {**job} if self.of is None else {**job, "update_of": self.of}


@contextmanager
def version_to_write(output: Path, job: Mapping[str, Any], update: bool) -> Iterator[Version]:
    """Give the folder that a job goes to: `output`, or for an update one beside it, which then takes `output`'s place.

    The same table may be another catalogue: pictures change at their paths. So an update always looks at all items.

    Args:
        output: of the command.
        job: as `describe_job` gives it.
        update: whether an earlier version in `output` is to be replaced.

    Raises:
        ShardError: when `output` holds files that would be lost, or is damaged.
        FileError: when another update of it is under way.
    """
    beside = output.resolve().parent / f".{output.resolve().name}.update"
    manifest = read_manifest(output) if update and (output / MANIFEST).is_file() else None
    started = manifest is not None and not manifest["complete"] and not differences(manifest["job"], job)
    if manifest is None or started:
        yield Version(output)
        if update:
            shutil.rmtree(beside, ignore_errors=True)  # of an update that is no longer wanted
        return
    with locked(Output("--output", output).lock, output):
        _check_strangers(output)
        version = Version(beside, _usable(output, manifest, job), _hash_of(manifest))
        if (beside / MANIFEST).is_file() and differences(read_manifest(beside)["job"], version.started_as(job)):
            shutil.rmtree(beside)
        yield version
        take_place(beside, output)


def _usable(output: Path, manifest: Mapping[str, Any], job: Mapping[str, Any]) -> Earlier | None:
    """What of the earlier version can be used; says why nothing can."""
    reason = _against(manifest, job)
    if reason is None:
        try:
            Catalogue.open(output)  # its shards are whole
            return Earlier.open(output, manifest)
        except ShardError as error:  # it goes anyway
            reason = str(error)
    print(f"{ALL_ANEW} {reason.rstrip('.')}.")
    return None


def _against(manifest: Mapping[str, Any], job: Mapping[str, Any]) -> str | None:
    """Why a new job would give the same items other vectors; None where it wouldn't."""
    old = manifest["job"]
    if not manifest["complete"]:
        return "the earlier job is not finished"
    if old["model"]["sha256"] != job["model"]["sha256"]:
        return "the model is another"
    changed = [name for name in COMPARED if old["settings"].get(name) != job["settings"][name]]
    return f"--{changed[0]} was {old['settings'].get(changed[0])}" if changed else None


def _check_strangers(output: Path) -> None:
    ours = (MANIFEST, REJECTS)
    for path in sorted(output.iterdir()):
        is_shard = path.name.startswith("shard-") and path.suffix == ".parquet"
        if not (path.name in ours or is_shard or path.name.startswith(".")):
            raise ShardError(
                f"{path} is not of this command and would be lost; move it away, or choose another --output."
            )


def _hash_of(manifest: Mapping[str, Any]) -> str:
    content = manifest["shards"] if manifest["complete"] else manifest["job"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
