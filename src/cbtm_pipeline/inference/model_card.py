"""README.md of an ensemble's folder: the model card, for people and for the hub."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.provenance import card_header

SETTINGS = ("temperature", "epsilon", "beta", "hysteresis", "fix_after")
LABELS = ["cluster-branch-train-merge", "mixture-of-experts"]
N_TERMS = 12  # that stand for an expert
LICENCE = "Licence of the texts, as the run states it"
CARD = """\
{header}# {title}

{models} trained alone on one cluster of a corpus, and a router that mixes them
(Cluster-Branch-Train-Merge, [Gururangan et al. 2023](https://arxiv.org/abs/2303.14177)). For each token,
{active} {settings}

## Use

```python
{use}
```

`trust_remote_code=True` runs `modeling_cbtm.py` of this folder: read it first. Where cbtm-pipeline is
installed, write `import cbtm_pipeline` instead: then its own code is run.

The model expects the separator token before a text. Every folder in `experts/` is
a model of its own: `AutoModelForCausalLM.from_pretrained("experts/0")`.

`pad_token_id` is the separator, too. The whole is not meant to be trained: fine-tune an expert, whose card
says how.

## Evaluation

```text
{table}```

This model is `{label}`. `perplexity` is per token, `bits/byte` does not depend on the tokenizer.

## The experts

{experts}

## Limits and licences

The experts were trained on their texts alone, and can repeat the errors and biases of these texts. They
were not trained to follow instructions. {licence}The licences of these texts apply to what you do with
this model. So does that of the model that the experts began as, if they did not begin from scratch.
"""
USE = """\
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".")
text = tokenizer("Once upon a time", add_special_tokens=False).input_ids
ids = torch.tensor([[model.config.bos_token_id, *text]])
print(tokenizer.decode(model.generate(ids, max_new_tokens=50)[0]))"""


def render(
    row: Mapping[str, Any],
    table: str,
    cards: Mapping[str, Mapping[str, Any]],
    top_terms: Sequence[Sequence[str]],
    tags: Mapping[str, Mapping[str, str]],
    base_model: str | None = None,
) -> str:
    """The text. `row` is the mixture's row of metrics.json; `cards` and `tags` are by expert.

    `base_model` is a name on the hub.
    """
    own = shared([tags.get(name, {}) for name in cards])
    licence = card_header.named(own, card_header.LICENCE)
    results = card_header.evaluation("ensemble", {"held-out documents of the run": row["perplexity"]})
    values = (f"{key} {row[key]:g}" for key in SETTINGS if row.get(key) is not None)
    return CARD.format(
        header=card_header.render(LABELS, own, base_model, results),
        licence=f"Licence of the texts, as the run states it: {card_header.cell(licence)}. "
        if licence
        else "",
        **_counts(len(cards), row["top_k"]),
        settings=f"Router: `{row['router']}`, {', '.join(values)}, chosen on held-out text.",
        use=USE,
        table=table,
        label=verdict.label(dict(row)),
        experts=_experts(cards, top_terms, tags),
    )


def changed(
    text: str,
    cards: Mapping[str, Mapping[str, Any]],
    top_terms: Sequence[Sequence[str]],
    tags: Mapping[str, Mapping[str, str]],
    change: str,
    n_active: int | None = None,
) -> str:
    """The card of an ensemble whose set of experts has changed: `change` says how, in one sentence.

    `n_active` is the number of experts that run for each token now; None: all, or not known.
    The licence is that of all experts now. The evaluation stays, with the note that it is older. What was
    written by hand stays, too.
    """
    own = shared([tags.get(name, {}) for name in cards])
    text = card_header.with_licence(text, own)
    said = _licence(card_header.named(own, card_header.LICENCE))
    text = re.sub(
        rf"(?:{LICENCE}.*?\. )?(?=The licences of these texts apply)", lambda _: said, text, count=1
    )
    counts = _counts(len(cards), n_active or len(cards))
    text = re.sub(r"(?m)^# An ensemble of \d+ experts?$", f"# {counts['title']}", text)
    text = re.sub(r"(?m)^\d+ expert language models?,( each)? trained", f"{counts['models']} trained", text)
    if n_active:
        text = re.sub(r"the (\d+ )?experts? with the largest weights? runs?\.", counts["active"], text)
    note = f"Changed since this evaluation: {card_header.cell(change)}\n\n"
    experts = f"{note}## The experts\n\n{_experts(cards, top_terms, tags)}\n\n"
    found, n = re.subn(r"(?ms)^## The experts\n.*?(?=^## |\Z)", lambda _: experts, text, count=1)
    return found if n else f"{text.rstrip()}\n\n{experts}"


def _licence(named: str | None) -> str:
    """The sentence on the licence of the texts; nothing if the run says none."""
    return f"{LICENCE}: {card_header.cell(named)}. " if named else ""


def _counts(k: int, n_active: int) -> dict[str, str]:
    """The sentences with the number of experts, and with the number of those that run for a token."""
    return {
        "title": f"An ensemble of {k} expert{'' if k == 1 else 's'}",
        "models": f"{k} expert language model{',' if k == 1 else 's, each'}",
        "active": f"the {n_active} experts with the largest weights run."
        if n_active > 1
        else "the expert with the largest weight runs.",
    }


def shared(tags: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The tags that all experts have alike: those of the whole."""
    first, *others = tags
    return {key: value for key, value in first.items() if all(own.get(key) == value for own in others)}


def _experts(
    cards: Mapping[str, Mapping[str, Any]],
    top_terms: Sequence[Sequence[str]],
    tags: Mapping[str, Mapping[str, str]],
) -> str:
    """A table: size, training tokens, validation loss, what sets the cluster apart, and tags if there are."""
    more = (" tags |", "---|") if any(tags.values()) else ("", "")
    lines = [f"| expert | parameters | trained on | validation loss | what sets its texts apart |{more[0]}"]
    lines.append(f"|---|---:|---:|---:|---|{more[1]}")
    for (name, card), terms in zip(cards.items(), top_terms, strict=True):
        loss, n_tokens = card.get("validation_loss"), card.get("n_train_tokens")
        shown = card_header.cell(", ".join(term.strip() for term in terms[:N_TERMS]))
        trained = "" if n_tokens is None else f"{n_tokens:,} tokens"
        sizes = f"{card['n_parameters']:,} | {trained}" if "n_parameters" in card else " | "
        own = (
            f" {card_header.cell(', '.join(f'{k}: {v}' for k, v in tags.get(name, {}).items()))} |"
            if more[0]
            else ""
        )
        lines.append(f"| {name} | {sizes} | {'' if loss is None else f'{loss:.3f}'} | {shown} |{own}")
    return "\n".join(lines)
