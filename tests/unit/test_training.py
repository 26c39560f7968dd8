"""LocalTrainer: steps against their definitions, repeatability, what is reported, what is refused."""

import math
from dataclasses import replace

import pytest
import torch

from federated.adapters import attach, base_from_module, load_base
from federated.adapters.fingerprint import base_digest
from federated.adapters.tiny import TinySensor
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.corrections import SHIFT
from federated.delta import norm, subtract
from federated.errors import ConfigError, DataError, FederatedError, ModelError
from federated.local_steps import Steps
from federated.manifest import TrainPlan
from federated.state import AdapterState, group_of
from federated.tasks import make_task
from federated.tasks.batching import step_count, step_groups
from federated.training import LocalData, LocalTrainer, _autocast_dtype, _has_bfloat16, client_seed

SENSOR = TaskConfig(name="sensor", labels=("up", "down"), max_length=16)
TEXT = TaskConfig(labels=("cold", "warm"), max_length=12)
QUIET = TrainPlan(evaluate_before=False)


def rows(count=12):
    """Series that rise (0) or fall (1), of different lengths."""
    made = []
    for index in range(count):
        slope = 0.3 if index % 2 == 0 else -0.3
        made.append({
            "values": [[slope * step, 0.1 * index, 1.0] for step in range(3 + index % 4)], "label": index % 2,
        })  # fmt: skip
    return made


def series_trainer(*, seed=1, adapter=None, **train):
    base = load_base(ModelConfig(source="tiny:sensor"))
    model = attach(base, AdapterConfig(**{"rank": 4, **(adapter or {})}), SENSOR, seed=seed)
    options = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "precision": "float32", **train}
    return LocalTrainer(model, make_task(SENSOR), TrainConfig(**options))


def series_data(trainer, *, count=12, test=0):
    features = trainer.task.encode(rows(count + test))
    return LocalData(features[:count], features[count:])


def start(trainer, *, scale=0.3):
    """An adapter whose every factor is at work (a fresh one has B = 0 and so no gradient on A)."""
    generator = torch.Generator().manual_seed(7)
    tensors = {name: torch.randn(t.shape, generator=generator) * scale for name, t in trainer.adapter.masters().items()}
    return AdapterState(trainer.adapter.spec, tensors)


def gradient(trainer, state, features):
    """Gradient of the mean per-sample loss at ``state``, by autograd on all examples at once."""
    model = trainer.adapter
    model.write(state)
    model.set_trainable(("factor_a", "factor_b", "dense"))
    parameters = model.trainable()
    loss = trainer.task.per_sample_loss(model.model, trainer.task.collate(features)).mean()
    grads = torch.autograd.grad(loss, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True)), loss.item()


def assert_same(first, second, **tolerance):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], **tolerance)


