"""The status page over HTTP: what it shows, what it escapes, and whom it does not answer."""

from __future__ import annotations

import http.client
import json
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from federated.deployment.layout import Layout
from federated.deployment.overview import Gatherer
from federated.deployment.overview_records import (
    Account,
    ChannelView,
    DeviceView,
    Overview,
    ProcessView,
    RoundView,
    RunView,
    VersionView,
)
from federated.deployment.server_config import ServerConfig
from federated.deployment.status_metrics import metrics_text
from federated.deployment.status_page import StatusServer, render

NOW = 1_800_000_000.0
LAST = RoundView(3, True, "cd" * 32, 2, 3, 6.5, 23_000, 20_000, 0.51, {"loss": 0.7, "accuracy": 0.5})
RUN = RunView(
    name="first", run_id="tiny-ab", state="running", message="", method="fedit + sgd", attempts=2, submitted=NOW - 900,
    last_event=NOW - 4, rounds=10, rounds_done=3, current_round=4, cohort=("north", "south"), answered=1,
    last_round=LAST, history=((1, 1.0, 1.2), (2, 0.7, None), (3, 0.51, 0.7)),
    accounts=(Account("client", 1.5, 1e-5, 8.0),), not_protected=("metrics",), refusals={"late": 2},
    refusals_by_client={"south": {"late": 2}}, not_now={"south": {"charging": 3}}, problems={"unknown_node": 1},
)  # fmt: skip
DEVICE = DeviceView("north", "approved", NOW - 40, 54_000, 173_000, 432, 3, 3)
VIEW = Overview(
    at=NOW, federation="clinics", door="https://fed.example.org:9443", secured=True, up=True,
    processes=[ProcessView("door", "RUNNING", 17, 3600.0)], devices=[DEVICE], devices_by_state={"approved": 1},
    devices_left_out=0, invitations=0, bytes_up=55_000, bytes_down=174_000, strange_requests=0, refused_at_door=4,
    runs=[RUN], runs_left_out=0,
    versions=[VersionView("cd" * 32, "tiny-ab:v3", "2027-01-15T08:00:00+00:00", ("dev",), 2, True)],
    channels=[ChannelView("dev", "cd" * 32)], faults=(),
)  # fmt: skip


@pytest.fixture
def page(tmp_path: Path) -> Iterator[StatusServer]:
    (tmp_path / "runs").mkdir()
    with StatusServer(Gatherer(Layout(tmp_path), ServerConfig(name="clinics")), 0) as server:
        yield server


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


def asked(server: StatusServer, path: str, host: str | None = None, method: str = "GET") -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request(method, path, headers={"Host": host} if host is not None else {})
        found = connection.getresponse()
        headers = {name.lower(): value for name, value in found.getheaders()}
        return Answer(found.status, headers, found.read().decode())
    finally:
        connection.close()


def test_the_three_places_answer(page: StatusServer) -> None:
    html = asked(page, "/")
    assert html.headers["content-type"] == "text/html; charset=utf-8"
    assert "clinics" in html.text
    assert json.loads(asked(page, "/api/status").text)["federation"] == "clinics"
    families = {one.name for one in text_string_to_metric_families(asked(page, "/metrics").text)}
    assert {"fedpeft_up", "fedpeft_door_bytes"} <= families


@pytest.mark.parametrize("path", ["/", "/api/status", "/metrics"])
@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "", "[::2]"])
def test_another_host_name_is_refused_and_told_nothing(page: StatusServer, path: str, host: str) -> None:
    answer = asked(page, path, host)
    assert answer.status in (400, 403)
    assert "clinics" not in answer.text


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "LOCALHOST:8080", "[::1]:9"])
def test_this_machines_names_are_answered(page: StatusServer, host: str) -> None:
    assert asked(page, "/api/status", host).status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed_and_no_other_site_may_read(page: StatusServer, method: str) -> None:
    answer = asked(page, "/api/status", method=method)
    assert answer.status == 405
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/nothing", "/api/status/", "/../etc/passwd"])
def test_there_is_nothing_else(page: StatusServer, path: str) -> None:
    assert asked(page, path).status in (404, 307)


@pytest.mark.parametrize("path", ["/", "/metrics", "/nothing"])
def test_answers_are_not_kept_framed_or_guessed_at(page: StatusServer, path: str) -> None:
    headers = asked(page, path).headers
    assert (headers["cache-control"], headers["x-frame-options"]) == ("no-store", "DENY")
    assert headers["x-content-type-options"] == "nosniff"


def test_it_listens_on_loopback_alone(page: StatusServer) -> None:
    with socket.socket() as probe:
        probe.connect(("127.0.0.1", page.port))
        assert probe.getpeername()[0] == "127.0.0.1"
    with socket.socket() as other:  # a port of all addresses could not be taken beside it
        other.bind(("127.0.0.2", page.port))


def test_a_port_that_is_taken_is_said(page: StatusServer, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="in use"):
            StatusServer(Gatherer(Layout(tmp_path), ServerConfig()), taken.getsockname()[1])


def test_the_policy_lets_only_the_pages_own_script_run(page: StatusServer) -> None:
    answer = asked(page, "/")
    policy, text = answer.headers["content-security-policy"], answer.text
    (nonce,) = set(re.findall(r"script-src 'nonce-([\w-]+)'", policy))
    assert re.findall(r"<script[^>]*>", text) == [f'<script nonce="{nonce}">']
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert nonce not in asked(page, "/").headers["content-security-policy"]


