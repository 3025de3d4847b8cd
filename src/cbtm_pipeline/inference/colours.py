"""Colours of the experts on a terminal. There are none in pipes, and with NO_COLOR set (no-color.org)."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence

from cbtm_pipeline.base.printable import printable

PALETTE = (39, 208, 78, 170, 203, 220, 45, 141, 118, 215, 99, 180)  # of xterm's 256 colours; then again
N_TERMS = 6  # that stand for an expert in the legend
RESET = "\x1b[0m"


def wanted() -> bool:
    """Whether stdout shows colours."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, expert: int) -> str:
    """Printable text in the colour of an expert, by its number."""
    return f"\x1b[38;5;{PALETTE[expert % len(PALETTE)]}m{printable(text)}{RESET}" if text else ""


def legend(names: Sequence[str], terms: Mapping[str, Sequence[str]], counts: Counter[int]) -> str:
    """A line for each expert that was the most weighted one of some token, the most frequent first."""
    total = counts.total()
    lines = []
    for expert, n in counts.most_common():
        name = names[expert]
        about = printable(" ".join(terms.get(name, ())[:N_TERMS]), keep="")
        lines.append(f"{paint(f'expert {name}', expert)}  {100 * n / total:3.0f} %  {about}".rstrip())
    return "".join(f"{line}\n" for line in lines)