def same_bits(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TestSteps:
    def test_one_sgd_step_moves_against_the_gradient(self):
        trainer = series_trainer(batch_size=12, steps=1)
        state, data = start(trainer), series_data(trainer)
        found = trainer.run(state, QUIET, data, seed=3)
        grads, loss = gradient(trainer, state, data.train)
        assert_same(found.delta, {name: -0.1 * grad for name, grad in grads.items()}, atol=1e-6, rtol=1e-4)
        assert found.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)

    def test_one_adamw_step_has_the_learning_rate_s_size(self):
        trainer = series_trainer(optimizer="adamw", learning_rate=0.01, batch_size=12, steps=1)
        state, data = start(trainer), series_data(trainer)
        found = trainer.run(state, QUIET, data, seed=3)
        grads, _ = gradient(trainer, state, data.train)
        expected = {name: -0.01 * grad / (grad.abs() + 1e-8) for name, grad in grads.items()}
        assert_same(found.delta, expected, atol=1e-5, rtol=1e-2)

    def test_weight_decay_of_sgd_pulls_to_zero(self):
        trainer = series_trainer(batch_size=12, steps=1, weight_decay=0.5)
        state, data = start(trainer), series_data(trainer)
        found = trainer.run(state, QUIET, data, seed=3)
        grads, _ = gradient(trainer, state, data.train)
        expected = {name: -0.1 * (grads[name] + 0.5 * state.tensors[name]) for name in grads}
        assert_same(found.delta, expected, atol=1e-6, rtol=1e-4)

    def test_momentum_is_forgotten_between_runs(self):
        trainer = series_trainer(batch_size=12, steps=3, momentum=0.9)
        state, data = start(trainer), series_data(trainer)
        first, second = (trainer.run(state, QUIET, data, seed=3).delta for _ in range(2))
        assert same_bits(first, second)

    @pytest.mark.parametrize(("size", "accumulation"), [(4, 3), (5, 3), (1, 12), (5, 100)])
    def test_accumulation_equals_one_large_batch(self, size, accumulation):
        large = series_trainer(batch_size=12)
        small = series_trainer(batch_size=size, gradient_accumulation=accumulation)
        state = start(large)
        expected = large.run(state, QUIET, series_data(large), seed=3)
        found = small.run(state, QUIET, series_data(small), seed=3)
        assert found.metrics["steps"] == expected.metrics["steps"] == 1
        assert_same(found.delta, expected.delta, atol=1e-6, rtol=1e-4)
        assert found.metrics["train_loss"] == pytest.approx(expected.metrics["train_loss"], rel=1e-5)

    def test_a_short_last_group_is_a_step_of_its_own(self):
        trainer = series_trainer(batch_size=2, gradient_accumulation=4)
        found = trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert found.metrics["steps"] == 2

    def test_each_step_weighs_its_own_examples_alike(self):
        trainer = series_trainer(batch_size=5, gradient_accumulation=2)
        state, data = start(trainer), series_data(trainer)
        found = trainer.run(state, QUIET, data, seed=3)
        groups = step_groups([len(one["values"]) for one in data.train], trainer.config, seed=3)
        moved, losses = state, []
        for group in groups:
            grads, loss = gradient(trainer, moved, [data.train[index] for batch in group for index in batch])
            moved = AdapterState(state.spec, {name: moved.tensors[name] - 0.1 * grads[name] for name in grads})
            losses.append(loss)
        assert [sum(map(len, group)) for group in groups] in ([10, 2], [7, 5])
        assert_same(found.delta, subtract(moved.tensors, state.tensors), atol=1e-6, rtol=1e-4)
        assert found.metrics["train_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


class TestOrder:
    LENGTHS = tuple((7 * index) % 23 + 1 for index in range(50))

    def batches(self, *, seed=3, lengths=LENGTHS, **train):
        groups = step_groups(lengths, TrainConfig(**{"batch_size": 4, **train}), seed)
        return [batch for group in groups for batch in group]

    def padded(self, batches):
        return sum(len(batch) * max(self.LENGTHS[index] for index in batch) for batch in batches)

    def test_every_example_is_in_one_batch(self):
        assert sorted(index for batch in self.batches() for index in batch) == list(range(50))

    def test_batches_are_of_like_lengths(self):
        plain = torch.randperm(50, generator=torch.Generator().manual_seed(3)).tolist()
        assert self.padded(self.batches()) < 0.8 * self.padded([plain[at : at + 4] for at in range(0, 50, 4)])

    def test_short_and_long_batches_come_in_no_order(self):
        longest = [max(self.LENGTHS[index] for index in batch) for batch in self.batches()]
        assert longest not in (sorted(longest), sorted(longest, reverse=True))

    def test_the_order_follows_the_seed(self):
        assert self.batches(seed=3) == self.batches(seed=3) != self.batches(seed=4)

    def test_each_epoch_has_another_order(self):
        twice = self.batches(epochs=2.0)
        assert twice[:13] != twice[13:]

    def test_one_batch_of_a_pass_may_be_short(self):
        assert sorted(map(len, self.batches())) == [2, *[4] * 12]


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 31, 100])
@pytest.mark.parametrize("train", [
    {}, {"epochs": 0.3}, {"epochs": 2.0}, {"epochs": 2.6}, {"steps": 5}, {"gradient_accumulation": 3},
    {"gradient_accumulation": 3, "epochs": 3.5}, {"batch_size": 1}, {"batch_size": 200},
], ids=str)  # fmt: skip
def test_the_number_of_steps_follows_from_the_number_of_examples(count: int, train: dict[str, float]) -> None:
    config = TrainConfig(**{"batch_size": 4, **train})
    lengths = [1 + index % 5 for index in range(count)]
    assert step_count(count, config) == len(step_groups(lengths, config, seed=count))


