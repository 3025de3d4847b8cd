"""The answer to a request, in pieces: what a stream sends, and what a whole reply is made of."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cbtm_pipeline.inference import decoding
from cbtm_pipeline.inference.generation import Generation, Token
from cbtm_pipeline.inference.loaded import Ensemble
from cbtm_pipeline.inference.refusal import Refused
from cbtm_pipeline.inference.requests import Prompt, Task


@dataclass(frozen=True)
class Shown:
    """A token as a client reads it. `text` is what it adds to the answer, from character `offset` on.

    `name` and `top` are as in lists of log-probabilities, `weights` by the experts' names, largest first.
    """

    text: str
    offset: int
    name: str = ""
    logprob: float | None = None
    top: Sequence[tuple[str, float]] = ()
    weights: dict[str, float] | None = None


@dataclass(frozen=True)
class Piece:
    """More of answer `index`. `finish` is None, `stop` or `length`."""

    index: int
    text: str
    tokens: Sequence[Shown] = ()
    finish: str | None = None


@dataclass
class Tally:
    """What an answer has cost so far. A pass is one token through one expert, catching up counted."""

    n_prompt: int = 0
    n_generated: int = 0
    passes_prompt: int = 0
    passes_generated: int = 0
    n_read: int = 0  # generated tokens that were read for the next one: those that cost passes
    by_expert: dict[str, int] = field(default_factory=dict)  # generated tokens by their most weighted expert


class Choice:
    """One answer: its tokens become text, and text is held back while it may become a stop text."""

    def __init__(self, index: int, ensemble: Ensemble, task: Task, prompt: Prompt):
        before = () if task.echo else prompt.ids
        self.index, self.ensemble, self.task = index, ensemble, task
        self.decoder = decoding.Decoder(ensemble.tokenizer, before)
        self.stops = decoding.StopFinder(task.stops)
        self.n_shown = self.n_decoded = 0  # characters
        self.held: list[Shown] = []
        self.finish: str | None = None

    def echo(self, tokens: Sequence[Token]) -> Piece:
        """Tokens of the prompt. Stop texts in it stop nothing."""
        for token in tokens:
            self._hold(token, self.decoder.add(token.id))
        return self._release("".join(shown.text for shown in self.held))

    def add(self, token: Token) -> Piece:
        """A generated token."""
        text = self.decoder.add(token.id)
        self._hold(token, text)
        shown = self.stops.add(text)
        if self.stops.found:
            self.finish = "stop"
        return self._release(shown)

    def end(self, reason: str) -> Piece:
        """There is no further token: show what was held back."""
        rest = self.decoder.end()
        if rest and self.held:
            self.held[-1] = replace(self.held[-1], text=rest)
        self.n_decoded += len(rest)
        self.finish = reason
        shown = self.stops.add(rest)
        if self.stops.found:
            self.finish = "stop"
        return self._release(shown + self.stops.end())

    def _hold(self, token: Token, text: str) -> None:
        tokenizer, names = self.ensemble.tokenizer, self.ensemble.model.names
        weights = None
        if self.task.router_weights and token.weights is not None:
            pairs = sorted(zip(names, token.weights, strict=True), key=lambda pair: -pair[1])
            weights = {name: round(weight, 6) for name, weight in pairs if weight > 0}
        name, top = "", ()
        if self.task.n_top is not None:
            name = decoding.name(tokenizer, token.id)
            top = [(decoding.name(tokenizer, i), logprob) for i, logprob in token.top]
        self.held.append(Shown(text, self.n_decoded, name, token.logprob, top, weights))
        self.n_decoded += len(text)

    def _release(self, text: str) -> Piece:
        """The piece with this text, and the tokens that belong to it. A stop text cuts the last one."""
        self.n_shown += len(text)
        ready = []
        while self.held and self._is_ready(self.held[0]):
            shown = self.held.pop(0)
            kept = shown.text[: self.n_shown - shown.offset]
            ready.append(replace(shown, text=kept))
        return Piece(self.index, text, ready, self.finish)

    def _is_ready(self, shown: Shown) -> bool:
        """Whether this token, the first of those held back, belongs to the text that is shown."""
        if self.stops.found:
            return shown.offset < self.n_shown
        if self.finish is not None:
            return True
        is_within_character = not any(other.text for other in self.held)
        return shown.offset + len(shown.text) <= self.n_shown and not is_within_character


def answer(
    ensemble: Ensemble, task: Task, tally: Tally, is_over: Callable[[], bool]
) -> Iterator[list[Piece]]:
    """Compute a task. Each item took one forward pass at most. It stops with `length` when the time is over.

    Raises Refused (503) if the time is over before the prompt was read.
    """
    for number, prompt in enumerate(task.prompts):
        yield from _answers(ensemble, task, number * task.n, prompt, tally, is_over)


def _answers(
    ensemble: Ensemble,
    task: Task,
    first: int,
    prompt: Prompt,
    tally: Tally,
    is_over: Callable[[], bool],
) -> Iterator[list[Piece]]:
    """The answers to one prompt."""
    model: Any = ensemble.model
    generation = Generation(model, prompt, task, first)
    choices = [Choice(first + i, ensemble, task, prompt) for i in range(task.n)]
    tally.n_prompt += len(prompt.ids) - prompt.n_hidden
    n_passes, parts = model.n_passes, generation.read()
    for tokens in parts:
        tally.passes_prompt += model.n_passes - n_passes
        yield [choice.echo(tokens) for choice in choices] if task.echo else []
        if is_over():
            raise Refused(
                503, "prompt: no time left to read it. Expected a shorter one. Shorten it or try later."
            )
        n_passes = model.n_passes
    tally_before = tally.n_read
    for _ in range(task.max_tokens):
        if not generation.rows or is_over():
            break
        n_passes, pieces = model.n_passes, []
        for token in generation.step():
            tally.n_generated += 1
            _count(tally, model.names, token)
            choice = choices[token.row]
            is_end = token.id in ensemble.ends
            pieces.append(choice.end("stop") if is_end else choice.add(token))
            if choice.finish:
                generation.stop(token.row)
        tally.passes_generated += model.n_passes - n_passes
        tally.n_read = tally_before + generation.n_read
        yield pieces
    yield [choices[row].end("length") for row in generation.rows]


def _count(tally: Tally, names: Sequence[str], token: Token) -> None:
    assert token.weights is not None
    name = names[max(range(len(names)), key=token.weights.__getitem__)]
    tally.by_expert[name] = tally.by_expert.get(name, 0) + 1
