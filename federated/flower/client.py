"""The client's half: answer who I am, and train or evaluate when asked. One message per round carries both.

`clients/app.py` registers these handlers on a Flower ClientApp; anybody's own ClientApp can do the same. An error
becomes a refusal with a reason, never a traceback: what a foreign exception says may quote training data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, RecordDict

from federated.config import ExperimentConfig
from federated.errors import FederatedError, NotNow
from federated.flower.client_events import note_answer
from federated.flower.client_site import ClientSite, check_limits, site_of
from federated.flower.conditions import require
from federated.flower.declined import not_now_content
from federated.flower.records import config_of, name_content, refusal_content

__all__ = ["handle_query", "handle_train"]

_LOG = logging.getLogger(__name__)


def handle_query(message: Message, context: Context) -> Message:
    """Answer with this client's id and the largest rank that it trains, and whether its owner lets it train now."""

    def answer() -> RecordDict:
        config = config_of(message)
        site = site_of(context.node_config, config)
        _ = site.update_key  # one that does not open is said before a round waits for this client
        return _when_allowed(site, lambda: name_content(site.client_id, site.max_rank))

    return _guarded("query", message, answer)


def handle_train(message: Message, context: Context) -> Message:
    """Train (or only evaluate) from the adapter in the message and answer with the sealed update and metrics.

    Privacy: the reply holds the delta, its example count and metrics; examples never leave this process.
    """

    def answer() -> RecordDict:
        config = config_of(message)
        site = site_of(context.node_config, config)
        check_limits(config, site)
        return _when_allowed(site, lambda: _worked(message, site.applied_to(config), site))

    return _guarded("train", message, answer)


def _when_allowed(site: ClientSite, answer: Callable[[], RecordDict]) -> RecordDict:
    """The answer, or "not now" where a condition of the owner does not hold; nothing was read or computed then."""
    try:
        require(site.conditions, Path(site.store))
    except NotNow as error:
        return not_now_content(site.client_id, site.max_rank, error)
    return answer()


def _guarded(kind: str, message: Message, answer: Callable[[], RecordDict]) -> Message:
    began = time.monotonic()
    try:
        content = answer()
    except Exception as error:  # noqa: BLE001 - the boundary: whatever happened becomes a named refusal
        _LOG.debug("a %s message is refused: %s", kind, error, exc_info=not isinstance(error, FederatedError))
        content = refusal_content("", error)
    note_answer(kind, message, content, seconds=time.monotonic() - began)
    return Message(content, reply_to=message)


def _worked(message: Message, config: ExperimentConfig, site: ClientSite) -> RecordDict:
    """The answer to a task; what only brings torch is loaded here."""
    from federated.flower.client_task import run_task

    return run_task(message, config, site)
