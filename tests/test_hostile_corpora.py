"""Corpora, tokenizers and models that nobody should have: each ends in a result or in one line, and soon."""

import gzip
import json
import os
import signal
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from safetensors.torch import load_file, save_file

import made_texts
from cbtm_pipeline import config, shard
from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus import encoding
from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.inference import package

Make = Callable[[Path], Any]
Case = tuple[str, Make, Any]
ROW = b'{"id": "%d", "text": "one two three %d"}'
ROWS = [ROW % (i, i) for i in range(40)]
LINES = b"\n".join(ROWS) + b"\n"


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    """A hang is a failure."""

    def fail(number: int, frame: object) -> None:
        raise AssertionError("no end after 30 s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    """What the user sees of an error: one line that moves no cursor, and not a long one."""
    assert isinstance(error, ValueError | OSError), error
    line = " ".join(cli.explain(error).split())  # as cli.run does
    assert line.count("\n") == 0 and 0 < len(line) < 4200
    assert not [c for c in line if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    return line


def file(name: str, content: bytes) -> Make:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def parquet(**columns: Any) -> Make:
    def make(folder: Path) -> Path:
        pq.write_table(pa.table(columns), folder / "a.parquet")
        return folder / "a.parquet"

    return make


def link(name: str, to: str) -> Make:
    def make(folder: Path) -> Path:
        (folder / "in").mkdir()
        (folder / "in/good.jsonl").write_bytes(LINES)
        (folder / "in" / name).symlink_to(to)
        return folder / "in"

    return make


def pipe(folder: Path) -> Path:
    (folder / "in").mkdir()
    os.mkfifo(folder / "in/a.jsonl")
    return folder / "in"


def loop(folder: Path) -> str:
    (folder / "in/deep").mkdir(parents=True)
    (folder / "in/deep/a.jsonl").write_bytes(LINES)
    (folder / "in/deep/back").symlink_to(folder / "in")
    return f"{folder}/in/**/*.jsonl"


def duplicates(folder: Path) -> Path:
    (folder / "in").mkdir()
    for name in "ab":
        (folder / f"in/{name}.jsonl").write_bytes(LINES)
    return folder / "in"


def same_names(folder: Path) -> Path:
    for name in ("x", "y"):
        (folder / "in" / name).mkdir(parents=True)
        (folder / "in" / name / "a.txt").write_bytes(f"text of {name}".encode())
    return folder / "in"


WITH_SIZE = zstandard.compress(LINES * 50)
DICTIONARY = zstandard.train_dictionary(1 << 10, [row + b"x" * (i % 7) for i, row in enumerate(ROWS * 50)])
WITH_DICTIONARY = zstandard.ZstdCompressor(dict_data=DICTIONARY).compress(LINES)
BOMB = zstandard.ZstdCompressor(level=1).compress(b'{"text": "a"}\n' + b"\n" * (1 << 21))
DEEP = b'{"text": "deep", "more": ' + b"[" * 5000 + b"]" * 5000 + b"}"
INDEX = "model.safetensors.index.json"
HUGE_ID = b'{"id": "%s", "text": "huge"}' % (b"x" * 500_000)
ESCAPES = "id\x1b]0;owned\x07\x9b2J\u202e"

# (what it is, how it is made, the number of documents or a part of the line that refuses it)
CORPORA: list[Case] = [
    (
        "a zst cut in the middle",
        file("a.jsonl.zst", WITH_SIZE[: len(WITH_SIZE) // 2]),
        "1 of 1 files (100.00%)",
    ),
    (
        "a gz cut in the middle",
        file("a.jsonl.gz", gzip.compress(LINES)[:-60]),
        "are damaged, and nobody knows",
    ),
    ("a zst cut to nothing", file("a.jsonl.zst", b""), "it is empty"),
    ("a gz of another file's end", file("a.jsonl.gz", gzip.compress(LINES) + b"rest"), "damaged"),
    ("a zst with a dictionary", file("a.jsonl.zst", WITH_DICTIONARY), "compressed with a dictionary"),
    ("a gz that is a zst", file("a.jsonl.gz", WITH_SIZE), "not .gz data"),
    ("a zst of many empty lines", file("a.jsonl.zst", BOMB), 1),
    ("two gz files in one", file("a.jsonl.gz", gzip.compress(LINES[:-1]) + gzip.compress(b"\n")), 40),
    ("lone CRs between rows", file("a.jsonl", b"\r".join(ROWS)), 40),
    ("lone CRs in a compressed file", file("a.json.gz", gzip.compress(b"\r".join(ROWS) + b"\r")), 40),
    ("CR CR LF between rows", file("a.jsonl", b"\r\r\n".join(ROWS)), 40),
    ("nothing but CRs", file("a.jsonl", b"\r" * 1_000_000), "no rows"),
    ("one object around all rows", file("a.json", b'{"data": [' + b",".join(ROWS) + b"]}"), "no text field"),
    ("an array without an end", file("a.json", b"[" + b",".join(ROWS)), "has no end"),
    ("an array with more behind it", file("a.json", b"[" + b",".join(ROWS) + b"] x"), "more data after"),
    ("rows nested 5 000 deep", file("a.jsonl", DEEP + b"\n" + LINES), "of the bytes"),
    ("an id of 500 kB, twice", file("a.jsonl", HUGE_ID + b"\n" + HUGE_ID), "characters left out"),
    ("UTF-16", file("a.jsonl", LINES.decode().encode("utf-16")), "invalid UTF-8"),
    ("a tail of NULs", file("a.jsonl", LINES + b"\0" * 5000), "of the bytes"),
    ("an invalid byte in each row", file("a.jsonl", LINES.replace(b"one", b"\xff")), "invalid UTF-8"),
    ("text that is a number", file("a.jsonl", LINES.replace(b'"one', b'1, "x": "one')), "not a string"),
    ("no text field", file("a.jsonl", LINES.replace(b"text", b"body")), "text is not among body, id"),
    ("a key of control characters", file("a.jsonl", json.dumps({ESCAPES: 1}).encode()), "no text field"),
    (
        "ids of control characters",
        file("a.jsonl", (json.dumps({"id": ESCAPES, "text": "x"}) + "\n").encode() * 2),
        "duplicate id",
    ),
    ("ids that every file counts anew", duplicates, "set corpus.id_field: null"),
    ("files of one name", same_names, 2),
    ("Parquet that is text", file("a.parquet", LINES), "unreadable"),
    ("Parquet that is cut", file("a.parquet", b"PAR1" + b"\0" * 100), "unreadable"),
    ("Parquet without rows", parquet(text=pa.array([], pa.string())), "no rows"),
    ("Parquet with nulls", parquet(text=["one two", None]), "null"),
    ("Parquet of lists", parquet(text=[["one"], ["two"]]), "a list"),
    (
        "Parquet with invalid UTF-8",
        parquet(text=pa.array([b"\xff\xfe", b"ok"], pa.binary())),
        "invalid UTF-8",
    ),
    ("a pipe", pipe, "not a file"),
    ("a link to /dev/zero", link("zero.jsonl", "/dev/zero"), "not a file"),
    ("a link to nowhere", link("gone.jsonl", "/nowhere/at/all.jsonl"), "No such file"),
    ("a link to a folder that is gone", link("more", "/nowhere/at/all"), "No such file"),
    ("a link to itself", link("self.jsonl", "self.jsonl"), "symbolic links"),
    ("a link back to a folder above", loop, 40),
    ("a name of control characters", file("a\x1b[31m\n.jsonl", b"broken\n"), "\\x1b[31m"),
    ("a name that is not UTF-8", lambda folder: file(os.fsdecode(b"\xff.jsonl"), LINES)(folder), 40),
    ("a name with signs of a glob", file("[a]*.jsonl", LINES), 40),
    ("a name with braces", file("{expert}.jsonl", LINES), 40),
    ("an unknown format", file("a.csv", b"id,text\n"), "unknown format"),
    ("a path with NUL", lambda folder: f"{folder}/a\0.jsonl", "\\x00.jsonl: no such file"),
    ("an empty path", lambda folder: "", "an empty path"),
    ("a name of 5 000 letters", lambda folder: f"{folder}/{'x' * 5000}.jsonl", "too long"),
]


def sharded(make: Make, folder: Path, tokenizer_json: Path) -> Any:
    """How many documents a corpus has that a run finds and `shard` reads, or the line that refuses it."""
    source = folder / "corpus"
    source.mkdir()
    made = str(make(source))
    try:
        corpus_files.find([made], None, str(folder / "s"))
        plan = made_texts.shard_plan(train=[made], eval_fraction=0.5)
        shard.make(plan, tokenizer_json, folder / "s/manifest.json", 1, None, folder / "seen")
        shards = artifact.read_sealed(folder / "s/manifest.json", "shards")["shards"]
        return sum(entry["n_documents"] for entry in shards)
    except Exception as error:
        line = one_line(error)
        return 1 if "none of the" in line else line  # one document is too few to be split, and was read


@pytest.mark.parametrize(("make", "expected"), [case[1:] for case in CORPORA], ids=[c[0] for c in CORPORA])
def test_a_corpus_gives_documents_or_one_line(
    make: Make, expected: Any, tmp_path: Path, tokenizer_json: Path
) -> None:
    found = sharded(make, tmp_path, tokenizer_json)
    listed = tmp_path / "s/quarantine.jsonl"
    for line in listed.read_text("utf-8").splitlines() if listed.exists() else ():
        assert len(line) < 2000 and not [c for c in line if unicodedata.category(c) in ("Cc", "Zl", "Zp")]
        assert json.loads(line)["source"]
    assert found == expected if isinstance(expected, int) else expected in found


@pytest.fixture(scope="module")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_texts.make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def changed(**keys: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **keys}).encode()


TOKENIZERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("empty", lambda content: b""),
    ("cut", lambda content: content[: len(content) // 2]),
    ("a list", lambda content: b"[1, 2]"),
    ("no object at all", lambda content: b"null"),
    ("nested deep", lambda content: b"[" * 100_000),
    ("not UTF-8", lambda content: b"\xff" + content),
    ("without a model", changed(model=None)),
    ("of an unknown model", changed(model={"type": "Own"})),
    ("with tokens that are no tokens", changed(added_tokens=[{"id": "x"}])),
    ("with a strange version", changed(version="9.9")),
]


@pytest.mark.parametrize("change", [case[1] for case in TOKENIZERS], ids=[case[0] for case in TOKENIZERS])
def test_a_tokenizer_that_is_none_is_one_line(
    change: Callable[[bytes], bytes], tmp_path: Path, tokenizer_json: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes(change(tokenizer_json.read_bytes()))
    with pytest.raises((ValueError, OSError)) as error:
        encoding.TokenEncoder(tmp_path / "tokenizer.json")
    assert "tokenizer.json: not a tokenizer" in one_line(error.value)


def test_a_tokenizer_whose_card_names_files_elsewhere_is_one_line(
    tmp_path: Path, tokenizer_json: Path
) -> None:
    card = artifact.read_sealed(tokenizer_json.with_name("card.json"), "tokenizer")
    del card["seal"]
    for name in ("../secret", "/etc/passwd", "a/../../b", ""):
        artifact.write_sealed(tmp_path / "card.json", {**card, "files": {name: "0"}})
        with pytest.raises(ValueError) as error:
            encoding.read_card(tmp_path / "tokenizer.json")
        assert f"it names {name}." in one_line(error.value)


# --- models -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "model"
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "vocab_size": 16,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, max_position_embeddings=32)).save_pretrained(
        folder
    )
    return folder


def own_code(**auto_map: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        edit(folder, model_type="own", auto_map=auto_map)
        (folder / "own.py").write_text(f"open({str(folder / 'RAN')!r}, 'w')\n")

    return change


def edit(folder: Path, name: str = "config.json", **keys: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **keys}))


def index(name: str) -> Callable[[Path], None]:
    """The weights, whole, outside of the model's folder, and an index that names them."""

    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        save_file(weights, folder.parent / "outside.safetensors", {"format": "pt"})
        edit(folder, INDEX, metadata={}, weight_map=dict.fromkeys(weights, name.format(folder.parent)))

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


MODELS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("an index that names files elsewhere", index("../outside.safetensors"), "outside its folder"),
    ("an index that names a whole path", index("{}/outside.safetensors"), "outside its folder"),
    (
        "an index that is a list",
        lambda f: ((f / "model.safetensors").unlink(), write(INDEX, b"[1]")(f)),
        "",
    ),
    ("an adapter", lambda f: edit(f, "adapter_config.json", base_model_name_or_path="/etc"), "an adapter"),
    ("code of its own", own_code(AutoConfig="own.C", AutoModelForCausalLM="own.M"), "custom code"),
    ("code of another repository", own_code(AutoConfig="me/other--own.C"), "me/other"),
    ("attention from the hub", lambda f: edit(f, attn_implementation="me/kernel"), "me/kernel"),
    ("attention from the hub, by its inner name", lambda f: edit(f, _attn_implementation="me/k"), "me/k"),
    (
        "attention from the hub, deep inside",
        lambda f: edit(f, text_config={"attn_implementation": {"": "a/b"}}),
        "a/b",
    ),
    ("a config that is no object", write("config.json", b"[]"), ""),
    ("a config nested deep", write("config.json", b"[" * 100_000), ""),
    ("an empty config", write("config.json", b""), ""),
    ("a config of negative sizes", lambda f: edit(f, hidden_size=-1), ""),
    ("weights that are cut", lambda f: os.truncate(f / "model.safetensors", 100), ""),
    ("weights that are a pickle", write("model.safetensors", b"\x80\x04."), ""),
    ("weights only as a pickle", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), ""),
    ("weights with a header of 2^63 bytes", write("model.safetensors", b"\xff" * 7 + b"\x7f"), ""),
    ("weights of other shapes", lambda f: edit(f, hidden_size=16), "no fitting weights for"),
    ("weights of more layers", lambda f: edit(f, num_hidden_layers=3), "its weights are"),
]


