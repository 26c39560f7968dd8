"""The mechanism against its definition: schedules, batches, noise, and what is refused."""

import math

import pytest
import torch
from torch import nn

from federated.config import TrainConfig
from federated.errors import PrivacyError
from federated.privacy.chance import noise_source
from federated.privacy.dp_sgd import (
    PrivateGradients,
    PrivateSchedule,
    check_private_training,
    micro_batches,
    private_schedule,
)
from federated.privacy.example_clipping import clipped_sum

SHAPES = {"a": (2, 3), "b": (4,)}


def private(*, sigma=2.0, clip_norm=0.5, batch=10, seed=1, observer=None, steps=3, sampling=0.25):
    parameters = {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}
    return PrivateGradients(
        parameters,
        PrivateSchedule(sampling, steps, batch),
        clip_norm=clip_norm,
        noise_multiplier=sigma,
        source=noise_source(seed),
        observer=observer,
    )


def rows(count=4):
    generator = torch.Generator().manual_seed(count)
    return {name: torch.randn(count, *shape, generator=generator) for name, shape in SHAPES.items()}


class TestSchedule:
    @pytest.mark.parametrize(
        ("count", "train", "expected"),
        [
            (33, {"batch_size": 32}, (32 / 33, 2, 32)),  # 1 / len(loader) would say 1/2
            (7, {"batch_size": 2}, (2 / 7, 4, 2)),
            (100, {"batch_size": 5, "gradient_accumulation": 2}, (0.1, 10, 10)),
            (100, {"batch_size": 10, "epochs": 2.5}, (0.1, 25, 10)),
            (100, {"batch_size": 10, "epochs": 0.1}, (0.1, 1, 10)),
            (100, {"batch_size": 10, "epochs": 0.001}, (0.1, 1, 10)),
            (100, {"batch_size": 10, "epochs": 3.3}, (0.1, 33, 10)),
            (100, {"batch_size": 10, "steps": 7, "epochs": 9.0}, (0.1, 7, 10)),
            (10, {"batch_size": 10}, (1.0, 1, 10)),
            (2, {"batch_size": 1}, (0.5, 2, 1)),
        ],
    )
    def test_sampling_is_the_batch_over_the_data_exactly(self, count, train, expected):
        found = private_schedule(count, TrainConfig(**train))
        assert (found.sampling, found.steps, found.expected_batch) == expected

    @pytest.mark.parametrize("train", [{"batch_size": 11}, {"batch_size": 4, "gradient_accumulation": 3}])
    def test_a_batch_larger_than_the_data_is_refused(self, train):
        with pytest.raises(PrivacyError, match="is more than this client's training examples") as refused:
            private_schedule(10, TrainConfig(**train))
        assert "10" not in str(refused.value).replace("11", "").replace("12", "")

    @pytest.mark.parametrize("count", [0, 1])
    def test_one_example_is_refused(self, count):
        with pytest.raises(PrivacyError, match="at least two training examples"):
            private_schedule(count, TrainConfig(batch_size=1))


class TestSettings:
    def test_a_schedule_that_follows_the_loss_is_refused(self):
        with pytest.raises(PrivacyError, match="follows the training loss"):
            check_private_training(TrainConfig(scheduler="ReduceLROnPlateau"))

    def test_a_loss_scale_that_follows_the_gradients_is_refused(self):
        with pytest.raises(PrivacyError, match="float16"):
            check_private_training(TrainConfig(precision="float16"))

    def test_others_are_not(self):
        check_private_training(TrainConfig(scheduler="CosineAnnealingLR", scheduler_args={"T_max": "total"}))

    @pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
    def test_no_noise_is_refused(self, sigma):
        with pytest.raises(PrivacyError, match="with which nothing is private"):
            private(sigma=sigma)


class TestFill:
    def test_the_gradient_is_its_definition(self):
        seen = []
        made = private(observer=seen.append)
        parts = [clipped_sum(rows(3), 0.5), clipped_sum(rows(2), 0.5)]
        made.fill(7, [4, 1, 0, 9, 5], parts)
        (step,) = seen
        flat = noise_source(1).normal(10) * 2.0 * 0.5
        noise = {"a": flat[:6].view(2, 3), "b": flat[6:]}
        assert (step.step, step.indices) == (7, (4, 1, 0, 9, 5))
        assert torch.equal(step.norms, torch.cat([part.norms for part in parts]))
        for name, parameter in made.parameters.items():
            total = parts[0].tensors[name] + parts[1].tensors[name]
            torch.testing.assert_close(step.clipped[name], total)
            torch.testing.assert_close(step.noise[name], noise[name])
            torch.testing.assert_close(parameter.grad, (total + noise[name]) / 10)

    def test_an_empty_batch_is_noise_alone(self):
        seen = []
        made = private(observer=seen.append)
        made.fill(1, [], [])
        assert seen[0].norms.shape == (0,)
        assert not any(one.any() for one in seen[0].clipped.values())
        for name, parameter in made.parameters.items():
            assert parameter.grad.any()
            torch.testing.assert_close(parameter.grad, seen[0].noise[name] / 10)

    def test_noise_has_its_size_and_is_new_in_each_step(self):
        seen = []
        made = private(observer=seen.append, sigma=3.0, clip_norm=0.25)
        for step in range(1, 2001):
            made.fill(step, [], [])
        drawn = torch.stack([torch.cat([one.flatten() for one in step.noise.values()]) for step in seen]).double()
        assert float(drawn.std()) == pytest.approx(0.75, rel=0.02)
        assert float((drawn[1:] * drawn[:-1]).mean()) == pytest.approx(0.0, abs=0.02)
        assert len(torch.unique(drawn, dim=0)) == 2000

    def test_the_parts_are_not_changed(self):
        made, parts = private(), [clipped_sum(rows(3), 0.5), clipped_sum(rows(2), 0.5)]
        before = [{name: one.clone() for name, one in part.tensors.items()} for part in parts]
        made.fill(1, range(5), parts)
        for part, old in zip(parts, before, strict=True):
            assert all(torch.equal(part.tensors[name], old[name]) for name in old)

    def test_gradients_of_fewer_bits_are_rounded_after_the_noise(self):
        made = private()
        made.parameters["a"].data = made.parameters["a"].data.to(torch.bfloat16)
        made.fill(1, [], [])
        assert made.parameters["a"].grad.dtype == torch.bfloat16

    def test_what_is_accounted_is_what_was_asked_for(self):
        assert private().metrics() == {"dp_steps": 3.0, "dp_sampling": 0.25, "dp_noise_multiplier": 2.0}


def test_batches_are_those_of_the_sampler_sorted_by_length():
    lengths = [5, 1, 4, 2, 3, 9, 7, 8]
    found = private(sampling=0.5, steps=30).batches(lengths)
    assert len(found) == 30
    assert any(len(batch) > 2 for batch in found)
    for batch in found:
        assert [lengths[index] for index in batch] == sorted(lengths[index] for index in batch)
        assert len(set(batch)) == len(batch)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 12, 13])
def test_micro_batches_are_all_of_a_batch_and_never_too_large(count, size):
    parts = micro_batches(range(count), size)
    assert [index for part in parts for index in part] == list(range(count))
    assert len(parts) == math.ceil(count / size)
    assert all(1 <= len(part) <= size for part in parts)
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1
