import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import made_texts
from cbtm_pipeline import tokenizer
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content, encoding
from cbtm_pipeline.corpus import rows as corpus_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_texts.make_tokenizer(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def encoder(trained: Path) -> encoding.TokenEncoder:
    return encoding.TokenEncoder(trained)


def decode(encoder: encoding.TokenEncoder, ids: np.ndarray) -> str:
    return encoder.slow.decode(ids.tolist(), skip_special_tokens=False)


# training


def test_trained_tokenizer_is_what_transformers_loads(trained: Path) -> None:
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(trained.parent)
    card = encoding.read_card(trained)
    assert loaded.bos_token == loaded.eos_token == loaded.pad_token == "<|endoftext|>"
    assert loaded.bos_token_id == card["separator_id"] == 0
    assert len(loaded) == card["vocab_size"] == 320
    assert card["source"] == "trained on the corpus"
    text = "The  rose, the SHIP\r\n\tété 日本 😀\0 <|endoftext|> !"
    assert loaded.decode(loaded.encode("The rose")) == "The rose"
    ids = encoding.TokenEncoder(trained).encode(text.encode(), fast=True)
    assert loaded.decode(ids.tolist()) == text
    assert sorted(path.name for path in trained.parent.iterdir()) == [
        "card.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_same_text_gives_the_same_bytes_on_any_number_of_threads(tmp_path: Path, trained: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(300, 99))
    cfg = made_texts.write_config(
        tmp_path / "c.json", corpus={"train": [str(corpus)]}, tokenizer={"vocab_size": 320}
    )
    for n_threads in (1, 3):
        out = tmp_path / f"{n_threads}/tokenizer.json"
        env = {**os.environ, "RAYON_NUM_THREADS": str(n_threads)}
        done = made_texts.run(
            "tokenizer", "--config", cfg, "--out", out, "--log", tmp_path / "t.log", env=env
        )
        assert done.returncode == 0, done.stderr
        assert out.read_bytes() == trained.read_bytes()
        assert (out.parent / "card.json").read_bytes() == (trained.parent / "card.json").read_bytes()
    assert "training on" in (tmp_path / "t.log").read_text()


def test_training_never_sees_held_out_text(tmp_path: Path) -> None:
    texts = [
        f"{word} " * 50 for word in ("".join(random.Random(i).choices("abcdefghij", k=12)) for i in range(60))
    ]
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    how = made_texts.tokenizer_plan(
        corpus={"train": [str(corpus)], "eval_fraction": 0.4}, tokenizer={"vocab_size": 4000}
    )
    tokenizer.make(how, tmp_path / "t/tokenizer.json", None, tmp_path / "seen.json")
    encoder = encoding.TokenEncoder(tmp_path / "t/tokenizer.json")
    for text in texts:
        held_out = corpus_rows.uniform(corpus_rows.text_hash(text.encode())) < 0.4
        per_word = len(encoder.encode(text.encode(), fast=True)) / 50
        assert per_word > 3 if held_out else per_word <= 2.1


def test_no_text_to_train_on(tmp_path: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", [{"body": "no text"}])
    how = made_texts.tokenizer_plan(corpus={"train": [str(corpus)]})
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        tokenizer.make(how, tmp_path / "t/tokenizer.json", None, tmp_path / "seen.json")
    assert list((tmp_path / "t").iterdir()) == []


def card_of(tmp_path: Path, train: list[str], **corpus: Any) -> dict[str, Any]:
    """The card of a tokenizer trained on these files."""
    how = made_texts.tokenizer_plan(corpus={"train": train, **corpus}, tokenizer={"vocab_size": 300})
    tokenizer.make(how, tmp_path / "t/tokenizer.json", None, tmp_path / "seen.json")
    return encoding.read_card(tmp_path / "t/tokenizer.json")


def test_card_says_what_made_the_tokenizer_and_names_its_files(tmp_path: Path) -> None:
    corpus = made_texts.write_jsonl(tmp_path / "a.jsonl", made_texts.rows(50))
    card = card_of(tmp_path, [str(corpus)])
    how = made_texts.tokenizer_plan(corpus={"train": [str(corpus)]}, tokenizer={"vocab_size": 300})
    assert card["made_with"] == how.content() and "train" not in card["made_with"]
    seen = tmp_path / "seen.json"
    assert card["made_from"] == {"corpus": content.of_training_text([str(corpus)], None, seen)}
    assert seen.exists()
    files = {path.name: artifact.identity(path) for path in (tmp_path / "t").iterdir()}
    assert card["files"] == {name: found for name, found in files.items() if name != "card.json"}
    assert card["identity"] == files["tokenizer.json"]


def test_text_that_lies_in_other_files_gives_the_same_tokenizer(tmp_path: Path) -> None:
    """Copied, renamed, in another order, and with new held-out text beside it."""
    rows = made_texts.rows(50)
    for name, some in (("a", rows[:20]), ("b", rows[20:])):
        made_texts.write_jsonl(tmp_path / f"{name}.jsonl", some)
        made_texts.write_jsonl(tmp_path / f"copy/{name}{name}.jsonl", some)
    held_out = made_texts.write_jsonl(tmp_path / "new.jsonl", made_texts.rows(50, rng_seed=1))
    files = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    one = card_of(tmp_path, files, eval=["none"])
    for train, evaluation in (
        ([str(tmp_path / "copy")], "none"),
        (files[::-1], "none"),
        (files, str(held_out)),
    ):
        assert card_of(tmp_path, train, eval=[evaluation]) == one
    rows[0]["text"] += "!"
    made_texts.write_jsonl(tmp_path / "a.jsonl", rows[:20])
    assert card_of(tmp_path, files, eval=["none"])["made_from"] != one["made_from"]


DOCUMENTS = st.lists(
    st.text(alphabet="abé😀", min_size=1, max_size=30).map(str.encode), min_size=1, max_size=30
)


@settings(max_examples=100, deadline=None)
@given(documents=DOCUMENTS, n_bytes=st.integers(1, 300), share=st.sampled_from([0.0, 0.3]), seed=st.randoms())
def test_sample_is_as_large_as_asked_and_does_not_depend_on_order(
    documents: list[bytes], n_bytes: int, share: float, seed: Any
) -> None:
    def uniform(text: bytes) -> float:
        return corpus_rows.uniform(corpus_rows.text_hash(text))

    found = tokenizer.sample(documents, n_bytes, share)
    train = [text for text in documents if uniform(text) >= share]
    size = sum(map(len, found))
    assert min(n_bytes, sum(map(len, train))) - 3 <= size <= n_bytes  # a character has up to 4 bytes
    by_number = sorted(train, key=uniform)
    assert found[:-1] == by_number[: max(0, len(found) - 1)]
    if found:
        assert by_number[len(found) - 1].startswith(found[-1])
        found[-1].decode()
    seed.shuffle(documents)
    assert tokenizer.sample(documents, n_bytes, share) == found


def test_sample_comes_from_everywhere() -> None:
    documents = [b"%05d" % i for i in range(10_000)]
    numbers = [int(text) for text in tokenizer.sample(documents, 5 * 1000, 0.1)]
    assert len(numbers) == 1000
    quarters = np.bincount(np.array(numbers) // 2500, minlength=4)
    assert quarters.min() > 180


# encoding


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
def test_decoding_gives_the_text_back_and_both_encoders_agree(
    encoder: encoding.TokenEncoder, text: str
) -> None:
    slow, fast = (encoder.encode(text.encode(), fast=fast) for fast in (False, True))
    assert slow.tolist() == fast.tolist()
    assert decode(encoder, slow) == text


def test_special_tokens_in_the_text_are_ordinary_characters(encoder: encoding.TokenEncoder) -> None:
    assert encoder.why_slow == ""
    for fast in (True, False):
        ids = encoder.encode(b"a <|endoftext|><|endoftext|> b", fast)
        assert 0 not in ids
        assert decode(encoder, ids) == "a <|endoftext|><|endoftext|> b"


def test_truncation_and_padding_in_the_file_are_ignored(
    tmp_path: Path, trained: Path, encoder: encoding.TokenEncoder
) -> None:
    other = tokenizers.Tokenizer.from_file(str(trained))
    other.enable_truncation(5)
    other.enable_padding(length=100)
    other.save(str(tmp_path / "tokenizer.json"))
    text = b"The rose and the ship, the sugar and the dough."
    expected = encoder.encode(text, fast=False).tolist()
    assert 5 < len(expected) < 100
    cut = encoding.TokenEncoder(tmp_path / "tokenizer.json")
    assert cut.why_slow == ""
    for fast in (True, False):
        assert cut.encode(text, fast).tolist() == expected


def other_tokenizer(kind: str) -> tokenizers.Tokenizer:
    trainers, pre = tokenizers.trainers, tokenizers.pre_tokenizers
    byte_level = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>"], initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
    )
    if kind == "wordlevel":
        made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="<s>"))
        made.pre_tokenizer = pre.Whitespace()
        trainer = trainers.WordLevelTrainer(special_tokens=["<s>"], show_progress=False)
    elif kind == "unigram":
        made = tokenizers.Tokenizer(tokenizers.models.Unigram())
        made.pre_tokenizer = pre.Metaspace()
        trainer = trainers.UnigramTrainer(
            special_tokens=["<s>"], unk_token="<s>", vocab_size=200, show_progress=False
        )
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False, use_regex=kind != "no words")
        made.normalizer = tokenizers.normalizers.Lowercase() if kind == "lower case" else None
        made.decoder = tokenizers.decoders.ByteLevel()
        trainer = byte_level
    made.train_from_iterator(made_texts.texts(200), trainer)
    if kind == "added":
        made.add_tokens([tokenizers.AddedToken("rose", single_word=True)])
    return made


