"""Does a rule do what it claims? Every rule is held against the dense float64 definition of what it should compute.

The truth is ``dW* = sum_k p_k scaling * B_k A_k`` of what the clients hold after training, formed densely and in
float64, with the layer's own scaling (alpha / r, or alpha / sqrt(r) for rsLoRA), and with the frozen residual where
there is one. `examine` runs a rule on a case, as a strategy would (plan, start, add, finish, and the plain step of
averaging), and measures how far the adapter that it makes, residual included, is from the truth:

    exact         within 1e-6 of the truth, relative to it
    truncation    as close as any adapter of that rank can be (Eckart and Young), within 1e-6 of the truth's norm
    approximate   no bound: the gap is what the rule costs, and is reported

Updates pass through `federated.uploads`, as on the wire. Under a rule that lets tensors stay on the client, the truth
is each client's own: the mean of what all hold, with the tensors that it keeps in everybody's place; the worst counts.

Rules that withstand hostile clients weigh all alike and take a statistic of their own for dense tensors: their truth is
the mean with equal weights, and dense tensors are not held against it. Where the truth is zero the bounds are absolute.
With bfloat16 adapters, what clients receive is rounded to 8 bits, and the bounds are 2^-6. Run it on your own rule:

    for case in cases(rule=MyRule()):
        finding = examine(MyRule(), case)
        assert finding.passed, finding

Without a rule, `cases` gives those that every rule takes. Some need what only some rules have (`Case.needs`: clients of
different ranks, a residual); `fits` says whether a rule takes one, and `examine` refuses it otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from federated.aggregation import ClientView, NextPhase, Result, Rule
from federated.delta import Update
from federated.errors import AggregationError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, HeadSpec, ModuleSpec
from federated.state import AdapterState, Tensors, group_of
from federated.uploads import pack, unpack

__all__ = ["Case", "Finding", "cases", "crowded", "dense_mean", "effective_of", "examine", "fits"]

_BOUND = {"F32": 1e-6, "BF16": 2.0**-6, "F16": 2.0**-9}
_MEAN = "mean_pool"
_MOST_PHASES = 8


@dataclass(frozen=True)
class Case:
    """One round's input.

    Args:
        name: what is special about it.
        adapter: the global adapter before the round, float32.
        trained: client id to what that client would move, for all groups; a rule's plan decides which of it counts.
            Factors of the adapter's rank: a client of a smaller one moves their first rows and columns.
        weights: client id to weight.
        residual: the frozen residual before the round.
        ranks: client id to rank, where it is smaller than the adapter's.
    """

    name: str
    adapter: AdapterState
    trained: Mapping[str, Tensors]
    weights: Mapping[str, float]
    residual: AdapterState | None = None
    ranks: Mapping[str, int] = field(default_factory=dict)

    @property
    def needs(self) -> tuple[str, ...]:
        """The properties that a rule must have for this case: of ``mixed_ranks`` and ``residual``."""
        return ("mixed_ranks",) * bool(self.ranks) + ("residual",) * (self.residual is not None)


@dataclass(frozen=True)
class Finding:
    """What a rule made of a case.

    Args:
        rule: its name.
        case: the case's name.
        exactness: what the rule claims.
        error: distance of the new effective update from the truth, relative to the truth's norm (absolute where
            that is zero), over all layers.
        optimum: the same for the best adapter of that rank, beside the residual as it was.
        dense_error: largest relative error of the dense tensors' mean.
        bound: what ``error - optimum`` (or ``error``) may be.
        dense_claim: whether the rule claims to average dense tensors.
    """

    rule: str
    case: str
    exactness: str
    error: float
    optimum: float
    dense_error: float
    bound: float
    dense_claim: bool = True

    @property
    def passed(self) -> bool:
        """Whether the claim holds."""
        allowed = {"exact": self.bound, "truncation": self.optimum + self.bound}.get(self.exactness, float("inf"))
        return self.error <= allowed and (self.dense_error <= self.bound or not self.dense_claim)


def effective_of(adapter: AdapterState) -> dict[str, Tensor]:
    """Each layer's dense effective update ``scaling * B @ A``, the residual's included, float64 [d_out, d_in]."""
    pairs = [*adapter.pairs(), *(adapter.residual.pairs() if adapter.residual else ())]
    sums: dict[str, Tensor] = {}
    for pair in pairs:
        product = pair.scaling * pair.factor_b.double() @ pair.factor_a.double()
        sums[pair.module.name] = sums.get(pair.module.name, torch.zeros_like(product)) + product
    return sums


def dense_mean(adapters: Mapping[str, AdapterState], weights: Mapping[str, float]) -> dict[str, Tensor]:
    """``sum_k p_k scaling * B_k A_k`` of each layer, dense and in float64: the truth."""
    total = sum(weights[client_id] for client_id in adapters)
    means: dict[str, Tensor] = {}
    for client_id, adapter in adapters.items():
        for name, matrix in effective_of(adapter).items():
            means[name] = means.get(name, torch.zeros_like(matrix)) + weights[client_id] / total * matrix
    return means


def fits(rule: Rule, case: Case) -> bool:
    """Whether a rule has what a case needs."""
    return all(getattr(rule.properties, name) for name in case.needs)


def examine(rule: Rule, case: Case) -> Finding:
    """Run a rule on a case and measure it.

    Raises:
        AggregationError: if the rule does not fit the case, refuses it, or never comes to an end.
    """
    if not fits(rule, case):
        raise AggregationError(f"case {case.name!r} needs {' and '.join(case.needs)}, which {rule.name} has not")
    if rule.properties.robust:
        case = replace(case, weights=dict.fromkeys(case.weights, 1.0))
    before = GlobalState(case.adapter, case.residual, rule_state=rule.init(case.adapter.spec))
    after: dict[str, AdapterState] = {}
    result, phase = _phase(rule, case, before, phase=1, after=after), 1
    while isinstance(result, NextPhase):
        if not phase < result.phase <= _MOST_PHASES:
            raise AggregationError(f"{rule.name} asks for phase {result.phase} after phase {phase}")
        phase = result.phase
        result = _phase(rule, case, result.state, phase=phase, after=after)
    state = result.state or before
    made = state.adapter if result.state else _moved(case.adapter, result.mean_delta or {})
    made = replace(made, residual=state.residual)
    kept = rule.plan(before, ClientView(min(case.trained)), 1)[0].kept
    findings = [
        _measured(rule, case, made=_with(own, made), after={name: _with(own, one) for name, one in after.items()})
        for own in _kept(after, kept)
    ]
    return max(findings, key=lambda finding: (not finding.passed, finding.error))


def _kept(after: Mapping[str, AdapterState], groups: Sequence[str]) -> list[Tensors]:
    """What each client keeps; the one empty set for a rule under which nobody keeps anything."""
    if not groups:
        return [{}]
    return [
        {name: tensor for name, tensor in adapter.tensors.items() if group_of(name) in groups}
        for adapter in after.values()
    ]


def _with(own: Tensors, adapter: AdapterState) -> AdapterState:
    return replace(adapter, tensors={**adapter.tensors, **own})


def _first(tensor: Tensor, shape: torch.Size) -> Tensor:
    """The first rows and columns of a matrix."""
    return tensor[tuple(slice(size) for size in shape)]


def _phase(
    rule: Rule, case: Case, state: GlobalState, *, phase: int, after: dict[str, AdapterState]
) -> NextPhase | Result:
    """One exchange; what clients hold after the first goes into ``after``, and later ones may answer from it."""
    accumulator = rule.start(state, phase)
    for client_id, moves in case.trained.items():
        plan, payload = rule.plan(state, ClientView(client_id, case.ranks.get(client_id)), phase)
        if plan.cached:
            held = replace(after[client_id], extra=payload.extra)
            delta = {name: move for name, move in moves.items() if group_of(name) == "dense"}
        else:
            fitting = {name: _first(move, payload.tensors[name].shape) for name, move in moves.items()}
            held, delta = payload, {name: move for name, move in fitting.items() if group_of(name) in plan.trainable}
            moved = {name: tensor.float() + delta.get(name, 0.0) for name, tensor in payload.tensors.items()}
            after[client_id] = replace(payload, tensors=moved)
        sent = unpack(plan, payload, pack(plan, held, delta))
        accumulator.add(Update(client_id, sent, num_examples=1, received=payload), case.weights[client_id])
    return accumulator.finish()


def _moved(adapter: AdapterState, mean_delta: Tensors) -> AdapterState:
    """The step of plain averaging."""
    moved = {name: (adapter.tensors[name].double() + move.double()).float() for name, move in mean_delta.items()}
    return replace(adapter, tensors={**adapter.tensors, **moved})


def _measured(rule: Rule, case: Case, *, made: AdapterState, after: Mapping[str, AdapterState]) -> Finding:
    truth, found = dense_mean(after, case.weights), effective_of(made)
    ranks = {module.name: module.rank for module in made.spec.modules}
    size = _norm(truth) or 1.0
    frozen = effective_of(replace(_still(case.adapter), residual=case.residual))
    missed = [
        torch.linalg.svdvals(matrix - frozen[name])[ranks[name] :].square().sum() for name, matrix in truth.items()
    ]
    total = sum(case.weights[client_id] for client_id in after)
    dense_errors = [0.0]
    for name, tensor in made.dense().items():
        mean = sum(case.weights[one] / total * after[one].tensors[name].double() for one in after)
        dense_errors.append(float((tensor.double() - mean).norm()) / max(float(torch.as_tensor(mean).norm()), 1e-30))
    return Finding(
        rule=rule.name,
        case=case.name,
        exactness=rule.properties.exactness,
        error=_norm({name: found[name] - matrix for name, matrix in truth.items()}) / size,
        optimum=float(torch.stack(missed).sum().sqrt()) / size,
        dense_error=max(dense_errors),
        bound=_BOUND[case.adapter.spec.dtype],
        dense_claim=rule.properties.averages and not rule.properties.robust,
    )


def _still(adapter: AdapterState) -> AdapterState:
    """An adapter whose own update is zero."""
    return replace(adapter, tensors={name: torch.zeros_like(tensor) for name, tensor in adapter.tensors.items()})


def _norm(matrices: Mapping[str, Tensor]) -> float:
    return float(torch.stack([matrix.double().square().sum() for matrix in matrices.values()]).sum().sqrt())


def cases(seed: int = 0, *, rule: Rule | None = None) -> Iterator[Case]:
    """The grid: scalings, layouts, shapes, weights, participation, zero updates, bfloat16; two layers each.

    Args:
        seed: of all numbers.
        rule: also the cases that need what this rule has: clients of different ranks, a residual before the round; and
            adapters of the kind that it works on. None gives the LoRA cases that every rule takes.
    """
    cored = rule is not None and rule.properties.adapter != "lora"
    for case in _grid(seed):
        if not case.needs or (rule is not None and fits(rule, case)):
            yield _cored(case, seed) if cored else case


def _cored(case: Case, seed: int) -> Case:
    """The same case with a core between the factors; a fresh one starts at zero, and B does not."""
    generator = torch.Generator().manual_seed(seed)
    modules, fresh = case.adapter.spec.modules, all(not pair.factor_b.any() for pair in case.adapter.pairs())

    def with_cores(tensors: Tensors, scale: float) -> dict[str, Tensor]:
        size = [(f"{one.name}.core", (one.rank, one.rank)) for one in modules]
        return {**tensors, **{name: scale * torch.randn(shape, generator=generator) for name, shape in size}}

    factors = {
        name: torch.randn(one.shape, generator=generator) if fresh and group_of(name) == "factor_b" else one
        for name, one in case.adapter.tensors.items()
    }
    spec = replace(case.adapter.spec, peft_type="lora_xs")
    trained = {
        client: with_cores(moves, 0.7 * any(bool(move.any()) for move in moves.values()))
        for client, moves in case.trained.items()
    }
    return replace(case, adapter=AdapterState(spec, with_cores(factors, float(not fresh))), trained=trained)


def _grid(seed: int) -> Iterator[Case]:
    yield _case("alpha is r", seed, alpha=3.0)
    yield _case("alpha is not r", seed)
    yield _case("rsLoRA", seed, use_rslora=True)
    yield _case("Conv1D", seed, fan_in_fan_out=True)
    yield _case("wide", seed, shape=(4, 11))
    yield _case("tall", seed, shape=(11, 4))
    yield _case("rank is a dimension", seed, shape=(3, 9))
    yield _case("rank one", seed, rank=1)
    yield _case("unequal weights", seed, weights=(1.0, 10.0, 0.25))
    yield _case("one client", seed, weights=(7.0,))
    yield _case("many clients", seed, weights=tuple(float(number) for number in range(1, 13)))
    yield _case("a fresh adapter", seed, fresh=True)
    yield _case("one client learns nothing", seed, still=("client-000",))
    yield _case("nobody learns anything", seed, fresh=True, still=("client-000", "client-001", "client-002"))
    yield _case("bfloat16", seed, dtype="BF16")
    yield _mixed(_case("mixed ranks", seed), (1, 2, 3))
    yield _mixed(_case("mixed ranks, rsLoRA, unequal weights", seed, use_rslora=True, weights=(1.0, 0.25, 9.0)), (2, 1))
    yield _mixed(_case("mixed ranks, nobody has the whole", seed), (1, 1, 2))
    yield _mixed(_case("mixed ranks, a fresh adapter", seed, fresh=True), (1, 2, 3))
    yield _mixed(_case("mixed ranks, bfloat16", seed, dtype="BF16"), (1, 2, 3))
    yield _beside(_case("a residual", seed), seed)
    yield _beside(_case("a residual, Conv1D", seed, fan_in_fan_out=True), seed)
    yield _beside(_case("a residual, nobody learns anything", seed, fresh=True, still=("client-000",)), seed)
    yield _beside(_case("a residual of one layer", seed, shape=(4, 11)), seed, layers=("layer.q",))
    yield _beside(_case("a residual as large as the layer", seed, shape=(3, 9)), seed, rank=3)
    yield _beside(_case("a residual, bfloat16", seed, dtype="BF16"), seed)
    yield _mixed(_beside(_case("a residual and mixed ranks", seed), seed), (3, 1, 2))


def _mixed(case: Case, ranks: tuple[int, ...]) -> Case:
    """The first clients at smaller ranks."""
    given = dict(zip(case.trained, ranks, strict=False))
    return replace(case, ranks={one: rank for one, rank in given.items() if rank < case.adapter.spec.rank})


def _beside(case: Case, seed: int, *, rank: int = 2, layers: tuple[str, ...] = ("layer.k", "layer.q")) -> Case:
    """With a residual of that rank in some layers, drawn from its own numbers."""
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    modules = [replace(one, rank=rank, alpha=float(rank)) for one in case.adapter.spec.modules if one.name in layers]
    tensors: dict[str, Tensor] = {}
    for one in modules:
        tensors[f"{one.name}.factor_a"] = torch.randn(rank, one.d_in, generator=generator)
        tensors[f"{one.name}.factor_b"] = torch.randn(one.d_out, rank, generator=generator)
    spec = AdapterSpec("lora", rank, float(rank), use_rslora=False, modules=tuple(modules))
    return replace(case, residual=AdapterState(spec, tensors))


def _case(
    name: str,
    seed: int,
    *,
    rank: int = 3,
    alpha: float = 8.0,
    use_rslora: bool = False,
    fan_in_fan_out: bool = False,
    shape: tuple[int, int] = (7, 6),
    weights: tuple[float, ...] = (1.0, 2.0, 3.0),
    fresh: bool = False,
    still: tuple[str, ...] = (),
    dtype: str = "F32",
) -> Case:
    d_out, d_in = shape
    layers = [ModuleSpec(f"layer.{letter}", d_in, d_out, rank, alpha, fan_in_fan_out) for letter in "kq"]
    head = HeadSpec(_MEAN, 2, trained=True, seed=0)
    spec = AdapterSpec("lora", rank, alpha, use_rslora, tuple(layers), head=head, dtype=dtype)
    shapes = {f"{layer.name}.factor_a": (rank, d_in) for layer in layers}
    shapes |= {f"{layer.name}.factor_b": (d_out, rank) for layer in layers} | {"head.weight": (2, d_in)}
    generator = torch.Generator().manual_seed(seed)

    def drawn(scale: float) -> dict[str, Tensor]:
        return {key: scale * torch.randn(size, generator=generator) for key, size in shapes.items()}

    start = drawn(1.0)
    if fresh:
        start = {key: torch.zeros_like(one) if key.endswith("factor_b") else one for key, one in start.items()}
    names = [f"client-{number:03d}" for number in range(len(weights))]
    moves = {client: drawn(0.0 if client in still else 0.7) for client in names}
    return Case(name, AdapterState(spec, start), moves, dict(zip(names, weights, strict=True)))


def crowded(case: Case, clients: int, *, seed: int = 0) -> Case:
    """The same round with at least that many clients, for rules that need them; those that are there stay.

    Further clients move as far as the others, elsewhere; where nobody moves, they do not either. They weigh 1.
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        name: float(torch.stack([moves[name].float() for moves in case.trained.values()]).square().mean().sqrt())
        for name in case.adapter.tensors
    }
    trained: dict[str, Tensors] = dict(case.trained)
    for number in range(len(trained), clients):
        trained[f"client-{number:03d}"] = {
            name: sizes[name] * torch.randn(tensor.shape, generator=generator)
            for name, tensor in case.adapter.tensors.items()
        }
    weights = {client_id: case.weights.get(client_id, 1.0) for client_id in trained}
    return replace(case, trained=trained, weights=weights)
