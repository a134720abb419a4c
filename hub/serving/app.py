"""The routes. Each reads a body, has its items embedded together with those of others, and answers."""

import asyncio
import contextlib
import hmac
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hub.catalogue.shards import VISUAL_EMBEDDING
from hub.neighbours.index import Index, Queries
from hub.serving import answers
from hub.serving.batching import Batcher, Embedded
from hub.serving.limits import Limits, RequestError, WholeBodies, describe_validation
from hub.serving.metrics import Metrics
from hub.serving.pictures import Pictures
from hub.serving.requests import (
    EmbeddingsRequest,
    EmbedRequest,
    ItemBody,
    SearchRequest,
    items_of_input,
    open_items,
)


OPEN = ("/health", "/docs", "/openapi.json")
"""What is answered without the key."""
CLOSED_BY_CLIENT = 499
"""nginx' status of a request whose client has gone; nobody reads it."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class Service:
    """What is served.

    Attributes:
        name: of the model, in answers and requests.
        batcher: the model.
        pictures: of requests.
        limits: of requests.
        metrics: of all.
        index: what `/search` searches; None: nothing.
        api_key: that requests must bring; None: none.
    """

    name: str
    batcher: Batcher
    pictures: Pictures
    limits: Limits
    metrics: Metrics
    index: Index | None = None
    api_key: str | None = field(default=None, repr=False)

    async def embed(self, request: Request, bodies: dict[str, ItemBody]) -> list[Embedded]:
        """Embeddings of a request's items; nothing more is done for a client that has gone.

        Raises:
            RequestError: naming the first item that can't be embedded.
        """

        async def work() -> list[Embedded]:
            return await self.batcher.embed(await open_items(bodies, self.pictures, self.limits))

        return await _unless_gone(request, work())

    async def query(self, request: Request, item: ItemBody) -> Any:
        """The vector by which an index of this kind is asked for an item: `(1, d)`."""
        (embedded,) = await self.embed(request, {"item": item})
        if self.index is None or self.index.settings["embedding"] != VISUAL_EMBEDDING:
            return embedded.embedding[None]
        if embedded.visual is None or not item.image:
            raise RequestError(400, "the index holds visual embeddings and the item has no image.", "item")
        return embedded.visual[None]


def make_app(service: Service) -> FastAPI:
    """The application, whose model must be loaded."""

    @contextlib.asynccontextmanager
    async def batching(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(service.batcher.run())
        yield
        running.cancel()
        service.batcher.close()

    secured = [Security(HTTPBearer(auto_error=False, description="The server's key."))] if service.api_key else []
    app = FastAPI(
        title="NoteLLM-2",
        description=f"Embeddings of items by {service.name}.",
        lifespan=batching,
        dependencies=secured,
    )
    add_embedding_routes(app, service)
    add_search_route(app, service)
    add_state_routes(app, service)
    add_errors(app)
    app.add_middleware(WholeBodies, limits=service.limits)
    app.add_middleware(KeyAndCount, service=service)  # the last one added is asked first
    return app


def add_embedding_routes(app: FastAPI, service: Service) -> None:
    """`/v1/embeddings`, `/v1/models` and `/embed`."""

    @app.post("/v1/embeddings", response_model=answers.EmbeddingsAnswer, tags=["OpenAI"])
    async def embeddings(body: EmbeddingsRequest, request: Request) -> JSONResponse:
        """Embeds texts and pictures, as OpenAI's clients ask for it."""
        if body.model not in (None, service.name):
            raise RequestError(404, f"here is {service.name!r}, not {body.model!r}.", "model", "model_not_found")
        embedded = await service.embed(request, items_of_input(body.input, service.limits))
        data = [
            answers.OpenAIEmbedding(
                index=number,
                embedding=answers.encoded(answers.shortened(of_item.embedding, body.dimensions), body.encoding_format),
            )
            for number, of_item in enumerate(embedded)
        ]
        return _json(answers.EmbeddingsAnswer(data=data, model=service.name, usage=answers.usage_of(embedded)))

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> dict[str, Any]:
        """Names the model."""
        entry = {"id": service.name, "object": "model", "created": 0, "owned_by": "notellm2"}
        return {"object": "list", "data": [entry]}

    @app.post("/embed", response_model=answers.EmbedAnswer, tags=["items"])
    async def embed(body: EmbedRequest, request: Request) -> JSONResponse:
        """Embeds items with title, topics, content and image."""
        embedded = await service.embed(request, {f"items[{at}]": item for at, item in enumerate(body.items)})
        if body.visual and any(of_item.visual is None for of_item in embedded):
            raise RequestError(400, "the model was trained without mICL and has no visual embeddings.", "visual")
        data = [
            answers.ItemEmbedding(
                item_id=item.item_id,
                embedding=answers.shortened(of_item.embedding, body.dimensions).tolist(),
                visual_embedding=answers.shortened(of_item.visual, body.dimensions).tolist()
                if body.visual and of_item.visual is not None and item.image
                else None,
            )
            for item, of_item in zip(body.items, embedded, strict=True)
        ]
        return _json(answers.EmbedAnswer(data=data, usage=answers.usage_of(embedded)))


