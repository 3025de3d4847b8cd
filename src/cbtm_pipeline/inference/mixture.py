"""An ensemble's folder as arrays and settings: mix what the experts have said of whole documents.

`cbtm score` and `cbtm route` let each expert read a text alone, in windows, and mix the log-probabilities, as
the evaluation of a run does. So a text may be longer than the context, and the numbers are those of the run.

Shapes: N tokens, K experts, V terms, D dimensions.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import first_sentence
from cbtm_pipeline.inference import package
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Setting

CONTEXT = 1024  # tokens, where nothing says how long the experts' context is
PARAMETERS = {"n_active": "top_k", "router_temperature": "temperature"}  # other names in `Setting`
# Keys that only the model has. With other values, what it says is not the mixture here.
PLAIN = {"mode": "ensemble", "route": "token", "hysteresis": 1.0, "fix_after": None, "exclude": []}


class Mixture(NamedTuple):
    """An ensemble. `names` are its experts, in the order of the rows of `centres_KD`."""

    folder: Path
    names: list[str]
    E_VD: np.ndarray
    centres_KD: np.ndarray
    setting: Setting
    separator_id: int
    context: int  # tokens that the experts were trained to see
    n_positions: int | None  # the most that they can see, where that is known
    terms: list[list[str]]  # what sets each expert apart; may be empty
    record: dict[str, Any]

    @property
    def needs_experts(self) -> bool:
        """Whether the weights depend on what the experts say."""
        return bool(ROUTERS[self.setting.router].parameters)


def read(folder: Path, weights: bool = True, **settings: Any) -> Mixture:
    """Read and verify a folder. `settings` replace keys of its config.

    Without `weights`, those of the experts are not verified: who reads them does that. Raises ValueError if a
    file is missing or damaged, or if its config asks for more than mixing.
    """
    from cbtm_pipeline.inference.modeling_cbtm import CBTMConfig

    record = package.verify(folder, lambda name: weights or not name.endswith("/model.safetensors"))
    path = folder / package.CONFIG
    try:
        config = CBTMConfig(**{**artifact.read_json(path), **settings})
        tensors = load_file(folder / "router.safetensors")
        excluded = config.excluded()
        rows = [row for row, name in enumerate(config.experts) if name not in excluded]
        setting = _setting(path, config, len(rows))
        names = [config.experts[row] for row in rows]
        terms = artifact.read_sealed(folder / package.TERMS, "top_terms")["top_terms"]
        return Mixture(
            folder,
            names,
            tensors["embedding"],
            tensors["centres"][rows],
            setting,
            int(config.bos_token_id),  # pyright: ignore[reportArgumentType]
            _context(folder / "experts" / names[0], config),
            getattr(config, "max_position_embeddings", None),
            [terms[row] for row in rows],
            record,
        )
    except (KeyError, TypeError, IndexError, SafetensorError) as error:
        found = f"{folder}: not the ensemble of a run ({first_sentence(error)})"
        raise ValueError(f"{found}. Expected a folder that a run has made. Make it again.") from error


def _setting(path: Path, config: Any, k: int) -> Setting:
    """The mixture that the config describes, for k experts."""
    for key, plain in PLAIN.items():
        value = getattr(config, key)
        if key not in (*Setting._fields, "exclude") and value != plain:
            todo = "Use cbtm generate, which runs the model itself"
            raise ValueError(f"{path}: {key} {value!r}. Expected {plain!r}. {todo}.")
    own = {PARAMETERS.get(key, key): getattr(config, key) for key in vars(config)}
    if (router := own["router"]) not in ROUTERS:
        raise ValueError(f"{path}: router {router!r}. Expected {' or '.join(ROUTERS)}. Change it.")
    values = {name: own[name] for name in Setting._fields}
    return Setting(**{**values, "top_k": min(values["top_k"] or k, k)})


def _context(expert: Path, config: Any) -> int:
    """The length of the sequences that an expert was trained on, else its number of positions."""
    card = expert / "card.json"
    if card.exists():
        return artifact.read_sealed(card, "expert")["made_with"]["seq_len"]
    return getattr(config, "max_position_embeddings", None) or CONTEXT


def log_weights(mixture: Mixture, held_out: HeldOut) -> np.ndarray:
    """The weights of the experts before each token (natural logarithms, (N, K) float64)."""
    return ROUTERS[mixture.setting.router].log_weights(held_out, mixture.setting)


def terms_that_decide(
    mixture: Mixture, ids_N: np.ndarray, cluster: int, other: int
) -> list[tuple[int, int, float, float]]:
    """What each term of a text takes off its squared distance to two centres.

    The distance is d2_j = |h|^2 + |c_j|^2 - 2 h c_j, where h = s / |s| and s is the sum of the terms' vectors
    (embedding/tfidf.py). So a term that occurs n times takes 2 n E_v c_j / |s| off it. Returns rows of term
    id, count, and that share for both centres. The first rows speak most for the first centre.
    """
    terms_U, n_U = np.unique(ids_N, return_counts=True)
    E_UD = mixture.E_VD[terms_U].astype(np.float64)
    length = np.linalg.norm(n_U @ E_UD)
    if not length:
        return []
    share_U2 = 2 * n_U[:, None] * (E_UD @ mixture.centres_KD[[cluster, other]].T) / length
    order = np.argsort(share_U2[:, 1] - share_U2[:, 0], kind="stable")
    return [
        (int(terms_U[u]), int(n_U[u]), float(share_U2[u, 0]), float(share_U2[u, 1]))
        for u in order
        if E_UD[u].any()
    ]
