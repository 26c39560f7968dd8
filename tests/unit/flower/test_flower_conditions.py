"""The owner's conditions, on real folders that say what a kernel says, and on a NetworkManager that is a script."""

import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from federated.errors import ConfigError, NotNow
from federated.flower.conditions import Conditions, require
from federated.flower.host import Host

Make = Callable[..., Host]
ROUTES = """Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
{lines}"""
_LINE = "{name}\t{to}\t0101A8C0\t{flags}\t0\t0\t{metric}\t00000000\t0\t0\t0\n"


def line(name: str, *, to: str = "00000000", flags: str = "0003", metric: int = 100) -> str:
    return _LINE.format(name=name, to=to, flags=flags, metric=metric)


@pytest.fixture
def host(tmp_path: Path) -> Make:
    """A machine: its load, its power supplies by name, its routes, what nmcli prints, its time."""

    def make(
        *,
        load: str | None = "0.40 0.30 0.20 1/300 4242\n",
        power: dict[str, dict[str, str]] | None = None,
        routes: str | None = None,
        nmcli: str | None = None,
        now: str = "2026-11-27T12:00:00",
    ) -> Host:
        proc = tmp_path / "proc"
        (proc / "net").mkdir(parents=True, exist_ok=True)
        if load is not None:
            (proc / "loadavg").write_text(load)
        if routes is not None:
            (proc / "net" / "route").write_text(ROUTES.format(lines=routes))
        for name, files in (power or {}).items():
            for file, text in files.items():
                (tmp_path / "power" / name).mkdir(parents=True, exist_ok=True)
                (tmp_path / "power" / name / file).write_text(f"{text}\n")
        if power is not None:
            (tmp_path / "power").mkdir(exist_ok=True)
        script = tmp_path / "nmcli"
        if nmcli is not None:
            script.write_text(f"#!/bin/sh\n{nmcli}\n")
            script.chmod(0o700)
        moment = datetime.fromisoformat(now)
        return Host(proc, tmp_path / "power", str(script), cores=2, clock=lambda: moment)

    return make


def conditions(**plain: Any) -> Conditions:
    return TypeAdapter(Conditions).validate_python(plain)


def unmet(host: Host, store: Path = Path("/"), **plain: Any) -> str:
    """The name of the condition that does not hold; empty when all do."""
    try:
        require(conditions(**plain), store, host)
    except NotNow as error:
        return error.condition
    return ""


def test_what_is_not_asked_for_is_not_looked_at(tmp_path: Path) -> None:
    nowhere = Host(tmp_path / "no", tmp_path / "no", "no such command")
    require(Conditions(), tmp_path, nowhere)


class TestIdle:
    @pytest.mark.parametrize(("idle", "found"), [(0.2, ""), (0.19, "idle"), (1.0, "")])
    def test_the_load_of_the_last_minute_counts_per_core(self, host: Make, idle: float, found: str):
        assert unmet(host(load="0.40 9.00 9.00 1/300 4242\n"), idle=idle) == found

    @pytest.mark.parametrize("load", [None, "", "many\n"])
    def test_what_cannot_be_read_is_an_error(self, host: Make, load: str | None):
        with pytest.raises(ConfigError, match=r"the owner.s conditions cannot be looked at: .*loadavg"):
            unmet(host(load=load), idle=1.0)


BATTERY = {"type": "Battery", "status": "Discharging"}


class TestCharging:
    @pytest.mark.parametrize(
        ("power", "found"),
        [
            ({}, ""),
            ({"AC": {"type": "Mains", "online": "0"}}, ""),
            ({"BAT0": BATTERY}, "charging"),
            ({"BAT0": BATTERY | {"status": "Unknown"}}, "charging"),
            ({"BAT0": BATTERY | {"status": "Charging"}}, ""),
            ({"BAT0": BATTERY | {"status": "Full"}}, ""),
            ({"BAT0": BATTERY | {"status": "Not charging"}}, ""),
            ({"BAT0": BATTERY, "AC": {"type": "Mains", "online": "1"}}, ""),
            ({"BAT0": BATTERY, "usb": {"type": "USB", "online": "1"}}, ""),
            ({"BAT0": BATTERY, "AC": {"type": "Mains", "online": "0"}}, "charging"),
            ({"BAT0": BATTERY | {"status": "Full"}, "BAT1": BATTERY}, "charging"),
            ({"hidpp_battery_0": BATTERY | {"scope": "Device"}}, ""),
            ({"hidpp_battery_0": BATTERY | {"scope": "Device"}, "BAT0": BATTERY | {"scope": "System"}}, "charging"),
        ],
        ids=lambda value: str(value) or "holds",
    )
    def test_on_battery_or_not(self, host: Make, power: dict[str, dict[str, str]], found: str):
        assert unmet(host(power=power), charging=True) == found

    @pytest.mark.parametrize("power", [None, {"BAT0": {"type": "Battery"}}, {"BAT0": {"status": "Full"}}])
    def test_what_cannot_be_read_is_an_error(self, host: Make, power: Any):
        """No folder, a battery that does not say its state, a supply that does not say what it is."""
        with pytest.raises(ConfigError, match="No such file or directory; the client takes no part until"):
            unmet(host(power=power), charging=True)


