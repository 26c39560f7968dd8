"""Each robust rule against its own equation on dense float64 vectors, in both spaces, and what it refuses."""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from federated.aggregation import RULES, ClientView, Result, Rule, check_combination, clients_needed, make_rule
from federated.aggregation.combine import cohort_size
from federated.config import ExperimentConfig, SelectionConfig, ServerOptimizerConfig, StrategyConfig, TaskConfig
from federated.delta import Update
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates
from federated.global_state import GlobalState
from federated.state import AdapterState, Tensors
from federated.testing import Case, cases, crowded, effective_of, examine

ROBUST = sorted(name for name in RULES if make_rule(name).properties.robust)
COORDINATES = ("bulyan", "median", "trimmed_mean")
CASES = {case.name: case for case in cases()}
CASE = CASES["unequal weights"]
TRIED = ("alpha is not r", "rsLoRA", "Conv1D", "tall", "rank is a dimension", "rank one", "a fresh adapter")
LEAST = {"krum": (2, 3), "multi_krum": (2, 3), "bulyan": (4, 3)}
every_rule = pytest.mark.parametrize("name", ROBUST)


def variants() -> Iterator[Any]:
    """Every rule in every space that it has, with and without mixing."""
    for name, space, nnm in itertools.product(ROBUST, ("factor", "product"), (False, True)):
        if space == "factor" or name not in COORDINATES:
            mark = f"{name}-{space}{'-nnm' if nnm else ''}"
            yield pytest.param(name, {"space": space, "nnm": nnm}, id=mark)


every_variant = pytest.mark.parametrize(("name", "options"), list(variants()))


def updates(case: Case) -> list[Update]:
    return [Update(client_id, moves, 1) for client_id, moves in case.trained.items()]


def combined(rule: Rule, case: Case, given: list[Update] | None = None) -> Result:
    accumulator = rule.start(GlobalState(case.adapter), 1)
    for update in updates(case) if given is None else given:
        accumulator.add(update, case.weights.get(update.client_id, 1.0))
    result = accumulator.finish()
    assert isinstance(result, Result)
    return result


def made(rule: Rule, case: Case, given: list[Update] | None = None) -> AdapterState:
    return combined(rule, case, given).state.adapter


# ---- the rules on plain vectors --------------------------------------------------------------------------------------


def apart(points: Tensor) -> Tensor:
    """Distances from differences, where equal points have exactly none."""
    return (points[:, None] - points[None]).norm(dim=-1)


def scores(points: Tensor, f: int) -> Tensor:
    """To nine digits, so that the first of equal ones is the lowest."""
    squares = apart(points).square()
    found = torch.stack([row.sort().values[1 : 1 + max(1, len(points) - f - 2)].sum() for row in squares])
    return torch.tensor([float(f"{float(one):.8e}") for one in found])


def krum(points: Tensor, f: int) -> Tensor:
    return points[scores(points, f).argmin()]


def multi_krum(points: Tensor, f: int) -> Tensor:
    return points[scores(points, f).argsort(stable=True)[: len(points) - f - 2]].mean(dim=0)


def trimmed_mean(points: Tensor, f: int) -> Tensor:
    return points.sort(dim=0).values[f : len(points) - f].mean(dim=0)


def median(points: Tensor, f: int) -> Tensor:
    return torch.quantile(points, 0.5, dim=0)


def bulyan(points: Tensor, f: int) -> Tensor:
    left = list(range(len(points)))
    taken = [left.pop(int(scores(points[left], f).argmin())) for _ in range(len(points) - 2 * f)]
    picked = points[taken]
    nearest = (picked - torch.quantile(picked, 0.5, dim=0)).abs().argsort(dim=0)[: len(taken) - 2 * f]
    return picked.gather(0, nearest).mean(dim=0)


def geometric_median(points: Tensor, f: int) -> Tensor:
    found = points.mean(dim=0)
    for _ in range(5000):
        closeness = 1 / (points - found).norm(dim=1).clamp(min=1e-9)
        found = (closeness @ points) / closeness.sum()
    return found


