"""What holds of slots whatever runs the models: the same tests for every backend."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from federated.adapters import attach, load_base
from federated.config import AdapterConfig, ExperimentConfig, TaskConfig
from federated.device import NULL, AdapterRuntime
from federated.errors import BaseMismatch, DataError, DeviceError, ModelError
from federated.flower.publisher import RegistryPublisher, TrainingState
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec
from federated.registry import Registry
from federated.rows import Prediction
from federated.server_optimizers import OptimizerState
from federated.state import AdapterState, from_raw
from federated.tasks import make_task
from federated.wire import decode_tensors

from .conftest import Version

Make = Callable[..., Any]

TEXTS = [{"text": "a long delay and no word"}, {"text": "thank you"}, {"text": "so late that I missed my flight home"}]
ROWS = {
    "tiny:bert": TEXTS,
    "tiny:llama": TEXTS[1:2],
    "tiny:sensor": [{"values": [[0.1, 0.2, 0.3], [0.3, -1.0, 0.0]]}, {"values": [[1.0, 1.0, -1.0]]}],
}
WITHIN = {"torch": 0.0, "onnx": 1e-5}
"""How far a backend's probabilities may be from those of the model that was trained."""

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["tiny:bert", "tiny:llama", "tiny:sensor"])
def any_recipe(request: pytest.FixtureRequest, recipe: Make) -> Any:
    return recipe(request.param)


@pytest.fixture(params=["torch", "onnx"])
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def open_for(engine: str, opened: Make) -> Callable[..., AdapterRuntime]:
    """A runtime of this backend for a version."""
    return lambda version: opened(engine, version.manifest)


@pytest.fixture
def two_slots(open_for: Make, real_version: Make) -> Callable[[Any], tuple[AdapterRuntime, Any, Any]]:
    def make(recipe: Any) -> tuple[AdapterRuntime, Any, Any]:
        one, two = real_version(recipe, 1), real_version(recipe, 2)
        runtime = open_for(one)
        one.install(runtime)
        two.install(runtime)
        return runtime, one, two

    return make


def assert_close(found: Sequence[Prediction], expected: Sequence[Prediction], engine: str) -> None:
    assert [one.label for one in found] == [one.label for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probability == pytest.approx(other.probability, rel=0, abs=WITHIN[engine])
        assert dict(one.scores) == pytest.approx(dict(other.scores), rel=0, abs=WITHIN[engine])


def trained(recipe: Any, version: Any) -> Sequence[Prediction]:
    """What the model answers that the version was read from."""
    base = load_base(recipe.model)
    model = attach(base, recipe.adapter, recipe.task, seed=recipe.seed)
    model.write(AdapterState(model.spec, from_raw(decode_tensors(version.weights))))
    return make_task(recipe.task, base.tokenizer).predict(model.model, ROWS[recipe.model.source])


def test_null_answers_as_a_fresh_adapter(any_recipe: Any, real_version: Make, open_for: Make, engine: str) -> None:
    base = load_base(any_recipe.model)
    fresh = attach(base, any_recipe.adapter, any_recipe.task, seed=any_recipe.seed)
    rows = ROWS[any_recipe.model.source]
    expected = make_task(any_recipe.task, base.tokenizer).predict(fresh.model, rows)
    assert_close(open_for(real_version(any_recipe, 1)).predict(rows).predictions, expected, engine)


def test_null_answers_the_same_bits_after_other_slots_served(any_recipe: Any, two_slots: Make) -> None:
    rows = ROWS[any_recipe.model.source]
    runtime, one, two = two_slots(any_recipe)
    before = runtime.predict(rows).predictions
    answers = [runtime.predict(rows, digest=version.digest).predictions for version in (one, two)]
    assert runtime.predict(rows, digest=NULL).predictions == before
    assert before not in answers


def test_a_slot_answers_as_the_trained_adapter(any_recipe: Any, two_slots: Make, engine: str) -> None:
    rows = ROWS[any_recipe.model.source]
    runtime, one, two = two_slots(any_recipe)
    for version in (one, two):
        served = runtime.predict(rows, digest=version.digest)
        assert_close(served.predictions, trained(any_recipe, version), engine)
    assert served.predictions != runtime.predict(rows).predictions


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=2, dtype="bfloat16"),
        AdapterConfig(rank=2, dtype="float16"),
        AdapterConfig(rank=2, train_head=False),
        AdapterConfig(rank=2, use_rslora=True, dropout=0.5),
        AdapterConfig(kind="lora_xs", rank=2),
        AdapterConfig(kind="head"),
    ],
    ids=lambda adapter: f"{adapter.kind}-{adapter.dtype}-{adapter.train_head}-{adapter.use_rslora}",
)
def test_adapters_of_all_backends_kinds_serve(
    adapter: AdapterConfig, recipe: Make, real_version: Make, open_for: Make, engine: str
) -> None:
    made = recipe(adapter=adapter)
    version = real_version(made, 1)
    runtime = open_for(version)
    served = runtime.predict(TEXTS, digest=version.install(runtime).digest)
    assert_close(served.predictions, trained(made, version), engine)
    assert served.predictions != runtime.predict(TEXTS).predictions


