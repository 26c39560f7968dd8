"""What a private step costs over an ordinary one: the bundled MiniLM with a mean-pooled head, LoRA of rank 8.

    python simulations/benchmarks/dp_step.py [--quick] [--seed N]

One step is forward, backward and optimizer on the same batch; the private one also clips each example, adds noise and
divides. All arms alternate in one process with one thread; a ratio is the median over turns of an arm's CPU time over
the ordinary step's of the same turn. Peak memory is each arm's own process, `memory_dp_over_plain` that of the default
method on the layers where it costs more. ``hooks`` and ``ghost`` are Opacus: the second clips without gradients of
single examples, in two backward passes. Needs ``fedpeft assets fetch minilm`` and ``pip install federated-peft[privacy]``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters import AdapterModel, attach, load_base
from federated.config import AdapterConfig, ModelConfig, TaskConfig, TrainConfig
from federated.local_steps import Steps
from federated.privacy.chance import noise_source
from federated.privacy.dp_sgd import PrivateGradients, PrivateSchedule
from federated.privacy.per_sample import per_sample
from federated.tasks import Batch, Task, make_task

BATCH, LENGTH, RANK, CLIP, SIGMA = 32, 64, 8, 1.0, 1.0
TARGETS = {"qv": ("query", "value"), "all": "all-linear"}
TRAIN = TrainConfig(batch_size=BATCH, precision="float32", device="cpu", max_grad_norm=0.0)
ARMS = {"qv": ("plain", "auto", "fused", "hooks", "ghost"), "all": ("plain", "auto", "fused", "hooks")}

Step = Callable[[], None]


@dataclass(frozen=True)
class Stage:
    """An adapted model and one batch."""

    adapter: AdapterModel
    task: Task
    batch: Batch

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What is trained."""
        return self.adapter.trainable()

    def losses(self, model: Any, batch: Batch) -> Tensor:
        """Of each example."""
        return self.task.per_sample_loss(model, batch)


def stage(targets: str, seed: int) -> Stage:
    """MiniLM with LoRA and a head, and a batch of random tokens of equal length."""
    task = TaskConfig(labels=("cold", "mild", "warm"), max_length=LENGTH)
    base = load_base(ModelConfig(source="asset:minilm"))
    adapter = attach(base, AdapterConfig(rank=RANK, target_modules=TARGETS[targets]), task, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 20_000, (BATCH, LENGTH), generator=generator)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    return Stage(adapter, make_task(task, base.tokenizer), batch)


@contextmanager
def plain_step(made: Stage) -> Iterator[Step]:
    """An ordinary step."""
    steps = Steps(list(made.parameters.values()), TRAIN, 0.0, total=1)

    def step() -> None:
        made.losses(made.adapter.model, made.batch).mean().backward()
        steps.step(0.0)

    yield step


@contextmanager
def private_step(made: Stage, method: str) -> Iterator[Step]:
    """A private step by one of our methods."""
    steps = Steps(list(made.parameters.values()), TRAIN, 0.0, total=1)
    schedule = PrivateSchedule(0.1, 1, BATCH)
    private = PrivateGradients(
        made.parameters, schedule, clip_norm=CLIP, noise_multiplier=SIGMA, source=noise_source()
    )
    with per_sample(method, made.adapter.model, made.parameters) as opened:

        def step() -> None:
            private.fill(1, range(BATCH), [private.clipped(opened, made.losses, made.batch)])
            steps.step(0.0)

        yield step


@contextmanager
def ghost_step(made: Stage) -> Iterator[Step]:
    """A private step by Opacus' ghost clipping; it needs the model in training mode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
    model, parameters = made.adapter.model, list(made.parameters.values())
    hooks: Any = GradSampleHooksFastGradientClipping(model, max_grad_norm=CLIP, loss_reduction="sum", strict=False)
    steps = Steps(parameters, TRAIN, 0.0, total=1)

    def step() -> None:
        hooks.enable_hooks()
        losses = made.losses(model, made.batch)
        losses.sum().backward(retain_graph=True)
        factors = hooks.get_clipping_coef()
        for parameter in parameters:
            parameter.grad = None
        hooks.disable_hooks()
        (losses * factors.detach()).sum().backward()
        for parameter in parameters:
            parameter.grad.add_(torch.randn_like(parameter), alpha=SIGMA * CLIP).div_(BATCH)  # type: ignore[union-attr]
        steps.step(0.0)

    for module in model.modules():
        if any(tensor is not None and tensor.requires_grad for tensor in module._parameters.values()):
            module.training = True
    yield step
    hooks.cleanup()


def opened_step(arm: str, made: Stage) -> Any:
    """The context that gives an arm's step."""
    if arm == "plain":
        return plain_step(made)
    return ghost_step(made) if arm == "ghost" else private_step(made, arm)


def ratios(targets: str, *, turns: int, seed: int) -> dict[str, float]:
    """CPU time of each arm over the ordinary step's."""
    seconds: dict[str, list[float]] = {arm: [] for arm in ARMS[targets]}
    with ExitStack() as stack:
        steps = {arm: stack.enter_context(opened_step(arm, stage(targets, seed))) for arm in ARMS[targets]}
        for turn in range(turns + 1):
            order = list(steps) if turn % 2 else list(reversed(steps))
            for arm in order:
                began = time.process_time()
                steps[arm]()
                if turn:  # the first one warms up
                    seconds[arm].append(time.process_time() - began)
    plain = seconds["plain"]
    found = {arm: statistics.median(a / b for a, b in zip(seconds[arm], plain, strict=True)) for arm in seconds}
    for arm, ratio in found.items():
        print(f"{targets:4} {arm:6} {1000 * statistics.median(seconds[arm]):8.1f} ms a step, {ratio:.3f} x", flush=True)
    return found


def peak_memory(targets: str, arm: str, seed: int) -> int:
    """Peak resident bytes of a process that takes a few of an arm's steps."""
    command = [sys.executable, __file__, "--seed", str(seed), "--peak", targets, arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(targets: str, arm: str, seed: int) -> None:
    """What `peak_memory` runs."""
    with opened_step(arm, stage(targets, seed)) as step:
        for _ in range(3):
            step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measured(*, quick: bool, seed: int) -> dict[str, float]:
    """All ratios by name."""
    found = {targets: ratios(targets, turns=5 if quick else 25, seed=seed) for targets in ARMS}
    memory = {
        targets: peak_memory(targets, "auto", seed) / peak_memory(targets, "plain", seed)
        for targets in (("all",) if quick else ARMS)
    }
    named = {
        f"{'dp' if arm == 'auto' else arm}_over_plain_{targets}": ratio
        for targets, arms in found.items()
        for arm, ratio in arms.items()
        if arm != "plain"
    }
    return {**named, "memory_dp_over_plain": max(memory.values())}


def main() -> None:
    """Measure and print."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak", nargs=2, metavar=("TARGETS", "ARM"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    if arguments.peak:
        print_peak(*arguments.peak, arguments.seed)
        return
    results = {name: round(value, 4) for name, value in measured(quick=arguments.quick, seed=arguments.seed).items()}
    print(json.dumps({**results, "seed": arguments.seed, "quick": arguments.quick}))


if __name__ == "__main__":
    main()
