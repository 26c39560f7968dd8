"""For those who write or check aggregation: a conformance suite against dense truth. Nothing in the library uses it."""

from federated.testing.conformance import Case, Finding, cases, dense_mean, effective_of, examine, fits

__all__ = ["Case", "Finding", "cases", "dense_mean", "effective_of", "examine", "fits"]