class TestProximal:
    @pytest.mark.parametrize("where", ["plan", "config"])
    def test_the_second_step_is_pulled_back_by_mu(self, where):
        mu = 2.0
        trainer = series_trainer(batch_size=12, steps=2, proximal_mu=mu if where == "config" else 0.0)
        plan = TrainPlan(evaluate_before=False, proximal_mu=mu if where == "plan" else 0.0)
        state, data = start(trainer), series_data(trainer)
        found = trainer.run(state, plan, data, seed=3).delta
        first, _ = gradient(trainer, state, data.train)
        between = AdapterState(state.spec, {name: state.tensors[name] - 0.1 * first[name] for name in first})
        second, _ = gradient(trainer, between, data.train)
        expected = {
            name: -0.1 * first[name] - 0.1 * (second[name] + mu * (between.tensors[name] - state.tensors[name]))
            for name in first
        }
        assert_same(found, expected, atol=1e-6, rtol=1e-4)

    def test_the_plan_s_mu_comes_before_the_configuration_s(self):
        trainer = series_trainer(batch_size=4, steps=4, proximal_mu=5.0)
        other = series_trainer(batch_size=4, steps=4)
        plan = TrainPlan(evaluate_before=False, proximal_mu=1.0)
        state = start(trainer)
        first = trainer.run(state, plan, series_data(trainer), seed=3).delta
        assert same_bits(first, other.run(state, plan, series_data(other), seed=3).delta)

    def test_a_large_mu_stays_near(self):
        free, held = (series_trainer(batch_size=4, steps=6, learning_rate=0.05, proximal_mu=mu) for mu in (0.0, 5.0))
        moved = [norm(one.run(one.adapter.read(), QUIET, series_data(one), seed=3).delta) for one in (free, held)]
        assert moved[1] < 0.7 * moved[0]

    def test_a_layer_that_takes_no_part_stays_where_it_was(self):
        module = TinySensor()
        module.idle = torch.nn.Linear(8, 8)
        base = base_from_module(module)
        task = make_task(SENSOR)
        trainer = LocalTrainer(attach(base, AdapterConfig(rank=2), SENSOR, seed=1), task, TrainConfig(proximal_mu=1.0))
        found = trainer.run(start(trainer), QUIET, series_data(trainer), seed=3).delta
        assert not found["idle.factor_b"].any()
        assert found["mix.factor_b"].any()


class TestShift:
    """What SCAFFOLD and FedDyn add to each gradient comes with the state, beside its tensors."""

    @staticmethod
    def shifted(state, scale=0.5):
        shift = {name: scale * torch.ones_like(tensor) for name, tensor in state.tensors.items()}
        return replace(state, extra={f"{SHIFT}{name}": tensor for name, tensor in shift.items()}), shift

    def test_it_is_added_to_every_gradient(self):
        trainer = series_trainer(batch_size=12, steps=1)
        state, data = start(trainer), series_data(trainer)
        steered, shift = self.shifted(state)
        grads, loss = gradient(trainer, state, data.train)
        found = trainer.run(steered, QUIET, data, seed=3)
        assert_same(found.delta, {name: -0.1 * (grads[name] + shift[name]) for name in grads}, atol=1e-6, rtol=1e-4)
        assert found.metrics["train_loss"] == pytest.approx(loss, rel=1e-5)

    def test_it_is_gone_in_the_next_run(self):
        trainer = series_trainer(batch_size=12, steps=2)
        state, data = start(trainer), series_data(trainer)
        before = trainer.run(state, QUIET, data, seed=3).delta
        trainer.run(self.shifted(state)[0], QUIET, data, seed=3)
        assert same_bits(trainer.run(state, QUIET, data, seed=3).delta, before)

    def test_zero_changes_no_bit(self):
        trainer = series_trainer(batch_size=4, steps=3)
        state, data = start(trainer), series_data(trainer)
        before = trainer.run(state, QUIET, data, seed=3).delta
        assert same_bits(trainer.run(self.shifted(state, scale=0.0)[0], QUIET, data, seed=3).delta, before)

    def test_only_what_the_plan_trains_moves(self):
        trainer = series_trainer(batch_size=4, steps=2)
        steered, _ = self.shifted(start(trainer))
        found = trainer.run(
            steered, TrainPlan(evaluate_before=False, trainable=("factor_b",)), series_data(trainer), seed=3
        )
        assert {name.rsplit(".", 1)[-1] for name in found.delta} == {"factor_b"}

    def test_the_bound_on_the_gradient_holds_for_the_sum(self):
        trainer = series_trainer(batch_size=12, steps=1, max_grad_norm=1e-3)
        found = trainer.run(self.shifted(start(trainer))[0], QUIET, series_data(trainer), seed=3)
        assert norm(found.delta) == pytest.approx(0.1 * 1e-3, rel=1e-2)


