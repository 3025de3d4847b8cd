"""Whether a model that somebody has made or trained on can stand for an expert of an ensemble.

Everything is looked at before anything is written: the files, the tokenizer, the sizes, and the model itself,
which is loaded once and run on a few tokens.
"""

import json
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import tokenizer_config
from cbtm_pipeline.inference import changed_set, package
from cbtm_pipeline.provenance import expert_files

Record = dict[str, Any]
TOKENIZER = "tokenizer.json"
PARTS = {  # of tokenizer.json that decide which ids a text gets; what it adds around or cuts off does not
    "model": "vocabulary or merges",
    "normalizer": "normaliser",
    "pre_tokenizer": "pre-tokenizer",
    "added_tokens": "added tokens",
}


def check(folder: Path, found: changed_set.Set) -> Record:
    """The card of the expert in a folder. Raises ValueError unless it fits into the set, and runs.

    A model that was not trained by a run gets the card that is written later.
    """
    for name in (package.CONFIG, expert_files.WEIGHTS):
        if not (folder / name).is_file():
            raise ValueError(
                f"{folder}: no {name}. Expected the folder of an expert. Give another, or save the model "
                "in one file."
            )
    _check_sizes(folder, found)
    card = changed_set.read_card(folder)
    if card:
        _check_card(folder, card)
    _check_tokenizer(folder, card, found)
    n_parameters = _check_model(folder, found)
    return card or _new_card(folder, changed_set.tokenizer_of(found), n_parameters)


def _check_card(folder: Path, card: Record) -> None:
    """Raise ValueError unless weights and config are those that the card speaks of."""
    advice = f"Remove {changed_set.CARD} from a model that you have trained on."
    artifact.check_file(folder / expert_files.WEIGHTS, card["weights"], advice)
    identity = artifact.fingerprint([card["weights"], artifact.identity(folder / package.CONFIG)])
    if identity != card["identity"]:
        expected = f"Expected that of {changed_set.CARD}"
        raise ValueError(f"{folder / package.CONFIG}: another file than it was. {expected}. {advice}")


def _check_tokenizer(folder: Path, card: Record, found: changed_set.Set) -> None:
    """Raise ValueError unless the folder's tokenizer gives each text the ids that the ensemble's gives.

    Its bytes may differ: programs that save a tokenizer write the same one in other words.
    """
    expected, own = changed_set.tokenizer_of(found), folder / TOKENIZER
    if not own.exists():
        if card.get("made_from", {}).get("tokenizer") == expected:
            return
        raise ValueError(
            f"{folder}: {'another' if card else 'no'} tokenizer. Expected that of {found.folder}. Save "
            f"{TOKENIZER} there, too, if the model was trained with it."
        )
    if artifact.identity(own) == expected:
        return
    a, b = _tokenizer(own), _tokenizer(found.folder / TOKENIZER)
    if other := [what for part, what in PARTS.items() if a.get(part) != b.get(part)]:
        raise ValueError(
            f"{folder}: another tokenizer (other {', '.join(other)}). Expected that of {found.folder}. Give "
            "an expert that was trained with it."
        )


def _tokenizer(path: Path) -> Record:
    """The content of tokenizer.json as the library writes it. Raises ValueError if it is none."""
    from tokenizers import Tokenizer

    try:
        content = json.loads(Tokenizer.from_file(str(path)).to_str())
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"{path}: not a tokenizer ({error}). Expected {TOKENIZER}. Save it again."
        ) from error
    content["model"].pop("dropout", None)  # of its training only
    return content


def _check_sizes(folder: Path, found: changed_set.Set) -> None:
    """Raise ValueError for another vocabulary than the other experts', or a shorter context."""
    config = artifact.read_json(folder / package.CONFIG)
    first = artifact.read_json(found.folder / "experts" / found.names[0] / package.CONFIG)
    own, expected = config.get("vocab_size"), first.get("vocab_size")
    if own != expected:
        raise ValueError(
            f"{folder}: a vocabulary of {own} tokens. Expected {expected}, as the other experts have. Give "
            "another expert."
        )
    own, expected = tokenizer_config.n_positions(config), tokenizer_config.n_positions(found.config)
    if own is not None and expected is not None and own < expected:
        raise ValueError(
            f"{folder}: a context of {own} tokens. Expected {expected} or more, as the other experts have. "
            "Give another expert."
        )


def _check_model(folder: Path, found: changed_set.Set) -> int:
    """Load the model and let it read a few tokens. Returns its number of parameters.

    Raises ValueError if it cannot be loaded or does not run, if config and weights do not fit, or if a number
    is not finite.
    """
    from cbtm_pipeline.training import model  # imports torch

    net = model.load(folder, whole=True)
    n_positions = tokenizer_config.n_positions(found.config)
    model.check_runs(net, str(folder), found.config["vocab_size"], n_positions or 8)
    return model.n_parameters(net)


def _new_card(folder: Path, tokenizer: str, n_parameters: int) -> Record:
    """The card of a model that has none: what its files say."""
    weights, config = folder / expert_files.WEIGHTS, artifact.read_json(folder / package.CONFIG)
    about = {"expert": folder.name, "weights": artifact.identity(weights), "n_parameters": n_parameters}
    about["identity"] = artifact.fingerprint([about["weights"], artifact.identity(folder / package.CONFIG)])
    context = tokenizer_config.n_positions(config)
    made_with = {"seq_len": context} if context else {}
    return artifact.make_meta("expert", {"tokenizer": tokenizer}, made_with, **about)
