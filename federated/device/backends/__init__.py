"""What builds and runs models for a runtime: the protocol, torch, and onnxruntime."""

from __future__ import annotations

from federated.device.backends.protocol import Backend

__all__ = ["Backend"]
