"""`cbtm score`: perplexity and bits per byte of any text."""

import argparse
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import made_ensemble as made
from cbtm_pipeline import config, score
from cbtm_pipeline.base import artifact
from cbtm_pipeline.corpus import encoding, rows
from cbtm_pipeline.inference import loaded, package
from changed_config import changed

SHORT = made.text(5, rng_seed=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made.make(tmp_path_factory.mktemp("run") / "results")


def scored(capsys: pytest.CaptureFixture, folder: Path, *argv: object) -> list[dict[str, Any]]:
    assert made.command(score.main, *argv, "--model", folder, "--json") == 0
    return json.loads(capsys.readouterr().out)["files"]


def by_system(found: dict[str, Any]) -> dict[str, float]:
    return {row["system"]: row["nll"] for row in found["systems"]}


def test_the_number_of_a_short_text_is_that_of_the_model(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(SHORT)
    ensemble = loaded.load(folder, "x")
    ids = [ensemble.separator, *ensemble.tokenizer(SHORT, add_special_tokens=False).input_ids]
    assert len(ids) <= made.CONTEXT
    (found,) = scored(capsys, folder, tmp_path / "a.txt")

    def nll(model: Any) -> float:
        ids_1T = torch.tensor([ids])
        logprob_TV = model(ids_1T[:, :-1]).logits[0].log_softmax(-1)
        return -logprob_TV.gather(1, ids_1T[0, 1:, None]).mean().item()

    assert by_system(found)["ensemble"] == pytest.approx(nll(ensemble.model), abs=1e-5)
    with torch.no_grad():
        for j in range(3):
            assert by_system(found)[f"expert {j}"] == pytest.approx(nll(ensemble.model.expert(j)), abs=1e-5)
    row = found["systems"][0]
    assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
    bits = row["nll"] * found["n_tokens"] / len(SHORT.encode()) / math.log(2)
    assert row["bits_per_byte"] == pytest.approx(bits) and found["n_bytes"] == len(SHORT.encode())


def test_the_baselines_of_a_run_are_beside_it_and_a_copy_has_none(
    folder: Path, tmp_path: Path, capsys
) -> None:
    (tmp_path / "a.txt").write_text(SHORT)
    experts = [f"expert {j}" for j in range(3)]
    assert list(by_system(scored(capsys, folder, tmp_path / "a.txt")[0])) == [
        *("ensemble", *experts, "dense", "seed")
    ]
    package.copy(folder, tmp_path / "copy")
    assert list(by_system(scored(capsys, tmp_path / "copy", tmp_path / "a.txt")[0])) == ["ensemble", *experts]


def test_every_format_gives_the_same_numbers(folder: Path, tmp_path: Path, capsys) -> None:
    texts = [made.text(40, i) for i in range(3)]
    lines = "".join(json.dumps({"body": text, "id": i}) + "\n" for i, text in enumerate(texts))
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(pa.table({"body": texts}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text("\n\n".join(texts))
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.txt")]
    found = scored(capsys, folder, *names, "--text-field", "body", "--txt-documents", "block")
    assert [row["file"] for row in found] == [str(name) for name in names]
    assert len({json.dumps({**row, "file": ""}) for row in found}) == 1
    assert found[0]["n_documents"] == 3
    alone = scored(capsys, folder, names[0], "--text-field", "body")
    assert by_system(alone[0])["ensemble"] == pytest.approx(by_system(found[0])["ensemble"], abs=1e-6)


def test_a_long_text_is_read_in_windows(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(made.text(200))
    (whole,) = scored(capsys, folder, tmp_path / "a.txt")
    assert whole["n_tokens"] > 5 * made.CONTEXT
    (narrow,) = scored(capsys, folder, tmp_path / "a.txt", "--context", 8, "--stride", 1)
    assert narrow["n_tokens"] == whole["n_tokens"] and by_system(narrow) != by_system(whole)
    assert np.isfinite(list(by_system(narrow).values())).all()


def test_people_get_a_line_for_each_system(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(SHORT)
    assert made.command(score.main, tmp_path / "a.txt", "--outdir", folder.parent) == 0
    about, header, *lines = capsys.readouterr().out.splitlines()
    assert about.startswith(f"{tmp_path / 'a.txt'}: 1 documents, ") and header.split()[0] == "perplexity"
    assert [line.rsplit(None, 2)[0].strip() for line in lines] == [
        *("ensemble", "expert 0", "expert 1", "expert 2", "dense", "seed")
    ]


def test_rows_that_cannot_be_used_are_left_out_and_named(folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a\x1b[2J.jsonl"
    path.write_text(json.dumps({"text": SHORT}) + '\n{"text": 7}\nno json\n')
    assert made.command(score.main, path, "--model", folder) == 0
    told = capsys.readouterr()
    assert "2 left out, the first is row 2: text is not a string" in told.err
    assert "\x1b" not in told.out + told.err


def test_ids_of_rows_do_not_matter(folder: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": SHORT, "id": i}) + "\n" for i in ("x", "x", [1])))
    (found,) = scored(capsys, folder, path)
    assert found["n_documents"] == 3 and not found["left_out"]


def test_a_row_of_which_the_tokenizer_leaves_nothing_is_left_out(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "a.txt").write_text("xxx\n\nbutter")
    args = argparse.Namespace(text_field="text", txt_documents="block")
    encoder = encoding.TokenEncoder(tmp_path / "tokenizer.json")
    first, second = score.read_file(tmp_path / "a.txt", args, encoder, 0)
    assert isinstance(first, rows.BadRow) and first.reason == rows.NO_TOKENS
    assert not isinstance(second, rows.BadRow) and len(second[0]) > 1 and second[1] == len("butter")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "no such file"),
        ("a.pdf", "x", "unknown format"),
        ("a.txt", " \n", "no document"),
        ("a.jsonl", '{"body": "x"}\n', "no document (row 1: no text field"),
        ("a.jsonl.gz", "no gzip", "not .gz data"),
        ("a.parquet", "no parquet", "a.parquet"),
    ],
)
def test_bad_files_end_in_one_line(
    folder: Path, tmp_path: Path, name: str, content: str | None, said: str, capsys
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    for jobs in ([], ["--cores", 1]):
        assert made.command(score.main, tmp_path / name, "--model", folder, *jobs) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and line.startswith(str(tmp_path / name))


def test_jobs_that_cannot_be_asked_for_end_in_one_line(folder: Path, tmp_path: Path, capsys) -> None:
    text, run, bare = tmp_path / "a.txt", tmp_path / "run", tmp_path / "bare"
    text.write_text(SHORT)
    made.make(run)
    config.write(config.validate(changed(outdir=str(run), cluster__k=3)), run / "config.json")
    (tmp_path / "b\udcff.txt").write_text(SHORT)
    capsys.readouterr()
    for argv, line in {
        (text, "--name", "x"): "--name: without jobs. Expected --profile or --cores",
        (text, "--dry-run"): "--dry-run: without jobs. Expected --profile or --cores",
        (text, "--cores", 1, "--name", "a/b"): "--name: 'a/b'. Expected letters, digits",
        (text, "--cores", 1, "--context", 1): "--context: 1. Expected 2 or more",
        (text, "--cores", 1, "--exclude", "9"): "exclude: 9. Expected 0, 1, 2.",
        (tmp_path / "b\udcff.txt", "--cores", 1): "a name that is not UTF-8. Expected one that is",
        (text, "--cores", 1, "--model", folder, "--outdir", bare): f"{bare}/config.json: no such file.",
    }.items():
        argv = argv if "--model" in argv else (*argv, "--outdir", run)
        assert made.command(score.main, *argv) == 1, argv
        told = capsys.readouterr()
        assert told.out == "" and told.err.count("\n") == 1 and line in told.err, told.err
    assert not (run / "scored").exists() and not bare.exists()


def test_settings_that_only_the_model_has_are_refused(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(SHORT)
    for key, value in {"mode": "merge", "route": "once"}.items():
        made_folder = made.make(tmp_path / key)
        changed = json.loads((made_folder / "config.json").read_text()) | {key: value}
        (made_folder / "config.json").write_text(json.dumps(changed))
        assert made.command(score.main, tmp_path / "a.txt", "--model", made_folder) == 1
        assert "another file than it was" in capsys.readouterr().err
        record = json.loads((made_folder / "files.json").read_text())
        files = {**record["files"], "config.json": artifact.identity(made_folder / "config.json")}
        del record["seal"]
        artifact.write_sealed(made_folder / "files.json", {**record, "files": files})
        assert made.command(score.main, tmp_path / "a.txt", "--model", made_folder) == 1
        assert f"{key} {value!r}. Expected " in capsys.readouterr().err


def test_a_window_beyond_the_positions_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "a.txt").write_text(SHORT)
    assert made.command(score.main, tmp_path / "a.txt", "--model", folder, "--context", 33) == 1
    assert capsys.readouterr().err.startswith("--context: 33. Expected at most 32. ")