class TestClipping:
    def test_a_step_is_cut_to_the_bound(self):
        trainer = series_trainer(batch_size=12, steps=1, max_grad_norm=1e-3)
        found = trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert norm(found.delta) == pytest.approx(0.1 * 1e-3, rel=1e-2)
        assert found.metrics["grad_clipped_share"] == 1.0

    def test_a_bound_that_is_not_reached_changes_nothing(self):
        free, bound = (series_trainer(batch_size=4, max_grad_norm=most) for most in (0.0, 1e6))
        results = [one.run(start(one), QUIET, series_data(one), seed=3) for one in (free, bound)]
        assert same_bits(results[0].delta, results[1].delta)
        assert [one.metrics["grad_clipped_share"] for one in results] == [0.0, 0.0]


class TestAmount:
    @pytest.mark.parametrize(
        ("options", "steps"),
        [
            ({"epochs": 1.0, "batch_size": 4}, 3),
            ({"epochs": 1.0, "batch_size": 5}, 3),
            ({"epochs": 2.5, "batch_size": 4}, 8),
            ({"epochs": 0.5, "batch_size": 4}, 2),
            ({"epochs": 0.001, "batch_size": 4}, 1),
            ({"steps": 7, "batch_size": 4}, 7),
            ({"steps": 2, "epochs": 9.0, "batch_size": 4}, 2),
            ({"steps": 5, "batch_size": 100}, 5),
            ({"epochs": 2.0, "batch_size": 2, "gradient_accumulation": 4}, 4),
        ],
    )
    def test_steps_and_epochs(self, options, steps):
        trainer = series_trainer(**options)
        assert trainer.run(start(trainer), QUIET, series_data(trainer), seed=3).metrics["steps"] == steps

    def test_every_example_is_seen_once_per_epoch(self):
        trainer = series_trainer(batch_size=5, epochs=2.0)
        seen = []
        collate = trainer.task.collate
        trainer.task.collate = lambda features: seen.extend(id(one) for one in features) or collate(features)
        data = series_data(trainer)
        trainer.run(start(trainer), QUIET, data, seed=3)
        everything = sorted(id(one) for one in data.train)
        assert sorted(seen[:12]) == everything == sorted(seen[12:])
        assert seen[:12] != seen[12:]

    def test_one_example_is_enough(self):
        trainer = series_trainer()
        found = trainer.run(start(trainer), QUIET, series_data(trainer, count=1), seed=3)
        assert found.num_examples == 1
        assert norm(found.delta) > 0


