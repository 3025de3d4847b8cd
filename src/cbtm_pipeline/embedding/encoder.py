"""Embed text with an encoder of transformers: config key `embed.encoder`.

A model reads a text in windows that are no longer than its limit. The model's sentence-transformers files
define how hidden states become the vector of a window (`encoder_files`). This module turns the vectors of
windows into the vector of a text.

Shapes: N texts, W windows of all of them, B windows of one batch, T tokens of the longest, H hidden size, D
dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CHARS = 16  # of a long text, this many characters are read for each token of a window
BATCH_TOKENS = 1 << 14  # of one forward pass, padding included
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class Encoder(NamedTuple):
    """A model with everything that its use needs.

    A window is the special tokens `before`, at most `size` tokens of text, and the special tokens `after`. Of
    a text, at most `n_windows` windows count. The modes of `pooling` are concatenated, and `heads` follow
    them. `identity` is a hash of all files that matter.
    """

    name: str
    commit: str | None  # of its repository on the hub
    identity: str
    net: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    before: list[int]
    size: int
    after: list[int]
    n_windows: int
    lower: bool
    pooling: tuple[str, ...]
    heads: list[Callable[[torch.Tensor], torch.Tensor]]
    n_components: int


def embed(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of texts, float32 (N, D), of length one; zero for a text without tokens.

    A text of several windows has the mean of their vectors, weighted by their tokens. If a text has more than
    `n_windows` windows, that many count, spread evenly from its beginning to its end.
    """
    n_windows = encoder.n_windows
    parts = [parts_of(text, n_windows, MAX_CHARS * encoder.size) for text in texts]
    ids = iter(tokenise(encoder, [part for of_text in parts for part in of_text]))
    windows = [
        [w for _ in of_text for w in spread(next(ids), encoder.size, n_windows // len(of_text))]
        for of_text in parts
    ]
    return _mean(encoder, windows)


def embed_ends(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """Embeddings of the last window of each text, float32 (N, D), of length one; zero without tokens."""
    ids = tokenise(encoder, texts)
    return _mean(encoder, [[i[-encoder.size :]] if i else [] for i in ids])


def parts_of(text: str, n: int, n_chars: int) -> list[str]:
    """The text, or, if it has more than n * n_chars characters, n parts of n_chars characters each.

    The parts are spread evenly from the beginning to the end.
    """
    if len(text) <= n * n_chars:
        return [text]
    return [text[start : start + n_chars] for start in np.linspace(0, len(text) - n_chars, n).astype(int)]


def spread(ids: list[int], size: int, n: int) -> list[list[int]]:
    """Windows of `size` tokens, at most n of them.

    If a text has more, the n windows are spread evenly from the first to the last.
    """
    starts = list(range(0, len(ids), size))
    if len(starts) > n:
        chosen = np.linspace(0, len(starts) - 1, n).round().astype(int)
        starts = [starts[i] for i in chosen]
    return [ids[start : start + size] for start in starts]


def tokenise(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens."""
    if not texts:
        return []
    texts = [text.lower() for text in texts] if encoder.lower else list(texts)
    encoded: Any = encoder.tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
    )
    return encoded["input_ids"]


def _mean(encoder: Encoder, windows: list[list[list[int]]]) -> np.ndarray:
    """The mean vector of each text's windows, (N, D), weighted by their tokens and scaled to length one.

    A text without windows has the zero vector.
    """
    flat = [window for of_text in windows for window in of_text]
    owner_W = np.repeat(np.arange(len(windows)), [len(of_text) for of_text in windows])
    n_tokens_W = np.array([len(window) for window in flat], np.float32)
    h_ND = np.zeros((len(windows), encoder.n_components), np.float32)
    np.add.at(h_ND, owner_W, encode(encoder, flat) * n_tokens_W[:, None])
    lengths_N = np.linalg.norm(h_ND, axis=1, keepdims=True)
    return h_ND / np.where(lengths_N > 0, lengths_N, 1)


def encode(encoder: Encoder, windows: list[list[int]]) -> np.ndarray:
    """The model's vector of each window of token ids, float32 (W, D).

    Windows of similar length share a batch.
    """
    h_WD = np.empty((len(windows), encoder.n_components), np.float32)
    n_special = len(encoder.before) + len(encoder.after)
    for rows in batches([len(window) + n_special for window in windows], BATCH_TOKENS):
        h_WD[rows] = forward(encoder, [windows[i] for i in rows]).cpu().numpy()
    return h_WD


def forward(encoder: Encoder, windows: list[list[int]]) -> torch.Tensor:
    """Vectors of one batch, (B, D).

    Weights and pooling are float32; the layers are bf16 on a GPU that has it. Raises ValueError for a vector
    that is not finite.
    """
    device = encoder.net.device
    bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    ids = [torch.tensor([*encoder.before, *window, *encoder.after]) for window in windows]
    pad_id: Any = encoder.tokenizer.pad_token_id
    ids_BT = pad_sequence(ids, batch_first=True, padding_value=pad_id or 0).to(device)
    mask_BT = pad_sequence([torch.ones_like(i) for i in ids], batch_first=True).to(device)
    with torch.inference_mode():
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            hidden_BTH = encoder.net(input_ids=ids_BT, attention_mask=mask_BT).last_hidden_state
        h_BD = torch.cat([pool(hidden_BTH.float(), mask_BT, mode) for mode in encoder.pooling], dim=1)
        for head in encoder.heads:
            h_BD = head(h_BD)
    if not h_BD.isfinite().all():
        raise ValueError(
            f"embed.encoder: {encoder.name}: vectors that are not finite. Expected numbers. "
            "Choose another encoder."
        )
    return h_BD


def batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `max_tokens` tokens with padding, or of one row.

    The longest rows come first, because they need most memory. Rows of similar length need little padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        n = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + n]
        start += n


def pool(hidden_BTH: torch.Tensor, mask_BT: torch.Tensor, mode: str) -> torch.Tensor:
    """One vector for each row's unmasked hidden states, (B, H), by a mode of POOLING.

    Padding is on the right.
    """
    mask_BT1 = mask_BT[:, :, None].to(hidden_BTH.dtype)
    match mode:
        case "cls":
            return hidden_BTH[:, 0]
        case "lasttoken":
            return hidden_BTH[torch.arange(len(mask_BT), device=mask_BT.device), mask_BT.sum(1) - 1]
        case "max":
            return hidden_BTH.masked_fill(mask_BT1 == 0, -torch.inf).amax(1)
        case "mean_sqrt_len_tokens":
            return (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1).sqrt()
        case "weightedmean":
            mask_BT1 = mask_BT1 * torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)[:, None]
    return (hidden_BTH * mask_BT1).sum(1) / mask_BT1.sum(1)
