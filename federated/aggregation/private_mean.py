"""Client-level privacy in front of a rule: all that the rule sees of a round is one update, the noised mean.

    what came  --clip-->  sum + noise  --over the planned cohort-->  one update  --> the rule, as ever

Whatever the rule does after its mean (FedSVD's factorisation, RoLoRA's turns, a server optimizer) is work on what was
released already, and costs nothing more. It is the rule on clipped updates with equal weights if, and only if, the rule
looks at its updates' mean and at nothing else: `RuleProperties.mean_decides`.

With adaptive clipping the next norm is a scalar of the rule's memory, under `CLIP_NORM`: saved with each version, sent
to nobody, and changed only with a round that was applied. Noise that goes on from round to round is no part of that
memory: whoever reads it can take it off (`federated.privacy.noise_chain`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from federated.aggregation.protocol import Accumulator, NextPhase, Result
from federated.config.privacy import ClientPrivacyConfig
from federated.delta import Update
from federated.errors import AggregationError, PrivacyError
from federated.manifest import TensorLayout
from federated.privacy.adaptive import count_noise, following_clip_norm, multiplier_of_updates
from federated.privacy.chance import noise_source
from federated.privacy.client_level import NoisySum
from federated.privacy.noise_chain import NoiseChain
from federated.state import RuleState

__all__ = ["CLIP_NORM", "PrivateMean", "clip_norm_of", "noise_of_updates"]

CLIP_NORM = "privacy.clip_norm"
"""Where the rule's memory keeps the clipping norm of the next round."""


def clip_norm_of(state: RuleState, config: ClientPrivacyConfig) -> float:
    """The clipping norm of the next round.

    Raises:
        PrivacyError: if what was saved bounds nothing.
    """
    if config.clipping == "fixed":
        return config.clip_norm
    found = float(state.scalars.get(CLIP_NORM, config.clip_norm))
    if not (math.isfinite(found) and found > 0):
        raise PrivacyError(f"the saved clipping norm is {found}: expected a finite number > 0; start a new run")
    return found


def noise_of_updates(config: ClientPrivacyConfig, noise_multiplier: float, planned: float) -> tuple[float, float]:
    """The multiplier of the noise on the updates, and the noise on the count (0: none is taken).

    Args:
        config: of client-level privacy.
        noise_multiplier: the accounted one, of both together.
        planned: the planned cohort.

    Raises:
        PrivacyError: if the count leaves nothing to the updates.
    """
    if config.clipping == "fixed":
        return noise_multiplier, 0.0
    on_count = count_noise(config.quantile_noise, planned)
    return multiplier_of_updates(noise_multiplier, on_count), on_count


class PrivateMean:
    """An accumulator that clips, sums and noises, and then gives the rule's own accumulator the result.

    Args:
        inner: of the rule, fresh.
        memory: the rule's memory before the round.
        expected: the tensors of one update.
        config: of client-level privacy.
        noise_multiplier: the accounted one.
        planned: the planned cohort, > 0; the expected one where cohorts are drawn by chance.
        test_seed: of the noise, for tests; below 0 it comes from the operating system.
        chain: what the noise goes on from, with ``mechanism=banded``; None: it is independent.

    Raises:
        PrivacyError: if noise or bound are none.

    Privacy: what a single client sent leaves it in no form; metrics are of the noised count alone.
    """

    def __init__(
        self,
        inner: Accumulator,
        memory: RuleState,
        expected: TensorLayout,
        *,
        config: ClientPrivacyConfig,
        noise_multiplier: float,
        planned: float,
        test_seed: int = -1,
        chain: NoiseChain | None = None,
    ) -> None:
        self._inner = inner
        self._memory = memory
        self._config = config
        self._clip_norm = clip_norm_of(memory, config)
        on_updates, on_count = noise_of_updates(config, noise_multiplier, planned)
        self._chain = chain
        self._sum = NoisySum(
            {entry.name: entry.shape for entry in expected},
            clip_norm=self._clip_norm,
            noise_multiplier=on_updates,
            planned=planned,
            source=noise_source(test_seed),
            count_noise=on_count,
            chain=chain,
        )

    def add(self, update: Update, weight: float) -> None:
        """Clip one admitted update and add it.

        Raises:
            AggregationError: for a weight other than 1, other tensors than were asked for, or values that are not
                finite; the sum is unchanged.
        """
        if weight != 1.0:
            raise AggregationError(f"weight {weight:g}: with client-level privacy every update counts once")
        self._sum.add(update.delta)

    def finish(self) -> Result:
        """What the rule makes of the noised mean; noise alone where nobody came.

        Raises:
            AggregationError: if the rule needs another phase: it saw only one message of each client noised.
        """
        released = self._sum.release()
        self._inner.add(Update("the noised mean", released.mean, num_examples=1), 1.0)
        result = self._inner.finish()
        if isinstance(result, NextPhase):
            raise AggregationError("the rule asks for another phase: noise covers one message of each client")
        metrics = {**result.metrics, "clip_norm": self._clip_norm, "noise_std": released.noise_std}
        if self._chain is not None:
            metrics["noise_row"] = float(self._chain.row)
        if released.unclipped is not None:
            result = self._followed(result, released.unclipped)
            metrics["unclipped_share"] = released.unclipped
        return replace(result, participants=self._sum.came, total_weight=float(self._sum.came), metrics=metrics)

    def _followed(self, result: Result, unclipped: float) -> Result:
        memory = result.rule_state or self._memory
        following = following_clip_norm(
            self._clip_norm, unclipped, quantile=self._config.quantile, rate=self._config.quantile_rate
        )
        return replace(result, rule_state=RuleState({**memory.scalars, CLIP_NORM: following}, memory.tensors))
