"""What travels in a Flower message: one packed Array, and plain scalars beside it.

Server to client (``train``): ``task`` (the assignment and the experiment as JSON) and ``packet`` (the adapter).
Client to server: ``reply`` (who and which task, or why not), ``metrics`` and, after training, ``packet`` (the sealed
update). Packets are opaque to Flower: no numpy file is parsed on either side, `federated.wire` reads them, and
`federated.flower.adapter_packets` makes an adapter of them. A question and "not now" need no torch.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Self

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from federated.config import ExperimentConfig, experiment_from
from federated.device_events import PINNED
from federated.errors import FederatedError, NotVerified, WireError
from federated.flower.declined import NOT_NOW, Declined
from federated.manifest import TrainPlan, canonical_json
from federated.train_plan import CORRECTIONS

__all__ = [
    "PACKET_STYPE",
    "Assignment",
    "Reply",
    "assignment_of",
    "config_of",
    "metric_record",
    "name_content",
    "packet_of",
    "query_content",
    "refusal_content",
    "reply_content",
    "task_content",
    "task_token",
]

PACKET_STYPE = "fedpeft.packet"
"""Serialisation type of our Array: bytes that only `federated.wire` reads."""

_LARGEST_METRIC = 1e30
"""A larger claim is no measurement, and weighted means of such claims would not be finite."""


@dataclass(frozen=True)
class Assignment:
    """Who is asked to do what, in which round, from which version.

    Args:
        run_id: the run.
        client_id: whom it is meant for.
        round_number: 1-based.
        task_token: see `task_token`; the client sends it back.
        parent_version: version id of the adapter in the packet.
        base_digest: the base model that the adapter belongs to.
        plan: what to train.
        acknowledged_head: of this client's privacy ledger, as it was last told; empty before.
    """

    run_id: str
    client_id: str
    round_number: int
    task_token: str
    parent_version: str
    base_digest: str
    plan: TrainPlan
    acknowledged_head: str = ""

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Rebuild from JSON.

        Raises:
            WireError: if it is not an assignment.
        """
        try:
            value = json.loads(text)
            assignment = cls(**{**value, "plan": TrainPlan.from_dict(value["plan"])})
            _check_types(assignment)
            return assignment
        except (ValueError, TypeError, KeyError) as error:
            raise WireError(f"the message holds no task of this protocol: {type(error).__name__}") from None


def _check_types(task: Assignment) -> None:
    """Numbers and names end up in file names on the client: nothing else may stand in their place."""
    plan = task.plan
    counts = (task.round_number, plan.phase, plan.rank, plan.tail_start, plan.sketch_columns, plan.sketch_seed)
    if any(type(number) is not int or number < 0 for number in (*counts, plan.memory_round, plan.rank_budget)):
        raise ValueError("rounds, phase, rank, rows, columns and seeds are integers of at least 0")
    if type(plan.tail_penalty) not in (int, float) or not 0 <= plan.tail_penalty < math.inf:
        raise ValueError("a penalty is a finite number of at least 0")
    if plan.upload not in ("delta", "sketch", "projection") or type(plan.cached) is not bool:
        raise ValueError("an upload is a delta, a sketch or a projection, and cached is true or false")
    if plan.correction not in CORRECTIONS or not (0 < plan.density_up <= 1 and 0 < plan.density_down <= 1):
        raise ValueError("the correction is one of ours, and densities are above 0 and at most 1")
    names = (
        task.run_id,
        task.client_id,
        task.task_token,
        task.parent_version,
        task.base_digest,
        task.acknowledged_head,
    )
    if any(type(name) is not str for name in (*names, *plan.trainable, *plan.kept)) or plan.mode not in (
        "train",
        "evaluate",
    ):
        raise ValueError("names are strings, and the mode is train or evaluate")
    if plan.align not in ("", "factor_a", "factor_b") or not 0 <= plan.align_strength <= 1:
        raise ValueError("factors are aligned to factor_a or factor_b, by a share from 0 to 1")


@dataclass(frozen=True)
class Reply:
    """A client's answer as plain data, before admission."""

    client_id: str
    task_token: str
    metrics: Mapping[str, float]
    packet: bytes | None
    reason: str | None = None
    message: str | None = None
    rank: int | None = None
    ledger_head: str = ""
    declined: Declined | None = None
    app: str = ""

    @classmethod
    def from_message(cls, message: Message) -> Self:
        """Read a reply.

        Raises:
            WireError: if records are missing or of other types.
        """
        content = message.content
        head, metrics = content.get("reply"), content.get("metrics")
        if not isinstance(head, ConfigRecord):
            raise WireError("the reply has no 'reply' record")
        values = dict(metrics) if isinstance(metrics, MetricRecord) else {}
        few = list(values.items())[:_MOST_METRICS]
        numbers = {_shown(key, 64): value for key, value in few if isinstance(value, int | float)}
        return cls(
            client_id=str(head.get("client_id", "")),
            task_token=str(head.get("task_token", "")),
            metrics={key: float(value) for key, value in numbers.items() if abs(value) < _LARGEST_METRIC},
            packet=packet_of(content) if "packet" in content else None,
            reason=_shown(head["reason"], 64) if "reason" in head else None,
            message=_shown(head["message"], 500) if "message" in head else None,
            rank=_rank_of(head),
            ledger_head=_digest_in(head),
            declined=_declined_in(head),
            app=_shown(head.get("app", ""), 64),
        )


_MOST_METRICS = 64


def _rank_of(head: ConfigRecord) -> int | None:
    """The capacity that a client declares, where it is a number."""
    rank = head.get("rank")
    return rank if type(rank) is int and rank >= 1 else None


