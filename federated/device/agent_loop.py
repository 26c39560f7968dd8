"""When the agent does what: a look at the source at jittered intervals, commands and health in between."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable

from federated.device.agent import TICK, Agent
from federated.device.agent_config import DeviceConfig
from federated.errors import FederatedError

__all__ = ["Pace", "run"]

_LOG = logging.getLogger(__name__)


class Pace:
    """When to look again: at intervals that vary by chance; after failures soon, then ever less often.

    Args:
        config: ``poll_seconds``, ``retry_seconds``, ``jitter``.
        chance: for the jitter.
    """

    def __init__(self, config: DeviceConfig, chance: random.Random) -> None:
        self._config = config
        self._chance = chance
        self._failures = 0

    def after(self, well: bool) -> float:
        """Seconds until the next look.

        Args:
            well: whether the last one went well.
        """
        self._failures = 0 if well else self._failures + 1
        regular = self._config.poll_seconds
        backed_off = self._config.retry_seconds * 2.0 ** min(self._failures - 1, 60)
        seconds = regular if well else min(regular, backed_off)
        return seconds * self._chance.uniform(1 - self._config.jitter, 1 + self._config.jitter)


def run(agent: Agent, *, once: bool = False, chance: random.Random | None = None) -> bool:
    """Let an agent work, entered by this function, until it is told to stop.

    Args:
        agent: not entered yet.
        once: look once, wait for the end of a probation, and leave.
        chance: for the jitter between two looks.

    Returns:
        Whether the last look went well.

    Raises:
        DeviceError, ReleaseError: see `Agent.__enter__`; later ones are noted, and the agent goes on.
    """
    pace = Pace(agent.config, chance or random.SystemRandom())
    with agent:
        while True:
            well = _guarded(agent, agent.poll)
            until = agent.monotonic() + pace.after(well)
            while not agent.stopping and (agent.monotonic() < until or (once and agent.undecided)):
                _guarded(agent, agent.tick)
                if once and not agent.undecided:
                    return well
                agent.wait(TICK)
            if agent.stopping or once:
                return well


def _guarded(agent: Agent, step: Callable[[], object]) -> bool:
    """Whether a step went well. Neither a full disk nor what nobody foresaw may end the service.

    An agent that ended would be started again, and its boot counter would blame the version that serves.
    """
    try:
        return step() is not False
    except FederatedError as error:
        agent.tell("trouble", code=type(error).__name__, reason=str(error))
    except Exception as error:  # noqa: BLE001 - nobody foresaw it; see above
        _LOG.exception("unforeseen; what is installed goes on")
        agent.tell("trouble", code=type(error).__name__, reason="unforeseen, see the process's log")
    return False
