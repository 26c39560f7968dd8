"""What changes the answers: on its own listener, by versions' names alone; and following a channel."""

from __future__ import annotations

import socket
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from federated.device import AdapterRuntime
from federated.device.serving import Control, Directory, Tokens, admin_listener, public_listener
from federated.errors import DeviceError


def load(site: Any, name: str, version: str, **more: Any) -> httpx.Response:
    return site.admin.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": version, **more})


def text_of(site: Any, model: str | None = None) -> str:
    return str(site.ask(max_tokens=1, model=model).json()["choices"][0]["text"]).strip()


def test_an_adapter_is_loaded_asked_replaced_and_unloaded(site: Any) -> None:
    two, three = site.shelf.names["v2"], site.shelf.names["v3"]
    loaded = load(site, "support", "v2").json()
    assert loaded == {"lora_name": "support", "slot": two.digest, "version": two.version_id, "label": "v2"}
    assert (text_of(site, "support"), text_of(site)) == ("2", "1")
    taken = load(site, "support", "v3")
    assert (taken.status_code, taken.json()["error"]["code"]) == (409, "name_taken")
    assert text_of(site, "support") == "2"
    assert load(site, "support", "v3", load_inplace=True).json()["slot"] == three.digest
    assert text_of(site, "support") == "3"
    assert text_of(site, f"support@sha256:{two.digest}") == "2"  # whoever kept the exact name gets the exact slot
    gone = site.admin.post("/v1/unload_lora_adapter", json={"lora_name": "support"})
    assert gone.json() == {"lora_name": "support", "slot": three.digest}
    for model in ("support", f"support@sha256:{three.digest}", f"support@sha256:{two.digest}"):
        refused = site.ask(model=model)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_found")


def test_a_name_with_anothers_digest_leads_nowhere(site: Any) -> None:
    load(site, "support", "v2")
    assert site.ask(model=f"support@sha256:{site.shelf.names['v1'].digest}").status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "../secrets",
        "a/b",
        "http://example.org/adapter",
        "file:///x",
        "s3://bucket/x",
        "..",
        "a\\b",
        "",
        "hf:org/name",
        "v1\n",
    ],
)
def test_no_request_names_a_path_or_url(site: Any, path: str) -> None:
    refused = load(site, "x", path)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "not_a_version_name")
    assert "Paths and URLs are refused" in refused.json()["error"]["message"]
    assert site.public.get("/v1/models").json()["data"][2:] == site.public.get("/v1/models").json()["data"][2:]
    assert site.ask(model="x").status_code == 404


@pytest.mark.parametrize("name", ["null", "stable", "tiny:echo", "a/b", "", "x" * 65])
def test_names_that_cannot_be_loaded(site: Any, name: str) -> None:
    assert load(site, name, "v2").status_code == 400
    assert text_of(site) == "1"


def test_an_unknown_version_is_404_and_a_refused_one_leaves_all_as_it_was(site: Any) -> None:
    assert load(site, "x", "v9").status_code == 404
    before = site.admin.get("/admin/status").json()
    assert site.admin.post("/v1/unload_lora_adapter", json={"lora_name": "x"}).status_code == 404
    assert site.admin.get("/admin/status").json() == before


def test_activate_null_and_back(site: Any) -> None:
    made = site.admin.post("/admin/activate", json={"model": "null"}).json()
    assert (made["kind"], made["slot"], text_of(site)) == ("null", "null", "0")
    back = site.admin.post("/admin/rollback").json()
    assert (back["kind"], text_of(site)) == ("rollback", "1")
    assert site.admin.post("/admin/activate", json={"model": "nobody"}).status_code == 404
    assert site.admin.post("/admin/activate", json={"model": "tiny:echo"}).status_code == 400
    status = site.admin.get("/admin/status").json()
    assert status["swaps"] == 3
    assert status["active"]["label"] == "v1"


def test_routes_are_set_and_taken_away(site: Any) -> None:
    load(site, "hers", "v2")
    assert site.admin.post("/admin/route", json={"user": "ann", "model": "hers"}).json()["users"] == {"ann": "hers"}
    assert site.ask(max_tokens=1, user="ann").json()["choices"][0]["text"] == "2 "
    assert site.admin.post("/admin/route", json={"user": "ann"}).json()["users"] == {}
    assert site.ask(max_tokens=1, user="ann").json()["choices"][0]["text"] == "1 "
    assert site.admin.post("/admin/route", json={"user": "ann", "model": "nobody"}).status_code == 404
    assert site.admin.post("/admin/route", json={"user": "ann", "arm": "b"}).status_code == 400
    assert site.admin.post("/admin/route", json={"arm": "b", "model": "hers"}).json()["arms"] == {"b": "hers"}


