"""For those who write or check aggregation: dense truth, and hostile clients. Nothing in the library uses it.

`federated.testing.releases` has the adversary between publisher and device; it needs the release extra.
"""

from federated.testing.adversaries import ADVERSARIES, GAUGES, Scene, hostile, in_another_basis
from federated.testing.conformance import Case, Finding, cases, crowded, dense_mean, effective_of, examine, fits

__all__ = [
    "ADVERSARIES",
    "Case",
    "Finding",
    "GAUGES",
    "Scene",
    "cases",
    "crowded",
    "dense_mean",
    "effective_of",
    "examine",
    "fits",
    "hostile",
    "in_another_basis",
]
