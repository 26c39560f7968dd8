"""Training a personal adapter in torch, with the library's own trainer. Called by `federated.device.backends.torch`.

The global adapter is frozen beside it (as a residual); the personal one starts as nothing, or where it stood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from federated.adapters import AdapterModel, BaseModel, shell
from federated.device.backends.handles import TorchHandle
from federated.device.backends.protocol import Learned, Lesson
from federated.errors import DeviceError
from federated.manifest import AdapterSpec, RawTensor, TrainPlan
from federated.residual import folded
from federated.state import AdapterState, from_raw, group_of, to_raw
from federated.tasks import Task
from federated.training import LocalData, LocalTrainer

__all__ = ["learned"]


def learned(
    base: BaseModel,
    task: Task,
    handle: TorchHandle,
    personal: tuple[AdapterSpec, Mapping[str, RawTensor]],
    lesson: Lesson,
) -> Learned:
    """Train a personal adapter over the one of a handle; see `federated.device.backends.protocol.Learns`.

    Raises:
        DeviceError: for a handle without an adapter.
        FederatedError: if the spec does not fit, or training fails.
    """
    if handle.adapter is None:
        raise DeviceError(f"a {handle.kind} slot holds no adapter to train on; activate an installed version")
    spec, before = personal[0], from_raw(personal[1])
    model = shell(base, spec, seed=lesson.seed)
    state = _starting(model, folded(handle.adapter.read()), before)
    data = LocalData(train=task.encode(lesson.rows))
    plan = TrainPlan(rank=spec.rank, trainable=spec.groups)
    result = LocalTrainer(model, task, lesson.config).run(state, plan, data, seed=lesson.seed)
    own = {name: tensor for name, tensor in state.tensors.items() if group_of(name) != "dense"} | before
    after = {name: own[name] + delta if name in own else delta for name, delta in result.delta.items()}
    return Learned(to_raw(after), result.metrics)


def _starting(model: AdapterModel, below: AdapterState, before: Mapping[str, Tensor]) -> AdapterState:
    """The personal factors beside the frozen ones, and the sums of all other tensors."""
    dense = {name: tensor.float() + before.get(name, 0.0) for name, tensor in below.dense().items()}
    factors = {name: before.get(name, tensor) for name, tensor in model.masters().items() if group_of(name) != "dense"}
    if not model.spec.modules:
        return AdapterState(model.spec, dense)
    frozen = {name: tensor.float() for name, tensor in below.tensors.items() if group_of(name) != "dense"}
    residual = AdapterState(replace(below.spec, dtype="F32"), frozen)
    return AdapterState(model.spec, {**factors, **dense}, residual=residual)
