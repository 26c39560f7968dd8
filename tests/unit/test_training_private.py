"""LocalTrainer under ``privacy.example``: steps against their definition, what is drawn, told, refused, left alone."""

import math

import pytest
import torch

from federated.adapters import attach, load_base
from federated.adapters.fingerprint import base_digest
from federated.config import AdapterConfig, ExamplePrivacyConfig, ModelConfig, PrivacyConfig, TaskConfig, TrainConfig
from federated.corrections import SHIFT
from federated.errors import DataError, PrivacyError
from federated.manifest import TrainPlan
from federated.privacy.dp_sgd import PrivateSchedule
from federated.state import AdapterState
from federated.tasks import make_task
from federated.training import LocalData, LocalTrainer, PrivateTask, private_schedule

torch.set_num_threads(1)

SENSOR = TaskConfig(name="sensor", labels=("up", "down"), max_length=16)
TEXT = TaskConfig(labels=("cold", "warm"), max_length=12)
QUIET = TrainPlan(evaluate_before=False)


def rows(count):
    return [
        {"values": [[(-0.3) ** (i % 2) * step, 0.1 * i, 1.0] for step in range(3 + i % 4)], "label": i % 2}
        for i in range(count)
    ]


def trainer_of(*, adapter=None, test_seed=5, sigma=1.5, clip_norm=0.2, method="auto", enabled=True, **train):
    base = load_base(ModelConfig(source="tiny:sensor"))
    model = attach(base, AdapterConfig(**{"rank": 4, **(adapter or {})}), SENSOR, seed=1)
    example = ExamplePrivacyConfig(enabled=enabled, clip_norm=clip_norm, noise_multiplier=sigma, per_sample=method)
    privacy = PrivacyConfig(example=example, test_seed=test_seed, target_epsilon=8.0)
    options = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "precision": "float32", "batch_size": 4}
    return LocalTrainer(model, make_task(SENSOR), TrainConfig(**{**options, **train}), privacy)


def data_of(trainer, count=12, test=0):
    features = trainer.task.encode(rows(count + test))
    return LocalData(features[:count], features[count:])


def start(trainer, **extra):
    generator = torch.Generator().manual_seed(7)
    masters = trainer.adapter.masters()
    tensors = {name: torch.randn(one.shape, generator=generator) * 0.3 for name, one in masters.items()}
    return AdapterState(trainer.adapter.spec, tensors, extra=extra)


def run(trainer, *, state=None, data=None, plan=QUIET, seed=3, sigma=0.0):
    seen = []
    told = PrivateTask(noise_multiplier=sigma, observer=seen.append)
    result = trainer.run(state or start(trainer), plan, data or data_of(trainer), seed=seed, private=told)
    return result, seen


def alone(trainer, state, feature):
    """One example's gradient, by ordinary autograd."""
    trainer.adapter.write(state)
    trainer.adapter.set_trainable(QUIET.trainable)
    named = trainer.adapter.trainable(QUIET.trainable)
    loss = trainer.task.per_sample_loss(trainer.adapter.model, trainer.task.collate([feature])).sum()
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


