"""Rows of several adapters in one batch: each answered by its own, over one pass of the base."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from federated.adapters import load_base
from federated.config import AdapterConfig, ModelConfig, TaskConfig
from federated.device import NULL, AdapterRuntime, Recipe, open_runtime

Make = Callable[..., Any]

pytestmark = pytest.mark.usefixtures("one_thread")
TEXTS = [{"text": text} for text in ("a long delay and no word", "thank you", "late", "x", "the crew was kind", "no")]


def scores(predictions: Any) -> torch.Tensor:
    return torch.tensor([list(one.scores.values()) for one in predictions], dtype=torch.float64)


@pytest.fixture(params=["lora", "lora_xs", "head"])
def served(request: pytest.FixtureRequest, recipe: Make, real_version: Make) -> tuple[AdapterRuntime, list[Any]]:
    """Three versions, one of another rank."""
    adapter = AdapterConfig(kind=request.param, **({"rank": 2} if request.param != "head" else {}))
    versions = [small(real_version(recipe(adapter=adapter), value)) for value in (1, 2)]
    other = AdapterConfig(kind=request.param, **({"rank": 5} if request.param != "head" else {}))
    versions.append(small(real_version(recipe(adapter=other), 3)))
    runtime = open_runtime(versions[0].manifest)
    for one in versions:
        one.install(runtime)
    return runtime, versions


def small(version: Any) -> Any:
    """Smaller random weights, whose answers are not all 0 or 1."""
    from federated.manifest import sha256_hex
    from federated.state import from_raw, to_raw
    from federated.wire import decode_tensors, encode_tensors

    tensors = {name: tensor * 0.3 for name, tensor in from_raw(decode_tensors(version.weights)).items()}
    weights = encode_tensors(to_raw(tensors))
    return replace(version, manifest=replace(version.manifest, weights_digest=sha256_hex(weights)), weights=weights)


def test_every_row_is_answered_as_its_own_adapter_would(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, (one, two, three) = served
    where = [one.digest, NULL, two.digest, three.digest, one.digest, NULL]
    answers = runtime.predict_mixed(list(zip(TEXTS, where, strict=True)))
    assert [answer.slot.digest for answer in answers] == where
    found = scores([answer.prediction for answer in answers])
    # the same batch, sorted as the mixed one is, all of it by one adapter
    for at, digest in enumerate(where):
        alone = scores(runtime.predict(TEXTS, digest=digest).predictions)
        torch.testing.assert_close(found[at], alone[at], rtol=0, atol=2e-6)
    different = scores(runtime.predict(TEXTS, digest=one.digest).predictions)
    assert float((found - different).abs().max()) > 0.01
    assert runtime.pins == {}


def test_null_rows_are_bit_equal_to_the_base_in_the_same_batch(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, (one, *_) = served
    rows = [TEXTS[0]] * 4  # equal rows: their place in the batch does not matter
    answers = runtime.predict_mixed([(row, where) for row, where in zip(rows, [one.digest, NULL] * 2, strict=True)])
    alone = runtime.predict(rows, digest=NULL).predictions
    assert [answers[at].prediction for at in (1, 3)] == [alone[1], alone[3]]
    assert answers[0].prediction != answers[1].prediction


def test_one_pass_of_the_base_answers_all(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, versions = served
    passes: list[int] = []
    layer = runtime.backend._mixed._backbone.encoder.layer[0]
    hook = layer.register_forward_hook(lambda _, args, __: passes.append(len(args[0])))
    where = [NULL, *(one.digest for one in versions)]
    runtime.predict_mixed([(TEXTS[at % 6], where[at % 4]) for at in range(12)])
    hook.remove()
    assert passes == [12]


def test_more_rows_than_a_batch_keep_their_adapters(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, (one, two, _) = served
    where = [(one.digest, two.digest, NULL)[at % 3] for at in range(150)]
    answers = runtime.predict_mixed([(TEXTS[at % 6], where[at]) for at in range(150)])
    for digest in (one.digest, two.digest, NULL):
        places = [at for at in range(150) if where[at] == digest]
        expected = scores(runtime.predict([TEXTS[at % 6] for at in places], digest=digest).predictions)
        torch.testing.assert_close(scores([answers[at].prediction for at in places]), expected, rtol=0, atol=2e-6)


def test_the_base_and_the_slots_stay_as_they_were(served: tuple[AdapterRuntime, list[Any]], recipe: Make) -> None:
    runtime, (one, two, _) = served
    model = load_base(recipe().model).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alone = [runtime.predict(TEXTS, digest=digest).predictions for digest in (NULL, one.digest, two.digest)]
    runtime.predict_mixed([(TEXTS[0], one.digest), (TEXTS[1], two.digest), (TEXTS[2], NULL)])
    assert [runtime.predict(TEXTS, digest=digest).predictions for digest in (NULL, one.digest, two.digest)] == alone
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_two_mixed_batches_at_once_do_not_meet(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, (one, two, three) = served
    plans = [[one.digest, NULL, two.digest], [three.digest, one.digest, NULL]]
    expected = [runtime.predict_mixed(list(zip(TEXTS, plan))) for plan in plans]  # noqa: B905 - three of six rows
    wrong: list[Any] = []

    def serve(at: int) -> None:
        made = [runtime.predict_mixed(list(zip(TEXTS, plans[at]))) for _ in range(25)]  # noqa: B905
        wrong.extend(at for one in made if one != expected[at])

    threads = [threading.Thread(target=serve, args=(at,)) for at in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@pytest.mark.parametrize("source", ["tiny:sensor", "tiny:gpt2"])
def test_other_bases_mix_too(source: str, recipe: Make, real_version: Make) -> None:
    made = recipe("tiny:sensor") if source == "tiny:sensor" else recipe(model=ModelConfig(source=source))
    rows = TEXTS[:3]
    if source == "tiny:sensor":
        rows = [{"values": [[0.1 * step, 0.2, -0.3]] * (2 + step)} for step in range(3)]
    check_mix(made, real_version, rows)


def check_mix(made: Recipe, real_version: Make, rows: list[Any]) -> None:
    one, two = small(real_version(made, 1)), small(real_version(made, 2))
    runtime = open_runtime(one.manifest)
    one.install(runtime), two.install(runtime)
    where = [two.digest, NULL, one.digest]
    answers = runtime.predict_mixed(list(zip(rows, where, strict=True)))
    for at, digest in enumerate(where):
        alone = scores(runtime.predict(rows, digest=digest).predictions)
        torch.testing.assert_close(scores([answers[at].prediction])[0], alone[at], rtol=0, atol=2e-6)


def test_a_base_in_bfloat16_mixes(recipe: Make, real_version: Make) -> None:
    made = recipe(model=ModelConfig(source="tiny:bert", dtype="bfloat16"))
    one, two = small(real_version(made, 1)), small(real_version(made, 2))
    runtime = open_runtime(one.manifest)
    one.install(runtime), two.install(runtime)
    where = [two.digest, NULL, one.digest]
    answers = runtime.predict_mixed(list(zip(TEXTS[:3], where, strict=True)))
    for at, digest in enumerate(where):
        alone = scores(runtime.predict(TEXTS[:3], digest=digest).predictions)
        torch.testing.assert_close(scores([answers[at].prediction])[0], alone[at], rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    "changes",
    [
        {"adapter": AdapterConfig(kind="ia3")},
        {"adapter": AdapterConfig(kind="prompt", virtual_tokens=3)},
        {"task": TaskConfig(labels=("bad", "good", "mixed"), head="stock")},
    ],
    ids=["ia3", "prompt", "stock head"],
)
def test_what_cannot_share_a_batch_is_answered_alone_and_right(changes: Any, recipe: Make, real_version: Make) -> None:
    made = recipe(**changes)
    one, two = small(real_version(made, 1)), small(real_version(made, 2))
    runtime = open_runtime(one.manifest)
    one.install(runtime), two.install(runtime)
    where = [two.digest, NULL, one.digest, two.digest]
    answers = runtime.predict_mixed(list(zip(TEXTS[:4], where, strict=True)))
    for digest in (NULL, one.digest, two.digest):
        places = [at for at in range(4) if where[at] == digest]
        alone = runtime.predict([TEXTS[at] for at in places], digest=digest).predictions
        assert [answers[at].prediction for at in places] == alone


def test_a_language_model_answers_mixed_rows_slot_by_slot(recipe: Make, real_version: Make) -> None:
    made = recipe("tiny:llama")
    one, two = real_version(made, 1), real_version(made, 2)
    runtime = open_runtime(one.manifest)
    one.install(runtime), two.install(runtime)
    answers = runtime.predict_mixed([(TEXTS[1], two.digest), (TEXTS[2], one.digest), (TEXTS[3], NULL)])
    expected = [
        runtime.predict([row], digest=digest).predictions[0]
        for row, digest in zip(TEXTS[1:4], (two.digest, one.digest, NULL), strict=True)
    ]
    assert [answer.prediction for answer in answers] == expected


def test_mixed_rows_of_one_slot_are_its_own_answers(served: tuple[AdapterRuntime, list[Any]]) -> None:
    runtime, (one, *_) = served
    answers = runtime.predict_mixed([(row, one.digest) for row in TEXTS])
    assert [answer.prediction for answer in answers] == runtime.predict(TEXTS, digest=one.digest).predictions
