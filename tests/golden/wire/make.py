"""Write the golden files of the wire format beside this script: ``python tests/golden/wire/make.py``.

They change only together with the format's version: bytes that were written once must be readable for good.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec, RawTensor
from federated.wire import encode_tensors, seal_update

SPEC = AdapterSpec(
    peft_type="lora",
    rank=2,
    alpha=4.0,
    use_rslora=False,
    modules=(ModuleSpec("layer.0.query", d_in=3, d_out=2, rank=2, alpha=4.0),),
    head=HeadSpec("mean_pool", num_labels=2, trained=True, seed=7),
)

TENSORS = {
    "layer.0.query.factor_a": RawTensor.from_array(np.array([[0.5, -1.0, 2.0], [0.0, -0.0, 0.25]], "<f4")),
    "layer.0.query.factor_b": RawTensor.from_array(np.array([[1.0, 0.0], [0.0, -1.0]], "<f4")),
    "head.bias": RawTensor("BF16", (2,), bytes.fromhex("803f80bf")),  # 1.0, -1.0
    "head.scale": RawTensor.from_array(np.array(1.5, "<f2")),
}


SIGNING_KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))  # a fixed example


def packet(signing_key: Ed25519PrivateKey | None = None) -> bytes:
    """The update, signed or not."""
    return seal_update(
        TENSORS,
        run_id="run-1",
        client_id="hospital-a",
        round_number=3,
        phase=1,
        task_token="0123456789abcdef",  # noqa: S106 - a fixed example
        counter=3,
        parent_version="11" * 32,
        base_digest="22" * 32,
        spec=SPEC,
        plan_digest="33" * 32,
        num_examples=40,
        signing_key=signing_key,
    )


def files() -> dict[str, bytes]:
    """File name to bytes."""
    return {
        "adapter.safetensors": encode_tensors(TENSORS),
        "update.fpft": packet(),
        "update-signed.fpft": packet(SIGNING_KEY),
    }


if __name__ == "__main__":
    for name, data in files().items():
        Path(__file__).with_name(name).write_bytes(data)
