"""Is this update the one that was asked for, and is its content harmless?

`check_envelope` needs no tensors and always runs. `check_content` runs whenever the tensors are visible (under secure
aggregation they are not). Both compare with what the server itself expects; nothing is learnt from the update about
how to judge it. A signature is checked where the server knows the client's key. Called by `federated.wire.admission`.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from federated.manifest import (
    DTYPE_BYTES,
    PROTOCOL_VERSION,
    AdapterSpec,
    Envelope,
    RawTensor,
    TensorLayout,
    canonical_json,
    layout_of,
)
from federated.wire.limits import Limits
from federated.wire.reasons import REASONS, refused
from federated.wire.signing import check_signature
from federated.wire.strict_json import shown

__all__ = ["CODEC", "REASONS", "Expectation", "check_content", "check_envelope", "read_envelope"]

CODEC = "safetensors"
"""The only payload encoding so far."""

_MAX_COUNTER = 2**63 - 1  # what a database column holds
_AT_ONCE = 2**16  # numbers in float64 at a time: a norm of any tensor needs half a MB


@dataclass(frozen=True)
class Expectation:
    """What the server knows about the one update that it waits for.

    Args:
        run_id: the run.
        round_number: 1-based.
        phase: exchange within the round, 1-based.
        client_id: whom the server asked.
        task_token: the secret that it gave to this client for this round and phase.
        parent_version: version id of the adapter that it sent.
        base_digest: fingerprint of the run's base model.
        spec: the adapter's algebra.
        plan_digest: digest of the train plan that it sent.
        max_examples: largest number of examples that it lets one client claim.
        last_counter: the client's largest message counter seen in this run; 0 before the first.
        update_key: public key that the update must be signed with, 32 bytes; None: signatures are not asked for, and
            one that is there is carried and not verified.
    """

    run_id: str
    round_number: int
    phase: int
    client_id: str
    task_token: str
    parent_version: str
    base_digest: str
    spec: AdapterSpec
    plan_digest: str
    max_examples: int = 2**31 - 1
    last_counter: int = 0
    update_key: bytes | None = None


def read_envelope(header: Mapping[str, Any], *, client_id: str) -> Envelope:
    """Rebuild the envelope from a packet's header, exactly.

    Args:
        header: the decoded header.
        client_id: who is to be named in a refusal.

    Raises:
        UpdateRejected: ``wrong_protocol``, or ``bad_envelope`` for missing or unknown fields and wrong types.
    """
    version = header.get("protocol_version")
    if version != PROTOCOL_VERSION:  # first: another protocol may well have other fields
        raise refused("wrong_protocol", f"protocol {shown(version)}, expected {PROTOCOL_VERSION}", client_id)
    try:
        envelope = Envelope.from_dict(header)
        # Reading converts (1.5 to 1, "12" to (1, 2)) and fills in defaults; writing it again shows that it did.
        same = canonical_json(envelope.to_dict()) == canonical_json(dict(header))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise refused("bad_envelope", f"found {shown(str(error))}", client_id) from None
    if not same or not isinstance(envelope.signature, str | None):
        raise refused("bad_envelope", "a field is left out or has another type than an envelope's", client_id)
    return envelope


def check_envelope(envelope: Envelope, expected: Expectation) -> None:
    """Check everything that can be checked without the tensors.

    Args:
        envelope: as it arrived.
        expected: what the server asked for.

    Raises:
        UpdateRejected: with the reason code of the first thing that differs; see `REASONS`.
    """
    who = expected.client_id
    if envelope.protocol_version != PROTOCOL_VERSION:
        found = f"protocol {shown(envelope.protocol_version)}, expected {PROTOCOL_VERSION}"
        raise refused("wrong_protocol", found, who)
    _check_place(envelope, expected, (("wrong_run", "run_id"), ("wrong_client", "client_id"),
                                      ("wrong_round", "round_number"), ("wrong_phase", "phase")))  # fmt: skip
    _check_sender(envelope, expected)
    _check_place(envelope, expected, (("wrong_parent", "parent_version"), ("base_mismatch", "base_digest")))
    if envelope.spec.digest != expected.spec.digest:  # of their JSON, in which True is not 1
        raise refused("spec_mismatch", _difference(envelope.spec.plain, expected.spec.plain, "spec") or "spec", who)
    _check_place(envelope, expected, (("plan_mismatch", "plan_digest"),))
    if envelope.codec != CODEC:
        raise refused("bad_codec", f"codec {shown(envelope.codec)}, expected {CODEC!r}", who)
    if type(envelope.num_examples) is not int or not 1 <= envelope.num_examples <= expected.max_examples:
        found = f"num_examples {shown(envelope.num_examples)}, expected 1 to {expected.max_examples}"
        raise refused("bad_num_examples", found, who)
    if expected.update_key is not None:  # last: all before it are comparisons
        check_signature(envelope, expected.update_key, client_id=who)


def check_content(
    envelope: Envelope, tensors: Mapping[str, RawTensor], *, layout: TensorLayout, limits: Limits
) -> float:
    """Check the tensors: exactly the expected ones, every value finite, the norm within bounds.

    Args:
        envelope: the update's envelope; its layout must agree with the tensors too.
        tensors: name to tensor.
        layout: the server's own list of tensors, sorted by name.
        limits: ``max_norm`` applies here.

    Returns:
        The L2 norm over all tensors together, in adapter units, summed in float64; bytes (``U8``) say which values are
        sent and are not in it. It is 0.0 for an update that changes nothing, which is not refused.

    Raises:
        UpdateRejected: ``layout_mismatch``, ``not_finite`` or ``norm_exceeded``.

    Privacy:
        The norm depends on private data.
    """
    who = envelope.client_id
    for what, found in (("the envelope", envelope.layout), ("the payload", layout_of(tensors))):
        fault = _layout_fault(found, layout)
        if fault:
            raise refused("layout_mismatch", f"{what}: {fault}", who)
    norm = math.sqrt(sum(_square_sum(name, tensors[name], who) for name in sorted(tensors)))
    if not math.isfinite(norm):
        raise refused("not_finite", "the norm over all tensors is beyond float64", who)
    if 0 < limits.max_norm < norm:
        raise refused("norm_exceeded", f"L2 norm {norm:.6g}, at most {limits.max_norm:.6g} is accepted", who)
    return norm


def _check_place(envelope: Envelope, expected: Expectation, fields: tuple[tuple[str, str], ...]) -> None:
    for reason, name in fields:
        found, wanted = getattr(envelope, name), getattr(expected, name)
        if found != wanted:
            raise refused(reason, f"{name} {shown(found)}, expected {shown(wanted)}", expected.client_id)


def _check_sender(envelope: Envelope, expected: Expectation) -> None:
    found, wanted = (token.encode("utf-8", "surrogatepass") for token in (envelope.task_token, expected.task_token))
    if not hmac.compare_digest(found, wanted):  # and neither token in the message
        raise refused("bad_token", "the task token is not the one that was given out", expected.client_id)
    if not 1 <= envelope.counter <= _MAX_COUNTER:
        raise refused("bad_counter", f"counter {shown(envelope.counter)}", expected.client_id)
    if envelope.counter <= expected.last_counter:
        found_counter = f"counter {envelope.counter}, expected more than {expected.last_counter}"
        raise refused("replayed", found_counter, expected.client_id)


def _difference(found: Any, expected: Any, path: str) -> str | None:
    """The first place where two plain values differ, in words; None where they agree (True is not 1)."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        parts = [(f"{path}.{key}", found[key], expected[key]) for key in expected]
    elif isinstance(found, list | tuple) and isinstance(expected, list | tuple) and len(found) == len(expected):
        parts = [(f"{path}[{i}]", left, right) for i, (left, right) in enumerate(zip(found, expected, strict=True))]
    else:
        same = found == expected and isinstance(found, bool) == isinstance(expected, bool)
        return None if same else f"{path} is {_summary(found)}, expected {_summary(expected)}"
    differences = (_difference(left, right, where) for where, left, right in parts)
    return next((difference for difference in differences if difference), None)


