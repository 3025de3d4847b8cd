"""README.md of an expert's folder: the model card, for people and for the hub.

A training writes it. Its evaluation is known only later: the rule `report` writes it between two marks. What
people write elsewhere stays.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cbtm_pipeline import plan_training
from cbtm_pipeline.base import artifact
from cbtm_pipeline.provenance import card_header
from cbtm_pipeline.provenance.expert_files import WEIGHTS

README = "README.md"
BEGIN, END = "<!-- evaluation -->\n", "<!-- end of evaluation -->\n"
LABELS = ["cluster-branch-train-merge"]
NOT_YET = "Not evaluated yet: the rule `report` of the run writes the results here.\n"
CARD = """\
{header}# {title}

One model of a Cluster-Branch-Train-Merge run ([Gururangan et al. 2023](https://arxiv.org/abs/2303.14177)):
{what}.

| | |
|---|---|
| architecture | {architecture}, {n_parameters:,} parameters |
| began as | {origin} |
| trained on | {n_train_tokens:,} tokens, sequences of {seq_len} |
| steps | {n_steps} with {batch_size} sequences each |
| training compute | {train_flops:.3g} FLOPs |
| precision | {precision}, weights in float32 |
| final training loss | {loss} |
| validation loss | {validation} |
| longest text | {n_positions} tokens |
| licence of its text | {licence} |
| language | {language} |
| weights | {weights} (blake2b of {file}) |

## Use

Every text begins with the separator, token {separator_id}:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
ids = [{separator_id}, *tokenizer("Once upon a time", add_special_tokens=False).input_ids]
print(tokenizer.decode(model.generate(torch.tensor([ids]), max_new_tokens=20)[0]))
```

## Fine-tune

{fine_tune}

## Evaluation

{begin}{not_yet}{end}
## Files and limits

`card.json` has the complete plan of the training and the identities of its inputs. `metrics.jsonl` has one
row for each step; `tensorboard/` has the same numbers.

The model was trained on its text alone, and can repeat the errors and biases of that text. It was not trained
to follow instructions. The licences of its text{and_base} apply to what you do with it.
"""
FINE_TUNE = """\
The separator also ends a text and pads a batch. A collator that hides padding by its token, such as
`DataCollatorForLanguageModeling`, hides the separator, too: the model then unlearns where a text ends.
Give the labels yourself, the separator at the end included, and let `DataCollatorForSeq2Seq` pad them."""
OWN_PADDING = """\
A collator that hides padding by its token, such as `DataCollatorForLanguageModeling`, must not hide the token
that ends a text. Here they differ, so it does not."""


class About(NamedTuple):
    """What the card says besides card.json. `base` is a name on the hub, "" for a folder, None: no base."""

    architecture: str
    separator_id: int
    n_positions: int | None
    base: str | None
    tags: Mapping[str, str]  # of the config
    pads_with_separator: bool = True


def render(card: Mapping[str, Any], about: About) -> str:
    """The text. `card` is that of the expert."""
    title, what = names(card)
    loss, validation = card["final_loss"], card["validation_loss"]
    licence = card_header.named(about.tags, card_header.LICENCE)
    language = card_header.named(about.tags, card_header.LANGUAGE)
    return CARD.format(
        **{**card["made_with"], **card},
        **{
            "header": card_header.render(LABELS, about.tags, about.base or None),
            "title": title,
            "what": what,
        },
        architecture=about.architecture,
        origin=card_header.cell(_origin(card, about.base)),
        loss="none" if loss is None else f"{loss:.4f} nats per token",
        validation="none" if validation is None else f"{validation:.4f} nats per token of held-out text",
        n_positions="any number of" if about.n_positions is None else about.n_positions,
        licence=card_header.cell(licence or "not stated (the key `tags` of the config can say it)"),
        language=card_header.cell(language or "not stated"),
        file=WEIGHTS,
        separator_id=about.separator_id,
        fine_tune=FINE_TUNE if about.pads_with_separator else OWN_PADDING,
        **{"begin": BEGIN, "not_yet": NOT_YET, "end": END},
        and_base="" if about.base is None else ", and of the model that it began as,",
    )


def names(card: Mapping[str, Any]) -> tuple[str, str]:
    """The title, and what the model is."""
    name, plan = card["expert"], card["made_with"]
    if name == "seed":
        return "Seed model", "the seed model that every expert starts from"
    if "branch" in plan:
        return f"Expert {name}", "an expert that was added to a finished run, from its nearest expert"
    if "depth" in plan:
        what = f"a dense model on the whole corpus with {plan['depth']} times the layers, a baseline"
        return f"Dense model ({name})", what
    if plan["data"] == "corpus":
        return f"Dense model ({name})", "a dense model on the whole corpus, the baseline"
    if plan["data"] == "parents":
        groups = plan_training.groups(plan["group"], plan["children"])
        what = f"the model on clusters {groups[0]} to {groups[-1]}, as which their experts begin"
        return f"Parent {plan['group']}", what
    if plan["data"] == "first":
        j = plan["group"]
        what = f"the expert on cluster {j} of the first round, as which expert {j} begins"
        return f"Expert {name}", what
    if plan["data"] == "clusters":
        return f"Expert {name}", f"the expert on cluster {plan['group']}"
    return f"Expert {name}", f"the expert on random cluster {plan['group']}, a control"


def _origin(card: Mapping[str, Any], base: str | None) -> str:
    """What the model began as."""
    if "branch" in card["made_with"]:
        return "the expert of the run that is nearest to its text"
    first = "random weights" if base is None else base or "a model in a folder"
    from_scratch = card["expert"] == "seed" or "depth" in card["made_with"]
    if from_scratch:
        return first
    seed = f"the seed model of the run, which began as {first}"
    parent = card["made_with"].get("begins")
    return f"{parent} of the run, which began as {seed}" if parent else seed


class Evaluation(NamedTuple):
    """Perplexity of an expert on held-out text, beside that of a dense model on the same."""

    perplexity: Mapping[str, float]  # by kind of text
    dense: Mapping[str, float | None]
    dense_name: str
    terms: Sequence[str]  # that set its cluster apart; none if it has no cluster


def add_evaluation(folder: Path, title: str, found: Evaluation) -> bool:
    """Write the evaluation into the card of an expert's folder. Returns False if it has no marks for it.

    The file changes only if the text does.
    """
    path = folder / README
    if not path.is_file():
        return False
    text = path.read_text("utf-8")
    header = card_header.block(card_header.evaluation(title, found.perplexity))
    new = _between(text, f"{card_header.BEGIN}\n", f"{card_header.END}\n", header)
    new = _between(new, BEGIN, END, f"{BEGIN}{_evaluation(found)}{END}")
    if new != text:
        with artifact.publish(path) as tmp:
            tmp.write_text(new, "utf-8")
    return new != text or BEGIN in text


def with_evaluation_of(text: str, before: str, weights: str) -> str:
    """The card with the evaluation of an earlier one, if that is of the same weights.

    So a model that is trained again, and comes out the same, keeps what the rule `report` has written.
    """
    if weights not in before:
        return text
    for begin, end in ((f"{card_header.BEGIN}\n", f"{card_header.END}\n"), (BEGIN, END)):
        if found := re.search(f"{re.escape(begin)}.*?{re.escape(end)}", before, re.S):
            text = _between(text, begin, end, found[0])
    return text


def _between(text: str, begin: str, end: str, block: str) -> str:
    """The text with this block in the place of the first one that has these marks."""
    pattern = f"{re.escape(begin)}.*?{re.escape(end)}"
    return re.sub(pattern, lambda _: block, text, count=1, flags=re.S)


def _evaluation(found: Evaluation) -> str:
    lines = [f"| held-out text | perplexity | of {found.dense_name} |", "|---|---:|---:|"]
    for text, value in found.perplexity.items():
        dense = found.dense[text]
        lines.append(f"| {text} | {value:.2f} | {'' if dense is None else f'{dense:.2f}'} |")
    if found.terms:
        shown = card_header.cell(", ".join(term.strip() for term in found.terms))
        lines += ["", f"What sets its texts apart: {shown}."]
    return "\n".join(lines) + "\n"
