"""What befalls devices in the field, on real processes: the round's rule decides, and its record names each of them.

One deployment of three devices serves one long run, with a deadline of a few seconds and a quorum of half; each test
does something to a device, waits for the round in which it shows, and for the one in which all is well again.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.deployment.loopback import free_ports
from federated.deployment.processes import Processes
from federated.deployment.server_config import read_server_config
from federated.registry import Registry
from simulations.deployments import Trial, processes, trial
from tests.integration.slow_link import SlowLink, slow_link

pytestmark = [pytest.mark.field, pytest.mark.timeout(900)]

ROOT = Path(__file__).resolve().parents[2]
CHANGED = Path(__file__).parent / "changed_device"
RUN = "faults"
DEADLINE = 10.0
TINY = ("experiment=tiny", "train.steps=2", "selection.min_clients=1", "selection.wait=240", "round.poll_interval=0.1")
NAMES = {"client-000", "client-001", "client-002"}
PATIENCE = 180.0


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    """Three devices and a run that goes on."""
    folder = tmp_path_factory.mktemp("faults")
    with trial(folder / "d", ["experiment=tiny", "rounds=1"], nodes=3) as here:
        rounds = ("rounds=100000", f"round.deadline={DEADLINE}", "round.quorum=0.5")
        here.fedpeft("run", "submit", *TINY, *rounds, "--name", RUN)
        well(here)
        yield here


def until(what: str, found: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """Wait for something; what it is."""
    end = time.monotonic() + seconds
    while not (result := found()):
        assert time.monotonic() < end, f"no {what} within {seconds:.0f} s"
        time.sleep(0.1)
    return result


def outcomes(here: Trial, since: float, run: str = RUN) -> Iterator[dict[str, Any]]:
    """What became of clients in rounds, since then."""
    return (one for one in here.events(run) if one["event"] == "client" and one["time"] > since)


def well(here: Trial, *, but: str = "") -> None:
    """Wait for a round in which everybody (but one) is well."""
    wanted, since = NAMES - {but}, time.time()

    def found() -> bool:
        rounds: dict[int, set[str]] = {}
        for one in outcomes(here, since):
            if one["status"] == "ok":
                rounds.setdefault(one["round_number"], set()).add(one["client_id"])
        return any(names >= wanted for names in rounds.values())

    until("round in which all is well", found)


def named(here: Trial, client: str, since: float, *statuses: str) -> dict[str, Any]:
    """The first round's record of a client with one of these ends."""
    one: dict[str, Any] = until(
        f"{'/'.join(statuses)} of {client}",
        lambda: next((e for e in outcomes(here, since) if e["client_id"] == client and e["status"] in statuses), None),
    )
    over = until(
        "end of that round",
        lambda: next(
            (
                e
                for e in here.events(RUN)
                if e["event"] == "round" and e["round_number"] == one["round_number"] and e["time"] > since
            ),
            None,
        ),
    )
    assert over["published"], over  # the others are a quorum
    return one


def begun(here: Trial) -> float:
    """Wait for the beginning of a round; when that was."""
    since = time.time()
    event = until(
        "round", lambda: next((e for e in here.events(RUN) if e["event"] == "round_start" and e["time"] > since), None)
    )
    return float(event["time"])


def send(here: Trial, client: str, name: signal.Signals, *kinds: str) -> None:
    """A signal to processes of a device."""
    for one in processes(here.folder):
        if one.device == client and (not kinds or one.name in kinds):
            os.kill(one.pid, name)


def test_one_that_dies_in_the_middle_of_a_round_is_named_and_comes_back(field: Trial) -> None:
    send(field, "client-002", signal.SIGSTOP, "launcher", "task")  # so that it has not answered when it dies
    since = begun(field)
    time.sleep(1.0)
    send(field, "client-002", signal.SIGKILL)
    found = named(field, "client-002", since, "late", "failed")
    assert found["status"] == "late" or "unavailable" in found["message"].lower(), found
    well(field)