class TestRepeatability:
    def run(self, *, seed=3, disturb=0, dropout=0.0):
        trainer = series_trainer(batch_size=4, adapter={"dropout": dropout})
        torch.manual_seed(disturb)
        return trainer.run(start(trainer), QUIET, series_data(trainer), seed=seed).delta

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_the_same_seed_gives_the_same_bits(self, dropout):
        assert same_bits(self.run(dropout=dropout, disturb=1), self.run(dropout=dropout, disturb=2))

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_another_seed_gives_another_delta(self, dropout):
        assert not same_bits(self.run(dropout=dropout, seed=3), self.run(dropout=dropout, seed=4))

    def test_dropout_is_at_work(self):
        assert not same_bits(self.run(dropout=0.5), self.run())

    def test_the_global_random_state_and_threads_are_put_back(self):
        trainer = series_trainer(adapter={"dropout": 0.5}, threads=2)
        state, threads = torch.random.get_rng_state(), torch.get_num_threads()
        trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.get_num_threads() == threads

    def test_threads_are_set_while_it_runs(self):
        trainer = series_trainer(threads=3)
        seen = set()
        collate = trainer.task.collate
        trainer.task.collate = lambda features: seen.add(torch.get_num_threads()) or collate(features)
        trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert seen == {3}

    def test_zero_threads_leave_torch_s_choice(self):
        trainer = series_trainer(threads=0)
        seen = set()
        collate = trainer.task.collate
        trainer.task.collate = lambda features: seen.add(torch.get_num_threads()) or collate(features)
        trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert seen == {torch.get_num_threads()}

    def test_a_run_depends_on_nothing_that_ran_before(self):
        fresh, used = series_trainer(batch_size=4), series_trainer(batch_size=4)
        used.run(start(used, scale=1.0), TrainPlan(trainable=("factor_b",)), series_data(used, count=5), seed=9)
        state = start(fresh)
        first = fresh.run(state, QUIET, series_data(fresh), seed=3).delta
        assert same_bits(first, used.run(state, QUIET, series_data(used), seed=3).delta)

    def test_a_client_that_fails_leaves_nothing_to_the_next(self, monkeypatch):
        trainer = series_trainer(gradient_accumulation=2, batch_size=2)
        data = series_data(trainer)
        state = start(trainer)
        before = trainer.run(state, TrainPlan(), data, seed=1).delta
        backward = trainer._backward

        def fails_after(*arguments):
            backward(*arguments)
            raise RuntimeError("out of memory")

        monkeypatch.setattr(trainer, "_backward", fails_after)
        with pytest.raises(RuntimeError):
            trainer.run(state, TrainPlan(), data, seed=2)
        monkeypatch.undo()
        assert all(parameter.grad is None for parameter in trainer.adapter.trainable().values())
        assert same_bits(trainer.run(state, TrainPlan(), data, seed=1).delta, before)

    def test_client_seeds_differ_in_every_part(self):
        seeds = {client_seed(*key) for key in [(0, 1, "a"), (1, 1, "a"), (0, 2, "a"), (0, 1, "b"), (1, 0, "a")]}
        assert len(seeds) == 5
        assert all(0 <= seed < 2**63 for seed in seeds)

    def test_client_seeds_do_not_change_between_versions(self):
        assert client_seed(0, 1, "united") == client_seed(0, 1, "united")


