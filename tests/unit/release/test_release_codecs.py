"""Codecs of a release: what comes out of each, to the bit, and what cannot be encoded."""

import itertools

import numpy as np
import pytest
import torch

from federated.errors import ReleaseError
from federated.manifest import RawTensor, sha256_hex
from federated.release.codecs import DIFFS, FULL, LOSSLESS, STEPS, TWINS, Encoded, decode, encode, twin
from federated.release.frame import opened
from federated.release.quantise import GROUP, LEVELS, Groups, quantise, values_of
from federated.wire import DEFAULT_LIMITS, decode_tensors, encode_tensors
from tests.unit.release.weights import encoded, factors, mixed, values_in, versions


def both(weights: bytes, codec: str, held: bytes | None = None) -> Encoded:
    """Encode, and check that a device gets what the publisher says."""
    made = encode(weights, codec, held)
    assert decode(made.data, held) == made.weights
    assert opened(made.data, DEFAULT_LIMITS)[0].result == made.result == sha256_hex(made.weights)
    return made


@pytest.mark.parametrize("codec", FULL)
def test_full_files_give_what_they_say(codec: str) -> None:
    weights = mixed()
    made = both(weights, codec)
    assert (made.weights == weights) == (codec == "lossless")
    assert made.source == ""


@pytest.mark.parametrize("codec", DIFFS)
def test_diffs_give_what_they_say(codec: str) -> None:
    weights, held = mixed(1), mixed(2)
    made = both(weights, codec, held)
    assert (made.weights == weights) == (codec == "diff")
    assert made.source == sha256_hex(held)


@pytest.mark.parametrize("codec", [*FULL, *DIFFS])
def test_what_is_no_float_is_kept(codec: str) -> None:
    held = mixed(2) if codec in DIFFS else None
    kept, given = decode_tensors(encode(mixed(1), codec, held).weights), decode_tensors(mixed(1))
    assert [kept[name] for name in ("d.f64", "e.i64", "f.u8")] == [given[name] for name in ("d.f64", "e.i64", "f.u8")]
    assert [(one.dtype, one.shape) for one in kept.values()] == [(one.dtype, one.shape) for one in given.values()]


@pytest.mark.parametrize(("codec", "worst"), [("fp16", 2.0**-11), ("bf16", 2.0**-8)])
def test_rounded_to_16_bits_is_the_nearest(codec: str, worst: float) -> None:
    weights = encoded(factors(scale=10.0))
    given, found = values_in(weights), values_in(encode(weights, codec).weights)
    assert np.abs(found / given - 1).max() <= worst
    if codec == "fp16":
        np.testing.assert_array_equal(found, given.astype(np.float32).astype(np.float16).astype(np.float64))
    again = encode(encode(weights, codec).weights, codec)
    assert np.array_equal(values_in(again.weights), found)


def test_bfloat16_ties_go_to_even() -> None:
    values = np.concatenate(
        [[1.00390625, 1.01171875, -1.00390625, 3.0e38, 1e-40], np.random.default_rng(0).standard_normal(500)]
    )
    found = values_in(encode(encoded({"x": values.astype(np.float32)}), "bf16").weights)
    np.testing.assert_array_equal(found[:3], [1.0, 1.015625, -1.0])
    np.testing.assert_array_equal(found, torch.tensor(values, dtype=torch.float32).bfloat16().double().numpy())


@pytest.mark.parametrize("bits", LEVELS)
def test_codes_against_the_definition_in_float64(bits: int) -> None:
    """Each value is a whole multiple of its group's scale, and no other multiple is nearer."""
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    groups = Groups([700, 300])
    found = quantise(values, groups, bits)
    assert groups.count == 16  # eleven in the first tensor, five in the second: none spans both
    scale = np.repeat(found.scales.astype(np.float64) * 2.0**found.shift, groups.lengths)
    truth = found.codes.astype(np.float64) * scale
    np.testing.assert_array_equal(values_of(found, groups).astype(np.float64), truth)
    inside = np.abs(found.codes) < LEVELS[bits]
    assert (np.abs(values - truth)[inside] <= 0.5000001 * scale[inside]).all()


@pytest.mark.parametrize("bits", LEVELS)
def test_scales_lose_least_of_those_that_were_tried(bits: int) -> None:
    values = np.random.default_rng(0).standard_normal(64 * 50).astype(np.float32)
    groups = Groups([values.size])
    widest = np.abs(values.reshape(-1, GROUP)).max(axis=1, keepdims=True) / LEVELS[bits]
    plain = np.clip(np.rint(values.reshape(-1, GROUP) / widest), -LEVELS[bits], LEVELS[bits]) * widest
    found = values_of(quantise(values, groups, bits), groups)
    ratio = np.square(found - values).sum() / np.square(plain.reshape(-1) - values).sum()
    assert ratio < {2: 0.45, 4: 0.90, 8: 1.001}[bits]


def test_codes_of_nothing() -> None:
    zero = encoded({"x": np.zeros(100, dtype=np.float32)})
    assert encode(zero, "int4").weights == zero
    whole = encode_tensors({"n": RawTensor.from_array(np.arange(4))})
    assert both(whole, "int8").weights == whole
    assert both(whole, "diff-int2", encode_tensors({"n": RawTensor.from_array(np.arange(4)[::-1])})).weights == whole
    empty = encode_tensors({})
    assert both(empty, "int4").weights == empty


@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1.0, 1e30])
def test_scales_follow_the_size_of_the_values(scale: float) -> None:
    values = (scale * np.random.default_rng(0).standard_normal(640)).astype(np.float32)
    found = values_in(both(encoded({"x": values}), "int8").weights)
    assert np.linalg.norm(found / scale - values / scale) < 0.01 * np.linalg.norm(values / scale)


