"""The HTML report of one run: a single file that needs no network and no other file.

`write_report` reads a run folder (``metrics.jsonl``, and if there ``versions.json`` and ``config.yaml``) and writes
``report.html`` beside them. The page's text comes from a template that escapes everything; its charts are inline
SVG. A partial run gives a partial report.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

from federated.errors import DataError
from federated.formats import byte_size, figure, is_share, metric, moment, number, percent, setting, short_digest, words
from federated.plots import Series, bar_chart, line_chart
from federated.report_privacy import not_protected, privacy_cards, privacy_plots
from federated.run_history import History, history_of, mean_detail, metric_names, result_warning, rule_figures
from federated.tracking import read_events

__all__ = ["write_report"]

_COLORS = {"global": "#1d4ed8", "train": "#94a3b8", "null": "#6b7280", "local_only": "#b45309", "central": "#047857"}
_SPARE = "#7c3aed"
_NAMES = {"null": "null adapter", "local_only": "local only, mean", "central": "central"}


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into the run folder, in place of an older one.

    Args:
        run_dir: a run's folder; only ``metrics.jsonl`` must be in it.

    Returns:
        The report's path.

    Raises:
        DataError: if the metrics are missing, or one of the files cannot be read as what it should be.
    """
    folder = Path(run_dir)
    history = history_of(read_events(folder / "metrics.jsonl"))
    page = _render(history, versions=_versions(folder / "versions.json"), config=_config(folder / "config.yaml"))
    target = folder / "report.html"
    half = target.with_suffix(".html.part")
    half.write_text(page, encoding="utf-8", errors="replace")
    os.replace(half, target)  # noqa: PTH105 - atomic: a reader never sees half a report
    return target


