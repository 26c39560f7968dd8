"""What a machine says of itself: load, power, network, room on the disk, local time. Linux; every place is an argument.

It decides nothing (`federated.flower.conditions` does), keeps nothing, and is read anew for each question. What cannot
be read is an error, never an answer. psutil was not taken: it finds these files by itself, so that no test could bring
its own, and it knows nothing of a network's price.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from federated.errors import ConfigError

__all__ = ["Host"]

_SECONDS = 5.0
"""That NetworkManager may take."""
_UP = 0x1
_ANYWHERE = "00000000"
_PRESENT_BUT_NOT_IN_USE = frozenset({"Charging", "Full", "Not charging"})


def _local_time() -> datetime:
    return datetime.now().astimezone()


@dataclass(frozen=True)
class Host:
    """Where to look.

    Args:
        proc: the kernel's ``/proc``.
        power: the kernel's power supplies.
        nmcli: NetworkManager's command, looked up on the path.
        cores: processors that the load is shared by.
        clock: local time.
    """

    proc: Path = Path("/proc")
    power: Path = Path("/sys/class/power_supply")
    nmcli: str = "nmcli"
    cores: int = os.cpu_count() or 1
    clock: Callable[[], datetime] = _local_time

    def load_per_core(self) -> float:
        """Processes that ran or waited for a processor, mean over the last minute, per core.

        Raises:
            ConfigError: if it cannot be read.
        """
        path = self.proc / "loadavg"
        try:
            return float(_read(path).split()[0]) / self.cores
        except (ValueError, IndexError):
            raise _unreadable(path, "no load average") from None

    def is_charging(self) -> bool:
        """Whether the machine does not live on a battery: mains, a charger, or no battery at all.

        Batteries of mice and the like (scope ``Device``) do not count.

        Raises:
            ConfigError: if it cannot be read.
        """
        try:
            supplies = sorted(self.power.iterdir())
        except OSError as error:
            raise _unreadable(self.power, error.strerror) from None
        own = [one for one in supplies if _word(one / "scope", missing="System") != "Device"]
        batteries = [one for one in own if _word(one / "type") == "Battery"]
        online = [one for one in own if one not in batteries and _word(one / "online", missing="0") == "1"]
        return not batteries or bool(online) or {_word(one / "status") for one in batteries} <= _PRESENT_BUT_NOT_IN_USE

    def route(self) -> str:
        """The network interface of the default route, the one of the smallest metric.

        Raises:
            ConfigError: if there is none, or it cannot be read.
        """
        path = self.proc / "net" / "route"
        found: list[tuple[int, str]] = []
        for line in _read(path).splitlines()[1:]:
            fields = line.split()
            try:
                name, destination, flags, metric = fields[0], fields[1], int(fields[3], 16), int(fields[6])
            except (ValueError, IndexError):
                raise _unreadable(path, "not a table of routes") from None
            if destination == _ANYWHERE and flags & _UP:
                found.append((metric, name))
        if not found:
            raise _unreadable(path, "no default route, so it is not known over which network the updates go")
        return min(found)[1]

    def is_metered(self, interface: str) -> bool:
        """Whether NetworkManager knows, or guesses, that traffic over an interface costs.

        Raises:
            ConfigError: if it is not there, does not answer, or does not know.
        """
        command = [self.nmcli, "--get-values", "GENERAL.METERED", "device", "show", interface]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        except OSError as error:
            raise _unknown(f"{self.nmcli}: {error.strerror}") from None
        except subprocess.TimeoutExpired:
            raise _unknown(f"{self.nmcli} did not answer within {_SECONDS:g} s") from None
        word = done.stdout.strip().partition(" ")[0]
        if done.returncode or word not in ("yes", "no"):
            told = " ".join((done.stdout or done.stderr).split())[:200]
            raise _unknown(f"NetworkManager says {told!r} of {interface}")
        return word == "yes"

    def free_mb(self, folder: Path) -> float:
        """Megabytes (10^6 bytes) that are free where a folder is, or will be.

        Raises:
            ConfigError: if it cannot be read.
        """
        place = next((one for one in (folder, *folder.absolute().parents) if one.exists()), Path("/"))
        try:
            return shutil.disk_usage(place).free / 1e6
        except OSError as error:
            raise _unreadable(place, error.strerror) from None


def _word(path: Path, *, missing: str | None = None) -> str:
    if missing is not None and not path.exists():
        return missing
    return _read(path).strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError as error:
        raise _unreadable(path, error.strerror) from None


def _unreadable(path: Path, why: str | None) -> ConfigError:
    return ConfigError(
        f"the owner's conditions cannot be looked at: {path}: {why}; the client takes no part until it can be read, or "
        "the condition is taken out of the client's file"
    )


def _unknown(found: str) -> ConfigError:
    return ConfigError(
        f"the owner's condition 'unmetered' cannot be looked at: {found}; name the interfaces that cost in "
        "conditions.metered_interfaces, or take the condition out of the client's file"
    )
