"""Runs side by side: groups, the best k, pairs on shared documents, refusals, the table and the page."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cbtm_pipeline.html import comparison_page
from cbtm_pipeline.mixture import comparison, comparison_table
from cbtm_pipeline.mixture.comparison import Documents, Finished
from parsed_page import Page

N = 40  # documents
NLL = np.linspace(20, 60, N)  # of a run of loss 0


def row(system: str, nll: float, k: int, **more: Any) -> dict[str, Any]:
    ratios = {"dense": {"ratio": math.exp(nll), "ci95": [0.9 * math.exp(nll), 1.1 * math.exp(nll)]}}
    about = {"router": None, "top_k": None, "hysteresis": None, "fix_after": None, "calibrated": True}
    about |= {"headline": False, "calibration_nll": nll, "n_active": 1, "passes": 1.0, "train_flops": 1e15}
    figures = {"perplexity": 50 * math.exp(nll), "bits_per_byte": 2 + nll, "ratios": ratios}
    named = {"ratio_to_dense": ratios["dense"]["ratio"], "ci95": ratios["dense"]["ci95"]}
    return {"system": system, "k": k, **about, **figures, **named, **more}


def run(name: str, k: int = 2, steps: int = 10, seed: int = 0, nll: float = -0.1, **more: Any) -> Finished:
    """A run whose ensemble is `nll` nats per token better than dense."""
    ensemble = {"router": "filter", "top_k": k, "n_active": k, "passes": float(k), "headline": True}
    flops = 1e14 * steps
    systems = [
        row("dense", 0.0, k, train_flops=flops),
        row("dense-large", 0.1, k, train_flops=2 * flops),
        row("oracle", -0.2, k),
    ]
    systems[2]["n_active"] = systems[2]["passes"] = None
    metrics = {
        "k": k,
        "dense": "batch",
        "n_documents": N,
        "comparisons": [],
        "made_with": {"bootstrap": 200, "rng_seed": 0},
        "systems": [*systems, row("ensemble", nll, k, **ensemble, train_flops=flops)],
    }
    rng = np.random.default_rng(seed)
    documents = Documents(
        np.array([f"d{i}" for i in rng.permutation(N)]),
        np.ones(N, bool),
        np.full(N, 10),
        np.full(N, 40),
        {},
    )
    order = [int(doc_id[1:]) for doc_id in documents.doc_id_D]
    documents = documents._replace(nll_D={"ensemble": (NLL + 10 * nll)[order]})
    settings = {"cluster.k": k, "train.steps": steps, "seed": seed, "embed.max_df": 0.5}
    sizes = {"0": 100, "dense": 100, "dense-large": 300}
    found = Finished(
        name, Path(name), settings, metrics, 1000 * steps, sizes, "held", "text", "tok", documents
    )
    return found._replace(**more)


def grid() -> list[Finished]:
    """k = 1 is best at the small budget, k = 4 at the large one, each with two seeds."""
    losses = {(1, 10): -0.1, (4, 10): 0.1, (1, 80): -0.2, (4, 80): -0.5}
    return [
        run(f"{k},{steps},{seed}", k, steps, seed, nll + 0.02 * seed)
        for (k, steps), nll in losses.items()
        for seed in (0, 1)
    ]


def test_runs_that_differ_in_their_seed_alone_are_one_point() -> None:
    found = comparison.compare(grid())
    assert found["differs"] == ["cluster.k", "train.steps", "seed"] and found["unit"] == "perplexity"
    assert len(found["groups"]) == 4
    first = found["groups"][0]
    assert first["runs"] == ["1,10,0", "1,10,1"] and first["ratio"] == pytest.approx(math.exp(-0.09))
    assert first["ci95"] is None, "two seeds are too few for an interval"


def test_runs_of_several_k_that_try_all_experts_differ_in_k_alone() -> None:
    """route.top_k: [1, 2, 4, all], the default, is another list for each k."""
    runs = [run("a", k=2, nll=-0.1), run("b", k=8, nll=-0.2)]
    for one in runs:
        one.settings["route.top_k"] = sorted({1, 2, 4, one.metrics["k"]})
    found = comparison.compare(runs)
    assert found["differs"] == ["cluster.k"]
    assert [(row["k"], row["tried"]) for row in found["best_k"]] == [(8, [2, 8])]
    runs[0].settings["route.top_k"] = [2]
    assert comparison.compare(runs)["differs"] == ["cluster.k", "route.top_k"], "only one has tried top-1"


def test_three_seeds_have_an_interval() -> None:
    runs = [run(str(seed), seed=seed, nll=nll) for seed, nll in enumerate((-0.1, -0.14, -0.12))]
    (group,) = comparison.compare(runs)["groups"]
    half = 4.302653 * 0.02 / math.sqrt(3)  # Student's t with two degrees of freedom
    assert group["ci95"] == pytest.approx([math.exp(-0.12 - half), math.exp(-0.12 + half)])
    assert "[0.844, 0.932]" in comparison_table.text(comparison.compare([*runs, run("more", k=4, seed=0)]))


def with_steps(run: Finished) -> Finished:
    """The run with a dense model that is stronger than `dense`."""
    run.settings["train.controls"] = ["dense-steps"]
    dense, steps, *_ = run.metrics["systems"]
    steps |= {"system": "dense-steps", "perplexity": 0.9 * dense["perplexity"], "train_flops": 1e15}
    for system in run.metrics["systems"]:
        system["ratios"]["dense-steps"] = {"ratio": 1.05, "ci95": [1.0, 1.1]}
    return run


def test_seeds_are_compared_with_a_dense_model_that_all_of_them_have() -> None:
    first, *others = [run(str(seed), seed=seed, nll=-0.1) for seed in range(3)]
    content = comparison.compare([with_steps(first), *others])
    assert content["runs"][0]["dense"] == "dense-steps"
    (group,) = content["groups"]
    assert group["dense"] == "dense" and group["ratio"] == pytest.approx(math.exp(-0.1))
    (group,) = comparison.compare([first, *map(with_steps, others)])["groups"]
    assert group["dense"] == "dense-steps" and group["ratio"] == pytest.approx(1.05)


def test_a_run_that_adds_a_control_is_the_same_point_against_the_stronger_dense_model() -> None:
    plain, more = run("plain", nll=-0.1), with_steps(run("more", nll=-0.1))
    (group,) = comparison.compare([plain, more])["groups"]
    assert group["runs"] == ["more"] and group["ratio"] == pytest.approx(1.05)


def test_the_best_k_grows_with_the_budget() -> None:
    best = comparison.compare(grid())["best_k"]
    assert [(row["n_tokens"], row["k"], row["tried"]) for row in best] == [
        (10000, 1, [1, 4]),
        (80000, 4, [1, 4]),
    ]


def test_budgets_that_differ_by_rounding_are_one() -> None:
    runs = [run("a", k=3, nll=-0.1)._replace(n_tokens=1_000_003), run("b", k=4)._replace(n_tokens=1_000_000)]
    assert [row["k"] for row in comparison.compare(runs)["best_k"]] == [3]


def test_any_model_of_a_run_is_in_the_table_with_its_own_size() -> None:
    models = {row["model"]: row for row in comparison.compare([run("a")])["runs"][0]["models"]}
    assert models["dense-large"]["active_parameters"] == 300 and models["dense"]["active_parameters"] == 100
    assert (
        models["filter all-2"]["active_parameters"] == 200 and models["oracle"]["active_parameters"] is None
    )


def test_a_pair_is_on_the_documents_that_both_report_whatever_their_order() -> None:
    a, b = run("a", seed=1, nll=-0.3), run("b", seed=2, nll=-0.1)
    a.documents.is_reported_D[:10] = False
    b.documents.is_reported_D[5:20] = False
    ids = [set(x.documents.doc_id_D[x.documents.is_reported_D]) for x in (a, b)]
    (pair,) = comparison.compare([b, a])["pairs"]
    assert (pair["run"], pair["against"], pair["n_documents"]) == ("a", "b", len(ids[0] & ids[1]))
    assert pair["ratio"] == pytest.approx(math.exp(-0.2)) and pair["ci95"] == pytest.approx(
        [pair["ratio"]] * 2
    )


def test_too_few_shared_documents_give_no_ratio() -> None:
    a, b = run("a"), run("b", nll=0.0)
    a.documents.is_reported_D[5:] = False
    content = comparison.compare([a, b])
    assert content["pairs"][0]["ratio"] is None and "too few documents" in comparison_table.text(content)


def test_many_runs_are_compared_with_the_best_and_with_those_one_change_away() -> None:
    pairs = {(pair["run"], pair["against"]) for pair in comparison.compare(grid())["pairs"]}
    assert {pair for pair in pairs if "4,80,0" not in pair} == {
        ("1,10,0", "4,10,0"),  # another k, at the same budget and seed
        ("1,10,1", "4,10,1"),
        ("4,80,1", "1,80,1"),
    }
    assert len({pair for pair in pairs if pair[0] == "4,80,0"}) == 7


def test_one_change_may_come_with_other_steps_if_the_compute_is_equal() -> None:
    runs = grid()
    changed = run("less seed", k=1, steps=15, nll=0.3)
    changed.settings["train.seed_share"] = 0.25
    pair = ("1,10,0", "less seed")
    found = [(p["run"], p["against"]) for p in comparison.compare([*runs, changed])["pairs"]]
    assert pair not in found, "1.5 times the compute"
    for system in changed.metrics["systems"]:
        system["train_flops"] = 1e15
    found = [(p["run"], p["against"]) for p in comparison.compare([*runs, changed])["pairs"]]
    assert pair in found


def test_other_tokenizers_compare_by_byte_and_say_so() -> None:
    other = run("b", nll=0.0, held_out="other ids", tokenizer="other")
    content = comparison.compare([run("a", nll=-0.4), other])
    assert content["unit"] == "bits_per_byte" and content["pairs"][0]["per"] == "byte"
    assert content["pairs"][0]["ratio"] == pytest.approx(math.exp(-0.1)), "40 bytes have 10 tokens"
    assert "compare bits per byte" in comparison_table.text(content)


def test_nothing_is_said_of_pairs_where_there_is_one_run() -> None:
    alone, two = (comparison.compare([run(name) for name in names]) for names in (["a"], ["a", "b"]))
    told = "own documents; pairs"
    assert told in str(comparison_table.notes(two)) and told not in str(comparison_table.notes(alone))


def test_other_held_out_text_is_refused_in_one_line() -> None:
    other = run("b", held_out="other ids", text="other text")
    with pytest.raises(ValueError, match=r"^b: cannot be compared with a: other held-out text\. .*$"):
        comparison.compare([run("a"), other])


def test_other_parts_of_the_documents_are_refused() -> None:
    other = run("b", tokenizer="other", held_out="other ids")
    other.documents.n_bytes_D[3] = 39
    with pytest.raises(ValueError, match="other parts of the held-out documents were scored"):
        comparison.compare([run("a"), other])


def test_every_row_has_plain_values_and_every_number_is_json() -> None:
    content = comparison.compare(grid())
    assert json.loads(json.dumps(content)) == content
    rows = comparison_table.flat_rows(content)
    assert len(rows) == 8 * 4
    assert all(isinstance(value, str | int | float | None) for row in rows for value in row.values())
    assert rows[0]["setting_cluster.k"] == "1"


def test_the_table_names_settings_shortly_and_fits() -> None:
    text = comparison_table.text(comparison.compare(grid()))
    header = text.splitlines()[0].split()
    assert header[:4] == ["run", "k", "steps", "seed"]
    assert "best k" in text and max(map(len, text.splitlines())) < 130


@pytest.mark.parametrize("runs", [grid(), grid()[:1], grid()[:2]])
def test_the_page_shows_all_runs_with_labelled_axes(runs: list[Finished]) -> None:
    page = comparison_page.render(comparison.compare(runs), "A study")
    Page(page)
    assert all(run.name in page for run in runs)
    assert page.count(">training FLOPs, the seed&#x27;s included</text>") == 1
    assert (">training tokens of all experts together</text>" in page) == (len(runs) > 2)
    assert "http" not in page and "<script" not in page and "@media print" in page


def test_names_that_are_markup_are_escaped() -> None:
    page = comparison_page.render(comparison.compare([run("<i>a", k=2), run("b", k=4)]), "<u>")
    assert "<i>a" not in page and "<u>" not in page
