"""A version's record against its schema, ``manifest.schema.json`` beside this file; ``docs/`` shows the same file.

The schema says which fields there are and of which form. What it cannot say (a digest that must fit, a number that must
grow) stands in `federated.registry.records` and `federated.registry.publication`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from federated.errors import RegistryError

__all__ = ["SCHEMA", "check_plain"]

SCHEMA = Path(__file__).with_name("manifest.schema.json")
"""JSON Schema, draft 2020-12."""


@lru_cache(maxsize=1)
def _validator() -> Any:
    from jsonschema import Draft202012Validator  # takes its time; reading needs none

    return Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8")))


def check_plain(manifest: Mapping[str, Any]) -> None:
    """Check a manifest as plain data.

    Raises:
        RegistryError: for the first thing that does not fit: where it is, what was found, what is expected.
    """
    fault = min(_validator().iter_errors(manifest), key=lambda error: list(map(str, error.absolute_path)), default=None)
    if fault is not None:
        where = ".".join(map(str, fault.absolute_path)) or "its fields"
        said = fault.message if len(fault.message) <= 200 else f"{fault.message[:200]}..."
        raise RegistryError(f"the manifest does not fit its schema at {where}: {said}; see docs/manifest.schema.json")
