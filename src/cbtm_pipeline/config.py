"""The config as data: a strict schema without defaults.

`config.yaml` holds every default. `plan` says which keys each rule depends on.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cbtm_pipeline import config_errors, config_values, presets
from cbtm_pipeline.base import artifact, read_yaml
from cbtm_pipeline.config_values import (
    LARGEST,
    OF_EXPERTS,
    Count,
    Float,
    Name,
    Outdir,
    Paths,
    Positive,
    Rates,
    RouterName,
    Scratch,
    Share,
    Source,
    Tags,
    Whole,
    as_list,
)

LATER_KEYS = {  # keys that the config.json of an older version lacks, and the values that they had then
    ("corpus", "label_field"): None,
    ("cluster", "by"): "text",
    ("cluster", "border_share"): 0.0,
    ("cluster", "parents"): None,
    ("cluster", "second_round"): False,
    ("tokenizer", "revision"): None,
    ("embed", "revision"): None,
    ("model", "revision"): None,
    ("run", "keep_replaced"): True,
    ("route", "hysteresis"): [1.0],
    ("route", "fix_after"): [],
    ("train", "only"): "all",
    ("train", "first_share"): 0.5,
    ("eval", "merge"): False,
    ("eval", "tasks"): [],
}
ALL = "all"  # in route.top_k: as many experts as there are


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def tags_of(tags: Mapping[str, Any], expert: str) -> dict[str, str]:
    """The tags of an expert, by section tags: those of all, and its own over them."""
    shared = {key: value for key, value in tags.items() if key != OF_EXPERTS}
    return {**shared, **tags.get(OF_EXPERTS, {}).get(expert, {})}


class Corpus(_Section):
    train: Paths
    eval: Paths | None
    eval_fraction: Annotated[Float, Field(gt=0, lt=1)]
    text_field: str
    id_field: str | None
    label_field: Annotated[str, Field(pattern=r"\S")] | None
    txt_documents: Literal["file", "block"]
    max_bad_share: Share
    shard_bytes: Annotated[int, Field(ge=1 << 12, le=LARGEST)]


class Tokenizer(_Section):
    pretrained: Source | None
    revision: Name | None
    vocab_size: Annotated[int, Field(ge=257, le=LARGEST)]
    train_bytes: Count


class Embed(_Section):
    encoder: Source | None
    revision: Name | None
    windows: Count
    n_components: Count
    idf_power: Annotated[Float, Field(ge=0, le=10)]  # beyond that, float32 ends
    max_df: Annotated[Float, Field(gt=0, le=1)]
    min_df: Count
    fit_documents: Count


class Cluster(_Section):
    k: Annotated[int, Field(ge=1, le=10_000)]
    by: Literal["text", "label", "label+text"]
    balance: Literal["documents", "tokens", "none"]
    fit_documents: Count
    n_init: Count
    max_iterations: Count
    border_share: Annotated[Float, Field(ge=0, lt=1)]
    parents: Count | None
    second_round: bool


class Model(_Section):
    pretrained: Source | None
    revision: Name | None
    preset: Literal[presets.NAMES] | None  # pyright: ignore[reportInvalidTypeForm]
    scratch: Scratch


class Train(_Section):
    seq_len: Annotated[int, Field(ge=2, le=LARGEST)]
    batch_size: Count
    steps: Count
    seed_share: Annotated[Float, Field(ge=0, lt=1)]
    seed_batch_size: Count
    dense: Literal["batch", "steps"]
    controls: list[Literal["dense-batch", "dense-steps", "dense-large", "random"]]
    lr: Rates
    schedule: Literal["linear", "cosine"]
    final_lr_ratio: Share
    warmup_ratio: Share
    betas: Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[Float, Field(ge=0)]
    clip_norm: Positive
    max_loss_jump: Positive
    validation_share: Share
    validations: Whole
    patience: Count | None
    micro_batch_size: Count | None
    recompute: bool | None
    precision: Literal["auto", "float32", "bf16"]
    compile: bool | None
    only: Literal["all", "feed-forward"]
    first_share: Annotated[Float, Field(gt=0, lt=1)]


class Route(_Section):
    window_tokens: Count
    routers: Annotated[list[RouterName], BeforeValidator(as_list), Field(min_length=1)]
    top_k: Annotated[list[Count], BeforeValidator(as_list), Field(min_length=1)]
    temperature: Annotated[list[Positive], BeforeValidator(as_list), Field(min_length=1)]
    epsilon: Annotated[list[Share], BeforeValidator(as_list), Field(min_length=1)]
    beta: Annotated[list[Annotated[Float, Field(ge=0)]], BeforeValidator(as_list), Field(min_length=1)]
    hysteresis: Annotated[list[Annotated[Float, Field(ge=1)]], BeforeValidator(as_list), Field(min_length=1)]
    fix_after: Annotated[list[Whole], BeforeValidator(as_list)]
    calibration_share: Annotated[Float, Field(gt=0, lt=1)]


class Eval(_Section):
    max_document_tokens: Count | None
    stride: Count
    bootstrap: Annotated[int, Field(ge=100, le=LARGEST)]  # fewer say nothing of the ends of an interval
    merge: bool
    tasks: Annotated[list[Source], BeforeValidator(as_list)]


class Run(_Section):
    checkpoint_seconds: Annotated[Float, Field(gt=0, le=600)]  # nobody loses more than ten minutes
    log_seconds: Positive
    keep_replaced: bool
    sharded: bool | None
    wandb: str | None


class Config(_Section):
    outdir: Outdir
    tags: Tags
    seed: Whole
    corpus: Corpus
    tokenizer: Tokenizer
    embed: Embed
    cluster: Cluster
    model: Model
    train: Train
    route: Route
    eval: Eval
    run: Run


def read(path: str | Path) -> Config:
    """Read and validate a complete config file, YAML or JSON."""
    return validate(read_yaml.read(path))


def validate(content: Any) -> Config:
    """Return the typed config.

    Raises ValueError with a line for every wrong key: what was found, what was expected, what to do.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"config: {config_errors.show(content)}. Expected sections such as corpus and train. Start from "
            "config.yaml."
        )
    config_values.check_text("", content)
    try:
        config = Config.model_validate(_with_all(_with_later_keys(content)))
    except ValidationError as error:
        raise ValueError(
            "\n".join(dict.fromkeys(config_errors.explain(e, Config) for e in error.errors()))
        ) from None
    if config.eval.stride > config.train.seq_len:
        raise ValueError(
            f"eval.stride: {config.eval.stride}. Expected at most train.seq_len, {config.train.seq_len}. "
            "Lower eval.stride, or tokens between two windows would never be scored."
        )
    if config.train.validation_share > config.route.calibration_share:
        raise ValueError(
            f"train.validation_share: {config.train.validation_share}. Expected at most "
            f"route.calibration_share, {config.route.calibration_share}. Lower it, or documents that a "
            "training has seen would be reported on."
        )
    _check_revisions(config)
    _check_controls(config)
    _check_first_stage(config.cluster)
    if config.cluster.by != "text" and config.corpus.label_field is None:
        raise ValueError(
            f"cluster.by: {config.cluster.by} without corpus.label_field. Expected the field of the labels. "
            "Set corpus.label_field, or set cluster.by: text."
        )
    for name in config.tags.get(OF_EXPERTS, {}):
        if name not in map(str, range(config.cluster.k)):
            raise ValueError(
                f"tags.{OF_EXPERTS}.{name}: no expert of this run. Expected 0 to {config.cluster.k - 1}, by "
                "cluster.k. Change it in your config."
            )
    return config


