import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cbtm_pipeline import config
from changed_config import changed

ROOT = Path(__file__).parents[1]


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
        ({"zzz": 3}, r"^zzz: unknown key\. Expected a key of config\.yaml\. Remove it\.$"),
        (
            {"grid": {}},
            r"^grid: a key of a study\. .* workflow/study.smk --configfile FILE --cores 2\.$",
        ),
        ({"topk": 3}, "topk: unknown key. .*Did you mean route.top_k?"),
        ({"train__learning_rate": 1e-3}, "train.learning_rate: unknown key"),
        ({"cluster__by": "label"}, "cluster.by: label without corpus.label_field. Expected the field"),
        ({"cluster__by": "labels"}, "cluster.by: 'labels'. Expected 'text', 'label' or 'label.text'"),
        ({"corpus__textfield": "x"}, "Did you mean corpus.text_field"),
        ({"eval__top_k": 3}, "Did you mean route.top_k"),
        ({"cluster__k": 0}, r"cluster.k: 0\. Expected greater than or equal to 1"),
        ({"cluster__k": "4"}, r"cluster.k: '4'\. Expected integer"),
        ({"cluster__k": True}, r"cluster.k: True\. Expected integer"),
        (
            {"cluster__parents": 3},
            r"cluster.parents: 3. Expected a number below cluster.k, 4, that divides it. Choose 1 or 2, or",
        ),
        ({"cluster__parents": 4}, "cluster.parents: 4. Expected a number below cluster.k, 4"),
        ({"cluster__parents": 1, "cluster__k": 1}, "below cluster.k, 1, that divides it. Set it to null"),
        (
            {"cluster__second_round": True, "cluster__parents": 2},
            r"cluster.second_round: true with cluster.parents 2. Expected one of the two. Set cluster.second",
        ),
        ({"cluster__second_round": True, "cluster__border_share": 0.1}, "true with cluster.border_share 0.1"),
        ({"train__first_share": 1.0}, r"train.first_share: 1.0\. Expected less than 1"),
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
        ({"route__routers": []}, r"route.routers: \[\]. Expected at least one value"),
        ({"route__hysteresis": [0.5]}, r"route.hysteresis.0: 0.5\. Expected greater than or equal to 1"),
        ({"route__hysteresis": []}, r"route.hysteresis: \[\]. Expected at least one value"),
        ({"route__fix_after": [-1]}, r"route.fix_after.0: -1\. Expected greater than or equal to 0"),
        ({"model__pretrained": ""}, "model.pretrained: ''. Expected a name, or null"),
        ({"model__revision": "v2"}, "model.revision: v2 without model.pretrained. Expected the name"),
        ({"embed__revision": "v2"}, "embed.revision: v2 without embed.encoder"),
        ({"tags": {"licence": ""}}, "tags.licence: ''. Expected a name"),
        ({"tags": {"licence": 3}}, "tags.licence: 3. Expected string"),
        ({"tags": "cc-by"}, "tags: 'cc-by'. Expected dict"),
        ({"tags": {"a b": "x"}}, "tags.*a b.*Expected"),
        ({"tags": {"experts": "3"}}, "tags.experts: '3'. Expected tags by expert, such as"),
        ({"tags": {"experts": {"3": "mit"}}}, "tags.experts: .* Expected tags by expert"),
        ({"tags": {"experts": {"0": {"licence": 3}}}}, "tags.experts.0.licence: 3. Expected string"),
        ({"tags": {"experts": {"0": {"a b": "x"}}}}, "tags.experts.0: 'a b'. Expected a key without spaces"),
        (
            {"cluster__k": 3, "tags": {"experts": {"3": {"licence": "mit"}}}},
            "tags.experts.3: no expert of this run. Expected 0 to 2, by cluster.k.",
        ),
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


def test_the_config_of_an_older_version_is_read() -> None:
    content = changed()
    for section in ("tokenizer", "embed", "model"):
        del content[section]["revision"]
    del content["route"]["hysteresis"], content["route"]["fix_after"], content["tags"]
    same = config.validate(changed(route__hysteresis=[1], route__fix_after=[]))
    assert config.validate(content) == same


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


def test_a_wrong_key_stops_a_run_before_anything_is_planned(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cluster: {kk: 3}\n")
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
    assert not list(tmp_path.rglob("results")) and "Building DAG" not in run.stdout + run.stderr


def test_one_expert_has_another_licence_than_the_others() -> None:
    tags = {"licence": "cc-by", "owner": "me", "experts": {1: {"licence": "mit"}}}
    found = config.validate(changed(cluster__k=3, tags=tags)).tags
    assert config.tags_of(found, "1") == {"licence": "mit", "owner": "me"}
    assert config.tags_of(found, "0") == config.tags_of(found, "dense") == {"licence": "cc-by", "owner": "me"}
