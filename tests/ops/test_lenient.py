"""Files that other processes write meanwhile."""

import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cbtm_pipeline.ops import lenient


@given(st.lists(st.integers(0, 10**9), max_size=30), st.integers(1, 400), st.integers(0, 12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_end_of_a_log_is_its_newest_whole_rows(tmp_path, values, n_bytes, n_cut):
    lines = [json.dumps({"step": value}) + "\n" for value in values]
    text = "".join(lines)
    cut = text[: max(0, len(text) - n_cut)]
    path = tmp_path / "log.jsonl"
    path.write_text(cut)
    lengths = list(itertools.accumulate(map(len, lines)))
    # whole rows (a last one without its newline is whole, too) that begin after the first newline of what is
    # read
    begins = [0, *lengths]
    start = 0 if len(cut) <= n_bytes else next((b for b in begins if b > len(cut) - n_bytes), len(cut) + 1)
    expected = [
        {"step": v}
        for v, b, e in zip(values, begins, lengths, strict=False)
        if b >= start and e - 1 <= len(cut)
    ]
    assert lenient.rows(path, n_bytes) == expected


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (2.5, 2.5),
        (True, None),
        ("3", None),
        (None, None),
        (float("inf"), None),
        (float("nan"), None),
    ],
)
def test_what_is_a_number(value, number):
    assert lenient.number(value) == number


def test_text_stays_on_its_line_and_moves_no_cursor():
    assert lenient.text("a\x1b[2Jb \n\tü") == "a [2Jb ü"
    assert lenient.text(17) == "17"
    assert lenient.text(None) is None
