"""What keeps a promise about privacy: clipping, noise, sampling and their accounts.

Beside `federated.wire`, `federated.adapters` and `federated.tasks`, and knows none of them: modules and tensors come in
as arguments, and so do chance and the clock. `federated.training` and `federated.flower` call it.
"""

from __future__ import annotations

__all__: list[str] = []
