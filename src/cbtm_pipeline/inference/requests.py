"""What a request may ask for: the fields of OpenAI's API that this server knows, their bounds, clear errors.

A field that changes nothing here is dropped if it has the value that asks for nothing. A field that this
server does not know is refused: an answer that quietly leaves out what was asked for is worse than none.
The description of each field is what an error says was expected.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cbtm_pipeline.inference.refusal import Refused

MAX_CHOICES = 128  # prompts times n
NO_BODY = "body: not a JSON object. Expected JSON with Content-Type application/json. Send that."
COMPLETION_TOKENS = 16  # without max_tokens, as in OpenAI's API
IGNORED = {"user", "metadata", "store", "safety_identifier", "service_tier", "prompt_cache_key"}
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are accepted with these values only
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
}


@dataclass(frozen=True)
class Limits:
    """What one request may cost. Tokens are of this model's tokenizer."""

    max_tokens: int = 2048
    max_prompt_tokens: int = 8192
    timeout_s: float = 300.0  # of waiting, and again of computing
    concurrency: int = 4  # generations that take turns
    n_waiting: int = 64  # requests that wait for their turn; further ones get 429
    body_bytes: int = 1 << 20


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="ignore")
    include_usage: bool = Field(default=False, description="true or false")


class Body(BaseModel):
    """What completions and chats have in common."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(description="the name of the model")
    max_tokens: int | None = Field(None, ge=0, description="a whole number that is not negative")
    temperature: float = Field(1.0, ge=0, le=2, description="a number from 0 to 2")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0, at most 1")
    n: int = Field(1, ge=1, le=16, description="a whole number from 1 to 16")
    stop: list[Annotated[str, Field(min_length=1, max_length=200)]] = Field(
        default_factory=list, max_length=16, description="a text or up to 16, of 1 to 200 characters"
    )
    seed: int | None = Field(None, description="a whole number")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions = Field(StreamOptions(), description="an object such as include_usage")
    router_weights: bool = Field(False, description="true or false")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        """Drop what asks for nothing, and write what has several forms in one."""
        if not isinstance(data, dict):
            return data
        data = {name: v for name, v in data.items() if v is not None and name not in IGNORED}
        for name, neutral in NEUTRAL.items():
            value = data.pop(name, neutral[0])
            if not any(value == v and type(value) in (type(v), float) for v in neutral):
                known = " or ".join(repr(v) for v in neutral)
                raise ValueError(f"{name}: {short(value)}. Expected {known}. Leave it out.")
        if isinstance(data.get("stop"), str):
            data["stop"] = [data["stop"]]
        return data


class CompletionBody(Body):
    """`POST /v1/completions`."""

    prompt: list[str | list[Annotated[int, Field(ge=0)]]] = Field(
        min_length=1,
        max_length=MAX_CHOICES,
        description="a text, token ids, or a list of up to 128 of either",
    )
    logprobs: int | None = Field(None, ge=0, le=20, description="a whole number from 0 to 20")
    echo: bool = Field(False, description="true or false")

    @model_validator(mode="before")
    @classmethod
    def _list(cls, data: Any) -> Any:
        """One prompt is a list of one."""
        prompt = data.get("prompt") if isinstance(data, dict) else None
        if isinstance(prompt, str) or (
            isinstance(prompt, list) and prompt and all(type(x) is int for x in prompt)
        ):
            return {**data, "prompt": [prompt]}
        return data


class Part(BaseModel):
    """A part of a message. Only text is understood."""

    model_config = ConfigDict(strict=True, extra="forbid")
    type: str = Field(pattern="^text$")
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(strict=True, extra="ignore")
    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str | list[Part]

    def as_text(self) -> dict[str, str]:
        """The turn as templates of chats read it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(Body):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(
        min_length=1,
        max_length=1024,
        description="a list of messages, each with a role (system, developer, user, assistant) and a text",
    )
    max_completion_tokens: int | None = Field(None, ge=0, description="a whole number that is not negative")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(0, ge=0, le=20, description="a whole number from 0 to 20")


@dataclass(frozen=True)
class Prompt:
    """Token ids of a text to go on from. The first `n_hidden` were added here and are never shown."""

    ids: Sequence[int]
    n_hidden: int = 0