def _declined_in(head: ConfigRecord) -> Declined | None:
    if head.get("reason") != NOT_NOW:
        return None
    return Declined.claimed(_shown(head.get("condition", ""), 64), head.get("ask_again"))


def _digest_in(head: ConfigRecord) -> str:
    """The head of its privacy ledger that a client names, where it can be one."""
    found = str(head.get("ledger_head", ""))
    return found if _DIGEST.fullmatch(found) else ""


_DIGEST = re.compile(r"[0-9a-f]{64}")


def _shown(text: object, limit: int) -> str:
    """A client's own words, fit for a record and a terminal: bounded, and without control characters."""
    return "".join(character for character in str(text)[:limit] if character.isprintable())


def task_token(secret: bytes, *, run_id: str, round_number: int, plan: TrainPlan, client_id: str) -> str:
    """Proof that the server sampled this client for this task: HMAC-SHA256, 64 hexadecimal characters."""
    text = canonical_json([run_id, round_number, plan.mode, plan.phase, client_id])
    return hmac.new(secret, text, hashlib.sha256).hexdigest()


def _packet_record(packet: bytes) -> ArrayRecord:
    array = Array(dtype="uint8", shape=(len(packet),), stype=PACKET_STYPE, data=packet)
    return ArrayRecord({"packet": array})


def packet_of(content: RecordDict) -> bytes:
    """The packed bytes of a message.

    Raises:
        WireError: if there is not exactly one Array of our kind.
    """
    record = content.get("packet")
    if not isinstance(record, ArrayRecord) or list(record) != ["packet"]:
        raise WireError("the message holds no packed Array: expected one ArrayRecord 'packet' with one Array")
    array = record["packet"]
    if array.stype != PACKET_STYPE:
        raise WireError(f"the Array has serialisation type {array.stype[:40]!r}, expected {PACKET_STYPE!r}")
    return bytes(array.data)


def name_content(client_id: str, rank: int) -> RecordDict:
    """A client's answer to the query: its name, the largest rank that it trains, and what app its owner lets run.

    The last is what the launcher said in this process: the digest of the pinned bundle, or ``unpinned``; and
    ``unpinned`` where there is no such launcher.
    """
    app = os.environ.get(PINNED, "unpinned")
    return RecordDict({"reply": ConfigRecord({"client_id": client_id, "task_token": "", "rank": rank, "app": app})})


def query_content(config: ExperimentConfig) -> RecordDict:
    """Ask a node for its client id."""
    return RecordDict({"task": ConfigRecord({"experiment": config.client_json})})


def task_content(assignment: Assignment, config: ExperimentConfig, packet: bytes) -> RecordDict:
    """One round's message to one client."""
    head = ConfigRecord(
        {"assignment": canonical_json(asdict(assignment)).decode(), "experiment": config.client_json},
    )
    return RecordDict({"task": head, "packet": _packet_record(packet)})


def config_of(message: Message) -> ExperimentConfig:
    """The experiment that a message carries, validated again on this side.

    Raises:
        WireError: if there is none.
        ConfigError: if it is not valid here.
    """
    head = message.content.get("task")
    if not isinstance(head, ConfigRecord) or not isinstance(head.get("experiment"), str):
        raise WireError("the message holds no experiment: expected a ConfigRecord 'task' with 'experiment'")
    return _experiment(str(head["experiment"]))


@lru_cache(maxsize=4)
def _experiment(text: str) -> ExperimentConfig:
    """One process reads the same experiment from every message of a run: records are immutable, so once is enough."""
    return experiment_from(text)


def assignment_of(message: Message) -> Assignment:
    """The assignment that a message carries.

    Raises:
        WireError: if there is none.
    """
    head = message.content.get("task")
    if not isinstance(head, ConfigRecord):
        raise WireError("the message holds no task: expected a ConfigRecord 'task'")
    return Assignment.from_json(str(head.get("assignment", "")))


def reply_content(
    client_id: str, task: str, metrics: Mapping[str, float], packet: bytes | None = None, *, ledger_head: str = ""
) -> RecordDict:
    """A client's answer; metrics that are not finite are left out, and a privacy ledger's head where there is none."""
    head = ConfigRecord({"client_id": client_id, "task_token": task})
    if ledger_head:
        head["ledger_head"] = ledger_head
    content = RecordDict({"reply": head, "metrics": metric_record(metrics)})
    if packet is not None:
        content["packet"] = _packet_record(packet)
    return content


def metric_record(metrics: Mapping[str, float]) -> MetricRecord:
    """Metrics as Flower carries them; values that are not finite are left out."""
    finite: dict[str, int | float | list[int] | list[float]] = {}
    finite.update({key: float(value) for key, value in metrics.items() if math.isfinite(value)})
    return MetricRecord(finite)


_PATH = re.compile(r"(?<![\w.:/])/(?:[^\s/:;,'\"]+/)+([^\s/:;,'\"]+)")
"""An absolute path; only its last part leaves the client."""


def refusal_content(client_id: str, error: Exception) -> RecordDict:
    """Why a client does not answer: our own messages as they are, a foreign exception by its type alone.

    Privacy: a foreign exception's text may quote training data, so it never leaves the client; nor do the folders of
    a path in our own messages.
    """
    known = isinstance(error, FederatedError)
    text = _PATH.sub(r"\1", str(error)) if known else "unexpected error on the client; its own log has the details"
    reason = "not_verified" if isinstance(error, NotVerified) else type(error).__name__
    return RecordDict({"reply": ConfigRecord({"client_id": client_id, "reason": reason, "message": text})})
