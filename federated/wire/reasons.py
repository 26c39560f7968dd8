"""Why an update is refused: stable codes for programs, one line each for people.

Codes are part of the protocol: they are counted, logged and sent back to clients. New ones may be added, none changes
its meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from federated.errors import UpdateRejected

__all__ = ["REASONS", "refused"]

REASONS: Mapping[str, str] = MappingProxyType(
    {
        "too_large": "more bytes than this round's update can need: send the delta of the adapter and nothing else",
        "bad_encoding": "not a packet of this format: write it with the same version of this library",
        "bad_envelope": "the header is not an envelope: write it with the same version of this library",
        "wrong_protocol": "another version of the protocol: update the older side",
        "wrong_run": "made for another run: join this run and train again",
        "wrong_client": "made by another client than the one that was asked: send it under your own client id",
        "wrong_round": "made for another round: it is too late or too early for this one",
        "wrong_phase": "made for another exchange within the round: answer the exchange that is open",
        "bad_token": "no proof of being sampled for this round and phase: answer with the token of the task",
        "bad_counter": "the message counter is outside 1 to 2^63 - 1: count messages upwards from 1",
        "replayed": "the message counter did not grow: each message may be sent once",
        "unsigned": "enrolled devices sign: set signing_key in the client's own file to the key that was enrolled",
        "bad_signature": "not signed with the key that is enrolled for this client: sign with that key, or enrol anew",
        "wrong_parent": "trained from another version of the adapter: fetch the one that the task names",
        "base_mismatch": "trained on another base model: load the base model that the run names",
        "spec_mismatch": "another adapter algebra: attach the adapter that the task describes",
        "plan_mismatch": "another train plan was followed: follow the one in the task",
        "bad_codec": "an encoding that was not asked for: send plain safetensors",
        "bad_num_examples": "the claimed number of examples is not an integer in the accepted range",
        "payload_digest_mismatch": "the payload is not the one that the envelope names: it was changed or damaged",
        "layout_mismatch": "not exactly the tensors that were asked for: send each with its name, shape and dtype",
        "not_finite": "a NaN or an infinity: training diverged; lower the learning rate",
        "bad_positions": "the update does not say which values it holds: send as many as asked for, each once",
        "norm_exceeded": "the update is larger than the run allows: train less, or clip to the run's bound",
    }
)
"""Reason code to its meaning and, after the colon, what the sender can do."""


def refused(reason: str, found: str, client_id: str) -> UpdateRejected:
    """The error for one refused update: what was found, then what the reason means.

    Raises:
        KeyError: for a code that is not in `REASONS`.
    """
    return UpdateRejected(reason, f"{found}; {REASONS[reason]}", client_id=client_id)
