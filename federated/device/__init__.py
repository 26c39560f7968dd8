"""The device: immutable slots, a pin for each request, activation and rollback by pointer.

Beside them the agent, which brings signed versions to a device and keeps one serving. Nothing here imports torch or
SQLAlchemy but `TorchBackend` and `open_runtime`, when they are first asked for; `OnnxBackend` needs the onnx extra, the
agent the release extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from federated.device.backends.protocol import Backend, Embeds, Generates, Learned, Learns, Lesson, Merges, Mixes, Reads
from federated.device.generation import Generation
from federated.device.personal import PersonalAdapters, Rebased
from federated.device.personal_store import PersonalVersion, Standing
from federated.device.recipe import Recipe, recipe_of
from federated.device.records import NULL, Activation, Answer, Embedding, Prompt, Sampling, Served, Slot, Stream, Token
from federated.device.routing import Route, Routes
from federated.device.slots import AdapterRuntime, Refill

if TYPE_CHECKING:
    from federated.device.agent import Agent
    from federated.device.agent_config import DeviceConfig, device_config
    from federated.device.agent_loop import run
    from federated.device.backends.onnx import OnnxBackend
    from federated.device.backends.torch import TorchBackend
    from federated.device.health import HealthReport
    from federated.device.opening import open_runtime

__all__ = [
    "NULL",
    "Activation",
    "AdapterRuntime",
    "Agent",
    "Answer",
    "Backend",
    "DeviceConfig",
    "Embedding",
    "Embeds",
    "Generates",
    "Generation",
    "HealthReport",
    "Learned",
    "Learns",
    "Lesson",
    "Merges",
    "Mixes",
    "OnnxBackend",
    "PersonalAdapters",
    "PersonalVersion",
    "Prompt",
    "Reads",
    "Rebased",
    "Recipe",
    "Refill",
    "Route",
    "Routes",
    "Sampling",
    "Served",
    "Slot",
    "Standing",
    "Stream",
    "Token",
    "TorchBackend",
    "device_config",
    "open_runtime",
    "recipe_of",
    "run",
]

_LATER = {
    "Agent": "federated.device.agent",
    "DeviceConfig": "federated.device.agent_config",
    "HealthReport": "federated.device.health",
    "OnnxBackend": "federated.device.backends.onnx",
    "TorchBackend": "federated.device.backends.torch",
    "device_config": "federated.device.agent_config",
    "open_runtime": "federated.device.opening",
    "run": "federated.device.agent_loop",
}
"""What is loaded when it is asked for: it needs torch, the release extra, or time."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATER[name]), name)