def _summary(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list | tuple) else shown(value)


def _layout_fault(found: TensorLayout, expected: TensorLayout) -> str | None:
    """The first difference between two layouts, in words; None where they agree."""
    if found == expected:
        return None
    mine, theirs = ({entry.name: entry for entry in layout} for layout in (expected, found))
    missing, extra = sorted(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    if missing or extra:
        return f"tensor names differ: missing {shown(missing[:2])}, unexpected {shown(extra[:2])}"
    for name, entry in mine.items():
        if theirs[name] != entry:
            described = f"{shown(theirs[name].dtype)} {shown(theirs[name].shape)}"
            return f"tensor {name} is {described}, expected {entry.dtype!r} {entry.shape}"
    return "the tensors are listed twice or in another order"


def _square_sum(name: str, tensor: RawTensor, client_id: str) -> float:
    if tensor.dtype == "U8":  # which values are sent, and no values
        return 0.0
    data, step, total = memoryview(tensor.data), _AT_ONCE * DTYPE_BYTES[tensor.dtype], 0.0
    # Overflow and NaN are found in the result, where they cannot be missed, and not by numpy's warnings.
    with np.errstate(all="ignore"):
        for start in range(0, len(data), step):
            part = data[start : start + step]
            values = RawTensor(tensor.dtype, (-1,), part).array.astype(np.float64)
            total += float(np.square(values, out=values).sum())
    if not math.isfinite(total):
        raise refused("not_finite", f"tensor {name} holds a NaN, an infinity or values beyond all use", client_id)
    return total
