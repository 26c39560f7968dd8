"""Personal adapters: trained on the device over the installed version, stacked, undone, probed on a new one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from federated.adapters import attach, load_base
from federated.config import AdapterConfig, TrainConfig
from federated.device import NULL, AdapterRuntime, PersonalAdapters, Route, Standing, open_runtime
from federated.device.personal_store import PersonalStore
from federated.errors import DataError, DeviceError, FederatedError
from federated.manifest import sha256_hex
from federated.state import AdapterState, from_raw, to_raw
from federated.tasks import make_task
from federated.wire import decode_tensors, encode_tensors

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [{"text": text, "label": label} for text, label in (("late again", 0), ("thank you", 1), ("fine", 2))] * 2
TEXTS = [{"text": "late again"}, {"text": "thank you"}, {"text": "fine"}]
QUICK = TrainConfig(steps=6, batch_size=6, learning_rate=0.02, precision="float32")
ANN = Route(name="ann")


def scaled(version: Any, factor: float) -> Any:
    tensors = {name: tensor * factor for name, tensor in from_raw(decode_tensors(version.weights)).items()}
    weights = encode_tensors(to_raw(tensors))
    return replace(version, manifest=replace(version.manifest, weights_digest=sha256_hex(weights)), weights=weights)


@pytest.fixture
def versions(recipe: Make, real_version: Make) -> list[Any]:
    """Two global versions, gentle enough that training on top shows."""
    return [scaled(real_version(recipe(), value), 0.1) for value in (1, 2)]


@pytest.fixture
def runtime(versions: list[Any]) -> AdapterRuntime:
    made = open_runtime(versions[0].manifest)
    for one in versions:
        one.install(made)
    made.activate(versions[0].digest)
    return made


@pytest.fixture
def personal(runtime: AdapterRuntime, tmp_path: Path) -> PersonalAdapters:
    return PersonalAdapters(runtime, tmp_path / "personal", rank=2)


def answers(runtime: AdapterRuntime, route: Route) -> Any:
    return runtime.predict(TEXTS, route=route).predictions


def test_training_answers_at_once_under_its_name_and_for_its_user(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    before = runtime.predict(TEXTS).predictions
    version = personal.train("ann", ROWS, QUICK)
    assert (version.number, version.previous) == (1, 0)
    assert (version.onto, version.onto_version) == (versions[0].digest, versions[0].version_id)
    assert personal.standing("ann") == Standing(1, versions[0].digest)
    assert [one.label for one in answers(runtime, ANN)] == ["bad", "good", "mixed"]
    assert answers(runtime, Route(user="ann")) == answers(runtime, ANN) != before
    assert runtime.predict(TEXTS).predictions == before == answers(runtime, Route(user="bob"))
    assert personal.names() == ["ann"]


def test_what_answers_is_the_global_update_plus_the_personal_one(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any], tmp_path: Path, recipe: Make
) -> None:
    """Against a model of which each weight is W + both products, summed in float64."""
    personal.train("ann", ROWS, QUICK)
    version, own = PersonalStore(tmp_path / "personal").get("ann", 1)
    below = AdapterState(versions[0].manifest.spec, from_raw(decode_tensors(versions[0].weights)))
    above = AdapterState(version.spec, from_raw(own))
    made = recipe()
    base = load_base(made.model)
    plain = attach(base, AdapterConfig(kind="head"), made.task, seed=5)
    plain.write(AdapterState(plain.spec, {name: t + above.tensors[name] for name, t in below.dense().items()}))
    for one, other in zip(below.pairs(), above.pairs(), strict=True):
        update = sum(p.scaling * p.factor_b.double() @ p.factor_a.double() for p in (one, other))
        layer = torch.nn.Linear(one.module.d_in, one.module.d_out)
        held = base.model.get_submodule(one.module.name)
        layer.weight.data = (held.weight.double() + update).float()
        layer.bias.data = held.bias.data.clone()
        plain.replace_layer(one.module.name, layer)
    expected = make_task(made.task, base.tokenizer).predict(plain.model, TEXTS)
    for found, true in zip(answers(runtime, ANN), expected, strict=True):
        assert found.scores == pytest.approx(true.scores, abs=1e-5)


def test_training_goes_on_from_the_version_before(
    runtime: AdapterRuntime, personal: PersonalAdapters, tmp_path: Path
) -> None:
    personal.train("ann", ROWS, QUICK)
    second = personal.train("ann", ROWS, replace(QUICK, learning_rate=1e-7))
    assert (second.number, second.previous) == (2, 1)
    store = PersonalStore(tmp_path / "personal")
    first, then = store.get("ann", 1)[1], store.get("ann", 2)[1]
    assert first.keys() == then.keys()
    for name, tensor in then.items():
        np.testing.assert_allclose(tensor.array, first[name].array, atol=1e-5)


def test_rolling_back_walks_to_the_global_adapter_alone(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    personal.train("ann", ROWS, QUICK)
    one = answers(runtime, ANN)
    personal.train("ann", ROWS, QUICK)
    two = answers(runtime, ANN)
    assert one != two
    assert personal.rollback("ann") == Standing(1, versions[0].digest)
    assert answers(runtime, ANN) == one
    assert personal.rollback("ann") == Standing(0, versions[0].digest)
    assert runtime.predict(TEXTS, route=ANN).slot.digest == versions[0].digest
    assert personal.rollback("ann").number == 0
    third = personal.train("ann", ROWS, QUICK)
    assert (third.number, third.previous) == (3, 0)


def test_a_request_under_way_keeps_the_version_that_it_began_with(
    runtime: AdapterRuntime, personal: PersonalAdapters
) -> None:
    personal.train("ann", ROWS, QUICK)
    with runtime.pin(route=ANN) as slot:
        before = runtime.backend.predict(slot.handle, TEXTS)
        personal.train("ann", ROWS, QUICK)
        assert runtime.backend.predict(slot.handle, TEXTS) == before
    assert answers(runtime, ANN) != before


def test_a_new_global_version_leaves_it_where_it_stands_until_it_is_probed(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    personal.train("ann", ROWS, QUICK)
    before = answers(runtime, ANN)
    runtime.activate(versions[1].digest)
    assert answers(runtime, ANN) == before
    rebased = personal.rebase("ann", versions[1].digest, ROWS)
    assert (rebased.kept, rebased.loss_stacked < rebased.loss_alone) == (True, True)
    assert personal.standing("ann") == Standing(1, versions[1].digest)
    assert runtime.predict(TEXTS, route=ANN).slot == rebased.slot
    assert answers(runtime, ANN) not in (before, runtime.predict(TEXTS).predictions)


def test_what_a_probe_refuses_is_stale_and_the_global_version_answers(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    personal.train("ann", ROWS, QUICK)
    wrong = [{**row, "label": (row["label"] + 1) % 3} for row in ROWS]
    rebased = personal.rebase("ann", versions[1].digest, wrong)
    assert (rebased.kept, rebased.slot.digest) == (False, versions[1].digest)
    assert personal.standing("ann") == Standing(1, versions[1].digest, stale=True)
    assert runtime.predict(TEXTS, route=ANN).slot.digest == versions[1].digest
    assert personal.rebase("ann", versions[1].digest, ROWS).kept  # asked again with other rows
    assert personal.standing("ann") == Standing(1, versions[1].digest)


def test_training_a_stale_one_starts_from_nothing(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    personal.train("ann", ROWS, QUICK)
    personal.rebase("ann", versions[1].digest, [{**row, "label": (row["label"] + 1) % 3} for row in ROWS])
    again = personal.train("ann", ROWS, QUICK, onto=versions[1].digest)
    assert (again.number, again.previous, again.onto) == (2, 0, versions[1].digest)
    assert personal.standing("ann") == Standing(2, versions[1].digest)
    assert [one.label for one in answers(runtime, ANN)] == ["bad", "good", "mixed"]


def test_a_global_version_of_another_kind_makes_it_stale(
    runtime: AdapterRuntime, personal: PersonalAdapters, recipe: Make, real_version: Make
) -> None:
    personal.train("ann", ROWS, QUICK)
    other = scaled(real_version(recipe(adapter=AdapterConfig(kind="ia3")), 3), 0.1)
    other.install(runtime)
    rebased = personal.rebase("ann", other.digest, ROWS)
    assert (rebased.kept, rebased.loss_stacked) == (False, float("inf"))
    assert personal.train("ann", ROWS, QUICK, onto=other.digest).spec.peft_type == "ia3"
    assert [one.label for one in answers(runtime, ANN)] == ["bad", "good", "mixed"]


@pytest.mark.parametrize("kind", ["lora_xs", "ia3", "head", "prompt"])
def test_every_kind_of_global_adapter_can_be_stood_on(
    kind: str, recipe: Make, real_version: Make, tmp_path: Path
) -> None:
    version = scaled(real_version(recipe(adapter=AdapterConfig(kind=kind)), 3), 0.1)
    runtime = open_runtime(version.manifest)
    runtime.activate(version.install(runtime).digest)
    personal = PersonalAdapters(runtime, tmp_path / "personal")
    personal.train("ann", ROWS, replace(QUICK, steps=20, learning_rate=0.05))
    assert [one.label for one in answers(runtime, ANN)] == ["bad", "good", "mixed"]
    first = answers(runtime, ANN)
    personal.train("ann", ROWS, replace(QUICK, learning_rate=1e-8))
    for one, other in zip(answers(runtime, ANN), first, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-4)


def test_after_a_restart_names_are_routed_and_slots_built_when_asked_for(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any], tmp_path: Path
) -> None:
    for name in ("ann", "bob"):
        personal.train(name, ROWS, QUICK, seed=len(name) + ord(name[0]))
    expected = [answers(runtime, Route(name=name)) for name in ("ann", "bob")]
    again = AdapterRuntime(open_runtime(versions[0].manifest).backend)
    PersonalAdapters(again, tmp_path / "personal", rank=2)
    with pytest.raises(DeviceError, match="no slot"):  # its global version is not installed yet
        answers(again, ANN)
    versions[0].install(again)
    assert len(again.slots) == 2
    assert [answers(again, Route(name=name)) for name in ("ann", "bob")] == expected
    assert again.pins == {}


@pytest.mark.parametrize("file", ["standing.json", "1.json", "1.safetensors"])
def test_one_that_is_damaged_keeps_nobody_elses_from_answering(
    file: str, runtime: AdapterRuntime, versions: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "personal"
    personal = PersonalAdapters(runtime, folder, rank=1)
    personal.train("ann", ROWS, replace(QUICK, steps=1))
    (place,) = folder.iterdir()
    personal.train("bob", ROWS, replace(QUICK, steps=2))
    expected = answers(runtime, Route(name="bob"))
    (place / file).write_bytes(b"{")
    again = AdapterRuntime(open_runtime(versions[0].manifest).backend)
    versions[0].install(again)
    personal = PersonalAdapters(again, folder, rank=1)
    assert answers(again, Route(name="bob")) == expected
    assert "is damaged" in caplog.text
    assert "ann" not in again.routes.names
    personal.forget("ann")
    assert not place.exists()
    personal.train("ann", ROWS, replace(QUICK, steps=1), onto=versions[0].digest)
    assert "ann" in again.routes.names


def test_more_users_than_slots_are_built_again_when_they_come_back(versions: list[Any], tmp_path: Path) -> None:
    runtime = AdapterRuntime(open_runtime(versions[0].manifest).backend, capacity=2)
    versions[0].install(runtime)
    runtime.activate(versions[0].digest)
    personal = PersonalAdapters(runtime, tmp_path / "personal", rank=1)
    names = ["ann", "bob", "cid", "dee"]
    expected = {}
    for seed, name in enumerate(names):
        personal.train(name, ROWS, replace(QUICK, steps=2), seed=seed)
        expected[name] = answers(runtime, Route(user=name))
    assert len({str(answer) for answer in expected.values()}) == 4
    for name in names * 2:
        assert answers(runtime, Route(user=name)) == expected[name]
        assert len(runtime.slots) <= 4


def test_forgetting_deletes_the_files_and_the_route(
    runtime: AdapterRuntime, personal: PersonalAdapters, tmp_path: Path
) -> None:
    personal.train("ann", ROWS, QUICK)
    personal.forget("ann")
    assert list((tmp_path / "personal").iterdir()) == []
    assert answers(runtime, Route(user="ann")) == runtime.predict(TEXTS).predictions
    with pytest.raises(DeviceError, match="no adapter named 'ann'"):
        answers(runtime, ANN)
    for use in (personal.standing, personal.rollback, personal.forget):
        with pytest.raises(DeviceError, match=r"no personal adapter named 'ann' on this device, found \[\]"):
            use("ann")


def test_the_global_slot_and_the_base_stay_bit_for_bit(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any], recipe: Make
) -> None:
    model = load_base(recipe().model).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    served = [runtime.predict(TEXTS, digest=digest).predictions for digest in (NULL, versions[0].digest)]
    personal.train("ann", ROWS, QUICK)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [runtime.predict(TEXTS, digest=digest).predictions for digest in (NULL, versions[0].digest)] == served
    assert not any(tensor.requires_grad for tensor in model.parameters())


def test_service_goes_on_while_it_trains(runtime: AdapterRuntime, personal: PersonalAdapters) -> None:
    expected = runtime.predict(TEXTS).predictions
    thread = threading.Thread(target=personal.train, args=("ann", ROWS, replace(QUICK, steps=40)))
    thread.start()
    served = 0
    while thread.is_alive():
        assert runtime.predict(TEXTS).predictions == expected
        served += 1
    thread.join()
    assert served > 1
    assert [one.label for one in answers(runtime, ANN)] == ["bad", "good", "mixed"]


def test_training_needs_an_installed_version(
    runtime: AdapterRuntime, personal: PersonalAdapters, versions: list[Any]
) -> None:
    runtime.activate(NULL)
    with pytest.raises(DeviceError, match="a null slot holds no adapter to read; name an installed version's slot"):
        personal.train("ann", ROWS, QUICK)
    with pytest.raises(DeviceError, match="name 'a/b' cannot be used"):
        personal.train("a/b", ROWS, QUICK, onto=versions[0].digest)
    assert (personal.names(), runtime.pins) == ([], {})


@pytest.mark.parametrize(
    ("rows", "config", "error"),
    [
        ([], QUICK, DataError),
        ([{"text": "a", "label": 7}], QUICK, DataError),
        (ROWS, replace(QUICK, learning_rate=1e30), FederatedError),
    ],
)
def test_training_that_fails_leaves_everything_as_it_was(
    runtime: AdapterRuntime, personal: PersonalAdapters, rows: Any, config: TrainConfig, error: type[Exception]
) -> None:
    personal.train("ann", ROWS, QUICK)
    before, standing = answers(runtime, ANN), personal.standing("ann")
    with pytest.raises(error):
        personal.train("ann", rows, config)
    assert (answers(runtime, ANN), personal.standing("ann"), runtime.pins) == (before, standing, {})


def test_a_backend_that_cannot_train_is_refused(backend: Any, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"\(FakeBackend\) cannot train"):
        PersonalAdapters(AdapterRuntime(backend), tmp_path)
