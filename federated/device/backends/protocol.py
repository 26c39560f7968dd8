"""What a runtime asks of whatever builds and runs models. No torch here.

`Backend` is what every backend does. The protocols after it are what some can do besides: a runtime looks with
``isinstance``, and says so where one is asked for what its backend cannot do. A handle is always the backend's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from federated.config import TrainConfig
from federated.device.records import Embedding, Prompt, Sampling, Stream
from federated.manifest import AdapterSpec, RawTensor, VersionManifest

__all__ = ["Backend", "Embeds", "Generates", "Learned", "Learns", "Lesson", "Merges", "Mixes", "Reads"]

Row = Mapping[str, Any]


class Backend(Protocol):
    """Builds and runs models over one base model.

    A handle is never changed after it is built, and different threads may run any handles at once, the same one
    included.
    """

    @property
    def base_digest(self) -> str:
        """Fingerprint of the base model."""
        ...

    def null(self) -> Any:
        """The handle of the base alone."""
        ...

    def check(self, manifest: VersionManifest) -> None:
        """Refuse a version that this backend cannot answer for, before anything is decoded.

        Raises:
            DeviceError: for another task than this backend's.
        """
        ...

    def build(self, spec: AdapterSpec, tensors: Mapping[str, RawTensor]) -> Any:
        """A new handle: the base with this adapter.

        Args:
            spec: the adapter's algebra.
            tensors: canonical name to tensor, all of the adapter's.

        Raises:
            FederatedError: if the tensors do not fit the spec, or the spec does not fit the base.
        """
        ...

    def nbytes(self, handle: Any) -> int:
        """Memory that a handle costs besides the base and what all handles share; 0 for the null one."""
        ...

    def predict(self, handle: Any, rows: Sequence[Row]) -> Sequence[Any]:
        """Answers in the order of the rows."""
        ...


@runtime_checkable
class Mixes(Protocol):
    """Answers rows of several handles in one batch."""

    def predict_mixed(self, pairs: Sequence[tuple[Any, Row]]) -> Sequence[Any]:
        """Each row's answer by its own handle, in order; handles that cannot share a batch get one of their own."""
        ...


@runtime_checkable
class Generates(Protocol):
    """Continues texts and chats."""

    def generate(self, handle: Any, prompt: Prompt, sampling: Sampling) -> Stream:
        """Begin an answer; what can be refused is refused here, before the first token.

        The stream's keys and values are its own, and made by this handle alone.

        Raises:
            DeviceError: if the base is no language model, or the prompt is malformed, empty or too long.
        """
        ...


@runtime_checkable
class Embeds(Protocol):
    """Turns texts into vectors."""

    def embed(self, handle: Any, texts: Sequence[str]) -> Sequence[Embedding]:
        """The mean of each text's features, of length 1, in order.

        Raises:
            DeviceError: if the base or the handle's kind of adapter has none.
        """
        ...


@runtime_checkable
class Merges(Protocol):
    """Adds an adapter into weights of its own, for speed."""

    def merge(self, handle: Any) -> Any:
        """A new handle whose adapted layers are ``W + scaling * B @ A``, in copies: the base's stay as they are.

        Raises:
            DeviceError: if the adapter has no factors, or the base is quantised.
        """
        ...


@runtime_checkable
class Reads(Protocol):
    """Gives an adapter back."""

    def read(self, handle: Any) -> tuple[AdapterSpec, Mapping[str, RawTensor]]:
        """The spec and tensors that a handle was built from, bit for bit.

        Raises:
            DeviceError: for a handle that no adapter was built into, such as the null one.
        """
        ...


@dataclass(frozen=True)
class Lesson:
    """What to train a personal adapter on.

    Args:
        rows: the task's rows with their labels.
        config: optimizer, steps, precision.
        seed: of the first factors, the data order and dropout.

    Privacy: holds the user's own examples; they stay in the process.
    """

    rows: Sequence[Row]
    config: TrainConfig
    seed: int = 0


@dataclass(frozen=True)
class Learned:
    """A trained personal adapter: float32 tensors by canonical name, and what training measured.

    Factors are the personal adapter's own; other tensors (a head's) are what is added to the global one's.
    """

    tensors: Mapping[str, RawTensor]
    metrics: Mapping[str, float]


@runtime_checkable
class Learns(Protocol):
    """Trains on the device."""

    def learn(self, handle: Any, spec: AdapterSpec, tensors: Mapping[str, RawTensor], lesson: Lesson) -> Learned:
        """Train a personal adapter over a frozen global one.

        Args:
            handle: of the global adapter, which is not changed.
            spec: the personal adapter's algebra.
            tensors: where it stands; empty: it starts as nothing.
            lesson: the examples and how to train.

        Raises:
            FederatedError: if the spec does not fit the handle, or training fails.
        """
        ...

    def measure(self, handle: Any, rows: Sequence[Row]) -> Mapping[str, float]:
        """Mean loss and the task's metrics of a handle on labelled rows."""
        ...
