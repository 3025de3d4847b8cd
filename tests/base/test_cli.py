from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from cbtm_pipeline.base import cli


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A log without handlers, as at the start of a process."""
    for name, value in {"handlers": [], "level": 0, "propagate": True}.items():
        monkeypatch.setattr(cli.log, name, value)
    yield
    for handler in cli.log.handlers:
        handler.close()


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_log_file_that_is_deleted_comes_back(tmp_path: Path, capsys, with_folder):
    path = tmp_path / "logs/0.log"
    cli.start_logging("expert 0", path)
    cli.log.info("one")
    cli.log.info("two")
    assert [line.split()[-1] for line in path.read_text().splitlines()] == ["one", "two"]
    path.unlink()
    if with_folder:
        path.parent.rmdir()
    cli.log.info("three")
    cli.log.warning("four")
    assert [line.split()[1:] for line in path.read_text().splitlines()] == [
        ["I", "expert", "0", "three"],
        ["W", "expert", "0", "four"],
    ]
    assert len(capsys.readouterr().err.splitlines()) == 4


def words(text: str) -> list[str]:
    """The last word of each line."""
    return [line.split()[-1] for line in text.splitlines()]


def test_a_brief_stderr_has_warnings_news_and_a_line_now_and_then(tmp_path: Path, monkeypatch, capsys):
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)
    monkeypatch.setattr(cli, "time", clock)
    monkeypatch.setenv(cli.BRIEF, "1")
    cli.start_logging("expert 0", tmp_path / "0.log")
    for second in range(4 * 3600 + 1):
        clock.now = float(second)
        cli.log.info("%d", second)
    shown = [int(word) for word in words(capsys.readouterr().err)]
    pauses = [after - before for before, after in zip([0, *shown], shown, strict=False)]
    assert pauses[:10] == [60] * 10, "one a minute in the first ten minutes"
    assert pauses == sorted(pauses) and len(shown) < 50, "then fewer and fewer"
    cli.log.info("not shown")
    cli.log.info("this one is shown: it is %s", "news", extra=cli.NEWS)
    cli.log.warning("so is a warning")
    cli.log.error("and an error")
    assert words(capsys.readouterr().err) == ["news", "warning", "error"]
    logged = words((tmp_path / "0.log").read_text())
    assert len(logged) == 4 * 3600 + 5, "the file has every line"
    assert logged[-4:] == ["shown", "news", "warning", "error"]


@pytest.mark.parametrize("brief, with_file", [("", True), ("1", False)])
def test_all_lines_are_shown_by_hand_and_where_no_file_has_them(
    tmp_path: Path, monkeypatch, capsys, brief, with_file
):
    monkeypatch.setenv(cli.BRIEF, brief)
    cli.start_logging("expert 0", tmp_path / "0.log" if with_file else None)
    cli.log.info("shown")
    assert words(capsys.readouterr().err) == ["shown"]


@pytest.mark.parametrize("label", ["shard", "assign_random", "expert dense-steps", "score 0"])
def test_a_line_is_read_as_it_was_written(tmp_path: Path, label):
    cli.start_logging(label, tmp_path / "0.log")
    cli.log.warning("2 rows:  are bad")
    line = cli.LINE.fullmatch((tmp_path / "0.log").read_text().strip())
    assert line and line.groups() == ("W", "2 rows:  are bad")
