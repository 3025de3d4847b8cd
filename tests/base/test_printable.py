"""Text of any origin on a terminal."""

import logging
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cbtm_pipeline.base import cli
from cbtm_pipeline.base.printable import printable


@given(st.text(st.characters(exclude_categories=())))
def test_no_text_can_move_the_cursor(text: str) -> None:
    shown = printable(text, keep="")
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not [
        c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "RLI")
    ]
    shown.encode()


@pytest.mark.parametrize(
    "text, shown",
    [
        ("naïve café 日本語 😀\n\tok", "naïve café 日本語 😀\n\tok"),
        ("\x1b[31mred\x07\r", "\\x1b[31mred\\x07\\x0d"),
        ("\x9b2J", "\\x9b2J"),
        ("abc\u202edef", "abc\\u202edef"),
        ("\udc80", "\\udc80"),
    ],
)
def test_readable_text_stays_and_the_rest_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_an_error_about_a_strange_name_is_one_plain_line(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.log, "handlers", [])  # as at the start of a process

    def fail() -> None:
        raise ValueError("a\x1b]0;title\x07b\nc: no such file.")

    with pytest.raises(SystemExit):
        cli.run(fail)
    assert capsys.readouterr().err == "a\\x1b]0;title\\x07b c: no such file.\n"


def test_a_log_line_about_a_strange_id_is_one_short_plain_line() -> None:
    record = logging.LogRecord(
        "cbtm", logging.INFO, "", 0, "read %s", ("\x1b[2J\n12:00:00 E x" + "y" * 10**6,), None
    )
    line = cli.formatter("shard").format(record)
    assert "\\x1b[2J\\x0a12:00:00 E x" in line
    assert "\x1b" not in line and "\n" not in line and len(line) < 5000
    assert cli.LINE.fullmatch(line)
