"""Capacity in bytes, over a backend without a model whose handles have sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from federated.device import NULL, AdapterRuntime
from federated.errors import DeviceError

Make = Callable[..., Any]


@pytest.fixture
def sized(backend: Any) -> Any:
    backend.nbytes = lambda handle: int(handle) * 100  # version(3) costs 300 bytes
    return backend


def resident(runtime: AdapterRuntime) -> list[str]:
    return [slot.digest for slot in runtime.slots]


def test_slots_say_what_they_cost(sized: Any, version: Make) -> None:
    runtime = AdapterRuntime(sized)
    assert version(3).install(runtime).nbytes == 300
    version(2).install(runtime)
    assert runtime.nbytes == 500


def test_the_least_recently_used_go_until_the_bytes_fit(sized: Any, version: Make) -> None:
    runtime = AdapterRuntime(sized, capacity=10, capacity_bytes=900)
    for value in (1, 2, 3):
        version(value).install(runtime)
    runtime.predict([{}], digest=version(1).digest)
    version(4).install(runtime)  # 1000 bytes: number 2 goes, and no other
    assert resident(runtime) == [NULL, version(3).digest, version(1).digest, version(4).digest]
    version(5).install(runtime)  # 1300 bytes: 3 and 1 go
    assert resident(runtime) == [NULL, version(4).digest, version(5).digest]


def test_pinned_active_and_previous_slots_stay_whatever_they_cost(sized: Any, version: Make) -> None:
    runtime = AdapterRuntime(sized, capacity=10, capacity_bytes=100)
    for value in (2, 3, 4):
        version(value).install(runtime)
        runtime.activate(version(value).digest)
    assert resident(runtime) == [NULL, version(3).digest, version(4).digest]
    with runtime.pin(version(3).digest):
        for value in (5, 6, 7):
            version(value).install(runtime)
            runtime.activate(version(value).digest)
        assert version(3).digest in resident(runtime)
    assert version(3).digest not in resident(runtime)


def test_both_limits_hold(sized: Any, version: Make) -> None:
    runtime = AdapterRuntime(sized, capacity=1, capacity_bytes=10_000)
    version(1).install(runtime)
    version(2).install(runtime)
    assert resident(runtime) == [NULL, version(2).digest]


def test_room_for_no_byte_is_refused(sized: Any) -> None:
    with pytest.raises(DeviceError, match="with 0 bytes for adapters cannot serve"):
        AdapterRuntime(sized, capacity_bytes=0)


def test_what_was_made_on_the_device_is_a_slot_like_others(sized: Any, version: Make) -> None:
    runtime = AdapterRuntime(sized, capacity=1)
    parent = version(1).install(runtime)
    slot = runtime.adopt("made", lambda: 7.0, label="mine", parent=parent)
    assert (slot.version_id, slot.manifest, slot.nbytes) == (parent.version_id, None, 700)
    assert resident(runtime) == [NULL, "made"]
    assert runtime.adopt("made", lambda: pytest.fail("built twice")) is slot
    assert runtime.predict([{}], digest="made").predictions == [7.0]
    assert runtime.adopt("other", lambda: 1.0).version_id == "other"


def test_rows_of_several_slots_are_answered_slot_by_slot_without_mixing(runtime: AdapterRuntime, version: Make) -> None:
    asked: list[tuple[float, int]] = []
    predict = runtime.backend.predict
    runtime.backend.predict = lambda handle, rows: asked.append((handle, len(rows))) or predict(handle, rows)  # type: ignore[method-assign]
    one, two = version(1).install(runtime), version(2).install(runtime)
    runtime.activate(two.digest)
    answers = runtime.predict_mixed([({}, one.digest), ({}, None), ({}, NULL), ({}, one.digest)])
    assert [answer.prediction for answer in answers] == [1.0, 2.0, 0.0, 1.0]
    assert [answer.slot.digest for answer in answers] == [one.digest, two.digest, NULL, one.digest]
    assert asked == [(1.0, 2), (2.0, 1), (0.0, 1)]
    assert runtime.pins == {}


def test_a_mixed_request_with_an_unknown_slot_answers_no_row(runtime: AdapterRuntime) -> None:
    runtime.backend.predict = lambda handle, rows: pytest.fail("answered")  # type: ignore[method-assign]
    with pytest.raises(DeviceError, match="no slot"):
        runtime.predict_mixed([({}, NULL), ({}, "f" * 64)])
    assert runtime.pins == {}


@pytest.mark.parametrize(
    ("what", "ask"),
    [
        ("generate text", lambda runtime: runtime.generate("a")),
        ("embed texts", lambda runtime: runtime.embed(["a"])),
        ("merge adapters", lambda runtime: runtime.merge(NULL)),
    ],
)
def test_a_backend_that_cannot_is_named(runtime: AdapterRuntime, what: str, ask: Any) -> None:
    with pytest.raises(DeviceError, match=rf"\(FakeBackend\) cannot {what}"):
        ask(runtime)
    assert runtime.pins == {}
