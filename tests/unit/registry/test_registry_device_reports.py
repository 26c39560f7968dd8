"""A device's report, from its file into the registry."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from federated.errors import RegistryError
from federated.registry.device_reports import Held, device_report

HELD = {"from": "2026-11-20T12:00:00+00:00", "to": "2026-11-21T12:00:00+00:00"}
REPORT: dict[str, Any] = {
    "format": 1,
    "device_id": "shop-17",
    "versions": [
        {"version_id": "a" * 64, "state": "committed", "code": "", "reason": "", "held": HELD},
        {"version_id": "b" * 64, "state": "failed", "code": "ProbeFailed", "reason": "no effect"},
    ],
    "of a newer library": True,
}


def test_what_a_report_says() -> None:
    found = device_report(json.dumps(REPORT).encode())
    times = datetime(2026, 11, 20, 12, tzinfo=UTC), datetime(2026, 11, 21, 12, tzinfo=UTC)
    assert (found.device_id, found.held) == ("shop-17", (Held("a" * 64, *times),))
    assert found.failed == {"b" * 64: "no effect"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"{}",
        b" " * 4_000_001,
        json.dumps(REPORT | {"format": 2}).encode(),
        json.dumps(REPORT | {"device_id": 3}).encode(),
        json.dumps(REPORT | {"versions": [{"held": HELD}]}).encode(),
        json.dumps(REPORT | {"versions": [3]}).encode(),
        json.dumps(REPORT | {"versions": [{**REPORT["versions"][0], "held": {**HELD, "to": "today"}}]}).encode(),
        json.dumps(REPORT | {"versions": [{**REPORT["versions"][0], "held": {**HELD, "to": "2026-11-20"}}]}).encode(),
        b"[" * 100_000,
    ],
)
def test_what_is_no_report(data: bytes) -> None:
    with pytest.raises(RegistryError, match="that is no device's report"):
        device_report(data)
