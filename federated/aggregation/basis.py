"""What an update is relative to, as a digest: updates may be combined when it is the same, whichever rule made them.

A client is sent a plan, the tensors that it trains, and all that stands still beside them: frozen factors, a residual,
whatever else a rule sends along. A delta moves the tensors that it holds from wherever they are; but what stands still
gives it its meaning. ``dB`` under one frozen A is no step under another.

    basis = digest(plan, everything sent but the trained tensors)

RoLoRA's turn, FLoRA's residual and a control variate are in it without being known by name. Where the space itself is
made anew with each version (FedSVD, FlexLoRA), or a client trains a truncation of this very version, the trained
tensors are in it too, so that no two versions share one. Called by buffered rounds; knows no clients.
"""

from __future__ import annotations

from federated.aggregation.protocol import ClientView, Rule
from federated.global_state import GlobalState
from federated.manifest import digest_of, sha256_hex
from federated.state import AdapterState, Tensors, group_of, to_raw

__all__ = ["basis_of"]


def basis_of(rule: Rule, state: GlobalState) -> str:
    """Digest of what an update that is trained from this state is relative to.

    Args:
        rule: says what is trained, and whether the space of its updates stays.
        state: what clients start from.

    Raises:
        AggregationError: if the state is not the rule's.
    """
    plan, payload = rule.plan(state, ClientView(""), 1)
    stays = rule.properties.fixed_space and not rule.properties.mixed_ranks
    moving = plan.trainable if stays else ()
    still = {name: tensor for name, tensor in payload.tensors.items() if group_of(name) not in moving}
    return digest_of([plan.digest, payload.spec.digest, _digests(still), _residual(payload), _digests(payload.extra)])


def _residual(payload: AdapterState) -> list[object]:
    residual = payload.residual
    return [] if residual is None else [residual.spec.digest, _digests(residual.tensors)]


def _digests(tensors: Tensors) -> list[list[str]]:
    return [[name, raw.dtype, sha256_hex(raw.data)] for name, raw in to_raw(tensors).items()]
