"""What a run costs: the numbers agree with what the plan, Snakemake and the model itself say."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cbtm_pipeline import plan
from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.ops import cost
from cbtm_pipeline.training import checkpoint, model
from cbtm_pipeline.training import step as train_step
from cbtm_pipeline.training.training_log import PEAK_FLOPS
from made_project import make_project, snakemake
from made_run import make_config

LLAMA = make_config().model.scratch
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4}


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(1, 50),
    st.sampled_from([0.0, 0.25, 0.5]),
    st.booleans(),
)
def test_tokens_of_the_plan(k: int, batch_size: int, steps: int, seed_share: float, random: bool) -> None:
    controls = ["dense-steps", *(["random"] if random else [])]
    train = {"batch_size": batch_size, "steps": steps, "seed_share": seed_share, "controls": controls}
    config = make_config(cluster={"k": k}, train=train)
    tokens = cost.n_tokens(config)
    assert list(tokens) == ["seed", *plan.experts(config)]
    assert tokens["dense"] == steps * batch_size * config.train.seq_len
    assert tokens["dense-steps"] == k * tokens["0"]
    assert seed_share > 0 or tokens["seed"] == 0
    assert ("seed" in cost.batches(config)) == (tokens["seed"] > 0)


@pytest.mark.parametrize(
    "train",
    [
        {"controls": []},
        {"controls": ["random", "dense-steps"]},
        {"controls": ["dense-large"], "lr": [0.1, 0.2]},
    ],
)
def test_jobs_are_those_of_snakemake(tmp_path: Path, train: dict[str, Any]) -> None:
    folder = make_project(tmp_path, cluster={"k": 3}, train=train)
    printed = snakemake(folder, "-n", "--cores", "1")
    stats = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", printed, re.M)}
    config = make_config(cluster={"k": 3}, train=train, corpus={"train": ["corpus.jsonl"]})
    assert cost.n_jobs(config) == {rule: n for rule, n in stats.items() if rule not in ("all", "total")}
    assert cost.n_jobs(make_config())["demo_corpus"] == 1


@pytest.mark.parametrize("scratch", [LLAMA, {**LLAMA, "tie_word_embeddings": False}, GPT2])
def test_size_is_that_of_the_model(scratch: dict[str, Any], tmp_path: Path) -> None:
    config = make_config(
        model={"scratch": scratch}, tokenizer={"vocab_size": 300}, train={"seq_len": 32}, eval={"stride": 16}
    )
    net = model.scratch(scratch, 300, 0, 32, 0)
    expected = cost.Size(model.n_parameters(net), model.flops_per_token(net, 32), 300)
    assert cost.size(config, None) == expected
    net.save_pretrained(tmp_path)
    assert cost.size(make_config(train={"seq_len": 32}, eval={"stride": 16}), tmp_path) == expected
    with pytest.raises(
        ValueError, match=r"^train.seq_len: 256\. Expected at most 32, .*\. Lower train.seq_len\.$"
    ):
        cost.size(make_config(), tmp_path)


@pytest.mark.parametrize(
    ("scratch", "message"),
    [
        ({**LLAMA, "hiden_size": 3}, "model.scratch.hiden_size: unknown key"),
        ({**LLAMA, "num_attention_heads": 5}, "model.scratch: no llama model"),
        ({**LLAMA, "max_position_embeddings": 8}, "model.scratch: 8 positions"),
        ({"model_type": "bert-base"}, "model.scratch.model_type: bert-base"),
    ],
)
def test_a_model_that_the_training_would_refuse_is_refused(scratch: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cost.size(make_config(model={"scratch": scratch}), None)


def test_a_saved_state_has_the_reckoned_size(tmp_path: Path) -> None:
    config = make_config()
    net = model.scratch(LLAMA, config.tokenizer.vocab_size, 0, config.train.seq_len, 0)
    optimizer = train_step.make_optimizer(net, plan.train_expert(config, "0"))
    for parameter in net.parameters():
        parameter.grad = parameter.detach().clone()
    optimizer.step()
    checkpoint.save(tmp_path, 1, "f" * 32, checkpoint.capture(net, optimizer))
    n_bytes = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert n_bytes == pytest.approx(cost.STATE_BYTES * cost.size(config, None).n_parameters, rel=0.02)


def test_a_search_and_dense_large_cost_what_they_are() -> None:
    size = cost.Size(10**9, 6 * 10**9, 50_000)
    one, searched = make_config(), make_config(train={"lr": [0.1, 0.2, 0.4]})
    assert sum(cost.n_tokens(searched).values()) == 3 * sum(cost.n_tokens(one).values())
    assert "seed 1.64 M x 3 rates" in cost.table(searched, [], size, None)
    large = make_config(train={"controls": ["dense-large"]})
    tokens, text = cost.n_tokens(large), cost.TextBytes(7e9, 3e9)
    assert tokens["dense-large"] == tokens["seed"] + large.cluster.k * tokens["0"]
    table = cost.table(large, [], size, None)
    assert "dense-large at most 3.28 M" in table and "at most twice that for dense-large" in table
    weights = [
        cost.disk(c, size, text, 100, 1)["weights"]
        for c in (large, make_config(train={"controls": []}), one, searched)
    ]
    assert weights[0] - weights[1] == 2 * 4e9, "it has twice the layers"
    assert weights[3] == 3 * weights[2]


def test_a_second_round_scores_documents() -> None:
    size = cost.Size(10**9, 6 * 10**9, 50_000)
    assert "second round" not in cost.table(make_config(), [], size, None)
    c = make_config(cluster={"k": 8, "second_round": True, "fit_documents": 1000}, train={"seq_len": 256})
    assert f"at most {8 * 1000 * 256 * 2e9:.3g} to score" in cost.table(c, [], size, None)


def test_disk_follows_its_causes() -> None:
    size, text = cost.Size(10**9, 6 * 10**9, 50_000), cost.TextBytes(7e9, 3e9)
    config = make_config()
    parts = cost.disk(config, size, text, 100, 3)
    n_models = 1 + len(plan.experts(config))
    assert cost.disk(config, size, text, 700, 3) == {**parts, "vectors": 7 * parts["vectors"]}
    assert parts["weights"] == 4e9 * n_models
    assert parts["states of running trainings"] == 3 * cost.STATES * 12e9
    assert 10e9 / 2 < parts["text and tokens"] < 3 * 10e9
    wide = cost.disk(config, size._replace(vocab_size=70_000), text, 100, 3)
    assert wide["text and tokens"] - 5e9 == 2 * (parts["text and tokens"] - 5e9)  # 4 bytes for a token, not 2
    alone = cost.disk(make_config(train={"controls": []}), size, text, 100, 3)
    assert alone["text and tokens"] < parts["text and tokens"]
    whole = cost.disk(make_config(eval={"max_document_tokens": None}), size, text, 100, 3)
    assert (
        whole["scores and distances"]
        == 4 * 1e9 * (n_models + config.cluster.k)
        > parts["scores and distances"]
    )


def test_text_of_packed_files_is_larger_than_they_are(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl.zst", "c.txt.gz", "d.parquet"):
        (tmp_path / name).write_bytes(b"x" * 1000)
    assert cost.text_bytes([str(tmp_path / "a.jsonl")]) == 1000
    assert cost.text_bytes(map(str, sorted(tmp_path.iterdir()))) == 1000 + 4000 + 3000 + 3000
    config = make_config(corpus={"train": [str(tmp_path / "a.jsonl")], "eval_fraction": 0.25})
    assert cost.corpus(config) == (750, 250)
    config = make_config(corpus={"train": [str(tmp_path / "a.jsonl")], "eval": [str(tmp_path / "c.txt.gz")]})
    assert cost.corpus(config) == (1000, 3000)
    assert sum(cost.corpus(make_config())) == cost.DEMO_BYTES


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("a100", "A100"),
        ("nvidia_a100-sxm4-80gb", "A100"),
        ("A100_80GB", "A100"),
        ("a10", "A10"),
        ("h100", "H100"),
        ("nvidia_h100_pcie", "H100 PCIe"),
        ("NVIDIA_H100_80GB_HBM3", "H100"),
        ("h200", "H200"),
        ("rtx4090", "RTX 4090"),
        ("rtx_4090", "RTX 4090"),
        ("l40s", "L40S"),
        ("a1000", None),
        ("fake", None),
        ("", None),
    ],
)
def test_peak_of_what_slurm_calls_a_gpu(gpu: str, name: str | None) -> None:
    assert cost.peak(gpu, PEAK_FLOPS) == (name and (name, PEAK_FLOPS[name]))


@settings(max_examples=50, deadline=None)
@given(st.floats(0.01, 1e4), st.integers(5, 10_000), st.integers(0, 120))
def test_a_chain_is_as_long_as_it_must_be(hours: float, runtime: int, notice: int) -> None:
    n, each = cost.n_chained(hours, runtime, notice), runtime / 60 - notice / 3600
    assert n * each >= hours * (1 - 1e-9)
    assert (n - 1) * each < hours


def test_seconds_to_stop() -> None:
    size, machine = cost.Size(10**9, 6 * 10**9, 50_000), cost.Machine("A100", 312e12, 2)
    saving = 12e9 / 1e8 + 24
    assert cost.seconds_to_save(size, 1e8) == pytest.approx(saving)
    assert cost.seconds_to_stop(size, 10**6, None, 1e8) == pytest.approx(2 * saving)
    assert cost.seconds_to_stop(size, 10**6, machine, 1e8) == pytest.approx(
        2 * (saving + 6e15 / (0.4 * 624e12))
    )


def test_numbers_with_prefixes() -> None:
    found = [
        cost.units(0),
        cost.units(999, "B"),
        cost.units(1000, "B"),
        cost.units(4.1e12, "B"),
        cost.units(2e18),
    ]
    assert found == ["0", "999 B", "1 kB", "4.1 TB", "2e+03 P"]


def test_table_says_what_it_does_not_know() -> None:
    config, size = make_config(), cost.Size(10**9, 6 * 10**9, 50_000)
    submitted = ["shard", "train_expert", "score_expert"]
    machine = cost.Machine("A100", PEAK_FLOPS["A100"], 2, runtime_min=60, notice_s=120)
    assert "compute    unknown, as the model is not here" in cost.table(config, submitted, None, machine)
    assert "GPU-hours  unknown" in cost.table(config, submitted, size, None)
    assert "GPU-hours  unknown" in cost.table(
        make_config(train={"precision": "float32"}), submitted, size, machine
    )
    assert "jobs       none on Slurm" in cost.table(config, [], size, None)


def test_table() -> None:
    config, size = make_config(train={"steps": 200_000}), cost.Size(10**9, 6 * 10**9, 50_000)
    machine = cost.Machine("A100", PEAK_FLOPS["A100"], 2, runtime_min=60, notice_s=120)
    rows = dict(
        line.split(maxsplit=1)
        for line in cost.table(config, ["shard", "train_expert", "score_expert"], size, machine).splitlines()
    )
    assert rows["jobs"] == "23 on Slurm: 11 train_expert, 11 score_expert, 1 of other rules"
    flops = sum(cost.n_tokens(config).values()) * 6e9
    assert rows["compute"].startswith(f"{flops:.3g} FLOPs")
    assert rows["GPU-hours"] == f"{duration(flops / (0.4 * 312e12))} at 40% of the 312 bf16 TFLOP/s of A100"
    dense = cost.n_tokens(config)["dense"] * 6e9 / (0.4 * 312e12) / 3600 / 2
    chain = f"{cost.n_chained(dense, 60, 120)} time limits of 1h00m one after another"
    assert rows["seed"] == f"{duration(3600 * dense)} on 2 GPU, so {chain}"
    assert rows["memory"].startswith("16 GB for weights, gradients and optimiser")
