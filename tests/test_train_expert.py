import json
import resource
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import damaged
import made_hub
import made_training as made
from cbtm_pipeline import plan, score_expert
from cbtm_pipeline.base import artifact, lock
from cbtm_pipeline.corpus import encoding, token_files
from cbtm_pipeline.provenance import expert_files, made_from
from cbtm_pipeline.training import batches, checkpoint, data, model, training_log
from resealed import change_json


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
            "files.json",
            "generation_config.json",
            "metrics.jsonl",
            "model.safetensors",
        ),
        *("tensorboard", "tokenizer.json", "tokenizer_config.json"),
    }
    card = expert_files.read_card(where.out)
    seed = expert_files.read_card(outdir / "experts/seed/model.safetensors")
    tokenizer = artifact.identity(outdir / "tokenizer/tokenizer.json")
    clusters, shards = (
        artifact.read_sealed(outdir / folder / "manifest.json", folder)
        for folder in ("assignments", "shards")
    )
    tokens = clusters["identity_groups"][0]
    assert card["made_from"] == {"tokens": tokens, "tokenizer": tokenizer, "seed": seed["identity"]}
    of_shards = [entry["identity_groups"][0] for entry in shards["shards"] if entry["split"] == "train"]
    assert seed["made_from"] == {"tokens": artifact.fingerprint(of_shards), "tokenizer": tokenizer}
    assert card["made_with"] == make_plan("0").content()
    assert (card["expert"], card["made_with"]["group"], card["precision"]) == ("0", 0, "float32")
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
        expert_files.read_card(outdir / "bf16-0/random-1/model.safetensors")["precision"] == "bf16 autocast"
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
    card = expert_files.read_card(where.out)
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
    card = expert_files.read_card(where.out)
    assert card["pretrained_commit"] == made_hub.NEW
    assert (card["made_with"]["pretrained"], card["made_with"]["revision"]) == ("me/tiny", "main")

    child = made.files(outdir, "0", to="from-hub")._replace(seed_model=where.out)
    made.train(made.make_config(steps=1), child, "0")
    assert "pretrained_commit" not in expert_files.read_card(child.out)
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


def test_a_candidate_that_diverges_is_published_without_a_validation_loss(outdir):
    cfg = made.make_config(lr=[0.01, 1e30], validations=2, validation_share=0.3, run=made.NOW)
    where = made.files(outdir, "dense", to="diverged")
    made.train(cfg, where, "dense@1e+30")
    card = artifact.read_sealed(where.out.with_name("card.json"), "expert")
    assert card["diverged"] and card["validation_loss"] is None and card["n_steps"] < 10
    assert card["expert"] == "dense" and card["made_with"]["lr"] == 1e30
    made.train(cfg, made.files(outdir, "dense", to="good"), "dense@0.01")
    good = artifact.read_sealed(outdir / "good/dense/card.json", "expert")
    assert good["validation_loss"] and good["n_validation_tokens"] > 0 and "diverged" not in good


def test_dense_large_needs_no_seed_and_makes_as_many_steps_as_its_flops_allow(outdir):
    cfg = made.make_config(controls=["dense-large"])
    where = made.files(outdir, "dense-large", to="large")
    made.train(cfg, where, "dense-large")
    card, planned = artifact.read_sealed(where.out.with_name("card.json"), "expert"), plan.trainings(cfg)
    assert card["made_with"] == planned["dense-large"].content() and "seed" not in card["made_from"]
    seed = artifact.read_sealed(outdir / "experts/seed/card.json", "expert")
    tokens = planned["seed"].n_steps * planned["seed"].step_tokens
    tokens += cfg.train.steps * cfg.train.batch_size * cfg.train.seq_len
    step = card["flops_per_token"] * planned["dense-large"].step_tokens
    assert abs(card["train_flops"] - tokens * seed["flops_per_token"]) <= step
    assert card["n_steps"] < planned["dense-large"].n_steps and card["n_parameters"] > seed["n_parameters"]


