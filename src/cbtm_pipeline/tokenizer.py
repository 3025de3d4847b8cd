"""Rule `tokenizer`: the tokenizer of a run, loaded from a folder or the hub, or a byte-level BPE trained on the corpus; and how to encode.

What the rule writes is what `AutoTokenizer.from_pretrained` loads, and card.json, which names the token that separates documents: the
tokenizer's bos token, else its eos token; a trained tokenizer has `<|endoftext|>`, id 0, for both.
"""

import heapq
import json
import re
import resource
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import tokenizers
from gigatoken.gigatoken_rs import load_hf_json

from cbtm_pipeline import config
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows

SEPARATOR = "<|endoftext|>"
PIECE_BYTES = 1 << 20  # longer documents are encoded in pieces
_WINDOW = 1 << 16
_LINE_START = re.compile(rb"(?<=\S\n)(?=\S)")
_SPACE = re.compile(rb"(?<=\S)(?= \S)")
_CACHE_BYTES = 1 << 28  # gigatoken's cache of words grows without bound, so it is begun anew when memory has grown by so much
_LOOK_BYTES = 1 << 24  # text between two looks at the memory; words that never come again make a cache of ten times their size
_STATM = Path("/proc/self/statm")  # of Linux
_BLOCK_BYTES = 1 << 23
# what an earlier run of the rule may have left beside tokenizer.json, and what would change the meaning of the new one
_SIDE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
)
_PROBES = (
    "It's  the fox's\tdog\r\n\r\nwe'll\n \n  x=1234567.89; // #$%^&*() __init__ HTTPServer I'M",
    "naïve café e\u0301 Ünïcödé \u00a0\u2003\u3000 日本語 한국어 العربية हिन्दी 😀👩‍👩‍👧 ﬁ ½ \u200b\ufeff \x00\x01\x7f \U0010ffff",
    "a" * 300 + " " * 300 + "\n" * 30 + "=" * 100 + "9" * 50,
)


def pieces(text: bytes) -> Iterator[bytes]:
    """Cut UTF-8 text longer than PIECE_BYTES, so that encoding takes bounded memory; shorter text stays whole, so its tokens are exact.

    A cut lies at the start of a line, else in front of a space, in either case between two words; only where the last 64 kB of a piece have
    neither does it fall between two arbitrary characters. GPT-like tokenizers give the same tokens with and without the first two kinds.
    """
    start = 0
    while len(text) - start > PIECE_BYTES:
        end = start + PIECE_BYTES
        for cut in (_LINE_START, _SPACE):
            if found := [m.end() for m in cut.finditer(text, end - _WINDOW, end)]:
                end = found[-1]
                break
        while text[end] & 0xC0 == 0x80:  # within a character
            end -= 1
        yield text[start:end]
        start = end
    yield text[start:]


