"""A page of pictures for people who would rather look than read: items, their nearest neighbours, and why.

    python hub/gallery.py --model PATH --items ITEMS.parquet --output FILE.html [--queries N | --query_ids ID ID] [-k 8]

Below each query stand its neighbours by picture and text together, by the picture alone, by the text alone, and by the
visual embedding of a model with mICL. With --label_column neighbours of the query's category are marked, with --pairs its
true partners. Rows of ITEMS that can't be used are listed in FILE.rejects.jsonl.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import sys
from collections.abc import Sequence
from pathlib import Path

from hub.pages.gallery_making import GalleryArguments, gallery
from training.tables.commands.handler import DONE, DONE_WITH_REJECTS, command, parse


@command("hub/gallery.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(GalleryArguments, options=options)
    catalogue = gallery(arguments)
    size = Path(arguments.output).stat().st_size / 1e6
    print(f"{arguments.output}: {size:.1f} MB, open it in a browser. {len(catalogue.item_ids):,} items compared.")
    if catalogue.rejects:
        print(f"{len(catalogue.rejects):,} rows left out: {Path(arguments.output).with_suffix('.rejects.jsonl')}")
        return DONE_WITH_REJECTS
    return DONE


__all__ = ["GalleryArguments", "gallery", "main"]

if __name__ == "__main__":
    sys.exit(main())
