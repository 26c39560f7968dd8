"""Each reason to refuse an update, one at a time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from federated.errors import UpdateRejected
from federated.manifest import AdapterSpec, Envelope, ModuleSpec, RawTensor, TensorEntry, TensorLayout
from federated.wire import DEFAULT_LIMITS, Expectation, Limits, check_content, check_envelope, decode_packet
from federated.wire import read_envelope as read

Tensors = dict[str, RawTensor]


@pytest.fixture
def envelope(seal: Any) -> Envelope:
    return read(decode_packet(seal())[0], client_id="clinic")


def refusal(envelope: Envelope, expected: Expectation) -> UpdateRejected:
    with pytest.raises(UpdateRejected) as caught:
        check_envelope(envelope, expected)
    return caught.value


def test_the_honest_envelope_passes(envelope: Envelope, expected: Expectation) -> None:
    check_envelope(envelope, expected)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"protocol_version": 2}, "wrong_protocol"),
        ({"run_id": "other"}, "wrong_run"),
        ({"client_id": "../../root"}, "wrong_client"),
        ({"round_number": 1}, "wrong_round"),
        ({"phase": 2}, "wrong_phase"),
        ({"task_token": ""}, "bad_token"),
        ({"task_token": "secret-tokem"}, "bad_token"),
        ({"task_token": "\u00e9\ud800"}, "bad_token"),
        ({"counter": 0}, "bad_counter"),
        ({"counter": 2**63}, "bad_counter"),
        ({"counter": 4}, "replayed"),
        ({"parent_version": "d" * 64}, "wrong_parent"),
        ({"base_digest": "d" * 64}, "base_mismatch"),
        ({"plan_digest": "d" * 64}, "plan_mismatch"),
        ({"codec": "pickle"}, "bad_codec"),
        ({"num_examples": 0}, "bad_num_examples"),
        ({"num_examples": -5}, "bad_num_examples"),
        ({"num_examples": 1001}, "bad_num_examples"),
        ({"num_examples": 10**12}, "bad_num_examples"),
        ({"num_examples": True}, "bad_num_examples"),
        ({"num_examples": 1.5}, "bad_num_examples"),
    ],
)
def test_one_changed_field_is_refused_by_its_reason(
    envelope: Envelope, expected: Expectation, changes: dict[str, Any], reason: str
) -> None:
    assert refusal(replace(envelope, **changes), expected).reason == reason


def test_a_refusal_names_the_client_that_was_asked(envelope: Envelope, expected: Expectation) -> None:
    assert refusal(replace(envelope, client_id="liar"), expected).client_id == "clinic"


def test_a_refusal_says_what_was_found_expected_and_what_to_do(envelope: Envelope, expected: Expectation) -> None:
    assert str(refusal(replace(envelope, round_number=1), expected)) == (
        "wrong_round: round_number 1, expected 2; made for another round: it is too late or too early for this one"
    )


def test_no_token_is_ever_told(envelope: Envelope, expected: Expectation) -> None:
    guess = {"task_token": "guessed-token"}
    message = str(refusal(replace(envelope, **guess), expected))
    assert "secret" not in message and "guessed" not in message


@pytest.mark.parametrize("num_examples", [1, 1000])
def test_the_ends_of_the_range_of_examples_are_accepted(
    envelope: Envelope, expected: Expectation, num_examples: int
) -> None:
    check_envelope(replace(envelope, num_examples=num_examples), expected)


def test_a_signature_is_carried_and_not_judged(envelope: Envelope, expected: Expectation) -> None:
    check_envelope(replace(envelope, signature="00"), expected)


MODULE = ModuleSpec("block.query", d_in=3, d_out=2, rank=2, alpha=4.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 4}, "spec.rank is 4, expected 2;"),
        ({"use_rslora": 0}, "spec.use_rslora is 0, expected False;"),
        ({"head": None}, "spec.head is None, expected {'kind': 'mean_pool'"),
        ({"modules": ()}, "spec.modules is a list of 0, expected a list of 1;"),
        ({"modules": (replace(MODULE, alpha=8.0),)}, r"spec.modules[0].alpha is 8.0, expected 4.0;"),
        ({"modules": [replace(MODULE, name="block.key")]}, "spec.modules[0].name is 'block.key', expected"),
        ({"modules": None}, "spec.modules is None, expected a list of 1;"),
    ],
)
def test_a_differing_spec_is_refused_by_the_field_that_differs(
    envelope: Envelope, expected: Expectation, spec: AdapterSpec, changes: dict[str, Any], message: str
) -> None:
    refused = refusal(replace(envelope, spec=replace(spec, **changes)), expected)
    assert str(refused).startswith(f"spec_mismatch: {message}")


def content_refusal(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout, limits: Limits = DEFAULT_LIMITS
) -> UpdateRejected:
    with pytest.raises(UpdateRejected) as caught:
        check_content(envelope, tensors, layout=layout, limits=limits)
    return caught.value


def test_the_norm_of_honest_content_is_returned(envelope: Envelope, tensors: Tensors, layout: TensorLayout) -> None:
    norm = check_content(envelope, tensors, layout=layout, limits=DEFAULT_LIMITS)
    assert norm == pytest.approx(np.sqrt(6 * 0.25 + 4 * 1.0 + 1.0 + 4.0), rel=1e-15)


def test_bytes_say_which_values_are_sent_and_are_no_part_of_the_norm(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout
) -> None:
    more = {**tensors, "sparse:positions": RawTensor("U8", (3,), b"\xff\x00\x01")}
    wider = (*layout, TensorEntry("sparse:positions", (3,), "U8"))
    expected = check_content(envelope, tensors, layout=layout, limits=DEFAULT_LIMITS)
    found = check_content(replace(envelope, layout=wider), more, layout=wider, limits=DEFAULT_LIMITS)
    assert found == expected


def test_an_update_that_changes_nothing_has_norm_zero_and_passes(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout
) -> None:
    zero = {name: replace(tensor, data=bytes(len(tensor.data))) for name, tensor in tensors.items()}
    assert check_content(envelope, zero, layout=layout, limits=Limits(max_norm=1.0)) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.bias"), r"missing ['head.bias'], unexpected []"),
        (lambda t: t.update({"base.weight": t["head.bias"]}), r"missing [], unexpected ['base.weight']"),
        (
            lambda t: t.update({"head.bias": replace(t["head.bias"], shape=(1, 2))}),
            "head.bias is 'BF16' (1, 2), expected 'BF16' (2,)",
        ),
        (
            lambda t: t.update({"head.bias": replace(t["head.bias"], dtype="F16")}),
            "head.bias is 'F16' (2,), expected 'BF16' (2,)",
        ),
    ],
)
def test_other_tensors_than_expected_are_refused(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout, change: Any, message: str
) -> None:
    change(tensors)
    assert message in str(content_refusal(envelope, tensors, layout))


def test_an_envelope_that_lists_other_tensors_is_refused(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout
) -> None:
    lying = replace(envelope, layout=(TensorEntry("x", (1,), "F32"), *layout))
    assert str(content_refusal(lying, tensors, layout)).startswith("layout_mismatch: the envelope: tensor names differ")


def test_an_envelope_that_lists_tensors_in_another_order_is_refused(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout
) -> None:
    lying = replace(envelope, layout=layout[::-1])
    assert "listed twice or in another order" in str(content_refusal(lying, tensors, layout))


@pytest.mark.parametrize("bits", ["c07f", "c0ff", "807f", "80ff", "817f"])  # NaN, -NaN, inf, -inf, signalling NaN
def test_bfloat16_values_that_are_not_finite_are_refused(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout, bits: str
) -> None:
    tensors["head.bias"] = RawTensor("BF16", (2,), bytes.fromhex("0000" + bits))
    assert content_refusal(envelope, tensors, layout).reason == "not_finite"


@pytest.mark.parametrize("bits", ["0000c07f", "0000807f", "000080ff", "0100807f"])
def test_float32_values_that_are_not_finite_are_refused_by_name(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout, bits: str
) -> None:
    name = "block.query.factor_b"
    tensors[name] = replace(tensors[name], data=bytes(12) + bytes.fromhex(bits))
    assert f"tensor {name} holds a NaN" in str(content_refusal(envelope, tensors, layout))


def test_a_norm_above_the_bound_is_refused(envelope: Envelope, tensors: Tensors, layout: TensorLayout) -> None:
    refused = content_refusal(envelope, tensors, layout, Limits(max_norm=3.0))
    assert str(refused).startswith("norm_exceeded: L2 norm 3.24037, at most 3 is accepted;")


def test_a_norm_exactly_at_the_bound_passes(envelope: Envelope, tensors: Tensors, layout: TensorLayout) -> None:
    norm = check_content(envelope, tensors, layout=layout, limits=DEFAULT_LIMITS)
    assert check_content(envelope, tensors, layout=layout, limits=Limits(max_norm=norm)) == norm


def test_the_largest_float32_values_have_a_finite_norm(
    envelope: Envelope, tensors: Tensors, layout: TensorLayout
) -> None:
    largest = np.full((2, 3), np.finfo("<f4").max, "<f4")
    tensors["block.query.factor_a"] = RawTensor.from_array(largest)
    assert np.isfinite(check_content(envelope, tensors, layout=layout, limits=DEFAULT_LIMITS))


def test_a_norm_beyond_float64_is_refused(envelope: Envelope) -> None:
    tensors = {name: RawTensor.from_array(np.array(1.3e154)) for name in "ab"}
    layout = tuple(tensors[name].entry(name) for name in "ab")
    refused = content_refusal(replace(envelope, layout=layout), tensors, layout)
    assert str(refused).startswith("not_finite: the norm over all tensors is beyond float64;")
