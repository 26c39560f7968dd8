"""``fedpeft strategies``: one row per rule, with what the rule itself says of what it sends."""

from collections.abc import Callable
from typing import Any

from federated.aggregation import RULES, make_rule


def test_every_rule_has_a_row(fedpeft: Callable[..., Any]) -> None:
    out = fedpeft("strategies").out
    rows = {
        cells[1]: cells for line in out.splitlines() if len(cells := [cell.strip() for cell in line.split("│")]) > 8
    }
    assert set(rows) == set(RULES)
    expected = {
        "fedask": "2",
        "fedex": "1",
        "fedit": "1",
        "fedrot": "1",
        "fedsa": "0.5",
        "fedsb": "0.0039",
        "fedsvd": "0.5",
        "ffa": "0.5",
        "rolora": "0.5",
        "flexlora": "1",
        "feddyn": "1",
        "fednova": "1",
        "fedprox": "1",
        "flasc": "0.28",  # a quarter of the values, 4 bits for the position of each
        "lora_a2": "0.13",  # one factor, two of its eight ranks
        "scaffold": "1",
        "flora": "1",
        "hetlora": "1",
        "lora_fair": "1",
        "florist": "1",
        "krum": "1",
    }
    assert {name: rows[name][3] for name in expected} == expected
    down = {"fedask": "2", "flasc": "0.28", "scaffold": "2"}
    assert {name: row[4] for name, row in rows.items()} == dict.fromkeys(rows, "1") | down
    for name, row in rows.items():
        properties = make_rule(name).properties
        assert row[5:8] == [
            "yes" if is_so else "no" for is_so in (properties.fixed_space, properties.mixed_ranks, properties.linear)
        ]
        assert row[8] == properties.gauge
        assert f"{name}: {properties.paper}; in memory: {properties.memory}" in out
        assert row[9] == {"any": "yes", "same_basis": "fresh", "no": "no"}[properties.asynchronous]
    assert {rows[name][9] for name in ("fedit", "ffa")} == {"yes"}
    assert "(adapter=ia3, layernorm, head, full, prompt) go with: feddyn, fedit, fednova, fedprox, scaffold." in out
    assert rows["flexlora"][2] == "truncated"
    assert (rows["fedit"][8], rows["ffa"][8], rows["krum"][8]) == ("exposed", "refused", "immune")
    assert "all clients; n >= 4 f + 3 with f = strategy.options.byzantine = 1" in out
    assert "arXiv:2402.11505" in out
