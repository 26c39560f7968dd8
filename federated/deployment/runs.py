"""Runs on a deployment: submitted, looked at, stopped, and continued when their server process died.

Flower never resumes a run: when its ServerApp is gone, the run has failed. Each round of ours is a version with its
training state, so the same submission with ``resume=true`` goes on from the last one. A submission is a file
``runs/NAME.json``; the run's own folder is ``runs/NAME/``.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from federated.deployment.joining import environment
from federated.deployment.layout import Layout
from federated.deployment.links import CONNECTION, Link
from federated.deployment.server_config import ServerConfig
from federated.errors import ConfigError, DeploymentError
from federated.files import write_whole
from federated.tracking import read_events

__all__ = ["Runs", "Standing", "Submission", "app_digest"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_OWN = ("run_dir", "registry", "admission.devices", "engine", "resume", "tracking.progress", "tracking.log_format")
"""Keys that a deployment sets by itself."""
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
        state: ``running``, ``completed``, ``failed``, ``stopped``, ``died`` (its process is gone, and it can go on) or
            ``interrupted``.
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


def app_digest(app: Path) -> str:
    """SHA-256 of the bundle that Flower makes of an app folder: what devices pin.

    Raises:
        DeploymentError: if Flower cannot make one.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = _copied(app, Path(place))
        done = subprocess.run(
            [str(Path(sys.executable).with_name("flwr")), "build", "--app", str(folder)],
            cwd=place,
            env=environment(Path(place) / "home"),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(Path(place).glob("*.fab"))
        if done.returncode or len(found) != 1:
            said = " ".join((done.stdout + done.stderr).split())[-400:]
            raise DeploymentError(
                f"flwr build {app}: {said}; an app folder has pyproject.toml, clients/ and strategies/"
            )
        return hashlib.sha256(found[0].read_bytes()).hexdigest()


def _copied(app: Path, place: Path) -> Path:
    """The app's own files alone: a bundle must not change with what lies about in a checkout."""
    try:
        name = str(tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))["project"]["name"])
    except (OSError, ValueError, KeyError, TypeError):
        raise DeploymentError(
            f"{app} is no app folder: expected a pyproject.toml with [project] name, and clients/, conf/, strategies/"
        ) from None
    folder = place / Path(name).name
    folder.mkdir()
    for name in ("clients", "conf", "strategies"):
        if (app / name).is_dir():
            shutil.copytree(app / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (app / name).is_file():
            shutil.copy(app / name, folder / name)
    return folder


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
        self._link = Link(layout, config)
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
        if self._path(name).exists() or (self._layout.runs / name).exists():
            raise ConfigError(
                f"run {name} is there already: 'fedpeft run resume {name}' goes on with it; or choose another"
            )
        own = [one for one in overrides if one.partition("=")[0].lstrip("+") in _OWN]
        if own:
            raise ConfigError(f"{own[0]}: a deployment sets {', '.join(_OWN)} by itself; leave it out")
        folder = (app or self.app).resolve()
        first = Submission(name, tuple(overrides), str(folder), app_digest(folder), submitted=self._clock())
        return self._attempt(first, resume=False)

    def resume(self, name: str) -> Submission:
        """Go on with a run from its last published round.

        Raises:
            ConfigError: if it is unknown, or still running.
            DeploymentError: if the SuperLink does not take it.
        """
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
        submission = replace(self.submission(name), stopped=True)
        self._write(submission)  # first: the keeper must not take it for one that died
        if submission.flower_runs and self._flower(submission.flower_runs[-1]).split(":")[0] != "finished":
            self._link.call("stop", submission.flower_runs[-1], CONNECTION)
        return submission

    def logs(self, name: str) -> str:
        """What the newest attempt's ServerApp printed.

        Raises:
            ConfigError: if the run is unknown.
            DeploymentError: if the SuperLink does not answer.
        """
        return self._link.call("log", self.submission(name).flower_runs[-1], CONNECTION, "--show")

    def submissions(self) -> list[Submission]:
        """All runs, the oldest first.

        Raises:
            ConfigError: if a record cannot be read.
        """
        names = sorted(path.stem for path in self._layout.runs.glob("*.json"))
        return sorted(map(self.submission, names), key=lambda one: one.submitted)

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
        except (OSError, ValueError, TypeError) as error:
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
        flower = self._flower(submission.flower_runs[-1]) if submission.flower_runs else "never submitted"
        done, rounds, end = self._recorded(submission)
        state = "running"
        if flower.startswith("finished") or flower in ("never submitted", "unknown"):
            state = str(end.get("status", "died")) if end else "died"
            state = "stopped" if submission.stopped and state != "completed" else state
        return Standing(submission, flower, state, done, rounds, str(end.get("message", "")) or submission.gave_up)

    def keep_going(self) -> list[Submission]:
        """Resume each run whose process died and that nobody stopped; give up one that gets nowhere.

        Raises:
            DeploymentError: if the SuperLink does not answer.
        """
        found = []
        for submission in self.submissions():
            if submission.stopped or submission.gave_up or self._ended(submission):
                continue
            standing = self.standing(submission.name)
            if standing.state != "died":
                continue
            recent = submission.rounds_before[-_FRUITLESS:]
            if len(recent) == _FRUITLESS and recent[0] >= standing.rounds_done:
                self._write(replace(submission, gave_up=f"{_FRUITLESS} attempts in a row finished no round"))
                continue
            found.append(self._attempt(submission, resume=True))
        return found

    def _ended(self, submission: Submission) -> bool:
        """Whether its newest attempt ended by itself, well or not: asked before Flower is, which takes a second."""
        return bool(self._recorded(submission)[2])

    def _attempt(self, submission: Submission, *, resume: bool) -> Submission:
        done, _, _ = self._recorded(submission)
        begun = resume and (self.folder(submission.name) / "run.json").is_file()
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
        text = "overrides=" + json.dumps(" ".join(map(_quoted, overrides)))
        with tempfile.TemporaryDirectory() as place:
            copy = _copied(Path(submission.app), Path(place))
            answer = self._link.record("run", str(copy), CONNECTION, "--run-config", text)
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

    def _flower(self, flower_run: str) -> str:
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


def _quoted(override: str) -> str:
    """An override as `shlex.split` gives it back: the server splits the text so."""
    return shlex.quote(override)
