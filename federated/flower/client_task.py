"""One task of a client: train, or only evaluate, from the adapter in the message, and seal what is sent back.

Loaded when a client is to work (`federated.flower.client`), for it brings torch.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flwr.app import Message, RecordDict

from federated.config import ExperimentConfig
from federated.delta import apply_some
from federated.errors import BaseMismatch, ConfigError
from federated.flower.adapter_packets import parse_adapter_packet
from federated.flower.client_cache import cache, cached
from federated.flower.client_events import note_trained
from federated.flower.client_memory import recalled, remember
from federated.flower.client_privacy import ExampleBudget
from federated.flower.client_site import ClientSite
from federated.flower.client_steering import Steering
from federated.flower.client_store import ClientStore
from federated.flower.records import (
    Assignment,
    assignment_of,
    packet_of,
    reply_content,
)
from federated.flower.session import Session, open_session
from federated.manifest import canonical_json, digest_of, sha256_hex
from federated.state import AdapterState, to_raw
from federated.training import LocalResult, client_seed
from federated.uploads import pack
from federated.wire import seal_update

if TYPE_CHECKING:
    from federated.flower.client_agent import DeviceSide

__all__ = ["run_task"]


class _Answer(NamedTuple):
    """What is sent, and stored to be sent again as it was; ``learnt`` stays, and is None where nobody trained."""

    metrics: dict[str, float]
    packet: bytes
    ledger_head: str = ""
    learnt: AdapterState | None = None


def run_task(message: Message, config: ExperimentConfig, site: ClientSite) -> RecordDict:
    """Do what a message asks for.

    Args:
        message: with the assignment and the adapter.
        config: the experiment as this site runs it.
        site: whose task it is.

    Raises:
        FederatedError: for whatever keeps this client from it.
    """
    task = assignment_of(message)
    if task.client_id != site.client_id:
        raise ConfigError(f"a task for client {task.client_id!r} reached client {site.client_id!r}")
    if task.plan.rank > site.max_rank:
        raise ConfigError(f"adapter.rank = {task.plan.rank}: this client allows at most {site.max_rank}")
    session = replace(open_session(config), config=config)  # the cached one may be of a run of other rounds
    _check_base(task, session, site)
    state, device = parse_adapter_packet(packet_of(message.content)), _device_of(site)
    own = site.data is not None
    store = ClientStore(Path(site.store), run_id=task.run_id, client_id=site.client_id, durable=own)
    if task.plan.mode == "evaluate":
        if not site.measures:
            return reply_content(site.client_id, task.task_token, {})
        state = _start(device, task, session, state)
        return _evaluate(task, session, recalled(store, task.plan, state, version_id=task.parent_version))
    key = _answer_key(task, config, packet_of(message.content))
    answered = _answered(store, task, key)
    if answered is None:
        state = _start(device, task, session, state)
        answered = _train(task, session, state=state, store=store, site=site)
        _keep(store, task, key, answered)
        if device is not None and answered.learnt is not None:
            device.keep(task, answered.learnt, session)
    return reply_content(
        site.client_id, task.task_token, answered.metrics, answered.packet, ledger_head=answered.ledger_head
    )


def _device_of(site: ClientSite) -> DeviceSide | None:
    """The device's room is loaded where its owner says that there is an agent, and nowhere else."""
    if site.agent is None:
        return None
    from federated.flower.client_agent import DeviceSide

    return DeviceSide(site.agent, personal=site.personal)


def _start(device: DeviceSide | None, task: Assignment, session: Session, received: AdapterState) -> AdapterState:
    """What was received, or the same as the device's agent verified it.

    Raises:
        NotVerified: if it must have verified it, and has not.
    """
    if device is None or task.plan.cached:  # a later exchange starts from what this client trained
        return received
    return device.start(task, received, fresh=session.initial)


def _evaluate(task: Assignment, session: Session, state: AdapterState) -> RecordDict:
    result = session.trainer.run(state, task.plan, session.local_data(task.client_id, held_out_only=True), seed=0)
    return reply_content(task.client_id, task.task_token, result.metrics)


