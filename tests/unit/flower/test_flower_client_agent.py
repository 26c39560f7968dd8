"""A training client beside its device's agent: a real release, a real agent, and answers of a real (tiny) model."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from typer.testing import CliRunner

from federated.cli.main import app as command
from federated.config import ExperimentConfig, TrainConfig
from federated.delta import apply_some
from federated.device import AdapterRuntime, Agent, DeviceConfig, PersonalAdapters, Route, Standing, open_runtime
from federated.device.journal import Journal, read_book
from federated.device.personal_store import PersonalStore
from federated.errors import DeviceError
from federated.flower import Session, handle_train, open_session
from federated.flower.adapter_packets import adapter_packet
from federated.flower.client_site import site_of
from federated.flower.publisher import recipe_record
from federated.flower.records import Assignment, Reply, task_content
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan, VersionManifest, sha256_hex
from federated.release import Artefact, KeyRing, Plan, Publisher, Quorum
from federated.state import AdapterState, from_raw, to_raw
from federated.wire import decode_packet, encode_tensors

Make = Callable[..., Any]
CLIENT = "client-001"
ROWS = [{"text": "late again"}, {"text": "thank you"}, {"text": "cold and grey"}]
ANN = Route(user="ann")


def moved(session: Session, by: float) -> AdapterState:
    """A trained adapter, as far as anybody can tell: every tensor somewhere else."""
    made = torch.Generator().manual_seed(int(by * 1000))
    tensors = {
        name: tensor + by * torch.randn(tensor.shape, generator=made)
        for name, tensor in session.initial.tensors.items()
    }
    return AdapterState(session.initial.spec, tensors)


@dataclass
class Yard:
    """A device, its publisher, and the client that trains on it.

    Args:
        folder: of everything.
        config: the run's.
        session: of that.
        publisher: of the channel that the device follows.
    """

    folder: Path
    config: ExperimentConfig
    session: Session
    publisher: Publisher

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def release(self, number: int, adapter: AdapterState) -> str:
        """Publish, and let the agent fetch, verify, probe and activate it."""
        weights = encode_tensors(to_raw(adapter.tensors))
        base = self.session.adapter.base.base_digest
        more: dict[str, Any] = {"task": recipe_record(self.config), "adapter_id": "run", "release_counter": number}
        manifest = VersionManifest(sha256_hex(weights), base, adapter.spec, "fedit", "run", number, **more)
        self.publisher.publish("stable", Artefact(manifest, weights))
        self.agent()
        return manifest.version_id

    def agent(self) -> AdapterRuntime:
        """One start of the agent: its runtime serves what it verified."""
        probation: Any = {"seconds": 0.0}
        config = DeviceConfig(
            "shop-17", str(self.folder / "releases"), self.publisher.trusted_root, self.state, probation=probation
        )
        with Agent(config, open_runtime) as agent:
            agent.tick()  # what was on probation is committed
            assert agent.poll(), read_book(self.state)
            agent.tick()
            assert agent.runtime is not None
            return agent.runtime

    def site(self, agent: str, personal: str = "ann") -> Context:
        path = self.folder / "client.yaml"
        path.write_text(
            f"client_id: {CLIENT}\nstore: {self.folder / 'store'}\nmodel: {{source: 'tiny:bert'}}\n"
            "data: {name: synthetic, partition: {num_clients: 3}, max_train_per_client: 8, max_test_per_client: 4}\n"
            f"agent: {agent}\npersonal: {personal!r}\n"
        )
        return Context(1, 2, {"client-config": str(path)}, RecordDict(), {})

    def task(self, number: int, version_id: str, **changes: Any) -> Assignment:
        base = self.session.adapter.base.base_digest
        task = Assignment("run", CLIENT, number, f"{number}" * 64, version_id, base, TrainPlan(rank=2))
        return replace(task, **changes)

    def ask(self, task: Assignment, adapter: AdapterState, agent: str | None = None, personal: str = "ann") -> Reply:
        context = self.site(agent or f"{{path: {self.state}, require: true}}", personal)
        content = task_content(task, self.config, adapter_packet(adapter))
        return Reply.from_message(handle_train(Message(content, 2, "train"), context))


@pytest.fixture(scope="module")
def config(real_config: ExperimentConfig) -> ExperimentConfig:
    return replace(real_config, train=replace(real_config.train, steps=2, learning_rate=0.05))


@pytest.fixture(scope="module")
def session(config: ExperimentConfig) -> Session:
    return open_session(config)


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publisher")
    ring = KeyRing(folder / "keys", passphrase=lambda *_: b"none", cost=2)
    Publisher.create(folder / "releases", ring, Plan(quorums={"root": Quorum()}))
    return folder


@pytest.fixture
def yard(releases: Path, config: ExperimentConfig, session: Session, tmp_path: Path) -> Yard:
    shutil.copytree(releases, tmp_path, dirs_exist_ok=True)
    ring = KeyRing(tmp_path / "keys", passphrase=lambda *_: b"none", cost=2)
    return Yard(tmp_path, config, session, Publisher(tmp_path / "releases", ring))


@pytest.fixture
def first(yard: Yard, session: Session) -> tuple[str, AdapterState]:
    """A version that the agent has verified and that answers."""
    adapter = moved(session, 0.1)
    return yard.release(1, adapter), adapter


def answers(runtime: AdapterRuntime, route: Route | None = None, digest: str | None = None) -> Any:
    if digest is not None:
        return runtime.predict(ROWS, digest=digest).predictions
    return runtime.predict(ROWS, route=route).predictions if route else runtime.predict(ROWS).predictions


class TestFromVerifiedToServed:
    def test_the_whole_way(self, yard: Yard, session: Session, first: tuple[str, AdapterState]):
        """Verified, trained from, served at once, trained on from the next version, rolled back, bit for bit."""
        runtime = yard.agent()
        personal = PersonalAdapters(runtime, yard.state / "personal", follow=True)
        device = answers(runtime)
        assert answers(runtime, ANN) == device

        reply = yard.ask(yard.task(1, first[0]), first[1])
        assert reply.packet is not None, reply.message
        assert personal.refresh() == ["ann"]
        one = answers(runtime, ANN)
        learnt = apply_some(first[1], from_raw(decode_packet(reply.packet)[1]))
        assert one == self.truth(runtime, learnt)
        assert one != device == answers(runtime)
        assert answers(runtime, Route(name="ann")) == one

        adapter = moved(session, 0.2)
        version_id = yard.release(2, adapter)
        assert yard.ask(yard.task(2, version_id), adapter).packet is not None
        assert personal.refresh() == ["ann"]
        two = answers(runtime, ANN)
        assert two not in (one, device)

        assert personal.rollback("ann") == Standing(1, "null")
        assert answers(runtime, ANN) == one
        assert personal.rollback("ann") == Standing(0, "null")
        assert answers(runtime, ANN) == device

    @staticmethod
    def truth(runtime: AdapterRuntime, learnt: AdapterState) -> Any:
        """What start and delta together answer, installed as any version is."""
        weights = encode_tensors(to_raw(learnt.cast(learnt.spec.dtype).tensors))
        return answers(runtime, digest=sha256_hex(weights))

    def test_it_outlives_a_restart_and_is_rolled_back_from_the_command_line(
        self, yard: Yard, first: tuple[str, AdapterState]
    ):
        yard.ask(yard.task(1, first[0]), first[1])
        (yard.folder / "device.yaml").write_text(
            "device_id: shop-17\nsource: releases\nroot: releases/metadata/1.root.json\nstate: state\n"
        )
        runtime = yard.agent()
        device = answers(runtime)
        personal = PersonalAdapters(runtime, yard.state / "personal")
        assert answers(runtime, ANN) != device
        run = CliRunner()
        file = ["--config", str(yard.folder / "device.yaml")]
        listed = run.invoke(command, ["device", "personal", "list", *file])
        assert listed.exit_code == 0, listed.output
        assert all(word in listed.output for word in ("ann", "yes", "none", first[0][:12], "whole"))
        done = run.invoke(command, ["device", "personal", "rollback", "ann", *file])
        assert (done.exit_code, done.output) == (0, "ann: nothing of its own answers now\n")
        assert personal.refresh() == ["ann"]
        assert answers(runtime, ANN) == device
        with pytest.raises(DeviceError, match="nothing of 'ann' is in use on this device"):
            run.invoke(command, ["device", "personal", "rollback", "ann", *file], catch_exceptions=False)
        done = run.invoke(command, ["device", "personal", "forget", "ann", *file])
        assert (done.exit_code, done.output) == (0, "ann: deleted\n")
        assert personal.refresh() == ["ann"]
        assert personal.names() == []

    def test_the_update_is_the_same_without_agent_and_personal_adapter(
        self, yard: Yard, first: tuple[str, AdapterState]
    ):
        with_it = yard.ask(yard.task(1, first[0]), first[1])
        without = yard.ask(yard.task(1, first[0], run_id="other"), first[1], agent="null", personal="")
        digests = [decode_packet(reply.packet or b"")[0]["payload_digest"] for reply in (with_it, without)]
        assert digests[0] == digests[1]
        assert {**with_it.metrics, "seconds": 0.0} == {**without.metrics, "seconds": 0.0}
        assert with_it.ledger_head == without.ledger_head

    def test_a_task_that_is_asked_again_keeps_nothing_twice_and_needs_no_version_any_more(
        self, yard: Yard, first: tuple[str, AdapterState]
    ):
        before = yard.ask(yard.task(1, first[0]), first[1])
        shutil.rmtree(yard.state / "versions")
        assert yard.ask(yard.task(1, first[0]), first[1]) == before
        assert PersonalStore(yard.state / "personal").numbers("ann") == [1]

    def test_what_is_learnt_anew_and_is_the_same_is_kept_once(self, yard: Yard, first: tuple[str, AdapterState]):
        """Killed between keeping and storing the answer: the computation repeats itself."""
        yard.ask(yard.task(1, first[0]), first[1])
        shutil.rmtree(yard.folder / "store")
        yard.ask(yard.task(1, first[0]), first[1])
        assert PersonalStore(yard.state / "personal").numbers("ann") == [1]

    def test_a_disk_that_refuses_costs_the_personal_adapter_alone(
        self, yard: Yard, first: tuple[str, AdapterState], caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ):  # fmt: skip
        def refuse(*_: Any) -> None:
            raise DeviceError("cannot write 1.safetensors: No space left on device")

        monkeypatch.setattr(PersonalStore, "put", refuse)
        assert yard.ask(yard.task(1, first[0]), first[1]).packet is not None
        assert "what was learnt in round 1 is not kept as 'ann': cannot write" in caplog.text

    def test_an_adapter_for_another_base_does_not_answer(
        self, yard: Yard, first: tuple[str, AdapterState], caplog: pytest.LogCaptureFixture
    ):
        yard.ask(yard.task(1, first[0]), first[1])
        store = PersonalStore(yard.state / "personal")
        version, tensors = store.get("ann", 1)
        store.put(replace(version, base_digest="0" * 64), tensors)
        runtime = yard.agent()
        PersonalAdapters(runtime, yard.state / "personal")
        assert answers(runtime, ANN) == answers(runtime)
        assert "personal adapter ann is for the base model 000000000000 and does not answer" in caplog.text

    def test_whole_adapters_are_not_trained_on_and_names_are_not_shared(
        self, yard: Yard, first: tuple[str, AdapterState]
    ):
        yard.ask(yard.task(1, first[0]), first[1])
        runtime = yard.agent()
        personal = PersonalAdapters(runtime, yard.state / "personal", rank=2)
        rows = [{"text": "late again", "label": 0}, {"text": "thank you", "label": 1}]
        quick = TrainConfig(steps=1, batch_size=2, precision="float32")
        with pytest.raises(DeviceError, match="'ann' is what a federation's client keeps"):
            personal.train("ann", rows, quick)
        with pytest.raises(DeviceError, match="train under another name"):
            personal.rebase("ann", runtime.active.digest, rows)
        personal.train("bob", rows, quick)
        reply = yard.ask(yard.task(2, first[0]), first[1], personal="bob")
        assert (reply.reason, reply.packet) == ("DeviceError", None)
        assert "trained on this device itself" in (reply.message or "")
        assert yard.ask(yard.task(2, first[0]), first[1], personal="null").reason == "DeviceError"


class TestVerified:
    def test_it_starts_from_the_shelf_s_bytes_and_says_so(
        self, yard: Yard, first: tuple[str, AdapterState], caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.INFO, "federated.flower")
        assert yard.ask(yard.task(1, first[0]), first[1]).packet is not None
        assert f"round 1 starts from version {first[0][:12]}, as this device's agent verified it" in caplog.text

    def test_the_agent_s_own_file_will_do_for_its_path(self, yard: Yard, first: tuple[str, AdapterState]):
        (yard.folder / "device.yaml").write_text(
            "device_id: shop-17\nsource: releases\nroot: releases/metadata/1.root.json\nstate: state\n"
        )
        path = f"{{path: {yard.folder / 'device.yaml'}, require: true}}"
        assert yard.ask(yard.task(1, first[0]), first[1], agent=path).packet is not None

    def test_a_fresh_adapter_is_what_the_client_makes_itself_and_needs_no_agent(self, yard: Yard, session: Session):
        yard.state.mkdir()
        reply = yard.ask(yard.task(1, "0" * 64), session.initial)
        assert reply.packet is not None, reply.message
        other = replace(session.initial, tensors={n: t + 1e-6 for n, t in session.initial.tensors.items()})
        assert yard.ask(yard.task(2, "0" * 64), other).reason == "not_verified"

    @pytest.mark.parametrize("state", ["discovered", "downloading", "failed"])
    def test_a_version_that_is_not_so_far_or_failed_is_refused(
        self, yard: Yard, first: tuple[str, AdapterState], state: Any
    ):
        from datetime import UTC, datetime

        Journal(yard.state, lambda: datetime.now(UTC)).enter(first[0], state)
        reply = yard.ask(yard.task(1, first[0]), first[1])
        assert (reply.reason, reply.packet) == ("not_verified", None)
        assert f"is {state} to the device's agent: release it on the channel" in (reply.message or "")

    def test_an_unknown_one_is_refused_with_what_to_do(self, yard: Yard, first: tuple[str, AdapterState]):
        reply = yard.ask(yard.task(1, "9" * 64), first[1])
        assert reply.reason == "not_verified"
        assert f"or there: fedpeft device install {'9' * 64}" in (reply.message or "")

    @pytest.mark.parametrize("version_id", ["", "../../../etc", "x" * 5000], ids=["none", "a path", "endless"])
    def test_a_name_that_is_none_leads_nowhere(self, yard: Yard, first: tuple[str, AdapterState], version_id: str):
        reply = yard.ask(yard.task(1, version_id), first[1])
        assert reply.reason == "not_verified"

    def test_one_that_is_off_the_shelf_or_damaged_is_refused(self, yard: Yard, first: tuple[str, AdapterState]):
        weights = yard.state / "versions" / first[0] / "weights.safetensors"
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.unlink()  # a link to the fetched file
        weights.write_bytes(data)
        reply = yard.ask(yard.task(1, first[0]), first[1])
        assert reply.reason == "not_verified"
        assert "is not on the device's shelf any more, or damaged" in (reply.message or "")

    @pytest.mark.parametrize(
        "change",
        [
            lambda one: replace(one, tensors={n: t + 1e-7 for n, t in one.tensors.items()}),
            lambda one: AdapterState(doubled(one.spec), one.tensors),
        ],
        ids=["other weights", "the same weights, scaled otherwise"],
    )
    def test_something_else_under_its_name_is_refused(
        self, yard: Yard, first: tuple[str, AdapterState], change: Callable[[AdapterState], AdapterState]
    ):
        reply = yard.ask(yard.task(1, first[0]), change(first[1]))
        assert (reply.reason, reply.packet) == ("not_verified", None)
        assert "the server sent something else than version" in (reply.message or "")

    def test_a_residual_is_part_of_what_was_verified(self, yard: Yard, session: Session):
        """A version has it in its factors; the message has it beside them."""
        modules = tuple(replace(one, rank=1, alpha=1.0) for one in session.initial.spec.modules)
        spec = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=modules)
        tensors = {f"{one.name}.factor_a": torch.full((1, one.d_in), 0.1) for one in modules}
        tensors |= {f"{one.name}.factor_b": torch.full((one.d_out, 1), 0.1) for one in modules}
        whole = GlobalState(moved(session, 0.1), AdapterState(spec, tensors))
        version_id = yard.release(1, whole.export())
        assert yard.ask(yard.task(1, version_id), whole.materialise()).packet is not None
        assert yard.ask(yard.task(2, version_id), replace(whole.materialise(), residual=None)).reason == "not_verified"

    def test_an_evaluation_needs_it_too(self, yard: Yard, first: tuple[str, AdapterState]):
        plan = TrainPlan(rank=2, mode="evaluate")
        assert yard.ask(yard.task(1, first[0], plan=plan), first[1]).metrics["eval_before_num_examples"] == 4.0
        assert yard.ask(yard.task(1, "9" * 64, plan=plan), first[1]).reason == "not_verified"

    def test_where_it_is_not_required_it_trains_all_the_same_and_says_so(
        self, yard: Yard, first: tuple[str, AdapterState], caplog: pytest.LogCaptureFixture
    ):
        caplog.set_level(logging.INFO, "federated.flower")
        reply = yard.ask(yard.task(1, "9" * 64), first[1], agent=f"{{path: {yard.state}}}")
        assert reply.packet is not None
        assert "starts from what the server sent, which is not verified: version 999999999999 is unknown" in caplog.text

    def test_without_a_journal_it_says_what_to_start(self, yard: Yard, session: Session):
        yard.state.mkdir()
        reply = yard.ask(yard.task(1, "9" * 64), moved(session, 0.1))
        assert "keeps no journal yet: start it (fedpeft device run)" in (reply.message or "")

    def test_a_place_that_is_not_there_is_named(self, yard: Yard, session: Session):
        reply = yard.ask(yard.task(1, "9" * 64), moved(session, 0.1))
        assert reply.reason == "ConfigError"
        assert "agent.path = state: no such file or folder" in (reply.message or "")


def doubled(spec: AdapterSpec) -> AdapterSpec:
    modules = tuple(replace(one, alpha=2 * one.alpha) for one in spec.modules)
    return replace(spec, alpha=2 * spec.alpha, modules=modules)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("personal: ann", "personal needs agent.path: the state folder in which it is kept"),
        ("agent: {require: true}", "agent.path: Field required"),
        ("agent: {path: x, requires: true}", "agent.requires: unknown key"),
    ],
)
def test_what_is_half_said_is_refused(config: ExperimentConfig, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "client.yaml"
    path.write_text(f"client_id: a\nstore: x\ndata: {{name: synthetic}}\nmodel: {{source: 'tiny:bert'}}\n{text}\n")
    with pytest.raises(Exception, match=message):
        site_of({"client-config": str(path)}, config)
