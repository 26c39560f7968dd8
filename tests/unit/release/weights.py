"""Weights as a run makes them: factors, a head, other dtypes; and versions that move a little each time."""

from collections.abc import Iterator

import numpy as np

from federated.manifest import RawTensor
from federated.wire import decode_tensors, encode_tensors

Arrays = dict[str, np.ndarray]


def encoded(arrays: Arrays) -> bytes:
    return encode_tensors({name: RawTensor.from_array(array) for name, array in arrays.items()})


def values_in(weights: bytes) -> np.ndarray:
    """All floats, end to end, in float64."""
    tensors = decode_tensors(weights)
    return np.concatenate([tensors[name].array.astype(np.float64).reshape(-1) for name in sorted(tensors)])


def factors(seed: int = 0, *, scale: float = 0.02) -> Arrays:
    rng = np.random.default_rng(seed)
    shapes = {"encoder.query.factor_a": (8, 96), "encoder.query.factor_b": (96, 8), "head.bias": (3,)}
    return {name: (scale * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}


def versions(count: int, *, step: float = 0.02, seed: int = 0) -> Iterator[bytes]:
    """Each moves by about that share of its size, in a direction of its own and a common one."""
    rng, now = np.random.default_rng(seed), factors(seed)
    drift = {name: rng.standard_normal(array.shape) for name, array in now.items()}
    for _ in range(count):
        yield encoded(now)
        now = {
            name: (array + step * 0.02 * (0.5 * drift[name] + rng.standard_normal(array.shape))).astype(np.float32)
            for name, array in now.items()
        }


def mixed(seed: int = 0) -> bytes:
    """Every dtype, a scalar, and groups that are not full."""
    rng = np.random.default_rng(seed)
    tensors = {
        "a.f32": RawTensor.from_array(rng.standard_normal((5, 33)).astype(np.float32)),
        "b.f16": RawTensor.from_array(rng.standard_normal(70).astype(np.float16)),
        "c.bf16": RawTensor("BF16", (3, 5), rng.integers(0x3C00, 0x4000, 15).astype("<u2").tobytes()),
        "d.f64": RawTensor.from_array(rng.standard_normal(4)),
        "e.i64": RawTensor.from_array(rng.integers(-9, 9, 7)),
        "f.u8": RawTensor.from_array(rng.integers(0, 255, 9).astype(np.uint8)),
        "g.scalar": RawTensor.from_array(np.float32(rng.standard_normal())),
    }
    return encode_tensors(tensors)
