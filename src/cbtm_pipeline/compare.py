"""Finished runs side by side: their settings, the perplexity of each model, ratios to dense, and the cost.

    cbtm compare results/a results/b
    cbtm compare results/a results/b --html compared.html

The runs need the same held-out text: others are refused, and so are runs that are not finished. Where
tokenizers differ, bits per byte compare, and perplexities do not. The last rule of a study makes its table
and page with this command, too (workflow/study.smk). It is also `python -m cbtm_pipeline.compare`.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cbtm_pipeline.base import artifact, cli, printable

# What a study leaves in its folder: everything, one row for each model of each run, the text, and the page.
RESULTS = ("study.json", "study.parquet", "study.txt", "study.html")
KIND = "study"


def is_of(path: Path, runs: Sequence[Path]) -> bool:
    """Whether a study.json is of these runs as they are now, and the other results are beside it."""
    try:
        found = artifact.read_sealed(path, KIND)
        metrics = [artifact.read_sealed(run / "eval/metrics.json", "metrics") for run in runs]
    except (OSError, ValueError):
        return False
    same = found["made_from"] == {str(i): one["seal"] for i, one in enumerate(metrics)}
    names = [row["run"] for row in found["runs"]] == [run.name for run in runs]
    return same and names and all(path.with_name(name).exists() for name in RESULTS)


def table(folder: Path) -> str:
    """The text of a study."""
    return (folder / "study.txt").read_text("utf-8")


def write(folder: Path, content: dict[str, Any], text: str, page: str, seals: Sequence[str]) -> None:
    """Write the results of a study, study.json last."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from cbtm_pipeline.mixture import comparison_table

    meta = artifact.make_meta(KIND, {str(i): seal for i, seal in enumerate(seals)})
    for name, whole in (("study.txt", text), ("study.html", page)):
        with artifact.publish(folder / name) as tmp:
            tmp.write_text(whole, "utf-8")
    rows = pa.Table.from_pylist(comparison_table.flat_rows(content))
    with artifact.publish(folder / "study.parquet") as tmp:
        pq.write_table(rows, tmp, compression="zstd", write_page_checksum=True)
    artifact.write_sealed(folder / "study.json", {**meta, **content})


def main(argv: list[str] | None = None) -> None:
    """Run the command from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="outdir of a finished run")
    p.add_argument("--html", type=Path, metavar="PAGE", help="write a page with pictures, too")
    p.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    p.add_argument("--out", type=Path, metavar="DIR", help=f"write {', '.join(RESULTS)} into this folder")
    p.add_argument("--log", type=Path, help="append log lines to this file, too")
    args = p.parse_args(argv)
    from cbtm_pipeline.html import comparison_page
    from cbtm_pipeline.mixture import comparison, comparison_table
    from cbtm_pipeline.ops import finished

    if args.log:
        cli.start_logging("study", args.log)
    runs = finished.read_all(args.runs)
    content = comparison.compare(runs)
    text = comparison_table.text(content)
    if args.out:
        page, seals = comparison_page.render(content, "A study"), [run.metrics["seal"] for run in runs]
        write(args.out, content, text, page, seals)
        cli.log.info("%d runs compared, see %s", len(runs), args.out / "study.html")
    if args.html:
        with artifact.publish(args.html) as tmp:
            tmp.write_text(comparison_page.render(content, "Runs side by side"), "utf-8")
    printable.show(json.dumps(content, indent=1, ensure_ascii=False) + "\n" if args.json else text)


if __name__ == "__main__":
    cli.run(main)