class TestUnmetered:
    def test_interfaces_that_cost_are_the_owner_s_to_name(self, host: Make):
        both = host(routes=line("wwan0", metric=700) + line("eth0", metric=100) + line("wwan0", to="0000FEA9"))
        assert unmet(both, unmetered=True, metered_interfaces=["wwan0"]) == ""
        assert unmet(both, metered_interfaces=["wwan0", "eth0"]) == "unmetered"

    def test_the_default_route_of_the_smallest_metric_that_is_up_counts(self, host: Make):
        down = line("eth0", metric=1, flags="0002")
        assert unmet(host(routes=down + line("wwan0", metric=50)), metered_interfaces=["wwan0"]) == "unmetered"

    @pytest.mark.parametrize(
        ("said", "found"),
        [("yes", "unmetered"), ("yes (guessed)", "unmetered"), ("no", ""), ("no (guessed)", "")],
    )
    def test_network_manager_is_asked_about_that_interface(self, host: Make, said: str, found: str):
        script = f'[ "$5" = wlan0 ] && [ "$2" = GENERAL.METERED ] && echo "{said}"'
        assert unmet(host(routes=line("wlan0"), nmcli=script), unmetered=True) == found

    @pytest.mark.parametrize(
        ("nmcli", "words"),
        [
            (None, "No such file or directory; name the interfaces that cost in conditions.metered_interfaces"),
            ("echo unknown", "NetworkManager says 'unknown' of wlan0"),
            (
                "echo 'Error: NetworkManager is not running.' >&2; exit 8",
                "says 'Error: NetworkManager is not running.'",
            ),
            ("echo no; exit 10", "NetworkManager says 'no' of wlan0"),
        ],
    )
    def test_what_it_does_not_know_is_an_error(self, host: Make, nmcli: str | None, words: str):
        with pytest.raises(ConfigError, match=re.escape(words)):
            unmet(host(routes=line("wlan0"), nmcli=nmcli), unmetered=True)

    def test_one_that_hangs_is_not_waited_for(self, host: Make, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr("federated.flower.host._SECONDS", 0.05)
        with pytest.raises(ConfigError, match=r"did not answer within 0\.05 s"):
            unmet(host(routes=line("wlan0"), nmcli="exec sleep 30"), unmetered=True)

    @pytest.mark.parametrize(
        ("routes", "words"),
        [(None, "No such file"), ("", "no default route"), ("eth0\tx\n", "not a table of routes")],
    )
    def test_without_a_default_route_nothing_is_known(self, host: Make, routes: str | None, words: str):
        with pytest.raises(ConfigError, match=words):
            unmet(host(routes=routes), unmetered=True)


class TestHours:
    @pytest.mark.parametrize(
        ("hours", "now", "wait"),
        [
            ("22:00-06:00", "22:00:00", 0),
            ("22:00-06:00", "00:00:00", 0),
            ("22:00-06:00", "05:59:59", 0),
            ("22:00-06:00", "06:00:00", 3600),  # at most an hour, of 16
            ("22:00-06:00", "21:59:30", 30),
            ("22:00-06:00", "21:59:59", 1),
            ("09:00-17:30", "17:29:00", 0),
            ("09:00-17:30", "17:30:00", 3600),
            ("09:00-17:30", "08:50:00", 600),
        ],
    )
    def test_of_the_day_by_local_time(self, host: Make, hours: str, now: str, wait: float):
        there = host(now=f"2026-11-27T{now}")
        if not wait:
            require(conditions(hours=hours), Path("/"), there)
            return
        with pytest.raises(NotNow) as caught:
            require(conditions(hours=hours), Path("/"), there)
        assert (caught.value.condition, caught.value.seconds) == ("hours", wait)

    @pytest.mark.parametrize("hours", ["22-6", "24:00-06:00", "06:00-06:00", "06:00", "6:00-7:00", "22:00 - 06:00"])
    def test_what_is_no_hours_is_refused_at_once(self, hours: str):
        with pytest.raises(ValidationError, match="expected two different times of the day such as '22:00-06:00'"):
            conditions(hours=hours)


class TestRoom:
    def test_where_the_store_is_or_will_be(self, host: Make, tmp_path: Path):
        store = tmp_path / "not" / "made" / "yet"
        assert unmet(host(), store, free_disk_mb=0.001) == ""
        assert unmet(host(), store, free_disk_mb=1e12) == "free_disk_mb"

    def test_a_disk_that_does_not_say_is_an_error(self, host: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        def refuse(_: Path) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr("shutil.disk_usage", refuse)
        with pytest.raises(ConfigError, match="Input/output error"):
            unmet(host(), tmp_path, free_disk_mb=1)


def test_the_first_that_does_not_hold_is_named_and_says_when_to_ask_again(host: Make, tmp_path: Path) -> None:
    there = host(power={"BAT0": BATTERY})
    with pytest.raises(NotNow, match="its owner's condition 'charging' does not hold") as caught:
        require(conditions(charging=True, idle=0.01, ask_again=90), tmp_path, there)
    assert caught.value.seconds == 90.0


@pytest.mark.parametrize(
    "plain", [{"idle": 0}, {"idle": float("inf")}, {"free_disk_mb": -1}, {"ask_again": 0.5}, {"chargin": True}], ids=str
)
def test_nonsense_is_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        conditions(**plain)


def test_this_machine_says_its_load_and_its_room(tmp_path: Path) -> None:
    here = Host()
    assert here.load_per_core() >= 0
    assert here.free_mb(tmp_path) > 0
    assert here.clock().tzinfo is not None
