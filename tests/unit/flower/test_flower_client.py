"""The client's half with a tiny real model: who it is, what it trains, what it sends twice, and what never leaves."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.app import ConfigRecord, Context, Message, RecordDict

from federated.config import ExperimentConfig
from federated.delta import norm, subtract
from federated.flower import Session, handle_query, handle_train
from federated.flower.adapter_packets import adapter_packet
from federated.flower.records import Assignment, Reply, query_content, task_content
from federated.manifest import AdapterSpec, TrainPlan, canonical_json
from federated.state import AdapterState, from_raw, group_of
from federated.training import client_seed
from federated.wire import Expectation, admit, decode_packet

CLIENT = "client-001"
PLAN = TrainPlan(rank=2)
Reply_ = Callable[..., Reply]


def context(**node_config: Any) -> Context:
    config = node_config or {"partition-id": 1, "num-partitions": 3}
    return Context(run_id=1, node_id=2, node_config=config, state=RecordDict(), run_config={})


@pytest.fixture
def task(real_session: Session) -> Assignment:
    return Assignment("run", CLIENT, 1, "f" * 64, "p" * 64, real_session.adapter.base.base_digest, PLAN)


@pytest.fixture
def ask(real_config: ExperimentConfig, real_session: Session, task: Assignment) -> Reply_:
    """Send a task and read the reply; any part can be replaced."""

    def send(
        assignment: Assignment = task,
        *,
        config: ExperimentConfig = real_config,
        packet: bytes | None = None,
        **node: Any,
    ) -> Reply:
        down = adapter_packet(real_session.initial) if packet is None else packet
        content = task_content(assignment, config, down)
        return Reply.from_message(handle_train(Message(content, 2, "train"), context(**node)))

    return send


def admitted(reply: Reply, task: Assignment, session: Session, update_key: bytes | None = None) -> Any:
    expected = Expectation(
        run_id=task.run_id,
        round_number=task.round_number,
        phase=task.plan.phase,
        client_id=task.client_id,
        task_token=task.task_token,
        parent_version=task.parent_version,
        base_digest=task.base_digest,
        spec=session.initial.spec,
        plan_digest=task.plan.digest,
        update_key=update_key,
    )
    assert reply.packet is not None, reply.message
    return admit(reply.packet, expected, layout=session.initial.layout())


def residual_of(session: Session) -> AdapterState:
    """One of rank 1 that fits the tiny model."""
    modules = tuple(replace(one, rank=1, alpha=1.0) for one in session.initial.spec.modules)
    tensors = {f"{one.name}.factor_a": torch.ones(1, one.d_in) for one in modules}
    tensors |= {f"{one.name}.factor_b": torch.ones(one.d_out, 1) for one in modules}
    return AdapterState(AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=modules), tensors)


class TestQuery:
    def test_a_client_says_its_name(self, real_config: ExperimentConfig):
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), context()))
        assert (reply.client_id, reply.reason, reply.packet) == (CLIENT, None, None)

    def test_a_client_that_has_none_says_why(self, real_config: ExperimentConfig):
        reply = Reply.from_message(handle_query(Message(query_content(real_config), 2, "query"), context(other=1)))
        assert (reply.client_id, reply.reason) == ("", "ConfigError")
        assert "client-config" in (reply.message or "")

    def test_a_message_without_an_experiment_is_refused(self):
        reply = Reply.from_message(handle_query(Message(RecordDict(), 2, "query"), context()))
        assert reply.reason == "WireError"


class TestTraining:
    def test_the_update_is_admitted_and_is_what_local_training_gives(
        self, ask: Reply_, task: Assignment, real_session: Session, real_config: ExperimentConfig
    ):
        reply = ask()
        found = admitted(reply, task, real_session)
        expected = real_session.trainer.run(
            real_session.initial,
            PLAN,
            real_session.local_data(CLIENT),
            seed=client_seed(real_config.seed, 1, CLIENT),
        )
        delta = from_raw(found.tensors)
        assert all(torch.equal(delta[name], tensor) for name, tensor in expected.delta.items())
        assert norm(delta) > 0
        assert (found.envelope.num_examples, found.envelope.counter) == (8, 1)
        assert (reply.client_id, reply.task_token) == (CLIENT, task.task_token)
        assert reply.metrics["train_loss"] == expected.metrics["train_loss"]
        assert reply.metrics["eval_before_num_examples"] == 4.0

    def test_what_trained_before_leaves_no_trace(self, ask: Reply_, task: Assignment, real_session: Session):
        """One model serves all clients of a process."""
        first = admitted(ask(), task, real_session)
        other = replace(task, client_id="client-002", run_id="other run")
        ask(other, **{"partition-id": 2})
        again = replace(task, run_id="a third run")
        second = admitted(ask(again), again, real_session)
        assert first.envelope.payload_digest == second.envelope.payload_digest

    def test_beside_a_residual_only_the_adapter_s_own_delta_goes_up(
        self, ask: Reply_, task: Assignment, real_session: Session
    ):
        beside = replace(real_session.initial, residual=residual_of(real_session))
        with_it = admitted(ask(packet=adapter_packet(beside)), task, real_session)
        again = replace(task, run_id="other run")
        without = admitted(ask(again), again, real_session)
        assert with_it.tensors.keys() == without.tensors.keys() == beside.tensors.keys()
        assert with_it.envelope.payload_digest != without.envelope.payload_digest
        assert real_session.adapter.read().residual is None

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda one: replace(one, spec=replace(one.spec, modules=one.spec.modules[:1])), "ModelError"),
            (lambda one: replace(one, tensors=dict.fromkeys(one.tensors, torch.ones(1))), "ModelError"),
            (lambda one: replace(one, tensors={}), "WireError"),
            (lambda one: replace(one, tensors={k: t * torch.nan for k, t in one.tensors.items()}), "FederatedError"),
        ],
        ids=["stray tensors", "shapes", "no tensors", "not finite"],
    )
    def test_a_residual_that_does_not_fit_is_refused_and_the_next_task_is_as_ever(
        self, ask: Reply_, task: Assignment, real_session: Session, change: Callable[[AdapterState], AdapterState],
        reason: str,
    ):  # fmt: skip
        expected = admitted(ask(), task, real_session).envelope.payload_digest
        other = replace(task, run_id="other run")
        odd = replace(real_session.initial, residual=change(residual_of(real_session)))
        reply = ask(other, packet=adapter_packet(odd))
        assert (reply.reason, reply.packet) == (reason, None)
        again = replace(task, run_id="a third run")
        assert admitted(ask(again), again, real_session).envelope.payload_digest == expected

    def test_clients_and_rounds_differ(self, ask: Reply_, task: Assignment, real_session: Session):
        other, later = replace(task, client_id="client-002"), replace(task, round_number=2)
        digests = {
            admitted(ask(), task, real_session).envelope.payload_digest,
            admitted(ask(other, **{"partition-id": 2}), other, real_session).envelope.payload_digest,
            admitted(ask(later), later, real_session).envelope.payload_digest,
        }
        assert len(digests) == 3

    def test_it_starts_from_the_adapter_in_the_message(self, ask: Reply_, task: Assignment, real_session: Session):
        moved = {name: tensor + 0.05 for name, tensor in real_session.initial.tensors.items()}
        reply = ask(packet=adapter_packet(AdapterState(real_session.initial.spec, moved)))
        delta = from_raw(admitted(reply, task, real_session).tensors)
        plain = from_raw(admitted(ask(replace(task, run_id="x")), replace(task, run_id="x"), real_session).tensors)
        assert norm(subtract(delta, plain)) > 0
        assert norm(delta) < norm(moved) / 2

    def test_an_evaluation_trains_nothing_and_sends_no_packet(self, ask: Reply_, task: Assignment, tmp_path: Path):
        reply = ask(replace(task, plan=replace(PLAN, mode="evaluate")))
        assert reply.packet is None
        assert {"eval_before_loss", "eval_before_accuracy", "eval_before_num_examples"} <= set(reply.metrics)
        assert "train_loss" not in reply.metrics
        assert not (tmp_path / "clients").exists()


class TestSentAgain:
    def test_the_same_task_twice_gives_the_same_bytes(self, ask: Reply_):
        first, second = ask(), ask()
        assert first.packet is not None
        assert first == second

    def test_it_is_not_computed_twice(self, ask: Reply_, monkeypatch: pytest.MonkeyPatch):
        ask()
        monkeypatch.setattr("federated.training.LocalTrainer.run", None)
        assert ask().packet is not None

    @pytest.mark.parametrize(
        "change",
        [{"task_token": "e" * 64}, {"round_number": 2}, {"run_id": "other"}, {"plan": replace(PLAN, phase=2)}],
        ids=str,
    )
    def test_another_task_is_another_answer(self, ask: Reply_, task: Assignment, change: dict[str, Any]):
        first, second = ask(), ask(replace(task, **change))
        assert second.packet is not None
        assert first.packet != second.packet

    def test_so_is_one_that_starts_elsewhere_or_asks_for_other_work(
        self, ask: Reply_, task: Assignment, real_session: Session, real_config: ExperimentConfig
    ):
        """A round that is done again need not be the same: its second phase may rest on other clients' answers."""
        moved = {name: tensor + 0.05 for name, tensor in real_session.initial.tensors.items()}
        elsewhere = adapter_packet(AdapterState(real_session.initial.spec, moved))
        slower = replace(real_config, train=replace(real_config.train, learning_rate=1e-5))
        answers = [ask(), ask(packet=elsewhere), ask(config=slower), ask(replace(task, parent_version="q" * 64))]
        assert len({answer.packet for answer in answers}) == 4
        assert ask() == answers[0]

    def test_counters_grow_over_rounds(self, ask: Reply_, task: Assignment, real_session: Session):
        tasks = [replace(task, round_number=number) for number in (1, 2, 3)]
        assert [admitted(ask(one), one, real_session).envelope.counter for one in tasks] == [1, 2, 3]

    def test_two_rounds_are_kept(self, ask: Reply_, task: Assignment, tmp_path: Path):
        for number in (1, 2, 3):
            ask(replace(task, round_number=number))
        (folder,) = (tmp_path / "clients").iterdir()
        assert {path.name for path in folder.iterdir() if path.is_dir()} == {"2", "3"}

    @pytest.mark.parametrize(
        "damage",
        [
            lambda whole: whole[:20],
            lambda whole: whole[:-1],
            lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]),
            lambda whole: b"[]\n" + whole,
            lambda whole: b"{}\n" + whole,
            lambda whole: b"",
        ],
        ids=["half a line", "a byte short", "a flipped bit", "no record", "an empty record", "nothing"],
    )
    def test_an_answer_that_was_not_kept_whole_is_made_anew(
        self, ask: Reply_, tmp_path: Path, damage: Callable[[bytes], bytes]
    ):
        """Sent as it is, the server would refuse it, again and again."""
        before = ask()
        (kept,) = (tmp_path / "clients").rglob("answer-*")
        damaged = damage(kept.read_bytes())
        kept.write_bytes(damaged)
        after = ask()
        assert None is not after.packet != before.packet is not None
        assert kept.read_bytes() != damaged
        assert ask() == after


