"""The table of routers. A new entry is all that a router needs, from the config to the report."""

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from cbtm_pipeline import config
from cbtm_pipeline.mixture import ensemble, verdict
from cbtm_pipeline.mixture.routers import ROUTERS, HeldOut, Router, Setting
from made_run import DEFAULTS, QUICK, evaluate, make, make_config, make_report_inputs, render
from parsed_page import Page


def toy(held_out: HeldOut, setting: Setting) -> np.ndarray:
    """The paper's weights from distances to the power beta: a router with a parameter that `paper` lacks."""
    assert setting.beta is not None and setting.epsilon is None
    return ensemble.paper_log_weights(held_out.d2_NK**setting.beta, setting.temperature, setting.top_k)


@pytest.fixture
def toy_router(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROUTERS, "toy", Router(toy, parameters=("beta",), colour="c5"))


@pytest.mark.usefixtures("toy_router")
def test_a_new_router_goes_from_the_config_to_the_report(tmp_path: Path):
    route = {**QUICK["route"], "routers": ["paper", "toy"], "beta": [0.5, 2.0]}
    cfg = make_config(outdir=str(tmp_path), cluster={"k": 3}, route=route, eval={"bootstrap": 100})
    files = make(tmp_path, cfg)
    arguments = make_report_inputs(files)

    metrics = evaluate(files)
    rows = [row for row in metrics["systems"] if row["router"] == "toy"]
    assert [(row["top_k"], row["temperature"]) for row in rows] == [
        (k, t) for k in (1, 2, 3) for t in (0.1, 0.5)
    ]
    assert all(row["beta"] in (0.5, 2.0) and row["epsilon"] is None for row in rows)
    (headline,) = (row for row in rows if row["headline"])
    table = files.out.with_name("table.txt").read_text()
    assert f"\n{verdict.label(headline)} *" in table
    assert any(pair["system"] == verdict.label(headline) for pair in metrics["comparisons"])

    text = render(arguments)
    assert f"{verdict.label(headline)} ★" in Page(text).cells
    assert '<li class="c5 ">toy</li>' in text
    assert "Temperature of the router toy" in text
    plot = text.split("<h3>Perplexity relative to dense")[1].split("</figure>")[0]
    colours = re.findall(r'class="name">toy [^<]*</text><path [^>]*class="line (\w+)"', plot)
    assert colours == ["c5"] * 3


@pytest.mark.usefixtures("toy_router")
def test_a_new_router_weighs_the_experts_by_its_own_formula(tmp_path: Path):
    """With beta 1 the toy is the paper's router, and has its numbers; with beta 2 it has not."""
    route = {"routers": ["paper", "toy"], "top_k": [3], "temperature": [0.1]}
    nlls = {}
    for beta in (1.0, 2.0):
        cfg = make_config(
            outdir=str(tmp_path), cluster={"k": 3}, route={**route, "beta": [beta]}, eval={"bootstrap": 100}
        )
        systems = evaluate(make(tmp_path, cfg))["systems"]
        nlls[beta] = {row["router"]: row["nll"] for row in systems if row["system"] == "ensemble"}
    assert nlls[1.0]["toy"] == nlls[1.0]["paper"] == nlls[2.0]["paper"] != nlls[2.0]["toy"]


def refusal(routers: list[str]) -> str:
    content = config.read(DEFAULTS).model_dump()
    content["route"]["routers"] = routers
    with pytest.raises(ValueError) as error:
        config.validate(content)
    return str(error.value)


def test_an_unknown_router_is_refused_with_the_names_of_the_known_ones():
    assert refusal(["paper", "toy"]) == (
        "route.routers.1: 'toy'. Expected 'paper' or 'filter'. Change it in your config."
    )


@pytest.mark.usefixtures("toy_router")
def test_the_refusal_lists_what_the_table_holds():
    assert "Expected 'paper' or 'filter' or 'toy'." in refusal(["tay"])


@pytest.mark.parametrize("name", ROUTERS)
def test_every_entry_fits_the_setting_and_the_style_sheet(name: str):
    router = ROUTERS[name]
    assert set(router.parameters) <= set(Setting._fields)
    css = resources.files("cbtm_pipeline.html").joinpath("report.css").read_text("utf-8")
    assert f".{router.colour} {{" in css


@pytest.mark.parametrize("name", ROUTERS)
def test_every_router_gives_log_weights_of_its_top_k(name: str):
    rng = np.random.default_rng(0)
    logprob_NK = -rng.gamma(2.0, 2.0, (20, 4)).astype(np.float32)
    held_out = HeldOut(logprob_NK, rng.uniform(0, 1, (20, 4)).astype(np.float32), np.array([0, 7, 20]))
    setting = Setting(name, 2, 0.1, **dict.fromkeys(ROUTERS[name].parameters, 0.5))
    logw_NK = ROUTERS[name].log_weights(held_out, setting)
    assert logw_NK.shape == (20, 4) and logw_NK.dtype == np.float64
    assert (np.isfinite(logw_NK).sum(axis=1) == 2).all()
    np.testing.assert_allclose(np.exp(logw_NK).sum(axis=1), 1, atol=1e-12)
    changed = logprob_NK.copy()
    changed[10] -= 3 * rng.uniform(0, 1, 4).astype(np.float32)
    later = ROUTERS[name].log_weights(held_out._replace(logprob_NK=changed), setting)
    np.testing.assert_array_equal(later[:11], logw_NK[:11])
