"""``fedpeft`` with adapters that are no LoRA: a federation from the command line, its registry, a device."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from federated.cli.compose import compose
from federated.tracking import read_events

ROOT = Path(__file__).resolve().parents[3]
APP = f"--app={ROOT}"
Simulate = Callable[..., Path]

HEAD = 3 * 32 + 3
CASES = {
    "ia3": (("experiment=tiny",), 2 * (32 + 32 + 64) + HEAD, "ia3, 6 tensors, F32"),
    "layernorm": (("experiment=tiny",), 5 * 2 * 32 + HEAD, "layernorm, 10 tensors, F32"),
    "head": (("experiment=tiny",), HEAD, "head, F32"),
    "full": (("experiment=tiny",), 42019, "full, F32"),
    "prompt": (("experiment=tiny",), 16 * 32 + HEAD, "prompt, 16 virtual tokens, F32"),
    "prefix": (("experiment=tiny",), 16 * 2 * 2 * 32 + HEAD, "prefix, 16 virtual tokens, F32"),
    "prefix-causal_lm": (
        ("experiment=tiny", "model=tiny_llama", "task=causal_lm"),
        16 * 2 * 2 * 16,
        "prefix, 16 virtual",
    ),
    "prompt-causal_lm": (("experiment=tiny", "model=tiny_llama", "task=causal_lm"), 16 * 32, "prompt, 16 virtual"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_federation_from_the_command_line_to_a_device(
    fedpeft: Callable[..., Any], simulate: Simulate, case: str
) -> None:
    overrides, params, shown = CASES[case]
    run = simulate(*overrides, f"adapter={case.partition('-')[0]}", "data.partition.num_clients=2")
    events = read_events(run / "metrics.jsonl")
    (started,) = [event for event in events if event["event"] == "run"]
    assert (started["adapter_params"], started["adapter_bytes"]) == (params, 4 * params)
    assert [event["participants"] for event in events if event["event"] == "round"] == [2]
    assert all(event["bytes_up"] >= 4 * params for event in events if event["event"] == "client")
    assert f" {shown}" in fedpeft("registry", "show", "latest", "--registry", run / "registry").out
    answers = [
        fedpeft("device", "try", "--text", "fine", "--version", version, "--registry", run / "registry").out
        for version in ("latest", "null")
    ]
    assert "Answers of v1" in answers[0]
    assert "null (null) activated" in answers[1]


def test_a_run_goes_on(fedpeft: Callable[..., Any], simulate: Simulate) -> None:
    run = simulate("experiment=tiny", "adapter=layernorm", "data.partition.num_clients=2")
    fedpeft("simulate", APP, "--resume", run, "rounds=2")
    assert [row["number"] for row in json.loads((run / "versions.json").read_text())] == [0, 1, 2]


def test_an_experiment_s_own_rank_is_lora_s_alone() -> None:
    assert compose(ROOT, ["experiment=shakespeare", "adapter=ia3"]).adapter.kind == "ia3"


def test_sensors(simulate: Simulate) -> None:
    run = simulate("experiment=sensor", "adapter=full", "data.partition.num_clients=2")
    assert yaml.safe_load((run / "config.yaml").read_text())["adapter"]["kind"] == "full"


@pytest.mark.parametrize(
    ("overrides", "code", "expected"),
    [
        (("adapter=ia3", "strategy=ffa"), 2, "adapter.kind = ia3: ffa works on LoRA's factors"),
        (("adapter=full", "adapter.max_params=1000"), 1, "adapter.kind = full would train and send all 41,920"),
        (("adapter=prompt", "task.head=stock"), 1, "a stock head reads positions that a soft prompt moves"),
        (("adapter=prompt", "task.max_length=512"), 1, "adapter.virtual_tokens = 16 and task.max_length = 512"),
        (("adapter=prefix", "task.max_length=512"), 1, "adapter.virtual_tokens = 16 and task.max_length = 512"),
        (("adapter=prefix", "strategy=fedsvd"), 2, "adapter.kind = prefix: fedsvd works on LoRA's factors"),
        (("experiment=sensor", "adapter=prefix"), 1, "tiny:sensor (TinySensor) takes no past_key_values"),
        (("adapter=head", "model=tiny_llama", "task=causal_lm"), 1, "kind head trains the task's head alone"),
        (("experiment=sensor", "adapter=layernorm"), 1, "adapter.kind = layernorm: tiny:sensor has no LayerNorm"),
        (("adapter=ia3", "adapter.rank=4"), 2, "adapter.rank: unknown key in the file that adapter= chose"),
        (("adapter=other",), 2, "adapter = 'other': no such choice; expected one of full, head, ia3, layernorm"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    fedpeft: Callable[..., Any], here: Path, overrides: tuple[str, ...], code: int, expected: str
) -> None:
    done = fedpeft("simulate", APP, *overrides, "run_dir=out", code=code)
    assert expected in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (here / "out").exists()
