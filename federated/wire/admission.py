"""The gate: bytes from a client become an admitted update, or a refusal with a reason code.

`seal_update` is the client's half, `admit` the server's. A refused update is one client's loss and never ends a round:
the caller counts and reports it. The gate keeps no state: the caller remembers counters and tokens.

What costs least comes first: the size, then the header and all that it says, its signature last, then one pass over the
payload for its digest. Nothing of the payload is interpreted before that, so where updates are signed, only bytes that
an enrolled device vouched for reach the decoder of tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from federated.errors import UpdateRejected, WireError
from federated.manifest import AdapterSpec, Envelope, RawTensor, TensorLayout, layout_of, sha256_hex
from federated.wire.codec import decode_tensors, encode_tensors, join_packet, split_packet
from federated.wire.envelope import Expectation, check_content, check_envelope, read_envelope
from federated.wire.limits import DEFAULT_LIMITS, Limits
from federated.wire.reasons import refused
from federated.wire.signing import SigningKey, sign_envelope

__all__ = ["Admitted", "admit", "bad_positions", "seal_update"]

T = TypeVar("T")


@dataclass(frozen=True)
class Admitted:
    """An update that passed every check.

    Args:
        envelope: as it arrived, and as it was expected.
        tensors: name to tensor, exactly the expected layout, every value finite; read-only views of the packet, which
            stays in memory as long as they do.
        norm: L2 norm over all tensors together, in adapter units (float64); 0.0 when nothing changed, which the
            caller should report.
    """

    envelope: Envelope
    tensors: Mapping[str, RawTensor]
    norm: float


def admit(data: bytes, expected: Expectation, *, layout: TensorLayout, limits: Limits = DEFAULT_LIMITS) -> Admitted:
    """Decode an update and check its envelope and content.

    Args:
        data: the packet as it arrived; from anybody.
        expected: what the server asked this client for.
        layout: the server's own list of tensors, sorted by name; never taken from the packet.
        limits: bounds on size and norm.

    Raises:
        UpdateRejected: with a code of `REASONS`, naming the client that was asked; nothing else, whatever the bytes.
        ConfigError: for an ``update_key`` in ``expected`` that is none, which is the server's own mistake.

    Privacy:
        Reads a client's update, which can reveal training data. Messages name tensors, sizes and norms, no values.
    """
    who = expected.client_id
    _check_size(len(data), expected, layout=layout, limits=limits)
    header, payload = _decoded(lambda: split_packet(data, limits), who)
    envelope = read_envelope(header, client_id=who)
    check_envelope(envelope, expected)
    digest = sha256_hex(payload)
    if envelope.payload_digest != digest:
        raise refused("payload_digest_mismatch", f"the payload's SHA-256 is {digest}", who)
    tensors = _decoded(lambda: decode_tensors(payload, limits), who)
    norm = check_content(envelope, tensors, layout=layout, limits=limits)
    return Admitted(envelope, tensors, norm)


def _decoded(decode: Callable[[], T], client_id: str) -> T:
    try:
        return decode()
    except WireError as error:
        raise refused("bad_encoding", str(error), client_id) from None


def _check_size(size: int, expected: Expectation, *, layout: TensorLayout, limits: Limits) -> None:
    """Refuse by length alone: the tensors are known, so little more than their bytes can be needed."""
    needed = sum(entry.nbytes for entry in layout) + 2 * limits.max_header_bytes + 64
    allowed = min(limits.max_bytes, needed)
    if size > allowed:
        raise refused("too_large", f"found {size} bytes, at most {allowed} are accepted", expected.client_id)


def bad_positions(found: str, client_id: str) -> UpdateRejected:
    """The refusal of an update whose tensors do not say which values they hold, for whoever unpacks them."""
    return refused("bad_positions", found, client_id)


def seal_update(
    tensors: Mapping[str, RawTensor],
    *,
    run_id: str,
    client_id: str,
    round_number: int,
    phase: int,
    task_token: str,
    counter: int,
    parent_version: str,
    base_digest: str,
    spec: AdapterSpec,
    plan_digest: str,
    num_examples: int,
    signing_key: SigningKey | None = None,
) -> bytes:
    """Put the envelope around an update: the packet that a client sends.

    Layout and payload digest are computed from ``tensors``; the other arguments are the fields of `Envelope`. With a
    ``signing_key`` the envelope is signed; without, its bytes are those of a library that knows no signatures.

    Raises:
        WireError: for tensors that cannot travel.

    Privacy:
        The packet holds the delta in the clear: whoever reads it can learn about the training data.
    """
    payload = encode_tensors(tensors)
    envelope = Envelope(
        run_id=run_id,
        client_id=client_id,
        round_number=round_number,
        phase=phase,
        task_token=task_token,
        counter=counter,
        parent_version=parent_version,
        base_digest=base_digest,
        spec=spec,
        plan_digest=plan_digest,
        layout=layout_of(tensors),
        num_examples=num_examples,
        payload_digest=sha256_hex(payload),
    )
    sealed = envelope if signing_key is None else sign_envelope(envelope, signing_key)
    return join_packet(sealed.to_dict(), payload)
