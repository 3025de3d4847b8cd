"""Studies: the runs of a grid, what they share, and what is refused before anything runs."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_pipeline import config, plan, status
from cbtm_pipeline.ops import finished, planned, study
from cbtm_pipeline.provenance.stale import Job, Reason, State
from made_project import ROOT

GRID = {"cluster.k": [1, 2, 4], "train.steps": [200, 800], "seed": [0, 1]}


def configs(grid: dict[str, list]) -> dict[str, config.Config]:
    return study.configs(study.read({"base": [str(ROOT / "config.yaml")], "outdir": "o", "grid": grid}))


@pytest.fixture
def anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_combination_is_a_run_with_its_own_folder_and_values(anywhere: Path) -> None:
    found = configs(GRID)
    assert len(found) == 12 and len({cfg.outdir for cfg in found.values()}) == 12
    cfg = found["k=2,steps=800,seed=1"]
    assert (cfg.cluster.k, cfg.train.steps, cfg.seed) == (2, 800, 1)
    assert cfg.outdir == "o/runs/k=2,steps=800,seed=1"


def test_runs_with_names_of_their_own_come_beside_the_grid(anywhere: Path) -> None:
    content = {
        "base": str(ROOT / "config.yaml"),
        "outdir": "o",
        "grid": {"cluster.k": [2]},
        "runs": {"unbalanced": {"cluster": {"k": 2, "balance": "none"}}, "base": None},
    }
    found = study.configs(study.read(content))
    assert list(found) == ["k=2", "unbalanced", "base"]
    assert found["unbalanced"].cluster.balance == "none" and found["k=2"].cluster.balance == "tokens"


def test_the_example_of_the_documentation_is_a_study(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = study.configs(study.read(planned.read_config(["docs/examples/study.yaml"])))
    assert len(found) == 4 and {cfg.train.batch_size for cfg in found.values()} == {16}


keys = st.sampled_from(["cluster.k", "train.steps", "seed", "embed.fit_documents", "cluster.fit_documents"])


@given(
    st.dictionaries(keys, st.lists(st.integers(1, 10**6), min_size=1, max_size=4, unique=True), min_size=1)
)
def test_names_are_folders_and_none_stands_for_two_settings(grid: dict[str, list[int]]) -> None:
    settings = study.read({"outdir": "o", "grid": grid}).settings
    expected = 1
    for values in grid.values():
        expected *= len(values)
    assert len(settings) == expected == len({repr(setting) for setting in settings.values()})
    assert all("/" not in name and not name.startswith(".") for name in settings)


@given(st.dictionaries(keys, st.integers(), min_size=1))
def test_sections_and_dotted_keys_say_the_same(setting: dict[str, int]) -> None:
    assert planned.flat(planned.nested(setting)) == setting


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([], "Expected the keys base, outdir, grid, runs"),
        ({"outdir": "o", "grid": {"seed": [0]}, "cluster": {"k": 2}}, "cluster: unknown key of a study"),
        ({"grid": {"seed": [0]}}, "outdir: null. Expected a folder"),
        ({"outdir": "o"}, "grid: nothing to try"),
        (
            {"outdir": "o", "grid": {"seed": 0}},
            "grid.seed: 0. Expected a list of the values to try. Wr",
        ),
        ({"outdir": "o", "grid": {"outdir": ["a"]}}, "grid.outdir: not for a run"),
        ({"outdir": "o", "grid": {"seed": []}}, "grid.seed: []. Expected a list of the values to try. List"),
        ({"outdir": "o", "grid": {"seed": None}}, "List them in brackets."),
        ({"outdir": "o", "grid": {"cluster": {"k": [1, 2]}}}, "Write cluster.k: [...] for each key."),
        ({"outdir": "o", "grid": {"cluster.": [1, 2]}}, "grid.cluster.: not for a run"),
        ({"outdir": "o", "grid": {"seed": [1, 1]}}, "grid.seed: 1: twice. Expected each value once. Remove"),
        ({"outdir": "o", "grid": {"seed": [1, "1"]}}, "grid: seed=1: the name of two runs"),
        (
            {"outdir": "o", "grid": {"seed": [1]}, "runs": {"seed=1": {}}},
            "runs.seed=1: also the name of a run",
        ),
        (
            {"outdir": "o", "grid": {"cluster.k": [1], "cluster": [{"k": 2}]}},
            "grid.cluster.k: also given",
        ),
        (
            {"outdir": "o", "runs": {"a": {"cluster": {"k": 2}, "cluster.k": 1}}},
            "a.cluster.k: also given by cluster.k",
        ),
        (
            {"outdir": "o", "runs": {"../up": {}}},
            "Expected a name of at most 100 letters, digits and . _ = ,",
        ),
        ({"outdir": "o", "runs": {"größe": {}}}, 'runs: "größe". Expected'),
        ({"outdir": "o", "base": 3, "grid": {"seed": [1]}}, "base: 3. Expected a list of config files"),
    ],
)
def test_a_wrong_study_is_refused_in_one_line(content: Any, found: str) -> None:
    with pytest.raises(ValueError) as error:
        study.read(content)
    assert found in str(error.value) and "\n" not in str(error.value)


def test_a_wrong_key_of_a_run_names_the_run_and_the_nearest_key(anywhere: Path) -> None:
    with pytest.raises(ValueError, match=r"run stps=3: train\.stps: unknown key\..*train\.steps\?"):
        configs({"train.stps": [3]})


def test_a_wrong_key_of_the_base_names_its_file(anywhere: Path) -> None:
    (anywhere / "tiny.yaml").write_text("eval: {evl_fraction: 0.1}")
    base = [str(ROOT / "config.yaml"), "tiny.yaml"]
    with pytest.raises(ValueError) as error:
        study.configs(study.read({"base": base, "outdir": "o", "grid": {"train.stps": [3]}}))
    of_run, of_base = sorted(str(error.value).splitlines(), reverse=True)
    assert of_base.startswith(f"{base[0]}, tiny.yaml: eval.evl_fraction: unknown key")
    assert of_run.startswith("run stps=3: train.stps: unknown key")


def test_two_runs_with_the_same_settings_are_refused(anywhere: Path) -> None:
    with pytest.raises(ValueError, match=r"^run lr=1e-3: the settings of run lr=0\.001\. Expected different"):
        configs({"train.lr": [0.001, "1e-3"]})


def test_a_negative_number_keeps_its_sign_in_the_name(anywhere: Path) -> None:
    with pytest.raises(ValueError, match=r"^run seed=-1: seed: -1\. Expected"):
        configs({"seed": [1, -1]})


@pytest.mark.parametrize(
    ("others", "todo"),
    [
        ({}, r"Set eval\.max_document_tokens to null for all runs"),
        (
            {"eval.max_document_tokens": [None], "corpus.shard_bytes": [10**6, 10**7]},
            "one corpus.shard_bytes",
        ),
    ],
)
def test_tokenizers_whose_runs_could_not_be_compared_are_refused_before_anything_is_trained(
    anywhere: Path, others: dict[str, list], todo: str
) -> None:
    with pytest.raises(ValueError, match=rf"^run .*: another tokenizer than that of .*{todo}"):
        configs({"tokenizer.vocab_size": [300, 400], **others})


def test_a_tokenizer_that_is_not_trained_is_the_same_for_other_corpora(anywhere: Path) -> None:
    train = {"corpus.train": [["a.txt"], ["b.txt"]], "corpus.eval": [["e.txt"]]}
    with pytest.raises(ValueError, match="another tokenizer"):
        configs(train)
    assert len(configs({**train, "tokenizer.pretrained": ["gpt2"]})) == 2


def test_other_tokenizers_are_compared_on_whole_documents(anywhere: Path) -> None:
    assert len(configs({"tokenizer.vocab_size": [300, 400], "eval.max_document_tokens": [None]})) == 2


@pytest.mark.parametrize("key", ["corpus.eval_fraction", "eval.max_document_tokens"])
def test_runs_on_other_held_out_text_are_refused_before_anything_is_trained(anywhere: Path, key: str) -> None:
    with pytest.raises(ValueError, match=rf"another {key} changes the held-out text\. Expected"):
        configs({key: [0.25, 0.5] if key.startswith("corpus") else [100, 200]})


def shared(a: config.Config, b: config.Config) -> set[str]:
    """The jobs that two runs share."""
    first, second = study.keys(a), study.keys(b)
    return {str(job) for job in first.keys() & second.keys() if first[job] == second[job]}


CORPUS = {"demo_corpus", "tokenizer", "shard"}
SEED_AND_DENSE = {f"{rule} {name}" for rule in ("train_expert", "score_expert") for name in ("seed", "dense")}
CLUSTERS = {"fit_kmeans", "assign", "assign_random", "route"}
CONTROLS = {
    f"{rule} {name}"
    for rule in ("train_expert", "score_expert")
    for name in ("dense-steps", *(f"random-{i}" for i in range(4)))
}


@pytest.mark.parametrize(
    ("key", "values", "expected"),
    [
        ("cluster.k", [2, 4], CORPUS | {"embed"} | SEED_AND_DENSE),
        ("train.steps", [100, 200], CORPUS | {"embed"} | CLUSTERS),
        ("seed", [0, 1], CORPUS),
        ("embed.idf_power", [1.0, 2.0], CORPUS | {"assign_random"}),
        ("tokenizer.vocab_size", [300, 400], {"demo_corpus"}),
        (
            "cluster.second_round",
            [False, True],
            CORPUS | {"embed"} | (CLUSTERS - {"route"}) | SEED_AND_DENSE | CONTROLS,
        ),
        ("cluster.parents", [None, 2], CORPUS | {"embed", "assign_random"} | SEED_AND_DENSE | CONTROLS),
    ],
)
def test_runs_share_what_does_not_depend_on_the_key(
    anywhere: Path, key: str, values: list, expected: set[str]
) -> None:
    whole = {"eval.max_document_tokens": [None]} if key.startswith("tokenizer") else {}
    found = shared(*configs({key: values, **whole}).values())
    others = {name for name in found if name.startswith(("train_expert", "score_expert"))}
    if key == "embed.idf_power":  # dense models and random clusters read no vectors
        assert {
            f"{rule} {name}" for rule in ("train_expert", "score_expert") for name in ("seed", "random-0")
        }
        assert others and not any(name.endswith((" 0", " 1")) for name in others)
        found -= others
    assert found == expected


def test_routers_alone_share_everything_before_the_evaluation(anywhere: Path) -> None:
    a, b = configs({"route.top_k": [[1], [2]]}).values()
    assert {str(job) for job in study.keys(a)} - shared(a, b) == {"eval_ensemble", "report", "ensemble"}


def states(cfg: config.Config, done: set[str]) -> dict[Job, State]:
    return {
        job: State([] if str(job) in done else [Reason("not made yet")], False, None)
        for job in study.keys(cfg)
    }


def test_the_first_run_lends_unless_another_has_the_outputs_already(anywhere: Path) -> None:
    found = configs({"cluster.k": [2, 4, 8]})
    by_run = {name: study.keys(cfg) for name, cfg in found.items()}
    nothing = {name: states(cfg, set()) for name, cfg in found.items()}
    whole = {name: set(jobs) for name, jobs in by_run.items()}
    lent = study.lenders(by_run, nothing, whole)
    assert lent["k=2"] == {}
    assert lent["k=4"] == lent["k=8"]
    assert lent["k=4"][Job("train_expert", "dense")] == "k=2" and Job("fit_kmeans") not in lent["k=4"]
    grown = {**nothing, "k=8": states(found["k=8"], {"tokenizer", "shard"})}
    lent = study.lenders(by_run, grown, whole)
    assert lent["k=2"] == {Job("tokenizer"): "k=8", Job("shard"): "k=8"}
    assert lent["k=4"][Job("shard")] == "k=8" and lent["k=4"][Job("embed")] == "k=2"


def test_a_run_that_was_not_asked_for_lends_only_what_it_has(anywhere: Path) -> None:
    found = configs({"cluster.k": [2, 4, 8]})
    by_run = {name: study.keys(cfg) for name, cfg in found.items()}
    there = {name: states(cfg, {"shard"} if name == "k=2" else set()) for name, cfg in found.items()}
    started = {"k=2": set[Job](), "k=4": set(by_run["k=4"]), "k=8": set(by_run["k=8"])}
    lent = study.lenders(by_run, there, started)
    assert {lent[name][Job("shard")] for name in ("k=4", "k=8")} == {"k=2"}
    assert {name for job, name in lent["k=8"].items() if job.rule != "shard"} == {"k=4"}


def test_nothing_about_a_whole_run_is_lent(anywhere: Path) -> None:
    a, b = configs({"run.log_seconds": [1, 2]}).values()
    assert study.keys(a) == study.keys(b)
    names = {"a": study.keys(a), "b": study.keys(b)}
    started = {name: set(jobs) for name, jobs in names.items()}
    lent = study.lenders(names, {"a": states(a, set()), "b": states(b, set())}, started)
    assert {job.rule for job in names["b"]} - {job.rule for job in lent["b"]} == {
        "eval_ensemble",
        "report",
        "ensemble",
    }
    assert set(plan.RULES) >= {job.rule for job in lent["b"]}


def test_the_folder_of_a_study_is_told_from_that_of_a_run(anywhere: Path) -> None:
    for name in ("k=2", "k=4"):
        (anywhere / "study/runs" / name).mkdir(parents=True)
        (anywhere / "study/runs" / name / "config.json").touch()
    with pytest.raises(ValueError, match=r"^study: a study\. .* runs: study/runs/k=2 study/runs/k=4\.$"):
        finished.read_all([Path("study")])
    assert not status.is_run(Path("study")) and status.is_run(Path("study/runs/k=2"))


def test_a_run_that_is_compared_with_itself_is_refused(anywhere: Path) -> None:
    with pytest.raises(ValueError, match=r"^study/\.\./a: named twice\. Expected each run once\."):
        (anywhere / "study").mkdir()
        finished.read_all([Path("a"), Path("study/../a")])
