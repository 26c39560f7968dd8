"""Every command says what it does, and saying so is quick."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GROUPS = {
    (): {
        "simulate",
        "train",
        "strategies",
        "report",
        "registry",
        "channel",
        "approve",
        "audit",
        "release",
        "device",
        "deploy",
        "run",
        "serve",
        "assets",
        "privacy",
    },
    ("registry",): {
        "list",
        "show",
        "lineage",
        "channels",
        "init",
        "tag",
        "verify",
        "gc",
        "diff",
        "export",
        "import",
        "devices",
    },
    ("channel",): {"list", "promote", "rollback", "require", "history"},
    ("audit",): {"log", "verify"},
    ("release",): {
        "keys",
        "publish",
        "rollback",
        "renew",
        "rotate",
        "revoke",
        "status",
        "bundle",
        "verify",
        "check-seal",
    },
    ("release", "keys"): {"init", "add", "make"},
    ("device",): {
        "try",
        "run",
        "status",
        "install",
        "activate",
        "rollback",
        "pin",
        "history",
        "report",
        "enroll",
        "join",
        "personal",
    },
    ("deploy",): {"init", "up", "down", "app", "status", "invite", "devices", "approve", "revoke", "history"},
    ("run",): {"submit", "status", "logs", "stop", "resume"},
    ("assets",): {"fetch", "list"},
    ("privacy",): {"plan", "spent", "audit"},
}
COMMANDS = [(*group, name) for group, names in GROUPS.items() for name in sorted(names)]
LIGHT = """
import sys
from federated.cli.main import _run
sys.argv = ["fedpeft", *sys.argv[1:]]
code = _run()
print("heavy:", *sorted({"torch", "transformers", "peft", "flwr", "ray", "hydra", "pygal"} & set(sys.modules)))
sys.exit(code)
"""


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_help_lists_every_command(fedpeft: Callable[..., Any], group: tuple[str, ...]) -> None:
    lines = fedpeft(*group, "--help").out.splitlines()
    listed = {line.split()[1] for line in lines if line.startswith("│ ") and not line.startswith(("│ -", "│  "))}
    assert listed == GROUPS[group]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_explains_itself(fedpeft: Callable[..., Any], command: tuple[str, ...]) -> None:
    text = fedpeft(*command, "--help").out
    assert f"Usage: fedpeft {' '.join(command)} " in text
    assert len(text.split("Usage:")[1].splitlines()[2].strip()) > 20  # the line below says what it is for


@pytest.mark.parametrize("group", GROUPS, ids=" ".join)
def test_nothing_more_said_is_a_call_for_help(fedpeft: Callable[..., Any], group: tuple[str, ...]) -> None:
    done = fedpeft(*group, code=2)
    assert "Usage: fedpeft" in done.out + done.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["deploy", "--help"],
        ["simulate", "--help"],
        ["release", "--help"],
        ["registry", "list"],
        ["assets", "list"],
    ],
)
def test_light_commands_load_no_heavy_library(finished: Path, arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, *arguments],
        env={"FEDPEFT_REGISTRY": str(finished / "registry"), "HOME": str(finished)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "heavy:")
