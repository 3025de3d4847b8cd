"""What every plan is, and the plan of the rule `ensemble`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Plan:
    """What a rule depends on besides its input files. The base class itself: no config key at all."""

    def content(self) -> dict[str, Any]:
        """The plan as JSON types, as artifacts keep it.

        A field that has its default is left out. So a new optional key reruns nothing of an old run. A path
        to the corpus is left out, too: its content is an input (`made_from`).
        """
        fields = [field for field in dataclasses.fields(self) if not field.metadata.get("path")]
        kept = {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}
        return {name: list(v) if isinstance(v, tuple) else v for name, v in kept.items()}


@dataclass(frozen=True)
class EnsemblePlan(Plan):
    """Rule `ensemble`. `tags` say of the run's experts whose their text is, under which licence ..."""

    tags: Mapping[str, Any] | None = None  # section tags of the config