class TestPlan:
    @pytest.mark.parametrize("groups", [("factor_b", "dense"), ("factor_a",), ("factor_a", "factor_b", "dense")])
    def test_the_delta_holds_the_trained_groups_alone(self, groups):
        trainer = series_trainer(batch_size=4)
        found = trainer.run(start(trainer), TrainPlan(trainable=groups), series_data(trainer), seed=3)
        assert found.delta.keys() == trainer.adapter.trainable(groups).keys()
        assert {group_of(name) for name in found.delta} == set(groups)
        assert all(tensor.any() for tensor in found.delta.values())

    def test_a_frozen_tensor_that_moves_is_an_error(self, monkeypatch):
        trainer = series_trainer(batch_size=4)
        frozen, collate = trainer.adapter.trainable(("factor_a",)), trainer.task.collate

        def careless(features):
            with torch.no_grad():
                next(iter(frozen.values())).add_(1.0)
            return collate(features)

        monkeypatch.setattr(trainer.task, "collate", careless)
        with pytest.raises(ModelError, match=r"factor_a moved, though the plan trains only factor_b, dense"):
            trainer.run(start(trainer), TrainPlan(trainable=("factor_b", "dense")), series_data(trainer), seed=3)

    def test_the_delta_has_exactly_the_adapter_s_tensors(self):
        trainer = series_trainer(adapter={"train_head": False})
        found = trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert found.delta.keys() == trainer.adapter.read().tensors.keys()
        assert all(tensor.dtype == torch.float32 for tensor in found.delta.values())

    def test_evaluation_before_measures_what_was_received(self):
        trainer = series_trainer(batch_size=4)
        data = series_data(trainer, test=6)
        state = start(trainer)
        expected = trainer.evaluate(state, data.test)
        found = trainer.run(state, TrainPlan(), data, seed=3).metrics
        assert found["eval_before_loss"] == expected.loss
        assert found["eval_before_accuracy"] == expected.metrics["accuracy"]
        assert found["eval_before_num_examples"] == 6
        assert "eval_after_loss" not in found

    @pytest.mark.parametrize("where", ["plan", "config"])
    def test_evaluation_after_measures_what_was_trained(self, where):
        trainer = series_trainer(batch_size=4, evaluate_after=where == "config")
        data = series_data(trainer, test=6)
        state = start(trainer)
        result = trainer.run(state, TrainPlan(evaluate_before=False, evaluate_after=where == "plan"), data, seed=3)
        after = AdapterState(state.spec, {name: state.tensors[name] + result.delta[name] for name in result.delta})
        assert result.metrics["eval_after_loss"] == pytest.approx(trainer.evaluate(after, data.test).loss, rel=1e-5)
        assert "eval_before_loss" not in result.metrics

    def test_evaluation_does_not_change_training(self):
        trainer = series_trainer(batch_size=4, adapter={"dropout": 0.3})
        data = series_data(trainer, test=6)
        state = start(trainer)
        measured = trainer.run(state, TrainPlan(evaluate_after=True), data, seed=3).delta
        assert same_bits(measured, trainer.run(state, QUIET, data, seed=3).delta)

    def test_nothing_is_measured_without_held_out_data(self):
        trainer = series_trainer()
        found = trainer.run(start(trainer), TrainPlan(evaluate_after=True), series_data(trainer), seed=3).metrics
        assert set(found) == {"train_loss", "steps", "grad_clipped_share", "seconds"}

    def test_a_plan_to_evaluate_trains_nothing(self):
        trainer = series_trainer()
        data = series_data(trainer, test=6)
        found = trainer.run(start(trainer), TrainPlan(mode="evaluate", evaluate_before=False), data, seed=3)
        assert (found.delta, found.num_examples) == ({}, 0)
        assert found.metrics["eval_before_num_examples"] == 6
        assert "train_loss" not in found.metrics

    def test_every_metric_is_a_finite_float(self):
        trainer = series_trainer()
        found = trainer.run(start(trainer), TrainPlan(evaluate_after=True), series_data(trainer, test=4), seed=3)
        assert all(isinstance(value, float) and math.isfinite(value) for value in found.metrics.values())
        assert found.metrics["seconds"] > 0


class TestAdapterDtypes:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_small_steps_are_not_lost_to_a_short_mantissa(self, dtype):
        short = series_trainer(batch_size=4, learning_rate=1e-4, adapter={"dtype": dtype})
        full = series_trainer(batch_size=4, learning_rate=1e-4)
        received = start(short).cast(short.adapter.spec.dtype)
        found = short.run(received, QUIET, series_data(short), seed=3).delta
        widened = AdapterState(full.adapter.spec, {name: t.float() for name, t in received.tensors.items()})
        assert same_bits(found, full.run(widened, QUIET, series_data(full), seed=3).delta)
        assert norm(found) > 0


