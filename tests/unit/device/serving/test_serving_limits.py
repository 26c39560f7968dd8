"""What a request is refused for, each with one clear error in OpenAI's shape."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from federated.device.serving import Limits, Tokens, public_listener, read_tokens
from federated.errors import DeviceError

COMPLETION, CHAT, EMBED = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
ASK = {"role": "user", "content": "hi"}


def refused(done: httpx.Response) -> tuple[int, str]:
    assert set(done.json()) == {"error"}
    error = done.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return done.status_code, error["message"]


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        (COMPLETION, {}, "prompt: Field required"),
        (COMPLETION, {"prompt": 3}, "prompt"),
        (COMPLETION, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETION, {"prompt": "a", "max_tokens": 0}, "max_tokens"),
        (COMPLETION, {"prompt": "a", "max_tokens": 1025}, "expected at most 1024"),
        (COMPLETION, {"prompt": "a", "temperature": -1}, "temperature"),
        (COMPLETION, {"prompt": "a", "temperature": 2.5}, "temperature"),
        (COMPLETION, {"prompt": "a", "top_p": 0}, "top_p"),
        (COMPLETION, {"prompt": "a", "seed": 2**63}, "seed"),
        (COMPLETION, {"prompt": "a", "stop": list("abcde")}, "expected at most 4"),
        (COMPLETION, {"prompt": "a", "stop": ""}, "stop text is empty"),
        (COMPLETION, {"prompt": "a", "n": 2}, "'n' is not supported by this server, expected 1 or nothing"),
        (COMPLETION, {"prompt": "a", "logprobs": 5}, "'logprobs' is not supported"),
        (COMPLETION, {"prompt": "a", "made_up": 1}, "'made_up' is not supported by this server: leave it out"),
        (COMPLETION, {"prompt": "a", "user": "u" * 201}, "user"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "boss", "content": "x"}]}, "role"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "content"),
        (CHAT, {"messages": [{**ASK, "tool_calls": [1]}]}, "'tool_calls' is not supported"),
        (CHAT, {"messages": [ASK], "tools": [{"type": "function"}]}, "'tools' is not supported"),
        (CHAT, {"messages": [ASK], "response_format": {"type": "json_object"}}, "response_format"),
        (EMBED, {"input": []}, "input"),
        (EMBED, {"input": [[1, 2]]}, "input"),
        (EMBED, {"input": ["a"] * 129}, "input has 129 entries, expected at most 128"),
        (EMBED, {"input": "a", "dimensions": 8}, "'dimensions' is not supported"),
        (EMBED, {"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_a_bad_body_is_one_clear_error(site: Any, path: str, body: dict[str, Any], said: str) -> None:
    status, message = refused(site.public.post(path, json=body))
    assert status == 400
    assert said in message


def test_what_means_off_or_nothing_is_taken(site: Any) -> None:
    off = {"n": 1, "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": None, "made_up": None}
    assert site.ask(max_tokens=1, temperature=None, top_p=None, stop=None, seed=None, **off).status_code == 200


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b"[" * 100_000, b'{"prompt": "a", "temperature": NaN}']
)
def test_what_is_no_json_object_is_refused(site: Any, body: bytes) -> None:
    done = site.public.post(COMPLETION, content=body, headers={"content-type": "application/json"})
    assert refused(done)[0] == 400


def test_a_body_that_is_not_called_json_is_refused(site: Any) -> None:
    done = site.public.post(COMPLETION, content=b'{"prompt": "a"}', headers={"content-type": "text/plain"})
    assert refused(done)[0] == 400
    assert "content-type: application/json" in refused(done)[1]


def test_endpoints_and_methods_that_are_not_there(site: Any) -> None:
    assert refused(site.public.get("/v2/nothing")) == (404, "no such endpoint")
    assert refused(site.public.get(COMPLETION)) == (405, "another method is needed here")
    for path in ("/docs", "/redoc", "/openapi.json"):
        assert site.public.get(path).status_code == 404
    assert 'endpoint="other"' in site.public.get("/metrics").text


def test_an_unknown_model_names_what_is_there(site: Any) -> None:
    status, message = refused(site.ask(model="gpt-5"))
    assert status == 404
    assert "found tiny:echo, null, stable" in message


def test_a_large_body_is_refused_with_or_without_its_length(sites: Callable[..., Any]) -> None:
    with sites(limits=Limits(body_bytes=1000)) as site:
        assert refused(site.ask(prompt="x" * 1000))[0] == 413
        done = site.public.post(COMPLETION, content=iter([b"x" * 600] * 3))
        assert refused(done)[0] == 413
        assert site.ask(max_tokens=1).status_code == 200


def test_a_body_that_does_not_come_is_not_waited_for(sites: Callable[..., Any]) -> None:
    with sites(limits=Limits(body_seconds=0.2)) as site:
        host, port = site.public.base_url.host, site.public.base_url.port
        with socket.create_connection((host, port)) as slow:
            head = f"POST {COMPLETION} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 100\r\n\r\n{{"
            slow.sendall(head.encode())
            slow.settimeout(10)
            assert slow.recv(100).startswith(b"HTTP/1.1 408")


def test_tokens_are_needed_everywhere_but_for_health(sites: Callable[..., Any]) -> None:
    with sites(tokens=["first-token-for-tests", "second-token-for-tests"]) as site:
        assert site.ask(max_tokens=1).status_code == 200
        second = {"authorization": "bearer second-token-for-tests"}
        assert site.public.get("/v1/models", headers=second).status_code == 200
        bare = httpx.Client(base_url=site.public.base_url)
        for wrong in (
            "",
            "Bearer",
            "Bearer x",
            "Bearer first-token-for-test",
            "Basic first-token-for-tests",
            "Bearer é",
        ):
            headers = {"authorization": wrong.encode("latin-1")}
            for path in ("/v1/models", "/metrics", "/nothing"):
                done = bare.get(path, headers=headers)
                assert refused(done)[0] == 401
                assert done.headers["www-authenticate"] == "Bearer"
        assert refused(bare.post(COMPLETION, json={"prompt": "a"}))[0] == 401
        assert bare.get("/healthz").status_code == 200
        bare.close()


def test_another_sites_host_name_is_refused_where_no_token_protects(site: Any) -> None:
    assert refused(site.public.get("/v1/models", headers={"host": "evil.example"}))[0] == 403
    for host in ("localhost", "127.0.0.1:8000", "[::1]:80"):
        assert site.public.get("/v1/models", headers={"host": host}).status_code == 200


def test_an_open_address_needs_tokens_or_a_word(site: Any) -> None:
    with pytest.raises(DeviceError, match="--allow-anonymous"):
        public_listener(site.service, host="0.0.0.0", port=0)  # noqa: S104 - that is the point
    for more in ({"anonymous": True}, {"tokens": Tokens(["a-token-for-the-tests"])}):
        public_listener(site.service, host="0.0.0.0", port=0, **more).bound.close()  # noqa: S104


def test_a_taken_port_is_one_error(site: Any) -> None:
    with pytest.raises(DeviceError, match="cannot be bound"):
        public_listener(site.service, port=site.public.base_url.port)


def test_nothing_that_was_asked_or_answered_is_in_the_log(site: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    site.ask(prompt="my private words", user="ann-of-somewhere", max_tokens=1)
    site.ask(prompt="my private words", model="my-private-model", made_up="my private words")
    site.public.get("/my-private-path?my=private")
    site.wait_for(lambda: caplog.text.count("req-") >= 3)
    mine = "\n".join(
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore"))
    )
    assert "private" not in mine
    assert "ann" not in mine
    assert "POST /v1/completions 200" in mine
    assert site.shelf.names["v1"].version_id[:12] in mine


def test_tokens_come_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "tokens"
    file.write_text("# whose\nfirst-token-for-tests\n\nsecond-token-for-tests\n")
    monkeypatch.setenv("SOME_TOKEN", "token-of-the-environment")
    tokens = read_tokens(file, "SOME_TOKEN")
    assert tokens.open(b"Bearer second-token-for-tests")
    assert not tokens.open(b"Bearer token-of-the-environment")
    assert read_tokens(None, "SOME_TOKEN").open(b"Bearer token-of-the-environment")
    monkeypatch.delenv("SOME_TOKEN")
    assert not read_tokens(None, "SOME_TOKEN")
    assert Tokens().open(None)


@pytest.mark.parametrize(
    "content", [b"", b"# only a remark\n", b"short\n", b"a token with spaces in it\n", b"\xff\xfe"]
)
def test_a_token_file_that_protects_nothing_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(DeviceError):
        read_tokens(tmp_path / "tokens", "SOME_TOKEN")


def test_a_missing_token_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="cannot be read"):
        read_tokens(tmp_path / "none", "SOME_TOKEN")


def test_comparing_tokens_takes_as_long_for_a_near_miss() -> None:
    """No early exit: what is compared are digests, by `hmac.compare_digest`."""
    tokens = Tokens([f"token-number-{number}-of-many" for number in range(200)])

    def seconds(given: bytes) -> float:
        begin = time.perf_counter()
        for _ in range(50):
            tokens.open(b"Bearer " + given)
        return time.perf_counter() - begin

    first = min(seconds(b"token-number-0-of-many") for _ in range(7))
    none = min(seconds(b"x" * 22) for _ in range(7))
    assert first > none / 3  # one that returns at the first match takes a hundredth


@pytest.mark.parametrize("limit", ["body_bytes", "generations", "wait_seconds"])
def test_a_limit_that_lets_nothing_through_is_refused(limit: str) -> None:
    with pytest.raises(DeviceError, match=limit):
        Limits(**{limit: 0})


def test_a_stopping_server_finishes_what_it_began(site: Any, run_server: Callable[..., Any]) -> None:
    service = type(site.service)(site.service.runtime, site.control, speaks="text")
    listener = public_listener(service, port=0)
    done: list[Any] = []

    def ask() -> None:
        done.append(
            httpx.post(f"{listener.place}/v1/completions", json={"prompt": "slow", "max_tokens": 2}, timeout=30)
        )

    asking = threading.Thread(target=ask)
    with run_server(service, [listener]):
        asking.start()
        assert site.backend.going.wait(10)
        threading.Timer(0.5, lambda: site.backend.step.release(2)).start()
    asking.join(10)
    assert done[0].json()["choices"][0]["finish_reason"] == "length"
    assert service.state.ready is False