@pytest.mark.parametrize(("run", "n_saved"), [(made.NOW, 2), (made.NEVER, 0)])
def test_a_training_that_lost_its_lock_writes_nothing_more(outdir, monkeypatch, run, n_saved):
    monkeypatch.setattr(lock, "_held", [])
    where = made.files(outdir, "0", to=f"successor-{n_saved}")
    lock.hold(where.work)

    def take_over() -> bool:
        if len(training_log.read(where.work / "state/metrics.jsonl")) == n_saved:
            (where.work / ".lock").write_text('{"host": "another", "pid": 1, "beat": 3}')
        return False

    with pytest.raises(ValueError, match=r"taken over by another process \(process 1 on another\)"):
        made.train(made.make_config(run=run), where, "0", take_over)
    newest = checkpoint.candidates(where.work / "state")
    assert [path.name for path in newest[:1]] == [f"step-{n_saved:08d}.safetensors"] * (n_saved > 0)
    assert not where.out.exists()


# --- what a training is made from ----------------------------------------------------------------------


def origin(outdir: Path, name: str, **keys: Any) -> dict[str, str]:
    """What a training is made from by these keys of section train, if it has the seed in `outdir`."""
    how, where = plan.train_expert(made.make_config(**keys), name), made.files(outdir, name)
    seed = None if name == "seed" else expert_files.read_card(outdir / "experts/seed/model.safetensors")
    tokenizer = encoding.read_card(where.tokenizer)
    return made_from.train_expert(how, data.read(where.data, how).manifest, tokenizer, seed)


def copies(outdir: Path, to: Path) -> Path:
    """Copies of all inputs of trainings."""
    for folder in ("experts/seed", "tokenizer", "assignments", "random", "shards"):
        shutil.copytree(outdir / folder, to / folder)
    return to


@pytest.fixture(scope="module")
def two_held_out_texts(tmp_path_factory) -> list[Path]:
    """Two corpora with equal training text and unlike held-out text, each with a trained seed model."""
    folders = [tmp_path_factory.mktemp("held-out") for _ in range(2)]
    for out, n_held_out in zip(folders, (12, 20), strict=True):
        made.write_corpus(out, n_held_out=n_held_out)
        made.write_validation(out)
        made.train(made.make_config(validations=2), made.files(out, "seed"), "seed")
    return folders


@pytest.mark.parametrize("name", ["seed", "dense", "0"])
def test_new_held_out_text_matters_to_a_training_with_patience_only(two_held_out_texts, name):
    a, b = two_held_out_texts
    without = {"validations": 4}
    assert origin(a, name, **without) == origin(b, name, **without) == origin(a, name, validations=0)
    patient = {"validations": 4, "patience": 2}
    first, second = origin(a, name, **patient), origin(b, name, **patient)
    assert first["validation"] != second["validation"]
    assert (
        {**first, "validation": ""} == {**second, "validation": ""} == {**origin(a, name), "validation": ""}
    )
    assert origin(a, name, patience=2, validations=0) == origin(a, name)


def test_new_held_out_text_gives_the_same_expert(two_held_out_texts):
    cards = []
    for out in two_held_out_texts:
        where = made.files(out, "0")
        made.train(made.make_config(validations=2), where, "0")
        cards.append(expert_files.read_card(where.out))
    assert cards[0]["identity"] == cards[1]["identity"]
    assert cards[0]["made_from"] == cards[1]["made_from"]
    assert cards[0]["validation_loss"] != cards[1]["validation_loss"]


def test_a_new_document_makes_another_expert_of_its_cluster_and_of_no_other(outdir, tmp_path):
    copies(outdir, tmp_path)
    shards = {
        name: token_files.read_unverified(tmp_path / f"shards/{name}.arrow", 0)
        for name in ("train-00000", "train-00001")
    }
    new = made.documents(1, np.random.default_rng(5))
    shards["train-00001"] = token_files.join([shards["train-00001"], new])  # document 30 is of cluster 0
    manifest = artifact.read_sealed(tmp_path / "assignments/manifest.json", "assignments")
    made.write_assignments(tmp_path / "assignments", shards, 2, manifest["made_from"])
    before, after = origin(outdir, "0"), origin(tmp_path, "0")
    assert {key for key, value in after.items() if value != before[key]} == {"tokens"}
    assert origin(tmp_path, "1") == origin(outdir, "1")


def test_equal_text_is_an_equal_input_whatever_the_cluster_is_called(outdir):
    assert origin(outdir, "0") == origin(outdir, "random-0")
    assert origin(outdir, "0")["tokens"] != origin(outdir, "1")["tokens"]


# --- inputs that do not belong together, or are damaged ------------------------------------------------