def test_models_lists_base_null_names_and_exact_slots(site: Any) -> None:
    load(site, "support", "v2")
    one, two = site.shelf.names["v1"], site.shelf.names["v2"]
    listed = site.public.get("/v1/models").json()
    assert [(m["id"], m["root"]) for m in listed["data"]] == [
        ("tiny:echo", one.version_id),
        ("null", "null"),
        ("stable", one.version_id),
        ("support", two.version_id),
        (f"stable@sha256:{one.digest}", one.version_id),
        (f"support@sha256:{two.digest}", two.version_id),
    ]
    assert [m["parent"] for m in listed["data"]] == [None, *["tiny:echo"] * 5]
    for model in listed["data"]:
        assert site.public.get(f"/v1/models/{model['id']}").json() == model
    assert site.public.get("/v1/models/nobody").status_code == 404


def test_the_public_listener_has_no_admin_verbs_and_each_has_its_own_token(sites: Callable[..., Any]) -> None:
    with sites(tokens=["public-token-for-tests"]) as site:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/admin/activate", "/admin/rollback"):
            assert site.public.post(path, json={}).status_code == 404
        assert site.public.get("/admin/status").status_code == 404
        theirs = {"authorization": "Bearer public-token-for-tests"}
        assert site.admin.post("/admin/rollback", headers=theirs).status_code == 401
        assert site.admin.get("/metrics", headers=theirs).status_code == 401
        assert site.admin.post("/v1/completions", json={"prompt": "x"}).status_code == 404
        assert text_of(site) == "1"


def test_an_admin_port_needs_a_token(site: Any) -> None:
    with pytest.raises(DeviceError, match="--admin-token-file"):
        admin_listener(site.service, tokens=Tokens())


def test_an_admin_socket_belongs_to_its_owner(site: Any, socket_path: Path, run_server: Callable[..., Any]) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(socket_path))  # as a killed server leaves it
    listener = admin_listener(site.service, tokens=Tokens(), path=socket_path)
    assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
    transport = httpx.HTTPTransport(uds=str(socket_path))
    other = public_listener(site.service, port=0)
    with (
        run_server(type(site.service)(site.service.runtime, site.control, speaks="text"), [other, listener]),
        httpx.Client(transport=transport, base_url="http://admin") as client,
    ):
        assert client.get("/admin/status").json()["active"]["label"] == "v1"
        with pytest.raises(DeviceError, match="cannot be bound"):
            admin_listener(site.service, tokens=Tokens(), path=socket_path)  # somebody listens there
    assert not socket_path.exists()
    socket_path.write_text("a file")
    with pytest.raises(DeviceError, match="cannot be bound"):
        admin_listener(site.service, tokens=Tokens(), path=socket_path)
    assert socket_path.read_text() == "a file"


def test_a_channel_is_followed(site: Any) -> None:
    site.shelf.names["stable"] = site.shelf.names["v2"]
    site.wait_for(lambda: text_of(site) == "2")
    assert text_of(site, "stable") == "2"
    assert text_of(site, f"stable@sha256:{site.shelf.names['v1'].digest}") == "1"


def test_what_was_rolled_back_from_comes_back_only_when_the_channel_moves(sites: Callable[..., Any]) -> None:
    with sites(poll_seconds=3600) as site:
        site.shelf.names["stable"] = site.shelf.names["v2"]
        assert site.admin.post("/admin/follow").json()["changed"]
        site.admin.post("/admin/rollback")
        assert site.admin.post("/admin/follow").json() == {"changed": False}
        assert text_of(site) == "1"
        site.shelf.names["stable"] = site.shelf.names["v3"]
        assert site.admin.post("/admin/follow").json()["changed"]
        assert text_of(site) == "3"


