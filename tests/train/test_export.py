"""What may be in the way of a run's export, found before the run is trained."""

from __future__ import annotations

import pytest

from jaxmoo.config import load_config
from jaxmoo.errors import ConfigError
from jaxmoo.files.digests import DIGESTS
from jaxmoo.hf.directory import new_directory
from jaxmoo.runs.directory import RunDirectory
from jaxmoo.train.export import check_exports


def test_only_what_a_run_has_written_may_be_replaced_by_its_export(write_config, tmp_path):
    config, run = load_config(write_config()), RunDirectory(tmp_path / "run")
    check_exports(config, run)
    with new_directory(run.export) as directory:
        (directory / "README.md").write_text("a card")
        (directory / "config.json").write_text("{}")
    check_exports(config, run)

    def refused(message):
        with pytest.raises(ConfigError, match=message) as error:
            check_exports(config, run)
        assert str(run.export) in str(error.value)
        assert "Move that directory away" in str(error.value)

    (run.export / "README.md").write_text("a better card")
    refused("holds what no run has written there: README.md")
    (run.export / "README.md").write_text("a card")
    (run.export / "notes").mkdir()
    (run.export / "notes" / "one.txt").write_text("mine")
    refused("holds what no run has written there: notes/one.txt")
    (run.export / DIGESTS).write_text("{")
    refused(rf"{DIGESTS} is damaged")
    (run.export / DIGESTS).unlink()
    refused("nothing says .* that a run has written them: README.md, config.json")
    check_exports(load_config(write_config(export=False)), run)