class Encoder:
    """Text to token ids, special tokens in the text read as ordinary characters. `tokenizers` is the reference; gigatoken is many times
    faster, and `why_slow` says why it cannot be used for this tokenizer at all ("" if it can)."""

    def __init__(self, tokenizer_json: Path):
        text = tokenizer_json.read_text("utf-8")
        try:
            self.slow = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more special
            raise ValueError(
                f"{tokenizer_json}: not a tokenizer ({error}). Expected tokenizer.json. Run the rule tokenizer again."
            ) from error
        self.slow.no_truncation()
        self.slow.no_padding()
        self.slow.encode_special_tokens = True
        content = orjson.loads(text) | {"truncation": None, "padding": None}
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
        """Token ids of one document (uint32), by gigatoken (`fast`) or the reference."""
        encode = self._encode_fast if fast else self._encode_slow
        if len(text) <= PIECE_BYTES:
            return encode(text)
        return np.concatenate([encode(piece) for piece in pieces(text)])

    def agrees(self, texts: Iterable[bytes]) -> bool:
        """Whether gigatoken gives the reference's ids."""
        return all(np.array_equal(self._encode_fast(text), self._encode_slow(text)) for text in texts)

    def _encode_fast(self, text: bytes) -> np.ndarray:
        self._n_bytes += len(text)
        if self._n_bytes > _LOOK_BYTES:
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
    """Bytes of memory that this process holds, or where the system does not say that, the most that it has held."""
    if _STATM.exists():
        return int(_STATM.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def read_card(tokenizer_json: Path) -> dict[str, Any]:
    """card.json beside a tokenizer: `separator_id`, `vocab_size`, `source`. Raises ValueError if it belongs to another tokenizer.json."""
    path = tokenizer_json.with_name("card.json")
    card = artifact.read_json(path, "tokenizer")
    if card["identity"] != artifact.identity(tokenizer_json):
        raise ValueError(f"{path}: speaks of another tokenizer.json. Expected the one beside it. Run the rule tokenizer again.")
    return card


def sample(documents: Iterable[bytes], n_bytes: int, eval_fraction: float) -> list[bytes]:
    """Draw training documents evenly from the whole corpus, up to `n_bytes` of text, in one pass and memory of about n_bytes.

    Taken are the documents with the lowest numbers `corpus_rows.uniform` that are not held out, in the order of these numbers, so the
    sample depends neither on the order of the corpus nor on chance. The last document is cut.
    """
    taken: list[tuple[float, bytes]] = []  # a heap with the highest number on top
    total = 0
    for text in documents:
        number = corpus_rows.uniform(corpus_rows.text_hash(text))
        if number < eval_fraction:
            continue
        heapq.heappush(taken, (-number, text))
        total += len(text)
        while total - len(taken[0][1]) >= n_bytes:
            total -= len(heapq.heappop(taken)[1])
    texts = [text for _, text in sorted(taken, reverse=True)]
    if total > n_bytes:
        texts[-1] = texts[-1][: n_bytes - total].decode("utf-8", "ignore").encode()
    return texts


def train(texts: Iterable[bytes], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of up to `vocab_size` tokens, cut into words as GPT-2 does. The same texts give the same tokenizer."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece.decode() for text in texts for piece in pieces(text)), trainer)
    return tokenizer


def save_trained(how: dict[str, Any], demo: Path | None, folder: Path) -> tuple[int, int]:
    """Train on the corpus and save to `folder`; return the separator's id and the size of the vocabulary."""
    files = corpus_files.name(corpus_files.input_files(how["train"], demo))
    progress = cli.Progress("read", corpus_files.n_bytes(files) / 1e6, "MB")

    def documents() -> Iterator[bytes]:
        for part in corpus_blocks.parts(files, _BLOCK_BYTES, how["text_field"], how["id_field"], how["txt_documents"]):
            rows = corpus_rows.read(part, how["text_field"], how["id_field"])
            yield from (row.text for row in rows if isinstance(row, corpus_rows.Document))
            progress.add(part.n_read / 1e6)

    texts = sample(documents(), how["train_bytes"], 0 if how["eval"] else how["eval_fraction"])
    if not texts:
        raise ValueError(
            "corpus.train: no text to train a tokenizer on. Expected documents that are not held out. Check corpus.text_field."
        )
    cli.log.info("training on %d documents, %.1f MB", len(texts), sum(map(len, texts)) / 1e6)
    tokenizer = train(texts, how["vocab_size"])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    if tokenizer.get_vocab_size() < how["vocab_size"]:
        cli.log.warning("the text gives only %d tokens of the %d asked for", tokenizer.get_vocab_size(), how["vocab_size"])
    separator_id = tokenizer.token_to_id(SEPARATOR)
    assert separator_id is not None
    return separator_id, tokenizer.get_vocab_size()


def save_pretrained(source: str, folder: Path) -> tuple[int, int]:
    """Load a tokenizer from a folder or the hub and save it to `folder`; return the separator's id and the size of the vocabulary."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers import AutoTokenizer  # takes seconds, and workers that encode do without

    hub_logging.set_verbosity_error()  # it would announce every try to reach the hub
    cli.log.info("loading %s", source)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:  # hub, network and format errors have many types
        found = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(
            f"tokenizer.pretrained: {source} cannot be loaded ({found}). Expected a folder with tokenizer.json or a name on the hub. "
            "Correct it; where there is no network, run hf download for the name on a machine that has one, and copy its cache or folder."
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer.pretrained: {source} has no tokenizer.json. Expected a fast tokenizer. Convert it, or choose another.")
    ids = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not ids:
        raise ValueError(
            f"tokenizer.pretrained: {source} has neither a bos nor an eos token. Expected one to separate documents. "
            "Set bos_token in its tokenizer_config.json."
        )
    tokenizer.save_pretrained(folder)
    return ids[0], max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)


def make(how: dict[str, Any], out: Path, demo: Path | None) -> None:
    """Write the tokenizer's files beside `out`, and `out` (tokenizer.json) last."""
    source = how["pretrained"] or how["model"]
    made = out.parent / ".made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        separator_id, vocab_size = save_pretrained(source, made) if source else save_trained(how, demo, made)
        for name in ("tokenizer.json", "card.json", *_SIDE_FILES):
            (out.parent / name).unlink(missing_ok=True)
        for path in made.iterdir():
            if path.is_file() and path.name != "tokenizer.json":
                _publish(path, out.parent / path.name)
        about = {"separator_id": separator_id, "vocab_size": vocab_size, "source": source or "trained on the corpus"}
        about["identity"] = artifact.identity(made / "tokenizer.json")
        artifact.write_json(out.with_name("card.json"), artifact.make_meta("tokenizer", {}, **about))
        _publish(made / "tokenizer.json", out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    cli.log.info("%d tokens, documents are separated by token %d, source: %s", vocab_size, separator_id, about["source"])


def _publish(made: Path, path: Path) -> None:
    with artifact.publish(path) as tmp:
        shutil.copyfile(made, tmp)


def main(argv: list[str] | None = None) -> None:
    p = cli.parser(__doc__)
    p.add_argument("--out", required=True, type=Path, help="tokenizer/tokenizer.json; its other files go beside it")
    p.add_argument("--demo", type=Path, help="the file that builtin:demo stands for")
    args = p.parse_args(argv)
    cli.start_logging("tokenizer", args.log)
    make(config.parameters(config.read(args.config), "tokenizer"), args.out, args.demo)


if __name__ == "__main__":
    cli.run(main)
