"""Embeddings: the mean of a text's own features, of length 1, with the adapter in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from federated.adapters import load_base
from federated.config import AdapterConfig, TaskConfig
from federated.device import NULL, AdapterRuntime, open_runtime
from federated.errors import DataError, DeviceError

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = ["a long delay and no word", "thank you", "a long delay and no word"]


def opened(made: Any, real_version: Make) -> tuple[AdapterRuntime, str]:
    version = real_version(made, 1)
    runtime = open_runtime(version.manifest)
    return runtime, version.install(runtime).digest


def truth(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    """One text alone, without padding, in float64 after the model."""
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    with torch.no_grad():
        hidden = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0].double()
    return hidden.mean(0) / hidden.mean(0).norm()


@pytest.mark.parametrize("source", ["tiny:bert", "tiny:llama"])
def test_embeddings_are_the_mean_of_the_features(source: str, recipe: Make, real_version: Make) -> None:
    made = recipe(source)
    runtime, digest = opened(made, real_version)
    tokenizer = load_base(made.model).tokenizer
    vectors = {}
    for name in (NULL, digest):
        slot, found = runtime.embed(TEXTS, digest=name)
        assert slot.digest == name
        with runtime.pin(name) as pinned:
            model = pinned.handle.model
            inner = getattr(model, "backbone", None) or model.get_submodule(model.base_model_prefix)
        for text, one in zip(TEXTS, found, strict=True):
            expected = truth(inner, tokenizer, text)
            torch.testing.assert_close(torch.tensor(one.vector).double(), expected, rtol=1e-4, atol=1e-5)
            assert one.tokens == len(tokenizer(text)["input_ids"])
        vectors[name] = found[0].vector
    assert vectors[NULL] != vectors[digest]


def test_many_texts_come_in_their_order(recipe: Make, real_version: Make) -> None:
    runtime, digest = opened(recipe(), real_version)
    texts = [f"text number {number}" for number in range(70)]
    _, found = runtime.embed(texts, digest=digest)
    _, last = runtime.embed(texts[-1:], digest=digest)
    assert len(found) == 70
    assert found[-1].vector == pytest.approx(last[0].vector, abs=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterConfig(kind="prompt", virtual_tokens=3)},
        {"adapter": AdapterConfig(kind="prefix", virtual_tokens=3)},
        {"task": TaskConfig(labels=("bad", "good", "mixed"), head="stock")},
    ],
    ids=["prompt", "prefix", "stock head"],
)
def test_adapters_around_the_features_count(changes: Any, recipe: Make, real_version: Make) -> None:
    runtime, digest = opened(recipe(**changes), real_version)
    (_, null), (_, own) = runtime.embed(TEXTS, digest=NULL), runtime.embed(TEXTS, digest=digest)
    assert null[0].vector != pytest.approx(own[0].vector, abs=1e-3)
    assert float(torch.tensor(own[0].vector).norm()) == pytest.approx(1.0, abs=1e-5)


def test_long_texts_are_cut_to_the_models_length(recipe: Make, real_version: Make) -> None:
    runtime, _ = opened(recipe(), real_version)
    assert runtime.embed(["word " * 400])[1][0].tokens == 512


def test_a_prompt_around_a_language_model_has_none(recipe: Make, real_version: Make) -> None:
    made = recipe("tiny:llama", adapter=AdapterConfig(kind="prompt", virtual_tokens=3))
    runtime, digest = opened(made, real_version)
    with pytest.raises(DeviceError, match="of kind prompt on a language model has no embeddings"):
        runtime.embed(TEXTS, digest=digest)
    assert runtime.pins == {}


def test_a_base_without_texts_has_none(recipe: Make, real_version: Make) -> None:
    runtime, _ = opened(recipe("tiny:sensor"), real_version)
    with pytest.raises(DeviceError, match="tiny:sensor reads no texts"):
        runtime.embed(TEXTS)


def test_a_text_without_features_has_no_embedding(recipe: Make, real_version: Make) -> None:
    runtime, digest = opened(recipe("tiny:llama"), real_version)
    with pytest.raises(DataError, match="input 2 has no features"):
        runtime.embed(["a", ""], digest=digest)
