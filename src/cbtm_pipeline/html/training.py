"""Section of the report on the trainings: their losses as curves and as a table, and where they ran."""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cbtm_pipeline.base.duration import duration
from cbtm_pipeline.html import charts
from cbtm_pipeline.html.page import Html, Number, count, decimals, section, table, tag

MAX_POINTS = 80  # of a loss curve
KEPT_SHARE = 0.97  # of the losses; the highest are cut off, so that the first steps do not flatten the curves
MAX_NAMED = 12  # experts whose curves are named; the table names all
COLOURS = ("c0", "c1", "c2", "c3", "c4", "c5")
DENSE = ("c1", "c3", "c2")
LAST = 10  # steps whose mean is the final loss

Curve = Sequence[tuple[float, float]]  # (tokens seen, nats per token)


class Log(NamedTuple):
    """What the page shows of a training log. Times are unix times; older logs may lack them."""

    losses: Curve
    validation: Curve = ()
    seconds: float | None = None  # that the steps took, without pauses
    times: tuple[float, float] | None = None  # of the first and of the last step
    machines: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    begins: str = "seed"  # the model that it began as


def downsample(points: Curve, n: int = MAX_POINTS) -> Curve:
    """At most n points: cut the curve into n parts of about equal length, and take the mean of each."""
    if len(points) <= n:
        return list(points)
    edges = [round(i * len(points) / n) for i in range(n + 1)]
    parts = [points[a:b] for a, b in itertools.pairwise(edges)]
    return [(sum(a for a, _ in part) / len(part), sum(b for _, b in part) / len(part)) for part in parts]


def training(logs: Mapping[str, Log], experts: Sequence[str]) -> Html:
    """The section. `logs` are by model, `experts` are the cluster experts in order."""
    dense = sorted(name for name in logs if name.startswith("dense"))
    begins = {name: log.begins for name, log in logs.items()}
    firsts = [name for name in logs if name in begins.values() and name != "seed"]
    names = [*firsts, *experts, *dense]
    losses = {name: log.losses for name, log in logs.items()}
    drawn = [_chart("Training loss", losses, names, experts, begins)]
    validation = {name: log.validation for name, log in logs.items()}
    if any(validation[name] for name in ("seed", *names)):
        drawn.append(_chart("Validation loss", validation, names, experts, begins))
    where_begun = (
        "the models of the first stage end, and those where the seed ends" if firsts else "the seed ends"
    )
    note = (
        f"Losses in nats per token, over the tokens seen; the experts begin where {where_begun}. "
        "Training losses are means over runs of steps. Each expert is trained and validated on texts of its "
        "own cluster, dense models and the seed on texts of all. So lines compare in shape, not in height."
    )
    return section("Training", note, tag("div", *drawn, class_="charts"), _table(logs), tag("p", where(logs)))


def _chart(
    title: str,
    curves: Mapping[str, Curve],
    names: Sequence[str],
    experts: Sequence[str],
    begins: Mapping[str, str],
) -> Html:
    """One line for the seed, and one for each model that begins where the one ends that it began as."""
    seed = curves["seed"]
    ends, series = {"seed": seed[-1][0] if seed else 0.0}, []
    dots = title.startswith("Validation")
    if seed:
        series.append(charts.Series("seed", "grey", downsample(seed), dots=dots))
    for name in names:
        start = ends[begins[name]]
        points = [(start + n_tokens, loss) for n_tokens, loss in downsample(curves[name])]
        ends[name] = start + (curves[name][-1][0] if curves[name] else 0.0)
        if not points:
            continue
        if name in experts:
            i = experts.index(name)
            named = len(experts) <= MAX_NAMED
            label = f"expert {name}" if named else "experts"
            colour = COLOURS[i % len(COLOURS)] if named else "c0"
            series.append(charts.Series(label, colour, points, "thin", dots, end=name if named else ""))
        elif name in begins.values():
            series.append(charts.Series("first stage", "grey", points, "thin", dots))
        else:
            colour = DENSE[(len(names) - names.index(name) - 1) % len(DENSE)]
            series.append(charts.Series(name, colour, points, "strong", dots, end=name))
    values = sorted(loss for s in series for _, loss in s.points)
    y_top = values[int(KEPT_SHARE * (len(values) - 1))] if not dots else None
    return charts.lines(title, "tokens seen", "nats per token", series, y_top=y_top)


def _table(logs: Mapping[str, Log]) -> Html:
    """One row for each model: steps, tokens, last losses, and the time that the steps took."""
    rows = []
    for name, log in logs.items():
        last = [loss for _, loss in log.losses[-LAST:]]
        rows.append(
            [
                f"expert {name}" if name.isdecimal() else name,
                count(len(log.losses)),
                count(log.losses[-1][0] if log.losses else 0),
                decimals(sum(last) / len(last) if last else None, 3),
                decimals(log.validation[-1][1] if log.validation else None, 3),
                Number("–" if log.seconds is None else duration(log.seconds)),
            ]
        )
    header = ["model", "steps", "tokens", "training loss", "validation loss", "time"]
    return table(header, rows, label="Trainings")


def where(logs: Mapping[str, Log]) -> str:
    """When, for how long, on what and with what the models were trained, as their logs say it."""
    times = [log.times for log in logs.values() if log.times]
    if not times:
        return "The training logs say neither when nor where the models were trained."
    first, last = (
        time.strftime("%Y-%m-%d %H:%M", time.gmtime(t)) for t in (min(times)[0], max(t for _, t in times))
    )
    seconds = sum(log.seconds or 0.0 for log in logs.values())
    parts = [f"Trained from {first} to {last} UTC. All steps together took {duration(seconds)}."]
    for label, found in (
        ("Machines", {name for log in logs.values() for name in log.machines}),
        ("Software", {name for log in logs.values() for name in log.versions}),
    ):
        parts += [f"{label}: {'; '.join(sorted(found))}."] if found else []
    return " ".join(parts)
