"""Merging at test time, beside the ensemble: the scores of documents under averaged experts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cbtm_pipeline.inference import document_scores, merging
from cbtm_pipeline.mixture.scored import Scored

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}


def write(folder: Path, rng_seed: int) -> Path:
    torch.manual_seed(rng_seed)
    config = AutoConfig.for_model("llama", vocab_size=50, max_position_embeddings=16, **SIZES)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def alone(folder: Path, document: np.ndarray) -> np.ndarray:
    """Scores of a document that fits the context."""
    net = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.from_numpy(document.astype(np.int64))[None]
    with torch.no_grad():
        logprob = net(ids[:, :-1]).logits[0].log_softmax(-1)
    return logprob.gather(1, ids[0, 1:, None])[:, 0].numpy()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("experts")
    return [write(root / str(j), j) for j in range(2)]


def test_prompts_are_a_quarter_of_a_document_and_at_most_32_tokens():
    assert merging.prefix(np.array([0, 3, 4, 100, 128, 1000])).tolist() == [0, 0, 1, 25, 32, 32]


def test_one_expert_alone_stays_itself_and_far_ones_have_a_spread(folders: list[Path]):
    merger, document = merging.Merger(folders), np.arange(12)
    assert merger.merge(np.array([0.0, 1.0])) == pytest.approx(0, abs=1e-3)
    np.testing.assert_allclose(
        document_scores.score(merger.net, document, 16, 8), alone(folders[1], document), atol=1e-5
    )
    assert merger.merge(np.array([0.5, 0.5])) > merging.FAR


def test_the_posterior_goes_to_who_predicts_a_document_and_is_averaged_over_documents():
    logprob_NK = np.log([[0.5, 0.1], [0.5, 0.1], [0.2, 0.2]])  # two documents, of two tokens and of one
    weight_K = merging.mean_posterior(logprob_NK, np.array([0, 2, 3]))
    np.testing.assert_allclose(weight_K, [(25 / 26 + 1 / 2) / 2, (1 / 26 + 1 / 2) / 2])


def test_long_documents_are_read_in_windows(folders: list[Path]):
    merger, document = merging.Merger(folders), np.random.default_rng(0).integers(0, 50, 41)
    merger.merge(np.array([1.0, 0.0]))
    scored = document_scores.score(merger.net, document, 16, 8)
    np.testing.assert_allclose(scored[:16], alone(folders[0], document[:17]), atol=1e-5)
    np.testing.assert_allclose(scored[-8:], alone(folders[0], document[-17:])[-8:], atol=1e-5)


def test_the_merged_model_stands_beside_the_ensemble(folders: list[Path], caplog):
    rng, lengths = np.random.default_rng(0), [12, 8]
    documents = [rng.integers(0, 50, n + 1) for n in lengths]
    offsets, names = np.array([0, 12, 20]), ["0", "1"]
    logprob = {
        name: np.concatenate([alone(f, d) for d in documents]) for name, f in zip(names, folders, strict=True)
    }
    logprob["dense"] = logprob["0"]
    d2_NK = np.tile(np.array([0, 90], np.float32), (20, 1))  # all weight on expert 0
    reported = Scored(logprob, d2_NK, offsets, np.ones(2), np.zeros(2, int), np.array(["a", "b"]))
    setting = {
        "router": "paper",
        "temperature": 0.1,
        "epsilon": None,
        "beta": None,
        "hysteresis": None,
        "fix_after": None,
    }
    row = {
        "system": "ensemble",
        "k": 2,
        "top_k": 2,
        "passes": 2.0,
        "calibrated": True,
        "headline": True,
        **setting,
    }
    metrics = {"matrix": {"experts": names}, "systems": [{**row, "calibration_nll": 1.0}]}
    found = merging.compare(metrics, reported, reported, documents, folders, 16, 8)
    merged, average, ensemble, dense = found["systems"]
    assert (merged["system"], ensemble["system"], dense["system"]) == ("merge", "paper all-2", "dense")
    expected = np.exp(-np.concatenate([logprob["0"][3:12], logprob["0"][14:]]).mean())
    assert merged["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert dense["perplexity"] == pytest.approx(expected, rel=1e-4)
    far = merging.Merger(folders)
    far.merge(merging.mean_posterior(np.stack([logprob["0"], logprob["1"]], 1), offsets))
    scored = [
        document_scores.score(far.net, d, 16, 8)[n // 4 :] for d, n in zip(documents, lengths, strict=True)
    ]
    assert average["perplexity"] == pytest.approx(np.exp(-np.concatenate(scored).mean()), rel=1e-4)
    assert found["n_tokens"] == 15 and found["effective"] == pytest.approx(1)
    assert merged["passes"] == pytest.approx(1 + 2 * 5 / 20)
