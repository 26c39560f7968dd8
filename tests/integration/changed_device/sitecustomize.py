"""A device whose library was changed: found by Python's start in the launcher of a device that a test starts.

What it does wrong is in the file that ``FEDPEFT_TEST_FAULT`` names, read anew for each message: ``replay`` sends its
first update again, ``old`` speaks another version of the protocol, ``half`` stops in the middle of sending (this one in
the SuperNode), anything else is well.
"""

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if sys.orig_argv[-1:] == ["federated.deployment.launcher"] and "FEDPEFT_TEST_FAULT" in os.environ:
    from federated.flower import client_task as client
    from federated.wire import admission

    control = Path(os.environ["FEDPEFT_TEST_FAULT"])
    first = control.with_name("first.packet")
    train, sign = client._train, admission.sign_envelope

    def trained(*given: Any, **more: Any) -> Any:
        answer = train(*given, **more)
        if not first.exists():
            first.write_bytes(answer.packet)
        elif control.read_text() == "replay":
            return answer._replace(packet=first.read_bytes())
        return answer

    def signed(envelope: Any, key: Any) -> Any:
        old = control.read_text() == "old"
        return sign(replace(envelope, protocol_version=0) if old else envelope, key)

    client._train, admission.sign_envelope = trained, signed

if sys.orig_argv[-1:] == ["federated.deployment.supernode"] and "FEDPEFT_TEST_FAULT" in os.environ:
    from flwr.supernode.fleet_http_client import FleetHttpClient

    told, push = Path(os.environ["FEDPEFT_TEST_FAULT"]), FleetHttpClient.PushObject

    def pushed(self: Any, request: Any) -> Any:
        while told.read_text() == "half":
            time.sleep(0.1)
        return push(self, request)

    FleetHttpClient.PushObject = pushed  # type: ignore[method-assign]