def test_a_broken_store_leaves_service_and_says_stale(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    assert site.public.get("/healthz").json() == {
        "status": "ok", "alive": True, "ready": True, "stale": False, "reason": None
    }  # fmt: skip
    site.shelf.broken = True
    site.wait_for(lambda: site.public.get("/healthz").json()["stale"])
    told = site.public.get("/healthz")
    assert (told.status_code, told.json()["reason"], "secret" in told.text) == (200, "OSError", False)
    assert text_of(site) == "1"
    assert "fedpeft_stale 1.0" in site.public.get("/metrics").text
    assert "secret" not in caplog.text
    site.shelf.broken = False
    site.wait_for(lambda: site.public.get("/healthz").json()["status"] == "ok")


def test_a_dropped_slot_is_brought_back_for_a_name(sites: Callable[..., Any]) -> None:
    with sites(capacity=2) as site:
        for name in ("v2", "v3", "v4"):
            load(site, f"name-{name}", name)
        held = {slot.label for slot in site.service.runtime.slots}
        assert held == {"null", "v1", "v4"}
        assert [text_of(site, f"name-{name}") for name in ("v2", "v3", "v4")] == ["2", "3", "4"]
        assert site.control.refill(site.service.runtime, "f" * 64) is False


def test_without_a_store_nothing_is_loaded_and_nothing_followed(site: Any) -> None:
    runtime = AdapterRuntime(site.backend)
    control = Control(runtime, Directory(runtime, "base"))
    assert control.follow() is None
    with pytest.raises(DeviceError, match="--registry"):
        control.load("x", "v1")
    assert control.refill(runtime, "f" * 64) is False


def test_what_an_agent_decides_is_not_changed_here(site: Any) -> None:
    runtime = site.service.runtime
    trouble: list[str | None] = [None]
    control = Control(runtime, site.control.directory, ruler="ask the agent", troubled=lambda: trouble[0])
    for change in (
        lambda: control.load("x", "v2"),
        lambda: control.unload("stable"),
        lambda: control.activate("null"),
        control.rollback,
    ):
        with pytest.raises(DeviceError, match="ask the agent") as refused:
            change()
        assert refused.value.status == 409
    assert runtime.active.label == "v1"
    control.route(user="ann", name="stable")
    assert control.stale is None
    trouble[0] = "Unreachable"
    assert control.stale == "Unreachable"


class Heard:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def success(self, digest: str) -> None:
        self.told.append((digest, "good"))

    def failure(self, digest: str, reason: str) -> None:
        self.told.append((digest, reason))


def test_what_a_slot_does_is_told_without_a_word_of_the_request(sites: Callable[..., Any]) -> None:
    heard = Heard()
    with sites(health=heard) as site:
        one = site.shelf.names["v1"].digest
        site.ask(max_tokens=1)
        site.ask(prompt="break")
        site.ask(prompt="too long")  # the request's own fault
        site.wait_for(lambda: len(heard.told) == 2)
        assert heard.told == [(one, "good"), (one, "the model raised RuntimeError")]
    heard = Heard()
    with sites(health=heard, speaks="labels") as site:
        for text in ("a", "crash", "bad"):
            site.ask("/classify", input=text)
        assert heard.told == [(one, "good"), (one, "the model raised RuntimeError")]


def test_a_refused_version_of_the_channel_is_left_alone_for_a_time(site: Any) -> None:
    now, shelf, runtime = [0.0], site.shelf, site.service.runtime
    tried: list[str] = []
    install = runtime.install

    def counted(manifest: Any, weights: bytes, **more: Any) -> Any:
        if threading.current_thread() is threading.main_thread():  # the fixture's server follows as well
            tried.append(more["version_id"])
        return install(manifest, weights, **more)

    runtime.install = counted
    control = Control(runtime, Directory(runtime, "tiny:echo"), shelf, channel="stable", clock=lambda: now[0])
    bad, times = replace(shelf.names["v2"], manifest=replace(shelf.names["v2"].manifest, method="refused")), []
    shelf.names |= {"stable": bad}
    for second in range(0, 15_001, 60):
        now[0], before = second, len(tried)
        with suppress(DeviceError):
            assert control.follow(patient=True) is None
        if len(tried) > before:
            times.append(second)
        assert control.stale == "DeviceError"
    assert times == [0, 60, 180, 420, 900, 1860, 3780, 7380, 10_980, 14_580]
    with pytest.raises(DeviceError):
        control.follow()  # by hand: at once
    shelf.broken = True
    with pytest.raises(OSError, match="secret"):
        control.follow(patient=True)
    assert control.stale == "OSError"
    shelf.broken = False
    assert control.follow(patient=True) is None
    assert control.stale == "DeviceError"
    shelf.names |= {"stable": shelf.names["v1"]}
    assert control.follow(patient=True) is not None
    assert control.stale is None


def test_a_name_that_goes_while_a_request_is_on_its_way_is_not_found(site: Any, monkeypatch: Any) -> None:
    site.control.load("two", "v2")
    wanted = site.service.directory.wanted

    def late(*args: Any, **more: Any) -> Any:
        found = wanted(*args, **more)
        site.control.unload("two")
        return found

    monkeypatch.setattr(site.service.directory, "wanted", late)
    done = site.ask(model="two")
    assert (done.status_code, done.json()["error"]["code"]) == (404, "model_not_found")
