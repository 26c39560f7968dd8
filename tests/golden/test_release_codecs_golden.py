"""Files that publishers have signed go on giving the same bits, whatever machine or version reads them."""

import json
from pathlib import Path

import pytest

from federated.manifest import sha256_hex
from federated.release.codecs import DIFFS, FULL, decode

GOLDEN = Path(__file__).resolve().parent / "codecs"
DIGESTS = json.loads((GOLDEN / "digests.json").read_text())


@pytest.mark.parametrize("codec", [*FULL, *DIFFS])
def test_what_comes_out_never_changes(codec: str) -> None:
    held = (GOLDEN / "held.safetensors").read_bytes() if codec in DIFFS else None
    assert sha256_hex(decode((GOLDEN / f"{codec}.fprc").read_bytes(), held)) == DIGESTS[codec]
