"""Are the experts that were scored those of the clusters that the texts were routed to?"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cbtm_pipeline import plan, plan_training
from cbtm_pipeline.base import artifact
from cbtm_pipeline.base.errors import run_again
from cbtm_pipeline.mixture import scored
from cbtm_pipeline.provenance import made_from


def check(
    found: scored.Found, paths: Iterable[Path], clusters: Iterable[Path]
) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Raise ValueError unless each expert on a cluster was trained on that cluster of these manifests, and
    the distances are to the centres of these clusters.

    `paths` are those of the cards, in any order. Returns the manifests with their paths: `clusters`, and
    `random` if it is given.
    """
    manifests: dict[str, tuple[Path, dict[str, Any]]] = {}
    routed = found.distances["made_from"]
    for path in clusters:
        manifest = artifact.read_sealed(path, "assignments")
        is_random = "clusterer" not in manifest["made_from"]
        for name in ["held_out"] if is_random else ["held_out", "clusterer"]:
            artifact.check_made_from(path, manifest, name, routed[name])
        manifests["random" if is_random else "clusters"] = path, manifest
    by_name = {path.parent.name: path for path in paths}
    for name, card in found.cards.items():
        data, group = plan.data_of(name)
        if data in ("corpus", "first"):  # of the first round, second_round has checked the documents
            continue
        groups = plan_training.groups(group, card["made_with"].get("children", 1))
        data = "clusters" if data == "parents" else data
        if data not in manifests:
            raise ValueError(
                f"--clusters: no manifest of {data}. Expected that of {name}, too. "
                "Add it to the command line."
            )
        path, manifest = manifests[data]
        if groups[-1] >= manifest["k"] or card["made_from"]["tokens"] != made_from.tokens(groups, manifest):
            what = " and ".join(map(str, groups))
            weights = by_name.get(name, Path(name, "card.json")).with_name("model.safetensors")
            raise ValueError(
                f"{weights}: trained on other documents than cluster {what} of {path}. "
                f"Expected that cluster. {run_again(weights)}"
            )
    return manifests
