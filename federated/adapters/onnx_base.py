"""A base model as ONNX, with slots where an adapter's tensors go: what a device without torch serves.

The model is exported as it is adapted here (`federated.adapters.shell`): peft's LoRA around each layer, with scaling 1
and the task's head. Afterwards every tensor of the adapter becomes a slot, which is an input with a default: factors of
rank 0, and the head as it starts, so that the base alone answers as the null adapter.

torch's exporter follows one forward pass, and what it took for a constant there would be wrong for other inputs, so
what was exported is run in onnxruntime, at several shapes, with adapters of several ranks and none, and compared with
torch before it is kept. torch has another exporter, which reads the program; it took fifteen times as long for the same
numbers, and needs one more package.

Needs the ``onnx`` extra. Called by `federated.release.export_onnx`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import InferenceSession, SessionOptions
from torch import Tensor, nn

from federated.adapters.base import BaseModel
from federated.adapters.model import AdapterModel, null_model, shell
from federated.adapters.onnx_text import check_generation, stop_ids, tokenizer_json
from federated.config import TaskConfig
from federated.errors import ModelError
from federated.manifest import AdapterSpec, sha256_hex
from federated.onnx_layout import (
    ANSWERED_BY,
    LOGITS,
    METADATA,
    NO_ADAPTER,
    RECORD,
    OnnxBase,
    OnnxTokenizer,
    check_kind,
    fold,
)
from federated.state import AdapterState, to_raw

__all__ = ["MODEL_FILE", "TOKENIZER_FILE", "write_onnx_base"]

MODEL_FILE, TOKENIZER_FILE, _DATA_FILE = "base.onnx", "tokenizer.json", "base.onnx.data"
_OPSET = 18
_WITHIN = 1e-4
"""Largest difference from torch that float32 explains, relative to the largest logit."""
_LARGEST_FILE = 2**30
"""Beyond it (protobuf ends at 2 GiB) weights go into a file of their own."""

_CHECKS = ((1, 1, 1), (3, 11, 2), (2, 5, 0))
"""(batch, time, rank) at which an exported base is compared with torch; 0 is the null adapter."""


def write_onnx_base(base: BaseModel, spec: AdapterSpec, task: TaskConfig, folder: Path) -> OnnxBase:
    """Export a base model with slots for adapters like one that there is.

    Args:
        base: float32.
        spec: of an adapter: its layers get slots, and its head's seed is the null adapter's. Ranks do not matter.
        task: decides the head, and goes into the record.
        folder: empty; gets ``base.onnx``, ``tokenizer.json`` where rows are texts, and ``base.onnx.data`` where the
            model is large.

    Returns:
        The record that is in the file.

    Raises:
        ModelError: for a kind of adapter that slots cannot hold, a base that is not float32, an architecture that torch
            cannot export, or a result that differs from torch.
    """
    _check(base, spec)
    adapter = shell(base, _slotted(spec))
    start = adapter.masters()
    _fill(adapter, 1)
    with tempfile.TemporaryDirectory() as place:
        model = _exported(adapter, Path(place))
        record = _record(base, spec, task, start)
        _open_slots(model, _names(adapter), start, record)
        _write_tokenizer(base, folder)
        _save(model, folder)
    _compare(folder / MODEL_FILE, adapter, null_model(base, task, seed=spec.head.seed if spec.head else 0))
    return record


def _check(base: BaseModel, spec: AdapterSpec) -> None:
    check_kind(spec)
    dtypes = sorted({str(tensor.dtype) for tensor in base.model.parameters()})
    if dtypes != ["torch.float32"]:
        raise ModelError(f"the base model is {', '.join(dtypes)}; a float32 one is exported: set model.dtype=float32")
    if base.kind == "decoder":
        check_generation(base.model)


def _slotted(spec: AdapterSpec) -> AdapterSpec:
    """The spec of the tree that is exported: scaling 1, a small rank, and a head of its own where there is one."""
    sizes = [(module, min(2, module.d_in, module.d_out)) for module in spec.modules]
    modules = tuple(replace(module, rank=rank, alpha=float(rank)) for module, rank in sizes)
    head = None if spec.head is None else replace(spec.head, trained=True)
    if not modules:
        return AdapterSpec("head", 0, 0.0, use_rslora=False, modules=(), head=head)
    return AdapterSpec("lora", 2, 2.0, use_rslora=False, modules=modules, head=head)


def _fill(adapter: AdapterModel, seed: int, rank: int | None = None) -> None:
    """Random values: the exporter makes one constant of equal tensors, and zeros would prove nothing."""
    generator = torch.Generator().manual_seed(seed)
    spec = adapter.spec if rank is None or not adapter.spec.modules else adapter.spec.with_rank(rank)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.trainable().items()}
    shapes |= {f"{one.name}.factor_a": (one.rank, one.d_in) for one in spec.modules}
    shapes |= {f"{one.name}.factor_b": (one.d_out, one.rank) for one in spec.modules}
    tensors = {name: torch.randn(shapes[name], generator=generator) * 0.1 for name in sorted(shapes)}
    adapter.write(AdapterState(spec, tensors))


class _Whole(nn.Module):
    """A task's model as a function of positional inputs that returns logits alone."""

    def __init__(self, model: nn.Module, *, decoder: bool, series: bool) -> None:
        super().__init__()
        self.model = model
        self._options = {"use_cache": False} if decoder else {}
        self.names = ("values" if series else "input_ids", "attention_mask")

    def forward(self, first: Tensor, attention_mask: Tensor) -> Tensor:
        output = self.model(**{self.names[0]: first, "attention_mask": attention_mask}, **self._options)
        logits: Tensor = getattr(output, "logits", output)
        return logits


