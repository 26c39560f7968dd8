"""Completions and chats over real HTTP: shapes, order, one slot per answer; what a client that leaves gives back."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from federated.device.serving import Limits


def events(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [one if one == "[DONE]" else json.loads(one) for one in lines]


def chat(**more: Any) -> dict[str, Any]:
    return {"path": "/v1/chat/completions", "messages": [{"role": "user", "content": "hello you"}], **more}


def test_a_completion_has_openais_shape(site: Any) -> None:
    done = site.ask(max_tokens=3)
    version = site.shelf.names["v1"]
    assert done.status_code == 200
    record = done.json()
    assert record["object"] == "text_completion"
    assert record["model"] == "tiny:echo"
    assert record["choices"] == [{"index": 0, "text": "1 1 1 ", "logprobs": None, "finish_reason": "length"}]
    assert record["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    assert record["system_fingerprint"] == done.headers["x-fedpeft-version"] == version.version_id
    assert done.headers["x-fedpeft-slot"] == version.digest
    site.wait_no_pins()


def test_a_completion_is_16_tokens_and_a_chat_128_unless_told(site: Any) -> None:
    assert site.ask().json()["usage"]["completion_tokens"] == 16
    assert site.ask(**chat()).json()["usage"]["completion_tokens"] == 128
    assert site.ask(**chat(max_completion_tokens=2)).json()["usage"]["completion_tokens"] == 2


def test_a_chat_has_openais_shape(site: Any) -> None:
    record = site.ask(**chat(max_tokens=2)).json()
    assert record["object"] == "chat.completion"
    assert record["choices"][0]["message"] == {"role": "assistant", "content": "1 1 "}
    assert record["choices"][0]["finish_reason"] == "length"


def test_text_parts_of_a_message_are_one_text(site: Any) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "you two"}]
    body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 1}
    assert site.public.post("/v1/chat/completions", json=body).json()["usage"]["prompt_tokens"] == 3


def test_a_stream_says_the_same_in_order(site: Any) -> None:
    made = events(site.ask(**chat(max_tokens=3, stream=True, stream_options={"include_usage": True})))
    assert made[-1] == "[DONE]"
    assert [one["choices"][0]["delta"] for one in made[:4]] == [
        {"role": "assistant", "content": ""}, {"content": "1 "}, {"content": "1 "}, {"content": "1 "}
    ]  # fmt: skip
    assert [one["choices"][0]["finish_reason"] for one in made[:4]] == [None, None, None, "length"]
    assert made[4]["choices"] == []
    assert made[4]["usage"]["total_tokens"] == 5
    assert len({(one["id"], one["system_fingerprint"]) for one in made[:-1]}) == 1
    assert {one["object"] for one in made[:-1]} == {"chat.completion.chunk"}


def test_a_completions_stream_has_texts(site: Any) -> None:
    response = site.ask(max_tokens=2, stream=True)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-fedpeft-version"] == site.shelf.names["v1"].version_id
    made = events(response)
    assert [one["choices"][0]["text"] for one in made[:-1]] == ["1 ", "1 "]
    assert "usage" not in made[-2]


def test_tokens_leave_as_they_are_made(site: Any) -> None:
    with site.public.stream("POST", "/v1/completions", json={"prompt": "slow", "stream": True, "max_tokens": 3}) as got:
        lines = (line for line in got.iter_lines() if line)
        for _ in range(3):
            site.backend.step.release()  # a server that gathers tokens would wait here for ever
            assert "text_completion" in next(lines)
        assert next(lines) == "data: [DONE]"
    site.wait_no_pins()


def test_an_answer_keeps_its_slot_whatever_is_activated(site: Any) -> None:
    with site.public.stream("POST", "/v1/completions", json={"prompt": "slow", "stream": True, "max_tokens": 3}) as got:
        lines = (json.loads(line.removeprefix("data: ")) for line in got.iter_lines() if line)
        site.backend.step.release()
        first = next(lines)
        site.control.load("two", "v2")
        site.control.activate("two")
        assert site.ask(max_tokens=1).json()["choices"][0]["text"] == "2 "
        assert site.service.runtime.pins == {site.shelf.names["v1"].digest: 1}
        site.backend.step.release(2)
        assert [first["choices"][0]["text"], *(next(lines)["choices"][0]["text"] for _ in range(2))] == ["1 "] * 3
    site.wait_no_pins()


@pytest.fixture
def kept(site: Any) -> list[Any]:
    """Holds every answer, so that no garbage collection gives back what the server should."""
    made, held = site.service.runtime.generate, []

    def generate(*args: Any, **more: Any) -> Any:
        held.append(made(*args, **more))
        return held[-1]

    site.service.runtime.generate = generate
    return held


def gone_on(site: Any) -> None:
    """Let tokens be made, a few hundred a second, until the server has noticed that nobody reads them."""
    site.wait_for(lambda: site.backend.step.release() or not site.service.runtime.pins)
    site.wait_for(lambda: site.service.writer.gate.working == 0)


def test_a_client_that_leaves_a_stream_gives_pin_and_place_back(site: Any, kept: list[Any]) -> None:
    body = {"prompt": "slow", "stream": True, "max_tokens": 1000}
    with site.public.stream("POST", "/v1/completions", json=body) as got:
        site.backend.step.release()
        next(line for line in got.iter_lines() if line)
        assert list(site.service.runtime.pins.values()) == [1]
    gone_on(site)
    assert site.backend.ended == 1
    assert kept[0].finish_reason == "cancelled"


def test_a_client_that_leaves_before_its_answer_gives_pin_and_place_back(site: Any, kept: list[Any]) -> None:
    with pytest.raises(httpx.ReadTimeout):
        site.public.post("/v1/completions", json={"prompt": "slow", "max_tokens": 1000}, timeout=0.5)
    gone_on(site)
    assert kept[0].finish_reason == "cancelled"


def test_requests_over_the_limit_wait_and_then_are_refused(sites: Callable[..., Any]) -> None:
    with sites(limits=Limits(generations=1, waiting=1, wait_seconds=0.3)) as site:
        threads, codes = [], []

        def ask() -> None:
            codes.append(site.ask(prompt="slow", max_tokens=1).status_code)

        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        assert site.backend.going.wait(10)
        threads.append(threading.Thread(target=ask))
        threads[-1].start()
        site.wait_for(lambda: site.service.writer.gate.waiting == 1)
        full = site.ask()
        assert (full.status_code, full.json()["error"]["code"]) == (429, "queue_full")
        assert int(full.headers["retry-after"]) >= 1
        threads[1].join(10)
        site.backend.step.release()
        threads[0].join(10)
        assert codes == [503, 200]
        assert site.ask(max_tokens=1).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(sites: Callable[..., Any]) -> None:
    with sites(limits=Limits(request_seconds=0.2)) as site:
        late = site.ask(prompt="slow")
        assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
        made = events(site.ask(prompt="slow", stream=True))
        assert [one["error"]["code"] for one in made] == ["timeout"]  # and no [DONE]
        site.backend.step.release(2)
        site.wait_no_pins()


def test_what_a_backend_refuses_is_the_callers_error(site: Any) -> None:
    for stream in (False, True):
        refused = site.ask(prompt="too long", stream=stream)
        assert refused.status_code == 400
        assert "shorten it" in refused.json()["error"]["message"]
    site.wait_no_pins()
    assert site.service.writer.gate.working == 0


def test_a_foreign_error_does_not_leave_the_server(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    failed = site.ask(prompt="crash")
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert "secret" not in failed.text
    broken = site.ask(prompt="break")
    assert (broken.status_code, "secret" in broken.text) == (500, False)
    with pytest.raises(httpx.RemoteProtocolError):
        site.ask(prompt="break", stream=True)
    site.wait_no_pins()
    assert "secret" not in caplog.text
    assert "RuntimeError" in caplog.text
    assert failed.headers["x-request-id"] in caplog.text


def test_a_user_and_an_arm_get_their_adapter(site: Any) -> None:
    site.control.load("hers", "v2")
    site.control.load("arm-b", "v3")
    site.control.route(user="ann", name="hers")
    site.control.route(arm="b", name="arm-b")

    def text(arm: str | None = None, **body: Any) -> str:
        told = {"x-fedpeft-arm": arm} if arm else {}
        done = site.public.post("/v1/completions", json={"prompt": "hi", "max_tokens": 1, **body}, headers=told)
        return str(done.json()["choices"][0]["text"]).strip()

    assert [text(user="ann"), text(user="bob"), text("b"), text("b", user="ann"), text("b", model="null")] == [
        "2", "1", "3", "2", "0"
    ]  # fmt: skip
    assert text("b", model="hers", user="bob") == "2"
    assert text("b", model="tiny:echo") == "3"


def test_an_answer_does_not_wait_for_the_network_to_be_asked_again(site: Any) -> None:
    """Nagle's algorithm and the client's delayed acknowledgement together take 40 ms, of every answer."""

    def seconds() -> float:
        begin = time.perf_counter()
        site.public.get("/healthz")
        return time.perf_counter() - begin

    took = sorted(seconds() for _ in range(60))
    assert took[20] < 0.03  # the first ones are acknowledged at once in any case


def test_tokens_and_requests_are_counted(site: Any) -> None:
    site.ask(max_tokens=3)
    site.ask(model="nobody")
    site.wait_no_pins()
    told = site.public.get("/metrics").text
    assert 'fedpeft_tokens_total{kind="prompt"} 2.0' in told
    assert 'fedpeft_tokens_total{kind="completion"} 3.0' in told
    assert 'fedpeft_requests_total{endpoint="/v1/completions",status="404"} 1.0' in told
    assert "fedpeft_swaps_total 1.0" in told
    assert f'fedpeft_active_version{{label="v1",slot="{site.shelf.names["v1"].digest}"' in told
    assert "fedpeft_resident_adapters 1.0" in told
    assert "fedpeft_resident_bytes 100.0" in told
    assert "fedpeft_first_token_seconds_count 1.0" in told