def centered_clipping(points: Tensor, f: int) -> Tensor:
    found = torch.zeros_like(points[0])
    for _ in range(20):
        sizes = (points - found).norm(dim=1)
        limit = sizes.sort().values[len(sizes) // 2]
        found = found + ((points - found) * (limit / sizes).clamp(max=1)[:, None]).mean(dim=0)
    return found


def norm_bound(points: Tensor, f: int) -> Tensor:
    sizes = points.norm(dim=1)
    limit = sizes.sort().values[len(sizes) // 2]
    return (points * (limit / sizes).clamp(max=1)[:, None]).mean(dim=0)


def mixed(points: Tensor, f: int) -> Tensor:
    order = apart(points).argsort(dim=1)[:, : len(points) - f]
    return torch.stack([points[row].mean(dim=0) for row in order])


EQUATIONS = {
    "bulyan": bulyan,
    "centered_clipping": centered_clipping,
    "geometric_median": geometric_median,
    "krum": krum,
    "median": median,
    "multi_krum": multi_krum,
    "norm_bound": norm_bound,
    "trimmed_mean": trimmed_mean,
}


# ---- updates as plain vectors ----------------------------------------------------------------------------------------


def after(case: Case, moves: Tensors) -> AdapterState:
    return replace(case.adapter, tensors={name: tensor + moves[name] for name, tensor in case.adapter.tensors.items()})


def balanced(product: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    u, s, vh = torch.linalg.svd(product)
    factor_a, factor_b = torch.zeros(rank, product.shape[1]).double(), torch.zeros(product.shape[0], rank).double()
    count = min(rank, len(s))
    root = torch.where(s > 1e-9 * s[0], s, 0.0)[:count].sqrt()
    factor_a[:count], factor_b[:, :count] = root[:, None] * vh[:count], u[:, :count] * root
    return factor_a, factor_b


def canonical(case: Case, adapter: AdapterState) -> dict[str, Tensor]:
    """Dense balanced factors, turned towards the received ones, or towards A where there is no product yet."""
    found = {}
    before, now = effective_of(case.adapter), effective_of(adapter)
    for pair in case.adapter.pairs():
        name, rank = pair.module.name, pair.module.rank
        towards_a, towards_b = balanced(before[name], rank)
        guide = towards_a if towards_a.any() else pair.factor_a.double()
        factor_a, factor_b = balanced(now[name], rank)
        left, _, right = torch.linalg.svd(guide @ factor_a.T + towards_b.T @ factor_b)
        found[f"{name}.factor_a"] = left @ right @ factor_a - towards_a
        found[f"{name}.factor_b"] = factor_b @ (left @ right).T - towards_b
    return found


def vector_of(case: Case, moves: Tensors, space: str) -> dict[str, Tensor]:
    dense = {name: moves[name].double() for name in case.adapter.dense()}
    if space == "factor":
        return {**canonical(case, after(case, moves)), **dense}
    before = effective_of(case.adapter)
    return {**{name: matrix - before[name] for name, matrix in effective_of(after(case, moves)).items()}, **dense}


def expected(name: str, case: Case, options: Mapping[str, Any], f: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each layer's next effective update before truncation, and the dense tensors, from the equation alone."""
    space = options["space"]
    named = [vector_of(case, moves, space) for moves in case.trained.values()]
    points = torch.stack([torch.cat([tensor.flatten() for tensor in one.values()]) for one in named])
    points = mixed(points, f) if options["nnm"] else points
    flat = EQUATIONS[name](points, f)
    sizes = [tensor.numel() for tensor in named[0].values()]
    change = {key: part.reshape(named[0][key].shape) for key, part in zip(named[0], flat.split(sizes), strict=True)}
    dense = {key: tensor.double() + change[key] for key, tensor in case.adapter.dense().items()}
    if space == "product":
        return {layer: matrix + change[layer] for layer, matrix in effective_of(case.adapter).items()}, dense
    products = {}
    for pair in case.adapter.pairs():
        layer = pair.module.name
        factor_a, factor_b = balanced(effective_of(case.adapter)[layer], pair.module.rank)
        products[layer] = (factor_b + change[f"{layer}.factor_b"]) @ (factor_a + change[f"{layer}.factor_a"])
    return products, dense


def truncated(matrix: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank] * s[:rank] @ vh[:rank]


@every_variant
def test_the_result_is_the_rule_s_own_equation(name: str, options: dict[str, Any]) -> None:
    f = 1
    rule = make_rule(name, {**options, "byzantine": f})
    for tried in TRIED:
        case = crowded(CASES[tried], rule.properties.min_updates + 1, seed=3)
        products, dense = expected(name, case, options, f)
        found = made(rule, case)
        ranks = {module.name: module.rank for module in found.spec.modules}
        for layer, matrix in effective_of(found).items():
            best = truncated(products[layer], ranks[layer])
            assert float((matrix - best).norm()) < 2e-5 * float(products[layer].norm() + 1), (tried, layer)
        for key, tensor in found.dense().items():
            torch.testing.assert_close(tensor.double(), dense[key], rtol=1e-5, atol=1e-5)


# ---- what all have in common -----------------------------------------------------------------------------------------


@every_rule
def test_they_say_what_they_are(name: str) -> None:
    for f in (0, 1, 3):
        found = make_rule(name, {"byzantine": f}).properties
        factor, more = LEAST.get(name, (2, 1))
        assert found.min_updates == factor * f + more
        assert f"n >= {factor} f + {more} with f = strategy.options.byzantine = {f}" in found.min_updates_why
        assert (found.linear, found.needs_individual_updates, found.fixed_space) == (False, True, False)
        assert (found.gauge, found.space) == ("immune", "factor" if name in COORDINATES else "product")
        assert "all clients" in found.memory
        assert found.paper


@every_variant
def test_equal_updates_are_their_own_result(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, options)
    count = rule.properties.min_updates
    moves = CASE.trained["client-000"]
    same = replace(CASE, trained={f"client-{number:03d}": moves for number in range(count)})
    found, mine = effective_of(made(rule, same)), effective_of(after(CASE, moves))
    for layer, matrix in mine.items():
        torch.testing.assert_close(found[layer], matrix, rtol=1e-4, atol=1e-4)
    head = made(rule, same).tensors["head.weight"]
    torch.testing.assert_close(head, after(CASE, moves).tensors["head.weight"])


@every_variant
@pytest.mark.parametrize("tried", ["alpha is not r", "nobody learns anything"])
def test_where_nobody_changes_anything_nothing_changes(name: str, options: dict[str, Any], tried: str) -> None:
    """A fresh adapter keeps its A too: with both factors zero it could never be trained."""
    rule, case = make_rule(name, options), CASES[tried]
    still = {key: torch.zeros_like(tensor) for key, tensor in case.adapter.tensors.items()}
    case = replace(case, trained={f"client-{i:03d}": still for i in range(rule.properties.min_updates)})
    found = made(rule, case)
    for layer, matrix in effective_of(case.adapter).items():
        torch.testing.assert_close(effective_of(found)[layer], matrix, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.tensors["head.weight"], case.adapter.tensors["head.weight"])
    if tried == "nobody learns anything":
        assert torch.equal(found.tensors["layer.q.factor_a"], case.adapter.tensors["layer.q.factor_a"])


@every_variant
def test_a_bfloat16_adapter_keeps_what_is_below_its_digits(name: str, options: dict[str, Any]) -> None:
    """What clients receive is rounded, the master copy is not: a round in which nobody moves does not move it."""
    rule, case = make_rule(name, options), CASES["bfloat16"]
    still = {key: torch.zeros_like(tensor) for key, tensor in case.adapter.tensors.items()}
    case = replace(case, trained={f"client-{i:03d}": still for i in range(rule.properties.min_updates)})
    for layer, matrix in effective_of(case.adapter).items():
        torch.testing.assert_close(effective_of(made(rule, case))[layer], matrix, rtol=1e-4, atol=1e-4)


@every_variant
def test_claims_do_not_count(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, options)
    case = crowded(CASE, rule.properties.min_updates)
    loud = replace(case, weights={**case.weights, "client-000": 1e9})
    one, other = made(rule, case).tensors, made(rule, loud).tensors
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())


@every_variant
def test_any_order_of_arrival_gives_the_same_bits(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, options)
    case = crowded(CASE, rule.properties.min_updates + 1)
    given = updates(case)
    first = made(rule, case).tensors
    for order in (given[::-1], given[3:] + given[:3]):
        assert all(torch.equal(tensor, first[key]) for key, tensor in made(rule, case, order).tensors.items())


@every_variant
def test_an_update_that_fails_leaves_the_others(name: str, options: dict[str, Any]) -> None:
    rule = make_rule(name, options)
    case = crowded(CASE, rule.properties.min_updates)
    good, moves = updates(case), case.trained["client-000"]
    accumulator = rule.start(GlobalState(case.adapter), 1)
    accumulator.add(good[0], 1.0)
    for bad, match in (
        ({**moves, "head.weight": torch.full((2, 6), torch.nan)}, "not finite"),
        ({**moves, "layer.q.factor_a": torch.full((3, 6), torch.inf)}, "not finite"),
        ({key: move for key, move in moves.items() if key != "layer.q.factor_b"}, "tensor names differ"),
        ({**moves, "layer.q.factor_b": torch.ones(1, 3)}, "found shape"),
    ):
        with pytest.raises(AggregationError, match=match):
            accumulator.add(Update("mallory", bad, 1), 1.0)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(AggregationError, match="weight"):
            accumulator.add(Update("mallory", moves, 1), weight)
    with pytest.raises(AggregationError, match="two updates of client-000"):
        accumulator.add(good[0], 1.0)
    for update in good[1:]:
        accumulator.add(update, 1.0)
    found, wanted = accumulator.finish().state.adapter.tensors, made(rule, case).tensors
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


@every_rule
def test_the_largest_values_that_travel_are_taken_or_refused_and_never_spoil_a_round(name: str) -> None:
    """3e38 in every place: its square does not fit float32, its product's square fits float64."""
    rule = make_rule(name)
    case = crowded(CASE, rule.properties.min_updates)
    accumulator = rule.start(GlobalState(case.adapter), 1)
    huge = {key: torch.full_like(move, 3e38) for key, move in case.trained["client-000"].items()}
    try:
        accumulator.add(Update("mallory", huge, 1), 1.0)
    except AggregationError as error:
        assert "not finite" in str(error)
    for update in updates(case):
        accumulator.add(update, 1.0)
    result = accumulator.finish()
    assert all(torch.isfinite(tensor).all() for tensor in result.state.adapter.tensors.values())


@every_rule
def test_too_few_updates_are_named_with_the_formula(name: str) -> None:
    rule = make_rule(name, {"byzantine": 2})
    needed = rule.properties.min_updates
    case = crowded(CASES["one client"], needed - 1)
    with pytest.raises(NotEnoughUpdates, match=rf"{needed - 1} good updates: {name} needs at least {needed} \(n >= "):
        combined(rule, case)
    assert combined(rule, crowded(case, needed)).participants == needed


def test_what_became_of_updates_is_reported_in_numbers() -> None:
    case = crowded(CASE, 8)

    def told(name: str, **options: Any) -> dict[str, float]:
        return dict(combined(make_rule(name, options), case).metrics)

    assert told("krum")["filtered_out"] == 7.0
    assert told("krum")["updates"] == 8.0
    assert told("multi_krum", byzantine=2)["filtered_out"] == 4.0
    assert told("multi_krum", keep=5)["filtered_out"] == 3.0
    assert told("multi_krum")["least_share"] == 0.0
    assert told("krum", nnm=True)["filtered_out"] == 1.0
    assert told("bulyan") | {"energy_kept": 1.0} == {
        "updates": 8.0,
        "filtered_out": 2.0,
        "kept_per_coordinate": 4.0,
        "energy_kept": 1.0,
    }
    assert told("median")["kept_per_coordinate"] == 2.0
    assert told("trimmed_mean", byzantine=3)["kept_per_coordinate"] == 2.0
    assert 0 < told("geometric_median")["least_share"] < 1
    assert told("norm_bound")["clipped"] == 3.0
    assert told("norm_bound", bound=1e-3)["clipped"] == 8.0
    assert told("centered_clipping", radius=1e6)["least_share"] == pytest.approx(1.0)


def test_a_bound_of_one_s_own() -> None:
    """No update longer than it, so the mean is not, in effective updates and head together."""
    case = crowded(CASE, 5)
    before, found = effective_of(case.adapter), made(make_rule("norm_bound", {"bound": 1e-3}), case)
    squares = [(matrix - before[layer]).square().sum() for layer, matrix in effective_of(found).items()]
    squares.append((found.tensors["head.weight"] - case.adapter.tensors["head.weight"]).double().square().sum())
    assert float(torch.stack(squares).sum().sqrt()) <= 1.01e-3


def test_more_kept_updates_need_more_updates() -> None:
    rule = make_rule("multi_krum", {"keep": 6, "byzantine": 2})
    assert rule.properties.min_updates == 10
    assert "n >= keep + f + 2 with keep = 6" in rule.properties.min_updates_why
    assert make_rule("multi_krum", {"keep": 2, "byzantine": 2}).properties.min_updates == 7


@pytest.mark.parametrize("name", COORDINATES)
def test_coordinates_of_a_product_are_refused_with_the_reason(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"space = 'product': {name} takes .* d x d product, .* use space=factor"):
        make_rule(name, {"space": "product"})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"byzantine": -1}, "greater than or equal to 0"),
        ({"space": "weights"}, r"strategy\.options\.space = 'weights'"),
        ({"f": 1}, r"strategy\.options\.f = 1: no option of krum; expected some of byzantine, space, nnm"),
    ],
)
def test_bad_options(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        make_rule("krum", options)


@every_rule
def test_the_suite_reports_their_gap_and_claims_no_mean_of_dense_tensors(name: str) -> None:
    finding = examine(make_rule(name), crowded(CASE, 8))
    assert finding.passed
    assert not finding.dense_claim
    assert finding.error > 1e-4


def test_mixed_ranks_are_refused() -> None:
    with pytest.raises(AggregationError, match="this rule needs rank 3"):
        make_rule("krum").plan(GlobalState(CASE.adapter), ClientView("small", rank=2), 1)


# ---- what is refused before a run ------------------------------------------------------------------------------------


def experiment(name: str, *, weighted: bool = False, **selection: Any) -> ExperimentConfig:
    strategy = StrategyConfig(name, weighted=weighted, server_optimizer=ServerOptimizerConfig())
    chosen = SelectionConfig(**selection)
    return ExperimentConfig(task=TaskConfig(labels=("no", "yes")), strategy=strategy, selection=chosen)


@every_rule
def test_weights_that_clients_claim_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"strategy\.weighted = true: {name} counts each client once"):
        check_combination(make_rule(name), experiment(name, weighted=True))


