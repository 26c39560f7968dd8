"""What a client may be called: one rule for names that are shown, a stricter one for names that an operator gives.

Called by `federated.flower.directory`, which takes any usable name of a client that nobody enrolled, and by
`federated.deployment`, which gives names that also become names of files.
"""

from __future__ import annotations

import re

from federated.errors import ConfigError

__all__ = ["LONGEST_ID", "check_device_name", "usable_client_id"]

LONGEST_ID = 200
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
_LONGEST_DEVICE = 64


def usable_client_id(client_id: str) -> bool:
    """Cohorts, tokens and stores are keyed on it, and it is shown: printable and of bounded length.

    >>> usable_client_id("clinic north"), usable_client_id("")
    (True, False)
    """
    return 0 < len(client_id) <= LONGEST_ID and client_id.isprintable()


def check_device_name(name: str) -> str:
    """A name that an enrolled device may have: usable, and safe as a file's name everywhere.

    ASCII alone: letters of other scripts that look alike would make two names that people take for one.

    >>> check_device_name("clinic-north.2")
    'clinic-north.2'

    Raises:
        ConfigError: naming the rule; at most 40 characters of the name are quoted.
    """
    if len(name) > _LONGEST_DEVICE or not _DEVICE.fullmatch(name):
        shown = ascii(name[:40]) + (f"... ({len(name)} characters)" if len(name) > 40 else "")
        raise ConfigError(
            f"{shown} is no name for a device; expected up to {_LONGEST_DEVICE} of a-z, A-Z, 0-9 and . _ -, "
            f"a letter or digit first, and no dot beside a dot or at the end"
        )
    return name
