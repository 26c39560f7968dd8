"""What a device checks before a version's bytes become a model.

Digest, record, base and values: whatever needs no model. Whether the tensors fit the adapter's spec is the
backend's to say. Imports neither torch nor SQLAlchemy. Called by `federated.device.slots`.
"""

from __future__ import annotations

import numpy as np

from federated.errors import BaseMismatch, DeviceError
from federated.manifest import RawTensor, VersionManifest, sha256_hex
from federated.wire import decode_tensors

__all__ = ["decode", "verify"]


def verify(manifest: VersionManifest, weights: bytes, *, version_id: str, base_digest: str) -> None:
    """Check that record, weights and base belong together.

    Args:
        manifest: the version's record.
        weights: the adapter's canonical bytes.
        version_id: digest by which the version was asked for.
        base_digest: fingerprint of the base model that this device holds.

    Raises:
        BaseMismatch: if the version belongs to another base model.
        DeviceError: if the record is another version's, the version cannot be served, or the bytes are damaged.
    """
    name = version_id[:12]
    if manifest.base_digest != base_digest:
        raise BaseMismatch(
            f"version {name} belongs to the base model {manifest.base_digest[:12]}; this device holds "
            f"{base_digest[:12]}: load that base, or choose a version made for this one"
        )
    if manifest.version_id != version_id:
        raise DeviceError(f"found the record of {manifest.version_id[:12]} where version {name} was expected")
    if not manifest.servable:
        raise DeviceError(f"version {name} cannot be served: its clients hold the rest of the model")
    found = sha256_hex(weights)
    if found != manifest.weights_digest:
        raise DeviceError(
            f"the weights of version {name} have digest {found[:12]}, expected {manifest.weights_digest[:12]}: "
            "the bytes are damaged, fetch them again"
        )


def decode(weights: bytes) -> dict[str, RawTensor]:
    """Canonical name to tensor, every value finite.

    Raises:
        WireError: if the bytes are no tensors of this protocol.
        DeviceError: if a value is NaN or infinite.
    """
    tensors = decode_tensors(weights)
    for name, tensor in tensors.items():
        if not np.isfinite(tensor.array).all():
            raise DeviceError(f"tensor {name} holds NaN or infinity; such an adapter is not installed")
    return tensors