KEEPING = TrainPlan(rank=2, kept=("factor_b", "dense"))


class TestKept:
    """A client that keeps B and its head, asked by hand."""

    def delta(self, reply: Reply) -> dict[str, torch.Tensor]:
        assert reply.packet is not None, reply.message
        return from_raw(decode_packet(reply.packet)[1])

    def test_only_the_rest_is_sent(self, ask: Reply_, task: Assignment):
        found = self.delta(ask(replace(task, plan=KEEPING)))
        assert {group_of(name) for name in found} == {"factor_a"}

    def test_the_same_task_twice_gives_the_same_bytes(self, ask: Reply_, task: Assignment):
        keeping = replace(task, plan=KEEPING)
        assert ask(keeping) == ask(keeping)

    def test_a_resumed_server_gets_the_same_update(self, ask: Reply_, task: Assignment):
        """Its token is new, so that the answer is computed again: from what the client held before it."""
        ask(replace(task, plan=KEEPING, parent_version="o" * 64))
        second = replace(task, plan=KEEPING, round_number=2)
        first, again = self.delta(ask(second)), self.delta(ask(replace(second, task_token="e" * 64)))
        assert norm(first) > 0
        assert all(torch.equal(again[name], tensor) for name, tensor in first.items())

    def test_the_next_round_starts_from_its_own(self, ask: Reply_, task: Assignment):
        second = replace(task, plan=KEEPING, round_number=2, parent_version="q" * 64)
        fresh = self.delta(ask(replace(second, run_id="other")))
        ask(replace(task, plan=KEEPING))
        assert norm(subtract(self.delta(ask(second)), fresh)) > 0

    def test_an_evaluation_is_of_its_own(self, ask: Reply_, task: Assignment):
        def measured(**change: Any) -> float:
            asked = replace(task, plan=replace(KEEPING, mode="evaluate"), parent_version="q" * 64, **change)
            return ask(asked).metrics["eval_before_loss"]

        ask(replace(task, plan=KEEPING))
        assert measured() != measured(run_id="other")


