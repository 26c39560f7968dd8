"""Clients whose deltas are read, of tweets or given messages, in one setting each; and what their reader scores."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from federated.adapters import BaseModel, load_base
from federated.cli.compose import compose
from federated.config import DataConfig, ExperimentConfig
from federated.data import open_source
from federated.delta import apply_some
from federated.state import AdapterState
from simulations.attacks.local_round import client_release, client_round, encoded, noised, opened
from simulations.attacks.settings import ALL, Setting
from simulations.attacks.span_test import SpanTest, Suspect, assembled, read, readers, span_tests

__all__ = ["Client", "Laboratory", "score"]

APP = Path(__file__).resolve().parent.parent.parent

Reading = Mapping[int, Sequence[int]]
"""Position to the words that are read there."""


@dataclass(frozen=True)
class Client:
    """One client's update as it is seen, and the truth.

    Args:
        setting: how it was made.
        examples: token ids of its messages: the truth.
        tests: of words at positions, in the first layer's rows.
        message_tests: of whole messages, in the next layer's rows.
        layers: whose inputs they test.
        epsilon: what was charged or promised for it; None where nothing is.
    """

    setting: Setting
    examples: Sequence[Sequence[int]]
    tests: Sequence[SpanTest]
    message_tests: Sequence[SpanTest]
    layers: tuple[str, str]
    epsilon: float | None = None

    @property
    def words(self) -> set[tuple[int, int]]:
        """Position and token id of all that is to be read: the tokenizer's own two are not."""
        return {(place, word) for ids in self.examples for place, word in enumerate(ids[1:-1], start=1)}

    @property
    def inputs(self) -> int:
        """T: the different inputs of the first layer."""
        return len({one for ids in self.examples for one in enumerate(ids)})

    @property
    def suspect(self) -> Suspect:
        """Its tests, and how many messages have a word at each position."""
        places = Counter(place for ids in self.examples for place in range(1, len(ids) - 1))
        return Suspect(self.tests, places)

    @property
    def read_from(self) -> str:
        """The factor whose rows are tested, or a dash where there is nothing to test by."""
        return "-" if not self.tests else "A" if self.tests[0].image is None else "B"


def score(reading: Reading, client: Client) -> float:
    """The share of a client's words that a reading holds."""
    found = {(place, word) for place, words in reading.items() for word in words}
    return len(client.words & found) / len(client.words)


class Laboratory:
    """The base model, the tweets, and the clients made of them.

    Args:
        seed: decides which tweets a client has, its first adapter and the order of its data.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.base: BaseModel = load_base(_config(ALL[0]).model)
        self._lengths: dict[str, int] = {}

    def clients(self, setting: Setting, count: int, *, draws: int) -> list[Client]:
        """Clients of a setting, each with tweets and a seed of its own; private ones with several draws of noise."""
        texts, size = self._tweets(setting.tokens), setting.messages
        parts = [texts[number * size : (number + 1) * size] for number in range(count)]
        times = draws if setting.private else 1
        return [self.client(setting, part, number) for number, part in enumerate(parts) for _ in range(times)]

    def client(self, setting: Setting, texts: Sequence[str], number: int = 0) -> Client:
        """One client with these messages, after its local round."""
        config = replace(_config(setting), seed=self.seed + number)
        examples = encoded(config, self.base, texts)
        received = self._trained_before(config) if setting.later else None
        sent = client_round(config, self.base, examples, received=received)
        delta, epsilon = opened(sent), sent.epsilon
        if setting.noise:
            delta = noised(delta, setting.noise, seed=config.seed)
        if setting.release:
            delta, epsilon = client_release(delta, config.privacy), config.privacy.target_epsilon
        ids = [list(one["input_ids"]) for one in examples]
        first, second = readers(self.base, sent.received.spec)[:2]
        made = Client(setting, ids, (), (), (first[0], second[0]), epsilon)
        tests = span_tests(sent.received, delta, first, inputs=made.inputs)
        whole = span_tests(sent.received, delta, second, inputs=sum(map(len, ids)))
        return replace(made, tests=tests, message_tests=whole)

    def _trained_before(self, config: ExperimentConfig) -> AdapterState:
        """The adapter of round 2 where one other client alone made round 1."""
        others = encoded(config, self.base, self._tweets((20, 30))[: config.train.batch_size])
        first = client_round(config, self.base, others)
        return apply_some(first.received, opened(first))

    def _tweets(self, tokens: tuple[int, int]) -> list[str]:
        """Tweets of some length, shuffled."""
        self._lengths = self._lengths or _lengths_of_tweets(self.base)
        found = [text for text, length in self._lengths.items() if tokens[0] <= length <= tokens[1]]
        random.Random(self.seed).shuffle(found)  # noqa: S311 - no secret
        return found

    def readings(self, clients: Sequence[Client]) -> list[Reading]:
        """What is read of each; all at once, since a position's candidates take time to make."""
        return [*read(self.base, clients[0].layers[0], [client.suspect for client in clients])]

    def messages(self, client: Client, reading: Reading) -> list[str]:
        """Whole messages of a client in its first round, as the reader puts them together."""
        lengths = [len(ids) for ids in client.examples]
        return [
            self.spelt(ids) for ids in assembled(self.base, client.layers[1], client.message_tests, reading, lengths)
        ]

    def spelt(self, ids: Sequence[int]) -> str:
        """The tokens between the tokenizer's own two, a space between any two."""
        tokenizer: Any = self.base.tokenizer
        return " ".join(tokenizer.convert_ids_to_tokens(list(ids[1:-1])))


@cache
def _config(setting: Setting) -> ExperimentConfig:
    return compose(APP, setting.config)


def _lengths_of_tweets(base: BaseModel) -> dict[str, int]:
    """Each tweet, without the handle that it begins with, and its length in tokens."""
    config = _config(ALL[0])
    source = open_source(DataConfig(name="airlines"), config.task)
    rows = [str(row["text"]) for client_id in source.client_ids for row in source.load(client_id).train]
    texts = list(dict.fromkeys(re.sub(r"^\s*@\w+\s*", "", text) for text in rows))
    return {text: len(one["input_ids"]) for text, one in zip(texts, encoded(config, base, texts), strict=True)}
