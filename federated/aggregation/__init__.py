"""Aggregation rules: many updates become one.

Each rule is one class that satisfies `Rule`; `make_rule` finds one by its name in a config. Rules know no Flower,
no clock and no global random numbers.
"""

from collections.abc import Callable, Mapping

from federated.aggregation.combine import check_combination
from federated.aggregation.factor_mean import FactorMean
from federated.aggregation.fedit import FedIT
from federated.aggregation.fedsvd import FedSVD
from federated.aggregation.ffa import FFALoRA
from federated.aggregation.flexlora import FlexLoRA
from federated.aggregation.protocol import Accumulator, ClientView, NextPhase, Result, Rule, RuleProperties
from federated.aggregation.rolora import RoLoRA
from federated.aggregation.sums import WeightedSum
from federated.errors import ConfigError

__all__ = [
    "RULES",
    "Accumulator",
    "ClientView",
    "FFALoRA",
    "FactorMean",
    "FedIT",
    "FedSVD",
    "FlexLoRA",
    "NextPhase",
    "Result",
    "RoLoRA",
    "Rule",
    "RuleProperties",
    "WeightedSum",
    "check_combination",
    "make_rule",
]

RULES: Mapping[str, Callable[[], Rule]] = {
    "fedit": FedIT,
    "fedsvd": FedSVD,
    "ffa": FFALoRA,
    "flexlora": FlexLoRA,
    "rolora": RoLoRA,
}
"""Rule names that a config may use."""


def make_rule(name: str) -> Rule:
    """Make the rule of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in RULES:
        raise ConfigError(f"strategy.rule = {name!r}: unknown rule; expected one of {', '.join(sorted(RULES))}")
    return RULES[name]()
