"""Records: canonical bytes, digests that name everything, and exact reading back."""

import json
import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from federated.manifest import (
    AdapterSpec,
    Envelope,
    HeadSpec,
    ModuleSpec,
    RawTensor,
    TensorEntry,
    TrainPlan,
    VersionManifest,
    canonical_json,
    digest_of,
    layout_of,
    sha256_hex,
)

MODULE = ModuleSpec("q", d_in=3, d_out=2, rank=4, alpha=8.0)
SPEC = AdapterSpec("lora", 4, 8.0, use_rslora=False, modules=(MODULE,), head=HeadSpec("mean_pool", 2, True, 0))
ENVELOPE = Envelope(
    run_id="run",
    client_id="clinic",
    round_number=1,
    phase=1,
    task_token="t",  # noqa: S106
    counter=1,
    parent_version="p",
    base_digest="b",
    spec=SPEC,
    plan_digest="d",
    layout=(TensorEntry("q.factor_a", (4, 3), "F32"),),
    num_examples=5,
    payload_digest="x",
)
MANIFEST = VersionManifest("w", "b", SPEC, "fedit + sgd", "run", 1, parent="p", metrics={"train_loss": 0.5})


class TestCanonicalJson:
    def test_order_of_keys_does_not_matter(self):
        assert canonical_json({"b": 1, "a": {"d": 2, "c": 3}}) == canonical_json({"a": {"c": 3, "d": 2}, "b": 1})

    def test_is_compact_utf8(self):
        assert canonical_json({"ä": [1, None, True]}) == '{"ä":[1,null,true]}'.encode()

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_refuses_what_json_cannot_carry(self, bad):
        with pytest.raises(ValueError, match="JSON compliant"):
            canonical_json({"x": bad})

    def test_digest_is_sha256_of_the_bytes(self):
        assert digest_of([1]) == sha256_hex(b"[1]")
        assert sha256_hex(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        assert sha256_hex(memoryview(b"abc")) == sha256_hex(b"abc")


class TestRawTensor:
    @pytest.mark.parametrize(("dtype", "name"), [("f2", "F16"), ("f4", "F32"), ("f8", "F64"), ("i8", "I64")])
    @pytest.mark.parametrize("order", "<>")
    def test_arrays_of_any_byte_order_keep_their_values(self, dtype, name, order):
        array = np.array([[1, -2], [3, 4]], dtype=f"{order}{dtype}")
        raw = RawTensor.from_array(array)
        assert (raw.dtype, raw.shape) == (name, (2, 2))
        assert np.array_equal(raw.array, array)
        assert raw.array.dtype.str == f"<{dtype}"

    def test_bytes_keep_their_values(self):
        raw = RawTensor.from_array(np.array([0, 1, 255], dtype=np.uint8))
        assert (raw.dtype, raw.array.tolist(), raw.data) == ("U8", [0, 1, 255], b"\x00\x01\xff")

    def test_a_view_is_copied_in_row_major_order(self):
        array = np.arange(6, dtype="<f4").reshape(2, 3)
        assert np.array_equal(RawTensor.from_array(array.T).array, array.T)

    def test_a_scalar_keeps_its_shape(self):
        raw = RawTensor.from_array(np.array(2.5))
        assert (raw.shape, raw.array.item()) == ((), 2.5)

    @pytest.mark.parametrize("dtype", ["i4", "u8", "?", "c8", "U1"])
    def test_other_dtypes_are_refused(self, dtype):
        with pytest.raises(ValueError, match="cannot travel; expected float16"):
            RawTensor.from_array(np.zeros(1, dtype=dtype))

    def test_bfloat16_is_widened_exactly(self):
        raw = RawTensor("BF16", (3,), bytes.fromhex("803f0040c0ff"))
        assert raw.bits.dtype == np.uint16
        assert raw.array.dtype == np.float32
        assert raw.array[:2].tolist() == [1.0, 2.0]
        assert math.isnan(raw.array[2])

    @pytest.mark.parametrize("name", ["F32", "F64"])
    def test_a_view_cannot_be_written(self, name):
        raw = RawTensor.from_array(np.zeros(2, dtype={"F32": "<f4", "F64": "<f8"}[name]))
        with pytest.raises(ValueError, match="read-only"):
            raw.bits[0] = 1

    def test_layout_is_sorted_by_name(self):
        one, two = RawTensor.from_array(np.zeros((2, 3))), RawTensor.from_array(np.zeros(1, "<f4"))
        assert layout_of({"b": one, "a": two}) == (TensorEntry("a", (1,), "F32"), TensorEntry("b", (2, 3), "F64"))

    @pytest.mark.parametrize(("dtype", "size"), [("BF16", 12), ("F32", 24), ("I64", 48), ("U8", 6)])
    def test_entry_knows_its_size(self, dtype, size):
        assert TensorEntry("w", (2, 3), dtype).nbytes == size
        assert TensorEntry("w", (), dtype).nbytes == size // 6


class TestAdapterSpec:
    def test_scaling_is_alpha_over_rank(self):
        assert SPEC.scaling(MODULE) == 2.0
        assert SPEC.scaling(replace(MODULE, rank=2)) == 4.0

    def test_rslora_takes_the_root(self):
        assert replace(SPEC, use_rslora=True).scaling(MODULE) == 4.0

    @pytest.mark.parametrize(
        "change",
        [
            {"peft_type": "ia3"},
            {"rank": 5},
            {"alpha": 9.0},
            {"use_rslora": True},
            {"modules": ()},
            {"modules": (replace(MODULE, fan_in_fan_out=True),)},
            {"head": None},
            {"head": HeadSpec("mean_pool", 2, True, 1)},
            {"dtype": "BF16"},
        ],
        ids=str,
    )
    def test_every_field_is_in_the_digest(self, change):
        assert replace(SPEC, **change).digest != SPEC.digest

    @pytest.mark.parametrize("head", [None, SPEC.head])
    def test_plain_data_and_back(self, head):
        spec = replace(SPEC, head=head)
        plain = json.loads(canonical_json(asdict(spec)))
        assert AdapterSpec.from_dict(plain) == spec
        assert AdapterSpec.from_dict(plain).digest == spec.digest

    @pytest.mark.parametrize("wrong", [{"surprise": 1}, {"modules": [{"name": "q"}]}, {"head": {"kind": "stock"}}])
    def test_unknown_and_missing_keys_are_refused(self, wrong):
        with pytest.raises(TypeError):
            AdapterSpec.from_dict({**asdict(SPEC), **wrong})


class TestEnvelope:
    def test_plain_data_and_back(self):
        assert Envelope.from_dict(json.loads(canonical_json(ENVELOPE.to_dict()))) == ENVELOPE

    @pytest.mark.parametrize("field", ["round_number", "phase", "counter", "num_examples", "protocol_version"])
    @pytest.mark.parametrize("value", [1.0, "1", True, None])
    def test_whole_numbers_are_whole_numbers(self, field, value):
        with pytest.raises(ValueError, match=f"{field} is not an integer"):
            Envelope.from_dict({**ENVELOPE.to_dict(), field: value})

    @pytest.mark.parametrize("field", ["run_id", "client_id", "task_token", "parent_version", "codec"])
    def test_names_are_text(self, field):
        with pytest.raises(ValueError, match=f"{field} is not a string"):
            Envelope.from_dict({**ENVELOPE.to_dict(), field: 5})

    def test_unknown_fields_are_refused(self):
        with pytest.raises(TypeError):
            Envelope.from_dict({**ENVELOPE.to_dict(), "epsilon": 1})

    @pytest.mark.parametrize("field", ["spec", "layout", "run_id"])
    def test_missing_fields_are_refused(self, field):
        plain = ENVELOPE.to_dict()
        del plain[field]
        with pytest.raises((KeyError, TypeError)):
            Envelope.from_dict(plain)


class TestTrainPlan:
    def test_plain_data_and_back(self):
        plan = TrainPlan(mode="evaluate", phase=2, rank=4, trainable=("factor_b",), proximal_mu=0.1)
        back = TrainPlan.from_dict(json.loads(canonical_json(asdict(plan))))
        assert back == plan
        assert back.digest == plan.digest

    @pytest.mark.parametrize(
        "change",
        [
            {"mode": "evaluate"},
            {"rank": 9},
            {"trainable": ()},
            {"proximal_mu": 1.0},
            {"evaluate_after": True},
            {"correction": "feddyn"},
            {"memory_round": 3},
            {"density_down": 0.5},
            {"density_up": 0.5},
            {"rank_budget": 1},
        ],
    )
    def test_every_field_is_in_the_digest(self, change: dict[str, Any]):
        assert replace(TrainPlan(), **change).digest != TrainPlan().digest

    def test_unknown_keys_are_refused(self):
        with pytest.raises(TypeError):
            TrainPlan.from_dict({**asdict(TrainPlan()), "code": "import os"})


class TestVersionManifest:
    def test_plain_data_and_back_under_the_same_id(self):
        back = VersionManifest.from_dict(json.loads(canonical_json(MANIFEST.to_dict())))
        assert back == MANIFEST
        assert back.version_id == MANIFEST.version_id
        assert len(back.version_id) == 64

    @pytest.mark.parametrize(
        "change",
        [
            {"weights_digest": "v"},
            {"round_number": 2},
            {"parent": None},
            {"run_id": "other"},
            {"participants": 1},
            {"metrics": {}},
            {"privacy": {"epsilon": 1.0}},
            {"servable": False},
            {"task": {"name": "causal_lm"}},
            {"adapter_id": "support"},
            {"release_counter": 1},
            {"base": {"weights": "w"}},
            {"licence": "MIT"},
        ],
        ids=str,
    )
    def test_every_field_is_in_the_id(self, change):
        assert replace(MANIFEST, **change).version_id != MANIFEST.version_id

    def test_equal_weights_in_another_round_are_another_version(self):
        later = replace(MANIFEST, round_number=2, parent=MANIFEST.version_id)
        assert later.weights_digest == MANIFEST.weights_digest
        assert later.version_id != MANIFEST.version_id

    def test_unknown_keys_are_refused(self):
        with pytest.raises(TypeError):
            VersionManifest.from_dict({**MANIFEST.to_dict(), "trusted": True})


def test_specs_and_versions_of_the_first_form_keep_their_digests() -> None:
    module, head = ModuleSpec("q", 3, 2, 2, 4.0), HeadSpec("mean_pool", 2, trained=True, seed=0)
    spec = AdapterSpec("lora", 2, 4.0, use_rslora=False, modules=(module,), head=head)
    assert spec.digest == "b97a7c2d3b9bd196551247e3c66cb99388003361f4d77024620f35c74aa9af26"
    manifest = VersionManifest("w" * 64, "b" * 64, spec, "fedit", "run", 1)
    assert manifest.version_id == "429bce9db807eb0d598da31f6a7e2e8c663ffb9748d21c306568f2df7117e035"


@pytest.mark.parametrize(("trained", "tokens"), [((), 0), (("a.scale_in", "b.scale_out"), 0), ((), 8)])
def test_what_later_kinds_say_survives_json(trained: tuple[str, ...], tokens: int) -> None:
    spec = AdapterSpec("ia3", 0, 0.0, use_rslora=False, modules=(), trained=trained, virtual_tokens=tokens)
    manifest = VersionManifest("w" * 64, "b" * 64, spec, "fedit", "run", 1)
    again = VersionManifest.from_dict(json.loads(canonical_json(manifest.to_dict())))
    assert again == manifest
    assert again.version_id == manifest.version_id
    assert ("trained" in spec.plain, "virtual_tokens" in spec.plain) == (bool(trained), bool(tokens))
