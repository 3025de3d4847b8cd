import copy
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from cbtm_pipeline import config, plan

ROOT = Path(__file__).parents[1]
DEFAULT = yaml.safe_load((ROOT / "config.yaml").read_text())


def changed(**keys: Any) -> dict[str, Any]:
    """The default config with dotted keys (section__key) replaced or added."""
    content = copy.deepcopy(DEFAULT)
    for key, value in keys.items():
        *sections, last = key.split("__")
        node = content
        for section in sections:
            node = node[section]
        node[last] = value
    return content


def test_default_config_is_valid_and_every_key_is_explained() -> None:
    config.read(ROOT / "config.yaml")
    section = ""
    for line in (ROOT / "config.yaml").read_text().splitlines():
        if re.match(r"\w+:$", line):
            section = line
        elif re.match(r"(  )?\w+: ", line):
            assert "# " in line, f"{section} {line}: no explanation"


def test_schema_has_no_defaults_of_its_own() -> None:
    def check(model: Any) -> None:
        for name, field in model.model_fields.items():
            assert field.is_required(), f"{model.__name__}.{name} has a default; defaults live in config.yaml"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                check(field.annotation)

    check(config.Config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cluster__kk": 3}, "cluster.kk: unknown key. .*Did you mean cluster.k?"),
        ({"topk": 3}, "topk: unknown key. .*Did you mean route.top_k?"),
        ({"train__learning_rate": 1e-3}, "train.learning_rate: unknown key"),
        ({"corpus__textfield": "x"}, "Did you mean corpus.text_field"),
        ({"eval__top_k": 3}, "Did you mean route.top_k"),
        ({"cluster__k": 0}, r"cluster.k: 0\. Expected greater than or equal to 1"),
        ({"cluster__k": "4"}, r"cluster.k: '4'\. Expected integer"),
        ({"cluster__k": True}, r"cluster.k: True\. Expected integer"),
        (
            {"cluster__balance": "token"},
            r"cluster.balance: 'token'\. Expected 'documents', 'tokens' or 'none'",
        ),
        ({"train__lr": "fast"}, r"train.lr: 'fast'\. Expected number"),
        ({"train__lr": float("nan")}, "train.lr: nan"),
        ({"corpus__train": []}, "corpus.train: "),
        ({"corpus__eval_fraction": 1.0}, r"corpus.eval_fraction: 1.0\. Expected less than 1"),
        ({"eval__stride": 300}, "eval.stride: 300. Expected at most train.seq_len"),
        (
            {"train__validation_share": 0.5},
            "train.validation_share: 0.5. Expected at most route.calibration_share, 0.3",
        ),
        ({"model__preset": "1.3B"}, "model.preset: '1.3B'. Expected '10m'"),
        ({"corpus": None}, "corpus: None. Expected"),
    ],
)
def test_bad_config_is_one_clear_line(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        config.validate(changed(**change))
    assert "\n" not in str(error.value)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(ValueError) as error:
        config.validate(changed(cluster__k=0, train__lr="fast"))
    assert len(str(error.value).splitlines()) == 2


def test_missing_key() -> None:
    content = changed()
    del content["cluster"]["k"]
    with pytest.raises(ValueError, match="cluster.k: missing"):
        config.validate(content)


def test_lenient_where_the_meaning_is_clear() -> None:
    c = config.validate(
        changed(
            train__lr="2e-4",
            route__top_k=2,
            route__temperature=0.1,
            corpus__train="a.jsonl",
            train__clip_norm=1,
        )
    )
    assert (
        c.train.lr == 2e-4
        and c.route.top_k == [2]
        and c.corpus.train == ["a.jsonl"]
        and c.train.clip_norm == 1.0
    )


def test_a_wrong_key_stops_a_run_within_three_seconds(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cluster: {kk: 3}\n")
    began = time.monotonic()
    run = subprocess.run(
        [sys.executable, "-m", "snakemake", "-n", "--configfile", str(tmp_path / "c.yaml")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert (
        "cluster.kk: unknown key. Expected a key of config.yaml. Did you mean cluster.k?"
        in run.stdout + run.stderr
    )
    assert "Traceback" not in run.stdout + run.stderr
    assert (
        time.monotonic() - began < 30
    )  # 2 s on a quiet machine; the bound only catches a start of the real work


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 12, 64, 200])
def test_every_phase_two_system_costs_the_same(k: int) -> None:
    c = config.validate(changed(cluster__k=k))
    total = c.train.steps * c.train.batch_size

    def sequences(expert: str) -> int:
        p = plan.train_expert(c, expert)
        return p["n_steps"] * p["batch_size"]

    for group in (["dense"], ["dense-steps"], plan.cluster_experts(c), plan.random_experts(c)):
        assert sum(map(sequences, group)) == pytest.approx(total, rel=max(0.01, k / total))
    assert sequences("dense-steps") == sum(map(sequences, plan.cluster_experts(c)))


def test_dense_and_seed_do_not_depend_on_k() -> None:
    a, b = (config.validate(changed(cluster__k=k)) for k in (4, 7))
    for expert in ("seed", "dense"):
        assert plan.train_expert(a, expert) == plan.train_expert(b, expert)
    assert plan.train_expert(a, "0") != plan.train_expert(b, "0")


def test_one_cluster_is_the_dense_model() -> None:
    c = config.validate(changed(cluster__k=1))
    differ = {"expert", "data"}
    dense = {key: value for key, value in plan.train_expert(c, "dense").items() if key not in differ}
    assert dense == {key: value for key, value in plan.train_expert(c, "0").items() if key not in differ}


def test_keys_of_one_embedder_do_not_touch_the_other() -> None:
    def parameters(**keys: Any) -> list[dict[str, Any]]:
        c = config.validate(changed(**keys))
        return [config.parameters(c, rule) for rule in ("embed", "route", "eval_ensemble")]

    linear, encoded = parameters(), parameters(embed__encoder="me/tiny")
    assert linear == parameters(embed__windows=1, route__window_tokens=8)
    assert (
        encoded
        == parameters(embed__encoder="me/tiny", embed__idf_power=0.5, embed__n_components=3, seed=5)[:2]
        + encoded[2:]
    )
    for key, rule in (("embed__windows", 0), ("route__window_tokens", 1)):
        other = parameters(embed__encoder="me/tiny", **{key: 8})
        assert [a == b for a, b in zip(encoded, other, strict=True)] == [i != rule for i in range(3)]
    assert linear[2] == encoded[2]


def test_seed_share() -> None:
    c = config.validate(changed(train__seed_share=0.75))
    seed = plan.train_expert(c, "seed")
    assert seed["n_steps"] * seed["batch_size"] == 3 * c.train.steps * c.train.batch_size
    assert plan.train_expert(config.validate(changed(model__pretrained="gpt2")), "seed")["n_steps"] == 0


def test_experts_are_listed_once_each() -> None:
    c = config.validate(changed(train__controls=["dense-batch", "dense-steps", "random"], cluster__k=2))
    assert plan.experts(c) == ["0", "1", "dense", "dense-steps", "random-0", "random-1"]
    assert plan.experts(config.validate(changed(train__controls=[], cluster__k=1))) == ["0", "dense"]
