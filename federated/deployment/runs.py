"""Runs on a deployment: submitted, looked at, stopped, and continued when their server process died.

Flower never resumes a run: when its ServerApp is gone, the run has failed. Each round of ours is a version with its
training state, so the same submission with ``resume=true`` goes on from the last one. A submission is a file
``runs/NAME.json``; the run's own folder is ``runs/NAME/``.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from federated.deployment.app_bundle import app_digest, copied
from federated.deployment.flwr_command import CONNECTION, FlowerLink, toml_text
from federated.deployment.layout import Layout
from federated.deployment.server_config import ServerConfig
from federated.errors import ConfigError, DeploymentError
from federated.files import write_whole
from federated.run_lock import last_serving
from federated.tracking import read_events

__all__ = ["Runs", "Standing", "Submission"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OWN = ("run_dir", "registry", "admission.devices", "engine", "resume", "tracking.progress", "tracking.log_format")
"""Keys that a deployment sets by itself."""
_CAN_GO_ON = ("interrupted",)
"""Ends that are none: the process was told to end, or Flower gave it up while they could not reach each other."""
_LATE = 120.0  # seconds after which a server process should have begun
_FRUITLESS = 5
"""So many resumed attempts in a row without a new round, and the keeper gives up."""


@dataclass(frozen=True)
class Submission:
    """What was submitted.

    Args:
        name: of the run on this deployment.
        overrides: Hydra overrides, as for ``fedpeft simulate``.
        app: app folder.
        app_digest: SHA-256 of the bundle that the app was made into at the first submission.
        flower_runs: Flower's id of each attempt, the newest last.
        rounds_before: rounds that were finished when each attempt was submitted.
        submitted: seconds since the epoch.
        attempted: the same for the newest attempt.
        stopped: whether somebody stopped it: it does not go on by itself.
        gave_up: why the keeper no longer resumes it; empty while it would.
    """

    name: str
    overrides: tuple[str, ...]
    app: str
    app_digest: str
    flower_runs: tuple[str, ...] = ()
    rounds_before: tuple[int, ...] = ()
    submitted: float = 0.0
    attempted: float = 0.0
    stopped: bool = False
    gave_up: str = ""


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Args:
        submission: what was submitted.
        flower: Flower's word for the newest attempt, such as ``running`` or ``finished:failed``.
        state: ``running``, ``completed``, ``failed``, ``stopped``, or ``died``: its process is gone, and it can go on.
        rounds_done: newest round that made a version.
        rounds: that it shall have; 0 before it said so.
        message: why it ended.
    """

    submission: Submission
    flower: str
    state: str
    rounds_done: int
    rounds: int
    message: str


