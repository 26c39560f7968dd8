"""An app's bundle on a device: checked against the owner's list, unpacked for one task, and loaded from there alone.

Flower unpacks bundles into one folder for all, leaves what it finds there, and loads the folder that the server's word
for the app's name, version and digest leads to. A bundle that was pinned once, or one that came while nothing was
pinned, could so run in the place of the one that was checked. Here each task has a folder of its own, made of the bytes
that were checked, and the app is loaded from no other. Called by `federated.deployment.launcher`, which hands in what
is Flower's.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType
from typing import Any

from federated.errors import DeploymentError

__all__ = ["TaskApp", "check_bundle", "remove_unpacked"]

_PREFIX = "app-"


def check_bundle(content: bytes, apps: Collection[str]) -> str:
    """Check a bundle's bytes against the owner's list.

    Args:
        content: the bundle, as it came.
        apps: SHA-256 of those that may run; empty: any.

    Returns:
        Its SHA-256, or ``unpinned`` where any may run.

    Raises:
        DeploymentError: if it is not on the list.
    """
    if not apps:
        return "unpinned"
    found = hashlib.sha256(content).hexdigest()
    if found not in apps:
        raise DeploymentError(
            f"app_not_pinned: this device was sent {found[:12]} and runs "
            f"{', '.join(one[:12] for one in sorted(apps))} alone; if its owner trusts that bundle, its digest goes "
            "into training.apps"
        )
    return found


class TaskApp:
    """One task's app, in a folder of its own that goes with the task.

    Args:
        state: the launcher's folder.
        unpack: Flower's ``install_from_fab``.
        loader: Flower's ``get_load_client_app_fn``.
        check: is given a bundle's bytes before anything of them is read; what it raises ends the task.
    """

    def __init__(
        self,
        state: Path,
        *,
        unpack: Callable[..., Path],
        loader: Callable[..., Callable[..., Any]],
        check: Callable[[bytes], object],
    ) -> None:
        self._unpack, self._loader, self._check = unpack, loader, check
        self._folder = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=state, ignore_cleanup_errors=True)
        self._app: Path | None = None

    def __enter__(self) -> TaskApp:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._folder.cleanup()

    def install(self, content: bytes, *_: Any, **__: Any) -> Path:
        """Check a bundle and unpack it, in the place of ``install_from_fab``.

        Raises:
            DeploymentError: as ``check`` does.
        """
        self._check(content)
        self._app = self._unpack(content, install_dir=Path(self._folder.name), skip_prompt=True)
        return self._app

    def load_fn(self, *_: Any, **__: Any) -> Callable[..., Any]:
        """In the place of ``get_load_client_app_fn``: a function that loads what was checked.

        Flower's own compares the name and version that the server gave with those of the bundle.
        """
        return self._load

    def _load(self, *names: Any) -> Any:
        if self._app is None:
            raise DeploymentError("an app was to be loaded before a bundle was checked; install another flwr")
        return self._loader(default_app_ref="", app_path=str(self._app), multi_app=True)(*names)


def remove_unpacked(state: Path) -> None:
    """Remove what killed tasks left behind; none may be at work."""
    for folder in state.glob(f"{_PREFIX}*"):
        shutil.rmtree(folder, ignore_errors=True)
