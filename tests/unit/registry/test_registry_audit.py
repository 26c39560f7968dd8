"""The audit log: everything that is done is in it, in the same transaction; whoever tampers is found at the row."""

import json
import sqlite3
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from federated.errors import RegistryError
from federated.registry import AuditHead, Registry
from federated.registry.audit import AuditFault, check_chain
from federated.registry.audit_log import FIRST, AuditEntry
from federated.registry.names import resolve


def actions(registry):
    return [(entry.action, entry.subject) for entry in registry.audit.entries()][1:]


def entry(number, previous, **fields):
    body = AuditEntry(number, "2026-01-01T00:00:00", "ann", "publish", f"version {number}", "{}", previous, "")
    body = replace(body, **fields)
    return replace(body, digest=body.expected_digest())


def chain(length):
    rows = []
    for number in range(1, length + 1):
        rows.append(entry(number, rows[-1].digest if rows else FIRST))
    return rows


def head_of(rows):
    return AuditHead(rows[-1].number, rows[-1].digest)


def found(rows, head=None, own=None):
    return [fault.number for fault in check_chain(rows, own=own or head_of(rows), head=head)]


def test_a_new_registry_begins_its_log(registry):
    (first,) = registry.audit.entries()
    assert (first.number, first.action, first.actor, first.previous) == (1, "init", "unnamed", FIRST)
    assert registry.audit.head() == AuditHead(1, first.digest)


def test_two_registries_never_share_a_digest(registry, tmp_path):
    with Registry.open(tmp_path / "other") as other:
        assert other.audit.head() != registry.audit.head()


def test_everything_is_noted(registry, publish):
    first = publish(b"one", channel="dev")
    second = publish(b"two", round_number=1, parent=first, channel="dev")
    stable = registry.channel("stable")
    stable.require(1)
    stable.approve(second, name="Ann")
    stable.promote(second)
    registry.channel("dev").rollback()
    registry.tag(first, "keep")
    registry.untag("keep")
    registry.devices.report("pump 7", first, at=datetime(2026, 1, 2, tzinfo=UTC))
    assert actions(registry) == [
        ("publish", first), ("promote", "dev"), ("publish", second), ("promote", "dev"), ("require", "stable"),
        ("approve", second), ("promote", "stable"), ("rollback", "dev"), ("tag", "keep"), ("untag", "keep"),
        ("device", "pump 7"),
    ]  # fmt: skip
    assert registry.audit.verify() == []


def test_details_say_what_changed(registry, publish):
    first = publish(b"one", channel="dev", training_state=b"moments")
    published, promoted = registry.audit.entries(newest=2)
    assert json.loads(published.details)["run_id"] == "run-a"
    assert json.loads(promoted.details) == {"before": None, "version_id": first}
    assert promoted.at.startswith("2026-01-01T00:00:0")


def test_the_actor_is_who_opened_it(location):
    with Registry.open(location, actor="  Ann  ") as registry:
        assert registry.audit.entries()[0].actor == "Ann"


@pytest.mark.parametrize("actor", ["", "  ", "two\nlines", "x" * 201])
def test_an_actor_has_a_name(location, actor):
    with pytest.raises(RegistryError, match="1 to 200 printable"):
        Registry.open(location, actor=actor)


def test_what_changes_nothing_is_not_noted(registry, publish):
    publish(b"one", channel="dev")
    before = registry.audit.head()
    publish(b"one", channel="dev")
    registry.channel("dev").promote("dev")
    registry.tag("dev", "keep")
    registry.tag("dev", "keep")
    assert registry.audit.head().number == before.number + 1


def test_what_fails_is_not_noted(registry, publish):
    publish(b"one", channel="dev")
    before = registry.audit.head()
    for fails in (
        lambda: registry.channel("dev").rollback(),
        lambda: registry.channel("dev").promote("dev", expected="c" * 64),
        lambda: registry.tag("dev", "dev"),
        lambda: publish(b"two", parent="c" * 64),
    ):
        with pytest.raises(RegistryError):
            fails()
    assert registry.audit.head() == before


def test_a_row_is_in_the_transaction_of_what_it_records(registry, publish):
    first = publish(b"one")
    access = registry._access
    with pytest.raises(ZeroDivisionError), access.writing("fail") as work:
        resolve(work.session, first)
        work.note("tag", "half")
        1 / 0  # noqa: B018
    assert actions(registry) == [("publish", first)]


@pytest.mark.parametrize("what", ["UPDATE registry_audit SET actor = 'eve'", "DELETE FROM registry_audit"])
def test_the_database_refuses_to_change_rows(registry, location, what):
    with sqlite3.connect(location / "registry.db") as raw, pytest.raises(sqlite3.IntegrityError, match="append-only"):
        raw.execute(what)
    raw.close()


