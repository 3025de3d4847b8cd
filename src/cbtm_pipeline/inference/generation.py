"""Go on with a text, token by token, from the ensemble's own cache.

A generation never runs by itself: each call is one forward pass. So several can take turns in one thread, and
one whose reader has gone is not called again. The answers to one prompt are one batch of R rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cbtm_pipeline.inference import sampling
from cbtm_pipeline.inference.modeling_cbtm import BLOCK
from cbtm_pipeline.inference.requests import Prompt, Task


@dataclass(frozen=True)
class Token:
    """A token of an answer's text. `logprob` is of the mixture, at temperature 1; None for the first of all.

    `top` are the most probable tokens in its place, `weights` the experts' weights that predicted it.
    """

    row: int  # number of the answer
    id: int
    logprob: float | None = None
    top: Sequence[tuple[int, float]] = ()
    weights: Sequence[float] | None = None


class Generation:
    """The answers to one prompt. `first` is the number of the first one in the request."""

    def __init__(self, model: Any, prompt: Prompt, task: Task, first: int):
        self.model, self.prompt, self.task = model, prompt, task
        self.cache: Any = None
        self.rows = list(range(task.n))  # answers that go on
        self.batch = self.rows  # answers that are rows of the cache
        self.generators = sampling.generators(task.seed, first, task.n)
        self.n_read = 0  # generated tokens that the model has read
        self.drawn: list[int] = []  # the newest token of each row of the batch
        self.logprob_RV = self.logw_RK = torch.empty(0, 0)

    def read(self) -> Iterator[list[Token]]:
        """Read the prompt. Yields after each part: the part's tokens for `echo`, else nothing."""
        ids_1T, task = torch.tensor([self.prompt.ids], device=self.model.device), self.task
        config, length = self.model.config, ids_1T.shape[1]
        # what is decided once is decided after the whole prompt
        in_parts = config.route == "token" and config.mode == "ensemble"
        is_scored = task.echo and task.n_top is not None
        in_parts = in_parts and (is_scored or config.router == "filter")  # else parts would cost passes
        for begin in range(0, length, BLOCK if in_parts else length):
            part_1T = ids_1T[:, begin : begin + BLOCK] if in_parts else ids_1T
            before = (self.logprob_RV, self.logw_RK)
            logprob_TV, logw_TK = self._forward(part_1T, 0 if is_scored else 1)
            yield self._echo(part_1T[0].tolist(), before, logprob_TV, logw_TK, begin) if task.echo else []
        if task.n > 1:
            self.cache.batch_repeat_interleave(task.n)
            self.logprob_RV, self.logw_RK = (
                x.repeat_interleave(task.n, 0) for x in (self.logprob_RV, self.logw_RK)
            )

    def _forward(self, ids_RT: torch.Tensor, n_keep: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Read columns. Keeps what the last one predicts; returns what those of the first row predict."""
        out = self.model(
            ids_RT, past_key_values=self.cache, logits_to_keep=n_keep, output_router_weights=True
        )
        self.cache = out.past_key_values
        self.logprob_RV, self.logw_RK = out.logits[:, -1], out.router_log_weights[:, -1]
        return out.logits[0], out.router_log_weights[0]

    def _echo(
        self,
        ids: list[int],
        before: tuple[torch.Tensor, torch.Tensor],
        logprob_TV: torch.Tensor,
        logw_TK: torch.Tensor,
        begin: int,
    ) -> list[Token]:
        """The tokens of a part of the prompt, each with what the column before it predicts."""
        logprobs, weights = (
            torch.cat([last, rest[:-1]]) if begin else rest[:-1]
            for last, rest in zip(before, (logprob_TV, logw_TK), strict=True)
        )
        is_scored = self.task.n_top is not None
        found = [] if begin else [Token(0, ids[0])]
        for i, token in enumerate(ids if begin else ids[1:]):
            found.append(self._token(0, token, logprobs[i] if is_scored else None, weights[i]))
        return [token for i, token in enumerate(found, begin) if i >= self.prompt.n_hidden]

    def _token(self, row: int, token: int, logprob_V: torch.Tensor | None, logw_K: torch.Tensor) -> Token:
        logprob, top, n_top = None, (), self.task.n_top
        if logprob_V is not None and n_top is not None:
            logprob = max(logprob_V[token].item(), sampling.LEAST)
            top = sampling.most_probable(logprob_V, n_top) if n_top else ()
        return Token(row, token, logprob, top, logw_K.exp().tolist())

    def step(self) -> list[Token]:
        """The next token of every answer that goes on."""
        if self.drawn:
            self._shrink()
            self.n_read += len(self.drawn)
            self._forward(torch.tensor(self.drawn, device=self.model.device)[:, None], 1)
        generators = [self.generators[row] for row in self.batch]
        self.drawn = sampling.draw(self.logprob_RV, self.task.temperature, self.task.top_p, generators)
        return [
            self._token(row, token, self.logprob_RV[i], self.logw_RK[i])
            for i, (row, token) in enumerate(zip(self.batch, self.drawn, strict=True))
        ]

    def stop(self, row: int) -> None:
        """This answer is complete."""
        self.rows = [other for other in self.rows if other != row]

    def _shrink(self) -> None:
        """Leave out the rows of answers that are complete."""
        if self.rows == self.batch:
            return
        kept = [i for i, row in enumerate(self.batch) if row in self.rows]
        self.cache.batch_select_indices(torch.tensor(kept, device=self.model.device))
        self.drawn, self.batch = [self.drawn[i] for i in kept], list(self.rows)
