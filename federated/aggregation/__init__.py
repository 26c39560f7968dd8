"""Aggregation rules: many updates become one.

Each rule is one class that satisfies `Rule`; `make_rule` finds one by its name in a config. Rules know no Flower,
no clock and no global random numbers.
"""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from pydantic import ValidationError

from federated.aggregation.basis import basis_of
from federated.aggregation.bulyan import Bulyan
from federated.aggregation.centered_clipping import CenteredClipping
from federated.aggregation.combine import check_combination, clients_needed, cohort_size
from federated.aggregation.factor_mean import FactorMean
from federated.aggregation.fedask import FedASK
from federated.aggregation.feddyn import FedDyn
from federated.aggregation.fedex import FedEx
from federated.aggregation.fedit import FedIT
from federated.aggregation.fednova import FedNova
from federated.aggregation.fedprox import FedProx
from federated.aggregation.fedrot import FedRotLoRA
from federated.aggregation.fedsa import FedSALoRA
from federated.aggregation.fedsb import FedSB
from federated.aggregation.fedsvd import FedSVD
from federated.aggregation.ffa import FFALoRA
from federated.aggregation.flasc import FLASC
from federated.aggregation.flexlora import FlexLoRA
from federated.aggregation.flora import FLoRA
from federated.aggregation.florist import FLoRIST
from federated.aggregation.geometric_median import GeometricMedian
from federated.aggregation.hetlora import HetLoRA
from federated.aggregation.krum import Krum
from federated.aggregation.lora_a2 import LoRAA2
from federated.aggregation.lora_fair import LoRAFAIR
from federated.aggregation.median import CoordinateMedian
from federated.aggregation.multi_krum import MultiKrum
from federated.aggregation.norm_bound import NormBound
from federated.aggregation.protocol import Accumulator, ClientView, NextPhase, Result, Rule, RuleProperties
from federated.aggregation.rolora import RoLoRA
from federated.aggregation.scaffold import Scaffold
from federated.aggregation.trimmed_mean import TrimmedMean
from federated.errors import ConfigError
from federated.sums import WeightedSum

__all__ = [
    "RULES",
    "Accumulator",
    "Bulyan",
    "CenteredClipping",
    "ClientView",
    "CoordinateMedian",
    "FFALoRA",
    "FLASC",
    "FedDyn",
    "FedNova",
    "FedProx",
    "FLoRA",
    "FLoRIST",
    "FactorMean",
    "FedASK",
    "FedEx",
    "FedIT",
    "FedRotLoRA",
    "FedSALoRA",
    "FedSB",
    "FedSVD",
    "FlexLoRA",
    "LoRAA2",
    "HetLoRA",
    "LoRAFAIR",
    "GeometricMedian",
    "Krum",
    "MultiKrum",
    "NextPhase",
    "NormBound",
    "Result",
    "RoLoRA",
    "Rule",
    "RuleProperties",
    "Scaffold",
    "TrimmedMean",
    "WeightedSum",
    "basis_of",
    "check_combination",
    "clients_needed",
    "cohort_size",
    "make_rule",
]

RULES: Mapping[str, Callable[..., Rule]] = {
    "feddyn": FedDyn,
    "fedask": FedASK,
    "fedex": FedEx,
    "bulyan": Bulyan,
    "centered_clipping": CenteredClipping,
    "fedit": FedIT,
    "fednova": FedNova,
    "fedprox": FedProx,
    "fedrot": FedRotLoRA,
    "fedsa": FedSALoRA,
    "fedsb": FedSB,
    "fedsvd": FedSVD,
    "ffa": FFALoRA,
    "flasc": FLASC,
    "flexlora": FlexLoRA,
    "lora_a2": LoRAA2,
    "hetlora": HetLoRA,
    "lora_fair": LoRAFAIR,
    "flora": FLoRA,
    "florist": FLoRIST,
    "geometric_median": GeometricMedian,
    "krum": Krum,
    "median": CoordinateMedian,
    "multi_krum": MultiKrum,
    "norm_bound": NormBound,
    "rolora": RoLoRA,
    "scaffold": Scaffold,
    "trimmed_mean": TrimmedMean,
}
"""Rule names that a config may use; what each is called with are its options."""


def make_rule(name: str, options: Mapping[str, Any] | None = None) -> Rule:
    """Make the rule of that name.

    Args:
        name: one of `RULES`.
        options: the rule's own settings, as in ``strategy.options``.

    Raises:
        ConfigError: if there is none, or an option is unknown or out of its range.
    """
    if name not in RULES:
        raise ConfigError(f"strategy.rule = {name!r}: unknown rule; expected one of {', '.join(sorted(RULES))}")
    given, known = dict(options or {}), list(signature(RULES[name]).parameters)
    unknown = sorted(given.keys() - set(known))
    if unknown:
        expected = f"expected some of {', '.join(known)}" if known else "it takes none"
        raise ConfigError(f"strategy.options.{unknown[0]} = {given[unknown[0]]!r}: no option of {name}; {expected}")
    try:
        return RULES[name](**given)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in fault["loc"])
        raise ConfigError(f"strategy.options.{key} = {fault['input']!r}: {fault['msg']}") from None
