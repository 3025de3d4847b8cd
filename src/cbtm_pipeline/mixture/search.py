"""The search for learning rates in words. `search` is that entry of metrics.json: the choice of each kind."""

from collections.abc import Mapping
from typing import Any

Search = Mapping[str, Mapping[str, Any]]


def rates(search: Search) -> list[float]:
    """The rates that were tried: the same for every kind."""
    return [row["lr"] for row in next(iter(search.values()))["candidates"]]


def flops(search: Search) -> float:
    """Training FLOPs of all candidates."""
    return sum(row["train_flops"] for choice in search.values() for row in choice["candidates"])


def sentence(search: Search) -> str:
    """Which rate each kind got, and what the search cost."""
    tried = rates(search)
    chosen = ", ".join(f"{kind} {choice['chosen']:g}" for kind, choice in search.items())
    return (
        f"Learning rates by validation loss, of {', '.join(f'{rate:g}' for rate in tried)}: {chosen}. "
        f"Each kind of model had all {len(tried)} rates; together they cost {flops(search):.3g} FLOPs."
    )


def at_the_ends(search: Search) -> list[str]:
    """A sentence if kinds got the smallest rate that was tried, or the largest: others may be better."""
    tried, texts = rates(search), []
    for value, which, more in ((min(tried), "smallest", "smaller"), (max(tried), "largest", "larger")):
        if kinds := [kind for kind, choice in search.items() if choice["chosen"] == value]:
            texts.append(
                f"lr {value:g} of {', '.join(kinds)} is the {which} that was tried: "
                f"{more} ones may be better. Add some to train.lr."
            )
    return texts