def add_search_route(app: FastAPI, service: Service) -> None:
    """`/search`."""

    @app.post("/search", response_model=answers.SearchAnswer, tags=["items"])
    async def search(body: SearchRequest, request: Request) -> JSONResponse:
        """Finds the nearest items of the index."""
        index = service.index
        if index is None:
            raise RequestError(404, "there is no index here; the server was started without --index.")
        queries: Queries = [body.id] if body.id is not None else await service.query(request, body.item or ItemBody())
        try:
            (found,) = await asyncio.to_thread(index.search, queries, body.k)
        except ValueError as error:  # an id that isn't there
            raise RequestError(404, str(error), "id") from error
        results = [answers.Found(item_id=near.item_id, score=near.score, title=near.title) for near in found]
        return _json(answers.SearchAnswer(results=results))


def add_state_routes(app: FastAPI, service: Service) -> None:
    """`/health` and `/metrics`."""

    @app.get("/health", tags=["state"])
    async def health() -> answers.Health:
        """Says that requests are answered."""
        index = service.index
        return answers.Health(
            status="ok",
            model=service.name,
            dimensions=service.batcher.encoder.width,
            indexed_items=None if index is None else len(index),
        )

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """Tells Prometheus what was done."""
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form."""

    @app.exception_handler(RequestError)
    async def refused(request: Request, error: RequestError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return describe_validation(list(error.errors())).response()

    @app.exception_handler(HTTPException)
    async def by_framework(request: Request, error: HTTPException) -> JSONResponse:
        return RequestError(error.status_code, error.detail).response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> JSONResponse:
        return RequestError(500, "an unexpected error; the server's log has it.").response()


class KeyAndCount:
    """Middleware: refuses requests without the key before their body is read, and counts all answers."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500

        async def counted_send(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            if self._may(scope):
                await self.app(scope, receive, counted_send)
            else:
                error = RequestError(401, "a key is needed: Authorization: Bearer KEY.", None, "invalid_api_key")
                await error.response()(scope, receive, counted_send)
        finally:
            route = scope.get("route")
            self.service.metrics.request(getattr(route, "path", "other"), status, time.monotonic() - start)

    def _may(self, scope: Scope) -> bool:
        key = self.service.api_key
        if key is None or scope["path"] in OPEN:
            return True
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, b"Bearer " + key.encode())


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What a coroutine gives, cancelled when the client goes."""
    working, gone = asyncio.create_task(work), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise RequestError(CLOSED_BY_CLIENT, "the client has gone.")
    finally:
        working.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(answer: BaseModel) -> JSONResponse:
    return JSONResponse(answer.model_dump())
