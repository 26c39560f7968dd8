"""Records that name things: digests, adapter specs, tensor layouts, envelopes and version manifests.

Plain data, canonical bytes, no torch: a device that only verifies and routes imports this and nothing heavier.
It does not read files and knows no database; `federated.wire`, `federated.registry` and `federated.device` do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from federated.digests import canonical_json, digest_of, sha256_hex
from federated.train_plan import TrainPlan

__all__ = [
    "PROTOCOL_VERSION",
    "DTYPE_BYTES",
    "AdapterSpec",
    "Envelope",
    "HeadSpec",
    "ModuleSpec",
    "RawTensor",
    "TensorEntry",
    "TensorLayout",
    "TrainPlan",
    "VersionManifest",
    "canonical_json",
    "digest_of",
    "layout_of",
    "sha256_hex",
]

PROTOCOL_VERSION = 1

DTYPE_BYTES: Mapping[str, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "U8": 1}
"""safetensors' names of the dtypes that may travel or be stored, with their size in bytes."""

_NUMPY: Mapping[str, str] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "U8": "|u1"}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor's place in a layout: its name, shape and safetensors dtype (``"F32"``, ``"BF16"`` ...)."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size of the tensor's data in bytes."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


TensorLayout = tuple[TensorEntry, ...]
"""The exact tensors of a payload, sorted by name."""


@dataclass(frozen=True)
class RawTensor:
    """A tensor as bytes: what the wire and the registry hold, whatever framework made it.

    Args:
        dtype: safetensors' name of the dtype; bfloat16 has no numpy type and is kept as its raw bits.
        shape, data: sizes, and little-endian row-major bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    @property
    def bits(self) -> npt.NDArray[Any]:
        """A read-only numpy view of the stored bits (bfloat16 as uint16); no copy."""
        return np.frombuffer(self.data, dtype=_NUMPY[self.dtype]).reshape(self.shape)

    @property
    def array(self) -> npt.NDArray[Any]:
        """The values as numpy; bfloat16 widened to float32 (exact), the others a read-only view."""
        if self.dtype != "BF16":
            return self.bits
        return (self.bits.astype(np.uint32) << 16).view(np.float32)

    @classmethod
    def from_array(cls, array: npt.NDArray[Any]) -> Self:
        """Wrap a float16/32/64, int64 or uint8 array (copied when it is not contiguous).

        Raises:
            ValueError: if the dtype cannot travel.
        """
        name = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "u1": "U8"}.get(array.dtype.str[1:])
        if name is None:
            raise ValueError(f"dtype {array.dtype} cannot travel; expected float16, float32, float64, int64 or uint8")
        ordered = np.ascontiguousarray(array, dtype=_NUMPY[name])
        return cls(name, tuple(array.shape), ordered.tobytes())

    def entry(self, name: str) -> TensorEntry:
        """This tensor's line in a layout."""
        return TensorEntry(name, self.shape, self.dtype)


@dataclass(frozen=True)
class ModuleSpec:
    """One adapted layer: its module path in the base model and the algebra of its factors.

    ``factor_a`` is ``rank x d_in``, ``factor_b`` is ``d_out x rank`` and the effective update is
    ``scaling * factor_b @ factor_a`` (``d_out x d_in``), transposed when ``fan_in_fan_out`` (Conv1D) stores it so. Of
    ``lora_xs`` it is ``scaling * factor_b @ core @ factor_a``.
    """

    name: str
    d_in: int
    d_out: int
    rank: int
    alpha: float
    fan_in_fan_out: bool = False


@dataclass(frozen=True)
class HeadSpec:
    """A task head on top of the base model.

    ``kind`` is ``"stock"`` (the architecture's own) or ``"mean_pool"``; ``trained`` says whether it travels with the
    adapter: a frozen head is rebuilt from ``seed``, which seeds its first weights.
    """

    kind: str
    num_labels: int
    trained: bool
    seed: int


