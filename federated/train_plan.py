"""What a rule asks of a client, as plain data that both sides read alike.

No torch and no names of rules: `federated.training`, `federated.uploads` and the client's handlers follow it.
`federated.manifest` hands it on to everybody.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

from federated.digests import digest_of

__all__ = ["CORRECTIONS", "TrainPlan"]

CORRECTIONS = ("", "scaffold", "feddyn")
"""What `TrainPlan.correction` may be (`federated.corrections`); the empty one is none."""


@dataclass(frozen=True)
class TrainPlan:
    """What a rule asks of one client in one phase: plain data, interpreted by `federated.training`.

    Args:
        mode: ``"train"`` or ``"evaluate"``.
        phase: exchange within the round, 1-based.
        rank: LoRA rank of the payload for this client.
        trainable: the groups that move: any of ``"factor_a"``, ``"factor_b"``, ``"core"``, ``"dense"``.
        kept: those of them that stay on the client, which goes on from its own the next time (FedSA-LoRA).
        align: turn both factors, before they are sent, so that this one is near the received one: ``"factor_a"`` or
            ``"factor_b"`` (FedRot-LoRA); empty leaves them as they are.
        align_strength: how far, in [0, 1].
        proximal_mu: FedProx's mu.
        correction: what else is added to gradients: ``"scaffold"``, ``"feddyn"`` or none (`federated.corrections`).
        memory_round: round of the client's last update that was taken, whose memory counts; 0 means none was.
        density_down: share of the factors' entries that the payload holds; the others are zero.
        density_up: share of the factors' entries that are sent, those that moved most.
        rank_budget: ranks per layer that an update has room for (`federated.rank_selection`); 0 means all.
        tail_penalty: weight of a penalty on the last rows of A and columns of B (HetLoRA); 0 means none.
        tail_start: the first of them.
        upload: what goes up: the trained groups' ``"delta"``; the ``"sketch"`` of their products, with the dense delta
            (the client then keeps what it trained until the round is over); or a ``"projection"`` of the products
            onto a basis that is sent along (FedASK).
        sketch_columns: of a sketch; a layer has no more than its smaller side.
        sketch_seed: of the sketch's random matrix, shared by all clients.
        cached: answer from what this client trained in an earlier phase of the round, without training.
        evaluate_before: measure the received adapter on the client's held-out data before training.
        evaluate_after: measure the trained one too.
    """

    mode: str = "train"
    phase: int = 1
    rank: int = 0
    trainable: tuple[str, ...] = ("factor_a", "factor_b", "dense")
    kept: tuple[str, ...] = ()
    align: str = ""
    align_strength: float = 1.0
    proximal_mu: float = 0.0
    correction: str = ""
    memory_round: int = 0
    density_down: float = 1.0
    density_up: float = 1.0
    rank_budget: int = 0
    tail_penalty: float = 0.0
    tail_start: int = 0
    upload: str = "delta"
    sketch_columns: int = 0
    sketch_seed: int = 0
    cached: bool = False
    evaluate_before: bool = True
    evaluate_after: bool = False

    @property
    def digest(self) -> str:
        """Digest of the plan."""
        return digest_of(asdict(self))

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """Rebuild from `dataclasses.asdict`."""
        return cls(**{**value, "trainable": tuple(value["trainable"]), "kept": tuple(value["kept"])})

    @property
    def sent(self) -> tuple[str, ...]:
        """The groups whose delta goes to the server."""
        return tuple(group for group in self.trainable if group not in self.kept)
