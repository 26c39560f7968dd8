"""Low-rank work on whole adapters: another rank, a residual that grows and stays compact, and both as one adapter.

The residual of FLoRA and FedEx-LoRA is a second, frozen adapter over the same layers, with a scaling of 1 and a rank of
its own in each layer. It never touches the base model. Every function makes new tensors and leaves its inputs alone.
Called by `federated.global_state` and by rules; knows no clients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from federated.errors import AggregationError
from federated.lowrank import LowRank, Spectrum, balanced_factors, decompose, effective, norm_of, stack
from federated.manifest import AdapterSpec, ModuleSpec
from federated.state import AdapterState, LoraPair, Tensors

__all__ = ["Growth", "at_rank", "factors_from", "folded", "grow", "merged", "product_of"]

_IDLE = 1e-10
"""A singular value below this share of the largest is no direction, but what rounding left."""

_ROUNDED = 2.0**-24
"""Below this share of a layer's update, a direction of the residual is what float32 rounds off in the others."""


def product_of(adapter: AdapterState) -> dict[str, LowRank]:
    """Each layer's whole effective update, the residual's included, float64: layer name to product."""
    products = {pair.module.name: [effective(pair)] for pair in adapter.pairs()}
    for pair in adapter.residual.pairs() if adapter.residual else ():
        products[pair.module.name].append(effective(pair))
    return {name: stack(parts) for name, parts in products.items()}


def used_rank(found: Spectrum) -> int:
    """How many directions a matrix has, what rounding left aside."""
    return int((found.s > _IDLE * found.s[:1]).sum())


def factors_from(found: Spectrum, before: LoraPair) -> Tensors:
    """A layer's factors for a new product, float32: balanced, of the module's rank, the closest there is.

    Directions that the product does not use keep the rows of A that they had, with B zero: with both zero they could
    never be trained again.

    Args:
        found: the product's decomposition.
        before: the layer as it was; its module's rank is the new one, ``factor_a`` has at least as many rows.
    """
    name, rank = before.module.name, before.module.rank
    factor_a, factor_b = balanced_factors(found, rank=rank, scaling=before.scaling)
    used = min(rank, used_rank(found))
    factor_a[used:], factor_b[:, used:] = before.factor_a[used:rank].double(), 0.0
    return {f"{name}.factor_a": factor_a.float(), f"{name}.factor_b": factor_b.float()}


def at_rank(adapter: AdapterState, rank: int) -> AdapterState:
    """The closest adapter of a smaller rank, layer by layer; dense tensors are shared, the residual too.

    Raises:
        AggregationError: for a rank below 1 or above the adapter's, or an adapter with a core.
    """
    if adapter.spec.has_core:
        raise AggregationError(f"rank {rank} was asked of an adapter with a core: its rank is that of its core")
    if not 1 <= rank <= adapter.spec.rank:
        raise AggregationError(f"rank {rank} was asked of an adapter of rank {adapter.spec.rank}: expected 1 to that")
    spec = adapter.spec.with_rank(rank)
    tensors = dict(adapter.tensors)
    for pair, module in zip(adapter.pairs(), spec.modules, strict=True):
        if module.rank < pair.module.rank:
            smaller = pair._replace(module=module, scaling=spec.scaling(module))
            tensors |= factors_from(decompose(effective(pair)), smaller)
    return replace(adapter, spec=spec, tensors=tensors)


@dataclass(frozen=True)
class Growth:
    """A residual after it grew.

    Args:
        residual: the new one; None where it is zero.
        rank: its largest rank.
        kept: share of its squared norm that is in it: 1 unless it was truncated.
    """

    residual: AdapterState | None
    rank: int
    kept: float


