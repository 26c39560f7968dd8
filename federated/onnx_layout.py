"""What a base model in ONNX and its adapters agree on: slots, records, and an adapter's tensors as slots hold them.

Of each layer y = W x, an exported base computes

    y = W x + factor_b (factor_a x)

where ``factor_a`` (rank x d_in) and ``factor_b`` (d_out x rank) are slots: inputs that an adapter sets for a run, of
any rank, and which without an adapter have rank 0. The scaling is multiplied into ``factor_b``. A task's head is slots
too. Where an adapter and a base were exported by different recipes, names differ, nothing is set, and the base answers
as if all were well. So a base says in its metadata what it is and which slots it has, an adapter says in a slot of its
own what it is (`RECORD`), and the base repeats that as an output of every run (`ANSWERED_BY`).

Plain data and numpy: no torch, no onnxruntime. Called by `federated.adapters.onnx_base`, which writes bases, by
`federated.onnx_adapter`, which writes adapters, and by `federated.device.backends.onnx`, which runs both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from federated.errors import BaseMismatch, ModelError
from federated.manifest import AdapterSpec, HeadSpec, RawTensor, canonical_json

__all__ = [
    "ANSWERED_BY",
    "KINDS",
    "LOGITS",
    "METADATA",
    "NO_ADAPTER",
    "RECORD",
    "AdapterRecord",
    "OnnxBase",
    "OnnxTokenizer",
    "check_kind",
    "fold",
    "is_factor",
]

FORMAT_VERSION = 1
METADATA = "fedpeft.base"
"""Key in the ONNX model's metadata under which its `OnnxBase` stands, as canonical JSON."""

RECORD, ANSWERED_BY, LOGITS = "adapter_record", "answered_by", "logits"
"""The slot for an adapter's own record (uint8), the output that repeats it, and the output that matters."""

NO_ADAPTER = b"null"
"""What ``answered_by`` is without an adapter."""

KINDS = ("lora", "lora_xs", "head")
"""Kinds of adapter that slots can hold."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AdapterRecord:
    """Which adapter a file holds.

    Args:
        base_digest: fingerprint of its base model.
        weights_digest: of the canonical bytes from which the file was made.
        version_id: the version that it was exported as; empty where it was made on a device.
    """

    base_digest: str
    weights_digest: str
    version_id: str = ""

    def to_bytes(self) -> bytes:
        """Canonical JSON, as ``adapter_record`` holds it."""
        return canonical_json(asdict(self) | {"format_version": FORMAT_VERSION})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read `to_bytes`.

        Raises:
            ModelError: if it is no such record.
        """
        parts = _parsed(data, "the adapter's record")
        fields = ("base_digest", "weights_digest", "version_id")
        if set(parts) != set(fields) or not all(isinstance(parts[name], str) for name in fields):
            raise ModelError(f"the adapter's record has the fields {sorted(parts)}; expected {sorted(fields)} as texts")
        return cls(**parts)


@dataclass(frozen=True)
class OnnxTokenizer:
    """What a device needs to know of the tokenizer beside a base.

    Args:
        digest: SHA-256 of ``tokenizer.json``.
        pad: id of the padding token.
        stop: ids that end a continuation.
        truncation_side: where long texts are cut, ``"right"`` or ``"left"``.
    """

    digest: str
    pad: int
    stop: tuple[int, ...] = ()
    truncation_side: str = "right"


