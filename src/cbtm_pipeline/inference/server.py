"""The HTTP side: OpenAI's completions and chats, the list of models, health, metrics, and the page."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from importlib import resources
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from cbtm_pipeline import __version__
from cbtm_pipeline.inference import metrics as metrics_module
from cbtm_pipeline.inference import prompts, replies
from cbtm_pipeline.inference.answer import Piece
from cbtm_pipeline.inference.guard import Guard
from cbtm_pipeline.inference.loaded import Ensemble
from cbtm_pipeline.inference.metrics import Metrics
from cbtm_pipeline.inference.refusal import Refused
from cbtm_pipeline.inference.requests import (
    NO_BODY,
    Body,
    ChatBody,
    CompletionBody,
    Limits,
    Task,
    explain,
    short,
    task,
)
from cbtm_pipeline.inference.worker import Job, Worker

HUNG_UP = 499  # a status for the log and the metrics only: nobody reads it
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
POLICY += "img-src data:"
CODES = {413: "body_too_large"}
HINTS = {404: "Expected a path of docs/serve.md. Correct it.", 405: "Expected another method. Correct it."}


class Stream(StreamingResponse):
    """A stream that cancels its job at its end, whoever ended it and when."""

    def __init__(self, content: AsyncIterator[str], job: Job):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


class Service:
    """Answers requests with one ensemble."""

    def __init__(self, ensemble: Ensemble, worker: Worker, limits: Limits):
        self.ensemble, self.worker, self.limits = ensemble, worker, limits
        self.created = int(time.time())

    def check_model(self, name: str) -> None:
        """Raise Refused (404) for another model."""
        if name != self.ensemble.name:
            found = f"model: {short(name)}"
            message = f"{found}. Expected {self.ensemble.name!r}. Use that name."
            raise Refused(404, message, "model", "model_not_found")

    def task(self, body: Body) -> Task:
        """The body as ids and bounds. Raises Refused."""
        ensemble, stops = self.ensemble, ()
        if isinstance(body, ChatBody):
            turns = [message.as_text() for message in body.messages]
            prompt, stops = prompts.of_chat(ensemble.tokenizer, turns, ensemble.separator)
            found = [prompt]
        else:
            assert isinstance(body, CompletionBody)
            vocab_size = ensemble.model.config.vocab_size
            found = [
                prompts.of_text(ensemble.tokenizer, prompt, ensemble.separator)
                if isinstance(prompt, str)
                else prompts.of_ids(prompt, vocab_size)
                for prompt in body.prompt
            ]
        return task(body, found, stops, self.limits, ensemble.n_context)

    async def reply(self, body: Body, request: Request) -> Response:
        """The whole reply, or its stream. It begins with the first piece, so refusals have their status."""
        self.check_model(body.model)
        wanted = await asyncio.to_thread(self.task, body)
        reply = replies.Reply(
            wanted, self.ensemble.name, self.ensemble.fingerprint, isinstance(body, ChatBody)
        )
        job = self.worker.submit(wanted)
        hung_up = asyncio.ensure_future(_hung_up(request))
        is_streaming = False
        try:
            pieces: list[Piece] = []
            while (more := await _next(job, hung_up)) is not None:
                pieces += more
                if body.stream:
                    is_streaming = True
                    stream = _stream(reply, pieces, job, body.stream_options.include_usage)
                    return Stream(stream, job)
            return JSONResponse(reply.whole(pieces, job.tally))
        except _HungUp:
            return Response(status_code=HUNG_UP)
        finally:
            hung_up.cancel()
            if not is_streaming:
                job.cancel()

    def models(self) -> list[dict[str, Any]]:
        """The one model, and as an extension its experts with the terms that set them apart."""
        ensemble = self.ensemble
        experts = [{"name": name, "terms": ensemble.terms.get(name, [])} for name in ensemble.model.names]
        model = {"id": ensemble.name, "object": "model", "created": self.created, "owned_by": "cbtm"}
        return [{**model, "context_length": ensemble.n_context, "experts": experts}]


class _HungUp(Exception):
    """The client has gone."""


async def _hung_up(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _next(job: Job, hung_up: asyncio.Future[None]) -> list[Piece] | None:
    """What comes next from the worker. Raises Refused, and _HungUp if nobody waits for it."""
    event = asyncio.ensure_future(job.events.get())
    try:
        await asyncio.wait({event, hung_up}, return_when=asyncio.FIRST_COMPLETED)
        if not event.done():
            raise _HungUp
        found = event.result()
    finally:
        event.cancel()
    if isinstance(found, Refused):
        raise found
    return found


async def _stream(
    reply: replies.Reply, pieces: list[Piece], job: Job, with_usage: bool
) -> AsyncIterator[str]:
    """The events of a stream. The status is sent already, so a refusal becomes an event."""
    for chunk in [*reply.begin(), *reply.more(pieces)]:
        yield chunk
    while (event := await job.events.get()) is not None:
        if isinstance(event, Refused):
            yield replies.event(event.content())
            return
        for chunk in reply.more(event):
            yield chunk
    for chunk in reply.end(job.tally, with_usage):
        yield chunk


def page() -> str:
    """The page at `/`: one document, with the report's style sheet inside."""
    text = resources.files("cbtm_pipeline.inference").joinpath("page.html").read_text("utf-8")
    style = resources.files("cbtm_pipeline.html").joinpath("report.css").read_text("utf-8")
    return text.replace("/* report.css */", style)


def create_app(service: Service, metrics: Metrics, key: str | None) -> Any:
    """The ASGI application. `key` None: none is needed."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        service.worker.close(hurry=True)  # nobody is connected any more
        await asyncio.to_thread(service.worker.join)

    app = FastAPI(title="cbtm serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    text = page()

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        return await service.reply(body, request)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        return await service.reply(body, request)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": service.models()}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        service.check_model(name)
        return service.models()[0]

    @app.get("/health")
    def health() -> Response:
        is_well = service.worker.is_alive() and not service.worker.is_closing
        return JSONResponse({"status": "ok" if is_well else "shutting down"}, 200 if is_well else 503)

    @app.get("/metrics")
    def counts() -> Response:
        return Response(metrics.text(), media_type=metrics_module.CONTENT_TYPE)

    @app.get("/")
    def index() -> Response:
        return HTMLResponse(text, headers={"Content-Security-Policy": POLICY})

    _refuse_in_json(app)
    paths = {"/", "/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"}
    return Guard(app, key, service.limits, metrics, paths)


def _refuse_in_json(app: FastAPI) -> None:
    """Give every refusal the form that OpenAI's clients read."""

    def respond(refusal: Refused) -> Response:
        return JSONResponse(refusal.content(), refusal.status, refusal.headers)

    @app.exception_handler(Refused)
    def refused(_: Request, error: Refused) -> Response:
        return respond(error)

    @app.exception_handler(RequestValidationError)
    def wrong(_: Request, error: RequestValidationError) -> Response:
        return respond(explain(error.errors()))

    @app.exception_handler(StarletteHTTPException)
    def http(request: Request, error: HTTPException) -> Response:
        status, found = error.status_code, f"{request.method} {request.url.path[:60]}: {error.detail}."
        if status == 400:
            return respond(Refused(400, NO_BODY))
        message = f"{found} {HINTS[status]}" if status in HINTS else str(error.detail)
        return respond(Refused(status, message, None, CODES.get(status)))
