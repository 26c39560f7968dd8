"""Talking to the deployment's own SuperLink: Flower's command line, with the operator's connection, as a subprocess.

Open-source Flower asks nobody who reaches the SuperLink for a password; this one listens on loopback alone. Called by
`federated.deployment.runs`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from federated.deployment.joining import environment
from federated.deployment.layout import Layout
from federated.deployment.server_config import ServerConfig
from federated.errors import DeploymentError
from federated.files import write_whole

__all__ = ["CONNECTION", "Link", "toml_text"]

CONNECTION = "deployment"
_PATIENCE = 120.0
_TOLD = 400


def toml_text(text: str) -> str:
    r"""A text as TOML writes it: as JSON does, but that it knows no halves of characters, and DEL not raw.

    >>> toml_text("a 'b'")
    '"a \'b\'"'
    """
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


class Link:
    """The operator's connection.

    Args:
        layout: of the deployment.
        config: of the deployment.
    """

    def __init__(self, layout: Layout, config: ServerConfig) -> None:
        self._layout = layout
        self._config = config

    def write_connection(self) -> None:
        """Write ``config.toml`` in Flower's home: where the SuperLink is, and whose certificate it has.

        Raises:
            OSError: as the file system raises it.
        """
        trust = "insecure = true" if self._config.insecure else f"root-certificates = {toml_text(str(self._layout.ca))}"
        address = f"127.0.0.1:{self._config.superlink_port}"
        text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n{trust}\n'
        self._layout.flwr_home.mkdir(parents=True, exist_ok=True)
        write_whole(self._layout.flwr_home / "config.toml", text.encode())

    def call(self, *arguments: str, timeout: float = _PATIENCE) -> str:
        """Run ``flwr`` and give what it printed.

        Raises:
            DeploymentError: if it failed, with its last words; most often because the SuperLink is not up.
        """
        command = [str(Path(sys.executable).with_name("flwr")), *arguments]
        try:
            done = subprocess.run(
                command,
                env={**environment(self._layout.flwr_home), "COLUMNS": "200"},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DeploymentError(
                f"flwr {arguments[0]}: {error}; is the deployment up? ('fedpeft deploy status')"
            ) from None
        if done.returncode:
            said = " ".join((done.stdout + " " + done.stderr).split())[-_TOLD:]
            raise DeploymentError(
                f"flwr {arguments[0]} failed: {said}; is the deployment up? ('fedpeft deploy status')"
            )
        return done.stdout

    def record(self, *arguments: str, timeout: float = _PATIENCE) -> dict[str, Any]:
        """The same for commands that print JSON: what stands before the first brace is not.

        Raises:
            DeploymentError: also for an answer that is no JSON, or says that it failed.
        """
        text = self.call(*arguments, "--format", "json", timeout=timeout)
        try:
            found: dict[str, Any] = json.loads(text[text.index("{") :])
        except ValueError:
            raise DeploymentError(f"flwr {arguments[0]}: expected JSON, found {text[:_TOLD]!r}") from None
        if found.get("success") is False:
            raise DeploymentError(f"flwr {arguments[0]}: {str(found.get('error-message') or found)[:_TOLD]}")
        return found
