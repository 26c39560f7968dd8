"""The file of enrolled devices: who is let in, and that nobody is when it cannot be read."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from federated.errors import ConfigError
from federated.flower.enrolled import Device, read_devices, read_enrolment

KEY = bytes(range(32))
NODE = "ecdsa-sha2-nistp384 AAAAE2VjZHNh"


def entry(**changed: Any) -> dict[str, Any]:
    return {"state": "approved", "node_key": NODE, "update_key": base64.b64encode(KEY).decode(), **changed}


def written(folder: Path, devices: Any, *, form: Any = 1) -> Path:
    path = folder / "devices.json"
    path.write_text(json.dumps({"format": form, "devices": devices}))
    return path


def test_approved_devices_are_read(tmp_path: Path) -> None:
    assert read_devices(written(tmp_path, {"north": entry()})) == {"north": Device("north", NODE, KEY)}


def test_a_comment_behind_the_key_does_not_matter(tmp_path: Path) -> None:
    found = read_devices(written(tmp_path, {"north": entry(node_key=f"{NODE} root@north")}))
    assert found["north"].node_key == NODE


@pytest.mark.parametrize("state", ["pending", "revoked", "Approved", ""])
def test_no_other_state_lets_a_device_in(tmp_path: Path, state: str) -> None:
    assert not read_devices(written(tmp_path, {"north": entry(state=state)}))


@pytest.mark.parametrize(
    "devices",
    [
        [],
        {"north": "approved"},
        {"north": {"state": "approved"}},
        {"north": entry(update_key="AAAA")},
        {"north": entry(update_key="not base64!")},
        {"north": entry(update_key=7)},
        {"north": entry(node_key="AAAA")},
    ],
)
def test_a_damaged_file_lets_nobody_in(tmp_path: Path, devices: Any) -> None:
    with pytest.raises(ConfigError, match=r"admission\.devices"):
        read_devices(written(tmp_path, devices))


def test_two_approved_devices_with_one_node_key_let_nobody_in(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'north' and 'south' have the same node key"):
        read_devices(written(tmp_path, {"north": entry(), "south": entry()}))


def test_a_key_that_was_revoked_under_another_name_belongs_to_who_is_approved(tmp_path: Path) -> None:
    found = read_enrolment(written(tmp_path, {"old": entry(state="revoked"), "new": entry()}))
    assert (found.name_of(NODE), found.others) == ("new", {"old": "revoked"})


def test_who_waits_for_approval_needs_no_usable_keys(tmp_path: Path) -> None:
    found = read_enrolment(written(tmp_path, {"new": {"state": "pending"}}))
    assert (found.devices, found.others, found.names) == ({}, {"new": "pending"}, {})


def test_another_format_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="format 2, expected 1"):
        read_devices(written(tmp_path, {}, form=2))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "devices.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a file of enrolled devices"):
        read_devices(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        read_devices(tmp_path / "devices.json")
