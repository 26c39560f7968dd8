"""Where a base model's files are: a folder, a fetched asset or the hub; checked before anything is loaded."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from federated.config import ModelConfig
from federated.errors import ModelError

__all__ = ["Location", "locate"]

_EXPECTED = "set model.source to a folder with config.json and model.safetensors"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Location:
    """Where to load from.

    Args:
        folder: absolute folder, or a hub name.
        gguf_file: file in it, when the weights are GGUF.
        revision: hub revision.
        offline: whether everything is on this machine, so that nothing need be asked of a network.
    """

    folder: str
    gguf_file: str | None = None
    revision: str | None = None
    offline: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for transformers' ``from_pretrained``; code that comes with a model is never run."""
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": self.offline}
        options |= {"revision": self.revision} if self.revision else {}
        return options | ({"gguf_file": self.gguf_file} if self.gguf_file else {})


def locate(config: ModelConfig, app_dir: Path | None = None) -> Location:
    """Find a model's files.

    Args:
        config: source, gguf_file, revision.
        app_dir: where relative folders are looked up after the working directory.

    Raises:
        ModelError: if there are none, they are not of a base model, or their weights are missing or pickled.
        DataError: if an asset was not fetched.
    """
    if config.source.startswith("asset:"):
        return _asset(config)
    roots = [root for root in (Path.cwd(), app_dir) if root is not None]
    for root in roots:
        if (root / config.source).is_dir():
            folder = (root / config.source).resolve()
            _check_folder(folder, config.gguf_file)
            return Location(str(folder), config.gguf_file)
    return _hub(config, " or ".join(str(root) for root in roots))


def _asset(config: ModelConfig) -> Location:
    from federated.data import asset_path

    path = Path(asset_path(config.source.removeprefix("asset:")))
    if path.suffix == ".gguf":
        return Location(str(path.parent), path.name)
    _check_folder(path, config.gguf_file)
    return Location(str(path), config.gguf_file)


def _check_folder(folder: Path, gguf_file: str | None) -> None:
    if gguf_file is not None:
        if not (folder / gguf_file).is_file():
            raise ModelError(f"model folder {folder} holds no {gguf_file}; set model.gguf_file to a file in it")
        return
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"model folder {folder} holds an adapter; expected a base model without adapter_config.json")
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {folder} holds no config.json; expected config.json and model.safetensors")
    if any(folder.glob("*.safetensors")):
        return
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise ModelError(
            f"model folder {folder} holds only pickled weights, which can run code; convert them to model.safetensors"
        )
    raise ModelError(
        f"model folder {folder} holds no weights; expected model.safetensors beside config.json "
        "(set model.gguf_file for GGUF weights)"
    )


def _hub(config: ModelConfig, looked: str) -> Location:
    """Refuse what cannot be a hub name, or cannot be had now: the hub's own client retries for half a minute."""
    if _HUB_NAME.fullmatch(config.source) is None:
        raise ModelError(f"model folder {config.source} was not found (looked from {looked}); {_EXPECTED}")
    cached = _cached(config)
    if not cached and not _reachable():
        raise ModelError(
            f"model {config.source} was not found: no such folder (looked from {looked}), not in the hub's cache, and "
            f"the hub cannot be reached; {_EXPECTED}"
        )
    return Location(config.source, config.gguf_file, config.revision, offline=cached)


def _cached(config: ModelConfig) -> bool:
    from huggingface_hub import try_to_load_from_cache

    wanted = (config.gguf_file,) if config.gguf_file else ("model.safetensors", "model.safetensors.index.json")
    found = (try_to_load_from_cache(config.source, name, revision=config.revision) for name in wanted)
    return any(isinstance(path, str) for path in found)


def _reachable(seconds: float = 3.0) -> bool:
    """Whether the hub answers; a machine behind a proxy is taken at its word."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies():
        return not constants.HF_HUB_OFFLINE
    address = urlsplit(constants.ENDPOINT)
    try:
        with socket.create_connection((address.hostname or "", address.port or 443), timeout=seconds):
            return True
    except OSError:
        return False
