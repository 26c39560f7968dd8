"""The bytes of the wire format, fixed: files written once stay readable, and are still written the same."""

import importlib.util
import json
from hashlib import sha256
from pathlib import Path
from types import ModuleType

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.manifest import layout_of
from federated.wire import Expectation, admit, decode_tensors

FOLDER = Path(__file__).parent / "wire"
DOCUMENT = Path(__file__).parents[2] / "docs" / "wire-format.md"
NAMES = ("adapter.safetensors", "update.fpft", "update-signed.fpft")


@pytest.fixture(scope="module")
def make() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wire_golden_make", FOLDER / "make.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", NAMES)
def test_the_script_still_makes_exactly_the_golden_file(make: ModuleType, name: str) -> None:
    assert make.files()[name] == (FOLDER / name).read_bytes()


def test_the_script_makes_every_golden_file(make: ModuleType) -> None:
    assert sorted(make.files()) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_document_names_the_digest_of_the_golden_file(name: str) -> None:
    assert sha256((FOLDER / name).read_bytes()).hexdigest() in DOCUMENT.read_text(encoding="utf-8")


def test_the_golden_adapter_reads_as_the_tensors_it_was_made_from(make: ModuleType) -> None:
    assert decode_tensors((FOLDER / "adapter.safetensors").read_bytes()) == make.TENSORS


def test_the_golden_adapter_is_these_bytes_whoever_writes_them() -> None:
    header = (
        b'{"layer.0.query.factor_a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        b'"layer.0.query.factor_b":{"dtype":"F32","shape":[2,2],"data_offsets":[24,40]},'
        b'"head.bias":{"dtype":"BF16","shape":[2],"data_offsets":[40,44]},'
        b'"head.scale":{"dtype":"F16","shape":[],"data_offsets":[44,46]}}'
    )
    padded = header + b" " * (-len(header) % 8)
    factor_a = bytes.fromhex("0000003f 000080bf 00000040 00000000 00000080 0000803e")
    factor_b = bytes.fromhex("0000803f 00000000 00000000 000080bf")
    head = bytes.fromhex("803f80bf 003e")
    expected = len(padded).to_bytes(8, "little") + padded + factor_a + factor_b + head
    assert (FOLDER / "adapter.safetensors").read_bytes() == expected


@pytest.mark.parametrize("name", ["update.fpft", "update-signed.fpft"])
def test_the_golden_packet_ends_with_the_golden_adapter(name: str) -> None:
    assert (FOLDER / name).read_bytes().endswith((FOLDER / "adapter.safetensors").read_bytes())


def test_the_golden_signature_is_this_one_whoever_makes_it() -> None:
    """What the document says is signed, without this library: prefix, line feed, canonical JSON of the rest."""
    packet = (FOLDER / "update-signed.fpft").read_bytes()
    header = json.loads(packet[10 : 10 + int.from_bytes(packet[6:10], "little")])
    signature = bytes.fromhex(header.pop("signature"))
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    public = Ed25519PrivateKey.from_private_bytes(bytes(range(32))).public_key()
    public.verify(signature, b"federated-peft update 1\n" + text)
    assert public.public_bytes_raw().hex() in DOCUMENT.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["update.fpft", "update-signed.fpft"])
def test_the_golden_packet_is_admitted(make: ModuleType, name: str) -> None:
    key = make.SIGNING_KEY.public_key().public_bytes_raw() if "signed" in name else None
    expected = Expectation(
        run_id="run-1",
        client_id="hospital-a",
        round_number=3,
        phase=1,
        task_token="0123456789abcdef",  # noqa: S106
        parent_version="11" * 32,
        base_digest="22" * 32,
        spec=make.SPEC,
        plan_digest="33" * 32,
        last_counter=2,
        update_key=key,
    )
    admitted = admit((FOLDER / name).read_bytes(), expected, layout=layout_of(make.TENSORS))
    assert admitted.tensors == make.TENSORS