class TestLearning:
    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_a_plain_module_on_series_improves(self, dropout):
        options = {"optimizer": "adamw", "learning_rate": 0.01, "epochs": 15.0, "batch_size": 8}
        trainer = series_trainer(adapter={"dropout": dropout}, **options)
        data = series_data(trainer, count=24, test=8)
        found = trainer.run(trainer.adapter.read(), TrainPlan(evaluate_after=True), data, seed=3).metrics
        assert found["eval_after_accuracy"] == 1.0
        assert found["eval_after_loss"] < 0.5 * found["eval_before_loss"]

    def test_a_language_model_improves(self):
        base = load_base(ModelConfig(source="tiny:llama"))
        config = TaskConfig(name="causal_lm", max_length=16)
        task = make_task(config, base.tokenizer)
        features = task.encode([{"text": "tick tock " * count} for count in (1, 2, 3)])
        trainer = LocalTrainer(
            attach(base, AdapterConfig(rank=4, target_modules="all-linear"), config, seed=1),
            task,
            TrainConfig(batch_size=4, epochs=10.0, learning_rate=0.02, precision="float32"),
        )
        data = LocalData(features, features)
        found = trainer.run(trainer.adapter.read(), TrainPlan(evaluate_after=True), data, seed=3).metrics
        assert found["eval_after_perplexity"] < 0.7 * found["eval_before_perplexity"]

    def test_the_base_is_not_touched(self):
        base = load_base(ModelConfig(source="tiny:bert"))
        model = attach(base, AdapterConfig(rank=4, target_modules="all-linear"), TEXT, seed=1)
        task = make_task(TEXT, base.tokenizer)
        features = task.encode(
            [{"text": f"sun {index}" if index % 2 else "ice", "label": index % 2} for index in range(8)]
        )
        trainer = LocalTrainer(model, task, TrainConfig(batch_size=4, epochs=2.0))
        result = trainer.run(model.read(), TrainPlan(), LocalData(features, features), seed=3)
        assert norm(result.delta) > 0
        assert base_digest(base.model, base.tokenizer) == base.base_digest
        assert all(tensor.grad is None for tensor in base.model.parameters())


class TestSchedulers:
    def losses_by(self, **train):
        trainer = series_trainer(batch_size=4, **train)
        return trainer.run(start(trainer), QUIET, series_data(trainer), seed=3).delta

    @pytest.mark.parametrize(
        ("scheduler", "arguments"),
        [
            ("StepLR", {"step_size": 1, "gamma": 0.1}),
            ("CosineAnnealingLR", {"T_max": "total"}),
            ("OneCycleLR", {"max_lr": 0.1, "total_steps": "total"}),
            ("LinearLR", {"start_factor": 0.1, "total_iters": "total"}),
            ("ReduceLROnPlateau", {"patience": 0, "threshold": 10.0, "threshold_mode": "abs"}),
            ("ExponentialLR", {"gamma": 0.5}),
        ],
    )
    def test_any_of_torch_s_schedules_runs(self, scheduler, arguments):
        found = self.losses_by(scheduler=scheduler, scheduler_args=arguments)
        assert not same_bits(found, self.losses_by())

    def test_a_schedule_is_stepped_once_per_optimizer_step(self):
        trainer = series_trainer(
            batch_size=12, steps=2, scheduler="StepLR", scheduler_args={"step_size": 1, "gamma": 0.0}
        )
        once = series_trainer(batch_size=12, steps=1)
        state = start(trainer)
        two = trainer.run(state, QUIET, series_data(trainer), seed=3).delta
        assert same_bits(two, once.run(state, QUIET, series_data(once), seed=3).delta)

    @pytest.mark.parametrize("name", ["Cosine", "LRScheduler", "_LRScheduler", "os", "Optimizer", "__class__"])
    def test_an_unknown_schedule_names_the_known_ones(self, name):
        with pytest.raises(ConfigError, match=rf"train\.scheduler = '{name}' .*CosineAnnealingLR"):
            series_trainer(scheduler=name)

    @pytest.mark.parametrize(
        ("scheduler", "arguments"),
        [("StepLR", {}), ("StepLR", {"size": 1}), ("LambdaLR", {"lr_lambda": "os.system"}), ("SequentialLR", {})],
    )
    def test_arguments_that_do_not_fit_are_refused_before_any_round(self, scheduler, arguments):
        with pytest.raises(ConfigError, match=f"do not fit {scheduler}"):
            series_trainer(scheduler=scheduler, scheduler_args=arguments)


