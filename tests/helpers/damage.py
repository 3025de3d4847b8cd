"""Damage a finished run at random places, and see what each rule makes of it.

    python tests/helpers/damage.py --project FOLDER --n 1000

A bit of one file is flipped, or the file is cut. Then a rule that reads the file runs. It has to refuse
it with one line, or to make the same bytes as before: the damaged byte was not used. FOLDER is a project as
made_project makes it, after a run.
"""

import argparse
import contextlib
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cbtm_pipeline import (
    assign,
    assign_random,
    embed,
    ensemble,
    eval_ensemble,
    fit_kmeans,
    report,
    route,
    score_expert,
    shard,
    train_expert,
)

RULES = (
    assign,
    assign_random,
    embed,
    ensemble,
    eval_ensemble,
    fit_kmeans,
    report,
    route,
    score_expert,
    shard,
)
MODULES = {module.__name__.rpartition(".")[2]: module for module in (*RULES, train_expert)}
READERS = {  # of the files that match, the commands that read them
    "tokenizer/*": ["shard", "fit_kmeans", "route", "train seed", "ensemble"],
    "shards/manifest.json": [
        "embed",
        "fit_kmeans",
        "assign",
        "assign_random",
        "train dense",
        "score 0",
        "route",
    ],
    "shards/train-*": ["embed", "fit_kmeans", "assign", "assign_random", "train dense"],
    "shards/eval-*": ["assign", "assign_random", "train dense", "score 0", "route"],
    "embed/*": ["fit_kmeans", "assign", "route", "ensemble"],
    "cluster/clusterer.npz": ["assign", "route", "ensemble"],
    "cluster/top_terms.json": ["report", "ensemble"],
    "assignments/manifest.json": ["train 0", "eval_ensemble", "report"],
    "assignments/*.arrow": ["train 0", "train 1"],
    "random/manifest.json": ["train random-0", "eval_ensemble"],
    "random/*.arrow": ["train random-0", "train random-1"],
    "experts/seed/*": ["train 0", "score seed", "eval_ensemble", "report"],
    "experts/0/*": ["score 0", "eval_ensemble", "report", "ensemble"],
    "experts/dense/*": ["score dense", "eval_ensemble", "report"],
    "scores/*": ["eval_ensemble"],
    "route/*": ["eval_ensemble"],
    "eval/metrics.json": ["report", "ensemble"],
    "eval/table.txt": ["ensemble"],
}
TIMES = {"metrics.jsonl", "files.json"}  # files that hold times


class Damage(NamedTuple):
    """A flipped bit, or a cut if `bit` is None. `at` is a byte of the file."""

    path: Path
    at: int
    bit: int | None

    def apply(self) -> None:
        content = bytearray(self.path.read_bytes())
        if self.bit is None:
            del content[self.at :]
        else:
            content[self.at] ^= 1 << self.bit
        self.path.unlink()
        self.path.write_bytes(content)


def command_line(command: str, results: Path, out: Path) -> list[str]:
    """The arguments of a command that reads the run in `results` and writes below `out`."""
    rule, _, expert = command.partition(" ")
    tokenizer, shards = results / "tokenizer/tokenizer.json", results / "shards/manifest.json"
    vectors, embedder = results / "embed/manifest.json", results / "embed/embedder.npz"
    clusterer, clusters = results / "cluster/clusterer.npz", results / "assignments/manifest.json"
    experts = sorted((results / "experts").iterdir())
    match rule:
        case "shard":
            args = ["--tokenizer", tokenizer, "--out", out / "shards/manifest.json"]
        case "embed":
            args = ["--shards", shards, "--out", out / "embed/manifest.json"]
        case "fit_kmeans":
            args = ["--vectors", vectors, "--shards", shards, "--tokenizer", tokenizer]
            args += ["--out", out / "cluster/clusterer.npz"]
        case "assign":
            args = ["--shards", shards, "--vectors", vectors, "--clusterer", clusterer]
            args += ["--out", out / "assignments/manifest.json"]
        case "assign_random":
            args = ["--shards", shards, "--out", out / "random/manifest.json"]
        case "train":
            data = "random" if "random" in expert else "assignments" if expert.isdecimal() else "shards"
            args = ["--expert", expert, "--data", results / data / "manifest.json", "--tokenizer", tokenizer]
            seed = ["--seed-model", results / "experts/seed/model.safetensors"] if expert != "seed" else []
            args += [*seed, "--out", out / f"experts/{expert}/model.safetensors", "--work", out / "work"]
        case "score":
            args = ["--expert-weights", results / f"experts/{expert}/model.safetensors", "--shards", shards]
            args += ["--out", out / f"scores/{expert}.npz"]
        case "route":
            args = ["--shards", shards, "--embedder", embedder, "--clusterer", clusterer]
            args += ["--tokenizer", tokenizer, "--out", out / "route/distances.npz"]
        case "eval_ensemble":
            args = [
                "--distances",
                results / "route/distances.npz",
                "--scores",
                *(results / "scores").iterdir(),
            ]
            args += ["--experts", *(folder / "card.json" for folder in experts)]
            args += ["--clusters", clusters, results / "random/manifest.json"]
            args += ["--out", out / "eval/metrics.json"]
        case "ensemble":
            weights = [folder / "model.safetensors" for folder in experts if folder.name.isdecimal()]
            args = [
                "--metrics",
                results / "eval/metrics.json",
                "--embedder",
                embedder,
                "--clusterer",
                clusterer,
            ]
            args += ["--top-terms", results / "cluster/top_terms.json", "--tokenizer", tokenizer]
            args += ["--experts", *weights, "--out", out / "ensemble/files.json"]
            return [str(arg) for arg in args]
        case _:
            args = ["--metrics", results / "eval/metrics.json", "--assignments", clusters, "--shards", shards]
            args += ["--top-terms", results / "cluster/top_terms.json", "--out", out / "report.html"]
            args += ["--training", *(folder / "metrics.jsonl" for folder in experts)]
            return [str(arg) for arg in args]
    return [str(arg) for arg in ["--config", results / "config.json", *args]]


