"""Runnable stories: whole federations on one machine, benchmarks, reproductions. Copy from here; nobody imports it."""
