"""The status page: how a deployment stands, for people, programs and Prometheus, on loopback alone.

    GET /             one HTML page that needs no other file and no network; it renews itself
    GET /api/status   the same as JSON (`federated.deployment.overview_records`)
    GET /metrics      the same for Prometheus (`federated.deployment.status_metrics`)

It shows and changes nothing, and asks nobody for a password: whoever has an account on the machine may look. A web
page elsewhere may not: requests under another host name than the machine's own are refused (a name that somebody else
points at this machine), and no other site is let read an answer. Called by `federated.deployment.operating`.
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import uvicorn
from fastapi import FastAPI, Response
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from federated.deployment.overview import Gatherer
from federated.deployment.overview_records import Overview
from federated.deployment.status_metrics import CONTENT_TYPE, metrics_text
from federated.formats import byte_size, metric, moment, number, short_digest, words

__all__ = ["HOSTS", "StatusServer", "render", "status_app"]

HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names under which the page answers, with any port: a tunnel's end is another one."""

_MOST_ROWS, _MOST_RUNS = 200, 8
_FRESH = 1.0  # seconds for which an overview is good
_HEADERS = (
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)
_STRANGER = Response("this page answers as localhost alone\n", 403, media_type="text/plain")
_POLICY = (
    "default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_TONES = {
    "good": ("RUNNING", "running", "completed", "approved", "up"),
    "bad": ("FATAL", "EXITED", "BACKOFF", "failed", "gave up", "revoked", "down"),
    "warn": ("STARTING", "STOPPING", "STOPPED", "pending", "waiting", "stopped", "interrupted"),
}


def status_app(look: Callable[[], Overview], *, clock: Callable[[], float] = time.monotonic) -> ASGIApp:
    """The application behind the page.

    Args:
        look: gathers an overview; called at most once a second, however many ask.
        clock: seconds, from anywhere.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    latest = _Latest(look, clock)

    @app.get("/")
    def page() -> Response:
        nonce = secrets.token_urlsafe(16)
        policy = {"content-security-policy": _POLICY.format(nonce=nonce)}
        return Response(render(latest(), nonce=nonce), media_type="text/html", headers=policy)

    @app.get("/api/status")
    def status() -> Response:
        return JSONResponse(latest().to_dict())

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(metrics_text(latest()), media_type=CONTENT_TYPE)

    return _own_names(app)


class _Latest:
    """The newest overview; a second old at most."""

    def __init__(self, look: Callable[[], Overview], clock: Callable[[], float]) -> None:
        self._look, self._clock = look, clock
        self._found: Overview | None = None
        self._at = 0.0
        self._turn = threading.Lock()

    def __call__(self) -> Overview:
        with self._turn:
            if self._found is None or self._clock() - self._at >= _FRESH:
                self._found, self._at = self._look(), self._clock()
            return self._found


def _own_names(app: ASGIApp) -> ASGIApp:
    """Refuse a request under a name that is not this machine's own: a browser was led here. Adds `_HEADERS`."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        answer = app if scope["type"] != "http" or _name_of(scope) in HOSTS else _STRANGER
        await answer(scope, receive, sent)

    return guarded


