"""Rules against client drift, held against plain numpy in float64 on quadratics whose optimum is known.

Client k's loss is ``1/2 (w - b_k)^T H_k (w - b_k)`` with its own ``H_k``: after several local steps, plain averaging
stops elsewhere than at the optimum of the mean loss.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from federated.aggregation import (
    ClientView,
    FedDyn,
    FedIT,
    FedNova,
    FedProx,
    Result,
    Rule,
    Scaffold,
    check_combination,
    make_rule,
)
from federated.aggregation.taken_part import TakenPart
from federated.config import ExperimentConfig, StrategyConfig, TaskConfig, TrainConfig
from federated.corrections import SHIFT, VARIATE, memory_after, memory_before, shift_of
from federated.delta import Update, apply
from federated.errors import AggregationError, ConfigError, NotEnoughUpdates, WireError
from federated.global_state import GlobalState
from federated.manifest import AdapterSpec, TrainPlan
from federated.state import AdapterState, RuleState
from federated.testing import cases

SPEC = AdapterSpec("lora", 1, 1.0, use_rslora=False, modules=())
SIZE, ETA = 4, 0.05
CASE = {case.name: case for case in cases()}["unequal weights"]


@dataclass
class Quadratics:
    """Some clients' losses, and how many steps each takes."""

    steps: tuple[int, ...]
    weights: tuple[float, ...] = ()
    seed: int = 0
    hessians: list[np.ndarray] = field(init=False)
    centres: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        chance = np.random.default_rng(self.seed)
        self.weights = self.weights or (1.0,) * len(self.steps)
        self.hessians = [np.diag(chance.uniform(0.2, 4.0, SIZE)) for _ in self.steps]
        self.centres = [chance.normal(size=SIZE) for _ in self.steps]

    @property
    def shares(self) -> np.ndarray:
        return np.array(self.weights) / sum(self.weights)

    def gradient(self, client: int, w: np.ndarray) -> np.ndarray:
        return self.hessians[client] @ (w - self.centres[client])

    @property
    def optimum(self) -> np.ndarray:
        left = sum(share * hessian for share, hessian in zip(self.shares, self.hessians, strict=True))
        parts = zip(self.shares, self.hessians, self.centres, strict=True)
        return np.linalg.solve(left, sum(share * hessian @ centre for share, hessian, centre in parts))


def adapter(w: np.ndarray) -> AdapterState:
    return AdapterState(SPEC, {"w": torch.tensor(w, dtype=torch.float32)})


