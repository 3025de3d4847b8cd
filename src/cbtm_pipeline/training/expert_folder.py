"""A finished expert: a Hugging Face folder with a card that says what its weights are and were made from."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.training import training_log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"

README = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [cluster-branch-train-merge]
---
# {title}

One model of a Cluster-Branch-Train-Merge run ([Gururangan et al. 2023](https://arxiv.org/abs/2303.14177)): {what}.

| | |
|---|---|
| architecture | {architecture}, {n_parameters:,} parameters |
| trained on | {n_train_tokens:,} tokens, sequences of {seq_len} |
| steps | {n_steps} with {batch_size} sequences each |
| training compute | {train_flops:.3g} FLOPs |
| precision | {precision}, weights in float32 |
| final training loss | {loss} nats per token |
| weights | {weights} (blake2b of {file}) |

A text is modelled as the separator token followed by the text's own tokens. `card.json` has the complete plan of the training and the
identities of its inputs; `metrics.jsonl` its log, step by step; `tensorboard/` the same for TensorBoard.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

The model has learned from its text alone, with whatever is wrong or one-sided in it, and knows nothing of instructions.
"""


def publish(
    out: Path, model: "PreTrainedModel", tokenizer: Path, metrics: Path, card: dict[str, Any]
) -> dict[str, Any]:
    """Write the expert's folder around `out` (its model.safetensors), which comes last; return the card.

    Everything is prepared in a folder of its own, then moved file by file. A run that is killed in between leaves either no weights or
    weights that the card does not fit, which readers refuse, and does it all again when it is started again.
    """
    folder = out.parent
    staging = folder / ".staging"
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "tensorboard").mkdir(parents=True)

    try:
        model.save_pretrained(staging, max_shard_size="1000TB")
    except SafetensorError as error:  # a full disk
        raise OSError(None, str(error), str(out)) from error
    card = {**card, "weights": artifact.identity(staging / WEIGHTS)}
    artifact.write_json(staging / "card.json", card)
    (staging / "README.md").write_text(_readme(card, type(model).__name__), "utf-8")
    shutil.copyfile(metrics, staging / "metrics.jsonl")
    training_log.write_events(
        staging / "tensorboard" / "events.out.tfevents.0.cbtm", training_log.read(metrics)
    )
    for path in tokenizer.parent.iterdir():
        if path.is_file() and path.name != "card.json" and not path.name.startswith("."):
            shutil.copyfile(path, staging / path.name)

    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != WEIGHTS)
    for path in files:
        with artifact.publish(folder / path.relative_to(staging)) as tmp:
            path.rename(tmp)
    with artifact.publish(out) as tmp:
        (staging / WEIGHTS).rename(tmp)
    shutil.rmtree(staging)
    return card


def _readme(card: dict[str, Any], architecture: str) -> str:
    name, plan = card["expert"], card["plan"]
    what = {
        "clusters": f"the expert on cluster {plan['group']}",
        "random": f"the expert on random cluster {plan['group']}, a control",
        "corpus": "the seed model that every expert starts from"
        if name == "seed"
        else "a dense model on the whole corpus, the baseline",
    }[plan["data"]]
    title = (
        "Seed model"
        if name == "seed"
        else f"Expert {name}"
        if plan["data"] != "corpus"
        else f"Dense model ({name})"
    )
    loss = "none" if card["final_loss"] is None else f"{card['final_loss']:.4f}"
    return README.format(
        title=title, what=what, architecture=architecture, loss=loss, file=WEIGHTS, **{**plan, **card}
    )


def read_card(weights: Path) -> dict[str, Any]:
    """The card of an expert. Raises ValueError unless it is the card of these weights."""
    path = weights.with_name("card.json")
    card = artifact.read_json(path, "expert")
    if artifact.identity(weights) != card["weights"]:
        raise ValueError(
            f"{weights}: not the weights that card.json speaks of. Expected identity {card['weights']}. {make_again(weights)}"
        )
    return card


def is_published(weights: Path, plan: TrainingPlan, made_from: dict[str, str]) -> bool:
    """Whether exactly this training has been published, and is whole."""
    try:
        card = read_card(weights)
    except (OSError, ValueError):
        return False
    return (card["plan"], card["made_from"]) == (plan.content(), made_from)
