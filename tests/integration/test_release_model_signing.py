"""OpenSSF's own ``model_signing`` takes our seals and refuses what we refuse; and we read a bundle as it writes it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import CryptoSigner

from federated.errors import WrongContent
from federated.manifest import AdapterSpec, VersionManifest
from federated.release.dsse import SealKey
from federated.release.seal import SIGNATURE, check_seal, seal

PROGRAM = os.environ.get("FEDPEFT_MODEL_SIGNING") or shutil.which("model_signing")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(
        PROGRAM is None,
        reason="model_signing is not installed (sh tests/integration/get_model_signing.sh DIR; "
        "FEDPEFT_MODEL_SIGNING=DIR/bin/model_signing)",
    ),
]
CURVES = [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()]
MANIFEST = VersionManifest(
    "a" * 64, "b" * 64, AdapterSpec("lora", 2, 4.0, False, ()), "fedit", "run-a", 5, adapter_id="support"
)


def made(root: Path, curve: ec.EllipticCurve) -> tuple[Path, Path, SealKey]:
    """A sealed folder, the public half in a file, and the key."""
    private = ec.generate_private_key(curve)
    pem = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (root / "private.pem").write_bytes(pem)
    key, folder, public = SealKey(CryptoSigner(private)), root / "out", root / "seal.pub.pem"
    public.write_bytes(key.public.pem)
    (folder / "deep").mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter.bin").write_bytes(bytes(1000))
    (folder / "deep" / "weights.bin").write_bytes(b"weights")
    seal(folder, MANIFEST, key)
    return folder, public, key


def model_signing(*arguments: object) -> tuple[bool, str]:
    done = subprocess.run(
        [str(PROGRAM), *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    return done.returncode == 0, done.stdout + done.stderr


def verified(folder: Path, public: Path) -> tuple[bool, str]:
    return model_signing("verify", "key", folder, "--signature", folder / SIGNATURE, "--public_key", public)


@pytest.mark.parametrize("curve", CURVES, ids=lambda one: one.name)
def test_our_seal_is_taken(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    folder, public, _ = made(tmp_path, curve)
    good, said = verified(folder, public)
    assert good, said
    assert "Verification succeeded" in said


def test_what_we_refuse_is_refused(tmp_path: Path) -> None:
    folder, public, key = made(tmp_path, CURVES[0])

    def both_refuse(name: str) -> None:
        good, said = verified(folder, public)
        assert not good
        assert name in said
        with pytest.raises(WrongContent, match=name):
            check_seal(folder, key.public)

    (folder / "deep" / "weights.bin").write_bytes(b"weighty")
    both_refuse("deep/weights.bin")
    (folder / "deep" / "weights.bin").write_bytes(b"weights")
    (folder / "more.py").touch()
    both_refuse("more.py")
    (folder / "more.py").unlink()
    (folder / "adapter_config.json").unlink()
    both_refuse("adapter_config.json")


def test_another_key_is_refused(tmp_path: Path) -> None:
    folder, _, _ = made(tmp_path, CURVES[0])
    (tmp_path / "other").mkdir()
    _, other, _ = made(tmp_path / "other", CURVES[0])
    good, said = verified(folder, other)
    assert not good
    assert "Key mismatch" in said


def test_a_clone_of_a_repository_is_taken(tmp_path: Path) -> None:
    folder, public, _ = made(tmp_path, CURVES[0])
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").touch()
    (folder / ".gitattributes").touch()
    assert verified(folder, public)[0]


def test_their_signature_in_place_of_ours_is_read(tmp_path: Path) -> None:
    """Signed again by ``model_signing`` with the same key: the provenance in the folder is still the key's."""
    folder, _, key = made(tmp_path, CURVES[0])
    (folder / SIGNATURE).unlink()
    options = ("--signature", folder / SIGNATURE, "--private_key", tmp_path / "private.pem")
    good, said = model_signing("sign", "key", folder, *options)
    assert good, said
    assert check_seal(folder, key.public).facts["round"] == "5 of run-a"
