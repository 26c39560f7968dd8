"""Makes the golden files of the release's codecs; run it only when a new codec is added, never to make a test pass.

python tests/golden/codecs/make.py
"""

import json
from pathlib import Path

from federated.manifest import sha256_hex
from federated.release.codecs import DIFFS, FULL, encode
from tests.unit.release.weights import mixed

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Write weights, one file for each codec that has none, and the digests of what comes out."""
    weights, held = mixed(1), mixed(2)
    digests = {}
    (HERE / "held.safetensors").write_bytes(held)
    for codec in (*FULL, *DIFFS):
        path = HERE / f"{codec}.fprc"
        if not path.exists():
            path.write_bytes(encode(weights, codec, held if codec in DIFFS else None).data)
        digests[codec] = sha256_hex(encode(weights, codec, held if codec in DIFFS else None).weights)
    (HERE / "digests.json").write_text(json.dumps(digests, indent=1) + "\n")


if __name__ == "__main__":
    main()
