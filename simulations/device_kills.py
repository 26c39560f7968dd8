"""Kill a device's agent at random moments, again and again, and look at what serves after each start.

    found = kill_agents(Path("scratch"), kills=10, seed=0)

A publisher, a web server with ranges and an agent, each real, in processes of their own; the backend's model is the sum
of an adapter's numbers, so that an answer says which bytes made it. For each kill the agent has a new release to fetch
(or goes on with the one before), and is killed some random time after it entered download, install, activation or
commit, or while it is sent back and forth between versions. Then a new agent without a network starts on what is left.
Used by a test and by the device's benchmark.
"""

from __future__ import annotations

import http.server
import logging
import os
import random
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from federated.device import NULL, AdapterRuntime, Agent, DeviceConfig
from federated.device.agent_commands import Mailbox
from federated.device.journal import read_book
from federated.device.shelf import Shelf
from federated.errors import FederatedError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, sha256_hex
from federated.release import Artefact, KeyRing, Plan, Publisher, Quorum
from federated.wire import encode_tensors

__all__ = ["PHASES", "Kills", "SumBackend", "kill_agents", "numbered", "serving"]

BASE = "b" * 64
SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 4, 4, 2, 4.0),))
SIZE, RATE = 1_500_000, 1_000_000  # bytes of a version, and bytes per second that the agent takes

PHASES: Mapping[str, tuple[str, float]] = {
    "download": ("downloading", 0.6),
    "install": ("verified", 0.03),
    "activate": ("probing", 0.02),
    "commit": ("activated", 0.03),
    "switch": ("idle", 0.1),
}
"""By phase, the event after which the agent is killed, and within how many seconds."""


class SumBackend:
    """A `federated.device.Backend` whose model is the sum of an adapter's numbers; null is 0."""

    base_digest = BASE

    def null(self) -> float:
        """The base alone."""
        return 0.0

    def check(self, manifest: VersionManifest) -> None:
        """Every version will do."""

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> float:  # noqa: ARG002 - the protocol
        """The sum."""
        return float(sum(tensor.array.astype(np.float64).sum() for tensor in tensors.values()))

    def nbytes(self, handle: float) -> int:  # noqa: ARG002 - the protocol
        """A number costs nothing."""
        return 0

    def predict(self, handle: float, rows: Sequence[Mapping[str, Any]]) -> list[float]:
        """The sum for each row."""
        return [handle for _ in rows]


@dataclass
class Kills:
    """What many kills left.

    Args:
        kills: how many.
        by_phase: how many in each.
        resumed: starts that found a part of a transfer.
        null: starts after which the null adapter answered.
        faults: what was wrong, in words; empty is what is wanted.
    """

    kills: int = 0
    by_phase: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    resumed: int = 0
    null: int = 0
    faults: list[str] = field(default_factory=list)


