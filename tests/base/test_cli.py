from pathlib import Path

import pytest

from cbtm_pipeline.base import cli


@pytest.mark.parametrize("with_folder", [False, True])
def test_a_log_file_that_is_deleted_comes_back(tmp_path: Path, monkeypatch, capsys, with_folder):
    for name, value in {"handlers": [], "level": 0, "propagate": True}.items():
        monkeypatch.setattr(cli.log, name, value)
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
    for handler in cli.log.handlers:
        handler.close()
