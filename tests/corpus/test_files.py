import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cbtm_pipeline.corpus import files as corpus_files
from cbtm_pipeline.corpus import patterns


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def found(*patterns: object) -> list[str]:
    return [str(path) for path in corpus_files.input_files(map(str, patterns))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jsonl", (".jsonl", "")),
        ("a.jsonl.gz", (".jsonl", ".gz")),
        ("a.b.JSON.ZST", (".json", ".zst")),
        ("a.txt.zst", (".txt", ".zst")),
        ("a.snappy.parquet", (".parquet", "")),
        ("a.parquet.gz", None),
        ("a.md", None),
        ("jsonl", None),
    ],
)
def test_format_is_read_off_the_name(name: str, expected: tuple[str, str] | None) -> None:
    assert corpus_files.format_of(name) == expected


def test_folder_gives_its_corpus_files_sorted_and_no_others(tmp_path: Path) -> None:
    touch(
        tmp_path, "b.txt", "a/z.jsonl.gz", "a/y/x.parquet", "c.md", ".hidden.txt", ".git/d.txt", "a/.e.jsonl"
    )
    assert found(tmp_path) == [str(tmp_path / name) for name in ("a/y/x.parquet", "a/z.jsonl.gz", "b.txt")]


def test_globs_files_and_folders_keep_their_order_and_name_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path, "b-2.txt", "b-1.txt", "a.jsonl", "b-3.md", "folder/c.txt")
    files = found(
        tmp_path / "b-*",
        tmp_path / "a.jsonl",
        tmp_path / "folder",
        tmp_path / "b-1.txt",
        tmp_path / "**/c.txt",
    )
    assert files == [str(tmp_path / name) for name in ("b-1.txt", "b-2.txt", "a.jsonl", "folder/c.txt")]


def test_name_with_signs_of_a_glob_is_a_file_where_there_is_one(tmp_path: Path) -> None:
    touch(tmp_path, "part[1].txt", "part1.txt")
    assert found(tmp_path / "part[1].txt") == [str(tmp_path / "part[1].txt")]


def test_linked_folders_are_followed_but_never_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "data/a.txt", "far/b.txt")
    (tmp_path / "data/far").symlink_to(tmp_path / "far")
    (tmp_path / "far/back").symlink_to(tmp_path / "data")
    assert [Path(file).name for file in found(tmp_path / "data")] == ["a.txt", "b.txt"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none/*.jsonl", "no matching file"),
        ("empty", "no matching file"),
        ("gone", "no such"),
        ("a.md", "unknown format"),
    ],
)
def test_pattern_without_a_file_is_named(tmp_path: Path, pattern: str, message: str) -> None:
    touch(tmp_path, "a.md", "b.txt")
    (tmp_path / "empty.jsonl").mkdir()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message) as error:
        found(tmp_path / "b.txt", tmp_path / pattern)
    assert str(error.value).startswith(f"{tmp_path / pattern}: ")


@pytest.fixture
def nobody() -> Iterator[Path]:
    """A folder in which this process has no more rights than any user."""
    folder = Path(tempfile.mkdtemp())  # others may not look into pytest's
    folder.chmod(0o777)
    if os.geteuid() == 0:
        os.seteuid(65534)
    yield folder
    if os.getuid() == 0:
        os.seteuid(0)
    shutil.rmtree(folder)


@pytest.mark.parametrize("pattern", ["*/*.jsonl", "**/*.jsonl", "**", "b*/x.jsonl", "[ab]", ""])
def test_folder_that_cannot_be_read_is_an_error_for_every_kind_of_pattern(nobody: Path, pattern: str) -> None:
    touch(nobody, "a/x.jsonl", "b/x.jsonl")
    assert len(found(nobody / pattern)) == (1 if pattern == "b*/x.jsonl" else 2)
    (nobody / "b").chmod(0)
    with pytest.raises(PermissionError, match="b"):
        found(nobody / pattern)
    (nobody / "b").chmod(0o755)


def test_globs_find_what_pythons_glob_finds(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.txt", "a/b/x.txt", "a/b/.h/x.txt", ".h/x.txt", "c.txt", "a/y.jsonl", "a/b/c/z.txt")
    (tmp_path / "a/l").symlink_to(tmp_path / "a/b")
    for pattern in (
        "*",
        "**",
        "a/**",
        "**/x.txt",
        "*/*.txt",
        "a/*/x.txt",
        ".*/*",
        "**/b/**/*.txt",
        "[ac]*",
        "a/?.*",
    ):
        ours = {str(path) for path in patterns.match(tmp_path / pattern)}
        theirs = glob.glob(str(tmp_path / pattern), recursive=True)  # noqa: PTH207
        assert ours == {str(Path(path)) for path in theirs}, pattern


def test_link_that_leads_nowhere_is_an_error_where_it_may_be_a_folder(tmp_path: Path) -> None:
    touch(tmp_path, "a/x.jsonl")
    (tmp_path / "part-2").symlink_to("/mnt/not/mounted")
    for pattern in (tmp_path, tmp_path / "*/*.jsonl", tmp_path / "**/*.jsonl"):
        with pytest.raises(FileNotFoundError, match="part-2"):
            found(pattern)


def test_files_that_are_passed_over_are_known(tmp_path: Path) -> None:
    touch(tmp_path, "a.jsonl", "b.jsonl.xz", "c/d.csv", ".e.csv")
    names = [path.name for path in corpus_files.passed_over([str(tmp_path), f"{tmp_path}/*.xz"])]
    assert names == ["b.jsonl.xz", "d.csv"]


def test_dangling_link_is_listed_and_refused_when_sizes_are_added_up(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt")
    (tmp_path / "b.txt").symlink_to(tmp_path / "gone.txt")
    files = corpus_files.name(corpus_files.input_files([str(tmp_path)]))
    assert len(files) == 2
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        corpus_files.n_bytes(files)


def test_demo_stands_for_a_file_that_need_not_exist() -> None:
    assert corpus_files.find(["builtin:demo"], None) == ["builtin:demo"]
    assert corpus_files.input_files(["builtin:demo"], "not/yet.jsonl.zst") == [Path("not/yet.jsonl.zst")]
    with pytest.raises(ValueError, match="--demo"):
        corpus_files.input_files(["builtin:demo"])


def test_workflow_gets_training_and_held_out_files(tmp_path: Path) -> None:
    touch(tmp_path, "a.txt", "b.txt")
    a, b = str(tmp_path / "a.txt"), str(tmp_path / "b.txt")
    assert corpus_files.find([a], [b, a]) == [a, b]


def test_names_are_short_unambiguous_and_the_same_wherever_the_corpus_lies(tmp_path: Path) -> None:
    names = []
    for root in (tmp_path / "one", tmp_path / "another/place"):
        touch(root, "a.txt", "de/x.jsonl", "fr/x.jsonl", "fr/old/x.jsonl")
        names.append([file.name for file in corpus_files.name(corpus_files.input_files([str(root)]))])
    assert names[0] == names[1] == ["a.txt", "de/x.jsonl", "fr/old/x.jsonl", "fr/x.jsonl"]


def test_name_that_is_not_utf8_becomes_printable(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff.txt"
    with open(path, "wb") as file:  # noqa: PTH123, as Path has no bytes
        file.write(b"x")
    (file_found,) = corpus_files.name(corpus_files.input_files([str(tmp_path)]))
    assert file_found.name == "\ufffd.txt"
    assert corpus_files.n_bytes([file_found]) == 1
