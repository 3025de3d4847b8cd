"""Rule `demo_corpus`: eight kinds of English text as unlike as possible, the same bytes on every machine.

    python -m cbtm_pipeline.demo_corpus --out results/demo/corpus.jsonl.zst

The text comes from pinned packages (envs/demo.txt), which are installed only for the text that they carry.
The readers of corpus/demo_sources.py turn each package into entries. `pack` joins and cuts entries into
documents of 1500 to 2500 characters. `build` takes a number of bytes of each domain and shuffles the
documents.
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import orjson
import zstandard

from cbtm_pipeline.base import artifact, cli
from cbtm_pipeline.corpus.demo_sources import DOMAINS, SOURCES, Source

MIN_CHARS, MAX_CHARS = 1500, 2500
# A document that has no room for the next piece must have MIN_CHARS already. A blank line, two characters,
# comes between entries.
PIECE_CHARS = MAX_CHARS - MIN_CHARS - 2
ZSTD_LEVEL = 10

# The longest piece that ends at the end of a line, else of a sentence, else of a word, else anywhere.
_PIECE = re.compile(
    r".{1,N}(?<!\n)(?=\n|\Z)|.{1,N}(?<=[.!?;:])(?= )|.{1,N}(?= )|.{1,N}".replace("N", str(PIECE_CHARS)),
    re.DOTALL,
)
_NEITHER_LETTER_NOR_DIGIT = bytes(byte for byte in range(256) if not chr(byte).isalnum() or byte > 127)
_MARKUP = re.compile(
    r"</?(?:p|a|b|i|em|li|ul|ol|dl|dt|dd|br|tr|td|div|code|note|span|table|strong)\b[^>]*>|&(?:[a-z]{2,8}|#\d+);"
)


def pack(entries: Iterable[str]) -> Iterator[str]:
    """Join and cut entries into documents of MIN_CHARS to MAX_CHARS characters.

    A document ends with an entry where possible, else with a line, else with a sentence. Three things are
    dropped: entries in which markup is left, entries of 80 characters or more that have the same letters and
    digits as an earlier one, and the rest at the end that is too short for a document.
    """
    seen: set[bytes] = set()
    document = ""
    for entry in entries:
        if _MARKUP.search(entry):
            continue
        if len(entry) >= 80:
            key = entry.lower().encode().translate(None, _NEITHER_LETTER_NOR_DIGIT)
            if key in seen:
                continue
            seen.add(key)
        if len(document) >= MIN_CHARS:
            yield document
            document = ""
        for i, piece in enumerate(_PIECE.findall(entry)):
            if i == 0 and document:
                piece = "\n\n" + piece
            if len(document) + len(piece) > MAX_CHARS:
                yield document
                document = ""
            if i > 0 and not document:
                # Drop the space or line end in front, but keep the indentation of a line.
                piece = re.sub(r"\A(?:\n+| )", "", piece)
            document += piece
    if len(document) >= MIN_CHARS:
        yield document


def build(
    domains: Sequence[str] | None = None, bytes_per_domain: int | None = None
) -> Iterator[dict[str, str]]:
    """Make the rows `{"id", "text", "domain"}` of some domains; None: of all.

    Each domain gives at most `bytes_per_domain` bytes of UTF-8 text; None: the number in DOMAINS. Ids number
    the documents of a domain in the order of the source. A hash of the id decides which documents are taken;
    a hash of the text gives the order of the rows. So a larger corpus contains the smaller one, the domains
    are interleaved, and no random generator is needed. Raises ValueError for an unknown domain, and for a
    package that is missing, has another version, or holds no text.
    """
    names = list(DOMAINS if domains is None else domains)
    for name in names:
        if name not in DOMAINS:
            known = ", ".join(DOMAINS)
            raise ValueError(
                f"demo corpus: domain {name} is unknown. Expected some of {known}. Choose from these."
            )
    roots = {name: _installed(SOURCES[name]) for name in names}
    rows: list[dict[str, str]] = []
    for name, root in roots.items():
        reader, n_bytes = DOMAINS[name]
        n_left = n_bytes if bytes_per_domain is None else bytes_per_domain
        documents = [
            {"id": f"{name}-{i:06d}", "text": text, "domain": name}
            for i, text in enumerate(pack(reader(root)))
        ]
        if not documents:
            raise ValueError(
                f"demo corpus: package {SOURCES[name].package} holds no text for {name}. "
                f"{_expected(SOURCES[name])}"
            )
        for row in sorted(documents, key=lambda row: _hash(row["id"])):
            n_left -= len(row["text"].encode())
            if n_left < 0:
                break
            rows.append(row)
    return iter(sorted(rows, key=lambda row: _hash(row["text"])))


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _installed(source: Source) -> Path:
    """The folder of the package's files. Raises ValueError unless exactly this version is installed."""
    try:
        distribution = importlib.metadata.distribution(source.package)
    except importlib.metadata.PackageNotFoundError as error:
        raise ValueError(
            f"demo corpus: package {source.package} is not installed. {_expected(source)}"
        ) from error
    if distribution.version != source.version:
        raise ValueError(
            f"demo corpus: package {source.package} has version {distribution.version}. {_expected(source)}"
        )
    return Path(str(distribution.locate_file("")))


def _expected(source: Source) -> str:
    return (
        f"Expected {source.package}=={source.version}, as every version carries other text. Run make setup."
    )


def main(argv: list[str] | None = None) -> None:
    """Run the rule from the command line."""
    p = cli.parser(__doc__, config=False)
    p.add_argument(
        "--out", required=True, type=Path, help="file to write, such as results/demo/corpus.jsonl.zst"
    )
    args = p.parse_args(argv)
    cli.start_logging("demo_corpus", args.log)
    rows = [orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in build()]
    lines = b"".join(rows)
    cli.log.info("%d documents of %d domains, %.1f MB", len(rows), len(DOMAINS), len(lines) / 1e6)
    with artifact.publish(args.out) as tmp:
        tmp.write_bytes(zstandard.ZstdCompressor(level=ZSTD_LEVEL).compress(lines))


if __name__ == "__main__":
    cli.run(main)
