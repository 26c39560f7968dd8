"""The schema in docs/: it is the one that publishing checks against, and what federations really publish fits it."""

import json
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from federated.errors import RegistryError
from federated.manifest import VersionManifest
from federated.registry.manifest_schema import SCHEMA, check_plain

DOCS = Path(__file__).resolve().parents[3] / "docs"


def test_docs_show_the_schema_that_is_used():
    assert (DOCS / "manifest.schema.json").read_bytes() == SCHEMA.read_bytes()


def test_it_is_a_schema():
    Draft202012Validator.check_schema(json.loads(SCHEMA.read_text(encoding="utf-8")))


def test_it_knows_every_field(manifest_for):
    known = json.loads(SCHEMA.read_text(encoding="utf-8"))["properties"]
    assert set(known) == set(VersionManifest.__dataclass_fields__)
    check_plain(json.loads(json.dumps(manifest_for(b"one").to_dict())))


def test_unknown_fields_have_no_place(manifest_for):
    with pytest.raises(RegistryError, match="'clients' was unexpected"):
        check_plain({**manifest_for(b"one").to_dict(), "spec": manifest_for(b"one").spec.plain, "clients": ["a"]})