def test_a_whole_chain_has_no_fault():
    rows = chain(5)
    assert found(rows) == found(rows, head=head_of(rows[:3])) == []


@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_edited_row_is_named(number):
    rows = chain(5)
    rows[number - 1] = replace(rows[number - 1], actor="eve")
    assert found(rows) == [number]


@pytest.mark.parametrize("number", [1, 3, 5])
def test_an_edited_row_with_a_digest_of_its_own_is_named(number):
    rows = chain(5)
    own = head_of(rows)
    previous = rows[number - 1].previous
    rows[number - 1] = entry(number, previous, actor="eve")
    assert found(rows, own=own) == [number]


@pytest.mark.parametrize(("gone", "named"), [([1], [1]), ([3], [3]), ([2, 3], [2])])
def test_a_deleted_row_is_named(gone, named):
    rows = chain(5)
    assert found([row for row in rows if row.number not in gone], own=head_of(rows)) == named


def test_a_gap_says_which_rows():
    rows = chain(5)
    (fault,) = check_chain([rows[0], rows[3], rows[4]], own=head_of(rows))
    assert fault == AuditFault(2, "rows 2 to 3 are missing: row 4 follows row 1")


def test_a_deleted_row_and_renumbered_ones_are_named():
    rows = chain(5)
    shifted = [rows[0], *(replace(row, number=row.number - 1) for row in rows[2:])]
    assert found(shifted, own=head_of(rows))[0] == 2


def test_an_inserted_row_is_named():
    rows = chain(4)
    put_in = entry(3, rows[1].digest, actor="eve")
    shifted = [*rows[:2], put_in, *(replace(row, number=row.number + 1) for row in rows[2:])]
    assert found(shifted, own=head_of(rows))[0] in (3, 4)


def test_a_row_put_in_at_the_end_is_named():
    rows = chain(3)
    assert found([*rows, entry(4, rows[-1].digest)], own=head_of(rows)) == [4]


def test_swapped_rows_are_named():
    rows = chain(5)
    swapped = [rows[0], replace(rows[2], number=2), replace(rows[1], number=3), *rows[3:]]
    assert found(swapped)[:2] == [2, 3]


def test_rows_cut_off_are_named_by_the_database_s_own_head():
    rows = chain(5)
    assert found(rows[:3], own=head_of(rows)) == [4]


def test_rows_cut_off_with_the_head_are_named_by_a_head_kept_elsewhere():
    rows = chain(5)
    assert found(rows[:3]) == []
    assert found(rows[:3], head=head_of(rows)) == [4]


def test_a_history_that_was_written_anew_shows_against_a_kept_head():
    rows, anew = chain(5), [entry(1, FIRST, actor="eve")]
    for number in range(2, 6):
        anew.append(entry(number, anew[-1].digest))
    assert found(anew) == []
    assert found(anew, head=head_of(rows[:2])) == [2]


def test_a_log_that_lost_its_beginning_is_named():
    rows = chain(4)
    anew = [entry(1, rows[1].digest)]
    assert found(anew) == [1]


def test_a_row_of_another_type_is_named():
    rows = chain(3)
    rows[1] = replace(rows[1], details=b"{}")
    assert found(rows)[0] == 2


def test_a_lost_head_is_named(registry, location):
    with sqlite3.connect(location / "registry.db") as raw:
        raw.execute("DELETE FROM registry_audit_head")
    raw.close()
    assert [fault.message for fault in registry.audit.verify()] == ["the head of the log is gone from the database"]
    with pytest.raises(RegistryError, match="head is gone"):
        registry.audit.head()


def test_a_head_reads_as_it_is_written(registry):
    head = registry.audit.head()
    assert AuditHead.parse(f" {head}\n") == head


@pytest.mark.parametrize("text", ["", "5", "x:" + "a" * 64, "1:" + "A" * 64, "-1:" + "a" * 64])
def test_what_is_no_head_is_refused(text):
    with pytest.raises(RegistryError, match="NUMBER:DIGEST"):
        AuditHead.parse(text)


def test_what_happens_elsewhere_can_be_noted(registry):
    registry.audit.note("release", "a version", channel="stable", release_counter=3)
    entry = registry.audit.entries()[-1]
    assert (entry.action, entry.subject, json.loads(entry.details)) == (
        "release",
        "a version",
        {"channel": "stable", "release_counter": 3},
    )
    assert registry.verify() == []


@pytest.mark.parametrize("action", ["publish", "promote", "gc", "something"])
def test_only_what_happens_elsewhere_can_be_noted(registry, action):
    with pytest.raises(RegistryError, match=f"'{action}' cannot be noted from outside; expected one of keys, release"):
        registry.audit.note(action, "a version")


def test_noted_details_must_be_plain(registry):
    with pytest.raises(RegistryError, match="the audit log cannot hold these details"):
        registry.audit.note("release", "a version", at=object())
    assert len(registry.audit.entries()) == 1
