"""Routing, pins, rollback and eviction, over a backend without a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from federated.device import NULL, AdapterRuntime
from federated.errors import DeviceError

Make = Callable[..., Any]


def resident(runtime: AdapterRuntime) -> list[str]:
    return [slot.digest for slot in runtime.slots]


def activated(runtime: AdapterRuntime, *versions: Any) -> None:
    for version in versions:
        version.install(runtime)
        runtime.activate(version.digest)


def test_a_new_runtime_answers_with_the_null_adapter(runtime: AdapterRuntime) -> None:
    assert runtime.active.digest == NULL
    assert runtime.predict([{}]).predictions == [0.0]
    assert runtime.history == ()


def test_install_leaves_the_routing_as_it_is(runtime: AdapterRuntime, version: Make) -> None:
    slot = version(1).install(runtime, label="v1")
    assert (slot.label, slot.version_id) == ("v1", version(1).version_id)
    assert runtime.active.digest == NULL
    assert resident(runtime) == [NULL, slot.digest]


def test_label_defaults_to_the_version(runtime: AdapterRuntime, version: Make) -> None:
    assert version(1).install(runtime).label == version(1).version_id[:12]


def test_activate_routes_new_requests(runtime: AdapterRuntime, version: Make) -> None:
    version(1).install(runtime)
    activation = runtime.activate(version(1).digest)
    assert (activation.kind, activation.digest, activation.previous) == ("activate", version(1).digest, NULL)
    assert activation.milliseconds >= 0
    served = runtime.predict([{}, {}])
    assert (served.slot.digest, served.predictions) == (version(1).digest, [1.0, 1.0])


def test_one_version_can_be_asked_for_while_another_is_active(runtime: AdapterRuntime, version: Make) -> None:
    activated(runtime, version(1), version(2))
    assert runtime.predict([{}], digest=version(1).digest).predictions == [1.0]
    assert runtime.predict([{}], digest=NULL).predictions == [0.0]


def test_activating_null_says_so(runtime: AdapterRuntime, version: Make) -> None:
    activated(runtime, version(1))
    assert runtime.activate(NULL).kind == "null"
    assert runtime.rollback().digest == version(1).digest


def test_activating_the_active_slot_adds_no_history(runtime: AdapterRuntime, version: Make) -> None:
    activated(runtime, version(1))
    again = runtime.activate(version(1).digest)
    assert again.previous == again.digest
    assert [slot.digest for slot in runtime.history] == [NULL]


def test_rollbacks_walk_back_to_null_and_stay_there(runtime: AdapterRuntime, version: Make) -> None:
    one, two, three = version(1), version(2), version(3)
    activated(runtime, one, two, three)
    steps = [runtime.rollback() for _ in range(4)]
    assert [step.digest for step in steps] == [two.digest, one.digest, NULL, NULL]
    assert {step.kind for step in steps} == {"rollback"}
    assert steps[0].previous == three.digest


def test_rollback_never_returns_to_what_was_rolled_back_from(runtime: AdapterRuntime, version: Make) -> None:
    one, two, three = version(1), version(2), version(3)
    activated(runtime, one, two)
    runtime.rollback()
    activated(runtime, three)
    assert [runtime.rollback().digest for _ in range(2)] == [one.digest, NULL]


def test_switching_back_and_forth_does_not_grow_the_history(runtime: AdapterRuntime, version: Make) -> None:
    one, two = version(1), version(2)
    activated(runtime, *[one, two] * 20)
    assert [slot.digest for slot in runtime.history] == [NULL, one.digest]


def test_a_pin_holds_across_activation_and_rollback(runtime: AdapterRuntime, version: Make) -> None:
    activated(runtime, version(1))
    with runtime.pin() as slot:
        activated(runtime, version(2))
        runtime.rollback()
        runtime.rollback()
        assert runtime.backend.predict(slot.handle, [{}]) == [1.0]
        assert runtime.pins == {slot.digest: 1}
    assert runtime.pins == {}


def test_a_pin_is_released_when_the_request_fails(runtime: AdapterRuntime) -> None:
    with pytest.raises(KeyError), runtime.pin():
        raise KeyError
    assert runtime.pins == {}


def test_pins_are_counted(runtime: AdapterRuntime, version: Make) -> None:
    activated(runtime, version(1))
    with runtime.pin(), runtime.pin(version(1).digest):
        assert runtime.pins == {version(1).digest: 2}


@pytest.mark.parametrize("use", ["activate", "pin", "predict"])
def test_an_unknown_slot_is_refused_and_resident_ones_are_named(
    runtime: AdapterRuntime, version: Make, use: str
) -> None:
    activated(runtime, version(1))
    with pytest.raises(DeviceError, match=rf"no slot 'ffff.*found null, {version(1).digest[:12]}"):
        if use == "activate":
            runtime.activate("f" * 64)
        elif use == "pin":
            runtime.pin("f" * 64).__enter__()
        else:
            runtime.predict([{}], digest="f" * 64)
    assert runtime.active.digest == version(1).digest
    assert runtime.pins == {}


def test_least_recently_used_slots_go_first(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=3)
    for value in (1, 2, 3):
        version(value).install(runtime)
    runtime.predict([{}], digest=version(1).digest)
    version(4).install(runtime)
    assert resident(runtime) == [NULL, version(3).digest, version(1).digest, version(4).digest]


def test_active_and_previous_slots_stay(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=2)
    activated(runtime, version(1), version(2))
    version(3).install(runtime)
    version(4).install(runtime)
    assert resident(runtime) == [NULL, version(1).digest, version(2).digest, version(4).digest]


def test_capacity_holds_again_once_the_newest_is_active(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=2)
    activated(runtime, version(1), version(2), version(3))
    assert resident(runtime) == [NULL, version(2).digest, version(3).digest]


def test_a_newly_installed_slot_outlives_requests_until_it_is_activated(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=1)
    activated(runtime, version(1))
    version(2).install(runtime)
    runtime.predict([{}])
    assert runtime.activate(version(2).digest).previous == version(1).digest


def test_a_pinned_slot_stays_until_it_is_released(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=1)
    version(1).install(runtime)
    with runtime.pin(version(1).digest):
        activated(runtime, version(2), version(3))
        assert version(1).digest in resident(runtime)
    assert version(1).digest not in resident(runtime)


def test_null_cannot_be_evicted(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=1)
    activated(runtime, *[version(value) for value in range(1, 6)])
    assert runtime.activate(NULL).digest == NULL


def test_rollback_skips_evicted_slots(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=2)
    activated(runtime, version(1), version(2), version(3))
    assert [runtime.rollback().digest for _ in range(2)] == [version(2).digest, NULL]


def test_equal_weights_of_another_version_share_the_model(runtime: AdapterRuntime, backend: Any, version: Make) -> None:
    first, second = version(1), version(1, round_number=2)
    activated(runtime, first)
    slot = second.install(runtime, label="v2")
    assert backend.built == [1.0]
    assert (slot.version_id, slot.digest) == (second.version_id, first.digest)
    assert runtime.active.version_id == first.version_id
    runtime.activate(slot.digest)
    assert runtime.active.version_id == second.version_id
    assert len(runtime.slots) == 2


def test_a_runtime_without_room_is_refused(backend: Any) -> None:
    with pytest.raises(DeviceError, match="capacity >= 1"):
        AdapterRuntime(backend, capacity=0)


def test_service_goes_on_while_a_version_is_being_built(runtime: AdapterRuntime, backend: Any, version: Make) -> None:
    building, finish = threading.Event(), threading.Event()
    build = backend.build

    def slow(*args: Any) -> Any:
        building.set()
        assert finish.wait(10)
        return build(*args)

    backend.build = slow
    thread = threading.Thread(target=version(1).install, args=(runtime,))
    thread.start()
    assert building.wait(10)
    assert runtime.predict([{}]).predictions == [0.0]
    finish.set()
    thread.join(10)
    assert version(1).digest in resident(runtime)


def test_threads_leave_no_pin_and_no_lost_slot(backend: Any, version: Make) -> None:
    runtime = AdapterRuntime(backend, capacity=2)
    versions = [version(value) for value in range(1, 4)]
    known = {item.digest: float(value) for value, item in enumerate(versions, 1)} | {NULL: 0.0}
    faults: list[Any] = []

    def churn() -> None:
        for item in versions * 30:
            item.install(runtime)
            runtime.predict([{}])
            runtime.rollback()

    def serve() -> None:
        for _ in range(500):
            served = runtime.predict([{}])
            if served.predictions != [known[served.slot.digest]]:
                faults.append(served)

    threads = [threading.Thread(target=churn), threading.Thread(target=serve), threading.Thread(target=serve)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (faults, runtime.pins) == ([], {})
    assert len(runtime.slots) <= 1 + 3
