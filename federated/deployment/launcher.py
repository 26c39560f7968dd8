"""The device's launcher: runs an app's code only when the device's owner has pinned its bundle.

A SuperNode hands out the messages that it got, each with the app's bundle (FAB), and Flower's SuperExec runs it in a
process of its own. Flower compares the bundle with nothing that the device's owner said. Here an executor of ours
stands in that place: it computes the SHA-256 of the bundle's bytes, and what is not pinned is refused before anything
of it is unpacked or imported. The refusal is the answer that the server gets. What is pinned is unpacked from those
bytes and loaded from there (`federated.deployment.pinned_app`), whatever the server calls it.

It forks for each message. Warm, it has loaded the libraries before, and the base model, once a first message named it;
cold, each training loads them, and a question nothing. What it uses of Flower's internals is in this module alone. With
a version that `federated.deployment.flower_environment` does not name, each message has a new Python; where a name that
the check hangs on is missing, nothing runs at all.

It is started by `federated.deployment.joining`, as ``python -m federated.deployment.launcher``, and reads what it
needs as one line of JSON from standard input: a command line can be read by every user of a machine.
"""

from __future__ import annotations

import fcntl
import importlib
import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

from federated.deployment.flower_environment import TESTED
from federated.deployment.pinned_app import TaskApp, check_bundle, remove_unpacked
from federated.device_events import PINNED, note_event
from federated.errors import DeploymentError
from federated.logs import LogFormat, set_up_logs

__all__ = ["Launch", "PinnedExecutor", "fits"]

_LOG = logging.getLogger(__name__)

_CLIENT = "flwr.supernode.runtime.run_clientapp"
_SUPEREXEC = "flwr.supercore.superexec.run_superexec"
_LIGHT = (_CLIENT, "federated.flower.client")
_HEAVY = ("torch", "transformers", "peft", "federated.flower.client_task")
_NEEDED = ((_CLIENT, "install_from_fab"), (_CLIENT, "get_load_client_app_fn"), (_SUPEREXEC, "get_executor"))
_TOLD_TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)
_NO_PIPE = -1
_MOST_WAITING = 32
_MOST_NEW = 3
"""New Pythons at once: at work, waiting for that one, and one whose message is half here."""
_LONGEST = 60_000
"""Bytes that a pipe holds without a reader."""


@dataclass(frozen=True)
class Launch:
    """What a launcher is started with.

    Args:
        address: of the SuperNode's runtime interface.
        secret: path of the secret that it proves itself with there.
        apps: SHA-256 of the bundles that may run; empty: any.
        warm: hold the libraries and the base model in memory.
        poll_seconds: between two looks for a message.
        log_format: ``text`` or ``json``.
        longest_seconds: of work on one message; then its process is killed, so that the next one has its turn.
    """

    address: str
    secret: str
    apps: tuple[str, ...]
    warm: bool
    poll_seconds: float = 0.2
    log_format: LogFormat = "text"
    longest_seconds: int = 21_600


def fits(names: Collection[tuple[str, str]] = _NEEDED) -> None:
    """Check that Flower has what the launcher hangs on.

    Raises:
        DeploymentError: if it has not: then nothing may run, because nothing would be checked.
    """
    for module, name in names:
        try:
            found = hasattr(importlib.import_module(module), name)
        except ImportError:
            found = False
        if not found:
            raise DeploymentError(
                f"flwr {version('flwr')} has no {module}.{name}, where a bundle is checked before it runs; install "
                f"flwr {TESTED[0]}*"
            )


