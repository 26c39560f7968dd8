"""What the load is sent to: this library's slots, or one live peft model, behind the same socket.

Called by `simulations/benchmarks/device.py`. A target answers a row by number and says which adapter answered; it is
swapped from another thread while it does.
"""

from __future__ import annotations

import copy
import json
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from federated.adapters import BaseModel
from federated.adapters.heads import MeanPoolClassifier
from federated.device import AdapterRuntime
from federated.state import AdapterState

__all__ = ["PeftHotswap", "PeftSetAdapter", "Slots", "Target", "serving"]

Scores = list[float]


class Target(Protocol):
    """What is asked and swapped at once."""

    names: tuple[str, str]

    def answer(self, row: int) -> tuple[str, Scores]:
        """Which adapter answers now, and its scores of a row."""
        ...

    def swap(self, name: str) -> None:
        """Let another adapter answer from now on."""
        ...


@contextmanager
def serving(target: Target) -> Iterator[str]:
    """Answer lines of JSON on a socket of this machine, a thread for each connection; yields the URL."""

    class Handler(socketserver.StreamRequestHandler):
        disable_nagle_algorithm: ClassVar[bool] = True

        def handle(self) -> None:
            for line in self.rfile:
                try:
                    slot, scores = target.answer(int(json.loads(line)["row"]))
                    told: Mapping[str, Any] = {"slot": slot, "scores": scores}
                except Exception as error:  # noqa: BLE001 - a failed request is what is counted
                    told = {"error": f"{type(error).__name__}: {error}"}
                self.wfile.write(json.dumps(told).encode() + b"\n")

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"socket://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


class Slots:
    """This library: each request pins a slot, swapping activates another.

    Args:
        runtime: with both installed.
        digests: of the two.
        rows: by number.
    """

    def __init__(self, runtime: AdapterRuntime, digests: tuple[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.names = digests
        self._runtime, self._rows = runtime, rows

    def answer(self, row: int) -> tuple[str, Scores]:
        """By the active slot."""
        served = self._runtime.predict([self._rows[row]])
        return served.slot.digest, list(served.predictions[0].scores.values())

    def swap(self, name: str) -> None:
        """Activate."""
        self._runtime.activate(name)


class _Live:
    """One peft model that answers and is changed in place; no lock, as in a server that was written in a hurry.

    Args:
        base: copied, so that peft does not change the library's.
        head: of both adapters.
        states: two adapters of one spec.
        encode: rows by number, as a batch.
    """

    names = ("one", "two")

    def __init__(
        self, base: BaseModel, head: MeanPoolClassifier, states: Sequence[AdapterState], encode: Callable[[int], Any]
    ) -> None:
        from peft import LoraConfig, get_peft_model

        self._encode, self._head = encode, head
        spec = states[0].spec
        config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=[one.name for one in spec.modules])
        backbone: Any = copy.deepcopy(base.model)
        self.model: Any = get_peft_model(backbone, config, adapter_name="one")
        self.model.add_adapter("two", config)
        for name, state in zip(self.names, states, strict=True):
            for pair in state.pairs():
                layer = backbone.get_submodule(pair.module.name)
                layer.lora_A[name].weight.data = pair.factor_a.clone()
                layer.lora_B[name].weight.data = pair.factor_b.clone()
        self.model.eval().requires_grad_(False)
        self.active = "one"

    @torch.no_grad()
    def answer(self, row: int) -> tuple[str, Scores]:
        """By whatever is in the model while it runs."""
        name, batch = self.active, self._encode(row)
        logits: Tensor = _Around(self.model, self._head)(**batch)
        return name, logits.softmax(-1)[0].tolist()

    def swap(self, name: str) -> None:
        """Change the model in place, then say so."""
        self.change(name)
        self.active = name

    def change(self, name: str) -> None:
        """Change the model in place."""
        raise NotImplementedError


class _Around(nn.Module):
    """A backbone under a head that others use too."""

    def __init__(self, backbone: nn.Module, head: MeanPoolClassifier) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, attention_mask: Tensor, **inputs: Tensor) -> Tensor:
        from federated.adapters.heads import mean_pooled

        output = self.backbone(attention_mask=attention_mask, **inputs)
        return self.head.classify(mean_pooled(output, attention_mask))


class PeftSetAdapter(_Live):
    """peft's ``set_adapter`` between two adapters that are loaded both."""

    def change(self, name: str) -> None:
        """Point every layer at another adapter, one after the other."""
        self.model.set_adapter(name)


class PeftHotswap(_Live):
    """peft's ``hotswap_adapter``: another adapter's values are copied into the one in use."""

    def save(self, folder: Path) -> None:
        """Write both as folders, which is what hot-swapping reads."""
        self._folder = folder
        self.model.save_pretrained(folder)

    def change(self, name: str) -> None:
        """Copy another adapter's values in, layer by layer."""
        from peft.utils.hotswap import hotswap_adapter

        hotswap_adapter(self.model, str(self._folder / name), adapter_name="one", torch_device="cpu")