def grow(
    residual: AdapterState | None,
    additions: Mapping[str, LowRank],
    beside: AdapterState,
    *,
    max_rank: int,
    truncate: bool,
) -> Growth:
    """``residual + additions``, compacted without loss by QR and a small SVD: never above a layer's smaller side.

    Without loss up to float32, in which it is kept: directions that are smaller than what rounding moves in the
    adapter, in the old residual or in what is added are left out. Differences of nearly equal products have many.

    Args:
        residual: as it was.
        additions: layer name to what is added to its effective update.
        beside: the adapter beside it: its layers, and how large their updates are.
        max_rank: bound of its rank; 0 means none.
        truncate: what to do above the bound: keep the closest matrix of that rank, or refuse.

    Raises:
        AggregationError: above the bound, unless it may be truncated.
    """
    before = product_of(residual) if residual else {}
    tensors: dict[str, torch.Tensor] = {}
    modules: list[ModuleSpec] = []
    kept = energy = 0.0
    for pair in beside.pairs():
        module = pair.module
        parts = [one[module.name] for one in (before, additions) if module.name in one]
        if not parts:
            continue
        found = decompose(stack(parts))
        floor = _ROUNDED * max(norm_of(part) for part in (*parts, effective(pair)))
        rank = _bounded(int((found.s > floor).sum()), max_rank, module=module, truncate=truncate)
        kept, energy = kept + found.kept(rank) * found.energy, energy + found.energy
        if rank:
            modules.append(replace(module, rank=rank, alpha=float(rank)))
            tensors |= _plain_factors(module.name, found, rank)
    if not modules:
        return Growth(None, 0, 1.0)
    largest = max(module.rank for module in modules)
    spec = AdapterSpec("lora", largest, float(largest), use_rslora=False, modules=tuple(modules))
    return Growth(AdapterState(spec, tensors), largest, kept / energy)


def _plain_factors(name: str, found: Spectrum, rank: int) -> Tensors:
    factor_a, factor_b = balanced_factors(found, rank=rank, scaling=1.0)
    return {f"{name}.factor_a": factor_a.float(), f"{name}.factor_b": factor_b.float()}


def _bounded(rank: int, most: int, *, module: ModuleSpec, truncate: bool) -> int:
    if not most or rank <= most:
        return rank
    if truncate:
        return most
    raise AggregationError(
        f"the residual of layer {module.name} would reach rank {rank}, at most {most} is allowed: raise "
        "strategy.options.max_residual_rank, or allow strategy.options.overflow=truncate"
    )


def folded(adapter: AdapterState) -> AdapterState:
    """The same adapter as plain LoRA, its core multiplied into ``factor_a`` (float32); without a core, as it is."""
    if not adapter.spec.has_core:
        return adapter
    tensors: dict[str, torch.Tensor] = dict(adapter.dense())
    for pair in adapter.pairs():
        name = pair.module.name
        tensors |= {f"{name}.factor_a": pair.factor_a.float(), f"{name}.factor_b": pair.factor_b}
    return replace(adapter, spec=replace(adapter.spec, peft_type="lora"), tensors=tensors)


def merged(adapter: AdapterState) -> AdapterState:
    """Adapter and residual as one plain adapter with the same effective update: what a device serves.

    Layers keep their scaling; their rank is what the sum needs. Tensors are float32, dense ones shared.
    """
    if adapter.residual is None:
        return adapter
    tensors: dict[str, torch.Tensor] = dict(adapter.dense())
    modules = []
    products = product_of(adapter)
    for pair in adapter.pairs():
        found = decompose(products[pair.module.name])
        rank = max(1, used_rank(found))
        root = rank**0.5 if adapter.spec.use_rslora else float(rank)
        module = replace(pair.module, rank=rank, alpha=pair.scaling * root)
        tensors |= factors_from(found, pair._replace(module=module, factor_a=_rows(pair, rank)))
        modules.append(module)
    largest = max(modules, key=lambda one: one.rank)
    spec = replace(adapter.spec, rank=largest.rank, alpha=largest.alpha, modules=tuple(modules))
    return AdapterState(spec, tensors)


def _rows(pair: LoraPair, rank: int) -> torch.Tensor:
    """``factor_a`` with at least that many rows: idle ones are zero."""
    missing = max(0, rank - pair.factor_a.shape[0])
    return torch.cat([pair.factor_a, pair.factor_a.new_zeros(missing, pair.factor_a.shape[1])])