def _check_revisions(config: Config) -> None:
    """Raise ValueError for a revision of a name that is not given."""
    for key, name, revision in (
        ("tokenizer.pretrained", config.tokenizer.pretrained, config.tokenizer.revision),
        ("model.pretrained", config.model.pretrained, config.model.revision),
        ("embed.encoder", config.embed.encoder, config.embed.revision),
    ):
        if revision is not None and name is None:
            section = key.partition(".")[0]
            raise ValueError(
                f"{section}.revision: {revision} without {key}. Expected the name that it belongs to. "
                f"Set {key}, or remove {section}.revision."
            )


def _check_controls(config: Config) -> None:
    """Raise ValueError for a large dense model of a pretrained one, and for a search without validation."""
    t = config.train
    if "dense-large" in t.controls and config.model.pretrained:
        raise ValueError(
            f"train.controls: dense-large with model.pretrained {config.model.pretrained}. Expected a model "
            "from scratch, as a pretrained one has no larger version here. Remove dense-large."
        )
    if isinstance(t.lr, list) and not (t.validations and t.validation_share):
        key = "validation_share" if t.validations else "validations"
        raise ValueError(
            f"train.{key}: 0, and train.lr is a list. Expected more than 0, as the validation loss chooses "
            f"the rate. Raise train.{key}, or give one rate."
        )


def _check_first_stage(cluster: Cluster) -> None:
    """Raise ValueError for parents of no or unequally many children, and for keys that exclude each other."""
    k, n = cluster.k, cluster.parents
    for key, value in (("parents", n), ("border_share", cluster.border_share)):
        if cluster.second_round and value:
            raise ValueError(
                f"cluster.second_round: true with cluster.{key} {value}. Expected one of the two. "
                f"Set cluster.second_round: false, or remove cluster.{key}."
            )
    if n is not None and (n >= k or k % n):
        fitting = [f"{some}" for some in range(1, k) if k % some == 0]
        todo = f"Choose {' or '.join(fitting[-4:])}, or another cluster.k" if fitting else "Set it to null"
        raise ValueError(
            f"cluster.parents: {n}. Expected a number below cluster.k, {k}, that divides it. {todo}."
        )


def _with_later_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the keys that the config.json of an older version does not have."""
    complete = {"tags": {}, **content}
    for (section, key), value in LATER_KEYS.items():
        if isinstance(complete.get(section), Mapping):
            complete[section] = {key: value, **complete[section]}
    return complete


def _with_all(content: dict[str, Any]) -> dict[str, Any]:
    """The config with the number k for `all` in route.top_k, unless the list has k or more already."""
    route, cluster = content.get("route"), content.get("cluster")
    if not isinstance(route, Mapping) or not isinstance(cluster, Mapping):
        return content
    top_k, k = as_list(route.get("top_k")), cluster.get("k")
    if ALL not in top_k:
        return content
    k = k if isinstance(k, int) and k > 0 else 1  # a wrong k is an error of its own
    numbers = [value for value in top_k if value != ALL]
    has_all = any(isinstance(value, int) and value >= k for value in numbers)
    resolved = numbers if has_all else [k if value == ALL else value for value in top_k]
    return {**content, "route": {**route, "top_k": list(dict.fromkeys(resolved))}}


def of_new_text(config: Config, paths: list[str]) -> dict[str, Any]:
    """The values of a run's config for other text, without labels, held-out files and first stages."""
    values = config.model_dump()
    values["corpus"] |= {"train": paths, "eval": None, "label_field": None}
    values["cluster"] |= {"by": "text", "parents": None, "second_round": False}
    return values


def write(config: Config, path: str | Path) -> None:
    """Write the complete config as JSON, for the modules of a run to read."""
    artifact.write_json(path, config.model_dump())
