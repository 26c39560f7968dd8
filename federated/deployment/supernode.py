"""Flower's SuperNode in a process of ours: back at once after a kill, at its owner's pace, and no reply is kept back.

What it changes of Flower's internals is in this module alone, for the versions that were tried. It needs no torch,
which is most of the memory of the launcher beside it.

It is started by `federated.deployment.joining`, as ``python -m federated.deployment.supernode``, and reads what it
needs as one line of JSON from standard input.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from federated.deployment.flower_environment import TESTED
from federated.files import write_whole
from federated.logs import set_up_logs

__all__ = ["end_left_session", "sending_what_waits", "supernode"]

_LOG = logging.getLogger(__name__)
_IDLE = 3.0
"""Seconds that Flower sleeps where there was no message; in that module nothing else sleeps so long."""
_SUPERNODE = "flwr.supernode.start_client_internal"
_AWAY = 3.0
"""Seconds between the end of a killed SuperNode's session and the next: longer than a server's pause between looks."""


def end_left_session(path: Path) -> None:
    """Let a SuperNode that was killed come back at once: Flower refuses it until its session has run out, a minute.

    The node's id is kept beside its key; the next SuperNode ends that session before it begins its own, and stays away
    for a moment, in which a server that looks for answers learns that what the killed one had taken is lost.

    Args:
        path: file of the id.
    """
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    client: Any = importlib.import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    activate = client.ActivateNode

    def again(self: Any, request: Any) -> Any:
        if path.is_file():
            try:
                self.DeactivateNode(DeactivateNodeRequest(node_id=int(path.read_text())))
                time.sleep(_AWAY)
            except Exception as error:  # noqa: BLE001 - nothing to end, or not ours to end: Flower decides on the next call
                _LOG.debug("no session to end: %r", error)
        answer = activate(self, request)
        write_whole(path, str(answer.node_id).encode())
        return answer

    client.ActivateNode = again


def sending_what_waits(pull: Callable[..., int | None]) -> Callable[..., int | None]:
    """Flower's look for a message, after which replies are sent that wait, also where no message came.

    Flower sends replies only after a message came, and takes the first reply for that message's. Where a run is
    stopped while its message comes, that message is dropped and still answered: from then on each reply would wait for
    the message after it, and the server for the reply.

    Args:
        pull: the look; returns the run of what came, or None.
    """

    def pulled(state: Any, **more: Any) -> int | None:
        run_id = pull(state=state, **more)
        if run_id is not None:
            return run_id
        state.get_messages_legacy(run_ids=[], is_reply=True)  # takes none, and answers for processes that are missing
        entries = list(state.msg_store.values())
        waiting = [one.message.metadata for one in entries if not one.is_retrieved]
        return next((one.run_id for one in waiting if one.reply_to_message_id), None)

    return pulled


def supernode(arguments: list[str], poll_seconds: float, session: str) -> None:
    """Run Flower's SuperNode in this process, which looks for messages as often as its owner says, where it can."""
    if version("flwr").startswith(TESTED):
        end_left_session(Path(session))
        module: Any = importlib.import_module(_SUPERNODE)

        class Paced:
            """The module's clock with another idle pause; everything else is Python's."""

            def __getattr__(self, name: str) -> Any:
                """Everything else."""
                return getattr(time, name)

            @staticmethod
            def sleep(seconds: float) -> None:
                """The owner's pause between two looks; other pauses at most as long."""
                time.sleep(poll_seconds if seconds == _IDLE else min(seconds, poll_seconds))

        module.time = Paced()
        module._pull_and_store_message = sending_what_waits(module._pull_and_store_message)
    elif poll_seconds != _IDLE:
        _LOG.warning("flwr %s: it looks for messages every 3 seconds, whatever poll_seconds says", version("flwr"))
    from flwr.supercore.app_utils import start_parent_process_monitor
    from flwr.supernode.cli import flower_supernode

    start_parent_process_monitor(os.getppid())

    sys.argv = ["flower-supernode", *arguments]
    flower_supernode()
    _LOG.warning("the SuperNode gave its connection up, as Flower does when one TLS handshake took too long")
    os._exit(1)  # a thread of Flower's would keep this process, which does nothing any more, for ever


if __name__ == "__main__":
    _SAID = json.loads(sys.stdin.readline())
    set_up_logs("supernode", _SAID["log_format"])
    logging.getLogger("flwr").propagate = False  # it has a handler of its own
    supernode(_SAID["arguments"], _SAID["poll_seconds"], _SAID["session"])
