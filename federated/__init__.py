"""Federated fine-tuning of PEFT adapters.

Importing this package is light: it pulls in neither torch nor Flower, peft or transformers. Import the room
that you need, for example ``from federated.flower import DeltaStrategy``.
"""

__version__: str

__all__ = ["__version__"]


def __getattr__(name: str) -> str:
    """Look up ``__version__`` when somebody asks: the reader of package metadata takes longer to load than we do."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("federated-peft")
    except PackageNotFoundError:  # a checkout that nobody installed
        return "0+unknown"
