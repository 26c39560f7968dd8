"""The audit of example level: DP-SGD's own batches, clip and noise, right and with faults planted."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from federated.privacy import canaries_example
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.canaries import Audit, Canaries, audit_mechanism
from federated.privacy.canaries_example import ExampleLevelPath
from federated.privacy.chance import noise_source
from federated.privacy.dp_sgd import PrivateGradients
from federated.privacy.example_clipping import ClippedSum, clipped_sum

COUNT, LAYERS = 1000, 16


def audited(noise: float, *, sampling: float = 1.0, steps: int = 1, each_step: bool = False) -> Audit:
    path = ExampleLevelPath(
        Canaries.shapes(COUNT, LAYERS),
        clip_norm=1.0,
        noise_multiplier=noise,
        sampling=sampling,
        expected_batch=int(sampling * COUNT) or 1,
        source=noise_source(3),
    )
    accounted = epsilon([GaussianSteps(noise, sampling, steps)], 1e-5)
    parts: dict[str, Any] = {"canaries": COUNT, "layers": LAYERS, "clip_norm": 1.0, "target_delta": 1e-5, "seed": 1}
    return audit_mechanism(path, accounted=accounted, steps=steps, each_step=each_step, **parts)


@pytest.mark.parametrize(("noise", "sampling", "steps"), [(2.0, 1.0, 1), (1.0, 0.2, 3), (2.0, 0.001, 2)])
def test_the_right_mechanism_stays_below_what_is_accounted(noise: float, sampling: float, steps: int) -> None:
    assert audited(noise, sampling=sampling, steps=steps).passed
    assert audited(noise, sampling=sampling, steps=steps, each_step=True).passed


def _no_clip(gradients: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
    return ClippedSum({name: one.sum(0) for name, one in gradients.items()}, torch.zeros(1))


def _per_layer(gradients: Mapping[str, torch.Tensor], bound: float) -> ClippedSum:
    parts = {name: clipped_sum({name: one}, bound).tensors[name] for name, one in gradients.items()}
    return ClippedSum(parts, torch.zeros(1))


@pytest.mark.parametrize("fault", [_no_clip, _per_layer])
def test_a_faulty_clip_is_found(monkeypatch: pytest.MonkeyPatch, fault: Any) -> None:
    monkeypatch.setattr(canaries_example, "clipped_sum", fault)
    assert not audited(2.0).passed


def test_weak_noise_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PrivateGradients._noise
    monkeypatch.setattr(PrivateGradients, "_noise", lambda self: {k: one / 4 for k, one in right(self).items()})
    assert not audited(2.0).passed


def test_repeated_noise_is_found_by_looking_at_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    right, kept = PrivateGradients._noise, []

    def once(self: PrivateGradients) -> Any:
        kept.append(kept[0] if kept else right(self))
        return kept[-1]

    monkeypatch.setattr(PrivateGradients, "_noise", once)
    assert not audited(4.0, steps=3, each_step=True).passed
