"""The ``fedpeft`` command: the one place where names in a config become objects."""

__all__: list[str] = []