def refused(outdir: Path, name: str, message: str) -> None:
    """Check that a training ends with this message, and leaves neither weights nor a state."""
    where = made.files(outdir, name)
    with pytest.raises(ValueError, match=message):
        made.train(made.make_config(), where, name)
    assert not where.out.exists() and not where.work.exists()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("assignments/train-00000.arrow", "0"),
        ("random/train-00001.arrow", "random-0"),
        ("shards/train-00001.arrow", "dense"),
    ],
)
def test_a_flipped_bit_in_a_token_file_is_refused(outdir, tmp_path, path, name):
    file = copies(outdir, tmp_path) / path
    tokens = token_files.read_unverified(file, 0).values
    at = file.read_bytes().index(tokens.tobytes())
    file.write_bytes(damaged.flipped(file.read_bytes(), at + 2 * (len(tokens) // 2)))
    refused(tmp_path, name, rf"{path}: group 0 is not the one that its manifest speaks of")


def test_a_seed_whose_config_has_changed_is_refused(outdir, tmp_path):
    path = copies(outdir, tmp_path) / "experts/seed/config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"rms_norm_eps": 2 * content["rms_norm_eps"]}))
    refused(tmp_path, "0", r"experts/seed/config\.json: another file than it was")


@pytest.mark.parametrize(
    "name",
    [
        *("model.safetensors", "card.json", "files.json", "generation_config.json", "metrics.jsonl"),
        *("tokenizer.json", "tokenizer_config.json"),
    ],
)
def test_a_seed_with_a_changed_file_is_refused(outdir, tmp_path, name):
    path = copies(outdir, tmp_path) / "experts/seed" / name
    path.write_bytes(path.read_bytes() + b" ")
    refused(
        tmp_path, "dense", rf"experts/seed/{name}: (another file than it was|changed since it was written)"
    )


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_changed_tokenizer_is_refused(outdir, tmp_path, name):
    path = copies(outdir, tmp_path) / "tokenizer" / name
    path.write_bytes(path.read_bytes() + b" ")
    refused(tmp_path, "0", rf"tokenizer/{name}: ")


def test_a_tokenizer_that_changes_during_a_training_is_not_published(outdir, tmp_path):
    where = made.files(copies(outdir, tmp_path), "0")
    path = where.tokenizer.with_name("tokenizer_config.json")
    whole = path.read_bytes()

    def change() -> None:
        path.write_bytes(whole + b" ")

    with pytest.raises(ValueError, match=r"tokenizer_config\.json: another file than it was"):
        made.train(made.make_config(run=made.NOW), where, "0", change)
    assert not where.out.exists()
    path.write_bytes(whole)
    with made.log_lines() as lines:
        made.train(made.make_config(run=made.NOW), where, "0")
    assert any("going on after step 9" in line for line in lines)
    made.check_published(where, 10)


def test_other_files_beside_the_tokenizer_are_not_published(outdir, tmp_path):
    where = made.files(copies(outdir, tmp_path), "0")
    for name in ("config.json", "notes.txt"):
        where.tokenizer.with_name(name).write_text("{}")
    made.train(made.make_config(steps=1), where, "0")
    made.check_published(where, 1)
    assert json.loads(where.out.with_name("config.json").read_text())["model_type"] == "llama"
    assert not where.out.with_name("notes.txt").exists()


@pytest.mark.parametrize("name", ["seed", "0", "random-1", "dense"])
def test_tokens_of_another_tokenizer_are_refused(outdir, tmp_path, name):
    """Its words are the same but for one, so that its tokens would do."""
    copies(outdir, tmp_path)
    path = tmp_path / "tokenizer/tokenizer.json"
    path.write_text(path.read_text().replace('"w299"', '"w300"'))
    identity = artifact.identity(path)
    files = json.loads(path.with_name("card.json").read_text())["files"]
    change_json(path.with_name("card.json"), identity=identity, files={**files, path.name: identity})
    folder = {"corpus": "shards", "clusters": "assignments", "random": "random"}[plan.data_of(name)[0]]
    where = made.files(tmp_path, name, to="new")
    with pytest.raises(ValueError, match=rf"{folder}/manifest\.json: made from another tokenizer"):
        made.train(made.make_config(), where, name)


def test_a_seed_of_another_tokenizer_is_refused(outdir, tmp_path):
    copies(outdir, tmp_path)
    card = tmp_path / "experts/seed/card.json"
    origin = {**json.loads(card.read_text())["made_from"], "tokenizer": "0" * 32}
    change_json(card, made_from=origin)
    files = artifact.read_sealed(card.with_name("files.json"), "expert_files")["files"]
    change_json(card.with_name("files.json"), files={**files, card.name: artifact.identity(card)})
    refused(tmp_path, "0", r"experts/seed/model\.safetensors: made from another tokenizer")


# --- only the feed-forwards -----------------------------------------------------------------------


def test_with_only_feed_forward_all_other_tensors_stay_the_seeds(outdir):
    from safetensors.numpy import load_file

    cfg, where = made.make_config(only="feed-forward"), made.files(outdir, "0", to="feed-forward")
    made.train(cfg, where, "0")
    seed = load_file(outdir / "experts/seed/model.safetensors")
    expert = load_file(where.out)
    assert seed.keys() == expert.keys()
    changed = {name for name, tensor in expert.items() if tensor.tobytes() != seed[name].tobytes()}
    assert changed == {name for name in seed if ".mlp." in name}


def test_a_stopped_training_of_feed_forwards_goes_on(outdir):
    cfg = made.make_config(only="feed-forward", run=made.NOW)
    whole = made.train(cfg, made.files(outdir, "0", to="whole"), "0")
    where = made.files(outdir, "0", to="stopped")
    assert made.train(cfg, where, "0", made.stop_after(4)) == b""
    assert made.train(cfg, where, "0") == whole


def test_only_is_a_matter_of_experts():
    plans = plan.trainings(made.make_config(only="feed-forward"))
    assert {name for name, one in plans.items() if "only" in one.content()} == {
        "0",
        "1",
        "random-0",
        "random-1",
    }
    assert not any("only" in one.content() for one in plan.trainings(made.make_config()).values())


# --- parents, and experts that begin as one -------------------------------------------------------


def test_a_stopped_parent_goes_on_and_reads_all_its_clusters(outdir):
    cfg = parents_config(run=made.NOW)
    planned = plan.train_expert(cfg, "parent-0")
    clusters = [made.files(outdir, name) for name in ("0", "1")]
    read = data.read(clusters[0].data, planned)
    both = [
        data.read(one.data, plan.train_expert(cfg, name)) for one, name in zip(clusters, "01", strict=True)
    ]
    assert read.stream.n_tokens == sum(one.stream.n_tokens for one in both)
    whole = made.train(cfg, made.files(outdir, "parent-0", to="whole"), "parent-0")
    where = made.files(outdir, "parent-0", to="stopped")
    assert made.train(cfg, where, "parent-0", made.stop_after(4)) == b""
    assert made.train(cfg, where, "parent-0") == whole
    card = expert_files.read_card(where.out)
    identities = artifact.read_sealed(where.data, "assignments")["identity_groups"]
    assert card["made_from"]["tokens"] == artifact.fingerprint(identities)
    assert "on clusters 0 to 1, as which their experts begin" in where.out.with_name("README.md").read_text()


def test_a_child_begins_as_its_parent_and_as_nothing_else(outdir):
    cfg = parents_config()
    parent = made.files(outdir, "parent-0", to="family")
    made.train(cfg, parent, "parent-0")
    where = made.files(outdir, "1", to="family")._replace(seed_model=parent.out)
    made.train(cfg, where, "1")
    card = expert_files.read_card(where.out)
    assert card["made_from"]["seed"] == expert_files.read_card(parent.out)["identity"]
    assert card["made_with"]["begins"] == "parent-0"
    assert (
        "parent-0 of the run, which began as the seed model" in where.out.with_name("README.md").read_text()
    )
    with pytest.raises(ValueError, match=r"seed. Expected parent-0, as which expert 1 begins by the config"):
        made.train(cfg, made.files(outdir, "1", to="orphan"), "1")


def parents_config(**settings: Any):
    cfg = made.make_config(**settings)
    return cfg.model_copy(update={"cluster": cfg.cluster.model_copy(update={"parents": 1})})


def test_feed_forwards_are_known_of_each_architecture():
    sizes = {
        "opt": {"hidden_size": 16, "ffn_dim": 24, "word_embed_proj_dim": 16, "num_hidden_layers": 1},
        "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2},
        "gpt_neox": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1},
    }
    for kind, keys in sizes.items():
        heads = {} if kind == "gpt2" else {"num_attention_heads": 2}
        net = model.scratch({"model_type": kind, **keys, **heads}, 300, 0, 16, 0)
        model.train_feed_forwards_only(net)
        trained = {name for name, p in net.named_parameters() if p.requires_grad}
        assert trained and all(".mlp." in name or ".fc" in name for name in trained)