class TestSteps:
    @pytest.mark.parametrize("method", ["fused", "hooks", "vmap"])
    def test_a_step_is_its_definition(self, method):
        trainer = trainer_of(steps=1, method=method, gradient_accumulation=2)
        state, data = start(trainer), data_of(trainer)
        result, (step,) = run(trainer, state=state, data=data)
        total = {name: torch.zeros_like(one, dtype=torch.float64) for name, one in result.delta.items()}
        norms = []
        for index in step.indices:
            grads = alone(trainer, state, data.train[index])
            norms.append(math.sqrt(sum(float((one.double() ** 2).sum()) for one in grads.values())))
            for name, one in grads.items():
                total[name] += one.double() * min(1.0, 0.2 / norms[-1])
        assert step.norms.tolist() == pytest.approx(norms, rel=1e-4)
        assert max(norms) > 0.2
        for name, one in total.items():
            torch.testing.assert_close(step.clipped[name].double(), one, rtol=1e-4, atol=1e-6)
            expected = -0.1 * (one + step.noise[name]) / 8
            torch.testing.assert_close(result.delta[name].double(), expected, rtol=1e-4, atol=1e-6)

    def test_nothing_clipped_and_hardly_any_noise_is_the_ordinary_step(self):
        loose = {"clip_norm": 1e3, "sigma": 1e-9, "batch_size": 12, "steps": 2}
        found, _ = run(trainer_of(**loose))
        plain = trainer_of(**{**loose, "enabled": False})
        expected = plain.run(start(plain), QUIET, data_of(plain), seed=3)
        for name, one in expected.delta.items():
            torch.testing.assert_close(found.delta[name], one, rtol=1e-4, atol=1e-6)

    def test_each_micro_batch_has_at_most_the_batch_size(self):
        trainer, sizes = trainer_of(batch_size=3, gradient_accumulation=3, steps=6), []
        collate = trainer.task.collate
        trainer.task.collate = lambda features: (sizes.append(len(features)), collate(features))[1]
        _, seen = run(trainer)
        assert max(sizes) <= 3
        assert sum(sizes) == sum(len(step.indices) for step in seen)

    def test_empty_batches_are_steps_of_noise(self):
        trainer = trainer_of(batch_size=1, steps=60)
        result, seen = run(trainer, data=data_of(trainer, 2))
        assert {0, 1, 2} <= {len(step.indices) for step in seen}
        assert result.metrics["steps"] == result.metrics["dp_steps"] == len(seen) == 60
        assert all(step.noise and all(one.any() for one in step.noise.values()) for step in seen)

    def test_what_is_added_after_the_noise_is_neither_clipped_nor_dropped(self):
        options = {"steps": 1, "clip_norm": 1e-3, "sigma": 1.0}
        plain, _ = run(trainer_of(**options))
        trainer = trainer_of(**options)
        state = start(trainer)
        shift = {f"{SHIFT}{name}": torch.full_like(one, 2.0) for name, one in state.tensors.items()}
        moved, _ = run(trainer, state=AdapterState(state.spec, state.tensors, extra=shift))
        for name, one in plain.delta.items():
            torch.testing.assert_close(moved.delta[name], one - 0.2, rtol=1e-4, atol=1e-6)

    def test_the_proximal_term_pulls_back(self):
        options = {"steps": 2, "clip_norm": 1e-6, "sigma": 1e5}
        result, seen = run(trainer_of(proximal_mu=0.5, **options))
        for name, one in result.delta.items():
            first = -0.1 * seen[0].noise[name] / 4
            second = first - 0.1 * (seen[1].noise[name] / 4 + 0.5 * first)
            torch.testing.assert_close(one, second, rtol=1e-3, atol=1e-4)

    def test_the_bound_on_the_gradient_comes_after_the_noise(self):
        trainer = trainer_of(steps=1, sigma=50.0, max_grad_norm=0.01)
        result, _ = run(trainer)
        assert math.sqrt(sum(float((one**2).sum()) for one in result.delta.values())) == pytest.approx(1e-3, rel=1e-4)
        assert result.metrics["grad_clipped_share"] == 1.0

    def test_an_example_that_is_not_finite_is_left_out_in_silence(self):
        trainer = trainer_of(batch_size=12, steps=1)
        data = data_of(trainer)
        data.train[3]["values"][0][0] = 1e38
        result, (step,) = run(trainer, data=data)
        assert [index for index, norm in zip(step.indices, step.norms, strict=True) if norm.isnan()] in ([3], [])
        assert all(one.isfinite().all() for one in result.delta.values())

    def test_schedules_see_all_steps(self):
        trainer = trainer_of(steps=4, scheduler="LinearLR", scheduler_args={"total_iters": "total"})
        assert run(trainer)[0].metrics["steps"] == 4

    def test_adamw_and_a_frozen_a(self):
        trainer = trainer_of(optimizer="adamw", learning_rate=0.01, steps=3)
        result, seen = run(trainer, plan=TrainPlan(evaluate_before=False, trainable=("factor_b", "dense")))
        assert set(seen[0].noise) == set(result.delta)
        assert not [name for name in result.delta if name.endswith("factor_a")]


