"""Federations over real devices: certificates, keys, enrolment, the processes on both sides, and the device's launcher.

Flower transports the messages; what is here decides who may connect, whose code runs, and what goes on after a crash.
Called by `federated.cli`. `docs/adr/0012-deployment-room.md` says why it is a room of its own.
"""

__all__: list[str] = []
