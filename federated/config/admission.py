"""Whose updates a server takes; import it from `federated.config`."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from federated.config.parts import STRICT

__all__ = ["AdmissionConfig"]


@dataclass(frozen=True, config=STRICT)
class AdmissionConfig:
    """Whether only enrolled devices take part.

    Args:
        devices: path of the file of enrolled devices (see `federated.flower.enrolled`): a client is then who its key
            says, and each update must be signed. Empty: a client is who it says, and signatures are not asked for.
    """

    devices: str = ""
