"""What a runtime asks of whatever builds and runs models. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from federated.manifest import AdapterSpec, RawTensor, VersionManifest

__all__ = ["Backend"]


class Backend(Protocol):
    """Builds and runs models over one base model.

    A handle is never changed after it is built, and different threads may run any handles at once, the same one
    included.
    """

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base model."""
        ...

    def null(self) -> Any:
        """The handle of the base alone."""
        ...

    def check(self, manifest: VersionManifest) -> None:
        """Refuse a version that this backend cannot answer for, before anything is decoded.

        Raises:
            DeviceError: for another task than this backend's.
        """
        ...

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> Any:
        """A new handle: the base with this adapter.

        Args:
            spec: the adapter's algebra.
            tensors: canonical name to tensor, all of the adapter's.

        Raises:
            FederatedError: if the tensors do not fit the spec, or the spec does not fit the base.
        """
        ...

    def predict(self, handle: Any, rows: Sequence[Mapping[str, Any]]) -> Sequence[Any]:
        """Answers in the order of the rows."""
        ...