@dataclass(frozen=True)
class OnnxBase:
    """What an exported base says of itself.

    Args:
        base_digest: fingerprint of the base model, as versions name it.
        task: what it answers: a `federated.config.TaskConfig` as plain data.
        slots: name to shape without an adapter: 0 where the rank stands.
        head: the task's head as it starts, whose tensors are slots too; None for language models.
        tokenizer: None where rows are no texts.
        base: digests of the base's parts, as in `federated.manifest.VersionManifest`.
    """

    base_digest: str
    task: Mapping[str, Any]
    slots: Mapping[str, tuple[int, ...]]
    head: HeadSpec | None = None
    tokenizer: OnnxTokenizer | None = None
    base: Mapping[str, str | None] = field(default_factory=dict)

    def to_json(self) -> str:
        """Canonical JSON."""
        return canonical_json(asdict(self) | {"format_version": FORMAT_VERSION}).decode()

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read `to_json`.

        Raises:
            ModelError: if it is no such record.
        """
        parts = _parsed(text.encode(), "the exported base's record")
        try:
            parts["slots"] = {str(name): tuple(int(size) for size in shape) for name, shape in parts["slots"].items()}
            parts["head"] = None if parts["head"] is None else HeadSpec(**parts["head"])
            if parts["tokenizer"] is not None:
                ids = tuple(int(one) for one in parts["tokenizer"]["stop"])
                parts["tokenizer"] = OnnxTokenizer(**parts["tokenizer"] | {"stop": ids})
            return cls(**parts)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"the exported base's record is damaged ({error}); export the base again") from None

    def check(self, record: AdapterRecord, parameters: Mapping[str, Array]) -> None:
        """Refuse an adapter that would not do on this base what it was trained to do.

        Args:
            record: which adapter it is.
            parameters: what it sets, by slot.

        Raises:
            BaseMismatch: if it belongs to another base model.
            ModelError: if it sets what is no slot here, or sets it to another shape, or only a part of what belongs
                together.
        """
        if record.base_digest != self.base_digest:
            raise BaseMismatch(
                f"the adapter {record.weights_digest[:12]} belongs to the base model {record.base_digest[:12]}; the "
                f"exported base is {self.base_digest[:12]}: export the base that the adapter was trained on"
            )
        if not parameters:
            raise ModelError("the adapter sets nothing at all: the base alone would answer")
        strange = sorted(set(parameters) - set(self.slots))
        if strange:
            raise ModelError(
                f"the adapter sets {strange[0]} and {len(strange) - 1} others, for which this base was exported "
                "without slots: the base alone would answer; export the base for this version"
            )
        for name, value in parameters.items():
            _check_shape(name, value.shape, self.slots[name])
        self._check_whole(parameters)

    def _check_whole(self, parameters: Mapping[str, Array]) -> None:
        ranks: dict[str, set[int]] = {}
        for name, value in parameters.items():
            if is_factor(name):
                layer, _, factor = name.rpartition(".")
                ranks.setdefault(layer, set()).add(value.shape[0 if factor == "factor_a" else 1])
                other = f"{layer}.{'factor_b' if factor == 'factor_a' else 'factor_a'}"
                if other not in parameters:
                    raise ModelError(f"the adapter sets {name} without {other}; expected both factors of a layer")
        odd = sorted(layer for layer, found in ranks.items() if len(found) > 1)
        if odd:
            raise ModelError(f"the adapter's factors of {odd[0]} have ranks {sorted(ranks[odd[0]])}; expected one")
        head = {name for name in self.slots if not is_factor(name)}
        missing = sorted(head - set(parameters)) if head & set(parameters) else []
        if missing:
            raise ModelError(f"the adapter sets a part of the head, without {missing[0]}; expected all of it or none")


def _check_shape(name: str, found: tuple[int, ...], slot: tuple[int, ...]) -> None:
    fits = len(found) == len(slot) and all(size in (0, given) for size, given in zip(slot, found, strict=True))
    if not fits:
        expected = ["rank" if is_factor(name) and not size else size for size in slot]
        raise ModelError(f"the adapter sets {name} to the shape {list(found)}; this base has {expected}")


def _parsed(data: bytes, what: str) -> dict[str, Any]:
    try:
        parts = json.loads(data)
        version = parts.pop("format_version")
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ModelError(f"{what} is none of ours; expected what federated-peft exported") from None
    if version != FORMAT_VERSION:
        raise ModelError(f"{what} has format {version}; this library reads {FORMAT_VERSION}: export it again")
    return dict(parts)


def is_factor(name: str) -> bool:
    """Whether a slot is a layer's factor, and not a part of the head."""
    return name.endswith((".factor_a", ".factor_b"))


def check_kind(spec: AdapterSpec) -> None:
    """Refuse a kind of adapter that slots cannot hold.

    Raises:
        ModelError: naming it.
    """
    if spec.peft_type not in KINDS:
        raise ModelError(
            f"an adapter of kind {spec.peft_type} cannot be given to an ONNX model run by run; expected one of "
            f"{', '.join(KINDS)}: serve it with torch"
        )


def fold(spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> dict[str, Array]:
    """An adapter's tensors as slots hold them: scaling and core multiplied in (in float64), all of it float32.

        >>> from federated.manifest import ModuleSpec
        >>> spec = AdapterSpec("lora", 1, 2.0, False, (ModuleSpec("layer", 1, 1, 1, 2.0),))
        >>> one = RawTensor.from_array(np.ones((1, 1), np.float32))
        >>> fold(spec, {"layer.factor_a": one, "layer.factor_b": one})["layer.factor_b"]
        array([[2.]], dtype=float32)

    Args:
        spec: the adapter's algebra.
        tensors: canonical name to tensor, all of the adapter's.

    Raises:
        ModelError: for a kind of adapter that slots cannot hold, tensors that are not the spec's, or a product that
            float32 cannot hold.
    """
    check_kind(spec)
    folded, left = {}, dict(tensors)
    for module in spec.modules:
        shapes = {"factor_a": (module.rank, module.d_in), "factor_b": (module.d_out, module.rank)}
        shapes |= {"core": (module.rank, module.rank)} if spec.has_core else {}
        parts = {name: _take(left, f"{module.name}.{name}", shape) for name, shape in shapes.items()}
        factor_a = parts["core"] @ parts["factor_a"] if spec.has_core else parts["factor_a"]
        folded[f"{module.name}.factor_a"] = _single(factor_a, module.name)
        folded[f"{module.name}.factor_b"] = _single(parts["factor_b"] * spec.scaling(module), module.name)
    trained = spec.head is not None and spec.head.trained
    if bool(left) != trained:
        found = f"{min(left)} besides its factors" if left else "no tensor of its head"
        raise ModelError(f"the adapter has {found}; expected what its spec says: {_head_of(spec)}")
    return folded | {name: _single(tensor.array, name) for name, tensor in left.items()}


def _take(left: dict[str, RawTensor], name: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    tensor = left.pop(name, None)
    if tensor is None or tensor.shape != shape:
        found = "nothing" if tensor is None else str(list(tensor.shape))
        raise ModelError(f"adapter tensor {name}: found {found}, expected {list(shape)}")
    return tensor.array.astype(np.float64)


def _single(value: npt.NDArray[Any], name: str) -> Array:
    with np.errstate(over="ignore"):
        single = np.ascontiguousarray(value, dtype=np.float32)
    if not np.isfinite(single).all():
        raise ModelError(f"the adapter's values of {name} are beyond float32 or not finite; it cannot be exported")
    return single


def _head_of(spec: AdapterSpec) -> str:
    if spec.head is None:
        return "no head"
    return f"a {'trained' if spec.head.trained else 'frozen'} {spec.head.kind} head"