class TestPrecision:
    def test_bfloat16_autocast_is_near_float32(self):
        half, full = (series_trainer(batch_size=4, precision=name) for name in ("bfloat16", "float32"))
        state = start(half)
        first = half.run(state, QUIET, series_data(half), seed=3).delta
        second = full.run(state, QUIET, series_data(full), seed=3).delta
        assert not same_bits(first, second)
        assert norm({name: first[name] - second[name] for name in first}) < 0.3 * norm(second)

    def test_float16_on_the_cpu_is_refused(self):
        with pytest.raises(ConfigError, match=r"train\.precision = 'float16' needs a GPU"):
            series_trainer(precision="float16")

    @pytest.mark.parametrize("flag", ["avx512_bf16", "amx_bf16"])
    def test_auto_is_bfloat16_where_the_processor_has_it(self, monkeypatch, flag):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {flag: True}, raising=False)
        assert _autocast_dtype("auto", torch.device("cpu")) == torch.bfloat16

    def test_auto_is_float32_where_the_processor_has_not(self, monkeypatch):
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        assert _autocast_dtype("auto", torch.device("cpu")) is None

    def test_auto_asks_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
        assert _has_bfloat16(torch.device("cuda"))

    def test_a_gpu_may_use_float16(self):
        assert _autocast_dtype("float16", torch.device("cuda")) == torch.float16


class TestScaler:
    """The GPU's gradient scaler, played by a stand-in."""

    def test_a_skipped_step_does_not_advance_the_schedule(self):
        parameter = torch.nn.Parameter(torch.ones(1))
        config = TrainConfig(optimizer="sgd", scheduler="StepLR", scheduler_args={"step_size": 1}, learning_rate=1.0)
        steps = Steps([parameter], config, 0.0, total=2)
        scales = iter([4.0, 2.0])
        steps.scaler.get_scale = lambda: next(scales)
        parameter.grad = torch.zeros(1)
        steps.step(0.5)
        assert steps._scheduler.get_last_lr() == [1.0]


class TestDevice:
    def test_auto_takes_a_gpu_where_there_is_one(self, monkeypatch):
        from federated import training

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert training._device("auto").type == "cuda"

    def test_a_device_may_be_named(self):
        assert series_trainer(device="cpu").device.type == "cpu"

    @pytest.mark.parametrize("name", ["cuda:77", "toaster", "xpu"])
    def test_a_device_that_is_not_here_is_refused(self, name):
        with pytest.raises(ConfigError, match=rf"train\.device = '{name}' cannot be used here .*; set auto or cpu"):
            series_trainer(device=name)


class TestRefusals:
    def test_a_client_without_examples(self):
        trainer = series_trainer()
        with pytest.raises(DataError, match="no training examples"):
            trainer.run(start(trainer), QUIET, LocalData(()), seed=3)

    def test_a_loss_that_is_not_finite_names_the_step(self):
        trainer = series_trainer(batch_size=12, steps=5, learning_rate=1e38)
        with pytest.raises(FederatedError, match=r"the training loss became (nan|inf) at step 2; lower"):
            trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)

    def test_a_failed_run_puts_threads_and_randomness_back(self):
        trainer = series_trainer(threads=3, learning_rate=1e38, steps=5)
        state, threads = torch.random.get_rng_state(), torch.get_num_threads()
        with pytest.raises(FederatedError):
            trainer.run(start(trainer), QUIET, series_data(trainer), seed=3)
        assert torch.equal(state, torch.random.get_rng_state())
        assert torch.get_num_threads() == threads

    def test_a_failed_run_leaves_the_trainer_usable(self):
        trainer, fresh = series_trainer(), series_trainer()
        bad = AdapterState(trainer.adapter.spec, {name: t * float("nan") for name, t in start(trainer).tensors.items()})
        with pytest.raises(FederatedError, match="step 1"):
            trainer.run(bad, QUIET, series_data(trainer), seed=3)
        state = start(trainer)
        first = trainer.run(state, QUIET, series_data(trainer), seed=3).delta
        assert same_bits(first, fresh.run(state, QUIET, series_data(fresh), seed=3).delta)

    def test_a_state_of_another_adapter(self):
        trainer, other = series_trainer(), series_trainer(adapter={"alpha": 2.0})
        with pytest.raises(ModelError, match="spec differs in alpha"):
            trainer.run(start(other), QUIET, series_data(trainer), seed=3)

    def test_groups_that_hold_nothing(self):
        trainer = series_trainer(adapter={"train_head": False})
        with pytest.raises(ModelError, match="nothing to train"):
            trainer.run(start(trainer), TrainPlan(trainable=("dense",)), series_data(trainer), seed=3)
