"""Stands in for Flower's command: the same arguments, output and exit codes, and a list of nodes in a file.

Seen with flwr 1.41: other words before the JSON of ``list``, exit code 0 after a failure, a key that is taken once.
"""

import json
import os
import sys
from pathlib import Path

HOME = Path(os.environ["FLWR_HOME"])


def answer(**record: object) -> None:
    print(json.dumps(record, indent=2))
    sys.exit(0)


def fail(message: str) -> None:
    answer(**{"success": False, "error-message": f"Using SuperLink: deployment\n{message}"})


def main() -> None:
    with (HOME / "calls.jsonl").open("a") as calls:
        told = {name: value for name, value in os.environ.items() if name.startswith(("FLWR_", "NO_PROXY"))}
        calls.write(json.dumps({"arguments": sys.argv[1:], "environment": told}) + "\n")
    store = HOME / "nodes.json"
    if not store.exists():
        fail("Connection to the SuperLink is unavailable. Please check your network connection.")
    nodes = json.loads(store.read_text())
    verb = sys.argv[2]
    if verb == "list":
        print("Listing all nodes...")
        answer(success=True, nodes=[{"node-id": one["id"], "status": one["status"]} for one in nodes])
    if verb == "register":
        key = Path(sys.argv[3]).read_text().strip()
        if any(one["key"] == key for one in nodes):
            fail("[code: 23] Public key already in use.")
        made = {"id": str(1000 + len(nodes)), "key": key, "status": "registered"}
        store.write_text(json.dumps([*nodes, made]))
        if (HOME / "lose-the-answer").exists():
            sys.exit("killed")
        answer(**{"success": True, "node-id": int(made["id"])})
    if verb == "unregister":
        for one in nodes:
            if one["id"] == sys.argv[3] and one["status"] != "unregistered":
                one["status"] = "unregistered"
                store.write_text(json.dumps(nodes))
                answer(**{"success": True, "node-id": int(one["id"])})
        fail("[code: 24] Node ID not found for account.")


main()