def _trained(
    task: Assignment, session: Session, *, state: AdapterState, store: ClientStore, site: ClientSite
) -> tuple[AdapterState, LocalResult, str]:
    """What the client started from, what it learnt, and the head of its privacy ledger, where it has one.

    Privacy: with ``privacy.example`` the steps are charged to the client's ledger before the first of them.
    """
    data = session.local_data(task.client_id)
    if not site.measures:
        data = replace(data, test=())
    private, spent, head = None, {}, ""
    if session.config.privacy.example.enabled:
        with ExampleBudget(task, session.config, site=site, store=store, train=data.rows) as budget:
            private = budget.charge()
            spent, head = {"epsilon": budget.spent}, budget.head
    seed = client_seed(session.config.seed, task.round_number, task.client_id)
    start = recalled(store, task.plan, state, version_id=task.parent_version)
    steering = Steering(store, task.plan, state, round_number=task.round_number)
    steered = steering.steered(start, learning_rate=session.config.train.learning_rate)
    began, beside = time.monotonic(), session.config.privacy.target_delta
    result = session.trainer.run(steered, task.plan, data, seed=seed, private=private)
    result = replace(result, metrics={**result.metrics, **spent})
    note_trained(task, result.metrics, seconds=time.monotonic() - began, target_delta=beside)
    steering.remember(result.delta, steps=int(result.metrics["steps"]))
    remember(
        store,
        task.plan,
        before=start,
        after=apply_some(start, result.delta),
        round_number=task.round_number,
        version_id=task.parent_version,
    )
    if task.plan.upload == "sketch":
        cache(store, task, start, result)
    return start, result, head


def _train(task: Assignment, session: Session, *, state: AdapterState, store: ClientStore, site: ClientSite) -> _Answer:
    head, learnt = "", None
    signing_key = site.update_key  # before anything is trained, and charged
    if task.plan.cached:
        start, result = cached(store, task, state)
    else:
        start, result, head = _trained(task, session, state=state, store=store, site=site)
        learnt = apply_some(start, result.delta)
    packet = seal_update(
        to_raw(pack(task.plan, start, result.delta)),
        run_id=task.run_id,
        client_id=task.client_id,
        round_number=task.round_number,
        phase=task.plan.phase,
        task_token=task.task_token,
        counter=store.next_counter(),
        parent_version=task.parent_version,
        base_digest=task.base_digest,
        spec=state.spec,
        plan_digest=task.plan.digest,
        num_examples=result.num_examples,
        signing_key=signing_key,
    )
    return _Answer(_finite(result.metrics), packet, head, learnt)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if math.isfinite(value)}


def _answer_key(task: Assignment, config: ExperimentConfig, packet: bytes) -> str:
    """Names an answer by all that it depends on: a round that is done again may start elsewhere, or ask for more."""
    asked = [task.task_token, task.plan.digest, task.parent_version, config.parts_json, sha256_hex(packet)]
    return f"answer-{task.plan.phase}-{digest_of(asked)[:24]}"


def _keep(store: ClientStore, task: Assignment, key: str, answer: _Answer) -> None:
    kept = {"metrics": answer.metrics, "ledger_head": answer.ledger_head, "packet": sha256_hex(answer.packet)}
    store.put(task.round_number, key, canonical_json(kept) + b"\n" + answer.packet)  # the JSON holds no line break


def _answered(store: ClientStore, task: Assignment, key: str) -> _Answer | None:
    """The answer given to this very task before: sent again as it was, not computed a second time.

    What the disk did not keep whole is no answer: it is computed, and charged, anew.
    """
    line, _, packet = (store.get(task.round_number, key) or b"").partition(b"\n")
    try:
        kept = json.loads(line)
        whole = kept["packet"] == sha256_hex(packet)
    except (ValueError, KeyError, TypeError):
        return None
    if not whole:
        return None
    return _Answer(kept["metrics"], packet, kept["ledger_head"])


def _check_base(task: Assignment, session: Session, site: ClientSite) -> None:
    found = session.adapter.base.base_digest
    if task.base_digest != found:
        raise BaseMismatch(
            f"the task is for base model {task.base_digest[:12]}, this client holds {found[:12]}: "
            "install the same model files, tokenizer and configuration on both sides"
        )
    if site.allowed_base_digests and found not in site.allowed_base_digests:
        raise BaseMismatch(f"base model {found[:12]} is not among those that this client allows")