def run(command: str, results: Path, out: Path) -> str | None:
    """Run a command in a child. Returns the one line of its error; None if it has succeeded.

    Raises RuntimeError with what the child has said if it ended in another way.
    """
    rule = command.partition(" ")[0]
    module = MODULES[{"train": "train_expert", "score": "score_expert"}.get(rule, rule)]
    said = out / "said.txt"
    out.mkdir(parents=True)
    if (pid := os.fork()) == 0:
        with said.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            status = _call(module.main, command_line(command, results, out))
            sys.stdout.flush()
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    text = said.read_text(errors="replace")
    if status == 0:
        return None
    if os.waitstatus_to_exitcode(status) != 1:
        raise RuntimeError(f"{command}: status {os.waitstatus_to_exitcode(status)}\n{text}")
    return text.splitlines()[-1]


def _call(main, argv: list[str]) -> int:
    """The exit status: 1 for an error that the command line shows in one line, 2 for any other."""
    sys.argv = ["rule", *argv]
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "))
        return 1
    except BaseException:
        traceback.print_exc()
        return 2
    return 0


def outputs(out: Path) -> dict[str, bytes]:
    """The files that a command has made, but for those with times."""
    files = (path for path in out.rglob("*") if path.is_file() and "tensorboard" not in path.parts)
    skipped = {"said.txt", ".lock", *TIMES}
    return {str(path.relative_to(out)): path.read_bytes() for path in files if path.name not in skipped}


class Trials:
    """Trials on copies of the run in `project`, all in `folder`. Only the damaged file is a real copy."""

    def __init__(self, project: Path, folder: Path):
        self.results, self.folder = project / "results", folder
        self.reference: dict[str, dict[str, bytes]] = {}
        os.chdir(project)

    def files(self) -> Iterator[tuple[Path, list[str]]]:
        """Every file of the run with the commands that read it."""
        for pattern, readers in READERS.items():
            for path in sorted(self.results.glob(pattern)):
                if path.is_file():
                    yield path, readers

    def expected(self, command: str) -> dict[str, bytes]:
        if command not in self.reference:
            out = self.folder / "reference" / command.replace(" ", "-")
            error = run(command, self.results, out)
            assert error is None, error
            self.reference[command] = outputs(out)
        return self.reference[command]

    def trial(self, damage: Damage, readers: list[str]) -> dict[str, str]:
        """What each command makes of the damage: `refused` or `unused`; anything else is a fault."""
        damaged = self.folder / "damaged"
        shutil.rmtree(damaged, ignore_errors=True)
        shutil.copytree(self.results, damaged, copy_function=os.link)
        damage._replace(path=damaged / damage.path.relative_to(self.results)).apply()
        found = {}
        for command in readers:
            expected, out = self.expected(command), self.folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            try:
                error = run(command, damaged, out)
            except RuntimeError as strange:
                found[command] = f"STACK {strange}"
                continue
            same = outputs(out) == expected
            found[command] = "refused" if error else "unused" if same else "USED SILENTLY"
        return found


def draw(rng: random.Random, files: list[tuple[Path, list[str]]]) -> tuple[Damage, list[str]]:
    """A random damage, of which one in four is a cut, and one of the commands that read the file."""
    path, readers = rng.choice(files)
    at = rng.randrange(path.stat().st_size)
    return Damage(path, at, None if rng.random() < 0.25 else rng.randrange(8)), [rng.choice(readers)]


def faults(project: Path, n: int, rng_seed: int, show: bool = False) -> tuple[Counter[str], list[str]]:
    """How n random damages ended, and those that were used or ended in a stack."""
    rng, counts, found = random.Random(rng_seed), Counter(), []
    with tempfile.TemporaryDirectory(dir=project) as folder, contextlib.chdir(project):
        trials = Trials(project, Path(folder))
        files = [(path, readers) for path, readers in trials.files() if path.stat().st_size]
        for i in range(n):
            damage, readers = draw(rng, files)
            for command, end in trials.trial(damage, readers).items():
                counts[end.partition(" ")[0]] += 1
                if end not in ("refused", "unused"):
                    place = damage.path.relative_to(trials.results)
                    found.append(f"{place} at byte {damage.at}, bit {damage.bit}: {command}: {end}")
            if show and (i + 1) % 20 == 0:
                print(f"{i + 1} of {n}: {dict(counts)}", flush=True)
    return counts, found


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--project", required=True, type=Path, help="a project after a run")
    p.add_argument("--n", type=int, default=1000, help="number of damages")
    p.add_argument("--seed", type=int, default=0, help="random seed of their places")
    args = p.parse_args()
    counts, found = faults(args.project.resolve(), args.n, args.seed, show=True)
    print(dict(counts), *found, sep="\n")
    sys.exit(bool(found))
