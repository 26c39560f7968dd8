"""The whole of it over tiny real models: equal to transformers' own answers, and never a mixture under swaps."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
import torch

from federated.adapters import load_base
from federated.device import AdapterRuntime, open_runtime
from federated.device.serving import Control, Directory, Offer, Service, public_listener

Make = Callable[..., Any]

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


class Store:
    """Versions by name."""

    def __init__(self, versions: dict[str, Any]) -> None:
        self.versions = versions

    def find(self, version: str) -> Offer:
        found = self.versions[version]
        return Offer(found.version_id, version, found.manifest, lambda: found.weights)


@pytest.fixture
def start(run_server: Callable[..., Any], real_version: Make) -> Iterator[Callable[..., tuple[httpx.Client, Control]]]:
    with ExitStack() as stack:

        def started(recipe: Any, speaks: Any) -> tuple[httpx.Client, Control]:
            versions = {f"v{n}": real_version(recipe, n) for n in (1, 2)}
            runtime: AdapterRuntime = open_runtime(versions["v1"].manifest)
            control = Control(runtime, Directory(runtime, "tiny"), Store({**versions, "stable": versions["v1"]}))
            control.load("one", "v1")
            control.load("two", "v2")
            control.activate("one")
            service = Service(runtime, control, speaks=speaks)
            listener = public_listener(service, port=0)
            stack.enter_context(run_server(service, [listener]))
            return stack.enter_context(httpx.Client(base_url=listener.place, timeout=60)), control

        yield started


@pytest.mark.parametrize("model", ["null", "one", "two"])
def test_greedy_answers_are_transformers_own(start: Any, recipe: Make, model: str) -> None:
    made = recipe("tiny:llama")
    client, control = start(made, "text")
    base = load_base(made.model)
    wanted = control.directory.wanted(model)
    with control.runtime.pin(wanted.digest, route=wanted.route) as slot:
        ids = base.tokenizer("the plane was", return_tensors="pt")["input_ids"]
        inner: Any = slot.handle.model
        with torch.no_grad():
            whole = inner.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        expected = base.tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True)
    body = {"prompt": "the plane was", "max_tokens": 6, "temperature": 0, "model": model}
    done = client.post("/v1/completions", json=body).json()
    assert done["choices"][0]["text"] == expected
    assert done["usage"]["prompt_tokens"] == ids.shape[1]


def test_a_seed_gives_the_same_answer_and_a_stream_the_same_text(start: Any, recipe: Make) -> None:
    client, _ = start(recipe("tiny:llama"), "text")
    body = {"prompt": "the plane was", "max_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 7}
    one, again, other = (client.post("/v1/completions", json={**body, "seed": s}).json() for s in (7, 7, 8))
    assert one["choices"] == again["choices"] != other["choices"]
    import json

    lines = client.post("/v1/completions", json={**body, "stream": True}).text.split("\n\n")
    texts = [json.loads(line[6:])["choices"][0]["text"] for line in lines if line.startswith("data: {")]
    assert "".join(texts) == one["choices"][0]["text"]


def test_a_stop_text_ends_the_answer(start: Any, recipe: Make) -> None:
    client, _ = start(recipe("tiny:llama"), "text")
    body = {"prompt": "the plane was", "max_tokens": 8, "temperature": 0, "model": "null"}
    whole = client.post("/v1/completions", json=body).json()["choices"][0]["text"]
    stop = whole[2:4]
    record = client.post("/v1/completions", json={**body, "stop": [stop]}).json()["choices"][0]
    assert (record["text"], record["finish_reason"]) == (whole[: whole.index(stop)], "stop")


def test_an_answer_that_does_not_fit_the_model_says_the_numbers(start: Any, recipe: Make) -> None:
    client, control = start(recipe("tiny:llama"), "text")
    refused = client.post("/v1/completions", json={"prompt": "a " * 2000, "max_tokens": 8})
    assert refused.status_code == 400
    assert "positions" in refused.json()["error"]["message"]
    assert control.runtime.pins == {}


def test_classes_are_the_runtimes_own(start: Any, recipe: Make) -> None:
    client, control = start(recipe("tiny:bert"), "labels")
    texts = ["a long delay and no word", "thank you"]
    for model in ("null", "one", "two"):
        wanted = control.directory.wanted(model)
        served = control.runtime.predict(
            [{"text": text} for text in texts], digest=wanted.digest, route=wanted.route
        ).predictions
        data = client.post("/classify", json={"input": texts, "model": model}).json()["data"]
        assert [one["label"] for one in data] == [one.label for one in served]
        for found, expected in zip(data, served, strict=True):
            assert found["labels"] == list(expected.scores)
            assert found["probs"] == pytest.approx(list(expected.scores.values()), abs=1e-6)
            assert sum(found["probs"]) == pytest.approx(1, abs=1e-5)


def test_no_answer_is_mixed_and_none_fails_while_adapters_are_swapped(start: Any, recipe: Make) -> None:
    """Four clients ask, greedily and with and without streaming, while the active adapter changes all the time."""
    client, control = start(recipe("tiny:llama"), "text")
    body = {"prompt": "the plane was", "max_tokens": 6, "temperature": 0}
    alone = {
        client.post("/v1/completions", json={**body, "model": model}).headers["x-fedpeft-version"]: client.post(
            "/v1/completions", json={**body, "model": model}
        ).json()["choices"][0]["text"]
        for model in ("one", "two")
    }
    assert len(set(alone.values())) == 2
    stop, answers, failed = threading.Event(), [], []

    def ask(number: int) -> None:
        with httpx.Client(base_url=client.base_url, timeout=60) as mine:
            while not stop.is_set():
                done = mine.post("/v1/completions", json=body)
                if done.status_code != 200:
                    failed.append(done.text)
                    continue
                answers.append((done.headers["x-fedpeft-version"], done.json()["choices"][0]["text"]))

    asking = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in asking:
        thread.start()
    until = 0
    while len(answers) < 60 and not failed:
        until += 1
        control.activate("two" if until % 2 else "one")
    stop.set()
    for thread in asking:
        thread.join(60)
    assert failed == []
    assert {version for version, _ in answers} == set(alone)
    assert [one for one in answers if alone[one[0]] != one[1]] == []
    assert control.runtime.swaps > 20
    assert control.runtime.pins == {}


def test_embeddings_are_the_runtimes_own(start: Any, recipe: Make) -> None:
    client, control = start(recipe("tiny:llama"), "text")
    texts = ["thank you", "a long delay"]
    _, expected = control.runtime.embed(
        texts, digest=control.directory.wanted("two").digest, route=control.directory.wanted("two").route
    )
    made = client.post("/v1/embeddings", json={"input": texts, "model": "two"}).json()
    for one, other in zip(made["data"], expected, strict=True):
        assert one["embedding"] == pytest.approx(list(other.vector), abs=1e-6)
    assert made["usage"]["prompt_tokens"] == sum(one.tokens for one in expected)
