"""The folder of an ensemble, loaded: the model, its tokenizer, and what sets its experts apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact, hub
from cbtm_pipeline.base.cli import log
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.base.lean import lean_imports
from cbtm_pipeline.inference import package
from cbtm_pipeline.provenance import records

TERMS = "top_terms.json"


@dataclass(frozen=True)
class Ensemble:
    """An ensemble that is ready. `n_context` tokens can be seen; None: no bound is known.

    `separator` begins every text, any of `ends` ends an answer. `terms` set each expert apart; they may be
    empty. `fingerprint` changes with the folder's content.
    """

    name: str
    model: Any
    tokenizer: Any
    n_context: int | None
    separator: int | None
    ends: frozenset[int]
    terms: dict[str, list[str]]
    fingerprint: str | None


def check(folder: Path) -> None:
    """Raise ValueError unless this is the whole folder of an ensemble."""
    path = folder / "config.json"
    if not path.is_file():
        todo = "Name a folder that has one, or make it with a run."
        raise ValueError(f"{folder}: no ensemble. Expected config.json and experts/ in it. {todo}")
    found = artifact.read_json(path)
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != "cbtm":
        todo = "Name the folder of an ensemble, not of one expert."
        raise ValueError(f"{path}: model_type {kind!r}. Expected 'cbtm'. {todo}")
    if lacking := hub.lacks_tokenizer(folder):
        raise ValueError(f"{folder / lacking[0]}: missing. Expected a tokenizer there. {package.AGAIN}")


def load(
    folder: Path, name: str, outdir: Path | None = None, at_once: bool = True, **settings: Any
) -> Ensemble:
    """Load and verify the folder. Without `at_once`, experts load when they first run.

    `settings` replace keys of its config. Terms may also lie in the run's `outdir`. Raises ValueError if the
    folder is not whole.
    """
    check(folder)
    fingerprint = None
    if (folder / package.FILES).exists():
        fingerprint = f"cbtm-{package.verify(folder)['seal'][:12]}"
    else:
        log.warning("%s: no %s, so its files cannot be verified", folder, package.FILES)
    if settings:
        _check_settings(folder, settings)
    try:
        with lean_imports():
            model, tokenizer = _load(folder, at_once, settings)
    except Exception as error:  # damage has many types
        found = f"{folder}: cannot be loaded ({first_sentence(error)})"
        raise ValueError(f"{found}. Expected an ensemble's folder. Export it again.") from error
    ends = model.generation_config.eos_token_id
    return Ensemble(
        name,
        model,
        tokenizer,
        getattr(model.config, "max_position_embeddings", None),
        model.config.bos_token_id,
        frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends),
        _terms(model, [folder / TERMS, *([records.clusters(outdir)[1]] if outdir else [])]),
        fingerprint,
    )


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raise ValueError for settings that the ensemble cannot run with: they are the user's."""
    with lean_imports():
        from cbtm_pipeline.inference.modeling_cbtm import CBTMConfig

        CBTMConfig(**{**artifact.read_json(folder / package.CONFIG), **settings})


def _load(folder: Path, at_once: bool, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The model on the best devices, and its tokenizer. Only code of this package is run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cbtm_pipeline.inference import modeling_cbtm  # noqa: F401, registers the model

    model = hub.load(AutoModelForCausalLM, folder, device_map="auto", **settings)
    for j in range(len(model.names) if at_once and model.config.max_loaded is None else 0):
        model.expert(j)  # else the first requests would wait for it
    return model, hub.load(AutoTokenizer, folder)


def _terms(model: Any, paths: list[Path]) -> dict[str, list[str]]:
    """What sets the experts apart, by name, from the first of the files that is about these experts."""
    for path in paths:
        if path.exists():
            rows = artifact.read_sealed(path, "top_terms")["top_terms"]
            if len(rows) == len(model.config.experts):
                found = dict(zip(model.config.experts, rows, strict=True))
                return {name: [term.strip() for term in found[name]] for name in model.names}
    return {}
