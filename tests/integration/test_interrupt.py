"""A run that is stopped in mid-round, by Ctrl-C or by a kill, loses no finished round and goes on to the same end."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from federated.cli.apps import load_client_app
from federated.cli.compose import compose
from federated.flower import simulate
from federated.registry import Registry, VersionRecord

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
FEDPEFT = Path(sys.executable).parent / "fedpeft"
ROUNDS = 4
OVERRIDES = (
    "experiment=tiny",
    f"rounds={ROUNDS}",
    "data.partition.num_clients=2",
    "train.steps=40",
    "engine.workers=2",
    "tracking.progress=false",
)
PATIENCE = 120  # seconds, for a busy machine


@dataclass(frozen=True)
class Stopped:
    """What a stopped run left, and what its resumption made of it."""

    exit_code: int
    stderr: str
    orphans: list[int]
    reported: set[str]
    faults: list[Any]
    before: list[VersionRecord]
    resumed: subprocess.CompletedProcess[str]
    after: list[VersionRecord]
    run_dir: Path


def _members(group: int) -> list[int]:
    """The living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, owner = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue  # it ended while we looked
        if int(owner) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def _wait(until: Callable[[], object], what: str, *, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def _events(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _round_begun(run_dir: Path, number: int) -> bool:
    return any(event["event"] == "round_start" and event["round_number"] == number for event in _events(run_dir))


def _hear_ctrl_c() -> None:
    """As at a terminal: what a shell starts in the background ignores Ctrl-C, and so does all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _running(run_dir: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """The command at work, as the leader of a process group that is gone afterwards."""
    run_dir.parent.mkdir()
    command = [str(FEDPEFT), "simulate", "--app", str(ROOT), *OVERRIDES, *overrides, f'run_dir="{run_dir}"']
    with (run_dir.parent / "stderr.txt").open("w") as stderr:
        process = subprocess.Popen(
            command,
            cwd=run_dir.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            text=True,
            start_new_session=True,
            preexec_fn=_hear_ctrl_c,
        )
    try:
        yield process
    finally:
        for member in _members(process.pid):
            os.kill(member, signal.SIGKILL)
        process.wait()


def _versions(run_dir: Path) -> tuple[list[VersionRecord], list[Any]]:
    """All versions by round, and what is wrong with the registry."""
    with Registry.open(run_dir / "registry", create=False) as registry:
        records = sorted(registry.versions(), key=lambda record: record.manifest.round_number)
        return records, list(registry.verify())


def _resume(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    _, *arguments = shlex.split(command)
    return subprocess.run(
        [FEDPEFT, *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )


def _observe(run_dir: Path, stop: Callable[[subprocess.Popen[str]], None], *, command: str | None = None) -> Stopped:
    """Start a run, stop it, look at what is left, and resume it with what it printed or the command given."""
    with _running(run_dir) as process:
        stop(process)
        code = process.wait(PATIENCE)
        end = time.monotonic() + 30  # a worker that lost its parent ends its client's steps first
        while (orphans := _members(process.pid)) and time.monotonic() < end:
            time.sleep(0.1)
    stderr = (run_dir.parent / "stderr.txt").read_text()
    reported = {event["version_id"] for event in _events(run_dir) if event["event"] == "round"}
    before, faults = _versions(run_dir)
    printed = re.search(r"to go on: (.+)", stderr)
    resumed = _resume(command or (printed[1] if printed else "fedpeft --help"), run_dir.parent)
    after, _ = _versions(run_dir)
    return Stopped(code, stderr, orphans, reported, faults, before, resumed, after, run_dir)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the weights that the same run ends with when nobody stops it."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    config = replace(compose(ROOT, OVERRIDES), run_dir=str(run_dir))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDPEFT_CLIENT_STORE", str(run_dir))  # the run sets its own: put back what was there
        return simulate(config, load_client_app(ROOT)).weights_digest


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """Ctrl-C at a terminal: SIGINT to every process of the group, in the middle of round 2."""
    run_dir = tmp_path_factory.mktemp("interrupted") / "my runs" / "one"

    def stop(process: subprocess.Popen[str]) -> None:
        _wait(lambda: _round_begun(run_dir, 2) or process.poll() is not None, "round 2")
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)

    return _observe(run_dir, stop)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """SIGKILL to the main process at a random moment, before the last round is over."""
    run_dir = tmp_path_factory.mktemp("killed") / "runs" / "one"
    moment = random.uniform(0.0, 3.0)  # noqa: S311 - a moment, not a secret
    print(f"killed {moment:.3f} s after the first event")

    def stop(process: subprocess.Popen[str]) -> None:
        _wait(lambda: (run_dir / "metrics.jsonl").is_file() or process.poll() is not None, "the run's first event")
        end = time.monotonic() + moment
        _wait(lambda: time.monotonic() > end or _round_begun(run_dir, ROUNDS), "the moment")
        process.kill()

    return _observe(run_dir, stop, command=f"fedpeft simulate --app {ROOT} --resume {run_dir}")


@pytest.fixture(params=["interrupted", "killed"])
def stopped(request: pytest.FixtureRequest) -> Stopped:
    """A run stopped one way or the other."""
    found: Stopped = request.getfixturevalue(request.param)
    return found


def test_ctrl_c_on_ray_ends_at_once_with_one_line(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "ray"
    with _running(run_dir, "engine=ray") as process:
        _wait(lambda: _round_begun(run_dir, 2) or process.poll() is not None, "round 2")
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(PATIENCE)
    stderr = (run_dir.parent / "stderr.txt").read_text()
    assert code == 130, stderr
    assert re.fullmatch(r"interrupted: stopped in round 2 of 4; .+; to go on: fedpeft simulate --resume .+\n", stderr)
    versions, faults = _versions(run_dir)
    assert [record.manifest.round_number for record in versions] == [0, 1]
    assert faults == []


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_ctrl_c_while_everything_is_still_loading(tmp_path: Path, seconds: float) -> None:
    run_dir = tmp_path / "runs" / "one"
    with _running(run_dir) as process:
        time.sleep(seconds)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(PATIENCE)
    stderr = (run_dir.parent / "stderr.txt").read_text()
    assert (code, stderr) == (130, "interrupted\n") or re.fullmatch(r"interrupted: .+\n", stderr)
    assert code == 130


def test_ctrl_c_exits_with_130(interrupted: Stopped) -> None:
    assert interrupted.exit_code == 130, interrupted.stderr


def test_ctrl_c_comes_in_mid_round(interrupted: Stopped) -> None:
    assert "stopped in round 2 of 4; finished rounds are published" in interrupted.stderr


def test_ctrl_c_leaves_one_line_without_traceback(interrupted: Stopped) -> None:
    assert re.fullmatch(r"interrupted: .+; to go on: fedpeft simulate --resume .+\n", interrupted.stderr)


def test_ctrl_c_ends_with_a_report(interrupted: Stopped) -> None:
    assert "interrupted" in (interrupted.run_dir / "report.html").read_text(encoding="utf-8")


def test_kill_comes_before_the_end(killed: Stopped) -> None:
    assert killed.exit_code == -signal.SIGKILL


def test_no_process_stays_behind(stopped: Stopped) -> None:
    assert stopped.orphans == []


def test_registry_is_sound(stopped: Stopped) -> None:
    assert stopped.faults == []


def test_what_was_reported_is_published(stopped: Stopped) -> None:
    assert stopped.reported <= {record.version_id for record in stopped.before}


def test_resumption_completes(stopped: Stopped) -> None:
    assert stopped.resumed.returncode == 0, stopped.resumed.stderr


def test_resumption_keeps_what_was_published(stopped: Stopped) -> None:
    kept = [record.version_id for record in stopped.after[: len(stopped.before)]]
    assert kept == [record.version_id for record in stopped.before]


def test_every_round_has_one_version(stopped: Stopped) -> None:
    assert [record.manifest.round_number for record in stopped.after] == list(range(ROUNDS + 1))


def test_end_is_that_of_a_run_that_was_never_stopped(stopped: Stopped, uninterrupted: str) -> None:
    assert stopped.after[-1].manifest.weights_digest == uninterrupted
