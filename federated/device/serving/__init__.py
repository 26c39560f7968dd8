"""An HTTP server over an `AdapterRuntime`: OpenAI's endpoints, and an admin listener beside them.

The backend is handed in inside the runtime: nothing here imports torch or a database. Needs the extra ``serve``.
"""

from importlib.util import find_spec

from federated.errors import DeviceError

if any(find_spec(name) is None for name in ("fastapi", "uvicorn", "prometheus_client")):
    raise DeviceError("serving needs the serve extra; run: pip install 'federated-peft[serve]'")

from federated.device.serving.control import Control
from federated.device.serving.credentials import Tokens, read_tokens
from federated.device.serving.directory import Directory
from federated.device.serving.limits import Limits
from federated.device.serving.server import Listener, admin_listener, public_listener, serve
from federated.device.serving.service import Service
from federated.device.serving.sources import Offer, RegistrySource, Source

__all__ = [
    "Control",
    "Directory",
    "Limits",
    "Listener",
    "Offer",
    "RegistrySource",
    "Service",
    "Source",
    "Tokens",
    "admin_listener",
    "public_listener",
    "read_tokens",
    "serve",
]
