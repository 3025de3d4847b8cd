"""What model cards share: the YAML header, which the hub and other programs read, and cells of tables."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from cbtm_pipeline.base.printable import printable

LICENCE = ("licence", "license")  # keys of section tags
LANGUAGE = ("language", "lang")
# Where a later rule writes what is known only then. Between these lines, nothing else stands.
BEGIN, END = "# evaluation", "# end of evaluation"


def render(
    labels: Sequence[str],
    tags: Mapping[str, str],
    base_model: str | None,
    results: Mapping[str, Any] | None = None,
) -> str:
    """The header with its rules of dashes.

    `labels` go into the entry `tags`. `tags` are those of the config: licence and language of the text.
    `base_model` is a name on the hub. `results` is what `evaluation` returns.
    """
    content: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    content |= _licence(named(tags, LICENCE))
    content |= {"language": language} if (language := named(tags, LANGUAGE)) else {}
    content |= {"base_model": base_model, "base_model_relation": "finetune"} if base_model else {}
    content["tags"] = list(labels)
    return f"---\n{_yaml(content)}{block(results)}---\n"


def with_licence(text: str, tags: Mapping[str, str]) -> str:
    """A model card whose header has the licence of these tags, and all else as it was."""
    header, dashes, rest = text.removeprefix("---\n").partition("---\n")
    if not dashes or not text.startswith("---\n"):
        return text
    new = _yaml(_licence(named(tags, LICENCE)))
    header = re.sub(r"(?m)^license: .*\n(license_name: .*\n)?", lambda _: new, header, count=1)
    return f"---\n{header}---\n{rest}"


def block(results: Mapping[str, Any] | None) -> str:
    """The lines of the evaluation, with the marks around them."""
    return f"{BEGIN}\n{_yaml(results) if results else ''}{END}\n"


def evaluation(name: str, perplexity: Mapping[str, float]) -> dict[str, Any]:
    """The entry `model-index`: the perplexity on each kind of held-out text."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": text, "type": "held-out"},
            "metrics": [{"type": "perplexity", "value": round(value, 4)}],
        }
        for text, value in perplexity.items()
    ]
    return {"model-index": [{"name": name, "results": results}]}


def named(tags: Mapping[str, str], keys: Sequence[str]) -> str | None:
    """The value of the first of these keys that is there."""
    return next((tags[key] for key in keys if key in tags), None)


def _licence(value: str | None) -> dict[str, str]:
    """The hub has names for licences, in small letters; `unknown` is one of them."""
    if value is None:
        return {"license": "unknown"}
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]*", value):
        return {"license": value.lower()}
    return {"license": "other", "license_name": value}


def _yaml(content: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=110)


def cell(text: str) -> str:
    """Text for a cell of a Markdown table: nothing in it is markup."""
    plain = html.escape(printable(text, keep=""), quote=False)
    return "".join(f"\\{character}" if character in "\\|`*_[]" else character for character in plain)
