"""Slots over real module trees: equal bits, shared tensors, no mixing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from federated.adapters import attach, load_base
from federated.config import AdapterConfig, ModelConfig
from federated.device import NULL, AdapterRuntime, TorchBackend, open_runtime
from federated.errors import BaseMismatch, ModelError
from federated.state import AdapterState, from_raw
from federated.tasks import make_task
from federated.wire import decode_tensors

Make = Callable[..., Any]

TEXTS = [{"text": "a long delay and no word"}, {"text": "thank you"}]
ROWS = {
    "tiny:bert": TEXTS,
    "tiny:llama": TEXTS[1:],
    "tiny:sensor": [{"values": [[0.1, 0.2, 0.3], [0.3, -1.0, 0.0]]}],
}

FACTORLESS = [AdapterConfig(kind=kind) for kind in ("ia3", "layernorm", "head", "full", "prompt", "prefix")]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["tiny:bert", "tiny:llama", "tiny:sensor"])
def any_recipe(request: pytest.FixtureRequest, recipe: Make) -> Any:
    return recipe(request.param)


def features(model: torch.nn.Module, source: str) -> torch.Tensor:
    """What the base alone computes for fixed inputs."""
    mask = torch.ones(1, 4, dtype=torch.long)
    if source == "tiny:sensor":
        return model(values=torch.linspace(-1, 1, 12).reshape(1, 4, 3), attention_mask=mask)
    output = model(input_ids=torch.tensor([[5, 6, 7, 8]]), attention_mask=mask)
    return output[0]


def two_slots(recipe: Any, real_version: Make) -> tuple[AdapterRuntime, Any, Any]:
    one, two = real_version(recipe, 1), real_version(recipe, 2)
    runtime = open_runtime(one.manifest)
    one.install(runtime)
    two.install(runtime)
    return runtime, one, two


def test_null_is_bit_equal_to_the_base_before_and_after_other_slots_served(any_recipe: Any, real_version: Make) -> None:
    source = any_recipe.model.source
    base = load_base(any_recipe.model).model
    expected = features(base, source)
    runtime, one, two = two_slots(any_recipe, real_version)
    for digest in (one.digest, two.digest):
        runtime.activate(digest)
        runtime.predict(ROWS[source])
    with runtime.pin(NULL) as slot:
        alone = getattr(slot.handle.model, "backbone", slot.handle.model)
        assert torch.equal(features(alone, source), expected)
    assert torch.equal(features(base, source), expected)


def test_null_of_a_language_model_is_the_base_itself(recipe: Make, real_version: Make) -> None:
    runtime = open_runtime(real_version(recipe("tiny:llama"), 1).manifest)
    assert runtime.active.handle.model is load_base(recipe("tiny:llama").model).model


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=2, dtype="bfloat16"),
        AdapterConfig(rank=2, dtype="float16"),
        AdapterConfig(rank=2, train_head=False),
        AdapterConfig(rank=2, use_rslora=True, dropout=0.5),
        *FACTORLESS,
        AdapterConfig(kind="ia3", dtype="bfloat16", train_head=False),
        AdapterConfig(kind="prompt", dtype="float16", virtual_tokens=3),
        AdapterConfig(kind="prefix", dtype="bfloat16", virtual_tokens=3),
    ],
    ids=lambda adapter: f"{adapter.kind}-{adapter.dtype}-{adapter.train_head}-{adapter.use_rslora}",
)
def test_every_kind_of_adapter_serves(adapter: AdapterConfig, recipe: Make, real_version: Make) -> None:
    made = recipe(adapter=adapter)
    version = real_version(made, 1)
    base = load_base(made.model)
    trained = attach(base, adapter, made.task, seed=made.seed)
    trained.write(AdapterState(trained.spec, from_raw(decode_tensors(version.weights))))
    runtime = open_runtime(version.manifest)
    served = runtime.predict(TEXTS, digest=version.install(runtime).digest)
    assert served.predictions == make_task(made.task, base.tokenizer).predict(trained.model, TEXTS)


def test_slots_share_the_base_and_cost_only_their_adapter(any_recipe: Any, real_version: Make) -> None:
    base = load_base(any_recipe.model).model
    shared = {tensor.data_ptr() for tensor in [*base.parameters(), *base.buffers()]}
    runtime, one, two = two_slots(any_recipe, real_version)
    for version in (one, two):
        with runtime.pin(version.digest) as slot:
            held = {t.data_ptr(): t.nbytes for t in [*slot.handle.model.parameters(), *slot.handle.model.buffers()]}
        assert shared <= held.keys()
        adapter = sum(len(raw.data) for raw in decode_tensors(version.weights).values())
        assert sum(size for place, size in held.items() if place not in shared) == adapter


@pytest.mark.parametrize("adapter", FACTORLESS, ids=lambda adapter: adapter.kind)
def test_slots_of_other_kinds_share_the_rest_of_the_base(
    adapter: AdapterConfig, recipe: Make, real_version: Make
) -> None:
    base = load_base(recipe().model).model
    shared = {tensor.data_ptr() for tensor in [*base.parameters(), *base.buffers()]}
    runtime, one, two = two_slots(recipe(adapter=adapter), real_version)
    for version in (one, two):
        with runtime.pin(version.digest) as slot:
            held = {t.data_ptr(): t.nbytes for t in [*slot.handle.model.parameters(), *slot.handle.model.buffers()]}
            assert not any(tensor.requires_grad for tensor in slot.handle.model.parameters())
        size = sum(len(raw.data) for raw in decode_tensors(version.weights).values())
        assert sum(size for place, size in held.items() if place not in shared) == size
    answers = [runtime.predict(TEXTS, digest=digest).predictions for digest in (NULL, one.digest, two.digest)]
    assert len({str(answer) for answer in answers}) == 3


def test_slots_are_for_reading(any_recipe: Any, real_version: Make) -> None:
    runtime, one, _ = two_slots(any_recipe, real_version)
    with runtime.pin(one.digest) as slot:
        assert not slot.handle.model.training
        assert not any(tensor.requires_grad for tensor in slot.handle.model.parameters())


@pytest.fixture
def in_mid_forward() -> Iterator[Callable[[torch.nn.Module, Callable[[], Any]], None]]:
    """Runs something in another thread while a layer is about to be computed, once."""
    hooks: list[Any] = []

    def install(layer: torch.nn.Module, action: Callable[[], Any]) -> None:
        def once(*_: Any) -> None:
            hooks.pop().remove()
            thread = threading.Thread(target=action)
            thread.start()
            thread.join(60)

        hooks.append(layer.register_forward_pre_hook(once))

    yield install
    assert hooks == [], "the layer was never computed"


def test_activation_in_mid_forward_does_not_touch_the_request(
    recipe: Make, real_version: Make, in_mid_forward: Any
) -> None:
    runtime, one, two = two_slots(recipe(), real_version)
    first, second = (runtime.predict(TEXTS, digest=version.digest).predictions for version in (one, two))
    runtime.activate(one.digest)
    in_mid_forward(runtime.active.handle.model.backbone.encoder.layer[1], lambda: runtime.activate(two.digest))
    assert runtime.predict(TEXTS).predictions == first
    assert runtime.predict(TEXTS).predictions == second


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_switching_one_live_peft_model_in_mid_forward_mixes_two_adapters(recipe: Make, in_mid_forward: Any) -> None:
    """Why slots are module trees of their own: the same moment as above, with peft's own way of switching."""
    from peft import LoraConfig, get_peft_model

    from federated.adapters import share

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["query", "value"], init_lora_weights=False)
    model = get_peft_model(share(load_base(recipe().model)), config, adapter_name="one")
    model.add_adapter("two", config)
    model.eval()
    references = []
    for name in ("two", "one"):
        model.set_adapter(name)
        references.append(features(model, "tiny:bert"))
    in_mid_forward(model.base_model.model.encoder.layer[1], lambda: model.set_adapter("two"))
    mixed = features(model, "tiny:bert")
    assert not any(torch.allclose(mixed, reference, atol=1e-4) for reference in references)


