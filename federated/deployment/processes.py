"""The processes of a deployment on this machine, kept by supervisor: started, watched, started again, logged, ended.

supervisor (http://supervisord.org) is a process manager without root; on a server, systemd does the same with the
units in ``docs/deploy/``. What is here writes its configuration and talks to it through its Unix socket.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
import xmlrpc.client
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from federated.deployment.flower_environment import environment, program
from federated.deployment.layout import Layout
from federated.deployment.server_config import ServerConfig
from federated.errors import DeploymentError
from federated.files import write_whole

__all__ = ["NotUp", "Processes", "Program", "State", "programs_of"]

_PATIENCE = 30.0
_LEAVE = 120.0
"""Seconds for all processes to end, one group after the other, each at most twelve."""
_WITH_PARENT = Path(__file__).with_name("with_parent.py")
_COMMENT = re.compile(r"\s[;#]|[\r\n]")
_LONGEST_SOCKET = 90
"""Characters of a Unix socket's path, of which the system allows about 100."""


@dataclass(frozen=True)
class Program:
    """One process.

    Args:
        name: its name here.
        command: what is run.
        order: small numbers are started first and ended last.
    """

    name: str
    command: Sequence[str]
    order: int = 10


@dataclass(frozen=True)
class State:
    """What the process manager says of a process.

    Args:
        name: its name here.
        state: ``RUNNING``, ``STARTING``, ``BACKOFF``, ``STOPPED``, ``EXITED`` or ``FATAL``.
        pid: 0 when it does not run.
        since: seconds that it has run.
        log: path of its log.
    """

    name: str
    state: str
    pid: int
    since: float
    log: str


def programs_of(layout: Layout, config: ServerConfig) -> list[Program]:
    """The processes of a deployment, with one for each device of its own."""
    tls: list[object] = ["--insecure"]
    trust: list[object] = ["--insecure"]
    if not config.insecure:
        tls = ["--ssl-certfile", layout.certificate, "--ssl-keyfile", layout.key, "--ssl-ca-certfile", layout.ca]
        tls += ["--enable-supernode-auth"]
        trust = ["--root-certificates", layout.ca]
    port = str(config.superlink_port)
    secret = ["--superexec-auth-secret-file", layout.secret]
    where = ["--host", "127.0.0.1", "--port", port, "--isolation", "process", "--database", layout.superlink_db]
    superlink = [program("flower-superlink"), *tls, *where, "--disable-runtime-dependency-installation", *secret]
    superexec = [program("flower-superexec"), *trust, "--runtime-api-address", f"127.0.0.1:{port}", *secret]
    module = [sys.executable, "-m"]
    found = [
        Program("superlink", _texts(superlink), 1),
        Program("serverapps", _texts(superexec), 2),
        Program("door", _texts([*module, "federated.deployment.front", layout.folder]), 3),
        Program("operator", _texts([*module, "federated.deployment.operating", layout.folder]), 4),
    ]
    return [*found, *_nodes(layout)]


def _nodes(layout: Layout) -> Iterator[Program]:
    for path in sorted(layout.nodes.glob("*/device.yaml")):
        command = [sys.executable, "-m", "federated.cli.main", "device", "join", "--config", str(path)]
        yield Program(f"node-{path.parent.name}", command, 20)


def _texts(parts: Sequence[object]) -> list[str]:
    return [str(part) for part in parts]


class NotUp(DeploymentError):
    """There is no process manager."""