def _name_of(scope: Scope) -> str:
    """The ``Host`` header without its port."""
    host: str = dict(scope["headers"]).get(b"host", b"").decode("latin-1").lower()
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def render(view: Overview, *, nonce: str) -> str:
    """The page as HTML; everything that comes from outside is escaped, and control characters are made visible.

    Args:
        view: what it shows.
        nonce: that the page's own style and script carry.
    """
    environment = Environment(loader=PackageLoader("federated"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(
        shown=_shown,
        tone=_tone,
        ago=_ago,
        span=_span,
        counts=_counts,
        total=_total,
        lines=_lines,
        bytes=byte_size,
        code=short_digest,
        metric=metric,
        moment=moment,
        number=number,
        words=words,
    )
    page: str = environment.get_template("status.html.j2").render(
        view=view,
        nonce=nonce,
        cards=_cards(view),
        most=_MOST_ROWS,
        most_runs=_MOST_RUNS,
        more_runs=view.runs_left_out + max(0, len(view.runs) - _MOST_RUNS),
        more_devices=view.devices_left_out + max(0, len(view.devices) - _MOST_ROWS),
    )
    return page


def _cards(view: Overview) -> list[tuple[str, str, str]]:
    """Number, its name and a remark, for the row of figures on top."""
    states = view.devices_by_state
    waiting = f"{states['pending']} wait for approval" if states.get("pending") else ""
    running = sum(1 for run in view.runs if run.state == "running")
    seen = sum(1 for one in view.devices if one.last_seen is not None and view.at - one.last_seen < 30)
    refused = sum(sum(run.refusals.values()) for run in view.runs)
    newest = view.versions[0].name if view.versions else ""
    return [
        (str(sum(states.values())), "devices", waiting or f"{seen} seen in the last 30 s"),
        (str(running), "runs under way", f"{len(view.runs) + view.runs_left_out} in all"),
        (newest.rpartition(":")[2] or "-", "newest version", newest.rpartition(":")[0]),
        (str(refused), "updates refused", f"and {view.refused_at_door} requests at the door"),
        (byte_size(view.bytes_up), "from devices", "through the door"),
        (byte_size(view.bytes_down), "to devices", "through the door"),
    ]


def _shown(value: object) -> str:
    """Text with its control characters made visible; those that turn the direction of writing are among them."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(value))


def _tone(state: str) -> str:
    return next((tone for tone, states in _TONES.items() if state in states), "soft")


def _span(seconds: float) -> str:
    """Seconds as the largest unit that fits."""
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _ago(then: float | None, now: float) -> str:
    return "never" if then is None else f"{_span(max(0.0, now - then))} ago"


def _counts(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} \N{MULTIPLICATION SIGN} {_shown(name)}" for name, count in found.items()) or "-"


def _total(found: Mapping[str, Mapping[str, int]]) -> int:
    return sum(sum(counts.values()) for counts in found.values())


def _lines(history: Sequence[tuple[int, float | None, float | None]]) -> Markup:
    """Train and held-out loss over the rounds, as two lines on one scale."""
    known = [value for _, *losses in history for value in losses if value is not None]
    if not known:
        return Markup()
    low, high = min(known), max(known)
    first, last = history[0][0], history[-1][0]

    def path(values: Iterable[tuple[int, float | None]]) -> str:
        points = [
            f"{100 * (number - first) / max(1, last - first):.2f},{55 - 50 * (value - low) / (high - low or 1):.2f}"
            for number, value in values
            if value is not None
        ]
        return "M" + " L".join(points) if points else "M0,0"

    said = f"losses from {high:.3g} to {low:.3g}"
    return Markup(
        '<svg class="line" viewBox="0 0 100 60" preserveAspectRatio="none" role="img" aria-label="{}">'
        '<path d="{}"/><path class="held" d="{}"/></svg>'
    ).format(said, path((one[0], one[1]) for one in history), path((one[0], one[2]) for one in history))


class StatusServer:
    """Serves the page in a thread of its own.

    Args:
        gatherer: looks; it is let go of at the end.
        port: of loopback.

    Raises:
        OSError: if the port is taken.
    """

    def __init__(self, gatherer: Gatherer, port: int) -> None:
        self._gatherer = gatherer
        self._bound = socket.socket()
        self._bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._bound.bind(("127.0.0.1", port))
            self._bound.listen()  # whoever comes before the thread serves waits
        except OSError:
            self._bound.close()
            raise
        config = uvicorn.Config(
            status_app(gatherer.overview),
            ws="none",
            access_log=False,
            log_config=None,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=32,
            h11_max_incomplete_event_size=16_384,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._bound]}, daemon=True)

    @property
    def port(self) -> int:
        """Where it listens."""
        found: int = self._bound.getsockname()[1]
        return found

    def __enter__(self) -> StatusServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10.0)
        self._gatherer.close()
