"""A device that quantises its base: what it may serve, and that all of the runtime works over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from federated.adapters import load_base
from federated.config import ModelConfig, TrainConfig
from federated.device import NULL, PersonalAdapters, Route, Sampling, open_runtime
from federated.errors import BaseMismatch, DeviceError

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [{"text": "a long delay and no word"}, {"text": "thank you"}]


@pytest.fixture(params=["int8", "nf4"])
def small(request: pytest.FixtureRequest) -> ModelConfig:
    return ModelConfig(source="tiny:bert", quantization=request.param)


def test_versions_of_the_full_base_are_served_where_the_device_says_so(
    small: ModelConfig, recipe: Make, real_version: Make
) -> None:
    version = real_version(recipe(), 1)
    runtime = open_runtime(version.manifest, model=small)
    version.install(runtime)
    full = open_runtime(version.manifest)
    version.install(full)
    for digest in (NULL, version.digest):
        found, true = (one.predict(TEXTS, digest=digest).predictions for one in (runtime, full))
        assert found != true
        assert [one.label for one in found] == [one.label for one in true]
    with runtime.pin(version.digest) as slot:
        assert slot.nbytes < 20_000


def test_versions_of_the_quantised_base_need_that_base(small: ModelConfig, recipe: Make, real_version: Make) -> None:
    version = real_version(recipe(model=small), 1)
    assert version.manifest.base_digest == load_base(small).base_digest
    version.install(open_runtime(version.manifest))
    with pytest.raises(BaseMismatch, match="but tiny:bert is"):
        open_runtime(version.manifest, model=ModelConfig(source="tiny:bert"))
    plain = real_version(recipe(), 1)
    with pytest.raises(BaseMismatch):
        plain.install(open_runtime(version.manifest))


def test_batches_mix_and_merging_is_refused(small: ModelConfig, recipe: Make, real_version: Make) -> None:
    version = real_version(recipe(), 1)
    runtime = open_runtime(version.manifest, model=small)
    version.install(runtime)
    answers = runtime.predict_mixed([(TEXTS[0], version.digest), (TEXTS[1], NULL)])
    alone = [runtime.predict(TEXTS, digest=digest).predictions for digest in (version.digest, NULL)]
    for at, answer in enumerate(answers):
        assert answer.prediction.scores == pytest.approx(alone[at][at].scores, abs=1e-5)
    with pytest.raises(DeviceError, match=r"the base is quantised \((int8|nf4)\); adapters merge into full weights"):
        runtime.merge(version.digest)


def test_text_is_generated_and_personal_adapters_trained(
    small: ModelConfig, recipe: Make, real_version: Make, tmp_path: Path
) -> None:
    made = recipe("tiny:llama")
    version = real_version(made, 1)
    runtime = open_runtime(version.manifest, model=replace(small, source="tiny:llama"))
    runtime.activate(version.install(runtime).digest)
    assert runtime.generate("hello", Sampling(5)).text()
    personal = PersonalAdapters(runtime, tmp_path, rank=2)
    personal.train("ann", [{"text": "hello you"}], TrainConfig(steps=3, precision="float32"))
    assert runtime.generate("hello", Sampling(5), route=Route(name="ann")).slot.label.startswith("ann#1")