def test_one_whose_launcher_dies_at_work_works_again(field: Trial) -> None:
    """Flower's task says "stopped" when its launcher is gone, and its SuperNode waits for the answer for ever."""
    until("task", lambda: any(one.name == "task" and one.device == "client-002" for one in processes(field.folder)))
    send(field, "client-002", signal.SIGKILL, "launcher")
    well(field)


def test_one_that_hangs_past_the_deadline_is_late_and_its_late_answer_changes_nothing(field: Trial) -> None:
    send(field, "client-002", signal.SIGSTOP, "launcher", "task")
    since = begun(field)
    found = named(field, "client-002", since, "late")
    send(field, "client-002", signal.SIGCONT, "launcher", "task")
    well(field)
    again = [e for e in outcomes(field, since) if e["client_id"] == "client-002" and e["status"] == "ok"]
    assert all(e["round_number"] > found["round_number"] for e in again)


@pytest.mark.skipif(os.geteuid() != 0, reason="a small file system can be mounted by root alone")
def test_one_whose_disk_is_full_says_so(field: Trial) -> None:
    store = field.layout.node("client-002").folder / "store"
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(store)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount")
    try:
        since = time.time()
        with (store / "ballast").open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
            while True:
                file.write(bytes(512))
        found = named(field, "client-002", since, "failed")
        assert "No space left on device" in found["message"]
        assert str(field.folder) not in found["message"]
    finally:
        subprocess.run(["umount", "-l", str(store)], check=True)
    well(field)


