"""What is promised about whom, and how: the ``privacy`` part of an experiment."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from federated.config.parts import STRICT, Positive

__all__ = ["ClientPrivacyConfig", "ExamplePrivacyConfig", "PrivacyConfig"]

ClipNorm = Annotated[float, Field(ge=1e-6, le=1e6)]
"""Noise in its unit has to stay well inside what a 32-bit number can hold: below that it would round to none."""
Noise = Annotated[float, Field(ge=0, le=1e6)]
_LEAST_NOISE = 1e-12


@dataclass(frozen=True, config=STRICT)
class ExamplePrivacyConfig:
    """DP-SGD on the client: what it sends depends little on any one of its examples (Abadi et al. 2016).

    Args:
        enabled: train this way.
        clip_norm: L2 bound on one example's gradient over all trained tensors together.
        noise_multiplier: standard deviation of the noise on the summed gradient, in units of ``clip_norm``; 0: each
            client solves for the least that keeps ``target_epsilon`` over all planned rounds.
        per_sample: how gradients of single examples are made; ``auto`` takes the first that can protect all that is
            trained.
    """

    enabled: bool = False
    clip_norm: ClipNorm = 1.0
    noise_multiplier: Noise = 0.0
    per_sample: Literal["auto", "fused", "hooks", "vmap"] = "auto"


@dataclass(frozen=True, config=STRICT)
class ClientPrivacyConfig:
    """DP-FedAvg on the server: a version depends little on any one client (McMahan et al. 2018).

    Args:
        enabled: aggregate this way.
        clip_norm: L2 bound on one client's update over all tensors together; the first one when ``clipping`` is
            ``adaptive``.
        noise_multiplier: standard deviation of the noise on the sum, in units of ``clip_norm``; 0: the least that keeps
            ``target_epsilon`` over all planned rounds.
        clipping: ``fixed``, or ``adaptive`` to a quantile of the clients' norms (Andrew et al. 2021).
        quantile: of the norms that ``adaptive`` follows.
        quantile_rate: its geometric learning rate.
        quantile_noise: standard deviation of the noise on the count of unclipped clients; 0: a twentieth of the cohort.
        mechanism: ``gaussian`` noise, new in each round, or ``banded``: noise that takes itself back in part from round
            to round, and clients in fixed groups that take turns (DP-FTRL; Kalinin and Lampert 2024).
        sampling: ``none`` claims no amplification; ``poisson`` draws each cohort from a key that nobody else knows, and
            claims it.
    """

    enabled: bool = False
    clip_norm: ClipNorm = 1.0
    noise_multiplier: Noise = 0.0
    clipping: Literal["fixed", "adaptive"] = "fixed"
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.5
    quantile_rate: Positive = 0.2
    quantile_noise: Noise = 0.0
    mechanism: Literal["gaussian", "banded"] = "gaussian"
    sampling: Literal["none", "poisson"] = "none"


@dataclass(frozen=True, config=STRICT)
class PrivacyConfig:
    """Differential privacy of a run; nothing is private unless ``example`` or ``client`` is enabled.

    Args:
        target_epsilon: spend at most that much over the whole run, for each unit that is protected; 0: no bound, the
            noise is given and epsilon is reported.
        target_delta: the probability beside epsilon; below one over the number of protected units.
        accountant: ``rdp``, or the tighter ``prv`` and ``pld``.
        example: protects single examples.
        client: protects all that one client has.
        test_seed: makes the noise repeatable, for tests; -1 takes it from the operating system. A run with a test seed
            is not private, and says so.
    """

    target_epsilon: Annotated[float, Field(ge=0, le=1000)] = 0.0
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    accountant: Literal["rdp", "prv", "pld"] = "rdp"
    example: ExamplePrivacyConfig = Field(default_factory=ExamplePrivacyConfig)
    client: ClientPrivacyConfig = Field(default_factory=ClientPrivacyConfig)
    test_seed: Annotated[int, Field(ge=-1)] = -1

    @property
    def enabled(self) -> bool:
        """Whether anything is protected."""
        return self.example.enabled or self.client.enabled

    @model_validator(mode="after")
    def _noise_is_none_or_some(self) -> Self:
        given = {
            "example.noise_multiplier": self.example.noise_multiplier,
            "client.noise_multiplier": self.client.noise_multiplier,
            "client.quantile_noise": self.client.quantile_noise,
        }
        for name, found in given.items():
            if 0 < found < _LEAST_NOISE:
                raise ValueError(f"privacy.{name} = {found:g}: expected 0, or at least {_LEAST_NOISE:g}")
        return self

    @model_validator(mode="after")
    def _noise_is_given_or_solved_for(self) -> Self:
        for unit, part in (("example", self.example), ("client", self.client)):
            if part.enabled and not part.noise_multiplier and not self.target_epsilon:
                raise ValueError(
                    f"privacy.{unit}.noise_multiplier = 0 without a privacy.target_epsilon: give one of them, or there "
                    "is no noise and no privacy"
                )
        return self
