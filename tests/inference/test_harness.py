"""lm-evaluation-harness: its stock `hf` model reads the ensemble's folder, and agrees with the pipeline."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import token_files
from cbtm_pipeline.inference import package
from cbtm_pipeline.mixture import ensemble

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # of the harness and what it imports
]
SETTINGS: dict[str, Any] = {
    **{"router": "filter", "n_active": 1, "router_temperature": 0.1},
    **{"epsilon": 0.05, "beta": 0.5},
}
N_DOCUMENTS = 6


class Scored:
    """The first held-out documents of a run, and what the pipeline says of them, cut to one context."""

    def __init__(self, results: Path):
        config = json.loads((results / "config.json").read_text())
        context, k = config["train"]["seq_len"], config["cluster"]["k"]
        distances = artifact.read_npz(results / "route/distances.npz", "distances")[0]
        logprob_NK = np.stack(
            [artifact.read_npz(results / f"scores/{j}.npz", "scores")[0]["logprob_N"] for j in range(k)], 1
        )
        names = [path.name for path in sorted((results / "shards").glob("eval-*.arrow"))]
        documents = token_files.read_unverified(results / "shards" / names[0], 0)
        self.texts, self.logprob, self.d2 = [], [], []
        for i in range(N_DOCUMENTS):
            rows = slice(
                distances["offsets"][i], min(distances["offsets"][i + 1], distances["offsets"][i] + context)
            )
            n_tokens = rows.stop - rows.start
            begin = documents.offsets[i]
            self.texts.append(documents.values[begin : begin + 1 + n_tokens].tolist())  # separator first
            self.logprob.append(logprob_NK[rows])
            self.d2.append(distances["d2_NK"][rows])

    def mixed(self, n_active: int) -> list[float]:
        """Mean log-probability of a token of each document under the mixture."""
        found = []
        for logprob_TK, d2_TK in zip(self.logprob, self.d2, strict=True):
            offsets = np.array([0, len(d2_TK)])
            temperature, epsilon, beta = (SETTINGS[key] for key in ("router_temperature", "epsilon", "beta"))
            logw_TK = ensemble.filter_log_weights(
                logprob_TK, d2_TK, offsets, temperature, epsilon, beta, n_active
            )
            found.append(float(ensemble.mix(logprob_TK, logw_TK).mean()))
        return found


def harness(folder: Path, texts: list[list[int]], batch_size: int) -> list[float]:
    """Mean log-probability of a token of each text after its separator, from the harness."""
    huggingface: Any = pytest.importorskip("lm_eval.models.huggingface")
    settings: dict[str, Any] = {"trust_remote_code": True, "device": "cpu", "dtype": "float32"}
    lm = huggingface.HFLM(pretrained=str(folder), batch_size=batch_size, **settings)
    requests = [(("", str(i)), text[:1], text[1:]) for i, text in enumerate(texts)]
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    return [total / (len(text) - 1) for (total, _), text in zip(found, texts, strict=True)]


@pytest.fixture(scope="module")
def scored(finished: Path) -> Scored:
    return Scored(finished / "results")


@pytest.mark.parametrize("n_active", [1, 2])
def test_the_harness_says_of_the_ensemble_what_the_pipeline_says(
    finished: Path, scored: Scored, n_active: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    results = finished / "results"
    embedder = artifact.read_npz(results / "embed/embedder.npz", "embedder")[0]
    clusterer = artifact.read_npz(results / "cluster/clusterer.npz", "clusterer")[0]
    card = artifact.read_sealed(results / "tokenizer/card.json", "tokenizer")
    experts = {str(j): results / f"experts/{j}" for j in range(len(clusterer["centres_KD"]))}
    about = (results / "tokenizer", card["separator_id"], card["vocab_size"])
    settings = {**SETTINGS, "n_active": n_active}
    parts = package.Parts(
        embedder["E_VD"], clusterer["centres_KD"], experts, *about, settings, "Made for a test."
    )
    package.write(parts, tmp_path / "ensemble/files.json", artifact.make_meta("ensemble", {}))
    for batch_size in (1, 4):
        found = harness(tmp_path / "ensemble", scored.texts, batch_size)
        np.testing.assert_allclose(found, scored.mixed(n_active), rtol=0, atol=1e-5)
        assert np.abs(np.subtract(found, scored.mixed(3 - n_active))).max() > 1e-4


def test_the_harness_says_of_an_expert_what_the_pipeline_says(finished: Path, scored: Scored) -> None:
    found = harness(finished / "results/experts/1", scored.texts, 4)
    expected = [logprob_TK[:, 1].mean() for logprob_TK in scored.logprob]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