@contextmanager
def in_place_of(here: Trial, client: str, change: dict[str, Any], *, extra: dict[str, str]) -> Iterator[Path]:
    """A device that this test starts, with another configuration, in place of the supervised one; its log."""
    supervisor = [str(Path(sys.executable).with_name("supervisorctl")), "-s", f"unix://{Processes(here.layout).socket}"]
    node = here.layout.node(client)
    plain = yaml.safe_load(node.config.read_text())
    changed, log = node.folder / "changed.yaml", node.folder / "changed.log"
    changed.write_text(yaml.safe_dump({"training": {**plain["training"], **change}}))
    subprocess.run([*supervisor, "stop", f"node-{client}"], check=True, capture_output=True)
    command = [sys.executable, "-m", "federated.cli.main", "device", "join", "--config", str(changed)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FLWR_TELEMETRY_ENABLED": "0", **extra}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
    try:
        yield log
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        subprocess.run([*supervisor, "start", f"node-{client}"], check=True, capture_output=True)


class Changed:
    """A device with a library that may be told to do wrong, behind a link that may be slow."""

    def __init__(self, link: SlowLink, control: Path) -> None:
        self.link = link
        self.control = control


@pytest.fixture(scope="module")
def changed(field: Trial, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Changed]:
    """The third device, at another address and with another port of its own; it is well."""
    control = tmp_path_factory.mktemp("changed") / "fault"
    control.write_text("")
    extra = {"PYTHONPATH": f"{CHANGED}{os.pathsep}{ROOT}", "FEDPEFT_TEST_FAULT": str(control)}
    with slow_link(read_server_config(field.folder).door_port) as link:
        change = {"server": f"https://127.0.0.1:{link.port}", "port": free_ports(1)[0]}
        with in_place_of(field, "client-002", change, extra=extra):
            well(field)
            yield Changed(link, control)


def test_one_that_comes_back_with_another_address_is_the_same_client(field: Trial, changed: Changed) -> None:
    assert changed.link.passed > 0
    problems = [
        e for e in field.events(RUN) if e["event"] == "node_problem" and e["reason"] in ("name_taken", "wrong_key")
    ]
    assert not problems


def test_one_that_sends_an_old_update_again_is_refused(field: Trial, changed: Changed) -> None:
    until("first update", changed.control.with_name("first.packet").exists)
    well(field)
    changed.control.write_text("replay")
    found = named(field, "client-002", time.time(), "refused")
    assert found["reason"] in ("wrong_round", "wrong_token", "replay", "wrong_task"), found
    changed.control.write_text("")
    well(field)


def test_one_with_an_old_library_is_refused(field: Trial, changed: Changed) -> None:
    changed.control.write_text("old")
    found = named(field, "client-002", time.time(), "refused")
    assert found["reason"] == "wrong_protocol", found
    changed.control.write_text("")
    well(field)


def test_one_that_sends_half_an_update_holds_up_nobody(field: Trial, changed: Changed) -> None:
    changed.control.write_text("half")
    since = begun(field)
    found = named(field, "client-002", since, "late")
    over = next(e for e in field.events(RUN) if e["event"] == "round" and e["round_number"] == found["round_number"])
    in_time = [e["seconds"] for e in outcomes(field, since) if e["status"] == "ok" and e["time"] <= over["time"]]
    assert in_time
    assert max(in_time) < DEADLINE  # they were taken while its other half was not there
    assert over["time"] - since < DEADLINE + 5
    changed.control.write_text("")
    well(field)


def test_one_behind_a_slow_link_is_late_or_in_time_as_the_deadline_says(field: Trial, changed: Changed) -> None:
    changed.link.bytes_per_second = 600.0
    since = begun(field)
    assert named(field, "client-002", since, "late")["round_number"] > 0
    changed.link.bytes_per_second = 60_000.0
    well(field)
    changed.link.bytes_per_second = float("inf")


@pytest.mark.skipif(shutil.which("cc") is None, reason="a wrong clock needs a C compiler")
@pytest.mark.parametrize(("hours", "why"), [(-2, "certificate"), (1, "machine's clock")])
def test_one_with_a_wrong_clock_is_not_let_in_and_nobody_waits_for_it(
    field: Trial, tmp_path: Path, hours: int, why: str
) -> None:
    """Two hours behind, the server's certificate is not good yet; an hour ahead, the node's proof is not."""
    shim = tmp_path / "wrong_clock.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(shim), str(CHANGED / "wrong_clock.c")], check=True)
    extra = {"LD_PRELOAD": str(shim), "FEDPEFT_TEST_CLOCK": str(hours * 3600)}
    with in_place_of(field, "client-001", {}, extra=extra) as log:
        said = until("refusal", lambda: (t := log.read_text(errors="replace")) and "ended with code" in t and t)
        assert why in said.lower(), said[-2000:]
        since = time.time()
        well(field, but="client-001")
        assert not any(e["client_id"] == "client-001" and e["status"] == "ok" for e in outcomes(field, since))
    well(field)


def test_buffered_rounds_do_not_wait_for_a_straggler(field: Trial) -> None:
    field.fedpeft("run", "stop", RUN)
    mode = ("round.mode=buffered", "round.buffer=2", "round.concurrency=3", "round.deadline=600", "rounds=100000")
    field.fedpeft("run", "submit", *TINY, *mode, "--name", "buffered")

    def rounds() -> int:
        return field.rounds("buffered")

    until("version", lambda: rounds() >= 1)
    send(field, "client-002", signal.SIGSTOP, "launcher", "task")
    stopped, before = time.time(), rounds()
    until("versions without the straggler", lambda: rounds() >= before + 4)
    heard = [e for e in outcomes(field, stopped + 2, "buffered") if e["client_id"] == "client-002"]
    assert not heard
    send(field, "client-002", signal.SIGCONT, "launcher", "task")
    back = until(
        "update of the straggler",
        lambda: next((e for e in outcomes(field, stopped + 2, "buffered") if e["client_id"] == "client-002"), None),
    )
    assert back["status"] == "ok", back  # it weighs less, for it is some versions old
    with Registry.open(field.layout.registry, create=False) as registry:
        assert registry.verify() == []
