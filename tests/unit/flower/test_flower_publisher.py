"""Training states bit for bit, damaged ones refused, and what a published version says."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated import __version__
from federated.errors import RegistryError
from federated.flower.publisher import RegistryPublisher, TrainingState, recipe_record, weights_digest
from federated.flower.selection import Standing
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, ModuleSpec, sha256_hex
from federated.registry import Registry
from federated.server_optimizers import OptimizerState
from federated.state import AdapterState, RuleState, from_raw, to_raw
from federated.testing import effective_of
from federated.wire import decode_tensors, encode_packet, encode_tensors

Make = Callable[..., Any]
SPEC = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(ModuleSpec("q", 3, 2, 2, 4.0),))
RESIDUAL = replace(SPEC, rank=1, alpha=1.0, modules=(ModuleSpec("q", 3, 2, 1, 1.0),))
ODD = torch.tensor([math.nan, -0.0, math.inf, 1e-45], dtype=torch.float32)


def training() -> TrainingState:
    """Values that only bit-for-bit copies keep, and names that hold the separator."""
    adapter = AdapterState(SPEC, {"q.factor_a": torch.full((2, 3), 1 / 3), "a:b": ODD})
    rule = RuleState(
        {"round": 3, "note": "Ä", "deep": [1.5, None]}, {"control:x": ODD.double(), "seen": torch.arange(3)}
    )
    moments = OptimizerState(
        7, {"m/q.factor_a": torch.full((2, 3), 1e-300, dtype=torch.float64), "v/a:b": ODD.double()}, "adam"
    )
    residual = AdapterState(RESIDUAL, {"q.factor_a": torch.full((1, 3), 1 / 7), "q.factor_b": ODD[:2].reshape(2, 1)})
    standings = {"clinic": Standing(12, (True, False)), "other: one": Standing()}
    counters = {"clinic": 9, "other: one": 2}
    state = GlobalState(adapter, residual, rule_state=rule)
    return TrainingState(4, state, moments, counters, standings, ("clinic",))


def test_bytes_and_back_bit_for_bit() -> None:
    before = training()
    after = TrainingState.from_bytes(before.to_bytes())
    assert (after.round_number, after.counters) == (4, {"clinic": 9, "other: one": 2})
    assert (after.standings, after.at_work) == (before.standings, ("clinic",))
    assert after.global_state.adapter.spec == SPEC
    assert after.global_state.residual.spec == RESIDUAL
    assert after.global_state.rule_state.scalars == before.global_state.rule_state.scalars
    assert (after.optimizer_state.steps, after.optimizer_state.name) == (7, "adam")
    for read in (
        lambda state: state.global_state.adapter.tensors,
        lambda state: state.global_state.residual.tensors,
        lambda state: state.global_state.rule_state.tensors,
        lambda state: state.optimizer_state.moments,
    ):
        assert to_raw(read(after)) == to_raw(read(before))
    assert after.to_bytes() == before.to_bytes()


def test_a_fresh_server_has_one_too(adapter: Make) -> None:
    fresh = TrainingState(0, GlobalState(adapter()), OptimizerState())
    assert TrainingState.from_bytes(fresh.to_bytes()).to_bytes() == fresh.to_bytes()
    assert TrainingState.from_bytes(fresh.to_bytes()).global_state.residual is None


def test_one_that_was_saved_before_there_were_residuals_is_read() -> None:
    assert TrainingState.from_bytes(encode_packet(HEADER, {})).global_state.residual is None


DATA = training().to_bytes()


@settings(max_examples=150, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
def test_a_changed_byte_is_refused_or_changes_a_value_and_never_raises_anything_else(place: int, change: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= change
    try:
        TrainingState.from_bytes(bytes(damaged)).to_bytes()
    except RegistryError as error:
        assert "cannot be read" in str(error)


@pytest.mark.parametrize("data", [b"", b"garbage", DATA[:-1], DATA[:50], DATA + b"x", DATA[1:]])
def test_damaged_bytes_are_a_registry_error(data: bytes) -> None:
    with pytest.raises(RegistryError, match=r"cannot be read .*; start a new run"):
        TrainingState.from_bytes(data)


HEADER: dict[str, Any] = {
    "round_number": 1,
    "optimizer": "sgd",
    "steps": 0,
    "counters": {},
    "rule": {},
    "spec": SPEC.plain | {"modules": []},
}


@pytest.mark.parametrize(
    "change",
    [
        {"round_number": "many"},
        {"round_number": None},
        {"steps": []},
        {"counters": 5},
        {"counters": ["clinic"]},
        {"counters": {"clinic": "x"}},
        {"spec": None},
        {"spec": "text"},
        {"spec": {}},
        {"residual": 5},
        {"residual": {"modules": []}},
    ],
    ids=str,
)
def test_a_header_of_another_shape_is_a_registry_error(change: dict[str, Any]) -> None:
    TrainingState.from_bytes(encode_packet(HEADER, {}))
    with pytest.raises(RegistryError, match="cannot be read"):
        TrainingState.from_bytes(encode_packet({**HEADER, **change}, {}))


def test_a_missing_header_field_or_a_stray_tensor_is_a_registry_error() -> None:
    without = {key: value for key, value in HEADER.items() if key != "counters"}
    for header, tensors in ((without, {}), (HEADER, to_raw({"elsewhere:w": ODD})), (HEADER, to_raw({"w": ODD}))):
        with pytest.raises(RegistryError, match="cannot be read"):
            TrainingState.from_bytes(encode_packet(header, tensors))


def make_publisher(registry: Registry | None, config: Any, **changes: Any) -> RegistryPublisher:
    return RegistryPublisher(
        registry, config, **{"run_id": "run", "base_digest": "b" * 64, "method": "fedit + sgd", **changes}
    )


def test_a_published_version_is_what_the_manifest_says(tmp_path: Path, config: Make, adapter: Make) -> None:
    state = TrainingState(2, GlobalState(adapter(1 / 3)), OptimizerState())
    with Registry.open(tmp_path / "registry") as registry:
        registry.require_base("b" * 64)
        publisher = make_publisher(registry, config(seed=5))
        first = publisher.publish(state, parent=None, participants=0, metrics={})
        manifest = publisher.publish(state, parent=first.version_id, participants=3, metrics={"train_loss": 0.5})
        weights = registry.weights(manifest.version_id)
        assert registry.channels() == {"dev": manifest.version_id}
        assert registry.get(manifest.version_id).manifest == manifest
        assert registry.training_state(manifest.version_id) == state.to_bytes()
    assert weights == encode_tensors(to_raw(adapter(1 / 3).tensors))
    assert manifest.weights_digest == sha256_hex(weights) == weights_digest(adapter(1 / 3)) == first.weights_digest
    assert manifest.version_id != first.version_id
    assert (manifest.parent, manifest.participants, manifest.round_number) == (first.version_id, 3, 2)
    assert (manifest.method, manifest.code_version, dict(manifest.metrics)) == (
        "fedit + sgd",
        __version__,
        {"train_loss": 0.5},
    )


def test_weights_are_published_in_the_devices_dtype_and_the_master_copy_is_kept(
    tmp_path: Path, config: Make, adapter: Make
) -> None:
    master = adapter(1 / 3, "BF16").cast("F32")
    state = TrainingState(1, GlobalState(master), OptimizerState())
    with Registry.open(tmp_path / "registry") as registry:
        registry.require_base("b" * 64)
        manifest = make_publisher(registry, config(), channel=None).publish(
            state, parent=None, participants=0, metrics={}
        )
        assert registry.channels() == {}
        assert registry.weights(manifest.version_id) == encode_tensors(to_raw(adapter(1 / 3, "BF16").tensors))


def test_a_residual_is_published_as_part_of_one_plain_adapter_and_saved_beside_it(
    tmp_path: Path, config: Make, adapter: Make
) -> None:
    beside = AdapterState(RESIDUAL, {"q.factor_a": torch.eye(3)[:1], "q.factor_b": torch.ones(2, 1)})
    state = TrainingState(1, GlobalState(adapter(0.5), beside), OptimizerState())
    with Registry.open(tmp_path / "registry") as registry:
        registry.require_base("b" * 64)
        manifest = make_publisher(registry, config()).publish(state, parent=None, participants=1, metrics={})
        tensors = from_raw(decode_tensors(registry.weights(manifest.version_id)))
        saved = TrainingState.from_bytes(registry.training_state(manifest.version_id))
    published = AdapterState(manifest.spec, tensors)
    assert sorted(tensors) == ["q.factor_a", "q.factor_b"]
    expected = effective_of(replace(adapter(0.5), residual=beside))["q"]
    torch.testing.assert_close(effective_of(published)["q"], expected, rtol=1e-6, atol=1e-6)
    assert to_raw(saved.global_state.residual.tensors) == to_raw(beside.tensors)


def test_without_a_registry_there_is_a_manifest_only(config: Make, adapter: Make) -> None:
    state = TrainingState(1, GlobalState(adapter()), OptimizerState())
    manifest = make_publisher(None, config()).publish(state, parent=None, participants=0, metrics={}, servable=False)
    assert not manifest.servable
    assert manifest.weights_digest == weights_digest(adapter())


def test_a_device_s_recipe_is_plain_and_names_no_place_of_the_server(config: Make) -> None:
    recipe = recipe_record(config(seed=5, run_dir="/srv/runs", registry="/srv/registry"))
    assert set(recipe) == {"task", "model", "adapter", "seed"}
    assert recipe["seed"] == 5
    assert recipe["task"]["labels"] == ["cold", "warm"]
    assert "/srv" not in str(recipe)
