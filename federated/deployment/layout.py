"""Where things lie in a deployment's folder, and who may read them. Paths only; nothing is made here but folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Layout", "NodeLayout"]


@dataclass(frozen=True)
class Layout:
    """The operator's folder.

    Args:
        folder: absolute.
    """

    folder: Path

    @property
    def tls(self) -> Path:
        """Folder of ``ca.crt``, ``ca.key`` (owner only), ``server.crt``, ``server.key`` (owner only)."""
        return self.folder / "tls"

    @property
    def ca(self) -> Path:
        """Certificate of the deployment's own authority: what devices trust."""
        return self.tls / "ca.crt"

    @property
    def certificate(self) -> Path:
        """The server's certificate."""
        return self.tls / "server.crt"

    @property
    def key(self) -> Path:
        """The server's private key."""
        return self.tls / "server.key"

    @property
    def devices_db(self) -> Path:
        """Invitations and devices."""
        return self.folder / "devices.db"

    @property
    def devices_file(self) -> Path:
        """What the strategy reads of the enrolled devices."""
        return self.folder / "devices.json"

    @property
    def superlink_db(self) -> Path:
        """Flower's own state: nodes, runs, messages on their way."""
        return self.folder / "superlink.db"

    @property
    def secret(self) -> Path:
        """What Flower's SuperExec proves itself with to the SuperLink (owner only)."""
        return self.folder / "superexec.secret"

    @property
    def flwr_home(self) -> Path:
        """``FLWR_HOME``: the operator's connection, and unpacked apps."""
        return self.folder / "flwr"

    @property
    def runs(self) -> Path:
        """One folder for each run."""
        return self.folder / "runs"

    @property
    def registry(self) -> Path:
        """The versions that runs make."""
        return self.folder / "registry"

    @property
    def logs(self) -> Path:
        """What the processes say."""
        return self.folder / "logs"

    @property
    def nodes(self) -> Path:
        """Devices on this machine, for a try."""
        return self.folder / "nodes"

    @property
    def supervisor_config(self) -> Path:
        """Which processes there are."""
        return self.folder / "supervisord.conf"

    @property
    def traffic(self) -> Path:
        """Bytes that went through the door, by device."""
        return self.folder / "traffic.json"

    def node(self, client_id: str) -> NodeLayout:
        """Folder of a device on this machine."""
        return NodeLayout(self.nodes / client_id)


@dataclass(frozen=True)
class NodeLayout:
    """A device's folder.

    Args:
        folder: absolute.
    """

    folder: Path

    @property
    def config(self) -> Path:
        """``device.yaml``."""
        return self.folder / "device.yaml"

    @property
    def client(self) -> Path:
        """``client.yaml``: data, model and limits of training."""
        return self.folder / "client.yaml"
