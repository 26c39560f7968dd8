"""The key of a run's task tokens: one for the whole life of the run, its owner's alone, and said when it is another."""

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federated.config import ExperimentConfig
from federated.errors import ConfigError, PrivacyError
from federated.flower import Run
from federated.flower.run_key import FILE, kept_key
from federated.tracking import MemoryTracker

Make = Callable[..., Any]


def test_it_is_made_once_and_is_its_owner_s_alone(tmp_path: Path) -> None:
    key, is_new = kept_key(tmp_path)
    assert (len(key), is_new) == (32, True)
    assert stat.S_IMODE((tmp_path / FILE).stat().st_mode) == 0o600
    assert kept_key(tmp_path) == (key, False)


def test_every_run_has_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    assert kept_key(folders[0])[0] != kept_key(folders[1])[0]


def test_a_key_that_others_can_read_is_none(tmp_path: Path) -> None:
    kept_key(tmp_path)
    (tmp_path / FILE).chmod(0o644)
    with pytest.raises(PrivacyError, match="others can read the key of the run's task tokens"):
        kept_key(tmp_path)


def test_a_damaged_key_is_named_with_what_to_do(tmp_path: Path) -> None:
    kept_key(tmp_path)
    (tmp_path / FILE).write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"is damaged: 5 bytes, expected 32\. Put it back, or remove it"):
        kept_key(tmp_path)


def test_a_disk_that_refuses_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory; the run's task tokens are made with it"):
        kept_key(tmp_path / "gone")


def test_a_resumed_run_has_the_key_that_it_had_and_says_so_if_not(
    real_config: ExperimentConfig, tmp_path: Path
) -> None:
    """No event where all is well; one that says what it costs where the key is gone."""
    tracker = MemoryTracker(clock=lambda: 0.0)
    config = replace(real_config, run_dir=str(tmp_path / "run"))
    first = Run(config)._secret(tracker)
    again = Run(replace(config, resume=True))
    assert again._secret(tracker) == first
    assert tracker.events == []
    (tmp_path / "run" / FILE).unlink()
    assert again._secret(tracker) != first
    (said,) = tracker.of("warning")
    assert "train once more, and are charged once more" in said["message"]


def test_no_record_of_a_run_holds_it(federation: Make, tmp_path: Path) -> None:
    key, _ = kept_key(tmp_path)
    made = federation({"secret": key})
    made.run()
    told = repr(made.tracker.events) + made.strategy.config.to_json()
    assert key.hex() not in told
    assert key not in made.strategy.server.training_state(2).to_bytes()
