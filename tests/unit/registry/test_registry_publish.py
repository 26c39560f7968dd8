from datetime import UTC, datetime

import pytest

from federated.errors import BaseMismatch, RegistryError
from federated.manifest import AdapterSpec, digest_of
from federated.registry import Registry


def test_id_is_the_manifests_digest(registry, manifest_for):
    manifest = manifest_for(b"one")
    assert registry.publish(manifest, b"one") == manifest.version_id


def test_record_carries_the_manifest_and_the_time(registry, manifest_for):
    manifest = manifest_for(b"one", round_number=7, metrics={"train_loss": 0.25}, privacy={"accounts": []})
    record = registry.get(registry.publish(manifest, b"one"))
    assert (record.manifest, record.number) == (manifest, 7)
    assert record.created_at == datetime(2026, 1, 1, 0, 0, 2, tzinfo=UTC)  # the first was init


def test_weights_and_training_state_come_back(registry, publish):
    version_id = publish(b"one", training_state=b"moments")
    assert (registry.weights(version_id), registry.training_state(version_id)) == (b"one", b"moments")


def test_no_training_state_is_none(registry, publish):
    assert registry.training_state(publish(b"one")) is None


def test_empty_training_state_is_not_none(registry, publish):
    assert registry.training_state(publish(b"one", training_state=b"")) == b""


def test_publishing_again_is_idempotent(registry, publish):
    assert publish(b"one", training_state=b"s") == publish(b"one", training_state=b"s") == publish(b"one")
    assert len(registry.versions()) == 1


def test_publishing_again_with_another_state_is_refused(registry, publish):
    publish(b"one", training_state=b"s")
    with pytest.raises(RegistryError, match="another training state"):
        publish(b"one", training_state=b"t")
    assert registry.training_state("latest") == b"s"


def test_equal_weights_in_two_rounds_are_two_versions(registry, publish):
    first = publish(b"one")
    assert publish(b"one", round_number=1, parent=first) != first
    assert registry.verify() == []


def test_other_bytes_than_the_manifests_are_refused(registry, manifest_for):
    with pytest.raises(RegistryError, match="weights' SHA-256 is"):
        registry.publish(manifest_for(b"one"), b"two")
    assert registry.versions() == []


def test_unknown_parent_is_refused(registry, publish):
    with pytest.raises(RegistryError, match="publish it first"):
        publish(b"one", parent="a" * 64)


def test_parent_of_another_base_is_refused(publish):
    parent = publish(b"one")
    with pytest.raises(BaseMismatch, match="start a new run"):
        publish(b"two", base_digest="c" * 64, parent=parent)


def test_channel_moves_with_the_version(registry, publish):
    publish(b"one", channel="dev")
    second = publish(b"two", round_number=1, channel="dev")
    assert registry.channels() == {"dev": second}


def test_refused_channel_publishes_nothing(registry, publish):
    publish(b"one", channel="dev")
    with pytest.raises(BaseMismatch):
        publish(b"two", base_digest="c" * 64, channel="dev")
    assert len(registry.versions()) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"run_id": ""},
        {"run_id": "r" * 201},
        {"run_id": "two\nlines"},
        {"run_id": 5},
        {"base_digest": ""},
        {"round_number": -1},
        {"round_number": 2**31},
        {"round_number": True},
        {"round_number": 1.0},
        {"metrics": {"loss": float("nan")}},
        {"metrics": {"loss": object()}},
        {"metrics": {1: 2.0, "a": 3.0}},
        {"metrics": {"client-007": 1.0}},
        {"metrics": {"loss": "low"}},
        {"participants": -1},
        {"participants": 1.5},
        {"participants": ["client-007"]},
        {"release_counter": -1},
        {"adapter_id": "../other"},
        {"adapter_id": "/etc"},
        {"base": {"weights": "a" * 64}},
        {"parent": "v1"},
        {"privacy": {"epsilon": 3.0}},
        {"privacy": {"accounts": [{"epsilon": 3.0, "target_delta": 1e-5}]}},
        {"servable": 1},
        {"licence": "x" * 201},
        {"method": "\ud800"},
        {"spec": None},
        {"spec": AdapterSpec("lora", 2, 4.0, False, (), head={})},
    ],
    ids=lambda fields: str(list(fields)),
)
def test_unstorable_manifest_is_refused(registry, manifest_for, fields):
    with pytest.raises(RegistryError, match="manifest"):
        registry.publish(manifest_for(b"one", **fields), b"one")


def test_publishing_again_repairs_a_damaged_blob(registry, publish, location):
    publish(b"one")
    (blob,) = (path for path in location.glob("blobs/*/*"))
    blob.write_bytes(b"rot")
    publish(b"one")
    assert registry.weights("latest") == b"one"


def test_records_survive_reopening(location, manifest_for):
    with Registry.open(location) as first:
        version_id = first.publish(manifest_for(b"one"), b"one", channel="stable")
    with Registry.open(location, create=False) as second:
        assert second.get("stable").version_id == version_id


def test_closed_registry_says_so(registry, publish):
    registry.close()
    registry.close()
    with pytest.raises(RegistryError, match="is closed"):
        publish(b"one")


def test_require_base(registry, publish):
    registry.require_base("anything goes while it is empty")
    publish(b"one")
    registry.require_base("b" * 64)
    with pytest.raises(BaseMismatch, match="not of " + "c" * 64):
        registry.require_base("c" * 64)


PARTS = {"class": "Tiny", "config": None, "tokenizer": None, "weights": "a" * 64}


def test_a_whole_record_comes_back(registry, manifest_for):
    account = {"unit": "client", "epsilon": 3.0, "target_delta": 1e-5, "accountant": "rdp", "private": True}
    manifest = manifest_for(
        b"one",
        base=PARTS,
        base_digest=digest_of(PARTS),
        adapter_id="support-1.x",
        release_counter=7,
        licence="Apache-2.0",
        privacy={"accounts": [{**account, "not_protected": []}]},
    )
    assert registry.get(registry.publish(manifest, b"one")).manifest == manifest


def test_parts_of_another_base_are_refused(registry, manifest_for):
    with pytest.raises(RegistryError, match="must be of one base model"):
        registry.publish(manifest_for(b"one", base=PARTS), b"one")


def test_release_counters_grow_along_a_lineage(registry, publish):
    assert registry.next_counter("support") == 1
    first = publish(b"one", adapter_id="support", release_counter=1)
    for counter in (1, 2):
        if counter == 1:
            with pytest.raises(RegistryError, match="must grow along a lineage"):
                publish(b"two", parent=first, adapter_id="support", release_counter=counter)
        else:
            publish(b"two", parent=first, adapter_id="support", release_counter=counter)
    assert (registry.next_counter("support"), registry.next_counter("other")) == (3, 1)


def test_an_error_names_the_place_in_the_record(registry, manifest_for):
    with pytest.raises(RegistryError, match=r"schema at metrics.loss: 'low' is not of type 'number'; see docs/"):
        registry.publish(manifest_for(b"one", metrics={"loss": "low"}), b"one")


def test_a_long_value_is_cut_in_the_error(registry, manifest_for):
    with pytest.raises(RegistryError, match=r"x{100}.*\.\.\.; see docs/"):
        registry.publish(manifest_for(b"one", licence="x" * 9999), b"one")