def test_opening_loads_the_base_once(recipe: Make, real_version: Make) -> None:
    version = real_version(recipe(), 1)
    first, second = open_runtime(version.manifest), open_runtime(version.manifest)
    assert first.active.handle.model.backbone.embeddings.word_embeddings.weight.data_ptr() == (
        second.active.handle.model.backbone.embeddings.word_embeddings.weight.data_ptr()
    )


def test_opening_with_another_base_is_refused(recipe: Make, real_version: Make) -> None:
    version = real_version(recipe(), 1)
    with pytest.raises(BaseMismatch, match="but tiny:llama is"):
        open_runtime(version.manifest, model=ModelConfig(source="tiny:llama"))


def test_a_base_that_does_not_fit_the_task_is_refused(recipe: Make) -> None:
    with pytest.raises(ModelError, match="sequence_classification"):
        TorchBackend(load_base(ModelConfig(source="tiny:sensor")), recipe())


def test_a_failed_prediction_gives_its_task_back(recipe: Make, real_version: Make) -> None:
    runtime, _, _ = two_slots(recipe(), real_version)
    with pytest.raises(Exception, match="expected a string"):
        runtime.predict([{"text": 7}])
    assert runtime.pins == {}
    assert len(runtime.predict(TEXTS).predictions) == 2
    assert runtime.backend._desks.qsize() == 1
