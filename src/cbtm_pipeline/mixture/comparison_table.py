"""The comparison of runs as plain text, and as rows for other programs."""

import json
import textwrap
from collections.abc import Sequence
from typing import Any

from cbtm_pipeline.mixture import verdict
from cbtm_pipeline.mixture.comparison import Content, Row

ALL_MODELS = 4  # up to so many runs, the text shows every model


def text(content: Content) -> str:
    """The settings and the headline of each run, of few runs all models, and what the numbers are of."""
    unit = content["unit"]
    lines = _ruled([_header(content), *(_cells(row, content) for row in content["runs"])])
    if len(content["runs"]) <= ALL_MODELS:
        lines += ["", *_ruled(_models(content))]
    if best := content["best_k"]:
        lines += ["", *_ruled(_best_k(best, unit))]
    if seeds := over_seeds(content):
        lines += ["", *_ruled(seeds)]
    if pairs := content["pairs"]:
        lines += ["", *_ruled(_pairs(pairs))]
    lines.append("")
    for note in notes(content):
        lines += textwrap.wrap(note, 100, subsequent_indent="  ")
    return "".join(f"{line.rstrip()}\n" for line in lines)


def notes(content: Content) -> list[str]:
    """What the numbers mean."""
    compares = (
        "The runs have the same tokenizer, so their perplexities compare."
        if content["unit"] == "perplexity"
        else "The runs have different tokenizers: compare bits per byte, not perplexities."
    )
    several = f"{compares} Each run reports on its own documents; pairs are on those that both report."
    return [
        *([several] if len(content["runs"]) > 1 else []),
        "ensemble: the best setting of the routers, chosen on other documents. ratio: its perplexity over "
        "that of the strongest dense model of equal compute in the same run, with its 95 % interval.",
        "tokens: of all experts together, without the seed. FLOPs: all training, the seed's included.",
        "active: parameters of the models that predict a token. passes: experts that read one, on average.",
    ]


def _ruled(rows: list[tuple[str, ...]]) -> list[str]:
    lines = verdict.align(rows)
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def value(setting: Any) -> str:
    """A value of the config, as short as possible."""
    return setting if isinstance(setting, str) else json.dumps(setting, ensure_ascii=False)


def short_keys(keys: Sequence[str]) -> list[str]:
    """The last parts of config keys, or all of them where two are the same."""
    ends = [key.rpartition(".")[2] for key in keys]
    return [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]


def _header(content: Content) -> tuple[str, ...]:
    keys = short_keys(content["differs"])
    numbers = ("tokens", "ensemble", content["unit"].replace("_", " "), "dense", "ratio [95 %]")
    return ("run", *keys, *numbers, "passes", "active", "FLOPs")


def _cells(row: Row, content: Content) -> tuple[str, ...]:
    best = row["headline"]
    return (
        row["run"],
        *(value(row["setting"][key]) for key in content["differs"]),
        verdict.short(row["n_tokens"]),
        best["model"],
        figure(best[content["unit"]], content["unit"]),
        row["dense"],
        verdict.interval(best["ratio"], best["ci95"]),
        *(verdict.short(best[key]) for key in ("passes", "active_parameters", "train_flops")),
    )


def figure(number: float, unit: str) -> str:
    """A perplexity, or bits per byte."""
    return f"{number:.2f}" if unit == "perplexity" else f"{number:.4f}"


def _models(content: Content) -> list[tuple[str, ...]]:
    header = ("model", "run", "perplexity", "bits/byte", "to dense [95 %]", "passes", "FLOPs")
    names = dict.fromkeys(model["model"] for row in content["runs"] for model in row["models"])
    by_name = [
        (name, row["run"], model)
        for name in names
        for row in content["runs"]
        for model in row["models"]
        if model["model"] == name
    ]
    return [
        header,
        *(
            (
                *(name, run, f"{model['perplexity']:.2f}", f"{model['bits_per_byte']:.4f}"),
                verdict.interval(**model["ratios"]["dense"]),
                *(verdict.short(model[key]) for key in ("passes", "train_flops")),
            )
            for name, run, model in by_name
        ),
    ]


def setting_text(setting: dict[str, Any]) -> str:
    """`balance=none, seed=1`"""
    keys = short_keys(list(setting))
    return ", ".join(f"{key}={value(v)}" for key, v in zip(keys, setting.values(), strict=True))


def _best_k(best: Sequence[Row], unit: str) -> list[tuple[str, ...]]:
    header = ("setting", "tokens", "best k", "of", unit.replace("_", " "), "ratio")
    rows = [
        (
            *(setting_text(row["setting"]) or "all", verdict.short(row["n_tokens"]), str(row["k"])),
            *(", ".join(map(str, row["tried"])), figure(row[unit], unit), f"{row['ratio']:.3f}"),
        )
        for row in best
    ]
    return [header, *rows]


def over_seeds(content: Content) -> list[tuple[str, ...]]:
    """The header and a row for each setting with several seeds; empty if there is none."""
    header = ("setting", "seeds", content["unit"].replace("_", " "), "ratio [95 % over seeds]")
    rows = [
        (
            *(setting_text(group["setting"]) or "all", str(len(group["runs"]))),
            figure(group[content["unit"]], content["unit"]),
            verdict.interval(group["ratio"], group["ci95"]),
        )
        for group in content["groups"]
        if len(group["runs"]) > 1
    ]
    return [header, *rows] if rows else []


def pair_ratio(pair: Row) -> str:
    """The ratio of a pair with its interval, or why there is none."""
    if pair["ratio"] is None:
        return "too few documents"
    return verdict.interval(pair["ratio"], pair["ci95"])


def _pairs(pairs: Sequence[Row]) -> list[tuple[str, ...]]:
    header = ("ensemble of", "against that of", f"ratio per {pairs[0]['per']} [95 %]", "documents")
    rows = [(pair["run"], pair["against"], pair_ratio(pair), str(pair["n_documents"])) for pair in pairs]
    return [header, *rows]


def flat_rows(content: Content) -> list[Row]:
    """One row for each model of each run, with plain values: the rows of study.parquet.

    Settings are JSON, as their types differ.
    """
    rows = []
    for run in content["runs"]:
        settings = {f"setting_{key}": json.dumps(v, ensure_ascii=False) for key, v in run["setting"].items()}
        about = {key: run[key] for key in ("run", "n_tokens", "dense")} | {"run_k": run["k"]} | settings
        for model in run["models"]:
            row = {key: v for key, v in model.items() if key not in ("ci95", "ratios")}
            to_dense = model["ratios"]["dense"]
            row["ratio_to_dense"] = to_dense["ratio"]
            for name, ci95 in (("_to_dense", to_dense["ci95"]), ("", model["ci95"])):
                low, high = ci95 or (None, None)
                row |= {f"low{name}": low, f"high{name}": high}
            rows.append({**about, **row})
    return rows
