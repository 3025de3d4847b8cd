"""Commands with a workflow of their own, typed twice: at the same time, or again with something else."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import made_ensemble as made
from cbtm_pipeline import add_expert, config, score
from cbtm_pipeline.base import artifact
from cbtm_pipeline.ops import snakemake_run, worded
from changed_config import changed

HOLD = """\
import sys
from cbtm_pipeline.base import lock
lock.hold(sys.argv[1], name=sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def outdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outdir = tmp_path_factory.mktemp("run") / "results"
    made.make(outdir)
    config.write(config.validate(changed(outdir=str(outdir), cluster__k=3)), outdir / "config.json")
    return outdir


@pytest.fixture(params=[".lock", ".command.lock"])
def at_work(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], Path]]:
    """Lets another process work in a folder: a command, or the Snakemake of one that was killed."""
    processes = []

    def start(folder: Path) -> Path:
        words = [sys.executable, "-c", HOLD, str(folder), request.param]
        processes.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert processes[-1].stdout.readline() == "held\n"
        return folder

    yield start
    for process in processes:
        process.communicate("")


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path): path.read_bytes() for path in files}


@pytest.mark.parametrize("command", ["add-expert", "score"])
def test_a_second_command_at_the_same_time_is_refused_and_writes_nothing(
    outdir: Path, tmp_path: Path, at_work: Any, command: str, capsys
) -> None:
    text = tmp_path / "law.txt"
    text.write_text("court judge")
    first = {"add-expert": outdir / "added/law", "score": outdir / "scored/law"}[command]
    artifact.write_sealed(first / "request.json", artifact.make_meta("request", {"corpus": "of the first"}))
    (first / "config.json").write_text("of the first")
    at_work(first)
    before = contents(first)
    argv: dict[str, tuple[Any, list[object]]] = {
        "add-expert": (add_expert.main, ["law", "--corpus", text, "--tag", "owner=b", "--outdir", outdir]),
        "score": (score.main, [text, "--cores", 1, "--name", "law", "--outdir", outdir]),
    }
    main, words = argv[command]
    assert made.command(main, *words) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert (
        printed.err.startswith(f"{first}: another run is writing here (")
        and "Wait or stop it." in printed.err
    )
    assert contents(first) == before


def asked(**entries: Any) -> dict[str, Any]:
    return artifact.make_meta("request", {"corpus": "a"}, **entries)


def begin(folder: Path, request: dict[str, Any], corpus: Path, dry_run: bool = False) -> None:
    cfg = config.validate(changed(outdir=str(folder), corpus__train=[str(corpus)]))
    with snakemake_run.begun(folder, request, cfg, dry_run):
        assert artifact.read_sealed(folder / "request.json", "request").items() >= request.items()


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    folder = tmp_path / "added/law"
    begin(folder, asked(tags={}), tmp_path / "a.txt", dry_run=True)
    assert not folder.parent.exists()
    begin(folder, asked(tags={}), tmp_path / "a.txt")
    before = contents(folder)
    begin(folder, asked(tags={"licence": "mit"}), tmp_path / "a.txt", dry_run=True)
    begin(folder, asked(tags={}), tmp_path / "a.txt", dry_run=True)
    assert contents(folder) == before


def test_what_an_unusable_attempt_left_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    folder = tmp_path / "added/law"
    begin(folder, asked(corpus={"text_field": "text"}), tmp_path / "a.txt")
    for name in ("shards/manifest.json", "branch.npz", "logs/shard.log"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("of the first attempt")
    begin(folder, asked(corpus={"text_field": "body"}), tmp_path / "a.txt")
    assert not (folder / "shards").exists() and not (folder / "branch.npz").exists()
    assert (folder / "logs/shard.log").exists()
    (folder / "work").mkdir()
    with pytest.raises(ValueError, match="was begun with another corpus. Expected the same command."):
        begin(folder, asked(corpus={"text_field": "text"}), tmp_path / "a.txt")


def test_tags_belong_to_what_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "law/experts").mkdir(parents=True)
    begin(tmp_path / "law", asked(tags={"licence": "mit"}), tmp_path / "a.txt")
    for tags in ({}, {"licence": "cc-by"}):
        with pytest.raises(ValueError, match="was begun with another tags"):
            begin(tmp_path / "law", asked(tags=tags), tmp_path / "a.txt")
        with pytest.raises(ValueError, match="has now another tags"):
            snakemake_run.check_kept(tmp_path / "law", asked(tags=tags))
    snakemake_run.check_kept(tmp_path / "law", asked(tags={"licence": "mit"}))


@pytest.mark.parametrize(
    ("of_a_run", "of_the_command"),
    [
        (
            "corpus: none of the 1 documents is held out. Expected some to measure on. Raise "
            "corpus.eval_fraction or set corpus.eval.",
            "--corpus: none of the 1 documents is held out. Expected some to measure on. Raise "
            "--eval-fraction or give more documents.",
        ),
        (
            "Add documents to corpus.train or lower corpus.eval_fraction.",
            "Add documents to --corpus or lower --eval-fraction.",
        ),
        (
            "a.csv: unknown format. Correct corpus.train or corpus.eval.",
            "a.csv: unknown format. Correct --corpus.",
        ),
        (
            "See q.jsonl; mend the rows or change corpus.max_bad_share.",
            "See q.jsonl; mend the rows or change --max-bad-share.",
        ),
        ("from 0, set corpus.id_field: null: then", "from 0, give --id-field null: then"),
        ("a.parquet: no column text. Set corpus.text_field.", "a.parquet: no column text. Set --text-field."),
    ],
)
def test_advice_names_the_options_of_the_command(of_a_run: str, of_the_command: str) -> None:
    assert worded.with_options(of_a_run, "--corpus") == of_the_command
