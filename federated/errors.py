"""The error tree: everything that this library raises on purpose.

    FederatedError
    ├── ConfigError              a key, value or combination that cannot run
    ├── DataError                a file, column, label or client that is missing, empty or malformed
    ├── ModelError               a base model or adapter that cannot be loaded or attached
    │   └── BaseMismatch         made for another base model
    ├── UpdateRejected           one client's update that is refused (carries a reason code)
    ├── WireError                bytes that are not a payload of this protocol
    ├── AggregationError         updates that cannot be combined
    │   └── NotEnoughUpdates     fewer good updates than the round's quorum
    ├── RegistryError            the store of versions
    │   ├── VersionNotFound
    │   ├── CorruptBlob          stored bytes do not match their digest
    │   ├── ChannelConflict      somebody else moved the channel first
    │   ├── NotApproved          too few people approved what a channel should move to
    │   └── StorageFull
    ├── PrivacyError             an account, a ledger or a protection that cannot be what it says
    │   └── BudgetExhausted      what was asked would spend more than may be spent
    ├── ReleaseError             keys, publishing and checking signed releases
    │   ├── SigningKeyError      a private key that is missing, or does not open
    │   ├── WrongClock           a clock that is behind what was signed
    │   ├── Unreachable          the source of releases does not answer
    │   │   └── MissingFile      it answers, and has no such file
    │   └── UntrustedRelease     what a source offers is refused
    │       ├── WrongSignature   too few valid signatures of the role's keys
    │       ├── WrongContent     bytes that are not what was signed, or contradict it
    │       ├── ExpiredMetadata
    │       │   └── FreezeAttack what a publisher renews all the time is out of date
    │       ├── RollbackAttack   older than what was seen before
    │       ├── MixAndMatch      genuine parts that do not belong together
    │       ├── EndlessData      more bytes than were signed or are allowed
    │       ├── NotReleased      nobody who may signed such a version
    │       └── BelowSecurityFloor
    ├── DeviceError              slots, activation, serving
    │   ├── NotVerified          the device's agent has not verified what a client is to train from
    │   ├── UnknownAdapter       a name that leads nowhere
    │   ├── ProbeFailed          an installed adapter does not answer as it must, or has no effect
    │   └── NoRuntime            the base model cannot be opened; no version is to blame
    ├── DeploymentError          certificates, keys, enrolment and processes of a deployment
    │   ├── DoorUnreachable      the deployment's door does not answer
    │   └── EnrolmentRefused     the door, or the operator, does not let this device in
    ├── NotNow                   a condition of the device's owner does not hold at the moment
    └── RunInterrupted           the user stopped a run (finished rounds are safe)

A message says what was found, what was expected and what to do. It never contains private data.
"""

from __future__ import annotations

__all__ = [
    "FederatedError",
    "ConfigError",
    "DataError",
    "ModelError",
    "BaseMismatch",
    "UpdateRejected",
    "WireError",
    "AggregationError",
    "NotEnoughUpdates",
    "RegistryError",
    "VersionNotFound",
    "CorruptBlob",
    "ChannelConflict",
    "NotApproved",
    "StorageFull",
    "PrivacyError",
    "BudgetExhausted",
    "ReleaseError",
    "SigningKeyError",
    "WrongClock",
    "Unreachable",
    "MissingFile",
    "UntrustedRelease",
    "WrongSignature",
    "WrongContent",
    "ExpiredMetadata",
    "FreezeAttack",
    "RollbackAttack",
    "MixAndMatch",
    "EndlessData",
    "NotReleased",
    "BelowSecurityFloor",
    "DeploymentError",
    "DeviceError",
    "NotVerified",
    "UnknownAdapter",
    "ProbeFailed",
    "NoRuntime",
    "DoorUnreachable",
    "EnrolmentRefused",
    "NotNow",
    "RunInterrupted",
]


class FederatedError(Exception):
    """Root of every error that this library raises on purpose."""


class ConfigError(FederatedError):
    """A configuration key, value or combination that cannot run."""


class DataError(FederatedError):
    """A file, column, label or client that is missing, empty or malformed."""


class ModelError(FederatedError):
    """A base model or an adapter that cannot be loaded or attached."""


class BaseMismatch(ModelError):
    """An update, version or registry that belongs to another base model."""


