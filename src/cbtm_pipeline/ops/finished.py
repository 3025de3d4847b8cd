"""Read finished runs, to compare them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline import config, plan, plan_first
from cbtm_pipeline.base import artifact
from cbtm_pipeline.mixture.comparison import Documents, Finished
from cbtm_pipeline.ops import planned, which_run
from cbtm_pipeline.provenance import records, stale

# What decides no result: where a run lies, how it behaves, and what it says of its text.
NO_SETTINGS = ("outdir", "run.", "tags")
LATER = ("report", "ensemble")  # what a run makes after its metrics


def read(folder: Path) -> Finished:
    """Read a finished run. Raises ValueError if it is none, OSError if a file cannot be read."""
    path = folder / "config.json"
    if not path.is_file():
        what, todo = "no run", "Name one"
        if found := which_run.of_study(folder):
            what, todo = "a study", f"Name some of its runs: {' '.join(map(str, found[:2]))}"
        raise ValueError(f"{folder}: {what}. Expected the outdir of a run, with its config.json. {todo}.")
    whole = config.read(path)
    tasks = whole.eval.model_copy(update={"tasks": []})  # which nothing here compares
    cfg = whole.model_copy(update={"outdir": str(folder), "eval": tasks})
    for job, state in stale.look(cfg, reads_corpus=False).items():
        if state.runs and job.rule not in LATER:
            why = state.reasons[0].what if state.reasons else "its input is made again"
            raise ValueError(
                f"{folder}: not finished ({job}: {' '.join(why.split()).rstrip('.')}). Expected a finished "
                f"run. Finish it: snakemake --cores 2 --configfile {path}"
            )
    cards = {name: records.read(folder, "train_expert", name) for name in plan.trained(cfg)}
    experts = [*plan_first.firsts(cfg), *plan.cluster_experts(cfg)]
    shards = records.read(folder, "shard")
    texts = [entry["identity_columns"]["text"] for entry in shards["shards"] if entry["split"] == "eval"]
    return Finished(
        name=folder.resolve().name,
        folder=folder,
        settings=settings(whole),
        metrics=records.read(folder, "eval_ensemble"),
        n_tokens=sum(cards[name]["n_train_tokens"] for name in experts),
        n_parameters={name: card["n_parameters"] for name, card in cards.items()},
        held_out=shards["identity_eval"],
        text=artifact.fingerprint(texts),
        tokenizer=shards["made_from"]["tokenizer"],
        documents=_documents(folder / records.DOCUMENTS),
    )


def read_all(folders: Sequence[Path]) -> list[Finished]:
    """Read several runs. Where two folders have the same name, their paths are the names of the runs."""
    for i, folder in enumerate(folders):
        if folder.resolve() in [other.resolve() for other in folders[:i]]:
            raise ValueError(f"{folder}: named twice. Expected each run once. Name another run.")
    runs = [read(folder) for folder in folders]
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def settings(cfg: config.Config) -> dict[str, Any]:
    """The values that decide results, by config key."""
    flat = planned.flat(cfg.model_dump())
    return {key: value for key, value in flat.items() if not key.startswith(NO_SETTINGS)}


def _documents(path: Path) -> Documents:
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    nll = {name.removeprefix("nll_"): own for name, own in columns.items() if name.startswith("nll_")}
    is_reported_D = columns["used_for"] == "report"
    return Documents(columns["doc_id"], is_reported_D, columns["n_tokens"], columns["n_bytes"], nll)