def test_it_shows_rounds_devices_versions_epsilon_and_refusals() -> None:
    text = re.sub(r"<[^>]+>", " ", render(VIEW, nonce="n"))
    text = re.sub(r"\s+", " ", text)
    for expected in (
        "3 of 10 rounds; in round 4 1 of 2 clients have answered", "3: 2 of 3 clients, 6.5 s",
        "held-out accuracy 50.0 %", "3 times, 1 client", "1.5 of 8, each client, target_delta 1e-05", "2 &times; late",
        "north approved 40 s ago 54.0 kB 173 kB 432 3 3",
        "tiny-ab:v3 cdcdcdcdcdcd dev 2", "door running 17 60 min", "Not protected by epsilon: metrics.",
    ):  # fmt: skip
        assert expected in text, expected


def test_it_is_whole_without_scripts_and_without_a_network() -> None:
    text = render(VIEW, nonce="n")
    assert '<noscript><meta http-equiv="refresh"' in text
    assert re.findall(r"(?:src|href)=\"([^\"]+)\"", text) == ["data:,", "/api/status", "/metrics"]
    assert "style=" not in text  # the policy would drop it


EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>\x1b[31m\u202e\x00\n"


def hostile() -> Overview:
    run = replace(
        RUN, name=EVIL, run_id=EVIL, state=EVIL, message=EVIL, method=EVIL, not_protected=(EVIL,), refusals={EVIL: 1},
        refusals_by_client={EVIL: {EVIL: 1}}, not_now={EVIL: {EVIL: 1}}, problems={EVIL: 1}, cohort=(EVIL,),
        accounts=(Account(EVIL, 1.0, 1e-5),), last_round=replace(LAST, version_id=EVIL, evaluation={EVIL: 1.0}),
    )  # fmt: skip
    return replace(
        VIEW, federation=EVIL, door=EVIL, runs=[run], faults=(EVIL,), processes=[ProcessView(EVIL, EVIL, 1, 1.0)],
        devices=[replace(DEVICE, client_id=EVIL, state=EVIL, refusals={EVIL: 1}, not_now={EVIL: 1})],
        versions=[VersionView(EVIL, EVIL, EVIL, (EVIL,), 1, False)], channels=[ChannelView(EVIL, EVIL)],
    )  # fmt: skip


def test_names_that_are_markup_and_control_characters_are_shown_as_text() -> None:
    text = render(hostile(), nonce="n")
    assert len(re.findall("<script", text)) == 1  # the page's own
    assert "<img" not in text
    assert [char for char in text if not char.isprintable() and char != "\n"] == []
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&#34;&#39;&gt;&lt;img" in text


def test_metrics_of_hostile_names_can_be_read_back() -> None:
    text = metrics_text(hostile()).decode()
    samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
    assert {sample.labels["client_id"] for sample in samples if "client_id" in sample.labels} == {EVIL}


def test_json_of_hostile_names_is_json() -> None:
    assert json.loads(json.dumps(hostile().to_dict()))["federation"] == EVIL


def test_huge_tables_are_cut_and_the_rest_is_counted() -> None:
    many = [replace(DEVICE, client_id=f"c{number:05}") for number in range(1000)]
    runs = [replace(RUN, name=f"r{number}") for number in range(50)]
    away = {f"c{number:05}": {"idle": 1} for number in range(2000)}
    view = replace(VIEW, devices=many, devices_left_out=500, runs=[replace(runs[0], not_now=away), *runs[1:]])
    text = render(replace(view, faults=tuple(map(str, range(5000)))), nonce="n")
    assert "1300 more devices are not shown" in text
    assert "42 older runs are not shown" in text
    assert len(text) < 400_000


def test_metrics_have_units_and_say_what_they_are() -> None:
    families = {one.name: one for one in text_string_to_metric_families(metrics_text(VIEW).decode())}
    assert all(one.documentation for one in families.values())
    wire = {tuple(one.labels.values()): one.value for one in families["fedpeft_device_wire_bytes"].samples}
    assert wire == {("north", "up"): 54_000, ("north", "down"): 173_000}
    (spent,) = families["fedpeft_run_epsilon"].samples
    assert (spent.value, spent.labels) == (1.5, {"run": "first", "unit": "client", "target_delta": "1e-05"})
    (state,) = families["fedpeft_run_info"].samples
    assert state.labels == {"run": "first", "state": "running"}


def test_a_loss_that_stands_still_or_is_missing_draws_a_line() -> None:
    flat = replace(RUN, history=((1, 0.5, None), (2, 0.5, None)))
    assert 'class="line"' in render(replace(VIEW, runs=[flat]), nonce="n")
    none = replace(RUN, history=((1, None, None), (2, None, None)), last_round=None)
    assert 'class="line"' not in render(replace(VIEW, runs=[none]), nonce="n")


def test_the_documentation_names_every_metric() -> None:
    page = (Path(__file__).parents[3] / "docs" / "observability.md").read_text()
    named = set(re.findall(r"`(fedpeft_(?!training_)[a-z_]+?)(?:_total)?`", page))
    assert named == {family.name for family in text_string_to_metric_families(metrics_text(VIEW).decode())}
