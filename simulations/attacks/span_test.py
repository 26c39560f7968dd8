"""The span test: which words, at which positions, can have made a LoRA delta.

A LoRA layer computes ``y = W x + s B A x`` with A rank x d and B d_out x rank, for every token's input x. Let x_1 ...
x_T be the different inputs that a layer reads in local training, and g_t the gradients of the loss at the outputs,
summed over the tokens whose input is x_t. One step of gradient descent of size h moves the factors by

    dB = -h s sum_t g_t (A x_t)^T        every row lies in span{A x_1 ... A x_T}, within R^rank
    dA = -h s sum_t (B^T g_t) x_t^T      every row lies in span{x_1 ... x_T}, within R^d; zero as long as B is

In the first layer x_t is nothing but a word at a position, through frozen embeddings: a few ten thousand candidates for
each position, which whoever has the base model can list. Whoever sent A as well takes them one by one:

* **From dB**, where T < rank: the rows leave rank - T directions free, and a word that was there is orthogonal to them:
  A x has no part outside the rows' span. Any other word passes only by chance. With T >= rank the rows fill R^rank,
  and every word passes: dB tells nothing this way.
* **From dA**, where B is not zero (from the second local step on, and from the second round on): x itself has no part
  outside the rows' span. One layer gives at most rank rows, but all layers that read the same inputs (query and value)
  give rows of the same span: m of them hold it all up to T = m rank. Beyond that no word lies in what is known of the
  span, but the true ones are nearer to it than others: less is read, not nothing.

Many steps: embeddings are frozen, so x_t stays, and dA is a sum over steps of rows of the same span, whatever the
weights of the sum (momentum, a schedule, a bound on the gradient's norm). A itself moves by little, so dB's rows
leave their span by little; where A is frozen (FFA-LoRA) not at all. Weight decay would add a known multiple of A and B.
AdamW divides each value by its own size, which is no sum of such rows: a blurred image of the span is left.

Which words stand together in one message is not in the first layer. The second one's inputs are made of whole
messages: `assembled` takes the combination whose inputs lie in the span of the second layer's rows.

Source: Petrov, Dimitrov, Baader, Mueller, Vechev, "DAGER: Exact Gradient Inversion for Large Language Models", NeurIPS
2024, arXiv:2405.15586, for full gradients of a layer (``dW = sum_t g_t x_t^T``). Where we differ: LoRA's factors; a
ranking in the place of a threshold; and plain search over combinations, which is for few messages only.

What it is not: the best attack. It uses no language model, no statistics of noise, and no later layer but one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from federated.adapters import BaseModel
from federated.errors import ModelError
from federated.manifest import AdapterSpec
from federated.state import AdapterState, Tensors

__all__ = ["SpanTest", "Suspect", "assembled", "layer_input", "outside", "read", "readers", "span_tests", "words_at"]

MOST_COMBINATIONS = 4096


@dataclass(frozen=True)
class SpanTest:
    """One subspace that true inputs, or their images under A, lie in.

    Args:
        rows: [n, p], orthonormal: a basis of the subspace, or of all that is outside of it.
        image: [p, d] that inputs go through first; None for inputs as they are.
        rows_are_outside: which of the two ``rows`` span; the smaller one is exact enough and cheaper.
    """

    rows: Tensor
    image: Tensor | None = None
    rows_are_outside: bool = False

    def outside(self, inputs: Tensor) -> Tensor:
        """The share of each input's (image's) squared length outside of the subspace: 0 for a true one.

        Args:
            inputs: float32 [..., d].

        Returns:
            [...], in [0, 1].
        """
        seen = inputs if self.image is None else inputs @ self.image.T
        share = (seen @ self.rows.T).square().sum(-1) / seen.square().sum(-1)
        return share if self.rows_are_outside else 1 - share


def span_tests(received: AdapterState, delta: Tensors, layers: Sequence[str], *, inputs: int) -> list[SpanTest]:
    """What a delta says of the inputs that some layers share: of dB where it can say anything, else of dA.

    Args:
        received: the adapter that the client started from.
        delta: what it sent.
        layers: names of adapted layers that read the same inputs.
        inputs: how many different ones they read (T), or a guess.

    Returns:
        None where nothing can be told by this test.
    """
    pairs = [(received.tensors[f"{name}.factor_a"], delta[f"{name}.factor_b"]) for name in layers]
    if all(inputs < factor_a.shape[0] for factor_a, _ in pairs):
        return [_of_factor_b(factor_a, moved, inputs) for factor_a, moved in pairs]
    moved = [delta[name] for layer in layers if (name := f"{layer}.factor_a") in delta]
    if not moved or not any(one.any() for one in moved):
        return []
    return [SpanTest(_leading(torch.cat(moved))[:inputs].float())]


def _of_factor_b(factor_a: Tensor, moved: Tensor, inputs: int) -> SpanTest:
    directions = _leading(moved).float()
    outside_is_smaller = len(directions) - inputs <= inputs
    rows = directions[inputs:] if outside_is_smaller else directions[:inputs]
    return SpanTest(rows, factor_a.float(), outside_is_smaller)


def _leading(moved: Tensor) -> Tensor:
    """Orthonormal directions of the rows' space, those with most weight first, float64."""
    directions: Tensor = torch.linalg.svd(moved.double(), full_matrices=False)[2]
    return directions


