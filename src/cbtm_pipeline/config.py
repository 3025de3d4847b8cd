"""The config as data: a strict schema without defaults.

`config.yaml` holds every default. `plan` says which keys each rule depends on.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from cbtm_pipeline import presets
from cbtm_pipeline.base import artifact, read_yaml
from cbtm_pipeline.mixture.routers import ROUTERS

LATER_KEYS = {  # keys that the config.json of an older version lacks, and the values that they had then
    ("corpus", "label_field"): None,
    ("cluster", "by"): "text",
    ("cluster", "border_share"): 0.0,
    ("tokenizer", "revision"): None,
    ("embed", "revision"): None,
    ("model", "revision"): None,
    ("run", "keep_replaced"): True,
    ("route", "hysteresis"): [1.0],
    ("route", "fix_after"): [],
    ("train", "only"): "all",
    ("eval", "merge"): False,
    ("eval", "tasks"): [],
}


def _number(value: Any) -> Any:
    """Take `2e-4` as a number, which YAML 1.1 reads as text."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


def _list(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


Float = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Float, Field(ge=0, le=1)]
Positive = Annotated[Float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


TAG_KEY = r"[^\s=:]+"
OF_EXPERTS = "experts"  # the key of section tags that holds the tags of single experts
TagKey = Annotated[str, Field(pattern=f"^{TAG_KEY}$")]
Name = Annotated[str, Field(pattern=r"\S")]  # a folder or a name on the hub, or a revision there
Paths = Annotated[list[str], BeforeValidator(_list), Field(min_length=1)]


def _router(name: str) -> str:
    """Refuse a name that is not in the table of routers."""
    if name not in ROUTERS:
        names = " or ".join(map(repr, ROUTERS))
        raise PydanticCustomError("router", "Input should be {names}", {"names": names})
    return name


RouterName = Annotated[str, AfterValidator(_router)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


def _tags(tags: dict[str, Any]) -> dict[str, Any]:
    """Refuse values that are no names. `experts` has the tags of single experts; their names become text."""
    own = tags.get(OF_EXPERTS, {})
    if not isinstance(own, dict) or not all(isinstance(some, dict) for some in own.values()):
        _refuse_tag(f"tags.{OF_EXPERTS}", own, 'tags by expert, such as {"3": {licence: mit}}')
    shared = {key: value for key, value in tags.items() if key != OF_EXPERTS}
    for where, some in {
        "tags": shared,
        **{f"tags.{OF_EXPERTS}.{name}": some for name, some in own.items()},
    }.items():
        for key, value in some.items():
            if not re.fullmatch(TAG_KEY, str(key)):
                _refuse_tag(where, key, "a key without spaces, = and :")
            if not isinstance(value, str):
                _refuse_tag(f"{where}.{key}", value, "string")
            if not value.strip():
                _refuse_tag(f"{where}.{key}", value, "a name")
    experts = {OF_EXPERTS: {str(name): dict(some) for name, some in own.items()}} if own else {}
    return {**shared, **experts}


def _refuse_tag(key: str, found: Any, expected: str) -> None:
    raise PydanticCustomError(
        "tag", "{text}", {"text": f"{key}: {_show(found)}. Expected {expected}. Change it in your config."}
    )


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
    shard_bytes: Annotated[int, Field(ge=1 << 12)]


class Tokenizer(_Section):
    pretrained: Name | None
    revision: Name | None
    vocab_size: Annotated[int, Field(ge=257)]
    train_bytes: Count


class Embed(_Section):
    encoder: Name | None
    revision: Name | None
    windows: Count
    n_components: Count
    idf_power: Annotated[Float, Field(ge=0)]
    max_df: Annotated[Float, Field(gt=0, le=1)]
    min_df: Count
    fit_documents: Count


class Cluster(_Section):
    k: Count
    by: Literal["text", "label", "label+text"]
    balance: Literal["documents", "tokens", "none"]
    fit_documents: Count
    n_init: Count
    max_iterations: Count
    border_share: Annotated[Float, Field(ge=0, lt=1)]


class Model(_Section):
    pretrained: Name | None
    revision: Name | None
    preset: Literal[presets.NAMES] | None  # pyright: ignore[reportInvalidTypeForm]
    scratch: dict[str, Any]


class Train(_Section):
    seq_len: Annotated[int, Field(ge=2)]
    batch_size: Count
    steps: Count
    seed_share: Annotated[Float, Field(ge=0, lt=1)]
    seed_batch_size: Count
    dense: Literal["batch", "steps"]
    controls: list[Literal["dense-batch", "dense-steps", "random"]]
    lr: Positive
    schedule: Literal["linear", "cosine"]
    final_lr_ratio: Share
    warmup_ratio: Share
    betas: Annotated[list[Annotated[Float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
    weight_decay: Annotated[Float, Field(ge=0)]
    clip_norm: Positive
    max_loss_jump: Positive
    validation_share: Share
    validations: Annotated[int, Field(ge=0)]
    patience: Count | None
    micro_batch_size: Count | None
    recompute: bool | None
    precision: Literal["auto", "float32", "bf16"]
    compile: bool | None
    only: Literal["all", "feed-forward"]


class Route(_Section):
    window_tokens: Count
    routers: Annotated[list[RouterName], BeforeValidator(_list), Field(min_length=1)]
    top_k: Annotated[list[Count], BeforeValidator(_list), Field(min_length=1)]
    temperature: Annotated[list[Positive], BeforeValidator(_list), Field(min_length=1)]
    epsilon: Annotated[list[Share], BeforeValidator(_list), Field(min_length=1)]
    beta: Annotated[list[Annotated[Float, Field(ge=0)]], BeforeValidator(_list), Field(min_length=1)]
    hysteresis: Annotated[list[Annotated[Float, Field(ge=1)]], BeforeValidator(_list), Field(min_length=1)]
    fix_after: Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(_list)]
    calibration_share: Annotated[Float, Field(gt=0, lt=1)]


class Eval(_Section):
    max_document_tokens: Count | None
    stride: Count
    bootstrap: Count
    merge: bool
    tasks: Annotated[list[Name], BeforeValidator(_list)]


class Run(_Section):
    checkpoint_seconds: Annotated[Float, Field(gt=0, le=600)]  # nobody loses more than ten minutes
    log_seconds: Positive
    keep_replaced: bool
    sharded: bool | None
    wandb: str | None


class Config(_Section):
    outdir: str
    tags: Annotated[dict[TagKey, Any], AfterValidator(_tags)]
    seed: Annotated[int, Field(ge=0)]
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
    try:
        content = read_yaml.read(path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not YAML ({error}). Expected the keys of config.yaml. Mend the file."
        ) from error
    return validate(content)


def validate(content: Any) -> Config:
    """Return the typed config.

    Raises ValueError with a line for every wrong key: what was found, what was expected, what to do.
    """
    if not isinstance(content, Mapping):
        raise ValueError(
            f"config: {_show(content)}. Expected sections such as corpus and train. Start from config.yaml."
        )
    try:
        config = Config.model_validate(_with_later_keys(content))
    except ValidationError as error:
        raise ValueError("\n".join(dict.fromkeys(_explain(e) for e in error.errors()))) from None
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


def _with_later_keys(content: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the keys that the config.json of an older version does not have."""
    complete = {"tags": {}, **content}
    for (section, key), value in LATER_KEYS.items():
        if isinstance(complete.get(section), Mapping):
            complete[section] = {key: value, **complete[section]}
    return complete


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _keys(field.annotation, f"{prefix}{name}.")
    return keys


def _explain(error: Any) -> str:
    if error["type"] == "tag":
        return error["msg"]
    key = ".".join(
        str(part) for part in error["loc"] if not str(part).startswith(("function-", "list[", "constrained"))
    )
    found = _show(error["input"])
    if error["type"] == "extra_forbidden":
        known = _keys(Config)
        section, _, name = key.rpartition(".")
        siblings = [k for k in known if k.rpartition(".")[0] == section]
        near = [k for k in known if k.rpartition(".")[2] == name]
        near = near or difflib.get_close_matches(key, siblings, 1, 0.6)
        near = near or difflib.get_close_matches(key, known, 1, 0)
        return f"{key}: unknown key. Expected a key of config.yaml. Did you mean {near[0]}?"
    if error["type"] == "missing":
        return f"{key}: missing. Expected a value. Copy it from config.yaml."
    expected = error["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    if error["type"] == "too_short":
        expected = "at least one value"
    if error["type"] == "string_pattern_mismatch":
        expected = "a name, or null"
    return f"{key}: {found}. Expected {expected}. Change it in your config."


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def write(config: Config, path: str | Path) -> None:
    """Write the complete config as JSON, for the modules of a run to read."""
    artifact.write_json(path, config.model_dump())
