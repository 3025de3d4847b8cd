"""An encoder of transformers as embedder of text: config key `embed.encoder`.

A model reads a text in windows, each no longer than it was made for. How a window's hidden states become one vector is said by the model's
sentence-transformers files (`encoder_files`); how windows become the vector of a text, here.

Shapes: N texts, W windows of all of them, B windows of one batch, T tokens of the longest, H hidden size, D dimensions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CHARS = 16  # a window's tokens are looked for in so many characters each
BATCH_TOKENS = 1 << 14  # of one forward pass, padding included
POOLING = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")


class Encoder(NamedTuple):
    """A model with all that its use needs. `before`, `size`, `after`: a window is special tokens, at most so many tokens of text, special
    tokens. `n_windows`: how many of a text count. `heads`: what follows the pooling. `identity`: hash of all files that matter."""

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

    A text of several windows has the mean of their vectors, weighted by their tokens. Of more than `n_windows` windows so many count,
    spread evenly from the text's beginning to its end.
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
    """Embeddings of the last window of each text, float32 (N, D), of length one; zero for a text without tokens."""
    ids = tokenise(encoder, texts)
    return _mean(encoder, [[i[-encoder.size :]] if i else [] for i in ids])


def parts_of(text: str, n: int, n_chars: int) -> list[str]:
    """The text; if it has more than n * n_chars characters, n parts of n_chars spread evenly from its beginning to its end."""
    if len(text) <= n * n_chars:
        return [text]
    return [text[start : start + n_chars] for start in np.linspace(0, len(text) - n_chars, n).astype(int)]


def spread(ids: list[int], size: int, n: int) -> list[list[int]]:
    """Cut into windows of `size` tokens; of more than n windows, n spread evenly from the first to the last."""
    starts = range(0, len(ids), size)
    chosen = (
        range(len(starts)) if len(starts) <= n else np.linspace(0, len(starts) - 1, n).round().astype(int)
    )
    return [ids[starts[i] : starts[i] + size] for i in chosen]


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
    """One vector of length one or zero for the windows of each text."""
    flat = [window for of_text in windows for window in of_text]
    owner_W = np.repeat(np.arange(len(windows)), [len(of_text) for of_text in windows])
    h_ND = np.zeros((len(windows), encoder.n_components), np.float32)
    np.add.at(
        h_ND, owner_W, encode(encoder, flat) * np.array([len(window) for window in flat], np.float32)[:, None]
    )
    lengths_N = np.linalg.norm(h_ND, axis=1, keepdims=True)
    return h_ND / np.where(lengths_N > 0, lengths_N, 1)


def encode(encoder: Encoder, windows: list[list[int]]) -> np.ndarray:
    """What the model makes of each window of token ids, float32 (W, D), in batches of windows of like lengths."""
    h_WD = np.empty((len(windows), encoder.n_components), np.float32)
    n_special = len(encoder.before) + len(encoder.after)
    for rows in batches([len(window) + n_special for window in windows], BATCH_TOKENS):
        h_WD[rows] = forward(encoder, [windows[i] for i in rows]).cpu().numpy()
    return h_WD


def forward(encoder: Encoder, windows: list[list[int]]) -> torch.Tensor:
    """Vectors of one batch, (B, D). Weights and pooling are float32, the layers bf16 on a GPU that has it.

    Raises ValueError for what is no number.
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
        h_BD = torch.cat([pool(hidden_BTH.float(), mask_BT, how) for how in encoder.pooling], dim=1)
        for head in encoder.heads:
            h_BD = head(h_BD)
    if not h_BD.isfinite().all():
        raise ValueError(
            f"embed.encoder: {encoder.name}: vectors without finite length. Expected numbers. Choose another encoder."
        )
    return h_BD


def batches(lengths: list[int], max_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of at most `max_tokens` tokens with padding, or of one row.

    The longest come first: they need most memory, and a batch of like lengths needs little padding.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    start = 0
    while start < len(order):
        n = max(1, max_tokens // lengths[order[start]])
        yield order[start : start + n]
        start += n


def pool(hidden_BTH: torch.Tensor, mask_BT: torch.Tensor, how: str) -> torch.Tensor:
    """One vector for each row's unmasked hidden states, (B, H): `how` is one of POOLING. Padding stands on the right."""
    mask_BT1 = mask_BT[:, :, None].to(hidden_BTH.dtype)
    match how:
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
