"""Models in torch: one module tree for each slot, all over the base's own tensors.

A tree is filled once and never changed again. That, and not a lock, is what lets slots answer at the same time:
switching adapters on one live model (PEFT's ``set_adapter``, ``hotswap_adapter``) while it answers mixes two adapters
within one forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from queue import Empty, SimpleQueue
from typing import Any

import torch

from federated.adapters import BaseModel, null_model, shell
from federated.device.backends.handles import TorchHandle, own_bytes, places
from federated.device.backends.protocol import Learned, Lesson
from federated.device.backends.torch_embedding import embeddings
from federated.device.backends.torch_generation import check_room_for, end_tokens, tokens_of
from federated.device.backends.torch_learning import learned
from federated.device.backends.torch_merged import merged_handle
from federated.device.backends.torch_mixed import MixedTree, can_mix
from federated.device.prompts import encode_prompt
from federated.device.recipe import Recipe, check_task
from federated.device.records import Embedding, Prompt, Sampling, Stream, Token
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, RawTensor, VersionManifest
from federated.state import AdapterState, from_raw, to_raw
from federated.tasks import Task, make_task

__all__ = ["TorchBackend"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class _Desk:
    """What one request at a time may use: fast tokenizers fail when two threads use one."""

    tokenizer: Any
    task: Task


class TorchBackend:
    """Builds and runs adapters over one base model in memory; implements `federated.device.Backend`.

    It mixes, generates, embeds, merges, reads and trains as well, see `federated.device.backends.protocol`.

    Args:
        base: loaded once; no slot copies or changes its tensors.
        recipe: the task that is answered, and the seed of the null adapter's head.
        base_digest: of the base that versions must be made for; default: this one's. Over a base that the device
            quantised itself, the full base's: `open_runtime` sees to it.

    Raises:
        ModelError: if the base does not fit the task.
    """

    def __init__(self, base: BaseModel, recipe: Recipe, *, base_digest: str | None = None) -> None:
        self._base = base
        self._base_digest = base_digest or base.base_digest
        self._recipe = recipe
        self._null = TorchHandle(null_model(base, recipe.task, seed=recipe.seed))
        self._shared = places(base)
        self._desks: SimpleQueue[_Desk] = SimpleQueue()

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base model that versions are made for."""
        return self._base_digest

    def null(self) -> TorchHandle:
        """The base alone: for language models the very same module, else with a head as it starts."""
        return self._null

    def check(self, manifest: VersionManifest) -> None:
        """Refuse a version whose answers would be read as another task's.

        Raises:
            DeviceError: if the version's task differs, or its head does not fit the task.
        """
        check_task(manifest, self._recipe.task)

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> TorchHandle:
        """A module tree of its own with this adapter, in eval mode, for reading only.

        Raises:
            ModelError: if the tensors do not fit the spec, or the spec does not fit the base.
        """
        adapter = shell(self._base, spec)
        adapter.write(AdapterState(spec, from_raw(tensors)))
        adapter.model.eval().requires_grad_(False)
        return TorchHandle(adapter.model, adapter, spec.peft_type)

    def nbytes(self, handle: TorchHandle) -> int:
        """Bytes of the handle's tensors that are not the base's; the null handle's head is not counted."""
        return 0 if handle is self._null else own_bytes(handle.model, self._shared)

    @torch.no_grad()
    def predict(self, handle: TorchHandle, rows: Sequence[Row]) -> Sequence[Any]:
        """The task's predictions, in the order of the rows."""
        with self._desk() as desk:
            return desk.task.predict(handle.model, rows)

    @cached_property
    def _mixed(self) -> MixedTree:
        return MixedTree(self._base)

    @torch.no_grad()
    def predict_mixed(self, pairs: Sequence[tuple[TorchHandle, Row]]) -> Sequence[Any]:
        """Each row's prediction by its own handle; LoRA and null rows of a mean-pooled head share a batch."""
        made: dict[int, Any] = {}
        with self._desk() as desk:
            for places_ in _batches([handle for handle, _ in pairs]):
                handles, rows = [pairs[at][0] for at in places_], [pairs[at][1] for at in places_]
                same = all(handle is handles[0] for handle in handles)
                model = handles[0].model if same else self._mixed.classifier(handles)
                made |= dict(zip(places_, desk.task.predict(model, rows), strict=True))
        return [made[at] for at in range(len(pairs))]

    def generate(self, handle: TorchHandle, prompt: Prompt, sampling: Sampling) -> Stream:
        """Begin an answer; see `federated.device.backends.protocol.Generates`.

        Raises:
            DeviceError: if the task is no language model's, or the prompt cannot be answered.
        """
        if self._recipe.task.name != "causal_lm":
            raise DeviceError(f"this device answers {self._recipe.task.name}; only causal_lm generates text")
        with self._desk() as desk:
            ids = encode_prompt(desk.tokenizer, prompt)
        virtual = handle.adapter.spec.virtual_tokens if handle.adapter else 0
        check_room_for(self._base, len(ids), sampling, virtual=virtual)
        return Stream(len(ids), self._tokens(handle, ids, sampling))

    def _tokens(self, handle: TorchHandle, ids: list[int], sampling: Sampling) -> Iterator[Token]:
        with self._desk() as desk:

            def decode(made: Sequence[int]) -> str:
                return str(desk.tokenizer.decode(made, skip_special_tokens=True))

            yield from tokens_of(handle.model, ids, sampling, ends=end_tokens(self._base), decode=decode)

    @torch.no_grad()
    def embed(self, handle: TorchHandle, texts: Sequence[str]) -> Sequence[Embedding]:
        """The mean of each text's features, of length 1.

        Raises:
            DeviceError: if the base reads no texts, or the adapter goes around the features.
        """
        with self._desk() as desk:
            return embeddings(self._base, handle, desk.tokenizer, texts)

    def merge(self, handle: TorchHandle) -> TorchHandle:
        """The handle's adapter added into copies of the layers that it adapts.

        Raises:
            DeviceError: if it has no factors.
        """
        return merged_handle(self._base, handle)

    def read(self, handle: TorchHandle) -> tuple[AdapterSpec, Mapping[str, RawTensor]]:
        """The spec and tensors that a handle was built from.

        Raises:
            DeviceError: for the null handle and for merged ones.
        """
        if handle.adapter is None:
            raise DeviceError(f"a {handle.kind} slot holds no adapter to read; name an installed version's slot")
        return handle.adapter.spec, to_raw(handle.adapter.read().tensors)

    def learn(
        self, handle: TorchHandle, spec: AdapterSpec, tensors: Mapping[str, RawTensor], lesson: Lesson
    ) -> Learned:
        """Train a personal adapter over a frozen one; see `federated.device.backends.protocol.Learns`.

        Raises:
            DeviceError: for a handle without an adapter.
            FederatedError: if the spec does not fit, or training fails.
        """
        with self._desk() as desk:
            return learned(self._base, desk.task, handle, (spec, tensors), lesson)

    def measure(self, handle: TorchHandle, rows: Sequence[Row]) -> Mapping[str, float]:
        """Mean loss and the task's metrics on labelled rows."""
        with self._desk() as desk:
            return desk.task.evaluate(handle.model, desk.task.encode(rows), batch_size=32).to_dict()

    @contextmanager
    def _desk(self) -> Iterator[_Desk]:
        """A tokenizer and a task that nobody else uses meanwhile."""
        try:
            desk = self._desks.get_nowait()
        except Empty:
            tokenizer = copy.deepcopy(self._base.tokenizer)
            desk = _Desk(tokenizer, make_task(self._recipe.task, tokenizer))
        try:
            yield desk
        finally:
            self._desks.put(desk)


def _batches(handles: Sequence[TorchHandle]) -> list[list[int]]:
    """Which rows go together: all that mix, those of each handle side by side; then those of each other handle."""
    rows: dict[int, list[int]] = {}
    for at, handle in enumerate(handles):
        rows.setdefault(id(handle), []).append(at)
    together = [at for one in rows.values() if can_mix(handles[one[0]]) for at in one]
    alone = [one for one in rows.values() if not can_mix(handles[one[0]])]
    return [together, *alone] if together else alone
