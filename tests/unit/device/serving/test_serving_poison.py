"""Inputs that no model can answer are the request's own fault: they are 400, and count against no version."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from federated.device import Sampling, open_runtime
from federated.device.serving import Control, Directory, Service, public_listener
from federated.errors import DataError, DeviceError

Make = Callable[..., Any]

HALF = "half \ud800"
LARGE = {"values": [[1e308, 1e308, 1e308]] * 4}


@dataclass
class Heard:
    """What a slot was said to do."""

    told: list[str] = field(default_factory=list)

    def success(self, digest: str) -> None:
        self.told.append("success")

    def failure(self, digest: str, reason: str) -> None:
        self.told.append(reason)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "bodies"),
    [
        ("tiny:bert", [("/classify", {"input": ["good", HALF]}), ("/v1/embeddings", {"input": HALF})]),
        (
            "tiny:llama",
            [
                ("/v1/completions", {"prompt": HALF}),
                ("/v1/completions", {"prompt": "a", "stop": HALF}),
                ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
                (
                    "/v1/chat/completions",
                    {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
                ),
                ("/v1/embeddings", {"input": ["", "a"]}),
            ],
        ),
        ("tiny:sensor", [("/classify", {"input": LARGE}), ("/classify", {"input": {"values": [[1.0], [2.0]]}})]),
    ],
)
def test_what_no_model_can_answer_counts_against_no_version(
    run_server: Callable[..., Any], recipe: Make, real_version: Make, source: str, bodies: list[Any]
) -> None:
    version, heard = real_version(recipe(source), 1), Heard()
    runtime = open_runtime(version.manifest)
    runtime.activate(version.install(runtime).digest)
    speaks: Any = "text" if source == "tiny:llama" else "labels"
    service = Service(runtime, Control(runtime, Directory(runtime, "tiny")), speaks=speaks, health=heard)
    listener = public_listener(service, port=0)
    with run_server(service, [listener]):
        for path, body in bodies:
            done = httpx.post(
                f"{listener.place}{path}",
                content=json.dumps(body),
                headers={"content-type": "application/json"},
                timeout=60,
            )
            assert (done.status_code, set(done.json())) == (400, {"error"})
            assert "half \\ud800" not in done.text
    assert heard.told == []


def test_half_a_character_is_refused_in_python_too(recipe: Make, real_version: Make) -> None:
    version = real_version(recipe("tiny:llama"), 1)
    runtime = open_runtime(version.manifest)
    with pytest.raises(DataError, match="row 1: the text holds half of a surrogate pair"):
        runtime.predict([{"text": HALF}])
    for prompt in (HALF, [{"role": "user", "content": HALF}]):
        with pytest.raises(DeviceError, match="half of a surrogate pair"):
            runtime.generate(prompt, Sampling(1))
    version = real_version(recipe("tiny:bert"), 1)
    with pytest.raises(DataError, match="row 1: the text holds half of a surrogate pair"):
        open_runtime(version.manifest).predict([{"text": HALF}])
