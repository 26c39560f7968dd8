"""A version on its way out: its record, its weights, and whatever else is released with it.

Knows no database: `Artefact.of` asks a registry that is handed in for bytes. The publisher takes artefacts alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from federated.errors import ReleaseError
from federated.manifest import VersionManifest, canonical_json, sha256_hex
from federated.release.records import Variant, check_variants
from federated.release.roles import MANIFEST, WEIGHTS, check_file

if TYPE_CHECKING:
    from federated.registry import Registry

__all__ = ["Artefact"]


@dataclass(frozen=True)
class Artefact:
    """What is released of one version.

    Args:
        manifest: the version's record.
        weights: its full canonical weights, which ``manifest.weights_digest`` names.
        files: by name, what else there is: variants, diffs, exports.
        variants: what is said of those files that are weights on another way; see `with_variants`.
        loss: held-out loss of the weights, where it was measured.

    Raises:
        ReleaseError: if the weights are others, the version cannot be served, or a name or variant cannot be.
    """

    manifest: VersionManifest
    weights: bytes = field(repr=False)
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    variants: tuple[Variant, ...] = ()
    loss: float | None = None

    def __post_init__(self) -> None:
        found = sha256_hex(self.weights)
        if found != self.manifest.weights_digest:
            raise ReleaseError(f"the weights' SHA-256 is {found}, the manifest says {self.manifest.weights_digest}")
        if not self.manifest.servable:
            raise ReleaseError(
                f"version {self.manifest.version_id[:12]} cannot be served (clients hold the rest of the model), so it "
                f"is not released"
            )
        for name in self.files:
            check_file(name)
            if name in (MANIFEST, WEIGHTS):
                raise ReleaseError(f"{name} is there already; choose another name")
        try:
            check_variants(self.variants, self.files, self.manifest.weights_digest)
        except ValueError as error:
            raise ReleaseError(f"{error}; make variants with federated.release.with_variants") from error

    @classmethod
    def of(cls, registry: Registry, name: str, files: Mapping[str, bytes] | None = None) -> Self:
        """A version of a registry.

        Args:
            registry: open.
            name: as in `Registry.get`.
            files: as above.

        Raises:
            RegistryError: as the registry raises it.
            ReleaseError: see the class.
        """
        record = registry.get(name)
        return cls(record.manifest, registry.weights(record.version_id), files or {})

    @property
    def version_id(self) -> str:
        """Digest of the manifest."""
        return self.manifest.version_id

    def contents(self) -> dict[str, bytes]:
        """Everything as files, the record's bytes being those that its id is the digest of."""
        return {MANIFEST: canonical_json(self.manifest.to_dict()), WEIGHTS: self.weights, **self.files}
