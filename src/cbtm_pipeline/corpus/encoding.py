"""Text to token ids: the token encoder of the corpus, and the card of a run's tokenizer."""

import re
import resource
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
from gigatoken.gigatoken_rs import load_hf_json

from cbtm_pipeline.base import artifact, inside
from cbtm_pipeline.base.errors import make_again

PIECE_BYTES = 1 << 20  # longer documents are encoded in pieces
_WINDOW = 1 << 16
_LINE_START = re.compile(rb"(?<=\S\n)(?=\S)")
_SPACE = re.compile(rb"(?<=\S)(?= \S)")
# gigatoken's cache of words grows without bound. When memory has grown by so much, the cache is emptied.
_CACHE_BYTES = 1 << 28
# Text between two checks of the memory. If no word repeats, the cache takes ten times the size of the text.
_CHECK_BYTES = 1 << 24
_DRAWS = "dropout"  # of a BPE in tokenizer.json: merges are left out by chance
_STATM = Path("/proc/self/statm")  # exists on Linux
_PROBES = (
    "It's  the fox's\tdog\r\n\r\nwe'll\n \n  x=1234567.89; // #$%^&*() __init__ HTTPServer I'M",
    "naïve café e\u0301 Ünïcödé \u00a0\u2003\u3000 日本語 한국어 العربية हिन्दी 😀👩‍👩‍👧 ﬁ ½ "
    "\u200b\ufeff \x00\x01\x7f \U0010ffff",
    "a" * 300 + " " * 300 + "\n" * 30 + "=" * 100 + "9" * 50,
)


def pieces(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 text into pieces of at most PIECE_BYTES, so that encoding takes bounded memory.

    Shorter text stays whole, so its tokens are exact. A cut lies between two words: at the start of a line,
    else in front of a space. If the last 64 kB of a piece have neither, the cut lies between two arbitrary
    characters. GPT-like tokenizers give the same tokens with and without cuts of the first two kinds.
    """
    start = 0
    while len(text) - start > PIECE_BYTES:
        end = start + PIECE_BYTES
        for cut in (_LINE_START, _SPACE):
            if found := [m.end() for m in cut.finditer(text, end - _WINDOW, end)]:
                end = found[-1]
                break
        while text[end] & 0xC0 == 0x80:  # the cut lies within a character
            end -= 1
        yield text[start:end]
        start = end
    yield text[start:]


def always_alike(tokenizer: tokenizers.Tokenizer) -> None:
    """Switch off what makes a tokenizer draw numbers, which is for training a model on text.

    With it, the same text would get other ids each time it is read.
    """
    if getattr(tokenizer.model, _DRAWS, None):
        setattr(tokenizer.model, _DRAWS, None)


def n_ids(tokenizer: tokenizers.Tokenizer, separator_id: int) -> int:
    """One more than the largest id that a document may have. An embedding needs so many rows.

    Special tokens are no part of it, but for the separator: in a text they are ordinary characters.
    """
    of_text = tokenizer.get_vocab(with_added_tokens=False).values()
    added = (i for i, token in tokenizer.get_added_tokens_decoder().items() if not token.special)
    return 1 + max(separator_id, *of_text, *added)


def n_ids_of(tokenizer_json: Path, separator_id: int) -> int:
    """`n_ids` of a file. Raises ValueError for a file that is no tokenizer."""
    return n_ids(_read(tokenizer_json)[1], separator_id)


def _read(tokenizer_json: Path) -> tuple[str, tokenizers.Tokenizer]:
    """The content of tokenizer.json, and the tokenizer. Raises ValueError if it is none."""
    content = tokenizer_json.read_bytes()
    try:
        text = content.decode("utf-8")
        return text, tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower type
        raise ValueError(
            f"{tokenizer_json}: not a tokenizer ({error}). Expected tokenizer.json. "
            "Run the rule tokenizer again."
        ) from error


class TokenEncoder:
    """Turns text into token ids, and reads special tokens in the text as ordinary characters.

    `tokenizers` is the reference; gigatoken is many times faster. `why_slow` says why gigatoken cannot be
    used for this tokenizer at all; "" if it can. Raises ValueError for a file that is no tokenizer.
    """

    def __init__(self, tokenizer_json: Path):
        text, self.slow = _read(tokenizer_json)
        self.slow.no_truncation()
        self.slow.no_padding()
        self.slow.encode_special_tokens = True
        always_alike(self.slow)
        content = orjson.loads(text) | {"truncation": None, "padding": None}
        if content["model"].get(_DRAWS):
            content["model"][_DRAWS] = None
        added = content.get("added_tokens") or []
        content["added_tokens"] = [token for token in added if not token["special"]]
        self._fast_json = orjson.dumps(content)
        self._n_bytes, self._memory = 0, _memory()
        self.why_slow = ""
        tokens = [token["content"] for token in added]
        probes = [*_PROBES, *(p for t in tokens for p in (t, f"a{t}b", f"a {t} b{t}{t} \n{t}"))]
        try:
            self._fast = load_hf_json(self._fast_json)
            if not self.agrees([p.encode() for p in probes]):
                self.why_slow = "gigatoken encodes differently"
        except Exception as error:
            self.why_slow = str(error).partition("\n")[0] or type(error).__name__

    def encode(self, text: bytes, fast: bool) -> np.ndarray:
        """The token ids of one document (uint32), by gigatoken if `fast`, else by the reference."""
        encode = self._encode_fast if fast else self._encode_slow
        if len(text) <= PIECE_BYTES:
            return encode(text)
        return np.concatenate([encode(piece) for piece in pieces(text)])

    def agrees(self, texts: Iterable[bytes]) -> bool:
        """Whether gigatoken gives the ids of the reference for all texts."""
        return all(np.array_equal(self._encode_fast(text), self._encode_slow(text)) for text in texts)

    def _encode_fast(self, text: bytes) -> np.ndarray:
        self._n_bytes += len(text)
        if self._n_bytes > _CHECK_BYTES:
            self._n_bytes = 0
            if _memory() - self._memory > _CACHE_BYTES:
                del self._fast
                self._memory = _memory()
                self._fast = load_hf_json(self._fast_json)
        return self._fast.encode(text)

    def _encode_slow(self, text: bytes) -> np.ndarray:
        encoding = self.slow.encode_batch_fast([text.decode("utf-8")], add_special_tokens=False)[0]
        return np.array(encoding.ids, np.uint32)


def _memory() -> int:
    """Bytes of memory that this process holds.

    Where the system does not say it, the most that it has held so far.
    """
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_card(tokenizer_json: Path) -> dict[str, Any]:
    """Read card.json beside a tokenizer: `separator_id`, `vocab_size`, `source`, and `commit` if it is from
    the hub.

    Raises ValueError if a file of the tokenizer is another one than the card says.
    """
    card = artifact.read_sealed(tokenizer_json.with_name("card.json"), "tokenizer")
    inside.check(tokenizer_json.with_name("card.json"), card["files"], make_again(tokenizer_json))
    for name, expected in card["files"].items():
        artifact.check_file(tokenizer_json.with_name(name), expected, partial(make_again, tokenizer_json))
    return card
