"""Log-probabilities of the tokens of documents under a model, in float32, on CPUs and GPUs alike.

The score of a token is its natural log-probability, given the separator and the tokens before it.

Shapes: B windows, T inputs of the longest one, V tokens in the vocabulary, N tokens of all documents.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from cbtm_pipeline.base import cli
from cbtm_pipeline.corpus.windows import windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 4096  # in one forward pass
CPU_TOKENS = 1024  # on a CPU, where the logits of more tokens leave the cache: a fifth faster
LOGIT_BYTES = 1 << 28  # in one forward pass: with a large vocabulary, it has fewer tokens


class Window(NamedTuple):
    """A piece of a document: `tokens` are its inputs and the token after the last one.

    The targets of inputs `n_context`, `n_context` + 1, ... are scored, and go to `rows` of the result.
    """

    tokens: np.ndarray
    n_context: int
    rows: slice


def cut(documents: Sequence[np.ndarray], context: int, stride: int) -> Iterator[Window]:
    """The windows of documents `[sep, x_0, ..., x_(n-1)]`, with the rows of their scored tokens."""
    row = 0
    for document in documents:
        n_tokens = len(document) - 1
        for start, first, stop in windows(n_tokens, context, stride):
            yield Window(document[start : stop + 1], first - start, slice(row + first, row + stop))
        row += n_tokens


def batched(all_windows: Sequence[Window], batch_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length, the longest first.

    A batch has at most `batch_tokens` inputs, with padding, or a single window.
    """
    order = sorted(all_windows, key=lambda window: -len(window.tokens))
    while order:
        n = max(1, batch_tokens // (len(order[0].tokens) - 1))
        yield order[:n]
        order = order[n:]


def logprobs(net: "PreTrainedModel", batch: Sequence[Window]) -> np.ndarray:
    """The log-probability of the token after each input (float32, (B, T)); undefined after a window's end.

    Windows are padded on the right. A causal model never looks there, so no mask is needed.
    """
    tokens_BT = np.zeros((len(batch), len(batch[0].tokens)), np.int64)
    for row, window in zip(tokens_BT, batch, strict=True):
        row[: len(window.tokens)] = window.tokens
    with torch.inference_mode():
        ids = torch.from_numpy(tokens_BT).to(net.device)
        logits_BTV = net(input_ids=ids[:, :-1], use_cache=False).logits.float()
        chosen_BT = logits_BTV.gather(2, ids[:, 1:, None]).squeeze(2)
        return (chosen_BT - logits_BTV.logsumexp(2)).cpu().numpy()


def score(
    net: "PreTrainedModel",
    documents: Sequence[np.ndarray],
    context: int,
    stride: int,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """The log-probability of each token of documents `[sep, x_0, ..., x_(n-1)]`, in order (float32, (N,)).

    Separators have no score.
    """
    n_tokens = sum(len(document) - 1 for document in documents)
    batch_tokens = batch_tokens or (CPU_TOKENS if net.device.type == "cpu" else BATCH_TOKENS)
    batch_tokens = min(batch_tokens, LOGIT_BYTES // (4 * net.config.get_text_config().vocab_size))
    logprob_N = np.full(n_tokens, np.nan, np.float32)
    progress = cli.Progress("scored", n_tokens, "tokens")
    for batch in batched(list(cut(documents, context, stride)), batch_tokens):
        for scored_T, window in zip(logprobs(net, batch), batch, strict=True):
            logprob_N[window.rows] = scored_T[window.n_context : len(window.tokens) - 1]
            progress.add(window.rows.stop - window.rows.start)
    return logprob_N
