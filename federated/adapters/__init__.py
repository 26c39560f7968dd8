"""Base model and adapter: load, freeze, fingerprint; attach, read and write.

The only room that imports peft (`federated.adapters.lora`, `federated.adapters.ia3`) and transformers' models. It knows
no files of updates, no network and no server.
"""

from federated.adapters.base import BaseKind, BaseModel, base_from_module, load_base
from federated.adapters.lora import Branch
from federated.adapters.model import AdapterModel, attach, null_model, share, shell
from federated.adapters.peft_folder import read_peft
from federated.adapters.prefix import inner_model
from federated.adapters.prompt import most_positions
from federated.adapters.spec import check_spec, spec_for

__all__ = [
    "AdapterModel",
    "BaseKind",
    "BaseModel",
    "Branch",
    "attach",
    "base_from_module",
    "check_spec",
    "inner_model",
    "load_base",
    "most_positions",
    "null_model",
    "read_peft",
    "share",
    "shell",
    "spec_for",
]