def outside(tests: Sequence[SpanTest], inputs: Tensor) -> Tensor:
    """The mean share outside over all tests: the smaller, the likelier was an input there."""
    return torch.stack([test.outside(inputs) for test in tests]).mean(0)


@dataclass(frozen=True)
class Suspect:
    """One delta to be read, and what its reader is told.

    Args:
        tests: from `span_tests`; none reads nothing.
        messages: position to the number of messages that have a word there.
    """

    tests: Sequence[SpanTest]
    messages: Mapping[int, int]


def read(base: BaseModel, layer: str, suspects: Sequence[Suspect]) -> list[dict[int, list[int]]]:
    """The likeliest words of each delta: at each position as many as there are messages, of the whole vocabulary.

    Args:
        base: whose embeddings the layer reads.
        layer: the first adapted one.
        suspects: of one base and layer; all are read together, since a position's candidates take time to make.

    Returns:
        For each suspect, position to token ids, the likeliest first; empty where there is nothing to test by.
    """
    found: list[dict[int, list[int]]] = [{} for _ in suspects]
    for position in sorted({one for suspect in suspects for one in suspect.messages}):
        words = words_at(base, layer, position)
        for suspect, reading in zip(suspects, found, strict=True):
            if suspect.tests and position in suspect.messages:
                shares = outside(suspect.tests, words)
                reading[position] = shares.topk(suspect.messages[position], largest=False).indices.tolist()
    return found


def words_at(base: BaseModel, layer: str, position: int) -> Tensor:
    """What a layer that reads the embeddings gets of every word of the vocabulary at one position, [words, d]."""
    words = torch.arange(_vocabulary(base))[:, None]
    places = torch.full_like(words, position)
    return layer_input(base.model, layer, input_ids=words, position_ids=places)[:, 0]


def _vocabulary(base: BaseModel) -> int:
    config: Any = base.model.config
    return int(config.vocab_size)


def assembled(
    base: BaseModel, layer: str, tests: Sequence[SpanTest], reading: Mapping[int, Sequence[int]], lengths: Iterable[int]
) -> list[list[int]]:
    """Whole messages out of words by position, by the inputs of the next layer, which are made of whole messages.

    It takes an adapter that was received as nothing (B zero): the base's own features are the client's first ones.

    Args:
        base: an encoder.
        layer: one that reads what the first layer made.
        tests: of that layer.
        reading: from `read`.
        lengths: in tokens, of each message, the first and the last being the tokenizer's own.

    Returns:
        Token ids of each message, in the order of ``lengths``; none where there is nothing to test by.

    Raises:
        ModelError: if there are too many combinations.
    """
    if not tests or not reading:
        return []
    ordered = {length: _by_likelihood(base, layer, tests, reading, length) for length in set(lengths)}
    return [ordered[length].pop(0) for length in lengths]


def _by_likelihood(
    base: BaseModel, layer: str, tests: Sequence[SpanTest], reading: Mapping[int, Sequence[int]], length: int
) -> list[list[int]]:
    """All combinations of that length, the likeliest first."""
    tokenizer: Any = base.tokenizer
    words = [reading[position] for position in range(1, length - 1)]
    count = math.prod(len(one) for one in words)
    if count > MOST_COMBINATIONS:
        raise ModelError(f"{count} combinations of words; at most {MOST_COMBINATIONS} are tried")
    made = list(product([tokenizer.cls_token_id], *words, [tokenizer.sep_token_id]))
    shares = outside(tests, layer_input(base.model, layer, input_ids=torch.tensor(made))).mean(1)
    return [list(made[index]) for index in shares.argsort().tolist()]


class _ReachedError(Exception):
    """Ends a forward pass where its rest is not wanted."""


def layer_input(model: nn.Module, layer: str, **batch: Tensor) -> Tensor:
    """What goes into a layer, [batch, time, d]; what comes after it is not computed.

    Raises:
        ModelError: if the layer is never reached.
    """

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        raise _ReachedError(arguments[0])

    handle = model.get_submodule(layer).register_forward_pre_hook(stop)
    try:
        with torch.no_grad():
            model(**batch)
    except _ReachedError as reached:
        found: Tensor = reached.args[0]
        return found
    finally:
        handle.remove()
    raise ModelError(f"the model does not run its layer {layer}")


def readers(base: BaseModel, spec: AdapterSpec) -> list[tuple[str, ...]]:
    """The adapted layers in groups that read the same inputs, in the order in which they run."""
    seen: list[tuple[str, Tensor]] = []
    handles = [
        base.model.get_submodule(module.name).register_forward_pre_hook(
            lambda _, arguments, name=module.name: seen.append((name, arguments[0]))
        )
        for module in spec.modules
    ]
    try:
        with torch.no_grad():
            base.model(input_ids=torch.tensor([[1, 2, 3]]))
    finally:
        for handle in handles:
            handle.remove()
    groups: list[tuple[Tensor, list[str]]] = []
    for name, inputs in seen:
        if groups and groups[-1][0].shape == inputs.shape and torch.equal(groups[-1][0], inputs):
            groups[-1][1].append(name)
        else:
            groups.append((inputs, [name]))
    return [tuple(names) for _, names in groups]
