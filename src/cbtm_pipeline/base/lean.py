"""Import transformers fast and quietly. Two functions: one changes how it is imported, one changes what it computes."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from logging import getLogger
from typing import Any

HIDDEN = ("scipy", "sklearn", "pandas")


@contextmanager
def lean_imports() -> Iterator[None]:
    """Hide SciPy, scikit-learn and pandas from what is imported inside, and collect no garbage meanwhile.

    transformers loads these packages where it finds them, for the losses of object detection, for assisted generation
    and for table questions. That is a quarter of the start of every job, for nothing. What was imported before stays
    visible, and everything can be imported again afterwards.
    """
    hidden = {name for name in HIDDEN if name not in sys.modules}
    modules: dict[str, Any] = sys.modules
    collecting = gc.isenabled()
    gc.disable()
    modules.update(dict.fromkeys(hidden))  # find_spec finds nothing where None stands
    try:
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        getLogger("huggingface_hub").setLevel("ERROR")  # one message at the end says what five retries would
        yield
    finally:
        for name in hidden:
            del modules[name]
        gc.freeze()  # modules live as long as the process
        if collecting:
            gc.enable()


def never_packed(position_ids: Any) -> None:
    """Says that no sequence holds several packed texts: in place of transformers' `find_packed_sequence_indices`."""


def assume_unpacked_sequences() -> None:
    """Patch transformers: do not look whether several texts are packed into one sequence, because here none ever are.

    transformers asks this in each forward pass, and the host waits for the device to answer. Logits stay the same.
    """
    from transformers import masking_utils

    masking_utils.find_packed_sequence_indices = never_packed  # pyright: ignore[reportAttributeAccessIssue]
