"""The door of the server: the key, the host name, the size of a body. It comes before all else."""

import asyncio
import contextlib
import time
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from cbtm_pipeline.base.cli import log
from cbtm_pipeline.inference import keys
from cbtm_pipeline.inference.metrics import Metrics
from cbtm_pipeline.inference.refusal import Refused
from cbtm_pipeline.inference.requests import Limits

OPEN = {"/", "/health"}  # paths that need no key
DRAINED = 16  # a body of so many times the limit is read to its end before it is refused
PAUSE_S = 1.0  # ... unless no more of it comes for so long
BODY_S = 30.0  # in which a body has to arrive


class Guard:
    """ASGI middleware. `paths` are those that exist: others are counted as one. `key` None: none is needed.

    Without a key, the Host header has to be a name of this machine. Else a web page that its browser shows
    could reach the server under the page's own name (DNS rebinding).
    """

    def __init__(self, app: Any, key: str | None, limits: Limits, metrics: Metrics, paths: set[str]):
        self.app, self.limits, self.metrics, self.paths = app, limits, metrics, paths
        self.digest = None if key is None else keys.digest(key.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, path, status = time.monotonic(), scope["path"], 500

        async def sending(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            if refusal := self._refusal(scope):
                answer = JSONResponse(refusal.content(), refusal.status, refusal.headers)
                await answer(scope, receive, sending)
            else:
                await self.app(scope, _Body(receive, self.limits.body_bytes), sending)
        finally:
            self.metrics.requests.labels(path if path in self.paths else "other", str(status)).inc()
            if path.startswith("/v1/"):
                seconds = time.monotonic() - began
                log.info(
                    "%s %s %d  %.2f s",
                    scope["method"],
                    path if path in self.paths else "other",
                    status,
                    seconds,
                )

    def _refusal(self, scope: Any) -> Refused | None:
        headers = dict(scope["headers"])
        if self.digest is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
            if not keys.is_loopback(name.strip("[]")):
                expected = "Expected localhost, as this server has no key"
                return Refused(
                    400, f"Host: {host[:60]!r}. {expected}. Start it with a key, or use localhost."
                )
        elif scope["path"] not in OPEN:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not keys.fits(key.strip(), self.digest):
                message = "key: missing or wrong. Expected Authorization: Bearer KEY. Give the server's key."
                return Refused(401, message, None, "invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > DRAINED * self.limits.body_bytes:
            return too_large(self.limits.body_bytes)
        return None


class _Body:
    """Receives messages, counts the body's bytes. Raises HTTPException: 413 for too many, 408 if slow."""

    def __init__(self, receive: Any, limit: int):
        self.receive, self.limit, self.n_bytes, self.is_whole = receive, limit, 0, False
        self.until = time.monotonic() + BODY_S

    async def __call__(self) -> Any:
        if self.is_whole:
            return await self.receive()
        try:
            message = await self._more(self.until - time.monotonic())
        except TimeoutError:
            raise HTTPException(408, "body: not whole in time. Expected it at once. Send it again.") from None
        if self.n_bytes > self.limit:
            with contextlib.suppress(TimeoutError):  # most clients read no answer before they have sent all
                while not self.is_whole and self.n_bytes <= DRAINED * self.limit:
                    await self._more(PAUSE_S)
            raise HTTPException(413, too_large(self.limit).message)
        return message

    async def _more(self, timeout_s: float) -> Any:
        message = await asyncio.wait_for(self.receive(), timeout_s)
        self.is_whole = not message.get("more_body", False)
        self.n_bytes += len(message.get("body", b""))
        return message


def too_large(limit: int) -> Refused:
    """The refusal of a body with more bytes."""
    return Refused(
        413, f"body: too large. Expected at most {limit} bytes. Send less.", None, "body_too_large"
    )
