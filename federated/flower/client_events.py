"""What a client's handlers note of each message, on its own device (`federated.device_events`).

Privacy: counts, sizes and times, no example, no metric of one; but how long training took says how much there is to
train on, and so the file stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from federated.device_events import note_event, noted
from federated.errors import FederatedError
from federated.flower.records import Assignment, assignment_of, packet_of

__all__ = ["note_answer", "note_trained"]


def note_answer(kind: str, message: Message, content: RecordDict, *, seconds: float) -> None:
    """Note what became of a message.

    Args:
        kind: ``query``, ``train`` or, as its plan says, ``evaluate``.
        message: that came.
        content: of the answer.
        seconds: that it took.
    """
    if not noted():
        return
    task, head = _task(message), content.get("reply")
    reason = head.get("reason") if isinstance(head, ConfigRecord) else None
    about = {"kind": task.plan.mode if task else kind, "outcome": _outcome(reason), "seconds": round(seconds, 3)}
    if reason is not None:
        about["reason"] = str(reason)[:64]
    if task is not None:
        about |= {"run": task.run_id[:100], "round": task.round_number}
    note_event({"event": "answer", **about, "bytes_up": _size(content), "bytes_down": _size(message.content)})


def _outcome(reason: object) -> str:
    return "ok" if reason is None else "not_now" if reason == "not_now" else "refused"


def _task(message: Message) -> Assignment | None:
    try:
        return assignment_of(message)
    except FederatedError:
        return None


def _size(content: RecordDict) -> int:
    """Bytes of the packet in a message; 0 without one."""
    try:
        return len(packet_of(content)) if "packet" in content else 0
    except FederatedError:
        return 0


def note_trained(task: Assignment, metrics: Mapping[str, float], *, seconds: float, target_delta: float) -> None:
    """Note that a task was trained for, which an answer that is sent again was not.

    Args:
        task: what was asked.
        metrics: of the training; ``steps`` and, under ``privacy.example``, ``epsilon`` are taken.
        seconds: that it took.
        target_delta: the probability beside epsilon.
    """
    about: dict[str, Any] = {"run": task.run_id[:100], "round": task.round_number, "phase": task.plan.phase}
    about |= {"seconds": round(seconds, 3), "steps": int(metrics.get("steps", 0))}
    if "epsilon" in metrics:
        about |= {"epsilon": metrics["epsilon"], "target_delta": target_delta}
    note_event({"event": "trained", **about})
