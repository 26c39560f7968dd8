"""Models in torch: one module tree for each slot, all over the base's own tensors.

A tree is filled once and never changed again. That, and not a lock, is what lets slots answer at the same time:
switching adapters on one live model (PEFT's ``set_adapter``, ``hotswap_adapter``) while it answers mixes two adapters
within one forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import torch
from torch import nn

from federated.adapters import BaseModel, null_model, shell
from federated.device.recipe import Recipe, check_task
from federated.manifest import AdapterSpec, RawTensor, VersionManifest
from federated.state import AdapterState, from_raw
from federated.tasks import Task, make_task

__all__ = ["TorchBackend"]


class TorchBackend:
    """Builds and runs adapters over one base model in memory; implements `federated.device.Backend`.

    Args:
        base: loaded once; no slot copies or changes its tensors.
        recipe: the task that is answered, and the seed of the null adapter's head.

    Raises:
        ModelError: if the base does not fit the task.
    """

    def __init__(self, base: BaseModel, recipe: Recipe) -> None:
        self._base = base
        self._recipe = recipe
        self._null = null_model(base, recipe.task, seed=recipe.seed)
        self._tasks: SimpleQueue[Task] = SimpleQueue()

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base model."""
        return self._base.base_digest

    def null(self) -> nn.Module:
        """The base alone: for language models the very same module, else with a head as it starts."""
        return self._null

    def check(self, manifest: VersionManifest) -> None:
        """Refuse a version whose answers would be read as another task's.

        Raises:
            DeviceError: if the version's task differs, or its head does not fit the task.
        """
        check_task(manifest, self._recipe.task)

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> nn.Module:
        """A module tree of its own with this adapter, in eval mode, for reading only.

        Raises:
            ModelError: if the tensors do not fit the spec, or the spec does not fit the base.
        """
        adapter = shell(self._base, spec)
        adapter.write(AdapterState(spec, from_raw(tensors)))
        return adapter.model.eval().requires_grad_(False)

    @torch.no_grad()
    def predict(self, handle: nn.Module, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """The task's predictions, in the order of the rows."""
        with self._task() as task:
            return task.predict(handle, rows)

    @contextmanager
    def _task(self) -> Iterator[Task]:
        """A task that nobody else uses meanwhile: fast tokenizers fail when two threads use one."""
        try:
            task = self._tasks.get_nowait()
        except Empty:
            task = make_task(self._recipe.task, copy.deepcopy(self._base.tokenizer))
        try:
            yield task
        finally:
            self._tasks.put(task)