class TestChance:
    def test_two_runs_of_one_seed_have_other_batches_and_other_noise(self):
        trainer = trainer_of(test_seed=-1, batch_size=6, steps=8)
        (first, one), (second, other) = (run(trainer, seed=3) for _ in range(2))
        assert [step.indices for step in one] != [step.indices for step in other]
        assert not any(torch.equal(a.noise[n], b.noise[n]) for a in one for b in other for n in a.noise)
        assert any(not torch.equal(first.delta[name], second.delta[name]) for name in first.delta)

    def test_a_test_seed_repeats_bit_for_bit_and_differs_between_runs(self):
        trainer = trainer_of(steps=2)
        (first, _), (again, _), (other, _) = (run(trainer, seed=seed) for seed in (3, 3, 4))
        assert all(torch.equal(first.delta[name], again.delta[name]) for name in first.delta)
        assert not all(torch.equal(first.delta[name], other.delta[name]) for name in first.delta)

    def test_global_random_states_are_neither_read_nor_moved(self):
        trainer = trainer_of(test_seed=-1, steps=2)
        before = torch.get_rng_state()
        noises = []
        for _ in range(2):
            torch.set_rng_state(before)
            noises.append(run(trainer)[1][0].noise)
            assert torch.equal(torch.get_rng_state(), before)
        assert not all(torch.equal(noises[0][name], noises[1][name]) for name in noises[0])

    def test_batches_have_the_size_that_is_accounted(self):
        trainer = trainer_of(batch_size=3, steps=300, sigma=1.0)
        result, seen = run(trainer, data=data_of(trainer, 30))
        counts = torch.zeros(30)
        for step in seen:
            counts[list(step.indices)] += 1
        assert result.metrics["dp_sampling"] == 3 / 30
        assert sum(map(len, (step.indices for step in seen))) / 300 == pytest.approx(3.0, abs=0.5)
        assert counts.min() > 8
        assert counts.max() < 60


class TestReports:
    def test_only_what_was_known_before_and_held_out_measurements(self):
        trainer = trainer_of(steps=2, evaluate_after=True)
        result, _ = run(trainer, data=data_of(trainer, 12, test=4), plan=TrainPlan())
        told = {name for name in result.metrics if not name.startswith("eval_")}
        assert told == {"steps", "grad_clipped_share", "dp_steps", "dp_sampling", "dp_noise_multiplier"}
        assert {"eval_before_loss", "eval_after_loss"} <= result.metrics.keys()

    def test_the_schedule_is_known_before(self):
        trainer = trainer_of(batch_size=5, epochs=2.0)
        before = private_schedule(12, trainer.config)
        metrics = run(trainer)[0].metrics
        assert (metrics["dp_sampling"], metrics["dp_steps"]) == (before.sampling, before.steps) == (5 / 12, 5)

    def test_the_caller_s_noise_goes_first(self):
        trainer = trainer_of(steps=1)
        assert run(trainer, sigma=4.0)[0].metrics["dp_noise_multiplier"] == 4.0
        assert run(trainer)[0].metrics["dp_noise_multiplier"] == 1.5

    def test_without_privacy_all_is_as_it_was(self):
        trainer = trainer_of(enabled=False)
        result = trainer.run(start(trainer), QUIET, data_of(trainer), seed=3)
        assert {"train_loss", "seconds"} <= result.metrics.keys()
        assert not [name for name in result.metrics if name.startswith("dp_")]