class Runs:
    """The runs of one deployment.

    Args:
        layout: of the deployment.
        config: of the deployment.
        clock: seconds since the epoch.
    """

    def __init__(self, layout: Layout, config: ServerConfig, *, clock: Callable[[], float] = time.time) -> None:
        self._layout = layout
        self._config = config
        self._link = FlowerLink(layout.flwr_home)
        self._clock = clock

    def submit(self, overrides: Sequence[str], *, name: str = "", app: Path | None = None) -> Submission:
        """Submit a run.

        Args:
            overrides: Hydra overrides.
            name: of the run; default: made from the time.
            app: app folder; default: the deployment's.

        Raises:
            ConfigError: for a name that is taken or unfit, or an override that the deployment sets itself.
            DeploymentError: if the SuperLink does not take it.
        """
        name = name or time.strftime("run-%Y%m%d-%H%M%S", time.gmtime(self._clock()))
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"run name {name!r}: expected up to 63 letters, digits and . _ -, a letter or digit first"
            )
        own = [one for one in overrides if one.partition("=")[0].lstrip("+") in _OWN]
        if own:
            raise ConfigError(f"{own[0]}: a deployment sets {', '.join(_OWN)} by itself; leave it out")
        folder = (app or self.app).resolve()
        first = Submission(name, tuple(overrides), str(folder), app_digest(folder), submitted=self._clock())
        with self._turn():
            if self._path(name).exists() or (self._layout.runs / name).exists():
                raise ConfigError(
                    f"run {name} is there already: 'fedpeft run resume {name}' goes on with it; or choose another"
                )
            return self._attempt(first, resume=False)

    def resume(self, name: str) -> Submission:
        """Go on with a run from its last published round.

        Raises:
            ConfigError: if it is unknown, or still running.
            DeploymentError: if the SuperLink does not take it.
        """
        with self._turn():
            standing = self.standing(name)
            if standing.state == "running":
                raise ConfigError(f"run {name} is running: 'fedpeft run stop {name}' ends it")
            return self._attempt(replace(standing.submission, stopped=False, gave_up=""), resume=True)

    def stop(self, name: str) -> Submission:
        """Stop a run; finished rounds are published, and `resume` goes on from there.

        Raises:
            ConfigError: if it is unknown.
            DeploymentError: if the SuperLink does not answer.
        """
        with self._turn():
            submission = replace(self.submission(name), stopped=True)
            self._write(submission)  # first: the keeper must not take it for one that died
            self._end_last(submission)
            return submission

    def logs(self, name: str) -> str:
        """What the newest attempt's ServerApp printed.

        Raises:
            ConfigError: if the run is unknown.
            DeploymentError: if the SuperLink does not answer.
        """
        return self._link.call("log", self.submission(name).flower_runs[-1], CONNECTION, "--show")

    @property
    def names(self) -> list[str]:
        """Of all runs, in order."""
        return sorted(path.stem for path in self._layout.runs.glob("*.json"))

    def submission(self, name: str) -> Submission:
        """One run's record.

        Raises:
            ConfigError: if there is none, or it cannot be read.
        """
        try:
            found = json.loads(self._path(name).read_text())
            lists = ("overrides", "flower_runs", "rounds_before")
            plain: dict[str, Any] = {key: tuple(one) if key in lists else one for key, one in found.items()}
            return Submission(**plain)
        except FileNotFoundError:
            raise ConfigError(f"no run {name} on this deployment; 'fedpeft run status' lists them") from None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{self._path(name)} cannot be read: {error}") from None

    @property
    def app(self) -> Path:
        """The deployment's app folder."""
        return (self._layout.folder / self._config.app).resolve()

    def folder(self, name: str) -> Path:
        """The run's own folder."""
        return self._layout.runs / name

    def standing(self, name: str) -> Standing:
        """How a run stands: by its own record, and by what Flower says of its process.

        Raises:
            ConfigError: if it is unknown.
            DeploymentError: if the SuperLink does not answer.
        """
        submission = self.submission(name)
        flower = self._flower(_newest(submission))
        done, rounds, end = self._recorded(submission)
        state = self._state(submission, end, lambda: flower)
        said = str(end.get("message", "")) or submission.gave_up or self._late(submission, state)
        return Standing(submission, flower, state, done, rounds, said)

    def _late(self, submission: Submission, state: str) -> str:
        """What to look at when Flower says that a process is running and none has begun; empty where all is well."""
        last, waited = last_serving(self.folder(submission.name)), self._clock() - submission.attempted
        begun = last is not None and last.since >= submission.attempted
        if state != "running" or begun or waited < _LATE:
            return ""
        logs = self._layout.logs
        return f"no server process has begun for {waited:.0f} s: see superlink.log and serverapps.log in {logs}"

    def goes_on(self, standing: Standing) -> bool:
        """Whether a run is going on, or will by itself."""
        kept = self._config.keep_going and not standing.submission.gave_up
        return standing.state == "running" or (standing.state == "died" and kept)

    def _state(self, submission: Submission, end: Mapping[str, Any], flower: Callable[[], str]) -> str:
        """By the lock that the serving process holds, by its own last word, and where it has neither, by Flower's."""
        last = last_serving(self.folder(submission.name))
        if last is not None and last.alive:
            return "stopped" if submission.stopped and _over(flower()) else "running"
        if end.get("status") not in (None, *_CAN_GO_ON):
            return str(end["status"])
        begun = bool(end) or (last is not None and last.since >= submission.attempted)
        if begun or _over(flower()):
            return "stopped" if submission.stopped else "died"
        return "running"

    def keep_going(self, name: str, *, ask: bool = True) -> Submission | None:
        """Resume a run whose process died and that nobody stopped; give up one that gets nowhere.

        Args:
            name: of the run.
            ask: Flower, of a process that has not begun to serve its run: it takes a second of processor time, and
                Flower misses a process after a minute.

        Returns:
            The new attempt, if there was need of one.

        Raises:
            ConfigError: if the run's record cannot be read.
            DeploymentError: if the SuperLink does not answer.
        """
        return self._gone_on(name, ask=ask) if self._is_dead(self.submission(name), ask=ask) else None

    def _is_dead(self, submission: Submission, *, ask: bool) -> bool:
        """Whether its process is gone, and nobody wanted that."""
        if submission.stopped or submission.gave_up:
            return False
        end = self._recorded(submission)[2]
        flower = partial(self._flower, _newest(submission)) if ask else str
        return self._state(submission, end, flower) == "died"

    def _gone_on(self, name: str, *, ask: bool) -> Submission | None:
        """Resume a run, unless somebody stopped or resumed it meanwhile, or it gets nowhere."""
        with self._turn():
            submission = self.submission(name)
            if not self._is_dead(submission, ask=ask):
                return None
            recent = submission.rounds_before[-_FRUITLESS:]
            if len(recent) == _FRUITLESS and recent[0] >= self._recorded(submission)[0]:
                self._write(replace(submission, gave_up=f"{_FRUITLESS} attempts in a row finished no round"))
                return None
            return self._attempt(submission, resume=True)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Who starts or stops a run does it alone: the keeper and commands are processes of their own."""
        self._layout.runs.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._layout.runs / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _attempt(self, submission: Submission, *, resume: bool) -> Submission:
        done, _, _ = self._recorded(submission)
        folder = self.folder(submission.name)
        begun = resume and (folder / "run.json").is_file()
        if resume:
            self._end_last(submission)
        if resume and not begun and folder.exists():
            shutil.rmtree(folder)  # killed before it had a name: a new one would be put beside it, where nobody looks
        overrides = [
            *submission.overrides,
            f"run_dir={self.folder(submission.name)}",
            f"registry={self._layout.registry}",
            "engine=deployment",
            "tracking.progress=false",
            *([] if self._config.insecure else [f"admission.devices={self._layout.devices_file}"]),
            *(["tracking.log_format=json"] if self._config.log_format == "json" else []),
            *(["resume=true"] if begun else []),
        ]
        now = self._clock()
        with tempfile.TemporaryDirectory() as place:
            copy, settings = copied(Path(submission.app), Path(place)), Path(place) / "run-config.toml"
            settings.write_text(f"overrides = {toml_text(shlex.join(overrides))}\n", encoding="utf-8")
            answer = self._link.record("run", str(copy), CONNECTION, "--run-config", str(settings))
        flower = str(answer.get("run-id") or answer.get("run_id") or "")
        if not flower:
            raise DeploymentError(f"flwr run gave no id: {answer}")
        made = replace(
            submission,
            flower_runs=(*submission.flower_runs, flower),
            rounds_before=(*submission.rounds_before, done),
            attempted=now,
        )
        self._write(made)
        return made

    def _end_last(self, submission: Submission) -> None:
        """Tell Flower that the last attempt is over, else its messages go on to devices until their time is up."""
        newest = _newest(submission)
        if not _over(self._flower(newest)):
            self._link.call("stop", newest, CONNECTION)

    def _flower(self, flower_run: str) -> str:
        if not flower_run:
            return "never submitted"
        runs = self._link.record("ls", CONNECTION, "--run-id", flower_run).get("runs") or []
        return str(runs[0].get("status", "unknown")) if runs else "unknown"

    def _recorded(self, submission: Submission) -> tuple[int, int, dict[str, Any]]:
        """Rounds done, rounds asked for, and how the newest attempt ended by its own word (empty: not)."""
        path = self.folder(submission.name) / "metrics.jsonl"
        if not path.is_file():
            return 0, 0, {}
        done, rounds, end = 0, 0, dict[str, Any]()
        for event in read_events(path):
            kind = event.get("event")
            if kind == "run":
                rounds = int(event.get("rounds", 0))
            elif kind == "round" and event.get("published"):
                done = max(done, int(event["round_number"]))
            elif kind == "end" and float(event["time"]) >= submission.attempted:
                end = dict(event)
        return done, rounds, end

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"run name {name!r}: expected up to 63 letters, digits and . _ -, a letter or digit first"
            )
        return self._layout.runs / f"{name}.json"

    def _write(self, submission: Submission) -> None:
        self._layout.runs.mkdir(parents=True, exist_ok=True)
        write_whole(self._path(submission.name), json.dumps(asdict(submission)).encode())


def _newest(submission: Submission) -> str:
    """Flower's id of the newest attempt; empty where there is none."""
    return submission.flower_runs[-1] if submission.flower_runs else ""


def _over(flower: str) -> bool:
    """Whether Flower's word for a run means that its process is gone."""
    return flower.startswith("finished") or flower in ("never submitted", "unknown")
