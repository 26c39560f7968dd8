"""Federated fine-tuning of PEFT adapters.

Importing this package is light: it pulls in neither torch nor Flower, peft or transformers. Import the room
that you need, for example ``from federated.flower import DeltaStrategy``.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("federated-peft")
except PackageNotFoundError:  # a checkout that nobody installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
