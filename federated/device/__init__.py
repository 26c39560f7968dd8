"""The device: immutable slots, a pin for each request, activation and rollback by pointer.

`AdapterRuntime`, `Slot` and what belongs to them import neither torch nor SQLAlchemy; `TorchBackend` and
`open_runtime` load torch when they are first asked for.
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
    from federated.device.backends.torch import TorchBackend
    from federated.device.opening import open_runtime

__all__ = [
    "NULL",
    "Activation",
    "AdapterRuntime",
    "Answer",
    "Backend",
    "Embedding",
    "Embeds",
    "Generates",
    "Generation",
    "Learned",
    "Learns",
    "Lesson",
    "Merges",
    "Mixes",
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
    "open_runtime",
    "recipe_of",
]

_HEAVY = {"TorchBackend": "federated.device.backends.torch", "open_runtime": "federated.device.opening"}


def __getattr__(name: str) -> Any:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HEAVY[name]), name)