@pytest.mark.parametrize("kind", ["wordlevel", "unigram", "no words", "lower case", "added"])
def test_where_gigatoken_cannot_follow_the_reference_it_is_not_used(tmp_path: Path, kind: str) -> None:
    made = other_tokenizer(kind)
    made.save(str(tmp_path / "tokenizer.json"))
    encoder = encoding.TokenEncoder(tmp_path / "tokenizer.json")
    assert encoder.why_slow
    text = "The rose, the roses and the Ship"
    assert (
        encoder.encode(text.encode(), fast=False).tolist() == made.encode(text, add_special_tokens=False).ids
    )


def test_cache_of_gigatoken_is_renewed_without_changing_ids(
    encoder: encoding.TokenEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = made_texts.texts(1)[0].encode()
    expected, backend = encoder.encode(text, fast=True), encoder._fast
    monkeypatch.setattr(encoding, "_CHECK_BYTES", 2 * len(text))
    for _ in range(4):
        assert np.array_equal(encoder.encode(text, fast=True), expected)
    assert encoder._fast is backend, "memory has not grown"
    monkeypatch.setattr(encoding, "_CACHE_BYTES", -(1 << 40))
    for _ in range(4):
        assert np.array_equal(encoder.encode(text, fast=True), expected)
    assert encoder._fast is not backend


CACHE = """
import random, sys
from pathlib import Path
from cbtm_pipeline.corpus import encoding
encoding._CACHE_BYTES, encoding._CHECK_BYTES = int(sys.argv[2]), 1 << 22
encoder = encoding.TokenEncoder(Path(sys.argv[1]))
letters = bytes(b"abcdefghijklmnop"[i % 16] for i in range(256))
before = largest = encoding._memory()
for i in range(24):
    text = random.Random(i).randbytes(1 << 20).translate(letters)
    encoder.encode(b" ".join(text[j : j + 8] for j in range(0, len(text), 8)), fast=True)
    largest = max(largest, encoding._memory())
print((largest - before) >> 20)
"""


def test_memory_where_the_system_tells_only_the_peak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = encoding._memory()
    monkeypatch.setattr(encoding, "_STATM", tmp_path / "none")
    assert 0.9 * held < encoding._memory() < 100 * held, "in bytes"


# glibc keeps an arena of memory for each thread, and freed memory at the end of each: noise of 100 MB.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1", "RAYON_NUM_THREADS": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}


def test_cache_of_gigatoken_is_bounded(trained: Path) -> None:
    """The worst text for the cache is one in which no word repeats. It is encoded in a process of its own."""

    def grows(cache_bytes: int) -> int:
        command = [sys.executable, "-c", CACHE, str(trained), str(cache_bytes)]
        environment = {**os.environ, **ONE_ARENA}
        done = subprocess.run(command, env=environment, capture_output=True, check=True, text=True)
        return int(done.stdout)

    bounded = grows(64 << 20)
    assert bounded < 200
    assert grows(1 << 40) > bounded + 80, "the bound has done something"


def test_damaged_tokenizer_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer"):
        encoding.TokenEncoder(tmp_path / "tokenizer.json")


# pieces


@pytest.fixture
def short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_BYTES", 4096)
    monkeypatch.setattr(encoding, "_WINDOW", 256)


def long_text(kind: str, n: int) -> bytes:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(n // 5)]
    if kind == "lines":
        return "".join(word + rng.choice([" ", " ", ", ", ".\n", "\n\n", ";\n  "]) for word in words).encode()
    if kind == "words":
        return "  ".join(" ".join(words[i : i + 5]) for i in range(0, len(words), 5)).encode()
    return ("aé" * (n // 3) if kind == "two bytes" else "😀" * (n // 4)).encode()


@pytest.mark.parametrize("kind", ["lines", "words", "two bytes", "four bytes"])
def test_pieces_are_short_and_whole(kind: str, short_pieces: None) -> None:
    text = long_text(kind, 50 * encoding.PIECE_BYTES + 1)
    pieces = list(encoding.pieces(text))
    assert b"".join(pieces) == text
    assert len(pieces) > 40
    assert max(map(len, pieces)) <= encoding.PIECE_BYTES
    assert min(map(len, pieces[:-1])) > encoding.PIECE_BYTES - 256 - 4
    for piece in pieces:
        piece.decode()


@pytest.mark.parametrize("kind", ["lines", "words"])
def test_pieces_give_the_tokens_of_the_whole(
    encoder: encoding.TokenEncoder, kind: str, short_pieces: None
) -> None:
    text = long_text(kind, 50 * encoding.PIECE_BYTES)
    assert len(list(encoding.pieces(text))) > 40
    assert np.array_equal(encoder.encode(text, fast=True), encoder._encode_fast(text))


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("pattern", [GPT2, GPT4])
@pytest.mark.parametrize("kind", ["lines", "words"])
def test_pieces_keep_the_words_of_the_whole(kind: str, pattern: str, short_pieces: None) -> None:
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated").pre_tokenize_str
    text = long_text(kind, 50 * encoding.PIECE_BYTES)
    words = [word for piece in encoding.pieces(text) for word, _ in split(piece.decode())]
    assert words == [word for word, _ in split(text.decode())]


def test_text_of_up_to_a_piece_is_not_cut() -> None:
    for n in (0, 1, encoding.PIECE_BYTES):
        assert list(encoding.pieces(b"a" * n)) == [b"a" * n]


# pretrained


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published tokenizer: other special tokens, one of which a post-processor adds, and added tokens."""
    from transformers import PreTrainedTokenizerFast

    made = other_tokenizer("byte level")
    made.add_special_tokens(["</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("pretrained") / "model"
    PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


def make_pretrained(source: object, out: Path) -> Path:
    how = made_texts.tokenizer_plan(tokenizer={"pretrained": str(source)})
    tokenizer.make(how, out, None, out.with_name("seen.json"))
    return out


def test_pretrained_folder(tmp_path: Path, pretrained: Path) -> None:
    out = make_pretrained(pretrained, tmp_path / "t/tokenizer.json")
    card = encoding.read_card(out)
    assert (card["separator_id"], card["vocab_size"], card["source"]) == (0, 401, str(pretrained))
    assert "commit" not in card, "a folder is no repository"
    assert card["made_from"] == {} and card["made_with"] == {"pretrained": str(pretrained)}
    assert set(card["files"]) == {"tokenizer.json", "tokenizer_config.json"}
    encoder = encoding.TokenEncoder(out)
    ids = encoder.encode(b"The <s> rose</s>", fast=not encoder.why_slow)
    assert not {0, 400} & set(ids.tolist())
    assert decode(encoder, ids) == "The <s> rose</s>"


def test_seed_models_tokenizer_is_used_unless_another_is_named(tmp_path: Path, pretrained: Path) -> None:
    how = made_texts.tokenizer_plan(model={"pretrained": str(pretrained)})
    tokenizer.make(how, tmp_path / "t/tokenizer.json", None, tmp_path / "seen.json")
    assert encoding.read_card(tmp_path / "t/tokenizer.json")["source"] == str(pretrained)


@pytest.mark.parametrize(("bos", "eos", "separator_id"), [(None, "</s>", 400), (None, None, None)])
def test_separator_is_bos_else_eos_else_an_error(
    tmp_path: Path, pretrained: Path, bos: str, eos: str, separator_id: int | None
) -> None:
    shutil.copytree(pretrained, tmp_path / "source")
    path = tmp_path / "source/tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": bos, "eos_token": eos}))
    if separator_id is None:
        with pytest.raises(ValueError, match="neither a bos nor an eos token"):
            make_pretrained(tmp_path / "source", tmp_path / "t/tokenizer.json")
    else:
        out = make_pretrained(tmp_path / "source", tmp_path / "t/tokenizer.json")
        assert encoding.read_card(out)["separator_id"] == separator_id


def test_name_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    cfg = made_texts.write_config(tmp_path / "c.json", tokenizer={"pretrained": "nobody/no-such-tokenizer"})
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = made_texts.run("tokenizer", "--config", cfg, "--out", tmp_path / "t/tokenizer.json", env=env)
    assert done.returncode == 1
    loading, _, line = done.stderr.splitlines()
    assert loading.endswith("loading nobody/no-such-tokenizer")
    assert "tokenizer.pretrained: nobody/no-such-tokenizer: not found" in line
    assert "hf download nobody/no-such-tokenizer" in line
    assert not (tmp_path / "t/tokenizer.json").exists()


MAIN_COMMIT, OLD_COMMIT = "a" * 40, "b" * 40


@pytest.fixture
def hub_cache(tmp_path: Path, pretrained: Path, trained: Path) -> dict[str, str]:
    """The environment of a machine without network, whose cache of the hub has me/tiny at two commits.

    The main branch is the tokenizer `pretrained`; the tag v1 is the tokenizer `trained`.
    """
    repository = tmp_path / "hub/models--me--tiny"
    (repository / "refs").mkdir(parents=True)
    for ref, commit, folder in (("main", MAIN_COMMIT, pretrained), ("v1", OLD_COMMIT, trained.parent)):
        (repository / "refs" / ref).write_text(commit)
        shutil.copytree(folder, repository / "snapshots" / commit, ignore=shutil.ignore_patterns("card.json"))
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}


def run_with_hub(tmp_path: Path, env: dict[str, str], **sections: Any) -> subprocess.CompletedProcess[str]:
    cfg = made_texts.write_config(tmp_path / "c.json", **sections)
    return made_texts.run("tokenizer", "--config", cfg, "--out", tmp_path / "t/tokenizer.json", env=env)


@pytest.mark.parametrize(
    ("section", "revision", "commit", "vocab_size"),
    [
        ("tokenizer", None, MAIN_COMMIT, 401),
        ("model", "v1", OLD_COMMIT, 320),
        ("tokenizer", OLD_COMMIT, OLD_COMMIT, 320),
    ],
)
def test_revision_on_the_hub_is_used_and_its_commit_recorded(
    tmp_path: Path,
    hub_cache: dict[str, str],
    section: str,
    revision: str | None,
    commit: str,
    vocab_size: int,
) -> None:
    done = run_with_hub(tmp_path, hub_cache, **{section: {"pretrained": "me/tiny", "revision": revision}})
    assert done.returncode == 0, done.stderr
    card = encoding.read_card(tmp_path / "t/tokenizer.json")
    assert (card["source"], card["commit"], card["vocab_size"]) == ("me/tiny", commit, vocab_size)


def test_revision_that_is_not_in_the_cache_is_named(tmp_path: Path, hub_cache: dict[str, str]) -> None:
    done = run_with_hub(tmp_path, hub_cache, tokenizer={"pretrained": "me/tiny", "revision": "v2"})
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert "tokenizer.pretrained: me/tiny: not found" in line
    assert "hf download me/tiny --revision v2" in line
    assert not (tmp_path / "t/tokenizer.json").exists()


def test_new_tokenizer_leaves_nothing_of_an_old_one(tmp_path: Path, trained: Path, pretrained: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(trained.parent, folder)
    (folder / "chat_template.jinja").write_text("old")
    (folder / ".made").mkdir()
    (folder / ".made/special_tokens_map.json").write_text("half")
    out = make_pretrained(pretrained, folder / "tokenizer.json")
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert encoding.read_card(out)["vocab_size"] == 401


def test_failure_leaves_the_old_tokenizer(tmp_path: Path, trained: Path) -> None:
    folder = tmp_path / "t"
    shutil.copytree(trained.parent, folder)
    with pytest.raises(ValueError):
        make_pretrained(tmp_path / "nothing", folder / "tokenizer.json")
    assert encoding.read_card(folder / "tokenizer.json")["vocab_size"] == 320


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_file_that_is_not_the_one_of_the_card_is_refused(tmp_path: Path, trained: Path, name: str) -> None:
    shutil.copytree(trained.parent, tmp_path / "t")
    path = tmp_path / "t" / name
    path.write_text(path.read_text() + " ")
    assert artifact.identity(path) != artifact.identity(trained.with_name(name))
    with pytest.raises(ValueError, match=rf"{name}: another file than it was .*--force .*tokenizer\.json"):
        encoding.read_card(tmp_path / "t/tokenizer.json")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
        encoding.read_card(tmp_path / "t/tokenizer.json")


def test_damaged_card_is_refused(tmp_path: Path, trained: Path) -> None:
    shutil.copytree(trained.parent, tmp_path / "t")
    path = tmp_path / "t/card.json"
    path.write_text(path.read_text().replace('"separator_id": 0', '"separator_id": 1'))
    with pytest.raises(ValueError, match=r"card\.json: changed since it was written"):
        encoding.read_card(tmp_path / "t/tokenizer.json")