def _own(config: ExperimentConfig, folder: Path) -> dict[str, Any]:
    """A client's own file, which says everything that a server must not choose."""
    parts = {"data": asdict(config.data), "model": asdict(config.model)}
    return {"client_id": CLIENT, "store": str(folder / "own"), **parts}


class TestRefusals:
    def test_a_task_of_another_client(self, ask: Reply_, task: Assignment):
        reply = ask(replace(task, client_id="client-002"))
        assert (reply.reason, reply.packet) == ("ConfigError", None)
        assert reply.message == "a task for client 'client-002' reached client 'client-001'"

    def test_another_base_model(self, ask: Reply_, task: Assignment):
        reply = ask(replace(task, base_digest="c" * 64))
        assert reply.reason == "BaseMismatch"
        assert "cccccccccccc" in (reply.message or "")

    def test_a_base_model_that_the_owner_does_not_allow(
        self, ask: Reply_, task: Assignment, real_config: ExperimentConfig, tmp_path: Path
    ):
        site = {**_own(real_config, tmp_path), "allowed_base_digests": ["d" * 64]}
        (tmp_path / "client.yaml").write_text(json.dumps(site))
        reply = ask(**{"client-config": str(tmp_path / "client.yaml")})
        assert reply.reason == "BaseMismatch"
        assert "not among those that this client allows" in (reply.message or "")

    def test_a_base_model_that_the_owner_allows(
        self, ask: Reply_, task: Assignment, real_config: ExperimentConfig, tmp_path: Path
    ):
        site = {**_own(real_config, tmp_path), "allowed_base_digests": [task.base_digest]}
        (tmp_path / "client.yaml").write_text(json.dumps(site))
        assert ask(**{"client-config": str(tmp_path / "client.yaml")}).packet is not None
        assert (tmp_path / "own").is_dir()

    def test_more_rank_than_the_owner_allows(self, ask: Reply_, tmp_path: Path):
        (tmp_path / "client.yaml").write_text(json.dumps({"client_id": CLIENT, "store": "x", "max_rank": 1}))
        assert ask(**{"client-config": str(tmp_path / "client.yaml")}).reason == "ConfigError"

    def test_an_adapter_of_another_algebra(self, ask: Reply_, real_session: Session):
        spec = replace(real_session.initial.spec, alpha=99.0)
        reply = ask(packet=adapter_packet(replace(real_session.initial, spec=spec)))
        assert (reply.reason, reply.packet) == ("ModelError", None)

    def test_an_adapter_that_is_garbage(self, ask: Reply_):
        assert ask(packet=b"garbage").reason == "WireError"

    def test_a_task_that_would_write_outside_of_the_store(
        self, real_config: ExperimentConfig, real_session: Session, task: Assignment, tmp_path: Path
    ):
        """Round and phase become parts of a path on the client's disk."""
        for change in ({"round_number": "../../evil"}, {"plan": {**asdict(task.plan), "phase": "/../../../evil"}}):
            content = task_content(task, real_config, adapter_packet(real_session.initial))
            content["task"]["assignment"] = canonical_json({**asdict(task), **change}).decode()
            reply = Reply.from_message(handle_train(Message(content, 2, "train"), context()))
            assert reply.reason == "WireError"
        assert list(tmp_path.iterdir()) == []

    def test_a_store_that_cannot_be_written(self, ask: Reply_, tmp_path: Path):
        (tmp_path / "clients").write_text("a file where the folder should be")
        reply = ask()
        assert (reply.reason, reply.packet) == ("DataError", None)
        assert "cannot write the client's store" in (reply.message or "")

    @pytest.mark.parametrize("record", [{}, {"task": ConfigRecord({"experiment": "{}"})}], ids=["nothing", "invalid"])
    def test_a_message_that_is_no_task(self, record: dict[str, Any]):
        reply = Reply.from_message(handle_train(Message(RecordDict(record), 2, "train"), context()))
        assert reply.reason in ("WireError", "ConfigError")


