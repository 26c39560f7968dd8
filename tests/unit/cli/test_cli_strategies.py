"""``fedpeft strategies``: one row per rule, with what the rule itself says of what it sends."""

from collections.abc import Callable
from typing import Any

from federated.aggregation import RULES, make_rule


def test_every_rule_has_a_row(fedpeft: Callable[..., Any]) -> None:
    out = fedpeft("strategies").out
    rows = {cells[0]: ["", *cells] for line in out.splitlines() if (cells := line.split()) and cells[0] in RULES}
    assert set(rows) == set(RULES)
    assert max(map(len, out.split("B A:")[0].splitlines())) <= 80
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
        assert row[5:9] == [
            "yes" if properties.fixed_space else "no",
            "yes" if properties.mixed_ranks else "no",
            "yes" if properties.robust else "no",
            "yes" if properties.linear else "no",
        ]
        assert row[9] == properties.gauge
        assert f"{name}: {properties.paper}; in memory: {properties.memory}" in out
        assert row[10] == {"any": "yes", "same_basis": "fresh", "no": "no"}[properties.asynchronous]
    assert {rows[name][10] for name in ("fedit", "ffa")} == {"yes"}
    kinds = "ia3, layernorm, head, full, prompt, prefix"
    assert f"(adapter={kinds}) go with: feddyn, fedit, fednova, fedprox, scaffold." in out
    assert rows["flexlora"][2] == "best"
    assert (rows["fedit"][9], rows["ffa"][9], rows["krum"][9]) == ("exposed", "refused", "immune")
    assert "all clients; n >= 4 f + 3 with f = strategy.options.byzantine = 1" in out
    assert "arXiv:2402.11505" in out
    assert "add up in one space: fedit, fedprox, fedrot, fedsa, fedsb, ffa." in out
