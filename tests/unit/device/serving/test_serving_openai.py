"""OpenAI's own client understands every answer and every error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai", reason="pip install openai")

pytestmark = pytest.mark.interop

KEY = "public-word-for-tests"


@pytest.fixture
def guarded(sites: Callable[..., Any]) -> Iterator[Any]:
    with sites(tokens=[KEY]) as site:
        yield site


@pytest.fixture
def client(guarded: Any) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{guarded.public.base_url}/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models(client: Any) -> None:
    assert [one.id for one in client.models.list()][:3] == ["tiny:echo", "null", "stable"]
    assert client.models.retrieve("stable").id == "stable"


def test_completions_and_their_stream(client: Any, guarded: Any) -> None:
    made = client.completions.create(model="stable", prompt="hello you", max_tokens=2, temperature=0)
    assert (made.choices[0].text, made.choices[0].finish_reason, made.usage.total_tokens) == ("1 1 ", "length", 4)
    assert made.system_fingerprint == guarded.shelf.names["v1"].version_id
    parts = client.completions.create(model="stable", prompt="hello you", max_tokens=3, stream=True)
    assert [one.choices[0].text for one in parts] == ["1 "] * 3


def test_chats_and_their_stream(client: Any) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello you"}]
    made = client.chat.completions.create(model="null", messages=messages, max_completion_tokens=2)
    assert made.choices[0].message.content == "0 0 "
    messages += [made.choices[0].message, {"role": "user", "content": "and again"}]
    parts = client.chat.completions.create(
        model="null", messages=messages, max_tokens=2, stream=True, stream_options={"include_usage": True}
    )
    parts = list(parts)
    assert "".join(one.choices[0].delta.content or "" for one in parts if one.choices) == "0 0 "
    assert parts[-1].usage.completion_tokens == 2


def test_embeddings(client: Any) -> None:
    made = client.embeddings.create(model="stable", input=["one", "three"])  # asks for base64 by itself
    assert [one.embedding for one in made.data] == [[1.0, 3.0], [1.0, 5.0]]


def test_errors_are_the_clients_own(client: Any) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="not supported"):
        client.completions.create(model="stable", prompt="x", n=3)
    with pytest.raises(openai.InternalServerError):
        client.completions.create(model="stable", prompt="crash")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="not-the-word-for-tests").models.list()
