"""What a device trains for its user is reachable from no message of a federation's client."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from federated.config import ExperimentConfig, TrainConfig
from federated.device import AdapterRuntime, PersonalAdapters, Recipe, TorchBackend
from federated.device.personal_store import PersonalStore
from federated.flower import Session, handle_train
from federated.flower.adapter_packets import adapter_packet
from federated.flower.folders import use_client_store
from federated.flower.publisher import recipe_record
from federated.flower.records import Assignment, Reply, task_content
from federated.manifest import TrainPlan, VersionManifest, sha256_hex
from federated.state import to_raw
from federated.wire import encode_tensors

CLIENT = "client-001"
ROWS = [{"text": "my own words", "label": 1}, {"text": "and others", "label": 0}]


def reply(config: ExperimentConfig, session: Session, store: Path) -> Reply:
    """What the client sends for one task, its own files being in ``store``."""
    use_client_store(store)
    task = Assignment("run", CLIENT, 1, "f" * 64, "p" * 64, session.adapter.base.base_digest, TrainPlan(rank=2))
    content = task_content(task, config, adapter_packet(session.initial))
    context = Context(1, 2, {"partition-id": 1, "num-partitions": 3}, RecordDict(), {})
    return Reply.from_message(handle_train(Message(content, 2, "train"), context))


def trained_personal(config: ExperimentConfig, session: Session, folder: Path) -> None:
    """A device in the same process, over the same base, trains a personal adapter and serves it."""
    weights = encode_tensors(to_raw(session.initial.tensors))
    base = session.adapter.base
    manifest = VersionManifest(
        sha256_hex(weights), base.base_digest, session.initial.spec, "fedit", "run", 1, task=recipe_record(config)
    )
    runtime = AdapterRuntime(TorchBackend(base, Recipe(config.model, config.adapter, config.task, config.seed)))
    runtime.activate(runtime.install(manifest, weights, version_id=manifest.version_id).digest)
    personal = PersonalAdapters(runtime, folder, rank=2)
    personal.train(CLIENT, ROWS, TrainConfig(steps=3, learning_rate=0.05, precision="float32"))


@pytest.fixture(autouse=True)
def _own_store(tmp_path: Path) -> Any:
    yield
    use_client_store(tmp_path / "after")


def test_a_clients_update_is_the_same_with_and_without_a_personal_adapter(
    real_config: ExperimentConfig, real_session: Session, tmp_path: Path
) -> None:
    """Even where both share one state folder, one process and one name."""
    before = reply(real_config, real_session, tmp_path / "clean")
    shared = tmp_path / "shared"
    trained_personal(real_config, real_session, shared)
    after = reply(real_config, real_session, shared)
    assert before.packet is not None
    assert after.packet == before.packet
    assert after.metrics.keys() == before.metrics.keys()


def test_no_bytes_of_it_are_in_the_message(
    real_config: ExperimentConfig, real_session: Session, tmp_path: Path
) -> None:
    trained_personal(real_config, real_session, tmp_path)
    packet = reply(real_config, real_session, tmp_path).packet
    assert packet is not None
    for tensor in PersonalStore(tmp_path).get(CLIENT, 1)[1].values():
        data = bytes(tensor.data)
        assert data.strip(b"\0")
        assert not any(data[at : at + 16] in packet for at in range(0, len(data) - 16, 16))


def test_nothing_that_sends_or_publishes_loads_the_devices_room() -> None:
    senders = "federated.flower, federated.uploads, federated.wire, federated.registry, federated.release, clients.app"
    code = (
        f"import sys, {senders}, strategies.app\n"
        "print(*[name for name in sys.modules if (name + '.').startswith('federated.device.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_its_record_is_no_version_that_could_be_published(
    real_config: ExperimentConfig, real_session: Session, tmp_path: Path
) -> None:
    trained_personal(real_config, real_session, tmp_path)
    record, _ = PersonalStore(tmp_path).get(CLIENT, 1)
    assert not isinstance(record, VersionManifest)
    with pytest.raises(TypeError):
        VersionManifest.from_dict(vars(record))