def test_cohorts_below_the_precondition_are_refused_with_the_reason() -> None:
    rule = make_rule("bulyan")
    check_combination(rule, experiment("bulyan"), clients=7)
    check_combination(rule, experiment("bulyan"))  # nothing is promised: the strategy waits
    check_combination(rule, experiment("bulyan", min_clients=13, fraction=0.5))
    with pytest.raises(ConfigError, match=r"6 clients at .* = 1: a cohort of 6, .* at least 7 .* takes 7 clients"):
        check_combination(rule, experiment("bulyan"), clients=6)
    with pytest.raises(ConfigError, match=r"12 clients at .* = 0.5: a cohort of 6, .* takes 13 clients"):
        check_combination(rule, experiment("bulyan", fraction=0.5), clients=12)
    with pytest.raises(ConfigError, match=r"selection\.min_clients = 3 at .* = 1: a cohort of 3"):
        check_combination(rule, experiment("bulyan", min_clients=3))
    check_combination(make_rule("fedit"), experiment("fedit", weighted=True, min_clients=2, fraction=0.1), clients=1)


@pytest.mark.parametrize("fraction", [1.0, 0.5, 0.3, 1 / 3, 0.07])
@pytest.mark.parametrize("name", [*ROBUST, "fedit"])
def test_so_many_clients_are_enough_and_one_less_is_not(name: str, fraction: float) -> None:
    rule = make_rule(name)
    found, needed = clients_needed(rule, fraction), rule.properties.min_updates
    assert cohort_size(found, fraction) >= needed
    assert found == 1 or cohort_size(found - 1, fraction) < needed
