"""Serves embeddings, and neighbours of an index, over HTTP.

    python hub/serve.py --model PATH [--index INDEX]

POST /v1/embeddings (OpenAI's form: texts, and parts of text and picture), /embed (items), /search; GET /health, /metrics
(Prometheus), /docs. Requests are joined into batches. With NOTELLM2_API_KEY in the environment each must bring that key.
SIGTERM and Ctrl-C end it: what has arrived is answered first.

Exit code: 0 stopped; 1 failed; 2 wrong options.
"""

import training.tables.commands.own_folder  # noqa: F401  # isort: skip

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from transformers import AutoConfig

from hub.catalogue.encoder import ItemEncoder
from hub.catalogue.encoding import find_model
from hub.neighbours.index import Index
from hub.neighbours.queries import check_model
from hub.serving.app import Service, make_app
from hub.serving.batching import Batcher, BatchSizes
from hub.serving.limits import Limits
from hub.serving.metrics import Metrics
from hub.serving.pictures import Pictures
from hub.serving.requests import MOST
from hub.serving.server import bind, listen
from modeling_notellm2 import choose_precision
from training.tables.commands.bounds import AtLeastOne, Bounds, check_bounds
from training.tables.commands.handler import DONE, OptionError, command, parse
from training.tables.commands.options import allow_remote_option, device_option, dtype_option
from training.tables.remote.places import Allowed


API_KEY = "NOTELLM2_API_KEY"
MIB = 2**20


@dataclass
class ServeArguments:
    """What is served, where, and what a request may hold."""

    model: str = field(
        default=os.environ.get("NOTELLM2_MODEL", "runs/demo/model"), metadata={"help": "Folder or Hub id of the model."}
    )
    index: str | None = field(
        default=os.environ.get("NOTELLM2_INDEX"), metadata={"help": "Index of this model's vectors, for /search."}
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a model of the Hub."})
    name: str | None = field(
        default=None, metadata={"help": "Of the model in requests and answers; none: its folder's, or its Hub id."}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen at; 0.0.0.0 for all."})
    port: Annotated[int, Bounds(0, 65_535)] = field(default=8000, metadata={"help": "Port; 0: a free one."})
    device: str = device_option()
    dtype: str = dtype_option()
    batch_tokens: AtLeastOne = field(default=BatchSizes.tokens, metadata={"help": "Tokens of a batch, with padding."})
    batch_items: Annotated[int, Bounds(1, 4096)] = field(
        default=BatchSizes.items, metadata={"help": "Items of a batch."}
    )
    wait_ms: Annotated[float, Bounds(0, 1000)] = field(
        default=1000 * BatchSizes.wait, metadata={"help": "How long an item waits for others to join it."}
    )
    queue_items: AtLeastOne = field(
        default=BatchSizes.queue, metadata={"help": "Items that wait or are encoded; more are refused with 429."}
    )
    num_workers: Annotated[int, Bounds(1, 256)] = field(
        default=min(8, os.cpu_count() or 1), metadata={"help": "Threads that open pictures and tokenize."}
    )
    max_body_mb: Annotated[int, Bounds(1, 1024)] = field(
        default=Limits.body_bytes // MIB, metadata={"help": "MiB of a request."}
    )
    max_pixels: AtLeastOne = field(default=Limits.pixels, metadata={"help": "Pixels of an item's pictures."})
    max_characters: AtLeastOne = field(default=Limits.characters, metadata={"help": "Characters of an item."})
    max_items: Annotated[int, Bounds(1, MOST)] = field(default=Limits.items, metadata={"help": "Items of a request."})
    body_seconds: Annotated[float, Bounds(0.1, 3600)] = field(
        default=Limits.body_seconds, metadata={"help": "Until a request's head, and then its body, must have arrived."}
    )
    allow_remote: str | None = allow_remote_option()

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.max_items > self.queue_items:
            raise OptionError(f"--max_items {self.max_items} don't fit into --queue_items {self.queue_items}.")
        if self.allowed().places:
            raise OptionError(f"--allow_remote {self.allow_remote}: requests' pictures are fetched from hosts alone.")

    def limits(self) -> Limits:
        """Of requests."""
        body = self.max_body_mb * MIB
        return Limits(
            body_bytes=body,
            all_bodies=max(Limits.all_bodies, 4 * body),
            body_seconds=self.body_seconds,
            pixels=self.max_pixels,
            characters=self.max_characters,
            items=self.max_items,
        )

    def allowed(self) -> Allowed:
        """Where pictures may be fetched."""
        return Allowed.of(self.allow_remote)


def load_service(arguments: ServeArguments) -> Service:
    """Load model and index.

    Raises:
        ValueError: for a model or index that can't be used, or that don't belong together.
    """
    folder = find_model(arguments.model, arguments.revision)
    index = None
    dtype = arguments.dtype
    if arguments.index is not None:
        index = Index.load(arguments.index)
        check_model(index, folder)
        dtype = index.settings["dtype"] if dtype == "auto" else dtype
    precision = choose_precision(dtype, arguments.device)
    print(f"Precision: {precision}")
    micl = AutoConfig.from_pretrained(folder, trust_remote_code=True).micl
    encoder = ItemEncoder(str(folder), precision.name, arguments.device, arguments.batch_items, visual=micl)
    sizes = BatchSizes(arguments.batch_tokens, arguments.batch_items, arguments.wait_ms / 1000, arguments.queue_items)
    metrics, limits = Metrics(), arguments.limits()
    batcher = Batcher(encoder, sizes, arguments.num_workers, metrics)
    batcher.load()
    local = Path(arguments.model).is_dir()
    name = arguments.name or (Path(arguments.model).resolve().name if local else arguments.model)
    pictures = Pictures(limits, arguments.allowed())
    return Service(name, batcher, pictures, limits, metrics, index, os.environ.get(API_KEY) or None)


@command("hub/serve.py")
def main(options: Sequence[str] | None = None) -> int | None:
    """Entry point."""
    (arguments,) = parse(ServeArguments, options=options)
    with bind(arguments.host, arguments.port) as bound:
        service = load_service(arguments)
        listen(make_app(service), bound, arguments.body_seconds)
    return DONE


if __name__ == "__main__":
    sys.exit(main())
