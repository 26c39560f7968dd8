"""The evaluation gate: what is not worse goes to the canary channel, and nothing else moves it."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from federated.config import GateConfig
from federated.errors import ConfigError, RegistryError
from federated.flower.gate import STAMP, Gate
from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

Make = Callable[..., Any]
SPEC = AdapterSpec("lora", 2, 4.0, False, ())


class Heard:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.events.append(event)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


@pytest.fixture
def publish(registry: Registry) -> Make:
    def run(number: int, **fields: Any) -> str:
        weights = f"weights {number}".encode()
        values = {"weights_digest": sha256_hex(weights), "base_digest": "b" * 64, "spec": SPEC, "method": "fedit",
                  "run_id": "run", "round_number": number}  # fmt: skip
        return registry.publish(VersionManifest(**(values | fields)), weights)

    return run


@pytest.fixture
def gate(registry: Registry, config: Make) -> Make:
    """A gate of some settings; its events are in ``heard``."""

    def make(privacy: dict[str, Any] | None = None, **settings: Any) -> Gate:
        made = config(gate={"enabled": True, **settings}, **({"privacy": privacy} if privacy else {}))
        found = Gate.of(registry, made, run_id="run", tracker=Heard())
        assert found is not None
        return found

    return make


def events(gate: Gate) -> list[dict[str, Any]]:
    return gate._tracker.events


def tell(gate: Gate, version_id: str, **metrics: float) -> None:
    gate.measured({**metrics, "version_id": version_id})


def test_the_first_measured_version_is_promoted(registry: Registry, publish: Make, gate: Make) -> None:
    version, asked = publish(1), gate()
    tell(asked, version, loss=0.5, num_examples=10)
    assert registry.channels() == {"canary": version}
    (event,) = events(asked)
    assert (event["event"], event["promoted"], event["value"], event["message"]) == ("gate", True, 0.5, "")


@pytest.mark.parametrize(
    ("metric", "values", "settings", "promoted"),
    [
        ("loss", (0.5, 0.4), {}, True),
        ("loss", (0.5, 0.5), {}, True),
        ("loss", (0.5, 0.6), {}, False),
        ("perplexity", (5.0, 6.0), {}, False),
        ("accuracy", (0.5, 0.6), {}, True),
        ("accuracy", (0.5, 0.4), {}, False),
        ("accuracy", (0.5, 0.55), {"min_improvement": 0.1}, False),
        ("accuracy", (0.5, 0.625), {"min_improvement": 0.125}, True),
        ("accuracy", (0.5, 0.45), {"min_improvement": -0.1}, True),
    ],
)
def test_what_is_worse_stays(
    registry: Registry,
    publish: Make,
    gate: Make,
    metric: str,
    values: tuple[float, float],
    settings: Any,
    promoted: bool,
) -> None:
    asked = gate(metric=metric, **settings)
    versions = [publish(1), publish(2)]
    for version, value in zip(versions, values, strict=True):
        tell(asked, version, **{metric: value})
    assert registry.channels()["canary"] == versions[promoted]
    assert events(asked)[-1]["promoted"] is promoted
    assert promoted or "against" in events(asked)[-1]["message"]


def test_every_measurement_is_recorded_and_the_promotion_says_why(
    registry: Registry, publish: Make, gate: Make
) -> None:
    version = publish(1)
    tell(gate(), version, loss=0.5, num_examples=10)
    (record,) = registry.evaluations(version)
    assert (dict(record.metrics), record.run_id, record.not_protected) == ({"loss": 0.5, "num_examples": 10}, "run", ())
    evaluated, promoted = registry.audit.entries(newest=2)
    assert (evaluated.action, promoted.action) == ("evaluate", "promote")
    assert json.loads(promoted.details)["gate"] == {"metric": "loss", "value": 0.5, "min_improvement": 0.0}


def test_a_version_of_another_run_is_compared_by_its_newest_measurement(
    registry: Registry, publish: Make, gate: Make
) -> None:
    old = publish(1, run_id="other")
    for loss in (0.9, 0.3):
        registry.evaluate(old, {"loss": loss}, run_id="other")
    registry.channel("canary").promote(old)
    tell(gate(), publish(1), loss=0.5)
    assert registry.channels()["canary"] == old


def test_a_version_that_nobody_measured_is_not_replaced(registry: Registry, publish: Make, gate: Make) -> None:
    old = publish(1, run_id="other")
    registry.evaluate(old, {"accuracy": 0.3}, run_id="other")
    registry.channel("canary").promote(old)
    asked = gate()
    tell(asked, publish(1), loss=0.5)
    assert registry.channels()["canary"] == old
    assert "was never measured: promote by hand once" in events(asked)[0]["message"]


@pytest.mark.parametrize("fields", [{"round_number": 0}, {"servable": False}])
def test_untrained_and_personal_versions_are_never_promoted(
    registry: Registry, publish: Make, gate: Make, fields: dict[str, Any]
) -> None:
    asked = gate()
    tell(asked, publish(1, **fields), loss=0.5)
    assert (registry.channels(), events(asked)) == ({}, [])
    assert len(registry.evaluations("latest")) == 1


@pytest.mark.parametrize("metrics", [{"accuracy": 0.5}, {"loss": math.nan}])
def test_without_the_metric_nothing_moves(registry: Registry, publish: Make, gate: Make, metrics: Any) -> None:
    asked = gate()
    tell(asked, publish(1), **metrics)
    assert registry.channels() == {}
    assert events(asked)[0]["message"] == "clients reported no loss"


def test_nothing_measured_is_nothing(registry: Registry, gate: Make) -> None:
    asked = gate()
    asked.measured(None)
    assert events(asked) == []


def test_measured_again_where_it_is_moves_nothing(registry: Registry, publish: Make, gate: Make) -> None:
    asked, version = gate(), publish(1)
    for loss in (0.5, 0.9):
        tell(asked, version, loss=loss)
    assert len(events(asked)) == 1
    assert len(registry.channel("canary").history()) == 1


def test_missing_approvals_are_a_warning_and_no_end_of_the_run(registry: Registry, publish: Make, gate: Make) -> None:
    registry.channel("canary").require(1)
    asked = gate()
    tell(asked, publish(1), loss=0.5)
    assert [event["event"] for event in events(asked)] == ["warning", "gate"]
    assert "requires 1 approvals" in events(asked)[0]["message"]
    assert registry.channels() == {}


def test_under_privacy_it_is_stamped(registry: Registry, publish: Make, gate: Make) -> None:
    privacy = {"client": {"enabled": True, "noise_multiplier": 1.0}}
    version = publish(1)
    tell(gate(privacy, unprotected=True), version, loss=0.5)
    assert registry.evaluations(version)[0].not_protected == (STAMP,)
    for entry in registry.audit.entries(newest=2):
        assert json.loads(entry.details)["not_protected"] == [STAMP]


@pytest.mark.parametrize("part", ["client", "example"])
def test_under_privacy_it_is_off_unless_said_otherwise(config: Make, part: str) -> None:
    with pytest.raises(ConfigError, match=r"no account of privacy covers that; leave it off, or say gate\.unprotected"):
        config(gate={"enabled": True}, privacy={part: {"enabled": True, "noise_multiplier": 1.0}})


def test_it_does_not_move_dev(config: Make) -> None:
    with pytest.raises(ConfigError, match=r"gate\.channel = dev"):
        config(gate={"enabled": True, "channel": "dev"})


def test_it_is_off_by_default_and_without_a_registry(registry: Registry, config: Make) -> None:
    assert Gate.of(registry, config(), run_id="run", tracker=Heard()) is None
    assert Gate.of(None, config(gate={"enabled": True}), run_id="run", tracker=Heard()) is None


def test_clients_are_not_told(config: Make) -> None:
    assert config(gate={"enabled": True}).for_clients().gate == GateConfig()


def test_a_number_that_is_none_is_not_recorded(registry: Registry, publish: Make) -> None:
    with pytest.raises(RegistryError, match="loss is nan"):
        registry.evaluate(publish(1), {"loss": math.nan}, run_id="run")
