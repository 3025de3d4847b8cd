"""What gives a corpus another identity, and what does not; and which files are read again to know it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import content

TEXTS = {"a.jsonl": b'{"text": "one"}\n', "b.jsonl": b'{"text": "two"}\n', "c.txt": b"three"}


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A corpus of three files and a folder for outputs. The tests run in the folder that holds both."""
    for folder in ("corpus", "results"):
        (tmp_path / folder).mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "corpus" / name).write_bytes(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "corpus"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read."""
    names: list[str] = []
    identity = artifact.identity
    monkeypatch.setattr(artifact, "identity", lambda path: names.append(Path(path).name) or identity(path))
    return names


SEEN = Path("results", content.SEEN)


def of_shard(*train: object, held_out: list[str] | None = None) -> str:
    return content.of_corpus(map(str, train or ("corpus",)), held_out, None, SEEN)


def of_tokenizer(*train: object) -> str:
    return content.of_training_text(map(str, train or ("corpus",)), None, SEEN)


def both(*train: object) -> tuple[str, str]:
    return of_shard(*train), of_tokenizer(*train)


def touched(corpus: Path) -> str:
    for path in corpus.iterdir():
        path.touch()
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 10**9))
    return "corpus"


def copied_to_another_folder(corpus: Path) -> str:
    shutil.copytree(corpus, corpus.parent / "other/place")
    shutil.rmtree(corpus)
    return "other/place"


def moved_away_and_linked(corpus: Path) -> str:
    corpus.rename(corpus.with_name("moved"))
    corpus.symlink_to(corpus.with_name("moved"))
    return "corpus"


def another_spelling(corpus: Path) -> str:
    return "./corpus"


def absolute_path(corpus: Path) -> str:
    return str(corpus)


def glob(corpus: Path) -> str:
    return "corpus/*"


def glob_through_all_folders(corpus: Path) -> str:
    return "./**/*.[jt]*"


def rights_changed(corpus: Path) -> str:
    (corpus / "a.jsonl").chmod(0o400)
    return "corpus"


def rewritten(corpus: Path) -> str:
    for path in corpus.iterdir():
        text = path.read_bytes()
        path.unlink()
        path.write_bytes(text)
    return "corpus"


def notes_beside_it(corpus: Path) -> str:
    (corpus / "README.md").write_text("no corpus file")
    (corpus / ".hidden.jsonl").write_text("{}")
    return "corpus"


@pytest.mark.parametrize(
    "act",
    [
        touched,
        copied_to_another_folder,
        moved_away_and_linked,
        another_spelling,
        absolute_path,
        glob,
        glob_through_all_folders,
        rights_changed,
        rewritten,
        notes_beside_it,
    ],
)
def test_same_text_is_the_same_corpus(corpus: Path, act: Callable[[Path], str]) -> None:
    before = both()
    assert both(act(corpus)) == before


def test_list_of_files_is_the_folder_with_these_files(corpus: Path) -> None:
    names = sorted(TEXTS)
    assert both(*(f"corpus/{name}" for name in names)) == both("corpus")
    assert both("corpus/a.jsonl", corpus / "b.jsonl", "./corpus/c*") == both("corpus")
    assert both("corpus/a.jsonl", "corpus") == both("corpus"), "each file once"


def text_changed(corpus: Path) -> None:
    (corpus / "b.jsonl").write_bytes(b'{"text": "two and more"}\n')


def text_changed_in_place_with_its_old_time(corpus: Path) -> None:
    """Nothing that one can see of the file, its time of change apart, is another."""
    path = corpus / "b.jsonl"
    before = path.stat()
    with path.open("r+b") as file:
        file.write(TEXTS["b.jsonl"].replace(b"two", b"TWO"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (before.st_size, before.st_mtime_ns, before.st_ino) == (
        after.st_size,
        after.st_mtime_ns,
        after.st_ino,
    )


def replaced_by_a_file_of_the_same_size_and_time(corpus: Path) -> None:
    path, other = corpus / "b.jsonl", corpus / "new"
    other.write_bytes(TEXTS["b.jsonl"].replace(b"two", b"TWO"))
    shutil.copystat(path, other)
    other.rename(path)


def file_added(corpus: Path) -> None:
    (corpus / "d.txt").write_bytes(b"four")


def copy_of_a_file_added(corpus: Path) -> None:
    shutil.copyfile(corpus / "c.txt", corpus / "d.txt")


def file_deleted(corpus: Path) -> None:
    (corpus / "c.txt").unlink()


@pytest.mark.parametrize(
    "act",
    [
        text_changed,
        text_changed_in_place_with_its_old_time,
        replaced_by_a_file_of_the_same_size_and_time,
        file_added,
        copy_of_a_file_added,
        file_deleted,
    ],
)
@pytest.mark.parametrize("remembered", [True, False])
def test_other_text_is_another_corpus(
    corpus: Path, act: Callable[[Path], None], remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the files are old and remembered, or were written, looked at and changed at the same time."""
    if remembered:
        monkeypatch.setattr(content, "_SETTLED_NS", -(10**9))
    before = both()
    if remembered:
        wait_for_a_step_of_the_clock(corpus)
    act(corpus)
    after = both()
    assert before[0] != after[0] and before[1] != after[1]


def wait_for_a_step_of_the_clock(corpus: Path) -> None:
    """Until what changes gets another time than the files of the corpus."""
    latest = max(path.stat().st_ctime_ns for path in corpus.iterdir())
    clock = corpus.with_name("clock")
    clock.touch()
    while clock.stat().st_ctime_ns <= latest:
        clock.touch()


def test_renamed_file_is_another_corpus_but_the_same_text_for_a_tokenizer(corpus: Path) -> None:
    """The name of a file is part of the ids of documents that have none."""
    before = both()
    (corpus / "a.jsonl").rename(corpus / "aa.jsonl")
    after = both()
    assert before[0] != after[0] and before[1] == after[1]


def test_other_order_is_another_corpus_but_the_same_text_for_a_tokenizer(corpus: Path) -> None:
    """The first of two documents with the same id stays."""
    one, other = both("corpus/a.jsonl", "corpus/b.jsonl"), both("corpus/b.jsonl", "corpus/a.jsonl")
    assert one[0] != other[0] and one[1] == other[1]


def test_texts_of_two_files_exchanged(corpus: Path) -> None:
    before = both()
    for name, other in (("a.jsonl", "b.jsonl"), ("b.jsonl", "a.jsonl")):
        (corpus / name).write_bytes(TEXTS[other])
    after = both()
    assert before[0] != after[0] and before[1] == after[1]


def test_new_held_out_files_are_another_corpus_but_the_tokenizer_does_not_read_them(corpus: Path) -> None:
    train = ("corpus/a.jsonl", "corpus/b.jsonl")
    found = [
        of_shard(*train),
        of_shard(*train, held_out=["corpus/c.txt"]),
        of_shard("corpus/a.jsonl", held_out=["corpus/b.jsonl"]),
        of_shard("corpus/b.jsonl", held_out=["corpus/a.jsonl"]),
        of_shard(*train, "corpus/c.txt"),
    ]
    assert len(set(found)) == len(found)
    assert of_shard(*train, held_out=["./corpus/c*"]) == found[1]
    before = of_tokenizer(*train)
    (corpus / "c.txt").write_text("other held-out text")
    assert of_shard(*train, held_out=["corpus/c.txt"]) != found[1]
    assert of_tokenizer(*train) == before


def test_demo_is_the_file_that_stands_for_it(corpus: Path) -> None:
    demo = corpus / "a.jsonl"
    assert content.of_corpus(["builtin:demo"], None, demo, SEEN) == of_shard(demo)
    assert content.of_training_text(["builtin:demo"], demo, SEEN) == of_tokenizer(demo)


def test_file_that_is_not_there_is_named(corpus: Path) -> None:
    (corpus / "d.txt").symlink_to(corpus / "gone.txt")
    for of in (of_shard, of_tokenizer):
        with pytest.raises(FileNotFoundError, match=r"d\.txt"):
            of()


# what is remembered


@pytest.fixture
def settled(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The corpus, which counts as old although it was just written."""
    monkeypatch.setattr(content, "_SETTLED_NS", -(10**9))
    return corpus


def test_only_files_that_look_changed_are_read_again(settled: Path, read: list[str]) -> None:
    before = both()
    assert sorted(read) == sorted(TEXTS), "the tokenizer's rule and the shards' remember for each other"
    read.clear()
    assert both() == both("./corpus") == both(settled) == before
    assert read == []
    os.utime(settled / "b.jsonl", ns=(1, 1))
    (settled / "d.txt").write_text("four")
    both()
    assert sorted(read) == ["b.jsonl", "d.txt"]
    read.clear()
    (settled / "d.txt").unlink()
    assert both() == before and read == []


def test_file_that_was_just_written_is_read_again_next_time(corpus: Path, read: list[str]) -> None:
    """The clocks of file systems are coarse: its next change might have the same time."""
    before = of_shard()
    assert of_shard() == before and sorted(read) == sorted([*TEXTS, *TEXTS])


def test_nothing_is_written_where_no_run_has_been(settled: Path) -> None:
    before = both()
    shutil.rmtree("results")
    assert both() == before
    assert not Path("results").exists()


def test_results_that_cannot_be_written_do_not_stop_anybody(settled: Path, read: list[str]) -> None:
    before = both()
    SEEN.unlink()
    SEEN.mkdir()
    read.clear()
    assert both() == before
    assert sorted(read) == sorted([*TEXTS, *TEXTS])


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:-40],
        lambda whole: whole.replace(artifact.hash_of(TEXTS["a.jsonl"]).encode(), b"0" * 32),
    ],
)
def test_damaged_memory_is_forgotten(
    settled: Path, read: list[str], damage: Callable[[bytes], bytes]
) -> None:
    before = both()
    whole = SEEN.read_bytes()
    assert damage(whole) != whole
    SEEN.write_bytes(damage(whole))
    read.clear()
    assert both() == before and sorted(read) == sorted(TEXTS)
    assert SEEN.read_bytes() == whole


def test_files_whose_names_are_not_utf8_are_told_apart(settled: Path, read: list[str]) -> None:
    names = [os.fsencode(settled) + b"/" + byte + b".txt" for byte in (b"\xfe", b"\xff")]

    def write(*texts: bytes) -> None:
        for name, text in zip(names, texts, strict=True):
            Path(os.fsdecode(name)).write_bytes(text)

    write(b"one", b"two")
    before = both()
    read.clear()
    assert both() == before and read == []
    write(b"ONE", b"two")
    after = both()
    write(b"one", b"TWO")
    assert len({before, after, both()}) == 3