@dataclass(frozen=True)
class AdapterSpec:
    """Everything that must agree before two adapters may be added.

    Args:
        peft_type: ``"lora"``; ``"lora_xs"``: each module has a core (rank x rank) between its frozen factors; or
            without factors ``"ia3"``, ``"layernorm"``, ``"head"``, ``"full"``, ``"prompt"`` or ``"prefix"``.
        rank, alpha: LoRA's r, the largest one where modules differ, and ``lora_alpha``; 0 without factors.
        use_rslora: scale by ``alpha / sqrt(rank)`` in place of ``alpha / rank``.
        modules: the layers that have factors, sorted by name.
        head: the task head, if any.
        dtype: dtype of the tensors that a device holds (``"F32"``, ``"BF16"``, ``"F16"``).
        trained: the other tensors that are trained on the base, sorted by name (IA3's vectors, norms).
        virtual_tokens: length of a soft prompt or a prefix.
    """

    peft_type: str
    rank: int
    alpha: float
    use_rslora: bool
    modules: tuple[ModuleSpec, ...]
    head: HeadSpec | None = None
    dtype: str = "F32"
    trained: tuple[str, ...] = ()
    virtual_tokens: int = 0

    @property
    def has_core(self) -> bool:
        """Whether each module has a core between its factors."""
        return self.peft_type == "lora_xs"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of tensors that such an adapter trains, where nobody says otherwise."""
        return ("core", "dense") if self.has_core else ("factor_a", "factor_b", "dense")

    def scaling(self, module: ModuleSpec) -> float:
        """``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA."""
        return module.alpha / (math.sqrt(module.rank) if self.use_rslora else module.rank)

    def with_rank(self, rank: int) -> Self:
        """The same adapter at another rank, bounded by each layer's smaller side; alpha stays, so scaling changes."""
        modules = tuple(replace(one, rank=min(rank, one.d_in, one.d_out)) for one in self.modules)
        return replace(self, rank=rank, modules=modules)

    @cached_property
    def plain(self) -> Mapping[str, Any]:
        """Plain data, made once, as `from_dict` reads it: shared, so it may not be changed."""
        later = ("trained", "virtual_tokens")  # left out where unused: specs of the first form keep their digests
        return {key: value for key, value in asdict(self).items() if value or key not in later}

    @cached_property
    def digest(self) -> str:
        """Digest of the whole spec."""
        return digest_of(self.plain)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from plain data.

        Raises:
            TypeError: for missing or unknown keys.
        """
        parts = dict(value)
        parts["modules"] = tuple(ModuleSpec(**module) for module in parts["modules"])
        parts["head"] = HeadSpec(**parts["head"]) if parts.get("head") else None
        parts["trained"] = tuple(str(name) for name in parts.get("trained", ()))
        return cls(**parts)


@dataclass(frozen=True)
class Envelope:
    """What stands around every update, so that it can only be used where it belongs.

    Args:
        protocol_version: of this format.
        run_id: the run.
        client_id: stable name of the sender.
        round_number: 1-based.
        phase: exchange within the round, 1-based.
        task_token: proof that the server sampled this client for this round and phase.
        counter: the client's own message counter in this run (against replay).
        parent_version: version id of the adapter that the client trained from.
        base_digest: fingerprint of the base model that the client holds.
        spec: the adapter's algebra.
        plan_digest: digest of the train plan that the client followed.
        layout: the payload's tensors.
        codec: how the payload is encoded; ``"safetensors"``.
        num_examples: training examples behind the update (a claim).
        payload_digest: SHA-256 of the payload bytes.
        signature: hexadecimal signature over the other fields, where devices are enrolled.
    """

    run_id: str
    client_id: str
    round_number: int
    phase: int
    task_token: str
    counter: int
    parent_version: str
    base_digest: str
    spec: AdapterSpec
    plan_digest: str
    layout: TensorLayout
    num_examples: int
    payload_digest: str
    codec: str = "safetensors"
    protocol_version: int = PROTOCOL_VERSION
    signature: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for canonical JSON."""
        layout = [{"name": one.name, "shape": one.shape, "dtype": one.dtype} for one in self.layout]
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"spec": self.spec.plain, "layout": layout}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`, exactly: unknown or missing keys are refused.

        Raises:
            TypeError, KeyError, ValueError: if the value is not an envelope of this shape.
        """
        parts = dict(value)
        parts["spec"] = AdapterSpec.from_dict(parts["spec"])
        parts["layout"] = tuple(
            TensorEntry(str(entry["name"]), tuple(int(size) for size in entry["shape"]), str(entry["dtype"]))
            for entry in parts["layout"]
        )
        envelope = cls(**parts)
        _check_types(envelope)
        return envelope


def _check_types(envelope: Envelope) -> None:
    for name in ("round_number", "phase", "counter", "num_examples", "protocol_version"):
        if type(getattr(envelope, name)) is not int:
            raise ValueError(f"envelope field {name} is not an integer")
    for name in ("run_id", "client_id", "task_token", "parent_version", "base_digest", "plan_digest",
                 "payload_digest", "codec"):  # fmt: skip
        if type(getattr(envelope, name)) is not str:
            raise ValueError(f"envelope field {name} is not a string")


@dataclass(frozen=True)
class VersionManifest:
    """The immutable record of one adapter version; its digest is the version's id.

    Two versions with equal weights (an unchanged round, a rollback) still differ in round, parent or run, and so
    have records of their own.

    Args:
        weights_digest: SHA-256 of the adapter's canonical bytes.
        base_digest: fingerprint of the base model that it belongs to.
        spec: the adapter's algebra.
        method: rule and server optimizer, or ``"central"``.
        run_id: run that made it.
        round_number: 1-based; 0 for the initial adapter of a run.
        parent: version id that it was made from.
        participants: how many clients' updates are in it (never who).
        privacy: what was spent, with its unit; None when nothing was accounted.
        metrics: plain numbers, such as ``train_loss``.
        code_version: version of this library.
        servable: False where clients hold the rest of the model.
        task: what the adapter answers: task name, labels, base model source (plain data, for a device).
        adapter_id: name of the adapter that this is a version of; stays the same over runs.
        release_counter: larger than that of every version of the adapter before; 0 where nobody counted.
        base: the base model's parts and their digests (``class``, ``config``, ``tokenizer``, ``weights``), whose own
            digest is ``base_digest``; empty where they are not known.
        licence: of the adapter, as an SPDX expression; empty where nobody said.
    """

    weights_digest: str
    base_digest: str
    spec: AdapterSpec
    method: str
    run_id: str
    round_number: int
    parent: str | None = None
    participants: int = 0
    privacy: Mapping[str, Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    code_version: str = ""
    servable: bool = True
    task: Mapping[str, Any] = field(default_factory=dict)
    adapter_id: str = ""
    release_counter: int = 0
    base: Mapping[str, str | None] = field(default_factory=dict)
    licence: str = ""

    @property
    def version_id(self) -> str:
        """Digest of the canonical manifest: 64 hexadecimal characters."""
        return digest_of(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for canonical JSON."""
        later = ("adapter_id", "release_counter", "base", "licence")  # left out where unused, as in `AdapterSpec.plain`
        plain = {key: value for key, value in asdict(self).items() if value or key not in later}
        return plain | {"spec": getattr(self.spec, "plain", self.spec)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from `to_dict`.

        Raises:
            TypeError, KeyError: for missing or unknown keys.
        """
        parts = dict(value)
        parts["spec"] = AdapterSpec.from_dict(parts["spec"])
        return cls(**parts)


def layout_of(tensors: Mapping[str, RawTensor]) -> TensorLayout:
    """The layout of named tensors, sorted by name."""
    return tuple(tensors[name].entry(name) for name in sorted(tensors))