class PinnedExecutor:
    """Flower's executor protocol: one process for each message, which checks the bundle first.

    Args:
        launch: what may run, and how.
        forks: whether a process is forked from this one, or a new Python.
    """

    def __init__(self, launch: Launch, *, forks: bool = True) -> None:
        self._launch = launch
        self._forks = forks
        self._owner = os.getpid()
        self._children: dict[int, int] = {}  # process: the pipe on which it says what it opened
        self._parts = ""
        self._left = False  # whether a process was killed over its unpacked bundle

    def get_eligible_capacity(self, supported_task_types: set[TaskType], **_: Any) -> tuple[set[TaskType], set[str]]:
        """Client tasks, a few at a time; only one of them works, see `_working_alone`."""
        free = len(self._children) < self._most
        return (supported_task_types & {TaskType.CLIENT_APP} if free else set()), set()

    @property
    def _most(self) -> int:
        return _MOST_WAITING if self._forks else _MOST_NEW

    def wait_for_capacity(self, *_: Any, **__: Any) -> None:
        """Return when another process may be started."""
        while len(self._children) >= self._most:
            self.reconcile()
            time.sleep(self._launch.poll_seconds)

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start the process of one message."""
        if spec.task_type != TaskType.CLIENT_APP:
            return LaunchResult.failed(f"a device runs client apps alone, not {spec.task_type}")
        if self._launch.apps and spec.fab_hash and spec.fab_hash not in self._launch.apps:
            _LOG.warning("a message of app %s, which is not pinned: it will be refused", spec.fab_hash[:12])
        try:
            self._children.update([self._fork(spec) if self._forks else self._spawn(spec)])
        except OSError as error:  # no memory, no process: Flower lets the message fail after a minute
            _LOG.error("no process for a message: %s", error.strerror)
            return LaunchResult.failed(f"no process could be started: {error.strerror}")
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Take leave of processes that ended; open what the last one opened, for the next ones to inherit."""
        for child, pipe in list(self._children.items()):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                del self._children[child]
                self._note_end(status)
                self._take(pipe)
        if self._left and not self._children:
            remove_unpacked(Path(self._launch.secret).parent)
            self._left = False

    def _note_end(self, status: int) -> None:
        """Say what killed a process; one that ended by itself has answered or said why."""
        if not os.WIFSIGNALED(status):
            return
        if os.WTERMSIG(status) == signal.SIGALRM:
            _LOG.error("a message took more than %d s (training.longest_task): ended", self._launch.longest_seconds)
            note_event({"event": "answer", "kind": "app", "outcome": "refused", "reason": "took_too_long"})
        else:
            _LOG.warning("a message's process was ended by %s", signal.Signals(os.WTERMSIG(status)).name)
        self._left = True

    def close(self) -> None:
        """End what is at work; a forked child inherits this method and does nothing."""
        if os.getpid() != self._owner:
            return
        for child in self._children:
            os.kill(child, signal.SIGTERM)

    def _fork(self, spec: ExecutionSpec) -> tuple[int, int]:
        reading, writing = os.pipe()
        try:
            child = os.fork()
        except OSError:
            os.close(reading)
            os.close(writing)
            raise
        if not child:
            launch, parent = self._launch, self._owner
            _in_child(lambda: _task(launch, spec.token, parent=parent), writing)
        os.close(writing)
        return child, reading

    def _spawn(self, spec: ExecutionSpec) -> tuple[int, int]:
        command = [sys.executable, "-m", "federated.deployment.launcher", "task"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE)
        task = {"launch": asdict(self._launch), "token": spec.token}
        if process.stdin is not None:  # it was asked for
            process.stdin.write(json.dumps({**task, "parent": self._owner}).encode() + b"\n")
            process.stdin.close()
        process.returncode = 0  # reaped by `reconcile`, and by nobody else
        return process.pid, _NO_PIPE

    def _take(self, pipe: int) -> None:
        """Open here what the child opened, unless it is open: the next children have it then."""
        if pipe == _NO_PIPE:
            return
        ready, _, _ = select.select([pipe], [], [], 0)
        parts = os.read(pipe, _LONGEST).decode() if ready else ""
        os.close(pipe)
        if parts and parts != self._parts and self._launch.warm:
            self._parts = parts
            _warm_up(parts)


def _warm_up(parts: str) -> None:
    """Open a session here. What cannot be opened is no fault of this process: its child has said so to the server."""
    from federated.flower.session import open_parts

    try:
        began = time.monotonic()
        open_parts(parts)
        _LOG.info("the base model is in memory, after %.1f s", time.monotonic() - began)
    except Exception:  # noqa: BLE001 - whatever a server's configuration leads to: the next message loads it
        _LOG.warning("the base model is not kept in memory", exc_info=True)


def _in_child(work: Callable[[], None], pipe: int) -> NoReturn:
    """The forked child: without what its parent registered, and never back into its parent's code."""
    code = 1
    try:
        from flwr.supercore.exit import exit_handler

        exit_handler.registered_exit_handlers.clear()
        for name in _TOLD_TO_END:
            signal.signal(name, signal.SIG_DFL)
        work()
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 1
        _tell(pipe)
    except BaseException:  # noqa: BLE001 - the process ends here, whatever it was
        _LOG.exception("the task's process ended")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _tell(pipe: int) -> None:
    """Say what was opened, as far as a pipe holds it without a reader."""
    session: Any = sys.modules.get("federated.flower.session")  # not loaded: nothing was opened
    parts = (session.opened_parts() or "").encode() if session is not None else b""
    if pipe != _NO_PIPE and 0 < len(parts) <= _LONGEST:
        os.write(pipe, parts)


