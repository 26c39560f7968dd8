"""A client's process is killed between charge and answer, and between answer and sending; then the task comes again.

The child really dies (SIGKILL), and what is left is read by a process that knows nothing of it.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
from flwr.app import Context, Message, RecordDict

from federated.config import ExamplePrivacyConfig, ExperimentConfig, PrivacyConfig
from federated.flower import Session, handle_train, open_session
from federated.flower.adapter_packets import adapter_packet
from federated.flower.records import Assignment, Reply, task_content
from federated.manifest import TrainPlan
from federated.wire import decode_packet

CLIENT = "client-001"
TASK = Assignment("run", CLIENT, 1, "f" * 64, "p" * 64, "", TrainPlan(rank=2))


@pytest.fixture(scope="module")
def private(real_config: ExperimentConfig) -> ExperimentConfig:
    example = ExamplePrivacyConfig(enabled=True, noise_multiplier=2.0)
    train = replace(real_config.train, batch_size=4, steps=2)
    return replace(real_config, train=train, privacy=PrivacyConfig(example=example))


@pytest.fixture(scope="module")
def session(private: ExperimentConfig) -> Session:
    return open_session(private)


def asked(private: ExperimentConfig, session: Session, task: Assignment = TASK) -> Reply:
    task = replace(task, base_digest=session.adapter.base.base_digest)
    content = task_content(task, private, adapter_packet(session.initial))
    context = Context(1, 2, {"partition-id": 1, "num-partitions": 3}, RecordDict(), {})
    return Reply.from_message(handle_train(Message(content, 2, "train"), context))


def charges(folder: Path) -> int:
    (path,) = folder.rglob("privacy_ledger.jsonl")
    return len(path.read_text().splitlines()) - 1


def die(*_: Any, **__: Any) -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit


def killed_at(where: str, ask: Callable[[], Reply], monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a child answer, which dies where that function would be called."""
    child = os.fork()
    if not child:
        try:
            with monkeypatch.context() as patch:
                patch.setattr(where, die)
                ask()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def test_between_charge_and_answer_it_is_charged_again(
    private: ExperimentConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was computed, if anything was, is lost: the second computation is a second one."""
    killed_at("federated.training.LocalTrainer.run", lambda: asked(private, session), monkeypatch)
    assert charges(tmp_path) == 1
    reply = asked(private, session)
    assert reply.packet is not None, reply.message
    assert charges(tmp_path) == 2


def test_with_the_answer_computed_and_not_stored_it_is_charged_again(
    private: ExperimentConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its counter has moved on, which no replay check minds."""
    killed_at("federated.flower.client_task._keep", lambda: asked(private, session), monkeypatch)
    reply = asked(private, session)
    assert reply.packet is not None, reply.message
    assert charges(tmp_path) == 2
    assert decode_packet(reply.packet)[0]["counter"] == 2


def test_between_answer_and_sending_the_same_bytes_go_out_and_nothing_is_charged(
    private: ExperimentConfig, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at("federated.flower.client_task.reply_content", lambda: asked(private, session), monkeypatch)
    first, second = asked(private, session), asked(private, session)
    assert first.packet is not None, first.message
    assert first == second
    assert charges(tmp_path) == 1
    assert decode_packet(first.packet)[0]["counter"] == 1


@pytest.mark.parametrize(
    "change",
    [{"parent_version": "q" * 64}, {"task_token": "e" * 64}],
    ids=lambda change: next(iter(change)),
)
def test_another_task_of_that_round_is_computed_and_charged(
    private: ExperimentConfig, session: Session, tmp_path: Path, change: dict[str, Any]
) -> None:
    """A run that was resumed further back comes to the round again from another version."""
    first = asked(private, session)
    second = asked(private, session, replace(TASK, **change))
    assert None is not first.packet != second.packet is not None
    assert charges(tmp_path) == 2
