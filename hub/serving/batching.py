"""Items of many requests in common batches: a bounded queue, a wait of milliseconds, one model.

Each item is prepared alone, so one that can't be read ends its own request and no other. While the model runs, the next
items gather: under load batches are full without any wait.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import numpy as np
from PIL import Image

from hub.catalogue.encoder import EncodedBlock, ItemEncoder, Place, PreparedBlock
from hub.serving.limits import RequestError
from hub.serving.metrics import Metrics
from modeling_notellm2.images_notellm2 import image_sources
from modeling_notellm2.pixels_notellm2 import join_pictures
from training.tables.items import Item


@dataclass(frozen=True)
class BatchSizes:
    """How items are joined.

    Attributes:
        tokens: of a batch, padding counted; one longer item is a batch of its own.
        items: of a batch.
        wait: seconds that the oldest item waits for others.
        queue: items of all requests that are waiting or being encoded.
    """

    tokens: int = 8192
    items: int = 64
    wait: float = 0.004
    queue: int = 1024


@dataclass(frozen=True)
class Embedded:
    """What the model makes of an item.

    Attributes:
        embedding: `(d,)` float32.
        visual: `(d,)` float32, zeros without a picture; None of a model without mICL.
        tokens: that the LLM read, pictures' placeholders counted.
    """

    embedding: np.ndarray
    visual: np.ndarray | None
    tokens: int


@dataclass(frozen=True)
class Waiting:
    """A prepared item and who waits for it."""

    block: PreparedBlock
    result: asyncio.Future
    since: float = field(default_factory=time.monotonic)

    @property
    def tokens(self) -> int:
        return len(self.block.input_ids[0])


class Batcher:
    """
    Embeds items in batches; `run` is its loop.

    Args:
        encoder: the model.
        sizes: of batches and the queue.
        workers: threads that read texts and pictures, each with a processor of its own.
        metrics: where batches are counted.
    """

    def __init__(self, encoder: ItemEncoder, sizes: BatchSizes, workers: int, metrics: Metrics):
        self.encoder, self.sizes, self.metrics = encoder, sizes, metrics
        self.waiting: deque[Waiting] = deque()
        self.admitted = 0
        self._rate = 0.0
        self._arrival = asyncio.Event()
        self._preparing = ThreadPoolExecutor(workers, "prepare")
        self._modelling = ThreadPoolExecutor(1, "model")
        self._processors: SimpleQueue[ItemEncoder] = SimpleQueue()
        for _ in range(workers):
            self._processors.put(ItemEncoder(encoder.model_path))

    def load(self) -> None:
        """Load the model and the processors, and run both once."""
        for _ in range(self._processors.qsize()):
            block = self._prepare({"content": "warm"})
            self.encoder.embed(block)

    async def embed(self, items: dict[str, Item]) -> list[Embedded]:
        """Embeddings of a request's items.

        Args:
            items: by where they stand in the request; their pictures are closed.

        Raises:
            RequestError: naming the first item that can't be embedded; or when the queue is full.
        """
        if len(items) + self.admitted > self.sizes.queue:
            wait = self.admitted / self._rate if self._rate else 1.0
            raise RequestError(
                429, f"{self.admitted:,} items are waiting; send it again later.", None, "queue_full", min(wait, 60)
            )
        self.admitted += len(items)
        self.metrics.queue.set(self.admitted)
        loop = asyncio.get_running_loop()
        mine: list[Waiting] = []
        try:
            blocks = await asyncio.gather(
                *(loop.run_in_executor(self._preparing, self._prepare, item) for item in items.values())
            )
            for where, block in zip(items, blocks, strict=True):
                _check(block, where)
            mine = [Waiting(block, loop.create_future()) for block in blocks]
            self.waiting.extend(mine)
            self._arrival.set()
            encoded = await asyncio.gather(*(waiting.result for waiting in mine))
            for where, block in zip(items, encoded, strict=True):
                _check(block, where)
            return [_embedded(block, waiting.tokens) for block, waiting in zip(encoded, mine, strict=True)]
        finally:
            for waiting in mine:
                waiting.result.cancel()  # of a client that has gone
            self.admitted -= len(items)
            self.metrics.queue.set(self.admitted)

    async def run(self) -> None:
        """Encode what arrives, for ever."""
        while True:
            if batch := await self._next_batch():
                start = time.monotonic()
                await self._encode(batch)
                seconds = max(time.monotonic() - start, 1e-6)
                self.metrics.batch(len(batch), sum(waiting.tokens for waiting in batch), seconds)
                rate = len(batch) / seconds
                self._rate = rate if not self._rate else 0.9 * self._rate + 0.1 * rate

    def close(self) -> None:
        """End the threads."""
        self._preparing.shutdown(cancel_futures=True)
        self._modelling.shutdown(cancel_futures=True)

    def _prepare(self, item: Item) -> PreparedBlock:
        reader = self._processors.get()
        try:
            return reader.prepare(0, [(Place("", "", 0), item)])
        finally:
            self._processors.put(reader)
            for picture in image_sources(item.get("image")):
                if isinstance(picture, Image.Image):
                    picture.close()  # a request may have hundreds, each of which would keep its pixels until the end

    def _model(self, blocks: Sequence[PreparedBlock]) -> EncodedBlock:
        return self.encoder.embed(joined(blocks))

    async def _next_batch(self) -> list[Waiting]:
        """The oldest items that fit together, once there are enough or the oldest has waited."""
        while not self.waiting:
            self._arrival.clear()
            await self._arrival.wait()
        remaining = self.waiting[0].since + self.sizes.wait - time.monotonic()
        while remaining > 0 and len(self.waiting) < self.sizes.items:
            self._arrival.clear()
            try:
                await asyncio.wait_for(self._arrival.wait(), remaining)
            except TimeoutError:
                break
            remaining = self.waiting[0].since + self.sizes.wait - time.monotonic()
        batch: list[Waiting] = []
        longest = 0
        while self.waiting and len(batch) < self.sizes.items:
            longest = max(longest, self.waiting[0].tokens)
            if batch and longest * (len(batch) + 1) > self.sizes.tokens:
                break
            batch.append(self.waiting.popleft())
        return [waiting for waiting in batch if not waiting.result.done()]

    async def _encode(self, batch: Sequence[Waiting]) -> None:
        """Answer all of a batch; where it fails as a whole, each alone."""
        blocks = [waiting.block for waiting in batch]
        try:
            encoded = await asyncio.get_running_loop().run_in_executor(self._modelling, self._model, blocks)
        except Exception as error:
            if len(batch) > 1:
                for waiting in batch:
                    await self._encode([waiting])
            elif not batch[0].result.done():
                batch[0].result.set_exception(error)
            return
        for waiting, of_item in zip(batch, separated(encoded, len(batch)), strict=True):
            if not waiting.result.done():
                waiting.result.set_result(of_item)


def joined(blocks: Sequence[PreparedBlock]) -> PreparedBlock:
    """One batch of blocks of one item each; an item is named by its place among them."""
    pictures = [block.pictures[0] for block in blocks if block.pictures[0]]
    return PreparedBlock(
        0,
        [Place(str(number), "", number) for number in range(len(blocks))],
        list(range(len(blocks))),
        [block.input_ids[0] for block in blocks],
        [block.num_images[0] for block in blocks],
        [join_pictures(pictures) if pictures else {}],
        [],
    )


def separated(block: EncodedBlock, count: int) -> list[EncodedBlock]:
    """A block of `count` items as blocks of one item each, whose reject is its own."""
    position_of = {item_id: position for position, item_id in enumerate(block.item_ids)}
    blocks = []
    for number in range(count):
        here = [position_of[str(number)]] if str(number) in position_of else []
        visual = None if block.visual_embeddings is None else block.visual_embeddings[here]
        rejects = [reject for reject in block.rejects if reject.row == number]
        ids = [str(number)] * len(here)
        blocks.append(EncodedBlock(0, ids, block.embeddings[here], visual, block.has_image[here], rejects))
    return blocks


def _check(block: PreparedBlock | EncodedBlock, where: str) -> None:
    if block.rejects:
        raise RequestError(400, f"{block.rejects[0].reason}.", where)


def _embedded(block: EncodedBlock, tokens: int) -> Embedded:
    visual = None if block.visual_embeddings is None else block.visual_embeddings[0]
    return Embedded(block.embeddings[0], visual, tokens)
