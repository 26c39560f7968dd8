"""A LoRA delta can be read: words of a client's messages out of what it sent, and what stops that.

    python -m simulations.attacks.read_the_delta [--seed N] [--quick] [--out DIR]

A client fine-tunes MiniLM (LoRA on query and value, a sentiment head) on its messages and sends the delta, as a client
of this library does, down to the sealed packet. Its reader is the server, which keeps to the protocol and is curious:
it has the packet, the adapter that it sent, and the base model. One step moves the first layer's factors by

    dB = -h s sum_t g_t (A x_t)^T        dA = -h s sum_t (B^T g_t) x_t^T

where x_t is a word at a position, so it ranks all 30,522 words of the vocabulary at each position by how far A x (or
x) is from the span of the rows; `simulations.attacks.span_test` has the argument and its limits. It is told the lengths
of the messages and how many different inputs they have. Undefended and below the rank it could see that itself, as a
gap in the spectrum, and defended it could not: the comparison favours the attack.

The same client then trains under ``privacy=example_dp``, with noise that is solved for and charged for epsilon 8; and
what client-level privacy would release of it is read too. That is no protection from the server, which under
``privacy=client_dp`` has the clean delta: the undefended row is what it reads.

Messages: two that are made up, and are shown; and tweets of the bundled airline data, without the handle in front, for
the table. Words read: the share of the words (without the tokenizer's own tokens) that are among the first n of the
ranking at their position, where n messages have a word there. By chance: the same reading, held against another
client's messages. A failing simple attack is no guarantee; epsilon is. Results repeat with the seed, but for
noise of differential privacy, which is the operating system's: several draws.

Needs ``fedpeft assets fetch minilm airlines``. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from federated.cli.main import exit_code
from simulations.attacks.picture import picture
from simulations.attacks.settings import ALL, CLIENT_DP, EXAMPLE_DP, LOUD, MESSAGES, QUICK, UNDEFENDED, Setting
from simulations.attacks.suspects import Client, Laboratory, Reading, score

CLIENTS, DRAWS = 8, 3
QUICK_CLIENTS, QUICK_DRAWS = 2, 2
SHOWN = {
    "read from the delta": UNDEFENDED,
    "from client_dp's release, ε = 8": CLIENT_DP,
    "under example_dp, ε = 8": EXAMPLE_DP,
}
"""What of the made-up client is shown."""


@dataclass(frozen=True)
class Line:
    """What is read in one setting: means over its clients.

    Args:
        setting: which.
        inputs: T.
        read_from: factor.
        words: share of words read.
        chance: the same reading held against the next client's words.
        epsilon: the largest of all clients, None where nothing is promised.
    """

    setting: Setting
    inputs: float
    read_from: str
    words: float
    chance: float
    epsilon: float | None


def main() -> None:
    """Read, show, write the picture."""
    options = _options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    console = Console(stderr=True)
    laboratory = Laboratory(options.seed)
    shown = [laboratory.client(setting, MESSAGES) for setting in SHOWN.values()]
    clients = clients_of(laboratory, quick=options.quick)
    readings = laboratory.readings([*shown, *clients])
    truth = [laboratory.spelt(ids) for ids in shown[0].examples]
    found = dict(zip(SHOWN, map(laboratory.messages, shown, readings), strict=True))
    lines = lines_of(clients, readings[len(shown) :])
    console.print(messages_table(truth, found))
    console.print(settings_table(lines))
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / "read_the_delta.svg"
    shares = {line.setting: (line.words, line.chance) for line in lines}
    target.write_text(picture(truth, found, shares), encoding="utf-8")
    console.print(f"Picture: {target}", soft_wrap=True, highlight=False)
    result = {**summary(lines), "messages": truth, "read": found, "seed": options.seed, "quick": options.quick}
    print(json.dumps(result))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="one client that is shown, and four settings")
    parser.add_argument("--out", type=Path, default=Path("runs/attacks"), help="folder for the picture")
    return parser.parse_args()


def clients_of(laboratory: Laboratory, *, quick: bool) -> list[Client]:
    """The clients of all settings, each after its local round."""
    count, draws = (QUICK_CLIENTS, QUICK_DRAWS) if quick else (CLIENTS, DRAWS)
    made: list[Client] = []
    for setting in QUICK if quick else ALL:
        print(f"local rounds: {setting.label}", file=sys.stderr)
        made += laboratory.clients(setting, count, draws=draws)
    return made


def lines_of(clients: Sequence[Client], readings: Sequence[Reading]) -> list[Line]:
    """Means by setting, in their order."""
    groups: dict[Setting, list[tuple[Client, Reading]]] = {}
    for client, reading in zip(clients, readings, strict=True):
        groups.setdefault(client.setting, []).append((client, reading))
    return [_line(setting, *zip(*group, strict=True)) for setting, group in groups.items()]


def _line(setting: Setting, clients: Sequence[Client], readings: Sequence[Reading]) -> Line:
    half = len(clients) // 2  # draws of one client stand side by side
    spent = [client.epsilon for client in clients if client.epsilon is not None]
    return Line(
        setting=setting,
        inputs=statistics.fmean(client.inputs for client in clients),
        read_from="/".join(sorted({client.read_from for client in clients})),
        words=statistics.fmean(map(score, readings, clients)),
        chance=statistics.fmean(map(score, readings, [*clients[half:], *clients[:half]])),
        epsilon=max(spent, default=None),
    )


def messages_table(truth: Sequence[str], found: Mapping[str, Sequence[str]]) -> Table:
    """What the client wrote, and what is read of it."""
    made = Table("seen", *(f"message {number}" for number, _ in enumerate(truth, start=1)), title="What a delta tells")
    made.add_row("the truth, on the client", *truth)
    for label, messages in found.items():
        cells = [_compared(text, wanted) for text, wanted in zip(messages, truth, strict=True)]
        made.add_row(label, *(cells or [Text("nothing to test by")] * len(truth)))
    made.caption = "red: read right. Under client_dp the server itself sees the delta"
    return made


def _compared(text: str, truth: str) -> Text:
    shown = Text()
    for word, wanted in zip(text.split(" "), truth.split(" "), strict=True):
        shown.append(f"{word} ", style="bold red" if word == wanted else "dim")
    return shown


def settings_table(lines: Sequence[Line]) -> Table:
    """One row per setting."""
    made = Table(
        "setting", "rank", "T", "from", "words read", "by chance", "epsilon", title="Words read, of 30,522 each"
    )
    for line in lines:
        made.add_row(line.setting.label, *cells_of(line))
    made.caption = "T: different inputs of the first layer, mean; from: the factor whose rows are tested"
    return made


def cells_of(line: Line) -> list[str]:
    """A row's numbers."""
    epsilon = "-" if line.epsilon is None else f"{line.epsilon:.3g}"
    shares = [f"{line.words:.0%}", f"{line.chance:.1%}"]
    return [str(line.setting.rank), f"{line.inputs:.0f}", line.read_from, *shares, epsilon]


def summary(lines: Sequence[Line]) -> dict[str, Any]:
    """The figures of one client under its defences, and all rows."""
    by_setting = {line.setting: line for line in lines}
    undefended, private = by_setting[UNDEFENDED], by_setting[EXAMPLE_DP]
    return {
        "recovered_undefended": round(undefended.words, 4),
        "recovered_noise_1x": round(by_setting[LOUD].words, 4),
        "recovered_client_dp_release": round(by_setting[CLIENT_DP].words, 4),
        "recovered_example_dp": round(private.words, 4),
        "recovered_by_chance": round(undefended.chance, 4),
        "epsilon": round(private.epsilon or 0.0, 4),
        "privacy_unit": "example",
        "rows": [[line.setting.label, *cells_of(line)] for line in lines],
    }


if __name__ == "__main__":
    sys.exit(exit_code(main))
