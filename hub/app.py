"""A Gradio app over a catalogue: pick or upload an item, see its neighbours, weigh the pictures, switch modalities off.

    python hub/app.py [--model runs/demo/model] [--items runs/demo/data/items.parquet] [--index I --visual_index V]

Without --index the catalogue is encoded and indexed first, into a cache folder. A link with `?item=ID` opens that item.

As a Space, `hub/publish.py --space` packages it: an app.py that calls `main`, with indexes and items beside it. By hand: this
file's folders `hub/` and `modeling_notellm2/`, and the options in the environment: NOTELLM2_MODEL (Hub id), NOTELLM2_ITEMS (data
set id or file), NOTELLM2_INDEX and NOTELLM2_VISUAL_INDEX; without these two the Space encodes at its first start.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from training.tables.commands.bounds import Bounds, check_bounds
from training.tables.commands.handler import DONE, command, parse
from training.tables.commands.options import (
    allow_remote_option,
    device_option,
    dtype_option,
    encoding_option,
    split_option,
)


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported


from hub.pages.app_page import App, build_page, launch
from hub.pages.app_search import open_search


@dataclass
class AppArguments:
    """What the app shows, and where it listens."""

    model: str = field(
        default=os.environ.get("NOTELLM2_MODEL", "runs/demo/model"), metadata={"help": "Folder or Hub id of the model."}
    )
    items: str = field(
        default=os.environ.get("NOTELLM2_ITEMS", "runs/demo/data/items.parquet"),
        metadata={"help": "Item table: file, folder, or Hub dataset."},
    )
    split: str | None = split_option()
    encoding: str | None = encoding_option()
    allow_remote: str | None = allow_remote_option()
    index: str | None = field(
        default=os.environ.get("NOTELLM2_INDEX"), metadata={"help": "Index of ITEMS; none: encode and index them now."}
    )
    visual_index: str | None = field(
        default=os.environ.get("NOTELLM2_VISUAL_INDEX"),
        metadata={"help": "Index of the visual embeddings; without it there is no weight to slide."},
    )
    cache: str | None = field(default=None, metadata={"help": "Folder for what is built; none: in the user's cache."})
    device: str = device_option()
    dtype: str = dtype_option()
    host: str = field(
        default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"),  # which a Space sets
        metadata={"help": "Address to listen at; 0.0.0.0 for all."},
    )
    port: Annotated[int, Bounds(0, 65_535)] = field(
        default=int(os.environ.get("GRADIO_SERVER_PORT", "7860")), metadata={"help": "Port to listen at."}
    )

    def __post_init__(self) -> None:
        check_bounds(self)


@command("hub/app.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(AppArguments, options=options)
    search = open_search(
        arguments.model,
        arguments.items,
        arguments.index,
        arguments.visual_index,
        split=arguments.split,
        encoding=arguments.encoding,
        allow_remote=arguments.allow_remote,
        cache=arguments.cache,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    launch(build_page(App(search), "Related items"), arguments.host, arguments.port)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
