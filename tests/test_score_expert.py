import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import damaged
import made_training as made
from cbtm_pipeline import config, score_expert
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import heldout, token_files
from cbtm_pipeline.corpus.windows import windows
from cbtm_pipeline.training import model
from cbtm_pipeline.training.scoring import batched, cut, logprobs, score
from resealed import change_json

CONTEXT, STRIDE = made.SEQ_LEN, 16


@pytest.mark.parametrize(
    ("n_tokens", "context", "stride", "expected"),
    [
        (0, 4, 2, []),
        (1, 4, 2, [(0, 0, 1)]),
        (4, 4, 2, [(0, 0, 4)]),
        (5, 4, 2, [(0, 0, 4), (1, 4, 5)]),
        (10, 4, 2, [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]),
        (10, 4, 4, [(0, 0, 4), (4, 4, 8), (6, 8, 10)]),
        (6, 4, 1, [(0, 0, 4), (1, 4, 5), (2, 5, 6)]),
    ],
)
def test_windows(n_tokens, context, stride, expected):
    assert list(windows(n_tokens, context, stride)) == expected


@given(n_tokens=st.integers(0, 200), context=st.integers(1, 40), data=st.data())
@settings(max_examples=100, deadline=None)
def test_every_token_once_with_its_context(n_tokens, context, data):
    stride = data.draw(st.integers(1, context))
    scored = []
    for start, first, stop in windows(n_tokens, context, stride):
        assert stop - start <= context
        for t in range(first, stop):
            assert t - start + 1 >= min(t + 1, context - stride + 1)
            scored.append(t)
    assert scored == list(range(n_tokens))


def test_batches_hold_every_window_and_no_more_tokens_than_allowed():
    documents = [np.arange(n) for n in (5, 1, 90, 33, 2, 41)]
    found = list(cut(documents, CONTEXT, STRIDE))
    batches = list(batched(found, 70))
    assert sorted(w.rows.start for batch in batches for w in batch) == sorted(w.rows.start for w in found)
    assert all(len(batch) * (len(batch[0].tokens) - 1) <= 70 for batch in batches)
    assert [len(batch[0].tokens) for batch in batches] == sorted(
        (len(batch[0].tokens) for batch in batches), reverse=True
    )
    assert [len(batch) for batch in batched(found, 1)] == [1] * len(found)


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A corpus, and a seed model that is better than a guess."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("scoring")
    made.write_corpus(out)
    cfg = made.make_config(steps=100)
    config.write(cfg, out / "config.json")
    made.train(cfg, made.files(out, "seed"), "seed")
    return out


@pytest.fixture(scope="module")
def net(outdir):
    return model.load(outdir / "experts/seed").eval()


@pytest.fixture(scope="module")
def documents(outdir) -> list[np.ndarray]:
    manifest = artifact.read_sealed(outdir / "shards/manifest.json", "shards")
    return [document for _, document in heldout.documents(outdir / "shards", manifest, None)]


def alone(net, document: np.ndarray) -> np.ndarray:
    """Log-probabilities of a document that fits the context, by the definition."""
    ids = torch.from_numpy(document.astype(np.int64))
    with torch.no_grad():
        logits = net(input_ids=ids[None, :-1]).logits[0]
    return torch.log_softmax(logits, 1)[torch.arange(len(ids) - 1), ids[1:]].numpy()


def test_short_documents_equal_the_definition(net, documents):
    short = [document for document in documents if len(document) <= CONTEXT + 1]
    assert len(short) >= 3
    expected = np.concatenate([alone(net, document) for document in short])
    assert np.abs(score(net, short, CONTEXT, STRIDE) - expected).max() < 1e-5
    assert expected.mean() > -np.log(300) + 0.1  # better than a guess, so a shift by one token would show


