"""``latest`` and ``v1`` follow the channel ``dev``: a central version published beside a run does not hide it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from federated.manifest import AdapterSpec, VersionManifest, sha256_hex
from federated.registry import Registry

WEIGHTS = b"weights"
FEDERATED = VersionManifest(
    weights_digest=sha256_hex(WEIGHTS),
    base_digest="base",
    spec=AdapterSpec("lora", 8, 16.0, False, ()),
    method="fedit + sgd",
    run_id="federated",
    round_number=1,
)
CENTRAL = replace(FEDERATED, run_id="central", method="central")


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path) as opened:
        opened.publish(FEDERATED, WEIGHTS, channel="dev")
        opened.publish(CENTRAL, WEIGHTS)
        yield opened


@pytest.mark.parametrize("name", ["latest", "v1"])
def test_names_follow_the_channel_dev(registry: Registry, name: str) -> None:
    assert registry.get(name).manifest.run_id == "federated"


def test_the_other_run_is_reached_by_its_name(registry: Registry) -> None:
    assert registry.get("central:v1").manifest.method == "central"


def test_without_the_channel_the_newest_counts(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "other") as opened:
        opened.publish(FEDERATED, WEIGHTS)
        opened.publish(CENTRAL, WEIGHTS)
        assert opened.get("latest").manifest.run_id == "central"
