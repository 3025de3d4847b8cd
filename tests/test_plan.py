"""Plans: what each rule depends on, and that every phase-two system spends the same compute."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest

from cbtm_pipeline import config, plan, plan_added, plan_first
from changed_config import DEFAULT, changed

PRETRAINED = {
    "model__pretrained": "me/model",
    "tokenizer__pretrained": "me/words",
    "embed__encoder": "me/encoder",
}


def validated(**keys: Any) -> config.Config:
    """The default config with dotted keys (section__key) replaced."""
    return config.validate(changed(**keys))


def plans(c: config.Config) -> dict[str, dict[str, Any]]:
    """The content of the plan of every rule and every training."""
    found = {rule: plan.content(c, rule) for rule in plan.RULES if rule != "train_expert"}
    return found | {f"expert {name}": plan.content(c, "train_expert", name) for name in plan.trained(c)}


@pytest.mark.parametrize("k", [1, 2, 3, 4, 7, 12, 64, 200])
def test_every_phase_two_system_costs_the_same(k: int) -> None:
    c = validated(cluster__k=k)
    total = c.train.steps * c.train.batch_size

    def sequences(expert: str) -> int:
        p = plan.train_expert(c, expert)
        return p.n_steps * p.batch_size

    for group in (["dense"], ["dense-steps"], plan.cluster_experts(c), plan.random_experts(c)):
        assert sum(map(sequences, group)) == pytest.approx(total, rel=max(0.01, k / total))
    assert sequences("dense-steps") == sum(map(sequences, plan.cluster_experts(c)))


@pytest.mark.parametrize(("k", "n"), [(2, 1), (4, 1), (4, 2), (6, 3), (9, 3), (15, 5), (64, 8)])
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.5), (32, 0.01), (37, 0.37), (512, 0.99)])
def test_parents_and_their_children_cost_what_experts_cost(
    k: int, n: int, steps: int, batch_size: int, share: float
) -> None:
    keys = {"cluster__k": k, "train__steps": steps, "train__batch_size": batch_size}
    c = validated(**keys, cluster__parents=n, train__first_share=share)
    flat, found = plan.trainings(validated(**keys)), plan.trainings(c)
    parents, children = plan_first.firsts(c), plan.cluster_experts(c)

    def sequences(plans: dict[str, plan.TrainingPlan], names: list[str]) -> int:
        return sum(plans[name].n_steps * plans[name].batch_size for name in names)

    assert len(parents) == n
    assert sequences(found, [*parents, *children]) == sequences(flat, children)
    assert {name: p for name, p in flat.items() if name not in children} == {
        name: p for name, p in found.items() if name not in {*parents, *children}
    }, "the other models stay as they are"
    assert [j for name in parents for j in found[name].groups] == list(range(k)), (
        "each cluster has one parent"
    )
    for name in parents:
        p = found[name]
        mine = [child for child in children if plan.begins_as(c, child) == name]
        assert [found[child].group for child in mine] == list(p.groups)
        assert {found[child].begins for child in mine} == {name} and plan.begins_as(c, name) == "seed"
        assert p.batch_size == found["0"].batch_size, "one learning rate fits both"
        if flat["0"].n_steps > 1:
            assert 0 < found["0"].n_steps < flat["0"].n_steps


@pytest.mark.parametrize("k", [1, 3, 8, 64])
@pytest.mark.parametrize("steps", [1, 2, 7, 200])
@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.5), (32, 0.01), (37, 0.37), (512, 0.99)])
def test_two_rounds_cost_what_one_costs(k: int, steps: int, batch_size: int, share: float) -> None:
    keys = {"cluster__k": k, "train__steps": steps, "train__batch_size": batch_size}
    c = validated(**keys, cluster__second_round=True, train__first_share=share)
    flat, found = plan.trainings(validated(**keys)), plan.trainings(c)
    firsts, experts = plan_first.firsts(c), plan.cluster_experts(c)
    assert {name: p for name, p in flat.items() if name not in experts} == {
        name: p for name, p in found.items() if name not in {*firsts, *experts}
    }, "the other models stay as they are"
    for first, expert in zip(firsts, experts, strict=True):
        assert (
            plan.begins_as(c, expert) == found[expert].begins == first and plan.begins_as(c, first) == "seed"
        )
        assert found[first].n_steps + found[expert].n_steps == flat[expert].n_steps
        assert found[first].batch_size == found[expert].batch_size == flat[expert].batch_size
        assert (found[first].data, found[expert].data) == ("first", "clusters")
        assert found[first].group == found[expert].group == flat[expert].group


def test_the_clusters_of_the_first_round_are_those_of_the_only_one() -> None:
    one, two = validated(), validated(cluster__second_round=True)
    for rule in ("fit_kmeans", "assign", "assign_random", "route"):
        assert plan.content(one, rule) == plan.content(two, rule)


def test_without_parents_plans_say_nothing_of_them() -> None:
    for name, content in plans(validated()).items():
        assert not {"parents", "begins", "children", "first_share"} & set(content), name
    assert plans(validated()) == plans(validated(train__first_share=0.1))


def test_parents_are_a_kind_whose_rate_is_chosen_before_that_of_the_experts() -> None:
    c = validated(cluster__parents=2, train__lr=[0.02, 0.004], train__controls=[])
    assert list(plan.kinds(c)) == ["seed", "parents", "experts", "dense"]
    assert plan.kinds(c)["parents"] == ["parent-0", "parent-1"]
    assert plan.begins_as(c, "3@0.02") == "parent-1" and plan.begins_as(c, "parent-1@0.004") == "seed"
    assert "parent-0" not in plan.evaluated(c) and "parent-0@0.02" in plan.folders(c)


def test_an_added_expert_is_trained_as_long_as_without_parents() -> None:
    c = validated(cluster__parents=2)
    added = plan_added.train_expert(config.validate(config.of_new_text(c, ["law"])), "law")
    assert added.n_steps == c.train.steps and added.begins is None


def test_dense_and_seed_do_not_depend_on_k() -> None:
    a, b = (validated(cluster__k=k) for k in (4, 7))
    for expert in ("seed", "dense"):
        assert plan.train_expert(a, expert) == plan.train_expert(b, expert)
    assert plan.train_expert(a, "0") != plan.train_expert(b, "0")


def test_one_cluster_is_the_dense_model() -> None:
    c = validated(cluster__k=1)
    dense = dataclasses.replace(plan.train_expert(c, "dense"), expert="0", data="clusters")
    assert dense == plan.train_expert(c, "0")


def test_seed_share() -> None:
    c = validated(train__seed_share=0.75)
    seed = plan.train_expert(c, "seed")
    assert seed.n_steps * seed.batch_size == 3 * c.train.steps * c.train.batch_size
    assert plan.train_expert(validated(model__pretrained="gpt2"), "seed").n_steps == 0


def test_dense_large_spends_what_seed_and_experts_spend_and_does_not_depend_on_k() -> None:
    c = validated(train__controls=["dense-large"], train__seed_share=0.6, train__seed_batch_size=7)
    large, seed = plan.train_expert(c, "dense-large"), plan.train_expert(c, "seed")
    total = seed.n_steps * seed.batch_size + c.train.steps * c.train.batch_size
    assert abs(large.n_steps * large.batch_size - total) <= large.batch_size  # of an expert's size: one step
    more = {"train__controls": ["dense-large"], "train__seed_share": 0.6, "train__seed_batch_size": 7}
    assert plan.train_expert(validated(**more, cluster__k=9), "dense-large") == large
    assert [name for name in plan.experts(c) if not plan.branches(name)] == ["dense-large"]


def test_every_rate_of_a_search_is_a_training_that_differs_in_nothing_else() -> None:
    c = validated(train__lr=[0.02, 0.004], cluster__k=2, train__controls=["random", "dense-large"])
    found = plan.trainings(c)
    assert list(found)[:4] == ["seed@0.004", "seed@0.02", "0@0.004", "0@0.02"]
    assert len(found) == 2 * len(plan.trained(c))
    for name, p in found.items():
        expert, _, rate = name.partition("@")
        assert (p.expert, p.lr, p.candidate) == (expert, float(rate), True)
        assert dataclasses.replace(p, lr=0.004) == found[f"{expert}@0.004"]
        assert plan.data_of(name) == plan.data_of(expert)
    kinds = {"seed": ["seed"], "experts": ["0", "1"], "dense": ["dense"], "dense-large": ["dense-large"]}
    assert plan.searched(c) == {**kinds, "random": ["random-0", "random-1"]}


def test_a_seed_that_is_not_trained_has_no_rate_to_search() -> None:
    c = validated(train__lr=[0.02, 0.004], model__pretrained="me/model", train__controls=[])
    assert "seed" not in plan.searched(c) and list(plan.trainings(c))[:2] == ["seed", "0@0.004"]


def test_one_rate_is_no_search_and_leaves_plans_as_they_were() -> None:
    assert plans(validated(train__lr=[0.008])) == plans(validated(train__lr=0.008))
    assert "candidate" not in plan.content(validated(), "train_expert", "0")


def test_experts_are_listed_once_each() -> None:
    c = validated(train__controls=["dense-batch", "dense-steps", "random"], cluster__k=2)
    assert plan.experts(c) == ["0", "1", "dense", "dense-steps", "random-0", "random-1"]
    assert plan.experts(validated(train__controls=[], cluster__k=1)) == ["0", "dense"]


def test_keys_of_one_embedder_do_not_touch_the_other() -> None:
    def of_rules(**keys: Any) -> list[dict[str, Any]]:
        c = validated(**keys)
        return [plan.content(c, rule) for rule in ("embed", "route", "eval_ensemble")]

    linear, encoded = of_rules(), of_rules(embed__encoder="me/tiny")
    assert linear == of_rules(embed__windows=1, route__window_tokens=8)
    assert (
        encoded[:2]
        == of_rules(embed__encoder="me/tiny", embed__idf_power=0.5, embed__n_components=3, seed=5)[:2]
    )
    for key, rule in (("embed__windows", 0), ("route__window_tokens", 1)):
        other = of_rules(embed__encoder="me/tiny", **{key: 8})
        assert [a == b for a, b in zip(encoded, other, strict=True)] == [i != rule for i in range(3)]
    assert linear[2] == encoded[2]


def test_sets_that_are_not_tried_leave_old_plans_as_they_were() -> None:
    content = plan.eval_ensemble(validated(route__hysteresis=[1], route__fix_after=[])).content()
    assert not {"hysteresis", "fix_after"} & set(content)
    content = plan.eval_ensemble(validated(route__hysteresis=[1, 4], route__fix_after=[0])).content()
    assert (content["hysteresis"], content["fix_after"]) == ([1.0, 4.0], [0])


def test_a_plan_cannot_be_changed() -> None:
    seed = plan.train_expert(validated(), "seed")
    with pytest.raises(dataclasses.FrozenInstanceError):
        seed.n_steps = 1  # pyright: ignore[reportAttributeAccessIssue]


def test_a_revision_that_is_not_set_leaves_old_plans_as_they_were() -> None:
    for content in plans(validated()).values():
        assert "revision" not in content
    without, with_revisions = (
        plans(validated(**PRETRAINED, **revisions))
        for revisions in ({}, {f"{section}__revision": "v2" for section in ("model", "tokenizer", "embed")})
    )
    changed = {name for name in without if without[name] != with_revisions[name]}
    assert changed == {"tokenizer", "embed", "expert seed"}
    assert with_revisions["expert seed"]["revision"] == "v2"


def test_the_plan_of_a_record_is_the_plan_of_the_config() -> None:
    """A record is read from JSON and compared with a plan, so no value may be another one afterwards."""
    for c in (validated(), validated(**PRETRAINED), validated(corpus__eval=["held.jsonl"], cluster__k=1)):
        for content in plans(c).values():
            assert json.loads(json.dumps(content)) == content


def test_other_paths_to_a_corpus_are_no_other_plan() -> None:
    paths = {"corpus__train": ["a/*.jsonl"], "corpus__eval": ["held.jsonl"]}
    others = {"corpus__train": ["/b/a.jsonl", "/b/b.jsonl"], "corpus__eval": ["/b/held.jsonl"]}
    assert plans(validated(**paths)) == plans(validated(**others))
    assert plan.shard(validated(**paths)) != plan.shard(validated(**others))
    without = {key: value for key, value in paths.items() if key != "corpus__eval"}
    assert plans(validated(**paths))["shard"] != plans(validated(**without))["shard"]
    assert plans(validated(**paths, corpus__eval_fraction=0.3)) == plans(validated(**paths))


def test_the_tokenizer_of_the_model_has_the_revision_of_the_model() -> None:
    c = validated(model__pretrained="me/model", model__revision="v2")
    assert (plan.tokenizer(c).source, plan.tokenizer(c).revision) == ("me/model", "v2")
    own = validated(model__pretrained="me/model", model__revision="v2", tokenizer__pretrained="me/words")
    assert (plan.tokenizer(own).source, plan.tokenizer(own).revision) == ("me/words", None)


def keys(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and f"{prefix}{name}" != "model__scratch":
            yield from keys(value, f"{prefix}{name}__")
        else:
            yield f"{prefix}{name}", value


def other(value: Any) -> list[Any]:
    """Values unlike this one, of which the schema takes at least one."""
    if isinstance(value, bool):
        return [not value]
    if value is None:
        return [True, "new", 7, "125m", 2]
    if isinstance(value, dict):
        return [value | {"hidden_size": 128}]
    if isinstance(value, list):
        return [value[1:] or ["new.jsonl"], [0.5], [0.8, 0.9], ["new.jsonl"], [7]]
    if isinstance(value, str):
        return ["new", "block", "label", "documents", "steps", "feed-forward", "cosine", "float32"]
    return [value / 2, int(value) + 1, int(value) + 1 << 12, 0.29]


# Another path to the same corpus is no other plan: the text is an input.
NEVER = {"outdir", "corpus__train"} | {key for key, _ in keys(DEFAULT) if key.startswith("run__")}


@pytest.mark.parametrize("key", [key for key, _ in keys(DEFAULT)])
def test_a_changed_key_changes_a_plan_unless_it_is_no_science(key: str) -> None:
    default = dict(keys(DEFAULT))[key]
    needs = (
        PRETRAINED if key.endswith("revision") or key in ("embed__windows", "route__window_tokens") else {}
    )
    needs |= {"corpus__label_field": "domain"} if key == "cluster__by" else {}
    needs |= {"cluster__parents": 2} if key == "train__first_share" else {}
    for value in other(default):
        try:
            changed = validated(**{**needs, key: value})
        except ValueError:
            continue
        if changed != validated(**needs):
            assert (plans(changed) == plans(validated(**needs))) == (key in NEVER)
            return
    raise AssertionError(f"no other value of {key} is valid")
