"""Bad base models and adapters on the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest

Refused = Callable[..., str]


def test_model_folder_without_weights(simulate_refused: Refused) -> None:
    Path("base").mkdir()
    Path("base", "config.json").write_text("{}")
    assert "base holds no weights; expected model.safetensors" in simulate_refused("model.source=base")


def test_empty_model_folder(simulate_refused: Refused) -> None:
    Path("base").mkdir()
    assert "base holds no config.json" in simulate_refused("model.source=base")


def test_model_folder_that_is_not_there(simulate_refused: Refused) -> None:
    assert "./models/none was not found" in simulate_refused("model.source=./models/none")


def test_unknown_tiny_model(simulate_refused: Refused) -> None:
    assert simulate_refused("model.source=tiny:goat").startswith("tiny:goat is unknown; expected tiny:bert")


def test_rank_larger_than_a_layer(simulate_refused: Refused) -> None:
    line = simulate_refused("adapter.rank=33")
    assert "rank 33 is larger than layer" in line
    assert "set adapter.rank to between 1 and 32" in line


def test_target_that_matches_nothing(simulate_refused: Refused) -> None:
    line = simulate_refused("adapter.target_modules=[quarry]")
    assert line == "target module 'quarry' matches nothing in the base model; available: dense, key, query, value"


def test_model_that_does_not_fit_the_task(simulate_refused: Refused) -> None:
    assert "causal_lm" in simulate_refused("task=causal_lm")


@pytest.mark.parametrize(
    ("experiment", "asset"),
    [("airlines", "minilm"), ("reviews", "minilm"), ("shakespeare", "shakespeare"), ("smollm2", "smollm2")],
)
def test_experiment_whose_assets_were_not_fetched(
    refused: Refused, versions: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, asset: str
) -> None:
    monkeypatch.setenv("FEDPEFT_CACHE", str(Path("cache").absolute()))
    line = refused("simulate", f"--app={Path(__file__).parents[2]}", f"experiment={experiment}", f"registry={versions}")
    assert line == f"asset '{asset}' is not here; run: fedpeft assets fetch {asset}"
