"""tokenizer_config.json beside a model: what other programs read of the tokenizer.

The tokenizer itself, tokenizer.json, stays as it is: its hash is what everything was made from.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

NAME = "tokenizer_config.json"
_STRETCH = ("yarn", "dynamic")  # kinds of scaled positions; of the others, the configuration names the number


def for_model(content: dict[str, Any], n_positions: int | None, padding: str | None = None) -> dict[str, Any]:
    """The content of the file beside a model of `n_positions` positions (None: the model has no limit).

    `padding` is the token that replaces the padding token, where the model has no row for that.

    `model_max_length` is at most the number of positions, so that programs warn of longer texts. Padding is
    on the left, where `generate` wants it, unless the tokenizer says otherwise.
    """
    longest = content.get("model_max_length")
    limits = [n for n in (longest, n_positions) if n is not None]
    more = {"model_max_length": min(limits)} if limits else {}
    more |= {"pad_token": padding} if padding is not None else {}
    return {"padding_side": "left", **content, **more}


def write(folder: Path, n_positions: int | None, n_rows: int, separator_id: int) -> None:
    """Write the file in a model's folder anew, if it is there.

    `n_rows` are those of the model's embedding. A tokenizer may have a padding token beyond them.
    """
    path, found = folder / NAME, padding_id(folder)
    if path.exists():
        padding = None
        if found is not None and found >= n_rows:
            padding = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).id_to_token(separator_id)
        content = for_model(json.loads(path.read_text("utf-8")), n_positions, padding)
        path.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def n_positions(config: Any) -> int | None:
    """How many tokens a model can read, by its configuration (an object or the content of config.json).

    Where YaRN or dynamic scaling stretches the positions, the configuration may name their number before it.
    """
    names = ("max_position_embeddings", "n_positions")
    read = config.get if isinstance(config, dict) else lambda name: getattr(config, name, None)
    n = next((value for name in names if isinstance(value := read(name), int)), None)
    scaling = read("rope_parameters") or read("rope_scaling")
    if n is None or not isinstance(scaling, dict):
        return n
    if scaling.get("rope_type", scaling.get("type")) not in _STRETCH:
        return n
    return max(n, int((scaling.get("original_max_position_embeddings") or n) * (scaling.get("factor") or 1)))


def padding_id(folder: Path) -> int | None:
    """The id of the padding token that a folder's tokenizer names; None if it names none."""
    path, vocabulary = folder / NAME, folder / "tokenizer.json"
    if not path.exists() or not vocabulary.exists():
        return None
    token = json.loads(path.read_text("utf-8")).get("pad_token")
    content = token.get("content") if isinstance(token, dict) else token
    if content is None:
        return None
    return tokenizers.Tokenizer.from_file(str(vocabulary)).token_to_id(content)