class Processes:
    """The process manager of one deployment.

    Args:
        layout: of the deployment.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._pid_file = layout.folder / "supervisord.pid"

    @property
    def socket(self) -> Path:
        """Where the manager is reached: in the deployment's folder, or, when that path is too long, a short one."""
        inside = self._layout.folder / "supervisor.sock"
        if len(str(inside)) <= _LONGEST_SOCKET:
            return inside
        mark = hashlib.sha256(str(self._layout.folder).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"fedpeft-{os.getuid()}-{mark}" / "supervisor.sock"

    def start(self, programs: Sequence[Program]) -> None:
        """Start the manager and with it the processes; those that run already are left alone, new ones are added.

        Raises:
            DeploymentError: if it does not start.
        """
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        write_whole(self._layout.supervisor_config, self._config(programs).encode(), mode=0o600)
        if self.running:
            self._update()
            return
        self._own_socket()
        command = [program("supervisord"), "-c", str(self._layout.supervisor_config)]
        own = environment(self._layout.flwr_home)
        done = subprocess.run(
            command,
            cwd=self._layout.folder,
            env=own,
            capture_output=True,
            text=True,
            check=False,
            timeout=_PATIENCE,
        )
        if done.returncode:
            raise DeploymentError(f"supervisord did not start: {' '.join((done.stdout + done.stderr).split())[-400:]}")
        end = time.monotonic() + _PATIENCE
        while not self.running:
            if time.monotonic() > end:
                raise DeploymentError(f"supervisord does not answer; see {self._layout.logs / 'supervisord.log'}")
            time.sleep(0.1)

    def _own_socket(self) -> None:
        """A place for the socket. The short one is in a folder of all users: who made it first could be anybody."""
        folder = self.socket.parent
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.lstat()
        if folder != self._layout.folder and (found.st_uid != os.getuid() or found.st_mode & 0o077):
            raise DeploymentError(
                f"{folder} belongs to somebody else, or others may enter it; remove it, and try again"
            )
        self.socket.unlink(missing_ok=True)

    @property
    def running(self) -> bool:
        """Whether the manager is there.

        Raises:
            DeploymentError: if it is there and does not answer: a second one beside it would be worse.
        """
        try:
            self._call("getPID")
        except NotUp:
            return False
        return True

    def states(self) -> list[State]:
        """Every process, in order of name.

        Raises:
            DeploymentError: if the deployment is not up.
        """
        now = time.time()
        return [
            State(
                one["name"],
                one["statename"],
                int(one["pid"]),
                max(0.0, now - one["start"]) if one["pid"] else 0.0,
                str(self._layout.folder / one["stdout_logfile"]),
            )
            for one in sorted(self._call("getAllProcessInfo"), key=lambda one: str(one["name"]))
        ]

    def stop(self) -> None:
        """End everything and wait until it has ended. What was finished is on the disk.

        Raises:
            DeploymentError: if it does not end.
        """
        try:
            pid = int(self._call("getPID"))
        except NotUp:
            return
        self._call("shutdown")
        end = time.monotonic() + _LEAVE
        while _alive(pid):
            if time.monotonic() > end:
                raise DeploymentError(f"supervisord (process {pid}) does not end")
            time.sleep(0.1)

    def _update(self) -> None:
        """Take up programs that are new in the configuration, and let go of those that are no longer in it."""
        added, changed, removed = self._call("reloadConfig")[0]
        for name in (*changed, *removed):
            self._call("stopProcessGroup", name)
            self._call("removeProcessGroup", name)
        for name in (*added, *changed):
            self._call("addProcessGroup", name)

    def _call(self, method: str, *arguments: Any) -> Any:
        transport = _transport(self.socket)
        try:
            proxy = xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport)
            return getattr(proxy.supervisor, method)(*arguments)
        except (TimeoutError, BlockingIOError):  # the second when many wait for it already
            raise DeploymentError(
                f"the process manager of {self._layout.folder} has not answered for {_PATIENCE:g} s; see "
                f"{self._layout.logs / 'supervisord.log'}, or end the process in {self._pid_file}"
            ) from None
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError):
            raise NotUp(f"the deployment in {self._layout.folder} is not up: 'fedpeft deploy up' starts it") from None
        except xmlrpc.client.Fault as fault:
            raise DeploymentError(f"{method} {' '.join(map(str, arguments))}: {fault.faultString}") from None
        finally:
            transport.close()

    def _config(self, programs: Sequence[Program]) -> str:
        # Logs are named from the folder in which supervisord is started: it expands what stands there twice.
        head = [
            "[unix_http_server]",
            f"file={_escaped(self.socket)}",
            "chmod=0700",
            "[supervisord]",
            f"logfile={self._layout.logs.name}/supervisord.log",
            f"pidfile={_escaped(self._pid_file)}",
            "logfile_maxbytes=1MB",
            "logfile_backups=1",
            "umask=077",
            "minfds=1024",
            "[rpcinterface:supervisor]",
            "supervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface",
        ]
        return "\n".join([*head, *(line for program in programs for line in self._section(program))]) + "\n"

    def _section(self, program: Program) -> Iterator[str]:
        yield f"[program:{program.name}]"
        yield f"command={_escaped(shlex.join([sys.executable, '-I', '-S', str(_WITH_PARENT), *program.command]))}"
        yield f"priority={program.order}"
        yield "autorestart=true"
        yield "startretries=1000000"  # the pause grows by a second for each
        yield "startsecs=2"
        yield "stopwaitsecs=12"
        yield "stopasgroup=false"
        yield "killasgroup=true"
        yield "redirect_stderr=true"
        yield f"stdout_logfile={self._layout.logs.name}/{_escaped(program.name)}.log"
        yield "stdout_logfile_maxbytes=5MB"
        yield "stdout_logfile_backups=2"


def _transport(path: Path) -> Any:
    """Supervisor's own, which would wait for ever."""
    from supervisor.xmlrpc import SupervisorTransport, UnixStreamHTTPConnection

    class Patient(UnixStreamHTTPConnection):  # type: ignore[misc]
        def connect(self) -> None:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.settimeout(_PATIENCE)
            self.sock.connect(str(path))

    transport = SupervisorTransport(None, None, f"unix://{path}")
    transport._get_connection = lambda: Patient("localhost")
    return transport


def _escaped(value: object) -> str:
    """A text as supervisor's configuration takes it: a percent sign would begin an expression there.

    Raises:
        DeploymentError: for what would begin a comment or another line, in whatever way it is written.
    """
    if found := _COMMENT.search(str(value)):
        raise DeploymentError(
            f"{value}: supervisor's configuration cannot name a path with {found.group()!r}; choose another folder"
        )
    return str(value).replace("%", "%%")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[-1][:1] != "Z" if Path("/proc/self").exists() else True
    except OSError:  # it may go between two questions
        return False
