"""Classifying and embedding over real HTTP: shared batches, whole requests, bad rows alone, bounded queues."""

from __future__ import annotations

import base64
import struct
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from federated.device.serving import Limits


@pytest.mark.parametrize("path", ["/classify", "/v1/classify"])
def test_classify_has_vllms_shape(labels: Any, path: str) -> None:
    done = labels.ask(path, input=["one", "two"])
    record = done.json()
    guess = {"label": "label 1", "probs": [0.75, 0.25], "labels": ["label 1", "other"], "num_classes": 2}
    assert record["data"] == [{"index": 0, **guess}, {"index": 1, **guess}]
    assert (record["object"], record["model"]) == ("list", "tiny:echo")
    assert record["system_fingerprint"] == done.headers["x-fedpeft-version"] == labels.shelf.names["v1"].version_id


def test_series_are_classified(labels: Any) -> None:
    assert labels.ask("/classify", input={"values": [[0.5, 1.0], [1, 2]]}).status_code == 200
    assert labels.backend.batches == [[(1.0, "series")]]


def held(site: Any, *asked: dict[str, Any]) -> tuple[threading.Thread, list[threading.Thread], list[Any]]:
    """One request that holds the batcher, and others that wait for it; their answers in the order of ``asked``."""
    answers: list[Any] = [None] * len(asked)

    def ask(at: int, body: dict[str, Any]) -> None:
        answers[at] = site.ask("/classify", **body)

    first = threading.Thread(target=lambda: site.ask("/classify", input="hold"))
    first.start()
    assert site.backend.going.wait(10)
    others = [threading.Thread(target=ask, args=one) for one in enumerate(asked)]
    for number, thread in enumerate(others, start=1):
        thread.start()
        site.wait_for(lambda number=number: site.service._classify.waiting == number)
    return first, others, answers


def finish(site: Any, *threads: threading.Thread) -> None:
    site.backend.hold.set()
    for thread in threads:
        thread.join(20)


def test_requests_of_several_adapters_share_a_batch(labels: Any) -> None:
    labels.control.load("two", "v2")
    asked = [{"input": "a", "model": "two"}, {"input": ["b", "c"]}, {"input": "d", "model": "null"}]
    first, others, answers = held(labels, *asked)
    finish(labels, first, *others)
    assert labels.backend.batches[1:] == [[(2.0, "a"), (1.0, "b"), (1.0, "c"), (0.0, "d")]]
    assert [[one["label"] for one in answer.json()["data"]] for answer in answers] == [
        ["label 2"], ["label 1"] * 2, ["label 0"]
    ]  # fmt: skip
    assert [a.headers["x-fedpeft-slot"] for a in answers] == [
        labels.shelf.names["v2"].digest, labels.shelf.names["v1"].digest, "null"
    ]  # fmt: skip
    labels.wait_no_pins()


def test_a_request_that_waits_keeps_the_slot_that_it_came_for(labels: Any) -> None:
    first, others, answers = held(labels, {"input": ["a", "b"]})
    labels.control.load("two", "v2")
    labels.control.activate("two")
    finish(labels, first, *others)
    assert [one["label"] for one in answers[0].json()["data"]] == ["label 1", "label 1"]
    assert labels.ask("/classify", input="c").json()["data"][0]["label"] == "label 2"


@pytest.mark.parametrize(("text", "status"), [("bad", 400), ("crash", 500)])
def test_a_bad_row_fails_its_own_request_alone(labels: Any, text: str, status: int) -> None:
    first, others, answers = held(labels, {"input": "a"}, {"input": ["b", text]}, {"input": "c"})
    finish(labels, first, *others)
    assert [answer.status_code for answer in answers] == [200, status, 200]
    assert "secret" not in answers[1].text
    assert answers[1].json()["error"]["message"]
    labels.wait_no_pins()


def test_a_batch_has_a_most_and_a_request_is_never_split(sites: Callable[..., Any]) -> None:
    with sites(speaks="labels", limits=Limits(batch_rows=3)) as site:
        first, others, answers = held(site, {"input": ["a", "b"]}, {"input": ["c", "d"]}, {"input": list("efghi")})
        finish(site, first, *others)
        assert [len(batch) for batch in site.backend.batches] == [1, 2, 2, 5]
        assert [len(answer.json()["data"]) for answer in answers] == [2, 2, 5]


def test_a_full_queue_is_429_and_a_long_wait_503(sites: Callable[..., Any]) -> None:
    with sites(speaks="labels", limits=Limits(waiting=1, wait_seconds=0.5)) as site:
        first, others, answers = held(site, {"input": "a"})
        full = site.ask("/classify", input="b")
        assert (full.status_code, full.json()["error"]["type"]) == (429, "rate_limit_error")
        assert int(full.headers["retry-after"]) >= 1
        others[0].join(20)
        assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "overloaded")
        finish(site, first)
        assert site.ask("/classify", input="c").status_code == 200
        assert [text for batch in site.backend.batches for _, text in batch] == ["hold", "c"]


def test_a_client_that_leaves_is_not_computed_for(labels: Any) -> None:
    first, _, _ = held(labels)
    with pytest.raises(httpx.ReadTimeout):
        labels.public.post("/classify", json={"input": "gone"}, timeout=0.5)
    labels.wait_for(lambda: labels.service._classify.waiting == 0)
    finish(labels, first)
    labels.wait_no_pins()
    assert [text for batch in labels.backend.batches for _, text in batch] == ["hold"]


def test_embeddings_as_numbers_and_as_base64(site: Any) -> None:
    record = site.ask("/v1/embeddings", input=["one", "three"]).json()
    assert [one["embedding"] for one in record["data"]] == [[1.0, 3.0], [1.0, 5.0]]
    assert record["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
    packed = site.ask("/v1/embeddings", input="one", encoding_format="base64").json()["data"][0]["embedding"]
    assert struct.unpack("<2f", base64.b64decode(packed)) == (1.0, 3.0)


def test_embeddings_of_several_slots_come_back_to_their_requests(site: Any) -> None:
    site.control.load("two", "v2")
    service, found = site.service, {}
    shares = [
        ("x", service.runtime.slots[1]), ("yy", service.runtime.slots[2]), ("zzz", service.runtime.slots[1])
    ]  # fmt: skip
    from federated.device.serving.batching import Share

    made = service._embedded([Share(slot, [text, text + "!"]) for text, slot in shares])
    found = [tuple(one.vector) for one in made]
    values = [slot.handle for _, slot in shares]
    assert found == [(v, float(len(t) + more)) for (t, _), v in zip(shares, values, strict=True) for more in (0, 1)]


def test_each_task_says_where_to_ask(site: Any, labels: Any) -> None:
    wrong = site.ask("/classify", input="a")
    assert (wrong.status_code, "/v1/completions" in wrong.json()["error"]["message"]) == (404, True)
    wrong = labels.ask(max_tokens=1)
    assert (wrong.status_code, "/classify" in wrong.json()["error"]["message"]) == (404, True)


def test_batches_are_counted(labels: Any) -> None:
    labels.ask("/classify", input=["a", "b"])
    assert "fedpeft_batch_rows_sum 2.0" in labels.public.get("/metrics").text
