"""Names, users and arms: what a request is led to, and that no request sees half of a change."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from federated.device import NULL, AdapterRuntime, Route, Routes
from federated.errors import DeviceError

Make = Callable[..., Any]


@pytest.fixture
def routed(runtime: AdapterRuntime, version: Make) -> AdapterRuntime:
    """Versions 1 (active), 2 ("support", user ann) and 3 ("trial", arm b)."""
    for value in (1, 2, 3):
        version(value).install(runtime)
    runtime.activate(version(1).digest)
    runtime.reroute(
        lambda routes: (
            routes.named("support", version(2).digest)
            .named("trial", version(3).digest)
            .with_user("ann", "support")
            .with_arm("b", "trial")
        )
    )
    return runtime


@pytest.mark.parametrize(
    ("route", "value"),
    [
        (Route(), 1.0),
        (Route(name="trial", user="ann", arm="b"), 3.0),
        (Route(user="ann", arm="b"), 2.0),
        (Route(user="bob", arm="b"), 3.0),
        (Route(user="bob", arm="c"), 1.0),
        (Route(name=NULL, user="ann"), 0.0),
    ],
)
def test_the_first_that_is_known_decides(routed: AdapterRuntime, route: Route, value: float) -> None:
    assert routed.predict([{}], route=route).predictions == [value]


def test_an_unknown_name_is_refused_and_not_answered_by_another_adapter(routed: AdapterRuntime) -> None:
    with pytest.raises(DeviceError, match="no adapter named 'suport' on this device, found null, support, trial"):
        routed.predict([{}], route=Route(name="suport", user="ann"))
    assert routed.pins == {}


def test_a_digest_goes_before_the_route(routed: AdapterRuntime, version: Make) -> None:
    assert routed.predict([{}], digest=version(1).digest, route=Route(user="ann")).predictions == [1.0]


def test_a_name_moves_to_another_slot_for_new_requests_alone(routed: AdapterRuntime, version: Make) -> None:
    with routed.pin(route=Route(user="ann")) as slot:
        routed.reroute(lambda routes: routes.named("support", version(3).digest))
        assert slot.digest == version(2).digest
    assert routed.predict([{}], route=Route(user="ann")).predictions == [3.0]


def test_without_a_name_its_users_and_arms_fall_through(routed: AdapterRuntime) -> None:
    routed.reroute(lambda routes: routes.without("support").without("trial"))
    assert routed.routes == Routes()
    assert routed.predict([{}], route=Route(user="ann", arm="b")).predictions == [1.0]


def test_users_and_arms_can_be_let_go(routed: AdapterRuntime) -> None:
    routed.reroute(lambda routes: routes.with_user("ann", None).with_arm("b", None).with_arm("unknown", None))
    assert (dict(routed.routes.users), dict(routed.routes.arms)) == ({}, {})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda routes: routes.named("a/b", "x"), "name 'a/b' cannot be used"),
        (lambda routes: routes.named("..", "x"), r"name '\.\.' cannot be used"),
        (lambda routes: routes.named("x" * 65, "x"), "cannot be used; expected 1 to 64"),
        (lambda routes: routes.named(NULL, "x"), "'null' is the null adapter's name"),
        (lambda routes: routes.named("other", "f" * 64), "no slot 'ffffffffffff' on this device"),
        (lambda routes: routes.with_user("ann", "nobody"), "no adapter named 'nobody'"),
        (lambda routes: routes.with_user("a b", "support"), "user name 'a b' cannot be used"),
        (lambda routes: routes.with_arm("c", "nobody"), "no adapter named 'nobody'"),
        (lambda routes: routes.named("good", routes.names["support"]).with_arm("c", "bad"), "no adapter named 'bad'"),
    ],
)
def test_what_cannot_be_routed_changes_nothing(routed: AdapterRuntime, change: Any, message: str) -> None:
    before = routed.routes
    with pytest.raises(DeviceError, match=message):
        routed.reroute(change)
    assert routed.routes is before


def test_a_routing_cannot_be_changed_in_place(routed: AdapterRuntime) -> None:
    with pytest.raises(TypeError):
        routed.routes.names["support"] = "x"  # type: ignore[index]


def test_no_request_sees_half_of_a_change(routed: AdapterRuntime, version: Make) -> None:
    """Both names move together; whoever resolves both in one routing sees them equal."""
    digests = [version(value).digest for value in (1, 2, 3)]
    done, torn = threading.Event(), []

    def look() -> None:
        while not done.is_set():
            routes = routed.routes
            pair = routes.resolve(Route(name="support")), routes.resolve(Route(name="trial"))
            if pair[0] != pair[1]:
                torn.append(pair)

    routed.reroute(lambda routes: routes.named("support", digests[0]).named("trial", digests[0]))
    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for step in range(2000):
        digest = digests[step % 3]
        routed.reroute(lambda routes, to=digest: routes.named("support", to).named("trial", to))  # type: ignore[misc]
    done.set()
    for thread in threads:
        thread.join(10)
    assert torn == []


class Shelf:
    """Brings versions back when they are asked for."""

    def __init__(self, *versions: Any) -> None:
        self.versions = {one.digest: one for one in versions}
        self.asked: list[str] = []

    def __call__(self, runtime: AdapterRuntime, digest: str) -> bool:
        self.asked.append(digest)
        if digest not in self.versions:
            return False
        self.versions[digest].install(runtime)
        return True


def test_many_more_adapters_are_named_than_are_in_memory(backend: Any, version: Make) -> None:
    versions = [version(value) for value in range(1, 21)]
    runtime = AdapterRuntime(backend, capacity=2)
    shelf = Shelf(*versions)
    runtime.add_refill(shelf)
    for number, one in enumerate(versions, 1):
        runtime.reroute(lambda routes, n=number, d=one.digest: routes.named(f"user-{n}", d))  # type: ignore[misc]
    for number in (*range(1, 21), 20, 1):
        assert runtime.predict([{}], route=Route(name=f"user-{number}")).predictions == [float(number)]
        assert len(runtime.slots) <= 3
    assert len(shelf.asked) == 21  # number 20 was still there
    assert runtime.pins == {}


def test_refills_are_asked_in_turn_and_the_last_word_is_an_error(runtime: AdapterRuntime, version: Make) -> None:
    first, second = Shelf(), Shelf(version(5))
    runtime.add_refill(first)
    runtime.add_refill(second)
    assert runtime.predict([{}], digest=version(5).digest).predictions == [5.0]
    with pytest.raises(DeviceError, match="no slot 'eeee"):
        runtime.predict([{}], digest="e" * 64)
    assert first.asked == second.asked == [version(5).digest, "e" * 64]


def test_a_slot_that_never_stays_says_so(runtime: AdapterRuntime) -> None:
    runtime.add_refill(lambda runtime, digest: True)
    with pytest.raises(DeviceError, match="was dropped 8 times before it could answer; raise the capacity"):
        runtime.predict([{}], digest="e" * 64)