@pytest.mark.parametrize("bits", [8, 4])
def test_a_recode_ends_at_the_full_file(bits: int) -> None:
    """From whatever is held: the version before, what int4 gave of it, or something else altogether."""
    before, weights = versions(2)
    full = encode(weights, f"int{bits}")
    for held in (before, encode(before, "int4").weights, encode(before, "fp16").weights, encoded(factors(9))):
        assert both(weights, f"recode-int{bits}", held).weights == full.weights
    assert len(encode(weights, f"recode-int{bits}", before).data) < 0.7 * len(full.data)


@pytest.mark.parametrize("codec", TWINS)
def test_a_lossy_diff_has_a_full_file_that_gives_the_same(codec: str) -> None:
    for before, weights in (tuple(versions(2)), (mixed(2), mixed(1))):
        diff = encode(weights, codec, before)
        full = twin(diff, before)
        assert decode(full.data) == full.weights == diff.weights
        assert (full.codec, full.source) == (TWINS[codec], "")


@pytest.mark.parametrize("codec", STEPS)
def test_errors_do_not_build_up_over_20_versions(codec: str) -> None:
    """Encoded against what devices hold, the twentieth version is no worse than the second.

    Encoded against the version before, as if devices held that, errors add up.
    """
    made = list(versions(21))
    held, wrong = made[0], values_in(made[0])
    errors = []
    for before, weights in itertools.pairwise(made):
        held = both(weights, codec, held).weights
        errors.append(np.linalg.norm(values_in(held) - values_in(weights)))
        wrong = wrong + values_in(encode(weights, codec, before).weights) - values_in(before)
    moved = np.linalg.norm(values_in(made[-1]) - values_in(made[-2]))
    assert max(errors[10:]) < 1.25 * max(errors[:10])
    assert errors[-1] < {"diff-int4": 0.4, "diff-int2": 1.2}[codec] * moved
    if codec == "diff-int2":
        assert np.linalg.norm(wrong - values_in(made[-1])) > 1.5 * errors[-1]


def test_lossless_keeps_every_bit() -> None:
    bits = np.array([0x7FC00001, 0xFF800000, 0x80000000, 1, 0x7F7FFFFF], dtype="<u4")  # NaN's payload, -inf, -0 ...
    odd = encode_tensors({"x": RawTensor("F32", (5,), bits.tobytes())})
    plain = encode_tensors({"x": RawTensor.from_array(np.arange(5, dtype=np.float32))})
    assert both(odd, "lossless").weights == odd
    assert both(odd, "diff", plain).weights == odd
    assert both(plain, "diff", odd).weights == plain


@pytest.mark.parametrize(
    ("codec", "value"), [("fp16", 70_000.0), ("bf16", 3.4e38), ("int4", np.nan), ("fp16", np.inf), ("int8", 1e38)]
)
def test_values_that_a_codec_cannot_hold(codec: str, value: float) -> None:
    weights = encoded({"x": np.array([value, 1.0], dtype=np.float32)})
    with pytest.raises(ReleaseError, match=r"that this codec cannot hold; use `lossless`|ship them without loss"):
        encode(weights, codec)


@pytest.mark.parametrize("codec", ["diff-int2", "recode-int4"])
def test_diffs_from_what_is_not_finite(codec: str) -> None:
    held = encoded({"x": np.array([np.inf, 1.0], dtype=np.float32)})
    with pytest.raises(ReleaseError, match="holds NaN or infinity"):
        encode(encoded({"x": np.ones(2, dtype=np.float32)}), codec, held)


def test_values_too_small_for_any_scale_become_zero() -> None:
    weights = encoded({"x": np.full(9, 1e-38, dtype=np.float32)})
    assert values_in(both(weights, "int8").weights).max() == 0.0


def test_distance_beyond_float32() -> None:
    far = [encoded({"x": np.full(2, sign * 3e38, dtype=np.float32)}) for sign in (-1, 1)]
    with pytest.raises(ReleaseError, match="values of inf cannot be quantised to 4 bits"):
        encode(far[0], "diff-int4", far[1])


@pytest.mark.parametrize(
    ("codec", "held", "message"),
    [
        ("int5", None, "no codec 'int5'; there are lossless, fp16"),
        ("diff", None, "no codec 'diff'"),
        ("int8", b"", "no codec 'int8'"),
        ("diff", b"", "the held weights are no canonical weights"),
    ],
)
def test_what_cannot_be_asked(codec: str, held: bytes | None, message: str) -> None:
    with pytest.raises(ReleaseError, match=message):
        encode(encoded(factors()), codec, held)


def test_other_shapes_have_no_diff() -> None:
    held = encoded({"x": np.ones(3, dtype=np.float32)})
    with pytest.raises(ReleaseError, match="other tensors, shapes or dtypes"):
        encode(encoded({"x": np.ones(4, dtype=np.float32)}), "diff", held)


def test_weights_that_are_none() -> None:
    with pytest.raises(ReleaseError, match="the weights are no canonical weights"):
        encode(b"weights", "fp16")


def test_a_diff_of_near_versions_is_small() -> None:
    """Fractions of the 16-bit size for a step of about two hundredths: what the codecs are for."""
    before, weights = versions(2)
    half = len(weights) / 2
    size = {
        codec: len(encode(weights, codec, before if codec in DIFFS else None).data) / half for codec in (*FULL, *DIFFS)
    }
    assert size["diff"] < size["lossless"] < 2
    assert size["recode-int4"] < 0.15 < size["int4"] < 0.35 < size["int8"] < size["bf16"] < size["fp16"] < 1.1
    assert set(LOSSLESS) == {codec for codec in size if codec in ("lossless", "diff")}