def _render(history: History, *, versions: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("federated"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=number,
        bytes=byte_size,
        moment=moment,
        percent=percent,
        metric=metric,
        figure=figure,
        code=short_digest,
        setting=setting,
    )
    metrics = metric_names(history)
    return environment.get_template("report.html.j2").render(
        history=history,
        metrics=metrics,
        figures=rule_figures(history),
        warning=result_warning(history),
        not_protected=not_protected(history),
        headline=_headline(history, metrics),
        comparison=_comparison(history, metrics),
        plots=[(title, Markup(svg)) for title, svg in _plots(history, metrics)],  # noqa: S704 - pygal escapes labels
        versions=_lineage(versions),
        answers=_answers(history.answers),
        asked=list(dict.fromkeys(str(event.get("version")) for event in history.answers)),
        config=config,
        names=_NAMES,
    )


def _headline(history: History, metrics: Sequence[str]) -> list[tuple[str, str, str]]:
    """Number, its name and a remark, for the row of figures on top."""
    run, final = history.run, history.final_evaluation or {}
    asked = run.get("rounds")
    cards = [
        (_clients(history), "clients", str(run.get("engine") or "")),
        (f"{len(history.rounds)}" + (f" of {asked}" if asked else ""), "rounds", _refusals(history)),
    ]
    if run.get("base_bytes") and run.get("adapter_bytes"):
        remark = f"{byte_size(run['adapter_bytes'])} of {byte_size(run['base_bytes'])}"
        cards.append((percent(run["adapter_bytes"] / run["base_bytes"], 2), "adapter's share of the base", remark))
    for direction, verb in (("up", "sent"), ("down", "received")):
        size = history.bytes_per_client(direction)
        if size is not None:
            cards.append((byte_size(size), f"{verb} per client and round", ""))
    cards.extend(privacy_cards(history))
    when, shown = "final" if history.final else "latest", ["loss", *metrics[:1]]
    cards.extend(
        (
            metric(final[name], name),
            f"{when} held-out {words(name)}",
            _gain(history, name) if name == shown[-1] else "",
        )
        for name in shown
        if final.get(name) is not None
    )
    return cards


def _refusals(history: History) -> str:
    count = sum(1 for event in history.client_events.values() if event.get("status") not in ("ok", "not_now"))
    words = f"{count} update{'s' if count > 1 else ''} refused, failed or late" if count else "no update refused"
    return f"{words}, {len(history.not_now)} times not now" if history.not_now else words


def _gain(history: History, name: str) -> str:
    """How much of the central adapter's gain over the null adapter the federated one reached, on the same examples."""
    if history.final_share < 1.0:
        return "measured by a share of the clients"
    final = (history.final_evaluation or {}).get(name)
    null, central = (mean_detail(history.baselines.get(key, {}), name) for key in ("null", "central"))
    if final is None or null is None:
        return ""
    if central is None or central == null:
        return f"{metric(null, name)} without adapter"
    return f"{(final - null) / (central - null):.0%} of the central adapter's gain"


def _clients(history: History) -> str:
    """How many there are: those that the data are made for, and of real devices those that were heard of."""
    real = history.run.get("engine") == "deployment"
    heard_of = history.joined | {one.client_id for one in history.clients}
    return str(len(heard_of) if real else history.run.get("clients", "?"))


def _comparison(history: History, metrics: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Rows of loss and metrics: the final global adapter, then every baseline; none without anything to compare."""
    if not history.baselines:
        return []
    columns = ["loss", *metrics]
    rows = []
    if history.final_evaluation:
        rows.append(("federated", [metric(history.final_evaluation.get(name), name) for name in columns]))
    for key, event in history.baselines.items():
        rows.append((_NAMES.get(key, key), [metric(mean_detail(event, name), name) for name in columns]))
    return rows


def _plots(history: History, metrics: Sequence[str]) -> list[tuple[str, str]]:
    if not history.rounds:
        return []
    train = _points({number: event.get("train_loss") for number, event in history.rounds.items()})
    lines = [Series("training", train, _COLORS["train"]), _held_out(history, "loss")]
    plots = [("Loss", line_chart(lines, ylabel="loss", levels=_levels(history, "loss")))]
    for name in metrics[:1]:
        svg = line_chart(
            [_held_out(history, name)],
            ylabel=f"held-out {words(name)}",
            levels=_levels(history, name),
            percent=is_share(name),
        )
        plots.append((words(name).capitalize(), svg))
    bars = [
        Series(label, _points({n: _scaled(e.get(f"bytes_{way}")) for n, e in history.rounds.items()}), color)
        for way, label, color in (("up", "sent by clients", _COLORS["global"]), ("down", "received", _COLORS["train"]))
    ]
    return [
        *plots,
        ("Bytes", bar_chart(bars, ylabel="MB per round, all clients")),
        *_kept(history),
        *privacy_plots(history, metrics),
    ]


def _kept(history: History) -> list[tuple[str, str]]:
    """Which share of a round's sum the rule's rank or threshold let pass, if it says so."""
    points = _points({number: (event.get("rule") or {}).get("energy_kept") for number, event in history.rounds.items()})
    if not points:
        return []
    lines = [Series("energy kept", points, _COLORS["global"])]
    return [("Energy kept", line_chart(lines, ylabel="share of the round's energy", percent=True))]


def _held_out(history: History, name: str) -> Series:
    points = _points({number: values.get(name) for number, values in history.held_out.items()})
    return Series("held-out", points, _COLORS["global"])


def _levels(history: History, name: str) -> list[Series]:
    return [
        Series(_NAMES.get(key, key), {0: level}, _COLORS.get(key, _SPARE))
        for key, event in history.baselines.items()
        if (level := mean_detail(event, name)) is not None
    ]


def _points(values: Mapping[int, Any]) -> dict[int, float]:
    return {number: float(value) for number, value in sorted(values.items()) if value is not None}


def _scaled(size: Any) -> float | None:
    return None if size is None else float(size) / 1e6


def _lineage(versions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Versions, newest first: each with its parent's number, if that is the next row, if both have equal weights."""
    known = {str(version.get("version_id")): version for version in versions}
    ordered = sorted(versions, key=lambda item: item.get("number") or 0, reverse=True)
    rows = []
    for version, below in zip_longest(ordered, ordered[1:]):
        parent = known.get(str(version.get("parent")))
        rows.append(
            {
                **dict.fromkeys(_VERSION_KEYS),
                **version,
                "parent_number": parent.get("number") if parent else None,
                "linked": parent is not None and parent is below,
                "unchanged": parent is not None and parent.get("weights_digest") == version.get("weights_digest"),
            }
        )
    return rows


_VERSION_KEYS = ("version_id", "number", "round_number", "parent", "weights_digest", "method", "metrics", "channels",
                 "created_at")  # fmt: skip


def _answers(events: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The device's answers by question and version, in the order of the events."""
    grouped: dict[str, dict[str, Mapping[str, Any]]] = {}
    for event in events:
        grouped.setdefault(str(event.get("text")), {})[str(event.get("version"))] = event
    return grouped


def _versions(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        versions = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON; expected the list of the run's versions") from error
    if not isinstance(versions, list) or not all(isinstance(version, dict) for version in versions):
        raise DataError(f"{path} holds no list of objects; expected the list of the run's versions")
    return versions


def _config(path: Path) -> dict[str, dict[str, Any]]:
    """The resolved configuration as section to dotted key to value; the first section holds the single values."""
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML; expected the run's configuration") from error
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds no mapping; expected the run's configuration")
    top = {str(key): value for key, value in tree.items() if not isinstance(value, dict)}
    rest = {str(key): _flat(value) for key, value in tree.items() if isinstance(value, dict)}
    return {"experiment": top, **rest}


def _flat(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
