"""Load a tokenizer from a folder or the hub, or train a byte-level BPE on the corpus.

    python -m cbtm_pipeline.tokenizer --config config.yaml --out results/tokenizer/tokenizer.json

The rule writes the files that `AutoTokenizer.from_pretrained` loads, and card.json. The card names the token
that separates documents: the tokenizer's bos token, else its eos token. A trained tokenizer has
`<|endoftext|>`, id 0, for both.
"""

import heapq
import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from cbtm_pipeline import config
from cbtm_pipeline import plan as plans
from cbtm_pipeline.base import artifact, cli, hub
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.corpus import blocks as corpus_blocks
from cbtm_pipeline.corpus import content, encoding, pretrained_tokenizer
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import rows as corpus_rows
from cbtm_pipeline.corpus.records import Fields
from cbtm_pipeline.plan import TokenizerPlan

SEPARATOR = "<|endoftext|>"
_BLOCK_BYTES = 1 << 23
# Files that an earlier run may have left beside tokenizer.json. They would change the meaning of the new one.
_SIDE_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "vocab.txt",
)


def sample(documents: Iterable[bytes], n_bytes: int, eval_fraction: float) -> list[bytes]:
    """Draw training documents evenly from the whole corpus, up to `n_bytes` of text.

    Takes the documents that are not held out and have the lowest numbers `corpus_rows.uniform`, in the order
    of these numbers. So the sample depends neither on the order of the corpus nor on chance. The last
    document is cut. One pass over the corpus, and memory of about `n_bytes`.
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
    """Train a byte-level BPE of up to `vocab_size` tokens on the texts, cut into words as GPT-2 does.

    Equal texts give equal tokenizers.
    """
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
    tokenizer.train_from_iterator(
        (piece.decode() for text in texts for piece in encoding.pieces(text)), trainer
    )
    return tokenizer


class Saved(NamedTuple):
    """What the card says about a tokenizer."""

    separator_id: int
    vocab_size: int
    commit: str | None  # of the repository, if the tokenizer is from the hub


def save_trained(plan: TokenizerPlan, demo: Path | None, folder: Path, outdir: Path) -> Saved:
    """Train a tokenizer on the corpus and save it to `folder`. The run's outputs lie in `outdir`.

    Raises ValueError if no text is left to train on.
    """
    files = corpus_files.name(corpus_files.input_files(plan.train, demo, outdir))
    progress = cli.Progress("read", corpus_files.n_bytes(files) / 1e6, "MB")

    def documents() -> Iterator[bytes]:
        fields = Fields(plan.text_field, plan.id_field)
        for part in corpus_blocks.parts(files, _BLOCK_BYTES, fields, plan.txt_documents):
            rows = corpus_rows.read(part, fields)
            yield from (row.text for row in rows if isinstance(row, corpus_rows.Document))
            progress.add(part.n_read / 1e6)

    texts = sample(documents(), plan.train_bytes, plan.eval_fraction or 0.0)
    if not texts:
        raise ValueError(
            "corpus.train: no text to train a tokenizer on. Expected documents that are not held out. "
            "Check corpus.text_field."
        )
    cli.log.info("training on %d documents, %.1f MB", len(texts), sum(map(len, texts)) / 1e6)
    tokenizer = train(texts, plan.vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token"), SEPARATOR)
    # No separator is added by itself, as lm-evaluation-harness would add a second one: readers put it there.
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    about |= {"add_bos_token": False, "padding_side": "left"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about, indent=1, sort_keys=True) + "\n")
    if tokenizer.get_vocab_size() < plan.vocab_size:
        cli.log.warning(
            "the text gives only %d tokens of the %d asked for", tokenizer.get_vocab_size(), plan.vocab_size
        )
    separator_id = tokenizer.token_to_id(SEPARATOR)
    assert separator_id is not None
    return Saved(separator_id, tokenizer.get_vocab_size(), None)


def save_pretrained(key: str, source: str, revision: str | None, folder: Path) -> Saved:
    """Load a tokenizer from a folder or the hub and save it to `folder`.

    `key` is the config key that gives the name `source`. `revision` is a commit, tag or branch of the
    repository on the hub; None is its main branch. Raises ValueError for a tokenizer that cannot be had, is
    not fast, or has neither a bos nor an eos token.
    """
    cli.log.info("loading %s", source)
    found = hub.fetch(key, source, revision, hub.lacks_tokenizer, hub.TOKENIZER, "a tokenizer.json")
    tokenizer = pretrained_tokenizer.load(key, source, found)
    tokenizer.save_pretrained(folder)
    vocab_size = pretrained_tokenizer.vocab_size(tokenizer)
    return Saved(pretrained_tokenizer.separators(tokenizer)[0], vocab_size, hub.commit(found))


def make(plan: TokenizerPlan, out: Path, demo: Path | None, seen: Path) -> None:
    """Write the tokenizer's files beside `out`, and `out` (tokenizer.json) last.

    The tokenizer is `plan.source` at `plan.revision` (a commit, tag or branch on the hub; None: the main
    branch). The card records the `commit` that was found. Without a source, a tokenizer is trained on the
    corpus, for which `demo` is the file that `builtin:demo` stands for. `seen` remembers the identities of
    the corpus's files. A failure leaves an earlier tokenizer as it was.
    """
    source = plan.source
    made_from = {} if source else {"corpus": content.of_training_text(plan.train, demo, seen)}
    made = out.parent / ".made"
    fresh(made)
    try:
        if source:
            key = "tokenizer.pretrained" if plan.pretrained else "model.pretrained"
            saved = save_pretrained(key, source, plan.revision, made)
        else:
            saved = save_trained(plan, demo, made, seen.parent)
        for name in ("tokenizer.json", "card.json", *_SIDE_FILES):
            (out.parent / name).unlink(missing_ok=True)
        for path in made.iterdir():
            if path.is_file() and path.name != "tokenizer.json":
                _publish(path, out.parent / path.name)
        about: dict[str, Any] = {
            "separator_id": saved.separator_id,
            "vocab_size": saved.vocab_size,
            "source": source or "trained on the corpus",
        }
        about |= {"commit": saved.commit} if saved.commit else {}
        about["files"] = {path.name: artifact.identity(path) for path in made.iterdir() if path.is_file()}
        about["identity"] = about["files"]["tokenizer.json"]
        meta = artifact.make_meta("tokenizer", made_from, plan.content(), **about)
        artifact.write_sealed(out.with_name("card.json"), meta)
        _publish(made / "tokenizer.json", out)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    cli.log.info(
        "%d tokens, documents are separated by token %d, source: %s",
        saved.vocab_size,
        saved.separator_id,
        about["source"],
    )


def _publish(made: Path, path: Path) -> None:
    with artifact.publish(path) as tmp:
        shutil.copyfile(made, tmp)


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__)
    p.add_argument(
        "--out", required=True, type=Path, help="tokenizer/tokenizer.json; its other files go beside it"
    )
    p.add_argument("--demo", type=Path, help="the file that builtin:demo stands for")
    args = p.parse_args(argv)
    cli.start_logging("tokenizer", args.log)
    cfg = config.read(args.config)
    make(plans.tokenizer(cfg), args.out, args.demo, Path(cfg.outdir, content.SEEN))


if __name__ == "__main__":
    cli.run(main)