class WireError(FederatedError):
    """Bytes that are not a payload of this protocol."""


class UpdateRejected(FederatedError):
    """One client's update that is refused.

    Attributes:
        reason: a short stable code (``"not_finite"``, ``"base_mismatch"`` ...), see `federated.wire.REASONS`.
        client_id: who sent it, where known.
    """

    def __init__(self, reason: str, message: str, *, client_id: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.client_id = client_id

    def __str__(self) -> str:
        return f"{self.reason}: {super().__str__()}"


class AggregationError(FederatedError):
    """Updates that cannot be combined."""


class NotEnoughUpdates(AggregationError):
    """Fewer good updates than the round's quorum."""


class RegistryError(FederatedError):
    """The store of versions cannot do what was asked; nothing stored was changed."""


class VersionNotFound(RegistryError):
    """No version (or more than one) matches the name that was given."""


class CorruptBlob(RegistryError):
    """Stored bytes do not match their digest."""


class ChannelConflict(RegistryError):
    """A channel moved between reading and writing it."""


class NotApproved(RegistryError):
    """A channel that requires approvals, and a version that has too few of them."""


class StorageFull(RegistryError):
    """The disk under the registry is full."""


class PrivacyError(FederatedError):
    """An account, a ledger or a protection that cannot be what it says; nothing private was computed."""


class BudgetExhausted(PrivacyError):
    """What was asked would spend more than may be spent; what was made so far stays."""


class ReleaseError(FederatedError):
    """A release cannot be signed, published, fetched or checked."""


class SigningKeyError(ReleaseError):
    """A private key that is missing, does not open, or is not the one that it should be."""


class WrongClock(ReleaseError):
    """The clock is behind what was signed already: expiry means nothing by such a clock."""


class Unreachable(ReleaseError):
    """The source of releases does not answer; what was verified before stays."""


class MissingFile(Unreachable):
    """The source answers, and has no such file."""


class UntrustedRelease(ReleaseError):
    """What a source offers is refused; nothing of it was installed."""


class WrongSignature(UntrustedRelease):
    """Fewer valid signatures than the role's threshold."""


class WrongContent(UntrustedRelease):
    """Bytes that are not what was signed, or signed statements that contradict each other."""


class ExpiredMetadata(UntrustedRelease):
    """Signed metadata that are out of date."""


class FreezeAttack(ExpiredMetadata):
    """Out of date is what a publisher renews all the time: somebody holds the news back, or the publisher stopped."""


class RollbackAttack(UntrustedRelease):
    """Metadata that are older than what this device has seen."""


class MixAndMatch(UntrustedRelease):
    """Genuine metadata that do not belong together."""


class EndlessData(UntrustedRelease):
    """More bytes than were signed, or than are allowed."""


class NotReleased(UntrustedRelease):
    """Nobody who may sign for this channel signed such a version."""


class BelowSecurityFloor(UntrustedRelease):
    """A version that was revoked: its release counter is below the signed security floor."""


class DeviceError(FederatedError):
    """A slot, activation or request that the device refuses."""


class NotVerified(DeviceError):
    """The device's agent has not verified the version that a client is asked to train from."""


class UnknownAdapter(DeviceError):
    """No adapter of that name is on this device; no other one answers in its place."""


class ProbeFailed(DeviceError):
    """An adapter that was loaded does not answer as its publisher measured, or answers as the base alone does."""


class NoRuntime(DeviceError):
    """The base model cannot be opened on this device; no version is to blame for that."""


class DeploymentError(FederatedError):
    """Certificates, keys, enrolled devices or processes of a deployment are not what they should be."""


class DoorUnreachable(DeploymentError):
    """The door of a deployment does not answer, or what answers cannot be it; worth trying again."""


class EnrolmentRefused(DeploymentError):
    """The door, or the operator, does not let this device in; trying again with the same invitation is no use."""


class NotNow(FederatedError):
    """A condition of the device's owner does not hold at the moment: no failure, and worth asking again.

    Attributes:
        condition: its name in the client's file.
        seconds: until it is worth asking again.
    """

    def __init__(self, condition: str, *, seconds: float) -> None:
        super().__init__(f"its owner's condition {condition!r} does not hold")
        self.condition = condition
        self.seconds = seconds


class RunInterrupted(FederatedError):
    """The user stopped a run; rounds that had finished are published."""