def _whole(model: nn.Module, adapter: AdapterModel) -> _Whole:
    headless = adapter.spec.head is None
    return _Whole(model, decoder=headless, series=adapter.base.kind == "module").eval()


def _inputs(base: BaseModel, batch: int, time: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random inputs; the last row is padded to half of its length."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, time, dtype=torch.long)
    if batch > 1:
        mask[-1, (time + 1) // 2 :] = 0
    if base.kind != "module":
        words: Any = base.model.get_input_embeddings()  # type: ignore[operator]
        return torch.randint(0, words.weight.shape[0], (batch, time), generator=generator), mask
    channels = getattr(base.model, "channels", None)
    if not isinstance(channels, int):
        raise ModelError(f"base model {base.source} does not say how many channels it reads; give it `channels`")
    return torch.randn(batch, time, channels, generator=generator), mask


def _exported(adapter: AdapterModel, folder: Path) -> onnx.ModelProto:
    whole = _whole(adapter.model, adapter)
    axes = {name: {0: "batch", 1: "time"} for name in whole.names}
    axes[LOGITS] = {0: "batch", 1: "time"} if adapter.spec.head is None else {0: "batch"}
    path = folder / MODEL_FILE
    try:
        with _quiet(), torch.no_grad():
            torch.onnx.export(
                whole, _inputs(adapter.base, 2, 7, 0), str(path), dynamo=False, input_names=list(whole.names),
                output_names=[LOGITS], dynamic_axes=axes, opset_version=_OPSET, do_constant_folding=False,
            )  # fmt: skip
        return onnx.load(str(path))
    except Exception as error:  # exporters raise nearly anything; the cause is kept in one line
        cause = next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
        raise ModelError(f"torch cannot export {type(adapter.base.model).__name__} to ONNX: {cause[:300]}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without notices about constants in the trace, which `_compare` looks for itself, and about the exporter's age."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
        yield


def _names(adapter: AdapterModel) -> dict[str, str]:
    """Canonical name of each of the adapter's tensors by its name in the graph."""
    live = {id(tensor): name for name, tensor in adapter.trainable().items()}
    named = _whole(adapter.model, adapter).named_parameters()
    return {name: live[id(tensor)] for name, tensor in named if id(tensor) in live}


def _null_value(name: str, start: Tensor) -> npt.NDArray[np.float32]:
    value: npt.NDArray[np.float32] = start.numpy()
    if name.endswith(".factor_a"):
        value = value[:0]
    elif name.endswith(".factor_b"):
        value = value[:, :0]
    return np.ascontiguousarray(value)


def _record(base: BaseModel, spec: AdapterSpec, task: TaskConfig, start: Mapping[str, Tensor]) -> OnnxBase:
    tokenizer = None
    if base.tokenizer is not None:
        tokenizer = OnnxTokenizer(
            digest=sha256_hex(tokenizer_json(base.tokenizer)),
            pad=int(base.tokenizer.pad_token_id),
            stop=stop_ids(base.model) if spec.head is None else (),
            truncation_side=str(base.tokenizer.truncation_side),
        )
    return OnnxBase(
        base_digest=base.base_digest,
        task=asdict(task),
        slots={name: _null_value(name, tensor).shape for name, tensor in sorted(start.items())},
        head=None if spec.head is None else replace(spec.head, trained=True),
        tokenizer=tokenizer,
        base=base.parts,
    )


def _open_slots(
    model: onnx.ModelProto, names: Mapping[str, str], start: Mapping[str, Tensor], record: OnnxBase
) -> None:
    """Make slots of the adapter's tensors, add the adapter's record, and write the base's record into the metadata."""
    graph = model.graph
    for node in graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = names.get(name, name)
    kept = [tensor for tensor in graph.initializer if tensor.name not in names]
    found = {names[tensor.name] for tensor in graph.initializer if tensor.name in names}
    if found != set(start):
        lost = min(set(start) - found)
        raise ModelError(f"the exported model does not use {lost} as the adapter does; it cannot be given slots")
    del graph.initializer[:], graph.value_info[:]  # shapes between the layers name the rank that was exported with
    graph.initializer.extend(kept)
    for name in sorted(start):
        _add_slot(graph, name, _null_value(name, start[name]))
    _add_slot(graph, RECORD, np.frombuffer(NO_ADAPTER, np.uint8))
    graph.node.append(helper.make_node("Identity", [RECORD], [ANSWERED_BY], name=ANSWERED_BY))
    graph.output.append(helper.make_tensor_value_info(ANSWERED_BY, TensorProto.UINT8, [f"{RECORD}_bytes"]))
    helper.set_model_props(model, {METADATA: record.to_json()})
    model.producer_name, model.producer_version = "federated-peft", ""


def _add_slot(graph: onnx.GraphProto, name: str, value: npt.NDArray[Any]) -> None:
    shape: list[int | str] = list(value.shape)
    if name.endswith(".factor_a"):
        shape[0] = name.removesuffix("factor_a") + "rank"
    elif name.endswith(".factor_b"):
        shape[1] = name.removesuffix("factor_b") + "rank"
    elif name == RECORD:
        shape[0] = f"{RECORD}_bytes"
    graph.initializer.append(numpy_helper.from_array(value, name))
    graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape))


def _write_tokenizer(base: BaseModel, folder: Path) -> None:
    if base.tokenizer is not None:
        (folder / TOKENIZER_FILE).write_bytes(tokenizer_json(base.tokenizer))


def _save(model: onnx.ModelProto, folder: Path) -> None:
    large = sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST_FILE
    options: dict[str, Any] = {"save_as_external_data": True, "location": _DATA_FILE} if large else {}
    onnx.save(model, str(folder / MODEL_FILE), **options)
    onnx.checker.check_model(str(folder / MODEL_FILE))


def _compare(path: Path, adapter: AdapterModel, null: nn.Module) -> None:
    options = SessionOptions()
    options.log_severity_level = 3  # it warns about every slot
    session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    for number, (batch, time, rank) in enumerate(_CHECKS, start=2):
        if rank:
            _fill(adapter, number, rank)
        slots = fold(adapter.spec, to_raw(adapter.masters())) if rank else {}
        whole = _whole(adapter.model if rank else null, adapter)
        first, mask = _inputs(adapter.base, batch, time, number)
        with torch.no_grad():
            expected = whole(first, mask).numpy()
        given = dict(zip(whole.names, (first.numpy(), mask.numpy()), strict=True))
        found = session.run([LOGITS], given | slots)[0]
        _check_close(found, expected, real=mask.bool().numpy() if adapter.spec.head is None else None)


def _check_close(found: Any, expected: Any, real: Any) -> None:
    if real is not None:  # what a language model says on padding means nothing
        found, expected = found[real], expected[real]
    gap, scale = np.abs(found - expected).max(), max(1.0, np.abs(expected).max())
    if not gap <= _WITHIN * scale:
        raise ModelError(
            f"the exported model's logits differ from torch's by {gap:.2g}; expected at most {_WITHIN * scale:.2g}: "
            "torch's exporter does not follow this architecture, serve it with torch"
        )
