"""Look at a run, at the machine for a run, or use its result. Snakemake starts the run itself.

cbtm preview [TARGET ...]     what a start would run, why, at what cost, and which trained models it replaces
cbtm status [OUTDIR ...]      how a run is going
cbtm doctor [--profile NAME]  what would fail and what a run would cost, before anything is started

cbtm compare RUN RUN ...      finished runs side by side: settings, perplexities, ratios to dense, cost
cbtm clusters                 the clusters of a run: size, what sets them apart, how well their experts do
cbtm generate [PROMPT]        go on with a text
cbtm score FILE ...           perplexity and bits per byte of any text
cbtm route TEXT               which experts a text gets, with which weights, and why
cbtm export DIR               copy the ensemble to a folder of its own
cbtm serve                    answer requests over HTTP, as OpenAI's API does; and a page

cbtm add-expert NAME          train one expert more, on new documents, and put it into a new ensemble
cbtm remove-expert NAME       an ensemble without this expert
cbtm replace-expert NAME      an ensemble with another model for this expert
"""

import argparse
import importlib
import sys

from cbtm_pipeline.base import cli

MODULES = {  # by command
    "preview": "preview",
    "status": "status",
    "doctor": "doctor",
    "compare": "compare",
    "clusters": "clusters",
    "generate": "generate",
    "score": "score",
    "route": "route_text",  # route is a rule
    "export": "export",
    "serve": "serve",
    "add-expert": "add_expert",
    "remove-expert": "remove_expert",
    "replace-expert": "replace_expert",
}


def main() -> None:
    p = argparse.ArgumentParser(
        prog="cbtm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("command", choices=list(MODULES), help="for its options: cbtm COMMAND --help")
    command = p.parse_args(sys.argv[1:2]).command
    sys.argv = [f"cbtm {command}", *sys.argv[2:]]
    cli.run(importlib.import_module(f"cbtm_pipeline.{MODULES[command]}").main)


if __name__ == "__main__":
    main()
