"""A seal goes with an exported folder where no TUF repository does: who made it of what, and which files are its own.

    provenance.intoto.jsonl    SLSA provenance of the version, about the exported files
    model.sig                  OpenSSF model-signing bundle over all files, the provenance too

``model.sig`` is a sigstore bundle v0.3, method "key", that ``model_signing verify key`` accepts; this library needs
that package for nothing. Unlike a release, a seal does not age and cannot be revoked: an older sealed folder stays
valid. Nothing in a folder is opened by a name that a seal says, so a seal from afar can name no other place.

Source: https://github.com/sigstore/model-transparency (model-signing 1.1), sigstore bundle v0.3.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from federated.errors import ReleaseError, WrongContent
from federated.manifest import VersionManifest, canonical_json
from federated.release.disk import translated
from federated.release.dsse import PublicKey, SealKey, opened
from federated.release.provenance import PREDICATE_TYPE, facts, provenance

__all__ = ["PROVENANCE", "SIGNATURE", "SealedFolder", "check_seal", "seal"]

SIGNATURE = "model.sig"
PROVENANCE = "provenance.intoto.jsonl"
IGNORED = (".git", ".gitattributes", ".github", ".gitignore", SIGNATURE)
"""Not covered, as ``model_signing`` has it: what a clone of a repository adds."""

_PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_BUNDLE = "application/vnd.dev.sigstore.bundle.v0.3+json"
_MOST_BYTES = 2**24
Digests = Mapping[str, str]


@dataclass(frozen=True)
class SealedFolder:
    """What a seal that holds says.

    Args:
        files: each covered file's path and SHA-256.
        facts: where the version came from, in words: ``version`` (its id), ``base digest``, ``round``, ``method`` ...
        predicate: the SLSA provenance.
    """

    files: Digests
    facts: Mapping[str, str]
    predicate: Mapping[str, Any]


def seal(folder: Path, manifest: VersionManifest, key: SealKey) -> None:
    """Seal a folder: write its two files.

    Args:
        folder: what was exported of the version.
        manifest: the version's record.
        key: signs both.

    Raises:
        ReleaseError: if it is sealed already, holds a link, or cannot be read and written.
    """
    with translated("seal the folder"):
        files = _digests(folder)
        if PROVENANCE in files or (folder / SIGNATURE).exists():
            raise ReleaseError(f"{folder} is sealed already; export the version again, into a new folder")
        statement = provenance(manifest, files)
        (folder / PROVENANCE).write_bytes(canonical_json(key.envelope(statement)) + b"\n")
        name = manifest.adapter_id or "adapter"
        bundle = {
            "mediaType": _BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": key.public.hint}, "tlogEntries": []},
            "dsseEnvelope": key.envelope(_signature(name, _digests(folder))),
        }
        (folder / SIGNATURE).write_bytes(canonical_json(bundle))


def check_seal(folder: Path, key: PublicKey) -> SealedFolder:
    """Check a folder against its seal.

    Args:
        folder: from anywhere.
        key: of whom it should be from.

    Returns:
        What the seal says.

    Raises:
        WrongSignature: if it is by another key, or was changed.
        WrongContent: if there is no seal, or files were changed, added or taken away: each by its name.
        ReleaseError: if the folder cannot be read.
    """
    with translated("check the seal"):
        found = _digests(folder)
        bundle, envelope = _json(folder / SIGNATURE), _json(folder / PROVENANCE)
    _check_files(folder, _signed_files(bundle, key), found)
    statement = opened(envelope, key, PREDICATE_TYPE)
    try:
        about = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
        predicate, told = dict(statement["predicate"]), facts(statement["predicate"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WrongContent(
            f"{folder / PROVENANCE} says nothing of a version ({type(error).__name__}: {error})"
        ) from error
    rest = {name: digest for name, digest in found.items() if name != PROVENANCE}
    _check_files(folder, about, rest)
    return SealedFolder(found, told, predicate)


def _signature(name: str, files: Digests) -> dict[str, Any]:
    resources = [{"algorithm": "sha256", "digest": files[path], "name": path} for path in sorted(files)]
    return {
        "predicateType": _PREDICATE_TYPE,
        "subject": [{"name": name, "digest": {"sha256": _root_of(files[path] for path in sorted(files))}}],
        "predicate": {
            "resources": resources,
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": list(IGNORED),
            },
        },
    }


def _root_of(digests: Any) -> str:
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _signed_files(bundle: Any, key: PublicKey) -> dict[str, str]:
    try:
        kind, hint = bundle["mediaType"], bundle["verificationMaterial"]["publicKey"]["hint"]
        envelope = bundle["dsseEnvelope"]
    except (KeyError, TypeError) as error:
        raise WrongContent(
            f"{SIGNATURE} is no bundle of a signature by a key ({error}); was it signed otherwise?"
        ) from error
    if kind != _BUNDLE or hint != key.hint:
        what = f"{str(kind)[:80]} by key {str(hint)[:12]}"
        raise WrongContent(f"{SIGNATURE} is {what}; expected {_BUNDLE} by key {key.hint[:12]}")
    statement = opened(envelope, key, _PREDICATE_TYPE)
    try:
        how, resources = statement["predicate"]["serialization"], statement["predicate"]["resources"]
        files = {str(one["name"]): str(one["digest"]) for one in resources}
        root = statement["subject"][0]["digest"]["sha256"]
        whole = (how["method"], how["hash_type"]) == ("files", "sha256") and set(how["ignore_paths"]) <= set(IGNORED)
        consistent = root == _root_of(one["digest"] for one in resources) and len(files) == len(resources)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise WrongContent(f"{SIGNATURE} signs no list of files ({type(error).__name__}: {error})") from error
    if not (whole and consistent):
        raise WrongContent(
            f"{SIGNATURE} leaves files out, hashes them otherwise, or contradicts itself: {str(how)[:200]}"
        )
    return files


def _check_files(folder: Path, signed: Digests, found: Digests) -> None:
    changed = sorted(name for name in signed.keys() & found.keys() if signed[name] != found[name])
    missing, more = sorted(signed.keys() - found.keys()), sorted(found.keys() - signed.keys())
    said = [f"{what}: {', '.join(names[:5])}" for what, names in
            (("changed", changed), ("missing", missing), ("not sealed", more)) if names]  # fmt: skip
    if said:
        raise WrongContent(f"{folder} is not what was sealed; {'; '.join(said)}")


def _digests(folder: Path) -> dict[str, str]:
    """Every covered file's path and SHA-256."""
    if not folder.is_dir():
        raise ReleaseError(f"{folder} is no folder; name one that was exported")
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if PurePosixPath(name).parts[0] in IGNORED:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise WrongContent(f"{path} is a link or a device; a seal covers files themselves")
        if path.is_file():
            with path.open("rb") as file:
                found[name.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _json(path: Path) -> Any:
    """A file of the seal; what is missing or is no JSON is said by name."""
    if path.is_symlink() or not path.is_file():
        raise WrongContent(f"{path} is missing: the folder is not sealed, or its seal was taken away")
    if path.stat().st_size > _MOST_BYTES:
        raise WrongContent(f"{path} has more than {_MOST_BYTES} bytes; expected a signature")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise WrongContent(f"{path} is no JSON; expected a signature") from None