@dataclass(frozen=True)
class Task:
    """A request that was checked: what to compute. `n_top` is None if no log-probabilities are asked for."""

    prompts: Sequence[Prompt]
    max_tokens: int
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()
    n_top: int | None = None
    echo: bool = False
    router_weights: bool = False


def task(
    body: Body, prompts: Sequence[Prompt], stops: Sequence[str], limits: Limits, n_context: int | None
) -> Task:
    """What a request asks for, within the limits. `n_context`: tokens that the model can see; None: no bound.

    Raises Refused (400) for more.
    """
    if len(prompts) * body.n > MAX_CHOICES:
        found = f"n: {body.n} for {len(prompts)} prompts"
        raise Refused(400, f"{found}. Expected at most {MAX_CHOICES} answers in all. Ask for fewer.", "n")
    is_chat = isinstance(body, ChatBody)
    longest = max(len(prompt.ids) for prompt in prompts)
    n_free = None if n_context is None else n_context - longest
    max_tokens = _max_tokens(body, longest, n_free, limits)
    if is_chat:
        n_top = body.top_logprobs if body.logprobs else None
        if body.top_logprobs and not body.logprobs:
            found = "top_logprobs: given without logprobs"
            raise Refused(400, f"{found}. Expected logprobs: true. Add it.", "top_logprobs")
    else:
        n_top = body.logprobs if isinstance(body, CompletionBody) else None
    return Task(
        prompts,
        max_tokens,
        body.n,
        body.temperature,
        body.top_p,
        body.seed,
        [*body.stop, *stops],
        n_top,
        isinstance(body, CompletionBody) and body.echo,
        body.router_weights,
    )


def _max_tokens(body: Body, longest: int, n_free: int | None, limits: Limits) -> int:
    """Tokens to generate at most. `longest`: tokens of the longest prompt; `n_free`: room after it."""
    code = "context_length_exceeded"
    if longest > limits.max_prompt_tokens:
        expected = f"Expected at most {limits.max_prompt_tokens}"
        raise Refused(400, f"prompt: {longest} tokens. {expected}. Shorten it.", "prompt", code)
    asked, name = body.max_tokens, "max_tokens"
    if isinstance(body, ChatBody) and body.max_completion_tokens is not None:
        asked, name = body.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        usual = limits.max_tokens if isinstance(body, ChatBody) else min(COMPLETION_TOKENS, limits.max_tokens)
        asked = usual if n_free is None else min(usual, max(n_free, 1))
    if asked > limits.max_tokens:
        raise Refused(400, f"{name}: {asked}. Expected at most {limits.max_tokens}. Ask for fewer.", name)
    if n_free is not None and asked > n_free:
        room = f"{longest + n_free} tokens, {longest} of the prompt and {asked} of {name}"
        message = f"prompt: too long. Expected at most {room.replace(',', ' for', 1)}. Shorten one of them."
        raise Refused(400, message, "prompt", code)
    return asked


def explain(errors: Sequence[Mapping[str, Any]]) -> Refused:
    """The first of pydantic's errors about a body, in one line."""
    error = errors[0]
    path = [str(x) for x in error["loc"] if x != "body"]
    kind, name = error["type"], path[0] if path else ""
    if kind == "value_error":
        message = str(error["ctx"]["error"])
        return Refused(400, message, message.split(":")[0])
    fields = {**CompletionBody.model_fields, **ChatBody.model_fields}
    if kind == "extra_forbidden" and name not in fields:
        near = difflib.get_close_matches(name, fields, 1)
        expected = f"Expected a field such as {near[0]}" if near else "Expected a field of docs/serve.md"
        return Refused(400, f"{name[:60]}: unknown. {expected}. Correct it or leave it out.", name)
    if name not in fields:
        return Refused(400, NO_BODY)
    if kind in ("extra_forbidden", "missing") and len(path) == 1:
        found, todo = ("missing", "Add it") if kind == "missing" else ("not known here", "Leave it out")
    else:
        found, todo = short(error.get("input")), "Correct it"
    return Refused(400, f"{name}: {found}. Expected {fields[name].description}. {todo}.", name)


def short(value: Any) -> str:
    """A value for an error message, at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