QUOTED = "patient Jane Doe has diabetes"


class TestSigning:
    KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))

    @pytest.fixture
    def site(self, real_config: ExperimentConfig, tmp_path: Path) -> dict[str, str]:
        """A client's own file, and its key beside it."""
        pem = self.KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        (tmp_path / "update.pem").write_bytes(pem)
        (tmp_path / "update.pem").chmod(0o600)
        (tmp_path / "client.yaml").write_text(json.dumps({**_own(real_config, tmp_path), "signing_key": "update.pem"}))
        return {"client-config": str(tmp_path / "client.yaml")}

    def test_an_update_is_signed_with_the_clients_own_key(
        self, ask: Reply_, task: Assignment, real_session: Session, site: dict[str, str]
    ):
        envelope = admitted(ask(**site), task, real_session, self.KEY.public_key().public_bytes_raw()).envelope
        assert envelope.client_id == CLIENT
        assert envelope.signature is not None

    def test_it_is_signed_once_and_sent_again_as_it_was(self, ask: Reply_, site: dict[str, str]):
        assert ask(**site) == ask(**site)

    def test_without_a_key_nothing_is_signed(self, ask: Reply_, task: Assignment, real_session: Session):
        assert admitted(ask(), task, real_session).envelope.signature is None

    def test_a_key_that_others_may_read_trains_nothing(
        self, ask: Reply_, site: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("federated.training.LocalTrainer.run", None)
        (tmp_path / "update.pem").chmod(0o644)
        reply = ask(**site)
        assert (reply.reason, reply.packet) == ("ConfigError", None)
        assert reply.message == (
            "signing_key update.pem: others may read it (mode 0644); expected 0600 or less: chmod 600"
        )

    def test_it_is_said_with_the_clients_name_already(
        self, real_config: ExperimentConfig, site: dict[str, str], tmp_path: Path
    ):
        (tmp_path / "update.pem").unlink()
        message = Message(query_content(real_config), 2, "query")
        reply = Reply.from_message(handle_query(message, context(**site)))
        assert reply.reason == "ConfigError"
        assert "update.pem: No such file" in (reply.message or "")


class TestPrivacy:
    @pytest.mark.parametrize("where", ["run", "load"])
    def test_a_foreign_exception_s_text_never_leaves(
        self, ask: Reply_, real_session: Session, monkeypatch: pytest.MonkeyPatch, where: str
    ):
        def fails(*_: Any, **__: Any) -> None:
            raise ValueError(f"could not convert string to float: '{QUOTED}'")

        name = {"run": "federated.training.LocalTrainer.run", "load": "federated.data.source.PooledSource.load"}[where]
        monkeypatch.setattr(name, fails)
        reply = ask()
        assert (reply.reason, reply.packet) == ("ValueError", None)
        assert "Jane" not in str(reply)
        assert reply.message == "unexpected error on the client; its own log has the details"

    def test_a_reply_holds_the_delta_and_numbers_and_no_rows(self, ask: Reply_, real_session: Session):
        reply = ask()
        data = real_session.source.load(CLIENT)
        rows = [row["text"].encode() for row in (*data.train, *data.test)]
        assert len(rows) == 12
        assert reply.packet is not None
        assert not [row for row in rows if row in reply.packet]
        assert all(type(value) is float for value in reply.metrics.values())


def test_what_a_client_did_is_noted_on_its_device_and_nowhere_else(
    ask: Reply_, task: Assignment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "events.jsonl"
    monkeypatch.setenv("FEDPEFT_EVENTS", str(path))
    monkeypatch.setenv("FEDPEFT_CLIENT_STORE", str(tmp_path / "store"))
    first = ask()
    ask()  # sent again, not trained again
    ask(replace(task, client_id="somebody else"))
    ask(packet=b"no packet")
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(one["event"], one.get("outcome"), one.get("reason")) for one in events] == [
        ("trained", None, None), ("answer", "ok", None), ("answer", "ok", None), ("answer", "refused", "ConfigError"),
        ("answer", "refused", "WireError"),
    ]  # fmt: skip
    assert first.packet is not None
    assert (events[1]["bytes_up"], events[1]["run"], events[1]["round"]) == (len(first.packet), "run", 1)
    assert events[1]["bytes_down"] > 1000
    assert events[0]["steps"] > 0
    assert not {"train_loss", "num_examples", "message"} & {key for one in events for key in one}
