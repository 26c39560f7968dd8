"""Versions that a device must refuse, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.device import AdapterRuntime, Slot
from federated.errors import BaseMismatch, DeviceError, FederatedError, WireError
from federated.manifest import AdapterSpec, ModuleSpec, RawTensor, VersionManifest, sha256_hex
from federated.wire import encode_tensors

BASE = "b" * 64
SPEC = AdapterSpec("lora", 2, 4.0, False, (ModuleSpec("layer", 3, 3, 2, 4.0),))


class Backend:
    """Accepts one task and one spec."""

    base_digest = BASE

    def null(self) -> str:
        return "null"

    def check(self, manifest: VersionManifest) -> None:
        if manifest.task:
            raise DeviceError("this device answers another task")

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> str:
        if spec != SPEC:
            raise DeviceError("the tensors do not fit the spec")
        return "adapter"

    def nbytes(self, handle: str) -> int:
        return 100

    def predict(self, handle: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
        return [handle for _ in rows]


def encoded(value: float) -> bytes:
    return encode_tensors({"layer.factor_a": RawTensor.from_array(np.full((2, 3), value, np.float32))})


def manifest_of(weights: bytes, **changes: Any) -> VersionManifest:
    return replace(VersionManifest(sha256_hex(weights), BASE, SPEC, "fedit", "run", 1), **changes)


def install(runtime: AdapterRuntime, weights: bytes, **changes: Any) -> Slot:
    manifest = manifest_of(weights, **changes)
    return runtime.install(manifest, weights, version_id=manifest.version_id)


def wrong_base(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(2), base_digest="c" * 64)


def wrong_spec(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(2), spec=replace(SPEC, alpha=8.0))


def wrong_task(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(2), task={"name": "another"})


def not_servable(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(2), servable=False)


def no_tensors(runtime: AdapterRuntime) -> None:
    install(runtime, b"\x80\x04]\x94.")


def not_finite(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(float("nan")))


def infinite(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(float("-inf")))


def another_record(runtime: AdapterRuntime) -> None:
    runtime.install(manifest_of(encoded(2)), encoded(2), version_id=manifest_of(encoded(3)).version_id)


def truncated(runtime: AdapterRuntime) -> None:
    runtime.install(manifest_of(encoded(2)), encoded(2)[:-1], version_id=manifest_of(encoded(2)).version_id)


def flipped(runtime: AdapterRuntime) -> None:
    weights = bytearray(encoded(2))
    weights[-1] ^= 1
    runtime.install(manifest_of(encoded(2)), bytes(weights), version_id=manifest_of(encoded(2)).version_id)


def resident_weights_with_another_meaning(runtime: AdapterRuntime) -> None:
    install(runtime, encoded(1), spec=replace(SPEC, alpha=8.0))


REFUSED: list[tuple[Callable[[AdapterRuntime], None], type[FederatedError], str]] = [
    (wrong_base, BaseMismatch, "belongs to the base model cccccccccccc; this device holds bbbbbbbbbbbb"),
    (wrong_spec, DeviceError, "do not fit the spec"),
    (wrong_task, DeviceError, "another task"),
    (not_servable, DeviceError, "cannot be served"),
    (no_tensors, WireError, "expected at least"),
    (not_finite, DeviceError, "layer.factor_a holds NaN or infinity"),
    (infinite, DeviceError, "layer.factor_a holds NaN or infinity"),
    (another_record, DeviceError, "found the record of"),
    (truncated, DeviceError, "the bytes are damaged"),
    (flipped, DeviceError, "the bytes are damaged"),
    (resident_weights_with_another_meaning, DeviceError, "under another adapter spec"),
]


@pytest.mark.parametrize(("attempt", "error", "message"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_a_bad_version_is_refused_and_nothing_changes(
    attempt: Callable[[AdapterRuntime], None], error: type[FederatedError], message: str
) -> None:
    runtime = AdapterRuntime(Backend(), capacity=1)
    good = install(runtime, encoded(1))
    runtime.activate(good.digest)
    before = (runtime.slots, runtime.active, runtime.history, runtime.pins)
    with pytest.raises(error, match=message):
        attempt(runtime)
    assert (runtime.slots, runtime.active, runtime.history, runtime.pins) == before
    assert runtime.predict([{}]).predictions == ["adapter"]
