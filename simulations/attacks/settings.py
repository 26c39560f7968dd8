"""The settings in which deltas are read: overrides as ``fedpeft simulate`` takes them, and what the client holds."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["ALL", "CLIENT_DP", "EXAMPLE_DP", "LOUD", "MESSAGES", "QUICK", "UNDEFENDED", "Setting"]

MESSAGES = ("my cancer came back and nobody knows yet", "wire 4000 euros to anna before the audit")
"""The client that is shown, made up."""


@dataclass(frozen=True)
class Setting:
    """How a delta is made, and what of it is seen.

    Args:
        label: in the table.
        overrides: of the configuration, besides `Setting.config`'s.
        steps: local optimizer steps, each on all messages.
        rank: LoRA's.
        messages: how many the client has.
        tokens: fewest and most tokens of each, with the tokenizer's own two.
        noise: share of the delta's length that is added as noise, without any promise; 0 adds none.
        release: not the delta is seen but what client-level privacy lets out of it.
        later: the client starts from an adapter that was trained before, so that B is not zero.
        bar: what stands below its bar in the picture; none without.
    """

    label: str
    overrides: tuple[str, ...] = ()
    steps: int = 1
    rank: int = 16
    messages: int = 1
    tokens: tuple[int, int] = (9, 11)
    noise: float = 0.0
    release: bool = False
    later: bool = False
    bar: str = ""

    @property
    def config(self) -> list[str]:
        """All overrides."""
        fixed = ["model=minilm", "task=classification", "train=sgd", "train.precision=float32", "rounds=1"]
        own = [f"adapter.rank={self.rank}", f"adapter.alpha={2 * self.rank}", f"train.steps={self.steps}"]
        return [*fixed, *own, f"train.batch_size={self.messages}", *self.overrides]

    @property
    def private(self) -> bool:
        """Whether its noise is the operating system's, and other draws give other results."""
        return self.release or "privacy=example_dp" in self.overrides


def _two(label: str, *overrides: str, **more: object) -> Setting:
    """The client whose delta is shown, and is defended: two messages, four steps, rank 32."""
    return Setting(label, overrides, steps=4, rank=32, messages=2, tokens=(10, 11), **more)  # type: ignore[arg-type]


ADAMW = ("train=adamw",)
UNDEFENDED = _two("2 messages, four steps: nothing done", bar="undefended")
NOISE = (
    _two("the same, noise of 1% of its length", noise=0.01, bar="noise 1%"),
    _two("the same, noise of 3% of its length", noise=0.03),
    _two("the same, noise of 10% of its length", noise=0.1, bar="noise 10%"),
    _two("the same, noise of 30% of its length", noise=0.3),
)
LOUD = _two("the same, noise of its own length", noise=1.0, bar="noise 100%")
CLIENT_DP = _two("the same, released by client_dp, epsilon 8", "privacy=client_dp", release=True, bar="release")
EXAMPLE_DP = _two("the same, privacy=example_dp, epsilon 8", "privacy=example_dp", bar="example_dp")
WEAK_DP = _two("the same, privacy=example_dp, epsilon 1000", "privacy=example_dp", "privacy.target_epsilon=1000")

QUICK = (UNDEFENDED, LOUD, CLIENT_DP, EXAMPLE_DP)
ALL = (
    UNDEFENDED,
    *NOISE,
    LOUD,
    CLIENT_DP,
    EXAMPLE_DP,
    WEAK_DP,
    Setting("1 message, one step"),
    Setting("1 message, one step, T above the rank", rank=8),
    Setting("1 message, five steps, T above the rank", rank=8, steps=5),
    Setting("1 message, five steps, bfloat16", ("train.precision=bfloat16",), steps=5),
    Setting("1 message, five steps, FFA-LoRA", ("strategy=ffa",), steps=5),
    Setting("1 message, five steps, AdamW", ADAMW, steps=5),
    Setting("1 message, five steps, AdamW, larger rank", ADAMW, steps=5, rank=64, bar="1, AdamW"),
    Setting("1 longer message, one step", tokens=(22, 26)),
    Setting("1 longer message, five steps", steps=5, tokens=(22, 26)),
    Setting("1 long message, five steps", steps=5, tokens=(38, 44)),
    Setting("2 messages, one step, round 2", messages=2, later=True),
    Setting("4 messages, five steps", steps=5, messages=4),
    Setting("16 messages, five steps", steps=5, messages=16, bar="16, SGD"),
    Setting("16 messages, five steps, AdamW", ADAMW, steps=5, messages=16, rank=8),
)
