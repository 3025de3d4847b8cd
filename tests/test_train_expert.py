import json
import math
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import made_training as made
from cbtm_pipeline import config, score_expert, train_expert
from cbtm_pipeline.base import artifact, lock
from cbtm_pipeline.training import batches, checkpoint, expert_folder, loss, model, training_log
from cbtm_pipeline.training import step as train_step


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model."""
    out = tmp_path_factory.mktemp("training")
    made.write_seed(out)
    return out


def plan(name: str) -> dict:
    return plan.train_expert(made.make_config(), name)


# --- a training as it should be ---------------------------------------------------------------------------------------


def test_published_folder(outdir):
    where = made.files(outdir, "0", to="plain")
    made.train(made.make_config(), where, "0")
    made.check_published(where, 10)
    assert {path.name for path in where.out.parent.iterdir()} == {
        *(
            "README.md",
            "card.json",
            "config.json",
            "generation_config.json",
            "metrics.jsonl",
            "model.safetensors",
        ),
        *("tensorboard", "tokenizer.json", "tokenizer_config.json"),
    }
    card = expert_folder.read_card(where.out)
    seed = expert_folder.read_card(outdir / "experts/seed/model.safetensors")
    assert card["made_from"] == {"assignments": artifact.identity(where.data), "seed": seed["weights"]}
    assert card["corpus"] == seed["corpus"] == artifact.identity(outdir / "shards/manifest.json")
    assert seed["made_from"] == {"shards": seed["corpus"]}
    assert (card["expert"], card["plan"]["group"], card["precision"]) == ("0", 0, "float32")
    assert card["n_train_tokens"] == 10 * 4 * made.SEQ_LEN
    assert card["train_flops"] == card["n_train_tokens"] * card["flops_per_token"]
    rows = training_log.read(where.out.with_name("metrics.jsonl"))
    assert card["final_loss"] == pytest.approx(sum(row["loss"] for row in rows) / 10)
    assert rows[0]["loss"] > rows[-1]["loss"]
    assert rows[-1]["n_tokens"] == card["n_train_tokens"]
    assert rows[-1]["lr"] == pytest.approx(0.1 * 0.01)
    assert {row["mfu"] for row in rows} == {None}  # nobody knows the peak of a CPU
    readme = where.out.with_name("README.md").read_text()
    assert "# Expert 0" in readme
    assert card["weights"] in readme


def test_tensorboard_reads_the_events(outdir):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    path = next((outdir / "experts/seed/tensorboard").iterdir())
    events = [event for event in EventFileLoader(str(path)).Load() if event.summary.value]
    rows = training_log.read(outdir / "experts/seed/metrics.jsonl")
    assert [event.step for event in events] == [row["step"] for row in rows]
    assert {value.tag for value in events[0].summary.value} == {
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "memory_bytes",
        "data_wait_s",
    }


def test_with_one_cluster_the_expert_is_the_dense_model(outdir):
    cfg = made.make_config(k=1)
    zero = made.train(cfg, made.files(outdir, "0", data="one", to="k1"), "0")
    assert zero == made.train(cfg, made.files(outdir, "dense", to="k1"), "dense")
    assert zero != (outdir / "experts/seed/model.safetensors").read_bytes()


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_equal_inputs_give_equal_bits(outdir, precision):
    cfg = made.make_config(steps=4, precision=precision)
    a, b = (
        made.train(cfg, made.files(outdir, "random-1", to=f"{precision}-{i}"), "random-1") for i in range(2)
    )
    assert a == b


def test_precisions_differ(outdir):
    a, b = (
        (outdir / f"{precision}-0/random-1/model.safetensors").read_bytes()
        for precision in ("float32", "bf16")
    )
    assert a != b
    assert (
        expert_folder.read_card(outdir / "bf16-0/random-1/model.safetensors")["precision"] == "bf16 autocast"
    )


@pytest.mark.parametrize("name", made.MODELS)
def test_any_model_trains_resumes_and_is_trained_on_and_is_what_transformers_loads(outdir, name):
    scratch = made.MODELS[name] | (
        {"resid_pdrop": 0.1} if name == "gpt2" else {}
    )  # dropout resumes exactly, too
    cfg = made.make_config(k=1, steps=3, seed_share=0.5, scratch=scratch)
    where = made.files(outdir, "seed", to=name)
    undisturbed = made.train(cfg, where, "seed")
    again = made.files(outdir, "seed", to=f"{name}-resumed")
    assert made.train(cfg, again, "seed", made.stop_after(2)) == b""
    assert made.train(cfg, again, "seed") == undisturbed
    child = made.files(outdir, "dense", to=name)._replace(seed_model=where.out)
    assert made.train(cfg, child, "dense") != undisturbed

    documents = [np.r_[0, text] for text in np.random.default_rng(0).integers(1, made.VOCAB_SIZE, (5, 20))]
    found = score_expert.score(model.load(child.out.parent).eval(), documents, made.SEQ_LEN, 16)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(child.out.parent, local_files_only=True).eval()
    assert theirs.dtype == torch.float32
    with torch.inference_mode():
        logprobs = [
            theirs(torch.from_numpy(d)[None, :-1]).logits[0].log_softmax(1)[range(20), d[1:]]
            for d in documents
        ]
    assert found == pytest.approx(torch.cat(logprobs).numpy(), abs=1e-5)


def test_pretrained_seed_is_published_as_it_is(outdir):
    cfg = made.make_config(pretrained=str(outdir / "experts/seed"))
    where = made.files(outdir, "seed", to="pretrained")
    assert made.train(cfg, where, "seed") == (outdir / "experts/seed/model.safetensors").read_bytes()
    card = expert_folder.read_card(where.out)
    assert (card["n_train_tokens"], card["train_flops"], card["final_loss"]) == (0, 0, None)


def test_a_text_shorter_than_a_block_trains_and_its_repeats_are_told(tmp_path):
    made.write_corpus(tmp_path, n_train=(2,), longest=10)
    cfg = made.make_config(k=1, steps=3)
    made.train(cfg, made.files(tmp_path, "seed"), "seed")
    where = made.files(tmp_path, "0", data="one")
    assert data.read(where.data, plan("0")).stream.n_tokens < made.SEQ_LEN
    with made.log_lines() as lines:
        assert made.train(cfg, where, "0")
    assert any("reads its text" in line and "more than 4 times" in line for line in lines)
    with pytest.raises(ValueError, match=r"no tokens\. .*Lower cluster\.k"):
        data.read(made.write_empty_cluster(tmp_path), plan("1"))


def test_full_disk_while_publishing_leaves_no_weights(outdir):
    where, cfg = made.files(outdir, "0", to="full"), made.make_config(steps=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(OSError, match="too large") as error:
            made.train(cfg, where, "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(where.out)
    assert not where.out.exists()
    made.train(cfg, where, "0")
    made.check_published(where, 2)


# --- one step ---------------------------------------------------------------------------------------------------------


def test_learning_rate():
    def rates(n_steps, **how):
        how = {"lr": 1.0, "schedule": "linear", "final_lr_ratio": 0.1, "warmup_ratio": 0.0} | how
        return [train_step.learning_rate(step, n_steps, **how) for step in range(n_steps)]

    assert rates(3) == pytest.approx([0.7, 0.4, 0.1])
    assert rates(1) == pytest.approx([0.1])
    assert rates(5, warmup_ratio=0.4, final_lr_ratio=0.0) == pytest.approx([0.5, 1.0, 2 / 3, 1 / 3, 0.0])
    assert rates(2, schedule="cosine", final_lr_ratio=0.0) == pytest.approx([0.5, 0.0])
    assert rates(3, schedule="cosine") == pytest.approx(
        [0.1 + 0.9 * (1 + math.cos(math.pi * x)) / 2 for x in (1 / 3, 2 / 3, 1)]
    )
    assert rates(4, warmup_ratio=1.0) == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_accumulated_gradient_is_that_of_the_whole_batch():
    net = model.scratch(made.LLAMA, made.VOCAB_SIZE, 0, made.SEQ_LEN, 0)
    tokens_BT = torch.randint(
        made.VOCAB_SIZE, (16, made.SEQ_LEN + 1), generator=torch.Generator().manual_seed(0)
    )

    def gradient(micro_batch_size: int) -> tuple[float, torch.Tensor]:
        net.zero_grad()
        total = train_step.accumulate(
            loss.NextToken(net), tokens_BT, 16 * made.SEQ_LEN, micro_batch_size, False
        )
        return total.item(), torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])

    mean, whole = gradient(16)
    assert mean == pytest.approx(net(input_ids=tokens_BT, labels=tokens_BT).loss.item(), abs=1e-5)
    for micro_batch_size in (8, 5):
        other_loss, other = gradient(micro_batch_size)
        assert other_loss == pytest.approx(mean, abs=1e-5)
        assert torch.allclose(other, whole, rtol=1e-4, atol=1e-7)


def test_weight_decay_is_for_matrices_only():
    net = model.scratch({"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2}, 300, 0, 32, 0)
    decayed, free = train_step.make_optimizer(
        net, {"weight_decay": 0.1, "lr": 1, "betas": [0.9, 0.95]}
    ).param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0)
    assert {p.ndim for p in decayed["params"]} == {2}
    assert {p.ndim for p in free["params"]} == {1}
    assert len(decayed["params"]) + len(free["params"]) == len(list(net.parameters()))


def test_seed_and_experts_read_in_different_orders(outdir, monkeypatch):
    asked = []
    original = batches.batch
    monkeypatch.setattr(
        batches, "batch", lambda stream, order, *rest: asked.append(order) or original(stream, order, *rest)
    )
    made.train(made.make_config(seed_share=0.5), made.files(outdir, "seed", to="order"), "seed")
    n_seed = len(asked)
    for name in ("0", "dense"):
        made.train(made.make_config(steps=1), made.files(outdir, name, to="order"), name)
    assert len(set(asked[:n_seed])) == len(set(asked[n_seed:])) == 1
    assert asked[0] != asked[-1]


def test_no_finite_loss_stops_before_the_step(outdir):
    cfg = made.make_config(lr=1e30, run=made.NOW)
    where = made.files(outdir, "0", to="nan")
    with pytest.raises(ValueError, match=r"expert 0, step \d: loss .*Lower train\.lr") as error:
        made.train(cfg, where, "0")
    failed = int(str(error.value).split("step ")[1].split(":")[0])
    newest = checkpoint.candidates(where.work / "state")[0]
    assert newest.name == f"step-{failed - 1:08d}.safetensors"
    assert not where.out.exists()


@pytest.mark.parametrize(("run", "n_saved"), [(made.NOW, 2), (made.NEVER, 0)])
def test_who_was_taken_over_writes_nothing_more(outdir, monkeypatch, run, n_saved):
    monkeypatch.setattr(lock, "_held", [])
    where = made.files(outdir, "0", to=f"successor-{n_saved}")
    lock.hold(where.work)

    def take_over() -> bool:
        if len(training_log.read(where.work / "state/metrics.jsonl")) == n_saved:
            (where.work / ".lock").write_text('{"host": "another", "pid": 1, "beat": 3}')
        return False

    with pytest.raises(ValueError, match=r'taken over by another process \(\{"host": "another"'):
        made.train(made.make_config(run=run), where, "0", take_over)
    newest = checkpoint.candidates(where.work / "state")
    assert [path.name for path in newest[:1]] == [f"step-{n_saved:08d}.safetensors"] * (n_saved > 0)
    assert not where.out.exists()


def test_mfu(monkeypatch):
    monkeypatch.setattr(training_log, "_peak_flops", lambda: 1e12)
    progress = training_log.Progress(
        10, 0, n_tokens=1000, flops_per_token=6_000_000, every_s=1e9, n_devices=2
    )
    assert progress.mfu(1e5) == pytest.approx(0.3)
    with made.log_lines() as lines:
        assert progress.say(progress.complete({"step": 10, "loss": 1.0, "lr": 0.1, "data_wait_s": 0.0}))
    assert "  MFU " in lines[0]
    monkeypatch.setattr(training_log, "_peak_flops", lambda: None)
    assert training_log.Progress(10, 0, 1000, 6_000_000, 1e9, 2).mfu(1e5) is None


# --- what does not belong together ------------------------------------------------------------------------------------


def test_data_of_another_kind_is_refused(outdir):
    with pytest.raises(ValueError, match=r"shards/manifest\.json: shards\. Expected assignments"):
        data.read(outdir / "shards/manifest.json", plan("0"))
    with pytest.raises(ValueError, match=r"random/manifest\.json: other clusters\. Expected clusters"):
        data.read(outdir / "random/manifest.json", plan("0"))
    with pytest.raises(ValueError, match=r"assignments/manifest\.json: other clusters\. Expected random"):
        data.read(outdir / "assignments/manifest.json", plan("random-0"))


def test_shards_of_another_run_are_refused(outdir, tmp_path):
    shutil.copytree(outdir / "assignments", tmp_path / "assignments")
    shutil.copy(outdir / "one/train-00001.arrow", tmp_path / "assignments")
    with pytest.raises(ValueError, match=r"train-00001\.arrow: made from something else than its manifest"):
        data.read(tmp_path / "assignments/manifest.json", plan("0"))


def test_missing_tokens_are_noticed(outdir, tmp_path):
    shutil.copytree(outdir / "shards", tmp_path / "shards")
    manifest = json.loads((tmp_path / "shards/manifest.json").read_text())
    del manifest["shards"][1]["split"]  # not a training shard any more
    manifest["shards"][0]["n_tokens"] += 1
    manifest["shards"][1]["split"] = "train"
    (tmp_path / "shards/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"\d+ tokens in its files\. Expected \d+"):
        data.read(tmp_path / "shards/manifest.json", plan("dense"))


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("experts/seed/model.safetensors", r"not the weights that card\.json speaks of"),
        ("tokenizer/tokenizer.json", r"not the tokenizer of the seed model|not the tokenizer of"),
        ("assignments/manifest.json", r"made from another shards"),
    ],
)
def test_a_seed_of_something_else_is_refused(outdir, tmp_path, path, message):
    for folder in ("experts/seed", "tokenizer", "assignments"):
        shutil.copytree(outdir / folder, tmp_path / folder)
    text = (tmp_path / path).read_bytes()
    corpus = artifact.identity(outdir / "shards/manifest.json").encode()
    (tmp_path / path).write_bytes(text.replace(corpus, b"0" * 32) if corpus in text else text + b" ")
    for name in ("train-00000.arrow", "train-00001.arrow"):
        data = (tmp_path / "assignments" / name).read_bytes()
        (tmp_path / "assignments" / name).write_bytes(
            data.replace(corpus, b"0" * 32) if "assignments" in path else data
        )
    with pytest.raises(ValueError, match=message):
        made.train(made.make_config(), made.files(tmp_path, "0"), "0")
