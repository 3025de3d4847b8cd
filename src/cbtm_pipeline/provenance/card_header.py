"""The YAML header of a model card, which the hub and other programs read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

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
