"""A finished expert: a Hugging Face folder.

card.json says what the model was made from, and identifies it: its `identity` is a hash of the weights and
the configuration. files.json holds the hash of every other file, so that none is read unverified.
"""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import make_again
from cbtm_pipeline.base.publish import fresh
from cbtm_pipeline.corpus import tokenizer_config
from cbtm_pipeline.plan import TrainingPlan
from cbtm_pipeline.provenance import expert_files
from cbtm_pipeline.provenance.expert_files import WEIGHTS
from cbtm_pipeline.training import expert_card, training_log

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Origin(NamedTuple):
    """For the model card: what the model began as (`expert_card.About.base`), and the tags of the config."""

    base: str | None
    tags: Mapping[str, str]


NO_ORIGIN = Origin(None, {})


def publish(
    out: Path,
    model: "PreTrainedModel",
    tokenizer: Path,
    metrics: Path,
    card: dict[str, Any],
    origin: Origin = NO_ORIGIN,
) -> dict[str, Any]:
    """Write the expert's folder; return the card. The weights `out` (model.safetensors) come last.

    All files are written to a staging folder, then moved one by one. A run that is killed meanwhile leaves no
    weights, or weights that do not fit the card. Readers refuse such a folder, and the next start publishes
    it again. `card` gets the entries `weights` and `identity`; `origin` is for the model card. Raises OSError
    if the disk is full, and ValueError if the tokenizer has changed.
    """
    folder = out.parent
    staging = fresh(folder / expert_files.STAGING)
    (staging / "tensorboard").mkdir()

    try:
        model.save_pretrained(staging, max_shard_size="1000TB")
    except (SafetensorError, OSError) as error:  # a full disk; other libraries do not name the file
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number, getattr(error, "strerror", None) or str(error), str(out)) from error
    card = {**card, "weights": artifact.identity(staging / WEIGHTS)}
    card["identity"] = artifact.fingerprint([card["weights"], artifact.identity(staging / "config.json")])
    artifact.write_sealed(staging / "card.json", card)
    shutil.copyfile(metrics, staging / "metrics.jsonl")
    training_log.write_events(
        staging / "tensorboard" / "events.out.tfevents.0.cbtm", training_log.read(metrics)
    )
    record = artifact.read_sealed(tokenizer.with_name("card.json"), "tokenizer")
    for name, expected in record["files"].items():
        artifact.check_file(tokenizer.with_name(name), expected, partial(make_again, tokenizer))
        shutil.copyfile(tokenizer.with_name(name), staging / name)
    _write_for_others(staging, model, record["separator_id"], card, origin)

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


def _write_for_others(
    folder: Path, model: "PreTrainedModel", separator_id: int, card: Mapping[str, Any], origin: Origin
) -> None:
    """Write the model card, and what other programs read of the tokenizer and of how texts are generated."""
    n_positions = tokenizer_config.n_positions(model.config.get_text_config())
    embeddings: Any = model.get_input_embeddings()
    tokenizer_config.write(folder, n_positions, embeddings.weight.shape[0], separator_id)
    padding = tokenizer_config.padding_id(folder)
    pad_token_id = separator_id if padding is None else padding
    _write_generation_config(folder / "generation_config.json", model.config, pad_token_id)
    eos = getattr(model.config, "eos_token_id", None)
    ends = {separator_id, *(eos if isinstance(eos, list) else [eos])}
    about = expert_card.About(
        type(model).__name__, separator_id, n_positions, *origin, pads_with_separator=pad_token_id in ends
    )
    text, published = expert_card.render(card, about), folder.with_name(expert_card.README)
    if published.is_file():
        before = published.read_text("utf-8", errors="replace")
        text = expert_card.with_evaluation_of(text, before, card["weights"])
    (folder / expert_card.README).write_text(text, "utf-8")


def _write_generation_config(path: Path, config: Any, pad_token_id: int) -> None:
    """Let generation_config.json say with which token a batch is padded, and how texts begin and end.

    transformers leaves the padding out where the model's own configuration does.
    """
    content = artifact.read_json(path) if path.exists() else {}
    known = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")}
    given = {name: value for name, value in {**known, **content}.items() if value is not None}
    artifact.write_json(path, {"pad_token_id": pad_token_id, **given})


def is_published(weights: Path, plan: TrainingPlan, made_from: dict[str, str]) -> bool:
    """Whether the folder holds the whole result of exactly this training."""
    try:
        card = expert_files.read_card(weights)
    except (OSError, ValueError):
        return False
    return (card["made_with"], card["made_from"]) == (plan.content(), made_from)