def test_two_requests_hold_two_versions_at_once(any_recipe: Any, two_slots: Make) -> None:
    rows = ROWS[any_recipe.model.source]
    runtime, one, two = two_slots(any_recipe)
    alone = [runtime.predict(rows, digest=version.digest).predictions for version in (one, two)]
    both = threading.Barrier(2, timeout=60)
    found: dict[str, Any] = {}

    def ask(version: Any) -> None:
        with runtime.pin(version.digest) as slot:
            both.wait()
            found[version.digest] = [runtime.backend.predict(slot.handle, rows) for _ in range(5)]

    threads = [threading.Thread(target=ask, args=(version,)) for version in (one, two)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [found[version.digest] for version in (one, two)] == [[answer] * 5 for answer in alone]


def test_every_answer_comes_from_one_adapter_while_the_routing_moves(any_recipe: Any, two_slots: Make) -> None:
    rows = ROWS[any_recipe.model.source]
    runtime, one, two = two_slots(any_recipe)
    digests = (NULL, one.digest, two.digest)
    references = {digest: runtime.predict(rows, digest=digest).predictions for digest in digests}
    assert len({str(answer) for answer in references.values()}) == 3
    enough = 30 if any_recipe.task.name == "causal_lm" else 300  # a continuation is 32 forward passes
    served: list[str] = []
    wrong: list[Any] = []
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            answer = runtime.predict(rows)
            served.append(answer.slot.digest)
            if answer.predictions != references[answer.slot.digest]:
                wrong.append(answer)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    for thread in threads:
        thread.start()
    steps, end = 0, time.monotonic() + 100
    while (len(served) < enough or len(set(served)) < 2 or steps < 200) and time.monotonic() < end:
        runtime.activate(digests[1 + steps % 2])
        done.wait(0.001)
        if steps % 3 == 0:
            runtime.rollback()
        steps += 1
    done.set()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(served) >= enough
    assert len(set(served)) >= 2
    assert runtime.pins == {}


def test_a_pin_outlives_eviction_and_activation(recipe: Make, real_version: Make, opened: Make, engine: str) -> None:
    versions = [real_version(recipe(), value) for value in range(1, 5)]
    runtime = opened(engine, versions[0].manifest, capacity=1)
    versions[0].install(runtime)
    expected = runtime.predict(TEXTS, digest=versions[0].digest).predictions
    with runtime.pin(versions[0].digest) as slot:
        for version in versions[1:]:
            runtime.activate(version.install(runtime).digest)
        assert runtime.backend.predict(slot.handle, TEXTS) == expected
    assert versions[0].digest not in [one.digest for one in runtime.slots]


def test_a_version_of_another_rank_serves_beside_the_first(
    recipe: Make, real_version: Make, two_slots: Make, engine: str
) -> None:
    runtime, one, _ = two_slots(recipe())
    made = recipe(adapter=AdapterConfig(rank=4, target_modules="all-linear"))
    larger = real_version(made, 3)
    answer = runtime.predict(TEXTS, digest=larger.install(runtime).digest)
    assert_close(answer.predictions, trained(made, larger), engine)
    assert answer.predictions != runtime.predict(TEXTS, digest=one.digest).predictions


def test_a_version_made_of_adapter_and_residual_answers_as_the_model_that_trains_on_both(
    any_recipe: Any, open_for: Make, tmp_path: Path
) -> None:
    """What a rule with a residual publishes is one plain adapter, whose layers differ in rank and alpha."""
    base = load_base(any_recipe.model)
    trains = attach(base, any_recipe.adapter, any_recipe.task, seed=any_recipe.seed)
    generator = torch.Generator().manual_seed(4)
    own = {name: torch.randn(t.shape, generator=generator) for name, t in trains.read().tensors.items()}
    modules = tuple(replace(one, rank=3, alpha=3.0) for one in trains.spec.modules[::2])
    frozen = {f"{one.name}.factor_a": torch.randn(3, one.d_in, generator=generator) for one in modules}
    frozen |= {f"{one.name}.factor_b": torch.randn(one.d_out, 3, generator=generator) for one in modules}
    residual = AdapterState(AdapterSpec("lora", 3, 3.0, use_rslora=False, modules=modules), frozen)
    state = GlobalState(AdapterState(trains.spec, own), residual)
    config = ExperimentConfig(model=any_recipe.model, adapter=any_recipe.adapter, task=any_recipe.task, seed=5)
    with Registry.open(tmp_path / "registry") as registry:
        registry.require_base(base.base_digest)
        publisher = RegistryPublisher(
            registry, config, run_id="run", base_digest=base.base_digest, method="flora + sgd"
        )
        manifest = publisher.publish(TrainingState(1, state, OptimizerState()), parent=None, participants=1, metrics={})
        weights = registry.weights(manifest.version_id)
    assert len({one.rank for one in manifest.spec.modules}) > 1
    runtime, rows = open_for(Version(manifest, weights)), ROWS[any_recipe.model.source]
    slot = runtime.install(manifest, weights, version_id=manifest.version_id)
    trains.write(state.materialise())
    expected = make_task(any_recipe.task, base.tokenizer).predict(trains.model, rows)
    found = runtime.predict(rows, digest=slot.digest).predictions
    assert [one.label for one in found] == [one.label for one in expected]
    assert [one.probability for one in found] == pytest.approx([one.probability for one in expected], abs=1e-3)
    trains.write(replace(state.materialise(), residual=None))
    assert make_task(any_recipe.task, base.tokenizer).predict(trains.model, rows) != expected


def test_another_task_is_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, _, _ = two_slots(recipe())
    other = real_version(recipe(task=TaskConfig(labels=("good", "bad", "mixed"))), 3)
    with pytest.raises(DeviceError, match=r"labels \['good', 'bad', 'mixed'\]; this runtime answers"):
        other.install(runtime)


def test_a_head_that_does_not_fit_the_task_is_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, one, _ = two_slots(recipe())
    fewer = replace(one.manifest.spec, head=replace(one.manifest.spec.head, num_labels=2))
    with pytest.raises(DeviceError, match="a mean_pool head for 2 labels; its task needs a mean_pool head for 3"):
        one.but(spec=fewer).install(runtime)


def test_a_head_on_a_language_model_is_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, one, _ = two_slots(recipe("tiny:llama"))
    head = real_version(recipe(), 1).manifest.spec.head
    with pytest.raises(DeviceError, match="its task needs no head"):
        one.but(spec=replace(one.manifest.spec, head=head)).install(runtime)


def test_tensors_that_do_not_fit_the_spec_are_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, one, _ = two_slots(recipe())
    narrow = real_version(recipe(adapter=AdapterConfig(rank=4, target_modules="all-linear")), 3).but(
        spec=one.manifest.spec
    )
    before = runtime.slots
    with pytest.raises(ModelError, match=r"factor_a: found .*, expected"):
        narrow.install(runtime)
    assert runtime.slots == before


def test_a_layer_that_the_base_lacks_is_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, _, _ = two_slots(recipe())
    version = real_version(recipe(), 3)
    first, *rest = version.manifest.spec.modules
    foreign = replace(version.manifest.spec, modules=(replace(first, name="decoder.secret"), *rest))
    with pytest.raises(ModelError, match=r"decoder\.secret"):
        version.but(spec=foreign).install(runtime)


def test_a_version_of_another_base_is_refused(recipe: Make, real_version: Make, two_slots: Make) -> None:
    runtime, one, _ = two_slots(recipe())
    with pytest.raises(BaseMismatch, match="belongs to the base model ffffffffffff"):
        one.but(base_digest="f" * 64).install(runtime)


def test_a_row_of_another_shape_is_refused_by_its_number(any_recipe: Any, two_slots: Make) -> None:
    runtime, _, _ = two_slots(any_recipe)
    with pytest.raises(DataError, match="row 2"):
        runtime.predict([ROWS[any_recipe.model.source][0], {"text": 7, "values": []}])
    assert runtime.pins == {}
    assert len(runtime.predict(ROWS[any_recipe.model.source]).predictions) == len(ROWS[any_recipe.model.source])


def test_many_rows_are_answered_in_their_order(recipe: Make, two_slots: Make, engine: str) -> None:
    runtime, one, _ = two_slots(recipe())
    rows = [{"text": "late " * (1 + number % 7) + str(number)} for number in range(70)]
    together = runtime.predict(rows, digest=one.digest).predictions
    alone = [runtime.predict([row], digest=one.digest).predictions[0] for row in rows]
    assert [found.label for found in together] == [found.label for found in alone]
    assert [found.probability for found in together] == pytest.approx([one.probability for one in alone], abs=1e-5)
