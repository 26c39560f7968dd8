"""Keeps the noise of the last rounds for the next one: in memory, and in one file of the run's folder.

A history is kept when its round is published, and at no other time. What a crash leaves behind is told by the marks of
the budget: where a charge came since, the noise starts anew, which costs usefulness and no privacy
(`federated.privacy.banded`). Only the newest history is on the disk, readable by its owner alone, and in no version:
registries are shared, and versions stay for ever.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from federated.errors import PrivacyError, WireError
from federated.privacy.noise_chain import NoiseChain, NoiseHistory, Place
from federated.privacy.private_file import read_private, write_private
from federated.state import from_raw, to_raw
from federated.wire import Limits, decode_packet, encode_packet

__all__ = ["NoiseKeeper"]

_LOG = logging.getLogger(__name__)
_KIND = "noise history"
_OWN = Limits(max_bytes=2**40, max_header_bytes=2**20, max_tensors=2**20)


class NoiseKeeper:
    """The noise that the next round may go on from.

    Args:
        path: file that keeps it, mode 0600; None keeps it in memory only.

    Raises:
        PrivacyError: if the file cannot be read, others can read it, or it is damaged.

    Privacy: what it holds takes the noise off the last releases.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._history = None if path is None else _read(path)

    def chain(self, place: Place) -> NoiseChain:
        """The noise of a round: it goes on from what is kept, or starts anew where it must not, and the log says so."""
        why = "" if self._history is None else self._history.broken_by(place)
        if self._history is None and place.round_number > 1:
            why = "no noise of the rounds before is kept"
        if why:
            _LOG.warning("round %d: the noise starts anew: %s", place.round_number, why)
            return NoiseChain(place)
        return NoiseChain(place, self._history)

    def keep(self, chain: NoiseChain) -> None:
        """Keep the noise of a round that was published.

        Raises:
            PrivacyError: if it cannot be written.
        """
        self._history = chain.history()
        if self._path is not None:
            _write(self._path, self._history)


def _write(path: Path, history: NoiseHistory) -> None:
    header = {"kind": _KIND, "rows": history.rows, "place": asdict(history.place)}
    try:
        write_private(path, encode_packet(header, to_raw(history.tensors)))
    except OSError as error:
        raise PrivacyError(
            f"{path}: {error.strerror}; the noise of the next round cannot go on from this one"
        ) from None


def _read(path: Path) -> NoiseHistory | None:
    try:
        data = read_private(path, "the noise of the last rounds, and take it off what they gave out")
    except OSError as error:
        raise PrivacyError(f"{path}: {error.strerror}; the noise of the next round goes on from it") from None
    if data is None:
        return None
    try:
        header, raw, _ = decode_packet(data, _OWN)
        return NoiseHistory(_place(header["place"]), int(header["rows"]), from_raw(raw))
    except (WireError, KeyError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"{path} is damaged ({error}): the noise of the next round cannot go on from it; without that file it "
            "starts anew"
        ) from None


def _place(value: Mapping[str, Any]) -> Place:
    before, after = str(value["before"]), str(value["after"])
    return Place(int(value["round_number"]), before, after, float(value["std"]), int(value["band"]))