class TestRefusals:
    """One clear error, and no step."""

    def refused(self, trainer, *, count=12, match, error=PrivacyError):
        state, data = start(trainer), data_of(trainer, count or 1)
        seen = []
        with pytest.raises(error, match=match):
            trainer.run(
                state,
                QUIET,
                data if count else LocalData([]),
                seed=3,
                private=PrivateTask(observer=seen.append),
            )
        assert not seen
        assert all(torch.equal(one, state.tensors[name]) for name, one in trainer.adapter.masters().items())
        assert all(one.grad is None for one in trainer.adapter.trainable().values())

    def test_a_batch_larger_than_the_data(self):
        self.refused(trainer_of(batch_size=13), match="more than this client's training examples")

    def test_one_example(self):
        self.refused(trainer_of(batch_size=1), count=1, match="at least two")

    def test_no_example(self):
        self.refused(trainer_of(), count=0, match="no training examples", error=DataError)

    def test_noise_that_nobody_solved_for(self):
        self.refused(trainer_of(sigma=0.0), match="nothing is private")

    def test_a_tensor_that_the_method_cannot_protect(self):
        trainer = trainer_of(adapter={"kind": "ia3"}, method="hooks")
        self.refused(trainer, match=r"embed.scale_out cannot be trained under privacy.example")

    def test_settings_that_let_data_past_the_noise(self):
        with pytest.raises(PrivacyError, match="ReduceLROnPlateau"):
            trainer_of(scheduler="ReduceLROnPlateau")


@pytest.mark.parametrize("kind", ["lora", "ia3", "layernorm", "head", "prompt", "full", "lora_xs"])
def test_every_kind_trains_privately_and_the_base_stays(kind):
    base = load_base(ModelConfig(source="tiny:bert"))
    adapter = attach(base, AdapterConfig(kind=kind), TEXT, seed=1)
    task = make_task(TEXT, base.tokenizer)
    data = task.encode([{"text": f"{word} {word}", "label": at % 2} for at, word in enumerate(["a", "bc", "def"] * 2)])
    privacy = PrivacyConfig(example=ExamplePrivacyConfig(enabled=True, noise_multiplier=1.0))
    trainer = LocalTrainer(adapter, task, TrainConfig(batch_size=3, steps=2, precision="bfloat16"), privacy)
    plan = TrainPlan(evaluate_before=False, trainable=("core", "dense") if kind == "lora_xs" else QUIET.trainable)
    result = trainer.run(adapter.read(), plan, LocalData(data), seed=0)
    assert all(one.any() for name, one in result.delta.items() if not name.endswith("factor_a"))
    assert base_digest(base.model, base.tokenizer) == base.base_digest
    assert not [module for module in adapter.model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("method", ["fused", "hooks", "vmap"])
def test_an_example_more_moves_the_clipped_sum_by_the_clipping_norm_at_most(method, monkeypatch):
    """Sensitivity as it is, with all examples in the batch, whichever one is left out."""
    monkeypatch.setattr("federated.training.private_schedule", lambda *_: PrivateSchedule(1.0, 1, 16))
    trainer = trainer_of(steps=1, method=method, batch_size=16)
    whole = data_of(trainer)

    def clipped(kept):
        _, (step,) = run(trainer, data=LocalData([whole.train[index] for index in kept]))
        return step.clipped

    total = clipped(range(12))
    for out in range(12):
        rest = clipped([index for index in range(12) if index != out])
        moved = math.sqrt(sum(float(((total[name] - rest[name]).double() ** 2).sum()) for name in total))
        assert moved <= 0.2 * (1 + 1e-4)


def test_dropout_is_refused_its_masks_depend_on_who_is_in_a_batch():
    with pytest.raises(PrivacyError, match=r"the adapter has dropout.*adapter\.dropout=0"):
        trainer_of(adapter={"dropout": 0.1})
    assert trainer_of(adapter={"dropout": 0.1}, enabled=False)
