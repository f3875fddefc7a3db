"""The HTTP surface: OpenAI's chat completions and completions, the list of models, and whether the server is there."""

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException

from adapterkern.inference.server import batching
from adapterkern.inference.server.batching import Batcher, ClosedError, Piece, QueueFullError
from adapterkern.inference.server.fields import Asked, RefusedError, read_chat, read_completion
from adapterkern.inference.server.models import Models

_BODY_LIMIT = 16 * 2**20  # bytes; far more than a context of tokens
_RETRY_AFTER = 1  # seconds
_CLIENT_GONE = 499  # nginx's; nobody reads it
_TYPES = {500: "server_error", 503: "server_error", 429: "rate_limit_error"}


def make_app(models: Models, batcher: Batcher, *, max_tokens: int, api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        batcher: answers; it is started and closed by the caller.
        max_tokens: the most that a request may ask for.
        api_key: that requests must bring, but for /health. None: any request is answered.
    """
    app = FastAPI(openapi_url=None)  # its pages would load scripts from another host
    began = int(time.time())

    def authorized(request: Request) -> None:
        given = request.headers.get("authorization", "")
        if api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {api_key}".encode()):
            raise RefusedError(
                401, "expected the header Authorization: Bearer and the API key", None, "invalid_api_key"
            )

    checked = [Depends(authorized)]

    @app.exception_handler(RefusedError)
    async def _refused(request: Request, error: RefusedError) -> Response:
        headers = {429: {"Retry-After": str(_RETRY_AFTER)}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
        return JSONResponse(_error(error), error.status, headers)

    @app.exception_handler(HTTPException)
    async def _not_found(request: Request, error: HTTPException) -> Response:
        refused = RefusedError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
        return JSONResponse(_error(refused), error.status_code, error.headers)

    @app.get("/health")
    async def _health() -> dict[str, Any]:
        waiting, running = batcher.counts()
        return {"status": "ok", "waiting": waiting, "running": running}

    def card(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "adapterkern"}

    @app.get("/v1/models", dependencies=checked)
    async def _models() -> dict[str, Any]:
        return {"object": "list", "data": [card(name) for name in models.adapters]}

    @app.get("/v1/models/{name:path}", dependencies=checked)
    async def _model(name: str) -> dict[str, Any]:
        if name not in models.adapters:
            raise RefusedError(404, f"no model {name:.80}", "model", "model_not_found")
        return card(name)

    @app.post("/v1/chat/completions", dependencies=checked)
    async def _chat(request: Request) -> Response:
        asked = read_chat(await _body(request), models, max_tokens)
        return await _respond(request, batcher, asked, _ChatForm(asked.model))

    @app.post("/v1/completions", dependencies=checked)
    async def _completions(request: Request) -> Response:
        asked = read_completion(await _body(request), models, max_tokens)
        return await _respond(request, batcher, asked, _CompletionForm(asked.model))

    return app


def _error(error: RefusedError) -> dict[str, Any]:
    kind = _TYPES.get(error.status, "invalid_request_error")
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


async def _body(request: Request) -> object:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _BODY_LIMIT:
            raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected a body of at most {_BODY_LIMIT:,} bytes")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"expected JSON: {error}") from error


async def _respond(request: Request, batcher: Batcher, asked: Asked, form: "_Form") -> Response:
    """Queue a request for each prompt, and answer as their pieces come, or once all have come."""
    loop = asyncio.get_running_loop()
    pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def emit_of(index: int) -> Callable[[Piece], None]:
        def emit(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody waits
                loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

        return emit

    requests = [
        batching.Request(asked.adapter, ids, asked.sampling, tokens, emit_of(index), asked.ends, asked.stop, after)
        for index, (ids, after, tokens) in enumerate(asked.prompts)
    ]
    if len(requests) > batcher.queue:
        raise RefusedError(400, f"prompt: expected at most {batcher.queue}, got {len(requests)}", "prompt")
    try:
        batcher.submit(requests)
    except QueueFullError:
        raise RefusedError(429, f"{batcher.queue} requests wait already; try again later", None, "queue_full") from None
    except ClosedError:
        raise RefusedError(503, "the server is about to end") from None
    answers = _Answers(asked, pieces)
    if asked.stream:

        async def end() -> None:
            batcher.cancel(requests)

        return StreamingResponse(
            _events(answers, form, asked.include_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache"},
            background=BackgroundTask(end),  # also when the client disconnects
        )
    try:
        if not await _unless_gone(request, answers):
            return Response(status_code=_CLIENT_GONE)
    finally:
        batcher.cancel(requests)
    return JSONResponse(form.whole(answers))


class _Answers:
    """The answers to a request's prompts, as their pieces come."""

    def __init__(self, asked: Asked, pieces: "asyncio.Queue[tuple[int, Piece]]") -> None:
        self._pieces, count = pieces, len(asked.prompts)
        self.texts, self.tokens = [""] * count, [0] * count
        self.finish: list[str | None] = [None] * count
        self._prompt_tokens = sum(len(ids) for ids, _, _ in asked.prompts)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece with the number of its prompt. Raises ``RefusedError`` if one could not be generated."""
        while None in self.finish:
            index, piece = await self._pieces.get()
            if piece.finish == "error":
                raise RefusedError(500, "the model could not answer; the server's log says why")
            self.texts[index] += piece.text
            self.tokens[index], self.finish[index] = piece.tokens, piece.finish
            yield index, piece

    async def all(self) -> None:
        """Wait for the last piece."""
        async for _ in self:
            pass

    @property
    def usage(self) -> dict[str, int]:
        prompt, answers = self._prompt_tokens, sum(self.tokens)
        return {"prompt_tokens": prompt, "completion_tokens": answers, "total_tokens": prompt + answers}


async def _unless_gone(request: Request, answers: _Answers) -> bool:
    """Wait for the answers; False as soon as the client has disconnected."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    whole, end = asyncio.create_task(answers.all()), asyncio.create_task(gone())
    try:
        await asyncio.wait({whole, end}, return_when=asyncio.FIRST_COMPLETED)
        if not whole.done():
            return False
        whole.result()
        return True
    finally:
        whole.cancel()
        end.cancel()


async def _events(answers: _Answers, form: "_Form", include_usage: bool) -> AsyncIterator[str]:
    """Server-sent events."""
    for index in range(len(answers.texts)):
        if (first := form.first(index)) is not None:
            yield _event(first)
    try:
        async for index, piece in answers:
            yield _event(form.part(index, piece))
    except RefusedError as error:
        yield _event(_error(error))
        return
    if include_usage:
        yield _event(form.parts([]) | {"usage": answers.usage})
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


class _Form:
    """OpenAI's objects around the answers to one request."""

    prefix = kind = kind_of_parts = ""

    def __init__(self, model: str) -> None:
        self.id, self.model, self.created = f"{self.prefix}-{uuid.uuid4().hex}", model, int(time.time())

    def whole(self, answers: _Answers) -> dict[str, Any]:
        choices = [self.choice(i, text, answers.finish[i]) for i, text in enumerate(answers.texts)]
        return self._object(self.kind, choices) | {"usage": answers.usage}

    def parts(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return self._object(self.kind_of_parts, choices)

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        """A piece of an answer, as an event."""
        raise NotImplementedError

    def first(self, index: int) -> dict[str, Any] | None:
        """The event before an answer's first piece."""
        return None

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """A whole answer."""
        raise NotImplementedError

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


def _choice(index: int, finish: str | None, **content: Any) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": finish}


class _ChatForm(_Form):
    prefix, kind, kind_of_parts = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return _choice(index, finish, message={"role": "assistant", "content": text, "refusal": None})

    def first(self, index: int) -> dict[str, Any]:
        return self.parts([_choice(index, None, delta={"role": "assistant", "content": ""})])

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.parts([_choice(index, piece.finish, delta={"content": piece.text} if piece.text else {})])


class _CompletionForm(_Form):
    prefix, kind, kind_of_parts = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        return _choice(index, finish, text=text)

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return self.parts([self.choice(index, piece.text, piece.finish)])
