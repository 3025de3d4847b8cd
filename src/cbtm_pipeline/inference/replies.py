"""Replies in the form of OpenAI's API, whole or as chunks of a stream."""

import json
import secrets
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cbtm_pipeline.inference.answer import Piece, Shown, Tally
from cbtm_pipeline.inference.decoding import as_bytes
from cbtm_pipeline.inference.requests import Task


class Reply:
    """The reply to one request."""

    def __init__(self, task: Task, model: str, fingerprint: str | None, is_chat: bool):
        self.task, self.is_chat = task, is_chat
        self.kind = "chat.completion" if is_chat else "text_completion"
        self.head = {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def whole(self, pieces: Sequence[Piece], tally: Tally) -> dict[str, Any]:
        """The reply of a request without `stream`."""
        choices = []
        for index in range(len(self.task.prompts) * self.task.n):
            own = [piece for piece in pieces if piece.index == index]
            text = "".join(piece.text for piece in own)
            tokens = [token for piece in own for token in piece.tokens]
            content = (
                {"message": {"role": "assistant", "content": text, "refusal": None}}
                if self.is_chat
                else {"text": text}
            )
            choices.append(self._choice(index, content, tokens, own[-1].finish))
        return {**self.head, "object": self.kind, "choices": choices, "usage": usage(tally)}

    def begin(self) -> Iterator[str]:
        """The first chunks of a stream: in chats, each answer's role."""
        for index in range(self.task.n if self.is_chat else 0):
            yield self._chunk(
                [self._choice(index, {"delta": {"role": "assistant", "content": ""}}, (), None)]
            )

    def more(self, pieces: Sequence[Piece]) -> Iterator[str]:
        """Chunks of a stream. A piece that shows nothing new has none."""
        for piece in pieces:
            if piece.text or piece.tokens or piece.finish:
                text = {"content": piece.text} if piece.text else {}
                content = {"delta": text} if self.is_chat else {"text": piece.text}
                yield self._chunk([self._choice(piece.index, content, piece.tokens, piece.finish)])

    def end(self, tally: Tally, with_usage: bool) -> Iterator[str]:
        """The last chunks of a stream."""
        if with_usage:
            yield self._chunk([], usage(tally))
        yield "data: [DONE]\n\n"

    def _chunk(self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        kind = f"{self.kind}.chunk" if self.is_chat else self.kind
        return event({**self.head, "object": kind, "choices": choices, "usage": usage})

    def _choice(
        self, index: int, content: dict[str, Any], tokens: Sequence[Shown], finish: str | None
    ) -> dict[str, Any]:
        logprobs = None
        if self.task.n_top is not None:
            logprobs = chat_logprobs(tokens) if self.is_chat else completion_logprobs(tokens)
        more = {"router_weights": router_weights(tokens)} if self.task.router_weights else {}
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish, **more}


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n"


def usage(tally: Tally) -> dict[str, Any]:
    """Counts of tokens, and as an extension the passes through experts that they took."""
    return {
        "prompt_tokens": tally.n_prompt,
        "completion_tokens": tally.n_generated,
        "total_tokens": tally.n_prompt + tally.n_generated,
        "expert_passes": tally.passes_prompt + tally.passes_generated,
    }


def completion_logprobs(tokens: Sequence[Shown]) -> dict[str, Any]:
    """Log-probabilities as completions have them. The first token of a text has none."""
    top = [None if token.logprob is None else _dictionary(token) for token in tokens]
    return {
        "tokens": [token.name for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": top if any(token.top for token in tokens) else None,
        "text_offset": [token.offset for token in tokens],
    }


def _dictionary(token: Shown) -> dict[str, float]:
    """The most probable tokens, and the one of the text."""
    found: dict[str, float] = {}
    assert token.logprob is not None
    for name, logprob in [*token.top, (token.name, token.logprob)]:
        found.setdefault(name, logprob)
    return found


def chat_logprobs(tokens: Sequence[Shown]) -> dict[str, Any]:
    """Log-probabilities as chats have them."""

    def entry(name: str, logprob: float | None) -> dict[str, Any]:
        return {"token": name, "logprob": logprob, "bytes": list(as_bytes(name))}

    content = [
        {**entry(token.name, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def router_weights(tokens: Sequence[Shown]) -> list[dict[str, Any]]:
    """The extension: each token's text, and the weights of the experts that predicted it, largest first."""
    return [{"token": token.text, "weights": token.weights} for token in tokens]
