"""The error tree: what is caught by catching what, and what an error says."""

import ast
from pathlib import Path

import pytest

from federated import errors
from federated.errors import FederatedError, UpdateRejected
from federated.wire import REASONS

CLASSES = [getattr(errors, name) for name in errors.__all__]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_error_is_caught_by_the_root(kind: type[Exception]) -> None:
    assert issubclass(kind, FederatedError)
    assert kind.__doc__


def test_every_class_in_the_module_is_public() -> None:
    tree = ast.parse(Path(errors.__file__).read_text(encoding="utf-8"))
    assert {node.name for node in tree.body if isinstance(node, ast.ClassDef)} == set(errors.__all__)


def test_the_drawn_tree_is_the_tree() -> None:
    """Each line of the picture stands as deep as its class."""
    drawn = {}
    for line in (errors.__doc__ or "").splitlines():
        name = line.strip("│├└─ ").partition(" ")[0]
        if name in errors.__all__:
            drawn[name] = (len(line) - len(line.lstrip("│├└─ "))) // 4
    depth = {kind.__name__: kind.__mro__.index(FederatedError) + 1 for kind in CLASSES}
    assert drawn == depth


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [
        (errors.BaseMismatch, errors.ModelError),
        (errors.NotEnoughUpdates, errors.AggregationError),
        (errors.VersionNotFound, errors.RegistryError),
        (errors.CorruptBlob, errors.RegistryError),
        (errors.ChannelConflict, errors.RegistryError),
        (errors.StorageFull, errors.RegistryError),
    ],
)
def test_branches(narrow: type[Exception], wide: type[Exception]) -> None:
    assert issubclass(narrow, wide)


def test_a_refused_update_is_no_aggregation_error() -> None:
    """A strategy that catches the one must not swallow the other."""
    assert not issubclass(UpdateRejected, errors.AggregationError)
    assert not issubclass(errors.WireError, UpdateRejected)


def test_a_refusal_says_its_reason_first() -> None:
    error = UpdateRejected("not_finite", "tensor w holds a NaN", client_id="clinic")
    assert (error.reason, error.client_id, str(error)) == ("not_finite", "clinic", "not_finite: tensor w holds a NaN")


def test_a_refusal_may_come_from_nobody_known() -> None:
    assert UpdateRejected("bad_token", "found none").client_id is None


def test_reason_codes_are_stable_words() -> None:
    assert all(reason.isidentifier() and reason.islower() for reason in REASONS)
