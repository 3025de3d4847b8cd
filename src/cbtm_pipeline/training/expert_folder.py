"""A finished expert: a Hugging Face folder.

card.json says what the model was made from, and identifies it: its `identity` is a hash of the weights and
the configuration. files.json holds the hash of every other file, so that none is read unverified.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.provenance.expert_files import WEIGHTS
from cbtm_pipeline.training import training_log

if TYPE_CHECKING:
    from transformers import PreTrainedModel

README = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [cluster-branch-train-merge]
---
# {title}

One model of a Cluster-Branch-Train-Merge run ([Gururangan et al. 2023](https://arxiv.org/abs/2303.14177)):
{what}.

| | |
|---|---|
| architecture | {architecture}, {n_parameters:,} parameters |
| trained on | {n_train_tokens:,} tokens, sequences of {seq_len} |
| steps | {n_steps} with {batch_size} sequences each |
| training compute | {train_flops:.3g} FLOPs |
| precision | {precision}, weights in float32 |
| final training loss | {loss} nats per token |
| weights | {weights} (blake2b of {file}) |

The model expects the separator token before a text. `card.json` has the complete plan of the training and
the identities of its inputs. `metrics.jsonl` has one row for each step; `tensorboard/` has the same numbers.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("."), AutoTokenizer.from_pretrained(".")
```

The model was trained on its text alone, and can repeat the errors and biases of that text. It was not trained
to follow instructions.
"""


def publish(
    out: Path, model: "PreTrainedModel", tokenizer: Path, metrics: Path, card: dict[str, Any]
) -> dict[str, Any]:
    """Write the expert's folder; return the card. The weights `out` (model.safetensors) come last.

    All files are written to a staging folder, then moved one by one. A run that is killed meanwhile leaves no
    weights, or weights that do not fit the card. Readers refuse such a folder, and the next start publishes
    it again. `card` gets the entries `weights` and `identity`. Raises OSError if the disk is full, and
    ValueError if the tokenizer has changed.
    """
    folder = out.parent
    staging = fresh(folder / expert_files.STAGING)
    (staging / "tensorboard").mkdir()

    try:
        model.save_pretrained(staging, max_shard_size="1000TB")
    except SafetensorError as error:  # a full disk
        raise OSError(None, str(error), str(out)) from error
    card = {**card, "weights": artifact.identity(staging / WEIGHTS)}
    card["identity"] = artifact.fingerprint([card["weights"], artifact.identity(staging / "config.json")])
    artifact.write_sealed(staging / "card.json", card)
    (staging / "README.md").write_text(_readme(card, type(model).__name__), "utf-8")
    shutil.copyfile(metrics, staging / "metrics.jsonl")
    training_log.write_events(
        staging / "tensorboard" / "events.out.tfevents.0.cbtm", training_log.read(metrics)
    )
    record = artifact.read_sealed(tokenizer.with_name("card.json"), "tokenizer")
    for name, expected in record["files"].items():
        artifact.check_file(tokenizer.with_name(name), expected, make_again(tokenizer))
        shutil.copyfile(tokenizer.with_name(name), staging / name)

    files = sorted(path for path in staging.rglob("*") if path.is_file() and path.name != WEIGHTS)
    hashes = {str(path.relative_to(staging)): artifact.identity(path) for path in files}
    meta = artifact.make_meta("expert_files", {"expert": card["identity"]}, files=hashes)
    artifact.write_sealed(staging / expert_files.FILES, meta)
    for path in [*files, staging / expert_files.FILES]:
        with artifact.publish(folder / path.relative_to(staging)) as tmp:
            path.rename(tmp)
    with artifact.publish(out) as tmp:
        (staging / WEIGHTS).rename(tmp)
    shutil.rmtree(staging)
    return card


def _readme(card: dict[str, Any], architecture: str) -> str:
    """The README.md of an expert's folder."""
    name, plan = card["expert"], card["made_with"]
    if name == "seed":
        title, what = "Seed model", "the seed model that every expert starts from"
    elif "branch" in plan:
        title, what = f"Expert {name}", "an expert that was added to a finished run, from its nearest expert"
    elif plan["data"] == "corpus":
        title, what = f"Dense model ({name})", "a dense model on the whole corpus, the baseline"
    elif plan["data"] == "clusters":
        title, what = f"Expert {name}", f"the expert on cluster {plan['group']}"
    else:
        title, what = f"Expert {name}", f"the expert on random cluster {plan['group']}, a control"
    loss = "none" if card["final_loss"] is None else f"{card['final_loss']:.4f}"
    return README.format(
        title=title, what=what, architecture=architecture, loss=loss, file=WEIGHTS, **{**plan, **card}
    )


def is_published(weights: Path, plan: TrainingPlan, made_from: dict[str, str]) -> bool:
    """Whether the folder holds the whole result of exactly this training."""
    try:
        card = expert_files.read_card(weights)
    except (OSError, ValueError):
        return False
    return (card["made_with"], card["made_from"]) == (plan.content(), made_from)
