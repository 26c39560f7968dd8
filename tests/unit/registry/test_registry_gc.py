"""gc: what is needed stays, with all that it descends from; rows go before bytes."""

import json
from datetime import UTC, datetime, timedelta

import pytest

from federated.errors import RegistryError, VersionNotFound
from federated.manifest import sha256_hex
from federated.registry import Registry, collect
from federated.registry.blobs import BlobStore

NONE = timedelta(0)


@pytest.fixture
def line(publish):
    """Publishes v0 to vN of a run, each from the one before."""

    def make(count, run_id="run-a", **fields):
        ids = []
        for number in range(count):
            data = f"{run_id} {number}".encode()
            parent = ids[-1] if ids else None
            ids.append(publish(data, run_id=run_id, round_number=number, parent=parent, **fields))
        return ids

    return make


def removed(registry, **options):
    return list(registry.gc(**{"older_than": NONE, "keep": 0} | options).removed)


def ids(registry):
    return [record.version_id for record in registry.versions()]


def blobs_of(location):
    return {path.name for path in location.glob("blobs/*/*")}


def test_what_nothing_needs_goes_with_its_bytes(registry, line, location):
    first = line(2, training_state=b"state")
    second = line(2, "run-b", channel="dev")
    found = registry.gc(older_than=NONE, keep=0)
    assert (found.removed, found.kept, found.young) == (tuple(first), 2, 0)
    assert (found.blobs, found.freed) == (3, len(b"run-a 0") * 2 + len(b"state"))
    assert ids(registry) == second
    assert blobs_of(location) == {sha256_hex(f"run-b {number}".encode()) for number in range(2)}
    assert registry.verify() == []


def test_a_channel_keeps_its_whole_lineage_and_no_more(registry, line):
    versions = line(4)
    registry.channel("stable").promote(versions[2])
    assert removed(registry) == [versions[3]]


def test_the_version_before_stays_for_a_rollback(registry, line):
    first, second, third = (line(1, run)[0] for run in ("run-a", "run-b", "run-c"))
    stable = registry.channel("stable")
    for version_id in (first, second, third):
        stable.promote(version_id)
    assert removed(registry, keep=1) == [first]
    assert stable.rollback().version_id == second
    with pytest.raises(RegistryError, match="is gone from the registry"):
        stable.rollback()


def test_more_can_be_kept_than_there_are(registry, line):
    (version,) = line(1, channel="stable")
    assert removed(registry, keep=5) == []
    assert ids(registry) == [version]


def test_a_tag_keeps_its_version(registry, line):
    versions = line(3)
    registry.tag(versions[1], "keep")
    assert removed(registry) == [versions[2]]
    registry.untag("keep")
    assert removed(registry) == versions[:2]


def test_a_device_keeps_what_it_ever_reported(registry, line):
    versions = line(3)
    for number, day in ((1, 2), (0, 1)):
        registry.devices.report("pump", versions[number], at=datetime(2026, 1, day, tzinfo=UTC))
    assert removed(registry) == [versions[2]]


def test_young_versions_stay_with_what_they_stand_on(registry, line):
    old = line(2)  # published in seconds 2 and 3 of that minute, by the fixture's clock
    found = registry.gc(older_than=timedelta(seconds=1.5))
    assert (found.removed, found.kept, found.young) == ((), 2, 2)
    assert removed(registry, older_than=timedelta(seconds=30)) == []
    assert removed(registry) == old


def test_bytes_that_another_version_names_stay(registry, publish):
    first = publish(b"same", training_state=b"state")
    second = publish(b"same", round_number=1, training_state=b"state", channel="dev")
    found = registry.gc(older_than=NONE)
    assert (found.removed, found.blobs) == ((first,), 0)
    assert registry.weights(second) == b"same"
    assert registry.training_state(second) == b"state"


def test_dry_run_says_the_same_and_changes_nothing(registry, line, location):
    line(3, training_state=b"state")
    registry.channel("dev").promote("v1")
    before = (ids(registry), blobs_of(location), registry.audit.head())
    planned = registry.gc(older_than=NONE, dry_run=True)
    assert (ids(registry), blobs_of(location), registry.audit.head()) == before
    assert registry.gc(older_than=NONE) == planned
    assert len(planned.removed) == 1


def test_the_log_names_what_was_removed(registry, line):
    versions = line(2)
    registry.gc(older_than=NONE)
    entry = registry.audit.entries()[-1]
    assert (entry.action, json.loads(entry.details)) == ("gc", {"versions": versions})
    assert registry.verify() == []
    registry.gc(older_than=NONE)
    assert registry.audit.entries()[-1] == entry


def test_approvals_go_with_their_version(registry, line):
    (version,) = line(1)
    registry.channel("stable").approve(version, name="Ann")
    assert removed(registry) == [version]


def test_more_versions_than_fit_one_statement(registry, line, monkeypatch):
    monkeypatch.setattr(collect, "_BATCH", 2)
    versions = line(5)
    assert removed(registry) == versions
    assert registry.gc(older_than=NONE).blobs == 0


def test_killed_between_rows_and_bytes_the_next_one_takes_the_bytes(registry, line, location, monkeypatch):
    line(2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(BlobStore, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        registry.gc(older_than=NONE)
    monkeypatch.undo()
    assert ids(registry) == []
    assert len(blobs_of(location)) == 2
    found = registry.gc(older_than=NONE)
    assert (found.removed, found.blobs, blobs_of(location)) == ((), 2, set())


def test_bytes_stored_for_a_version_that_is_being_published_are_not_lost(registry, manifest_for, location, monkeypatch):
    """gc comes between a publisher's upload and its transaction."""
    from federated.registry.publication import Publication

    stored = Publication.store

    def then_gc(self, blobs):
        stored(self, blobs)
        with Registry.open(location) as other:
            assert other.gc(older_than=NONE).blobs == 2

    monkeypatch.setattr(Publication, "store", then_gc)
    version_id = registry.publish(manifest_for(b"one"), b"one", training_state=b"state")
    assert registry.weights(version_id) == b"one"
    assert registry.verify() == []


def test_blobs_that_went_away_are_passed_over(tmp_path):
    blobs = BlobStore(tmp_path)
    digest = blobs.put(b"one")
    (tmp_path / digest[:2] / ("a" * 64)).symlink_to(tmp_path / "nowhere")
    (tmp_path / digest[:2] / ".half.tmp").touch()
    assert blobs.sizes() == {digest: 3}
    blobs.delete(["b" * 64, digest])
    assert blobs.sizes() == {}


@pytest.mark.parametrize("options", [{"keep": -1}, {"older_than": timedelta(seconds=-1)}])
def test_arguments_that_make_no_sense(registry, options):
    with pytest.raises(RegistryError, match="expected 0 or more"):
        registry.gc(**options)


def test_removed_versions_are_not_found(registry, line):
    line(1)
    registry.gc(older_than=NONE)
    with pytest.raises(VersionNotFound, match="holds no versions"):
        registry.get("v0")
