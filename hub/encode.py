"""Encodes a whole catalogue: an item table in, a folder of Parquet shards with embeddings out.

    python hub/encode.py --model PATH --items ITEMS --output DIR [--update]

With --update, DIR may hold an earlier version of the catalogue: only new and changed items are encoded.
DIR gets shard-*.parquet (`item_id`, `embedding`, `content_hash`; with --visual `visual_embedding` and `has_image`),
manifest.json and rejects.parquet (rows left out: `item_id`, `file`, `row`, `reason`). Killed at any moment and started
again with the same options, the job goes on with the first missing shard; on one kind of machine with one number of
threads (OMP_NUM_THREADS) the shards come out the same, byte for byte. With --engine ray it runs on the machines of a Ray
cluster, which must all see ITEMS, PATH and DIR.

Exit code: 0 all rows encoded; 3 finished, with rows in rejects.parquet; 1 failed; 2 wrong options.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hub.catalogue.encoding import EncodeArguments, encode
from hub.catalogue.shards import REJECTS, read_rejects
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse


def summary(manifest: dict[str, Any], output: Path) -> str:
    """What the job did, for people."""
    counts, settings = manifest["counts"], manifest["job"]["settings"]
    lines = [
        f"{output}: {counts['items']:,} items, {manifest['width']} dimensions as {settings['embedding_type']}, "
        f"shards: {len(manifest['shards'])}"
    ]
    if counts["copied"]:
        lines.append(
            f"{counts['copied']:,} unchanged items kept their vectors, {counts['items'] - counts['copied']:,} were encoded"
        )
    if counts["rejects"]:
        lines.append(f"{counts['rejects']:,} of {counts['rows']:,} rows left out, see {output / REJECTS}; the first:")
        lines += [
            f"  {reject.file}, row {reject.row}, item_id {reject.ids[0]!r}: {reject.reason}"
            for reject in read_rejects(output, 5)
        ]
    return "\n".join(lines)


@command("hub/encode.py", go_on="Start it again with the same options: it goes on with the first missing shard.")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(EncodeArguments, options=options)
    manifest = encode(arguments)
    print(summary(manifest, Path(arguments.output)))
    return DONE_WITH_REJECTS if manifest["counts"]["rejects"] else DONE


__all__ = ["EncodeArguments", "encode", "main"]

if __name__ == "__main__":
    sys.exit(main())