def _task(launch: Launch, token: str, *, parent: int) -> None:
    """Take one message from the SuperNode, check its app, run it, answer. Leaves with SystemExit, as Flower does."""
    fits()
    module: Any = importlib.import_module(_CLIENT)
    state = Path(launch.secret).parent

    def check(content: bytes) -> None:
        try:
            os.environ[PINNED] = check_bundle(content, launch.apps)
        except DeploymentError:
            note_event({"event": "answer", "kind": "app", "outcome": "refused", "reason": "app_not_pinned"})
            raise
        _working_alone(state / "working.lock", launch.longest_seconds)

    unpack, loader = module.install_from_fab, module.get_load_client_app_fn
    with TaskApp(state, unpack=unpack, loader=loader, check=check) as app:
        module.install_from_fab, module.get_load_client_app_fn = app.install, app.load_fn
        module.register_signal_handlers = _dying_on_signals(module.register_signal_handlers)
        module.run_clientapp(
            runtime_api_address=launch.address,
            token=token,
            insecure=True,
            parent_pid=parent,
            runtime_dependency_install=False,
        )


def _dying_on_signals(register: Callable[..., None]) -> Callable[..., None]:
    """Flower's exit handlers without its signal handlers.

    Told to end, or left alone by a launcher that was killed, Flower's task says "stopped" and gives no answer; the
    SuperNode, which works on one message at a time, then waits for that answer for ever. One that dies without a word
    is missed after a minute, answered for with an error, and the next message is taken.
    """

    def registered(*given: Any, **more: Any) -> None:
        register(*given, **more)
        for name in _TOLD_TO_END:
            signal.signal(name, signal.SIG_DFL)

    return registered


def _working_alone(path: Path, seconds: int) -> None:
    """Wait until no other task of this device works, and have so long for it; the lock goes with the process.

    The message is whole by then. One whose parts never come, because the server died while it sent them, waits for them
    in its process for as long as Flower says, and holds up nobody.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # dies of it, wherever it hangs
    signal.alarm(seconds)


def _serve(launch: Launch) -> None:
    """Look for messages until a signal says to stop."""
    fits()
    remove_unpacked(Path(launch.secret).parent)
    forks = version("flwr").startswith(TESTED)
    if forks:
        _load(warm=launch.warm)
    else:
        _LOG.warning("flwr %s: the launcher knows %s*; each message starts Python anew", version("flwr"), TESTED[0])
    module: Any = importlib.import_module(_SUPEREXEC)
    executor = PinnedExecutor(launch, forks=forks)
    module.get_executor = lambda *_, **__: executor
    os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] = str(launch.poll_seconds)
    module.run_superexec(
        runtime_api_address=launch.address,
        insecure=True,
        superexec_auth_secret=Path(launch.secret).read_bytes(),
        parent_pid=os.getppid(),
        runtime_dependency_install=False,
    )


def _load(*, warm: bool) -> None:
    """Load what each message needs, for the processes that are forked from this one."""
    began = time.monotonic()
    for name in (*_LIGHT, *(_HEAVY if warm else ())):
        importlib.import_module(name)
    if warm:
        importlib.import_module("torch").set_num_threads(1)
        _LOG.info("the libraries are in memory, after %.1f s", time.monotonic() - began)


def _launch_of(plain: dict[str, Any]) -> Launch:
    return Launch(**{**plain, "apps": tuple(plain["apps"])})


def _main() -> None:
    said = json.loads(sys.stdin.readline())
    task = sys.argv[1:] == ["task"]
    set_up_logs("launcher", said["launch"]["log_format"] if task else said["log_format"])
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    logging.getLogger("federated.flower.client").setLevel(logging.DEBUG)  # why a message is refused: said here alone
    if task:
        _in_child(lambda: _task(_launch_of(said["launch"]), said["token"], parent=said["parent"]), _NO_PIPE)
    _serve(_launch_of(said))


if __name__ == "__main__":
    _main()