def test_long_documents_equal_the_definition_window_by_window(net, documents):
    document = max(documents, key=len)
    n = len(document) - 1
    assert n > 2 * CONTEXT
    expected = np.empty(n, np.float32)
    for t in range(n):
        end = min(CONTEXT, n) if t < CONTEXT else min(n, CONTEXT + STRIDE * (-(-(t + 1 - CONTEXT) // STRIDE)))
        start = max(0, end - CONTEXT)
        expected[t] = alone(net, document[start : t + 2])[-1]
    assert np.abs(score(net, [document], CONTEXT, STRIDE) - expected).max() < 1e-5


@pytest.mark.parametrize("batch_tokens", [1, 50, 100_000])
def test_independent_of_the_batch_size(net, documents, batch_tokens):
    found = score(net, documents, CONTEXT, STRIDE, batch_tokens)
    assert np.isfinite(found).all()
    assert np.abs(found - score(net, documents, CONTEXT, STRIDE)).max() < 1e-5


def test_rows_follow_the_documents(net, documents):
    together = score(net, documents, CONTEXT, STRIDE)
    apart = np.concatenate([score(net, [document], CONTEXT, STRIDE) for document in documents])
    assert np.abs(together - apart).max() < 1e-5
    assert len(score(net, [np.array([0])], CONTEXT, STRIDE)) == 0  # a document of no tokens has no rows


def test_no_token_sees_itself_or_later_ones(net):
    rng = np.random.default_rng(0)
    document = np.r_[0, rng.integers(1, 300, CONTEXT)]
    (before,) = logprobs(net, list(cut([document], CONTEXT, STRIDE)))
    for t in (1, 7, CONTEXT):
        changed = document.copy()
        changed[t] = changed[t] % 299 + 1
        (after,) = logprobs(net, list(cut([changed], CONTEXT, STRIDE)))
        assert (after[: t - 1] == before[: t - 1]).all()
        assert after[t - 1] != before[t - 1]
        # not even its own identity: the whole row of logits that predicts token t is the same
        rows = [net(input_ids=torch.from_numpy(d[None, :-1])).logits[0, t - 1] for d in (document, changed)]
        assert torch.equal(rows[0], rows[1])


def test_published_folder_loads_in_transformers_and_scores_the_same(outdir, net, documents):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = outdir / "experts/seed"
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == made.VOCAB_SIZE
    assert tokenizer("w5 w7 w299")["input_ids"] == [5, 7, 299]
    document = next(d for d in documents if 10 < len(d) <= CONTEXT + 1)
    ids = torch.from_numpy(document.astype(np.int64))[None]
    loss = theirs(input_ids=ids, labels=ids).loss.item()
    assert abs(loss + score(net, [document], CONTEXT, STRIDE).mean()) < 1e-5


def run(
    outdir: Path, out: str = "scores/seed.npz", weights: str = "experts/seed/model.safetensors"
) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "cbtm_pipeline.score_expert",
        "--config",
        "config.json",
        "--expert-weights",
        weights,
    ]
    command += ["--shards", "shards/manifest.json", "--out", out, "--threads", "1"]
    return subprocess.run(
        command, cwd=outdir, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_command_line(outdir, net, documents):
    done = run(outdir)
    assert done.returncode == 0, done.stderr
    arrays, meta = artifact.read_npz(outdir / "scores/seed.npz", "scores")
    assert arrays["logprob_N"].dtype == np.float32
    assert np.abs(arrays["logprob_N"] - score(net, documents, CONTEXT, STRIDE)).max() < 1e-5
    card = json.loads((outdir / "experts/seed/card.json").read_text())
    held_out = artifact.read_sealed(outdir / "shards/manifest.json", "shards")["identity_eval"]
    assert meta["made_from"] == {"expert": card["identity"], "held_out": held_out}
    assert meta["expert"] == "seed"
    assert meta["made_with"] == {"context": CONTEXT, "stride": STRIDE, "max_document_tokens": None}


def main(monkeypatch, outdir: Path) -> None:
    monkeypatch.chdir(outdir)
    monkeypatch.setattr(score_expert.cli, "start_logging", lambda *args: None)
    argv = "score_expert --config config.json --expert-weights experts/seed/model.safetensors"
    argv += " --shards shards/manifest.json --out x.npz"
    monkeypatch.setattr(sys, "argv", argv.split())
    score_expert.main()


def refused(monkeypatch, outdir: Path, message: str) -> None:
    """Check that the rule ends with this message, and writes nothing."""
    with pytest.raises(ValueError, match=message):
        main(monkeypatch, outdir)
    assert not (outdir / "x.npz").exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("experts/seed/model.safetensors", r"model\.safetensors: another file than it was"),
        ("experts/seed/card.json", r"card\.json: changed since it was written"),
        ("experts/seed/files.json", r"files\.json: changed since it was written"),
        ("experts/seed/generation_config.json", r"generation_config\.json: another file than it was"),
        ("experts/seed/tokenizer.json", r"tokenizer\.json: another file than it was"),
        ("experts/seed/tokenizer_config.json", r"tokenizer_config\.json: another file than it was"),
        ("experts/seed/metrics.jsonl", r"metrics\.jsonl: another file than it was"),
        ("shards/manifest.json", r"manifest\.json: changed since it was written"),
    ],
)
def test_a_file_with_one_more_byte_is_refused(outdir, monkeypatch, path, message):
    with damaged.replaced(outdir / path, (outdir / path).read_bytes() + b"\n"):
        refused(monkeypatch, outdir, message)


def test_a_changed_setting_of_the_model_is_refused(outdir, monkeypatch):
    path = outdir / "experts/seed/config.json"
    content = json.loads(path.read_text())
    changed = json.dumps(content | {"rms_norm_eps": 2 * content["rms_norm_eps"]}).encode()
    with damaged.replaced(path, changed):
        refused(monkeypatch, outdir, r"experts/seed/config\.json: another file than it was")


def test_a_flipped_bit_of_a_held_out_token_is_refused(outdir, monkeypatch, documents):
    path = outdir / "shards/eval-00000.arrow"
    content, tokens = path.read_bytes(), np.concatenate(documents).tobytes()
    at = content.index(tokens) + len(tokens) // 2
    with damaged.replaced(path, damaged.flipped(content, at)):
        refused(monkeypatch, outdir, r"eval-00000\.arrow: group 0 is not the one that its manifest speaks of")


@pytest.fixture
def copy(outdir, tmp_path) -> Path:
    """A copy of the run, to change."""
    return shutil.copytree(outdir, tmp_path / "run")


def test_held_out_text_of_another_tokenizer_is_refused(copy, monkeypatch):
    manifest = artifact.read_sealed(copy / "shards/manifest.json", "shards")
    change_json(copy / "shards/manifest.json", made_from={**manifest["made_from"], "tokenizer": "0" * 32})
    refused(monkeypatch, copy, r"model\.safetensors: made from another tokenizer")


def test_a_model_of_another_training_text_is_refused(copy, monkeypatch):
    """Its training text may have what is held out here."""
    train = {"train-00000": made.documents(50, np.random.default_rng(1))}
    made.write_shards(copy, train, n_held_out=12)
    refused(monkeypatch, copy, r"model\.safetensors: made from another tokens")


def test_new_held_out_text_is_scored(copy, monkeypatch):
    train = {
        name: token_files.read_unverified(copy / f"shards/{name}.arrow", 0)
        for name in ("train-00000", "train-00001")
    }
    new = made.write_shards(copy, train, n_held_out=5)
    main(monkeypatch, copy)
    arrays, meta = artifact.read_npz(copy / "x.npz", "scores")
    assert meta["made_from"]["held_out"] == new["identity_eval"]
    assert len(arrays["logprob_N"]) == new["shards"][-1]["n_tokens"]


def test_a_model_that_diverged_is_refused(outdir, monkeypatch):
    monkeypatch.setattr(score_expert, "score", lambda *args: np.array([-1, np.nan], np.float32))
    with pytest.raises(ValueError, match="are not finite"):
        main(monkeypatch, outdir)
