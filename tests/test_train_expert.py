import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import made_hub
import made_training as made
from cbtm_pipeline import plan, score_expert
from cbtm_pipeline.base import artifact, lock
from cbtm_pipeline.training import batches, checkpoint, data, expert_folder, model, training_log


@pytest.fixture(scope="module")
def outdir(tmp_path_factory) -> Path:
    """A small corpus with a trained seed model."""
    out = tmp_path_factory.mktemp("training")
    made.write_seed(out)
    return out


def make_plan(name: str) -> plan.TrainingPlan:
    return plan.train_expert(made.make_config(), name)


# --- a training as it should be -------------------------------------------------------------------


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
    assert {row["mfu"] for row in rows} == {None}  # the peak of a CPU is not known
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
def test_any_model_trains_resumes_branches_and_loads_in_transformers(outdir, name):
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


def test_a_seed_from_the_hub_has_its_commit_on_its_card_and_no_path_in_any_file(
    outdir, tmp_path, monkeypatch
):
    cache = tmp_path / "hub"
    snapshot = made_hub.snapshot(cache, "me/tiny", made_hub.NEW, "main")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(outdir / "experts/seed" / name, snapshot)
    made_hub.use(monkeypatch, cache)
    where = made.files(outdir, "seed", to="from-hub")
    weights = made.train(made.make_config(pretrained="me/tiny", revision="main"), where, "seed")
    assert weights == (outdir / "experts/seed/model.safetensors").read_bytes()
    card = expert_folder.read_card(where.out)
    assert card["pretrained_commit"] == made_hub.NEW
    assert (card["plan"]["pretrained"], card["plan"]["revision"]) == ("me/tiny", "main")

    child = made.files(outdir, "0", to="from-hub")._replace(seed_model=where.out)
    made.train(made.make_config(steps=1), child, "0")
    assert "pretrained_commit" not in expert_folder.read_card(child.out)
    # a path would make the files of one training differ between machines
    for folder, source in ((where.out.parent, cache), (child.out.parent, outdir)):
        for name in ("config.json", "generation_config.json"):
            assert str(source) not in (folder / name).read_text()


def test_a_text_shorter_than_a_block_trains_with_a_warning(tmp_path):
    made.write_corpus(tmp_path, n_train=(2,), longest=10)
    cfg = made.make_config(k=1, steps=3)
    made.train(cfg, made.files(tmp_path, "seed"), "seed")
    where = made.files(tmp_path, "0", data="one")
    assert data.read(where.data, make_plan("0")).stream.n_tokens < made.SEQ_LEN
    with made.log_lines() as lines:
        assert made.train(cfg, where, "0")
    assert any("reads its text" in line and "more than 4 times" in line for line in lines)
    with pytest.raises(ValueError, match=r"no tokens\. .*Lower cluster\.k"):
        data.read(made.write_empty_cluster(tmp_path), make_plan("1"))


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


# --- one step -------------------------------------------------------------------------------------


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


def test_a_loss_that_is_not_finite_stops_before_the_step(outdir):
    cfg = made.make_config(lr=1e30, run=made.NOW)
    where = made.files(outdir, "0", to="nan")
    with pytest.raises(ValueError, match=r"expert 0, step \d: loss .*Lower train\.lr") as error:
        made.train(cfg, where, "0")
    failed = int(str(error.value).split("step ")[1].split(":")[0])
    newest = checkpoint.candidates(where.work / "state")[0]
    assert newest.name == f"step-{failed - 1:08d}.safetensors"
    assert not where.out.exists()


@pytest.mark.parametrize(("run", "n_saved"), [(made.NOW, 2), (made.NEVER, 0)])
def test_a_training_that_lost_its_lock_writes_nothing_more(outdir, monkeypatch, run, n_saved):
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


# --- inputs that do not belong together ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("experts/seed/model.safetensors", r"not the weights that card\.json "),
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
        tokens = (tmp_path / "assignments" / name).read_bytes()
        if "assignments" in path:
            (tmp_path / "assignments" / name).write_bytes(tokens.replace(corpus, b"0" * 32))
    with pytest.raises(ValueError, match=message):
        made.train(made.make_config(), made.files(tmp_path, "0"), "0")
