"""Where an exported version came from, as SLSA provenance (v1) about the export's files.

Built by this library at one code version, from a base model, a parent version and one round of a run. How many took
part is in it, and what privacy was spent; who took part is in no record, so it cannot be here either.

Source: https://slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from federated.manifest import VersionManifest

__all__ = ["PREDICATE_TYPE", "facts", "provenance"]

PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
_BUILD_TYPE = "urn:federated-peft:export:1"
_BUILDER = "urn:federated-peft:builder"


def provenance(manifest: VersionManifest, files: Mapping[str, str]) -> dict[str, Any]:
    """The statement.

    Args:
        manifest: the version's record.
        files: the export's files: path in the folder to SHA-256.
    """
    return {
        "predicateType": PREDICATE_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicate": {
            "buildDefinition": {
                "buildType": _BUILD_TYPE,
                "externalParameters": {
                    "adapter_id": manifest.adapter_id,
                    "version_id": manifest.version_id,
                    "weights_digest": manifest.weights_digest,
                    "release_counter": manifest.release_counter,
                    "licence": manifest.licence,
                },
                "internalParameters": {
                    "method": manifest.method,
                    "spec_digest": manifest.spec.digest,
                    "participants": manifest.participants,
                    "privacy": manifest.privacy,
                    "metrics": dict(manifest.metrics),
                },
                "resolvedDependencies": _materials(manifest),
            },
            "runDetails": {
                "builder": {"id": _BUILDER, "version": {"federated-peft": manifest.code_version or "unknown"}},
                "metadata": {"invocationId": f"{manifest.run_id}/{manifest.round_number}"},
            },
        },
    }


def facts(predicate: Any) -> dict[str, str]:
    """What a predicate says, in words for people.

    Args:
        predicate: of `provenance`; from elsewhere, it may be anything.

    Raises:
        KeyError, TypeError, ValueError: if it is another one.
    """
    definition = predicate["buildDefinition"]
    how, materials = definition["internalParameters"], definition["resolvedDependencies"]
    digests = {one["name"]: one["digest"]["sha256"] for one in materials if "digest" in one}
    (where,) = (one["annotations"] for one in materials if one["name"] == "round")
    accounts = (how["privacy"] or {}).get("accounts", ())
    spent = [f"{one['unit']}: epsilon {one['epsilon']} at target_delta {one['target_delta']}" for one in accounts]
    return {
        "version": str(definition["externalParameters"]["version_id"]),
        "base digest": str(digests["base model"]),
        "parent version": str(digests.get("parent version", "none")),
        "round": f"{where['round_number']} of {where['run_id']}",
        "method": str(how["method"]),
        "participants": str(how["participants"]),
        "privacy": "; ".join(spent) or "not accounted",
    }


def _materials(manifest: VersionManifest) -> list[dict[str, Any]]:
    base = {key: value for key, value in manifest.base.items() if value}
    found: list[dict[str, Any]] = [
        {"name": "base model", "digest": {"sha256": manifest.base_digest}, "annotations": base},
        {
            "name": "round",
            "uri": f"urn:federated-peft:run:{manifest.run_id}",
            "annotations": {"run_id": manifest.run_id, "round_number": manifest.round_number},
        },
    ]
    if manifest.parent:
        found.append({"name": "parent version", "digest": {"sha256": manifest.parent}})
    return found