@pytest.mark.parametrize(("change", "expected"), [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_a_model_that_is_none_is_one_line(
    change: Callable[[Path], Any], expected: str, tmp_path: Path, whole_model: Path
) -> None:
    """And nothing outside its folder is read, no code of it runs, nobody is asked."""
    import shutil

    from cbtm_pipeline.training import model

    shutil.copytree(whole_model, tmp_path / "model")
    assert model.load(tmp_path / "model").num_parameters() > 0
    change(tmp_path / "model")
    with pytest.raises((ValueError, OSError)) as error:
        model.load(tmp_path / "model")
    assert expected in one_line(error.value)
    assert not (tmp_path / "model/RAN").exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "experts/../../x", ""])
def test_an_ensemble_that_names_files_elsewhere_is_not_copied(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "ensemble"
    folder.mkdir()
    (tmp_path / "outside").write_text("mine")
    meta = artifact.make_meta("ensemble", {}, files={name: artifact.identity(tmp_path / "outside")})
    artifact.write_sealed(folder / package.FILES, meta)
    with pytest.raises(ValueError) as error:
        package.copy(folder, tmp_path / "a/b/copy")
    assert f"it names {name}." in one_line(error.value)
    assert not (tmp_path / "a").exists()


# --- configs whose text would be lost -----------------------------------------------------------------------

TWICE = {
    "train": "corpus:\n  train: [a.jsonl]\n  train: [b.jsonl]\n",
    "corpus": "corpus: {train: a.jsonl}\ncluster: {k: 2}\ncorpus: {text_field: body}\n",
    "k": "cluster: {k: 2, k: 3}\n",
    "scratch": 'model: {"scratch": {}, scratch: {a: 1}}\n',
}


@pytest.mark.parametrize("key", TWICE)
def test_a_key_that_stands_twice_is_one_line(tmp_path: Path, key: str) -> None:
    (tmp_path / "mine.yaml").write_text(TWICE[key])
    with pytest.raises(ValueError) as error:
        config.read(tmp_path / "mine.yaml")
    assert f"mine.yaml: {key} in line " in one_line(error.value)
