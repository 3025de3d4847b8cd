"""Two patches for transformers: one makes its import fast and quiet, one saves a wait in each step."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

HIDDEN = ("scipy", "sklearn", "pandas")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Hide SciPy, scikit-learn and pandas from the imports inside, and pause the garbage collector meanwhile.

    transformers loads these packages if it finds them, for object detection, assisted generation and table
    questions. No job here needs them, and they take a quarter of every job's start. Packages that were
    imported before stay visible. After this context, all packages can be imported again. If transformers is
    imported already, it knows which packages it can use, so that nothing is hidden from it.
    """
    first = "transformers" not in sys.modules
    hidden = {name for name in HIDDEN if name not in sys.modules} if first else set()
    modules: dict[str, Any] = sys.modules
    collecting = gc.isenabled()
    gc.disable()
    modules.update(dict.fromkeys(hidden))  # find_spec does not find a module whose entry is None
    try:
        be_quiet()
        yield
    finally:
        for name in hidden:
            del modules[name]
        gc.freeze()  # modules live as long as the process: later collections skip them
        if collecting:
            gc.enable()


def be_quiet() -> None:
    """Let transformers and the hub's library report errors only, without progress bars."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    getLogger("huggingface_hub").setLevel("ERROR")  # one final error is enough; it logs each of five retries


def never_packed(position_ids: Any) -> None:
    """For transformers' `find_packed_sequence_indices`: None means that no sequence holds several texts."""


def assume_unpacked_sequences() -> None:
    """Patch transformers: do not check whether a sequence holds several packed texts. Here, none does.

    transformers checks this in each forward pass, and the host waits for the device meanwhile. Logits stay
    the same.
    """
    from transformers import masking_utils

    masking_utils.find_packed_sequence_indices = never_packed  # pyright: ignore[reportAttributeAccessIssue]