def numbered(number: int, *, nbytes: int = SIZE) -> Artefact:
    """A version whose weights are ``number`` everywhere, about so large."""
    array = np.full((2, nbytes // 8), number, np.float32)
    weights = encode_tensors({"layer.factor_a": RawTensor.from_array(array)})
    fields: dict[str, Any] = {"adapter_id": "killed", "release_counter": number}
    return Artefact(VersionManifest(sha256_hex(weights), BASE, SPEC, "none", "kills", number, **fields), weights)


def kill_agents(folder: Path, *, kills: int, seed: int) -> Kills:
    """Kill agents, one after another, and check what serves after each.

    Args:
        folder: for everything; new.
        kills: how many.
        seed: of what happens when.
    """
    chance, found = random.Random(seed), Kills()  # noqa: S311
    ring = KeyRing(folder / "keys", passphrase=lambda *_: b"none", cost=2)
    publisher = Publisher.create(folder / "releases", ring, Plan(quorums={"root": Quorum()}))
    answers = {NULL: 0.0}
    with serving(folder / "releases") as url:
        config = DeviceConfig(
            device_id="killed", source=url, root=publisher.trusted_root, state=folder / "state", bandwidth=RATE,
            probation={"seconds": 0.0, "boots": 5},  # type: ignore[arg-type]
        )  # fmt: skip
        for number in range(1, kills + 1):
            phase = list(PHASES)[number % len(PHASES)]
            if number == 1 or (phase != "switch" and chance.random() < 0.7):
                made = numbered(number)
                answers[made.version_id] = number * 2.0 * (SIZE // 8)
                publisher.publish("stable", made)
            _kill(config, phase, chance)
            found.kills += 1
            found.by_phase[phase] += 1
            found.resumed += any((folder / "state" / "release" / "files").glob("*/.*.part"))
            _check(config, answers, found)
    return found


def _kill(config: DeviceConfig, phase: str, chance: random.Random) -> None:
    """Start an agent, and kill it some time after it entered a phase, or has nothing to do."""
    event, seconds = PHASES[phase]
    after = chance.uniform(0.0, seconds)
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        os.close(receive)
        _work(config, random.Random(chance.getrandbits(32)), send)  # noqa: S311
    os.close(send)
    with os.fdopen(receive) as lines:
        for line in lines:
            if line.split(" ")[0].strip() in (event, "idle"):
                break
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def _work(config: DeviceConfig, chance: random.Random, send: int) -> NoReturn:
    """The child's life: take what is new, then go back and forth; each event is told."""
    try:
        logger = logging.getLogger("federated.device")
        logger.addHandler(logging.StreamHandler(os.fdopen(send, "w", buffering=1)))
        logger.setLevel(logging.INFO)
        mailbox = Mailbox(config.state / "commands")
        with Agent(config, lambda _: AdapterRuntime(SumBackend())) as agent:
            while True:
                agent.tick()
                agent.poll()
                agent.tick()
                logger.info("idle")
                for _ in range(20):
                    book = read_book(config.state)
                    held = [one for one in Shelf(config.state / "versions").ids() if book and book.state(one)]
                    mailbox.send("activate", chance.choice(held or [NULL]))
                    agent.tick()
    finally:
        os._exit(1)


def _check(config: DeviceConfig, answers: Mapping[str, float], found: Kills) -> None:
    """What a start without a network serves."""
    runtime = AdapterRuntime(SumBackend())
    had = read_book(config.state)
    try:
        with Agent(config, lambda _: runtime, source=_Nothing()) as agent:
            (answer,) = runtime.predict([{}]).predictions
            active = agent.active
            if answer != answers.get(active):
                found.faults.append(f"{active[:12]} answers {answer}, expected {answers.get(active)}")
            found.null += active == NULL
            if agent.runtime is None and Shelf(config.state / "versions").ids():
                found.faults.append("versions are here, and no base is open for them")
            if had is not None and had.good and active == NULL:
                found.faults.append(f"null answers, though {had.good[-1][:12]} was known good")
        shelf = Shelf(config.state / "versions")
        found.faults += [f"{one[:12]} is damaged" for one in shelf.ids() if shelf.get(one) is None]
    except FederatedError as error:
        found.faults.append(f"{type(error).__name__}: {error}")


class _Nothing:
    """No network."""

    label = "nothing"

    def read(self, name: str) -> Any:
        """Nothing comes."""
        raise FederatedError(f"{name} was asked for at a start")


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Python's file server, with ranges."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Send a file, from where it was asked for."""
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.wfile.write(data[start:])

    def log_message(self, *_: object) -> None:
        """Quiet."""


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Quiet: clients are killed here."""


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """A web server with ranges over a folder, in a process of its own; gives its URL, which no proxy may serve."""
    server = _Server(("127.0.0.1", 0), lambda *args: _Ranges(*args, directory=str(folder)))
    child = os.fork()
    if not child:
        try:
            server.serve_forever()
        finally:
            os._exit(1)
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
