"""`cbtm route`: which experts a text gets, and why."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import made_ensemble as made
from cbtm_pipeline import route_text
from cbtm_pipeline.inference import loaded, mixture

TEXT = made.text(6, rng_seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results")


@pytest.mark.parametrize("settings", [{}, {"n_active": 1}, {"router": "paper", "n_active": 2}])
def test_the_weights_are_those_of_the_model(folder: Path, settings: dict) -> None:
    ensemble = loaded.load(folder, "x", **settings)
    ids = [ensemble.separator, *ensemble.tokenizer(TEXT, add_special_tokens=False).input_ids]
    out = ensemble.model(torch.tensor([ids]), output_router_weights=True)
    routed = route_text.route(mixture.read(folder, **settings), TEXT)
    assert np.allclose(routed.w_NK, out.router_log_weights[0].exp().numpy(), atol=1e-5)
    assert "".join(routed.pieces) == TEXT


def test_the_terms_add_up_to_the_distance(folder: Path) -> None:
    found = mixture.read(folder)
    routed = route_text.route(found, TEXT)
    h_D = found.E_VD[_ids(folder)].sum(axis=0)
    h_D /= np.linalg.norm(h_D)
    order = np.argsort(routed.d2_K)
    shares = np.array([(own, other) for _, _, own, other in routed.deciding])
    for total, j in zip(shares.sum(axis=0), order, strict=False):
        assert 1 + (found.centres_KD[j] ** 2).sum() - total == pytest.approx(routed.d2_K[j], abs=1e-4)
        assert ((h_D - found.centres_KD[j]) ** 2).sum() == pytest.approx(routed.d2_K[j], abs=1e-4)
    gains = [own - other for _, _, own, other in routed.deciding]
    assert gains == sorted(gains, reverse=True)


def _ids(folder: Path) -> list[int]:
    return loaded.load(folder, "x").tokenizer(TEXT, add_special_tokens=False).input_ids


def test_people_get_experts_and_terms(folder: Path, capsys) -> None:
    assert made.command(route_text.main, TEXT, "--model", folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "router filter, top_k 3, temperature 0.3, epsilon 0.1, beta 0.5" in lines[0]
    weights = [float(line.split()[1]) for line in lines[3:6]]
    assert sum(weights) == pytest.approx(100, abs=0.2) and weights == sorted(weights, reverse=True)
    assert {tuple(line.split()[6:]) for line in lines[3:6]} == {
        ("butter", "flour"), ("ship", "mast"), ("rose", "soil")
    }  # fmt: skip
    assert lines[7].startswith("Terms, and what each takes off the distance to expert ")


def test_a_file_is_read_and_a_text_is_not(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    printed = []
    for argument in (TEXT, tmp_path / "a.txt"):
        assert made.command(route_text.main, argument, "--model", folder) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert made.command(route_text.main, "x" * 5000, "--model", folder) == 0, "too long for a file's name"


def test_the_page_shows_any_text_as_text(folder: Path, tmp_path: Path, capsys) -> None:
    text, page = "<script>alert('&')</script>\x1b[2J é 日\n" + TEXT, tmp_path / "page.html"
    assert made.command(route_text.main, text, "--model", folder, "--html", page) == 0
    content = page.read_text("utf-8")
    assert "<script" not in content and "\x1b" not in content + capsys.readouterr().out
    spans = re.findall(
        r'<span title="expert \d: \d+ %[^"]*" style="background: hsl\([^"]*\)">([^<]*)</span>', content
    )
    shown = html.unescape("".join(spans))
    assert shown == text.replace("\x1b", "\\x1b"), "every token is there, in order"


def test_a_text_without_a_known_term_is_equally_far_from_all(folder: Path, capsys) -> None:
    found = mixture.read(folder)
    empty = found._replace(E_VD=np.zeros_like(found.E_VD))
    routed = route_text.route(empty, "butter")
    assert routed.deciding == [] and (routed.d2_K == 1).all()
    assert "equally far" in route_text.lines(empty, routed)[-1]
    assert "<h2>Terms</h2>" in route_text.html(empty, routed)


def test_one_expert_has_no_rival(tmp_path: Path, capsys) -> None:
    folder = made.make(tmp_path / "results", terms=[["butter"]], rows=[made.row(3.0, top_k=1)])
    assert made.command(route_text.main, TEXT, "--model", folder, "--html", tmp_path / "a.html") == 0
    assert "100.0 %" in capsys.readouterr().out


def test_no_text_ends_in_one_line(folder: Path, capsys) -> None:
    assert made.command(route_text.main, "", "--model", folder) == 1
    assert capsys.readouterr().err.startswith("TEXT: empty. ")