@dataclass
class Federation:
    """The library's own parts, with numpy for the local steps: a rule, and each client's memory as it would keep it."""

    rule: Rule
    problem: Quadratics
    memory: dict[int, dict[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        self.state = GlobalState(adapter(np.zeros(SIZE)), rule_state=self.rule.init(SPEC))

    @property
    def w(self) -> np.ndarray:
        return self.state.adapter.tensors["w"].double().numpy()

    def local(self, client: int) -> Update:
        plan, received = self.rule.plan(self.state, ClientView(f"client-{client}"), 1)
        steps, shift, begins = self.problem.steps[client], np.zeros(SIZE), {}
        if plan.correction:
            begins = memory_before(plan, received, self.memory.get(client, {}).get(plan.memory_round))
            shift = shift_of(plan, received, begins, learning_rate=ETA)["w"].double().numpy()
        start = received.tensors["w"].double().numpy()
        w = start.copy()
        for _ in range(steps):
            w = w - ETA * (self.problem.gradient(client, w) + plan.proximal_mu * (w - start) + shift)
        delta = {"w": torch.tensor(w - start, dtype=torch.float32)}
        if plan.correction:
            after = memory_after(plan, received, begins, delta=delta, steps=steps)
            self.memory.setdefault(client, {})[self.number] = after
        return Update(f"client-{client}", delta, 1, round_number=self.number, received=received, steps=steps)

    def round(self, cohort: tuple[int, ...]) -> Result:
        self.number += 1
        accumulator = self.rule.start(self.state, 1)
        for client in cohort:
            accumulator.add(self.local(client), self.problem.weights[client])
        result = accumulator.finish()
        assert isinstance(result, Result)
        memory = result.rule_state or self.state.rule_state
        self.state = replace(self.state, adapter=apply(self.state.adapter, result.mean_delta), rule_state=memory)
        return result

    def run(self, rounds: int) -> np.ndarray:
        for _ in range(rounds):
            self.round(tuple(range(len(self.problem.steps))))
        return self.w


def scaffold_of_the_paper(problem: Quadratics, rounds: int) -> np.ndarray:
    """Algorithm 1 with option II, all clients in every round, weighted means."""
    count = len(problem.steps)
    x, c, own = np.zeros(SIZE), np.zeros(SIZE), [np.zeros(SIZE) for _ in range(count)]
    for _ in range(rounds):
        moves, changes = [], []
        for k in range(count):
            y = x.copy()
            for _ in range(problem.steps[k]):
                y = y - ETA * (problem.gradient(k, y) - own[k] + c)
            new = own[k] - c + (x - y) / (problem.steps[k] * ETA)
            moves.append(y - x)
            changes.append(new - own[k])
            own[k] = new
        x = x + sum(share * move for share, move in zip(problem.shares, moves, strict=True))
        c = c + sum(share * change for share, change in zip(problem.shares, changes, strict=True))
    return x


def feddyn_of_the_paper(problem: Quadratics, rounds: int, alpha: float) -> np.ndarray:
    """Algorithm 1, with gradient steps on each client's regularised loss."""
    count = len(problem.steps)
    theta, h, own = np.zeros(SIZE), np.zeros(SIZE), [np.zeros(SIZE) for _ in range(count)]
    for _ in range(rounds):
        found = []
        for k in range(count):
            y = theta.copy()
            for _ in range(problem.steps[k]):
                y = y - ETA * (problem.gradient(k, y) - own[k] + alpha * (y - theta))
            own[k] = own[k] - alpha * (y - theta)
            found.append(y)
        h = h - alpha * sum(share * (y - theta) for share, y in zip(problem.shares, found, strict=True))
        theta = sum(share * y for share, y in zip(problem.shares, found, strict=True)) - h / alpha
    return theta


def fednova_of_the_paper(problem: Quadratics, rounds: int) -> np.ndarray:
    x = np.zeros(SIZE)
    for _ in range(rounds):
        per_step = []
        for k, steps in enumerate(problem.steps):
            y = x.copy()
            for _ in range(steps):
                y = y - ETA * problem.gradient(k, y)
            per_step.append((y - x) / steps)
        effective = float(np.dot(problem.shares, problem.steps))
        x = x + effective * sum(share * one for share, one in zip(problem.shares, per_step, strict=True))
    return x


PROBLEMS = {
    "equal": Quadratics((8, 8, 8)),
    "unequal steps": Quadratics((2, 9, 20), seed=1),
    "unequal weights": Quadratics((5, 5, 12), weights=(1.0, 10.0, 3.0), seed=2),
    "one client": Quadratics((6,), seed=3),
}
every_problem = pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)


class TestScaffold:
    @every_problem
    @pytest.mark.parametrize("rounds", [1, 2, 7])
    def test_it_is_the_paper_s(self, problem: Quadratics, rounds: int):
        found = Federation(Scaffold(), problem).run(rounds)
        np.testing.assert_allclose(found, scaffold_of_the_paper(problem, rounds), atol=3e-6)

    def test_it_reaches_the_optimum_and_plain_averaging_does_not(self):
        problem = PROBLEMS["equal"]
        plain = np.linalg.norm(Federation(FedIT(), problem).run(300) - problem.optimum)
        steered = np.linalg.norm(Federation(Scaffold(), problem).run(300) - problem.optimum)
        assert plain > 0.05
        assert steered < 1e-5

    def test_it_does_so_with_half_of_the_clients_in_each_round(self):
        problem = Quadratics((6, 6, 6, 6), seed=5)
        runs = {}
        for rule in (FedIT(), Scaffold()):
            federation = Federation(rule, problem)
            for number in range(600):
                federation.round(((0, 1), (2, 3), (0, 2), (1, 3), (0, 3), (1, 2))[number % 6])
            runs[rule.name] = np.linalg.norm(federation.w - problem.optimum)
        assert runs["scaffold"] < 1e-3 < 0.05 < runs["fedit"]

    def test_the_server_s_variate_is_the_weighted_mean_of_the_clients(self):
        problem = Quadratics((4, 6, 9), weights=(2.0, 1.0, 5.0), seed=6)
        federation = Federation(Scaffold(), problem)
        for cohort in ((0,), (0, 2), (1, 2), (0, 1), (2,)):
            federation.round(cohort)
        taken = TakenPart(federation.state.rule_state)
        own = [federation.memory[k][taken.last_round(f"client-{k}")]["w"].double() for k in range(3)]
        mean = sum(weight * one for weight, one in zip(problem.weights, own, strict=True)) / sum(problem.weights)
        torch.testing.assert_close(federation.state.rule_state.tensors["w"], mean, atol=1e-6, rtol=0)

    def test_one_client_is_plain_sgd(self):
        problem = PROBLEMS["one client"]
        w = np.zeros(SIZE)
        for _ in range(5 * problem.steps[0]):
            w = w - ETA * problem.gradient(0, w)
        np.testing.assert_allclose(Federation(Scaffold(), problem).run(5), w, atol=1e-6)

    @every_problem
    def test_the_first_round_is_fedit_to_the_bit(self, problem: Quadratics):
        assert Federation(Scaffold(), problem).run(1).tolist() == Federation(FedIT(), problem).run(1).tolist()

    def test_a_client_that_comes_later_trains_plainly_at_first(self):
        federation = Federation(Scaffold(), PROBLEMS["equal"])
        federation.round((0, 1))
        plan, received = federation.rule.plan(federation.state, ClientView("client-2"), 1)
        assert plan.memory_round == 0
        assert received.extra[f"{VARIATE}w"].any()
        begins = memory_before(plan, received, None)
        assert not shift_of(plan, received, begins, learning_rate=ETA)["w"].any()

    def test_an_update_that_was_not_taken_leaves_both_memories_as_they_were(self):
        problem = PROBLEMS["unequal steps"]
        undisturbed, disturbed = Federation(Scaffold(), problem), Federation(Scaffold(), problem)
        for federation in (undisturbed, disturbed):
            federation.round((0, 1, 2))
        disturbed.number += 1
        disturbed.local(1)  # trained, and lost on the way
        undisturbed.number += 1
        for federation in (undisturbed, disturbed):
            federation.round((0, 1, 2))
        assert disturbed.w.tolist() == undisturbed.w.tolist()

    @pytest.mark.parametrize(
        "extra", [{}, {f"{VARIATE}w": torch.zeros(9)}, {"w": torch.zeros(SIZE)}], ids=["none", "shape", "name"]
    )
    def test_a_variate_of_another_adapter_is_refused(self, extra: Mapping[str, torch.Tensor]):
        plan, received = TrainPlan(correction="scaffold"), replace(adapter(np.zeros(SIZE)), extra=extra)
        with pytest.raises(WireError, match="the server's control variate is missing"):
            memory_before(plan, received, None)

    def test_an_update_of_no_steps_is_not_mixed_in(self):
        rule = Scaffold()
        accumulator = rule.start(GlobalState(adapter(np.zeros(SIZE))), 1)
        with pytest.raises(AggregationError, match="stands for 0 steps"):
            accumulator.add(Update("a", {"w": torch.ones(SIZE)}, 1, steps=0), 1.0)
        with pytest.raises(NotEnoughUpdates):
            accumulator.finish()


class TestFedDyn:
    @every_problem
    @pytest.mark.parametrize("rounds", [1, 2, 7])
    def test_it_is_the_paper_s(self, problem: Quadratics, rounds: int):
        found = Federation(FedDyn(alpha=0.7), problem).run(rounds)
        np.testing.assert_allclose(found, feddyn_of_the_paper(problem, rounds, 0.7), atol=5e-6)

    def test_it_reaches_the_optimum_and_plain_averaging_does_not(self):
        problem = Quadratics((40, 40, 40))
        plain = np.linalg.norm(Federation(FedIT(), problem).run(200) - problem.optimum)
        steered = np.linalg.norm(Federation(FedDyn(alpha=1.0), problem).run(200) - problem.optimum)
        assert steered < 1e-4 < 0.1 < plain

    def test_it_goes_twice_as_far_in_the_first_round(self):
        problem = PROBLEMS["unequal weights"]
        near = Federation(FedProx(mu=0.7), problem).run(1)
        np.testing.assert_allclose(Federation(FedDyn(alpha=0.7), problem).run(1), 2 * near, rtol=1e-6)

    @pytest.mark.parametrize(("num_clients", "beyond"), [(0, 1.0), (1, 1.0), (2, 1.0), (8, 0.25)])
    def test_clients_that_have_not_taken_part_may_be_counted(self, num_clients: int, beyond: float):
        problem = PROBLEMS["equal"]
        near, found = Federation(FedProx(mu=1.0), problem), Federation(FedDyn(num_clients=num_clients), problem)
        near.round((0, 1))
        found.round((0, 1))
        np.testing.assert_allclose(found.w, (1 + beyond) * near.w, rtol=1e-6)

    def test_an_update_that_was_not_taken_leaves_both_memories_as_they_were(self):
        problem = PROBLEMS["unequal steps"]
        undisturbed, disturbed = Federation(FedDyn(), problem), Federation(FedDyn(), problem)
        for federation in (undisturbed, disturbed):
            federation.round((0, 1, 2))
            federation.number += 1
        disturbed.local(1)
        for federation in (undisturbed, disturbed):
            federation.round((0, 1, 2))
        assert disturbed.w.tolist() == undisturbed.w.tolist()


class TestFedNova:
    @every_problem
    @pytest.mark.parametrize("rounds", [1, 3])
    def test_it_is_the_paper_s(self, problem: Quadratics, rounds: int):
        found = Federation(FedNova(), problem).run(rounds)
        np.testing.assert_allclose(found, fednova_of_the_paper(problem, rounds), atol=1e-6)

    def test_equal_steps_are_fedit(self):
        problem = Quadratics((6, 6, 6), weights=(1.0, 10.0, 3.0))
        nova, fedit = Federation(FedNova(), problem), Federation(FedIT(), problem)
        moves = [federation.round((0, 1, 2)).mean_delta["w"] for federation in (nova, fedit)]
        torch.testing.assert_close(moves[0], moves[1], rtol=1e-15, atol=0)

    def test_the_mean_number_of_steps_is_reported(self):
        problem = Quadratics((2, 8), weights=(3.0, 1.0))
        assert Federation(FedNova(), problem).round((0, 1)).metrics == {"effective_steps": 3.5}

    def test_many_steps_pull_no_harder(self):
        """Where one client takes five times the steps of the other, plain averaging ends near its own optimum."""
        problem = Quadratics((2, 10), seed=8)
        gaps = {
            rule.name: np.linalg.norm(Federation(rule, problem).run(200) - problem.optimum)
            for rule in (FedIT(), FedNova())
        }
        assert gaps["fednova"] < 0.6 * gaps["fedit"]

    @pytest.mark.parametrize("steps", [0, 11])
    def test_a_claim_beyond_the_bound_is_not_mixed_in(self, steps: int):
        accumulator = FedNova(max_steps=10).start(GlobalState(adapter(np.zeros(SIZE))), 1)
        accumulator.add(Update("a", {"w": torch.ones(SIZE)}, 1, steps=4), 1.0)
        with pytest.raises(AggregationError, match=rf"{steps} steps behind the update of b, at most 10"):
            accumulator.add(Update("b", {"w": torch.ones(SIZE)}, 1, steps=steps), 1.0)
        with pytest.raises(AggregationError, match="does not fit"):
            accumulator.add(Update("c", {"v": torch.ones(SIZE)}, 1, steps=4), 1.0)
        result = accumulator.finish()
        assert (result.mean_delta["w"].tolist(), result.metrics["effective_steps"]) == ([1.0] * SIZE, 4.0)


class TestFedProx:
    def test_the_plan_holds_mu_and_zero_leaves_it_to_the_client_s_configuration(self):
        state = GlobalState(adapter(np.zeros(SIZE)))
        assert FedProx(mu=0.5).plan(state, ClientView("a"), 1)[0].proximal_mu == 0.5
        assert FedProx(mu=0).plan(state, ClientView("a"), 1)[0] == FedIT().plan(state, ClientView("a"), 1)[0]

    def test_without_mu_it_is_fedit_to_the_bit(self):
        problem = PROBLEMS["unequal steps"]
        assert Federation(FedProx(mu=0), problem).run(3).tolist() == Federation(FedIT(), problem).run(3).tolist()

    def test_a_large_mu_stays_near(self):
        problem = PROBLEMS["equal"]
        free, held = (Federation(FedProx(mu=mu), problem).run(1) for mu in (0, 10.0))
        assert np.linalg.norm(held) < 0.7 * np.linalg.norm(free)


@pytest.mark.parametrize("name", ["scaffold", "feddyn", "fednova"])
def test_the_order_of_arrival_changes_no_bit_of_adapter_and_memory(name: str) -> None:
    problem, found = Quadratics((2, 9, 20), weights=(1.0, 10.0, 0.3), seed=1), []
    for order in itertools.permutations(range(3)):
        federation = Federation(make_rule(name), problem)
        for _ in range(3):
            federation.round(order)
        state = federation.state.rule_state
        found.append((federation.w.tolist(), state.scalars, {key: one.tolist() for key, one in state.tensors.items()}))
    assert all(one == found[0] for one in found)


@pytest.mark.parametrize("name", ["scaffold", "feddyn"])
def test_a_failed_update_is_in_no_memory(name: str) -> None:
    rule = make_rule(name)
    state = GlobalState(CASE.adapter, rule_state=rule.init(CASE.adapter.spec))
    bad = {**CASE.trained["client-000"], "head.weight": torch.full((2, 6), torch.nan)}
    results = []
    for hostile in (False, True):
        accumulator = rule.start(state, 1)
        for given in [Update("bad", bad, 1)] * hostile:
            with pytest.raises(AggregationError):
                accumulator.add(given, 1.0)
        for client, moves in CASE.trained.items():
            accumulator.add(Update(client, moves, 1, round_number=1), CASE.weights[client])
        results.append(accumulator.finish())
    assert results[0].rule_state.scalars == results[1].rule_state.scalars
    for key, tensor in results[0].rule_state.tensors.items():
        assert torch.equal(results[1].rule_state.tensors[key], tensor)


def test_the_memory_is_plain_data_and_counts_who_is_not_there_with_the_mean_of_the_others() -> None:
    taken = TakenPart(RuleState())
    assert (taken.total_weight(), taken.total_weight(9), taken.last_round("a")) == (0.0, 0.0, 0)
    taken.note(Update("b", {}, 1, round_number=3), 2.0)
    taken.note(Update("a", {}, 1, round_number=4), 4.0)
    assert taken.scalars() == {"clients": {"a": [4, 4.0], "b": [3, 2.0]}}
    again = TakenPart(RuleState(taken.scalars()))
    assert (again.last_round("a"), again.last_round("c"), again.total_weight()) == (4, 0, 6.0)
    assert [again.total_weight(count) for count in (1, 2, 4)] == [6.0, 6.0, 12.0]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"optimizer": "adamw"}, "train.optimizer = adamw with momentum 0, schedule none"),
        ({"momentum": 0.9}, "train.optimizer = sgd with momentum 0.9, schedule none"),
        ({"scheduler": "LinearLR"}, "train.optimizer = sgd with momentum 0, schedule LinearLR"),
        ({"weight_decay": 0.1}, "train.optimizer = sgd with momentum 0, schedule none, weight decay 0.1"),
    ],
)
def test_scaffold_without_plain_sgd_is_refused_before_anything_starts(change: dict[str, object], found: str) -> None:
    task = TaskConfig(labels=("no", "yes"))
    plain = TrainConfig(optimizer="sgd")
    for rule in (Scaffold(), FedDyn()):
        check_combination(rule, ExperimentConfig(task=task, strategy=StrategyConfig(rule.name), train=plain))
    other = ExperimentConfig(task=task, strategy=StrategyConfig("scaffold"), train=replace(plain, **change))
    with pytest.raises(ConfigError, match=rf"^{found}.*: scaffold needs SGD .* use train=plain_sgd"):
        check_combination(Scaffold(), other)
    check_combination(FedDyn(), other)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fedprox", {"mu": -1}),
        ("feddyn", {"alpha": 0}),
        ("feddyn", {"num_clients": -1}),
        ("fednova", {"max_steps": 0}),
        ("flasc", {"density_up": 0}),
        ("flasc", {"density_down": 1.5}),
        ("lora_a2", {"rank": 0}),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(name: str, options: dict[str, float]) -> None:
    ((key, value),) = options.items()
    with pytest.raises(ConfigError, match=rf"^strategy\.options\.{key} = {value}: Input should be"):
        make_rule(name, options)


def test_what_corrects_never_shares_a_name_with_what_travels() -> None:
    assert not SHIFT.startswith(VARIATE)
    assert not VARIATE.startswith(SHIFT)
