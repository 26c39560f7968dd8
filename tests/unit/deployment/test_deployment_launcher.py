"""The launcher: no bundle runs that its owner has not pinned, and a forked task leaves its parent as it was."""

import hashlib
import importlib
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.constant import TaskType
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResultStatus
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.nodestate.in_memory_nodestate import InMemoryNodeState

from federated.deployment import launcher, supernode
from federated.deployment.launcher import Launch, PinnedExecutor, fits
from federated.deployment.pinned_app import TaskApp, check_bundle, remove_unpacked
from federated.device_events import PINNED
from federated.errors import DeploymentError

BUNDLE = b"an app's bundle"
DIGEST = hashlib.sha256(BUNDLE).hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def spec(kind: TaskType = TaskType.CLIENT_APP, fab_hash: str | None = DIGEST) -> ExecutionSpec:
    return ExecutionSpec(
        task_type=kind,
        runtime_api_address="127.0.0.1:1",
        token="a token",  # noqa: S106 - of a task that is made up
        insecure=True,
        root_certificates_path=None,
        runtime_dependency_install=False,
        parent_pid=None,
        suppress_output=True,
        task_id=1,
        fab_hash=fab_hash,
    )


def test_a_pinned_bundle_may_run() -> None:
    assert check_bundle(BUNDLE, [OTHER, DIGEST]) == DIGEST


def test_without_a_list_any_may_and_it_is_said() -> None:
    assert check_bundle(BUNDLE, []) == "unpinned"


@pytest.mark.parametrize("content", [b"", BUNDLE + b"\0", BUNDLE[:-1]])
def test_no_other_may_run(content: bytes) -> None:
    with pytest.raises(DeploymentError, match="app_not_pinned") as caught:
        check_bundle(content, [DIGEST])
    assert DIGEST[:12] in str(caught.value)


def test_the_installed_flower_has_what_the_check_hangs_on() -> None:
    fits()


@pytest.mark.parametrize("missing", [("flwr", "no_such_name"), ("flwr.no_such_module", "x")])
def test_without_it_nothing_runs(missing: tuple[str, str]) -> None:
    with pytest.raises(DeploymentError, match="where a bundle is checked before it runs"):
        fits([missing])


class Task:
    """Stands for Flower's task process: unpacks, and ends as Flower does."""

    def __init__(self, folder: Path, content: bytes) -> None:
        self.folder = folder
        self.content = content

    def run(self, **arguments: Any) -> None:
        module: Any = importlib.import_module(launcher._CLIENT)
        try:
            module.install_from_fab(self.content, skip_prompt=True)
            said = f"ran {os.environ[PINNED]} {arguments['token']}"
        except DeploymentError as error:
            said = str(error)
        (self.folder / "said").write_text(said)
        raise SystemExit(0)

    def unpack(self, content: bytes, *_: Any, **__: Any) -> Path:
        (self.folder / "unpacked").write_bytes(content)
        return self.folder


def patched(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    module: Any = importlib.import_module(launcher._CLIENT)
    monkeypatch.setattr(module, "install_from_fab", task.unpack)
    monkeypatch.setattr(module, "run_clientapp", task.run)


def ended(executor: PinnedExecutor) -> None:
    end = time.monotonic() + 60
    while executor._children and time.monotonic() < end:
        executor.reconcile()
        time.sleep(0.01)
    assert not executor._children


def launched(monkeypatch: pytest.MonkeyPatch, task: Task, apps: tuple[str, ...]) -> PinnedExecutor:
    patched(monkeypatch, task)
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(task.folder / "secret"), apps, warm=True))
    assert executor.launch(spec()).status == LaunchResultStatus.ACCEPTED
    ended(executor)
    return executor


def test_a_pinned_app_is_unpacked_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, Task(tmp_path, BUNDLE), (DIGEST,))
    assert (tmp_path / "said").read_text() == f"ran {DIGEST} a token"


def test_another_is_not_even_unpacked_whatever_the_message_claims(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched(monkeypatch, Task(tmp_path, b"malice under a good name"), (DIGEST,))  # the task's own fab_hash is DIGEST
    assert (tmp_path / "said").read_text().startswith("app_not_pinned")
    assert not (tmp_path / "unpacked").exists()


def test_unpinned_runs_anything_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launched(monkeypatch, Task(tmp_path, b"whatever"), ())
    assert (tmp_path / "said").read_text() == "ran unpinned a token"


def test_the_parent_keeps_its_own_unpacking_and_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task(tmp_path, BUNDLE)
    launched(monkeypatch, task, (DIGEST,))
    module: Any = importlib.import_module(launcher._CLIENT)
    assert module.install_from_fab == task.unpack
    assert PINNED not in os.environ


def fab(word: str) -> bytes:
    """A real bundle, whose app says a word in the log when it is loaded."""
    code = f"import os\nfrom flwr.clientapp import ClientApp\nos.environ['WHICH_APP'] = {word!r}\napp = ClientApp()\n"
    project = (
        '[project]\nname = "small"\nversion = "1.0.0"\ndescription = ""\nlicense = "Apache-2.0"\n'
        '[tool.flwr.app]\npublisher = "somebody"\n'
        '[tool.flwr.app.components]\nserverapp = "small_app:app"\nclientapp = "small_app:app"\n'
    )
    files = {"pyproject.toml": project, "small_app.py": code}
    lines = [f"{name},{hashlib.sha256(text.encode()).hexdigest()},8" for name, text in files.items()]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, text in {**files, ".info/CONTENT": "\n".join(lines)}.items():
            archive.writestr(zipfile.ZipInfo(name), text)  # without the time: the same digest in each process
    return packed.getvalue()


class Named(Task):
    """A task as Flower runs it: unpacks a bundle, and loads the app that the server names."""

    def __init__(self, folder: Path, content: bytes, names: tuple[str, str, str]) -> None:
        super().__init__(folder, content)
        self.names = names

    def run(self, **_: Any) -> None:
        module: Any = importlib.import_module(launcher._CLIENT)
        module.install_from_fab(self.content, skip_prompt=True)
        try:
            module.get_load_client_app_fn(default_app_ref="", app_path=None, multi_app=True)(*self.names)
            said = f"{os.environ['WHICH_APP']} as {os.environ[PINNED]}"
        except Exception as error:  # what Flower's own process answers with
            said = type(error).__name__
        (self.folder / "said").write_text(said)
        raise SystemExit(0)


GOOD, OLD = fab("the pinned one"), fab("an old one")
GOOD_DIGEST, OLD_DIGEST = (hashlib.sha256(one).hexdigest() for one in (GOOD, OLD))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("somebody/small", "1.0.0", GOOD_DIGEST), f"the pinned one as {GOOD_DIGEST}"),
        (("somebody/small", "1.0.0", OLD_DIGEST), f"the pinned one as {GOOD_DIGEST}"),
        (("somebody/small", f"1.0.0.{GOOD_DIGEST[:8]}/../somebody.small.1.0.0", OLD_DIGEST), "LoadClientAppError"),
        (("nobody/small", "1.0.0", GOOD_DIGEST), "LoadClientAppError"),
    ],
)
def test_what_was_checked_is_what_is_loaded_whatever_the_server_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], said: str
) -> None:
    module: Any = importlib.import_module(launcher._CLIENT)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    module.install_from_fab(OLD, skip_prompt=True)  # from a time when it was pinned
    task = Named(tmp_path, GOOD, names)
    monkeypatch.setattr(module, "run_clientapp", task.run)
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (GOOD_DIGEST,), warm=True))
    executor.launch(spec())
    ended(executor)
    assert (tmp_path / "said").read_text() == said
    assert not list(tmp_path.glob("app-*"))


def test_a_bundle_that_was_changed_on_the_disk_is_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = importlib.import_module(launcher._CLIENT)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "flwr"))
    installed = module.install_from_fab(GOOD, skip_prompt=True)
    (installed / "small_app.py").write_text("raise SystemExit('changed')\n")
    task = Named(tmp_path, GOOD, ("somebody/small", "1.0.0", GOOD_DIGEST))
    monkeypatch.setattr(module, "run_clientapp", task.run)
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (GOOD_DIGEST,), warm=True))
    executor.launch(spec())
    ended(executor)
    assert (tmp_path / "said").read_text() == f"the pinned one as {GOOD_DIGEST}"


def test_nothing_is_loaded_before_a_bundle_was_checked(tmp_path: Path) -> None:
    with (
        TaskApp(tmp_path, unpack=Path, loader=lambda **_: print, check=print) as app,
        pytest.raises(DeploymentError, match="before a bundle was checked"),
    ):
        app.load_fn()("somebody/small", "1.0.0", GOOD_DIGEST)


def test_what_killed_tasks_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "app-killed" / "clients").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    remove_unpacked(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


class Slow(Task):
    """A task that takes its time, and says when."""

    def run(self, **arguments: Any) -> None:
        module: Any = importlib.import_module(launcher._CLIENT)
        module.install_from_fab(self.content)
        began = time.monotonic()
        time.sleep(0.3)
        (self.folder / f"times-{os.getpid()}").write_text(f"{began} {time.monotonic()}")
        raise SystemExit(0)


class Waiting(Task):
    """A task whose message never comes."""

    def run(self, **_: Any) -> None:
        time.sleep(30)


def test_one_message_is_worked_on_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, Slow(tmp_path, BUNDLE))
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True))
    for _ in range(3):
        executor.launch(spec())
    ended(executor)
    times = sorted(tuple(map(float, path.read_text().split())) for path in tmp_path.glob("times-*"))
    assert len(times) == 3
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(times))


def test_one_whose_message_never_comes_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, Waiting(tmp_path, BUNDLE))
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True))
    executor.launch(spec())
    assert executor.get_eligible_capacity(set(TaskType)) == ({TaskType.CLIENT_APP}, set())
    patched(monkeypatch, Slow(tmp_path, BUNDLE))
    executor.launch(spec())
    end = time.monotonic() + 30
    while len(executor._children) > 1 and time.monotonic() < end:
        executor.reconcile()
        time.sleep(0.01)
    assert len(list(tmp_path.glob("times-*"))) == 1
    executor.close()
    ended(executor)


class Hanging(Slow):
    """A task that begins to work and never ends, deaf to all that can be caught."""

    def run(self, **_: Any) -> None:
        module: Any = importlib.import_module(launcher._CLIENT)
        module.install_from_fab(self.content)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        (self.folder / "hangs").write_text("")
        while True:
            time.sleep(1)


def test_one_that_hangs_has_its_end_and_the_next_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    launch = Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True, longest_seconds=1)
    executor = PinnedExecutor(launch)
    patched(monkeypatch, Hanging(tmp_path, BUNDLE))
    executor.launch(spec())
    end = time.monotonic() + 30
    while not (tmp_path / "hangs").exists() and time.monotonic() < end:
        time.sleep(0.01)
    patched(monkeypatch, Slow(tmp_path, BUNDLE))
    executor.launch(spec())
    ended(executor)
    assert len(list(tmp_path.glob("times-*"))) == 1
    assert "took more than 1 s (training.longest_task)" in caplog.text
    assert not list(tmp_path.glob("app-*"))


@pytest.mark.parametrize(("forks", "what"), [(True, "os.fork"), (False, "subprocess.Popen")])
def test_where_no_process_can_be_had_the_launcher_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, *, forks: bool
) -> None:
    def none(*_: Any, **__: Any) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    module, name = what.split(".")
    monkeypatch.setattr(getattr(launcher, module), name, none)
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True), forks=forks)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    result = executor.launch(spec())
    assert result.status == LaunchResultStatus.FAILED
    assert "temporarily unavailable" in str(result.message)
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_there_is_an_end_to_how_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, Waiting(tmp_path, BUNDLE))
    monkeypatch.setattr(launcher, "_MOST_WAITING", 2)
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True))
    executor.launch(spec())
    executor.launch(spec())
    assert executor.get_eligible_capacity(set(TaskType)) == (set(), set())
    executor.close()
    executor.wait_for_capacity()
    ended(executor)


def test_few_wait_where_each_is_a_new_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeper = tmp_path / "python"
    sleeper.write_text("#!/bin/sh\nexec sleep 600\n")
    sleeper.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(sleeper))
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=True), forks=False)
    for _ in range(3):
        assert executor.get_eligible_capacity(set(TaskType))[0] == {TaskType.CLIENT_APP}
        executor.launch(spec())
    assert executor.get_eligible_capacity(set(TaskType)) == (set(), set())
    executor.close()
    executor.wait_for_capacity()
    ended(executor)


def test_a_device_runs_client_apps_alone() -> None:
    executor = PinnedExecutor(Launch("127.0.0.1:1", "secret", (DIGEST,), warm=True))
    result = executor.launch(spec(TaskType.SERVER_APP))
    assert result.status == LaunchResultStatus.FAILED
    assert "client apps alone" in str(result.message)


class Opener(Task):
    """A task that opens a session, as a client's training does."""

    def run(self, **_: Any) -> None:
        from federated.config import experiment_from
        from federated.flower.session import open_session

        open_session(experiment_from({"task": {"labels": ["no", "yes"]}, "seed": 11}))
        raise SystemExit(0)


def test_what_a_task_opened_is_inherited_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from federated.flower import session

    launched(monkeypatch, Opener(tmp_path, BUNDLE), (DIGEST,))
    before = session._open.cache_info()
    from federated.config import experiment_from

    session.open_session(experiment_from({"task": {"labels": ["no", "yes"]}, "seed": 11}))
    assert session._open.cache_info().hits == before.hits + 1


def test_a_cold_launcher_keeps_nothing_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patched(monkeypatch, Opener(tmp_path, BUNDLE))
    monkeypatch.setattr(launcher, "_warm_up", lambda parts: pytest.fail(f"opened {parts[:40]}"))
    executor = PinnedExecutor(Launch("127.0.0.1:1", str(tmp_path / "secret"), (DIGEST,), warm=False))
    executor.launch(spec())
    ended(executor)


def test_a_session_that_cannot_be_opened_is_said_and_nothing_ends(caplog: pytest.LogCaptureFixture) -> None:
    launcher._warm_up('{"no": "parts"}')
    assert "not kept in memory" in caplog.text


def test_close_in_a_child_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    executor = PinnedExecutor(Launch("127.0.0.1:1", "secret", (), warm=True))
    executor._children[os.getpid()] = -1  # a signal to this would end the test
    monkeypatch.setattr(executor, "_owner", -1)
    executor.close()


class Session:
    """What a SuperNode asks of a SuperLink, and what it was asked."""

    calls: list[Any]

    def ActivateNode(self, request: Any) -> Any:  # noqa: N802 - Flower's name
        self.calls.append(request)
        return type("Answer", (), {"node_id": 7})()

    def DeactivateNode(self, request: Any) -> None:  # noqa: N802 - Flower's name
        self.calls.append(request.node_id)
        if request.node_id == 404:
            raise ConnectionError("refused")


def test_a_killed_supernode_ends_its_session_when_it_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Client(Session):
        calls: list[Any] = []  # noqa: RUF012 - of this test alone

    module = importlib.import_module("flwr.supernode.fleet_http_client")
    monkeypatch.setattr(module, "FleetHttpClient", Client)
    monkeypatch.setattr(supernode, "_AWAY", 0.0)
    supernode.end_left_session(tmp_path / "node.session")
    Client().ActivateNode("first")
    Client().ActivateNode("second")
    (tmp_path / "node.session").write_text("404")
    Client().ActivateNode("third")
    assert Client.calls == ["first", 7, "second", 404, "third"]
    assert (tmp_path / "node.session").read_text() == "7"


def test_flower_has_the_session_that_is_ended() -> None:
    client = importlib.import_module("flwr.supernode.fleet_http_client").FleetHttpClient
    assert callable(client.ActivateNode)
    assert callable(client.DeactivateNode)


def test_a_task_that_is_told_to_end_dies_without_a_word() -> None:
    """Else it says "stopped" and answers nothing, and Flower's SuperNode waits for that answer for ever."""
    given: list[Any] = []

    def register(*names: Any, **more: Any) -> None:
        given.extend([*names, more])
        signal.signal(signal.SIGTERM, lambda *_: None)

    before = {name: signal.getsignal(name) for name in launcher._TOLD_TO_END}
    try:
        launcher._dying_on_signals(register)("enter", exit_handlers=["push"])
        assert {signal.getsignal(name) for name in launcher._TOLD_TO_END} == {signal.SIG_DFL}
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)
    assert given == ["enter", {"exit_handlers": ["push"]}]


def test_flower_registers_its_tasks_handlers_where_they_are_replaced() -> None:
    assert callable(importlib.import_module("flwr.supernode.runtime.run_clientapp").register_signal_handlers)


@pytest.mark.parametrize(("pause", "pauses"), [(0.5, [0.5, 0.5]), (3.0, [3.0, 0.5]), (60.0, [60.0, 0.5])])
def test_a_supernode_that_gave_up_ends(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pause: float, pauses: list[float]
) -> None:
    """Flower's own stays for ever, with nothing but the thread that serves its tasks."""
    ended: list[int] = []
    internal = importlib.import_module("flwr.supernode.start_client_internal")
    monkeypatch.setattr(internal, "time", internal.time)  # it is replaced, and put back after the test
    cli = importlib.import_module("flwr.supernode.cli")
    monkeypatch.setattr(cli, "flower_supernode", lambda: None)
    monkeypatch.setattr(supernode, "end_left_session", lambda _: None)
    monkeypatch.setattr("flwr.supercore.app_utils.start_parent_process_monitor", lambda _: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(sys, "argv", [])
    supernode.supernode(["--insecure"], pause, str(tmp_path / "node.session"))
    assert ended == [1]
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    internal.time.sleep(3)
    internal.time.sleep(0.5)
    assert slept == pauses


def test_a_reply_that_waits_is_sent_where_no_message_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's own state of a node: after a message of a stopped run each reply would wait for the next message."""
    for name, value in {"_run_id": 7, "_node_id": 2, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)
    state = InMemoryNodeState(ObjectStoreFactory().store())
    asked = Message(RecordDict(), 2, "query")
    came: list[int | None] = [None, None, None, 9]
    look = supernode.sending_what_waits(lambda state, **_: came.pop(0))
    state.store_message(stored(asked, "asked"))
    assert look(state=state, object_store=None) is None  # that is no reply
    state.store_message(stored(Message(RecordDict(), reply_to=asked), "answer"))
    assert look(state=state, object_store=None) == 7
    assert [one.metadata.message_id for one in state.get_messages_legacy(is_reply=True)] == ["answer"]
    assert look(state=state, object_store=None) is None
    assert look(state=state, object_store=None) == 9


def stored(message: Message, name: str) -> Message:
    """A message as a node's state keeps it."""
    message.metadata.__dict__["_message_id"] = name
    return message


def test_what_flower_sleeps_between_two_looks_is_what_is_replaced() -> None:
    """With another version it may be another number; then the pace is not the owner's."""
    internal = importlib.import_module("flwr.supernode.start_client_internal")
    source = Path(str(internal.__file__)).read_text()
    assert source.count(f"time.sleep({supernode._IDLE:.0f})") == 1


@pytest.mark.parametrize("name", ["supernode", "launcher", "joining"])
def test_what_runs_beside_each_training_loads_no_torch(name: str) -> None:
    """The warm launcher loads it by itself; a SuperNode that did would take as much memory again."""
    module = "flwr.supernode.cli" if name == "supernode" else "flwr.supercore.superexec.run_superexec"
    code = f"import sys, federated.deployment.{name}, {module}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


ASKED = """
import json, os, sys
from pathlib import Path
from flwr.app import Context, Message, RecordDict
from federated.config import experiment_from
from federated.deployment import launcher

launcher._load(warm=False)
folder = Path(sys.argv[1])
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from clients.app import app
from flwr.supercore.task_identity import TaskIdentity
from federated.flower.records import query_content
TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id = 7, 2, 1
content = query_content(experiment_from({"task": {"labels": ["no", "yes"]}}))
context = Context(1, 2, {"client-config": str(folder / "client.yaml")}, RecordDict(), {})
found = {}
for kind in ("query", "train"):
    reply = app(Message(content, 2, kind), context).content["reply"]
    found[kind] = [reply.get("client_id"), reply.get("reason")]
print(json.dumps({**found, "torch": "torch" in sys.modules}))
"""


@pytest.mark.parametrize(
    ("conditions", "query", "train"),
    [("{}", ["ann", None], None), ("{free_disk_mb: 1.0e+12}", ["ann", "not_now"], ["ann", "not_now"])],
)
def test_a_question_and_not_now_load_no_torch(
    tmp_path: Path, conditions: str, query: list[Any], train: list[Any] | None
) -> None:
    """All devices of a federation are asked at once who they are; a cold launcher's children begin without torch."""
    (tmp_path / "client.yaml").write_text(
        f"client_id: ann\nstore: {tmp_path}\nconditions: {conditions}\n"
        "data: {name: files, path: data}\nmodel: {source: tiny}\n"
    )
    done = subprocess.run([sys.executable, "-c", ASKED, str(tmp_path)], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["query"] == query
    if train is None:  # it was to work
        assert found["torch"]
    else:
        assert found["train"] == train
        assert not found["torch"]


@pytest.mark.parametrize(("found", "forks"), [("1.41.3", True), ("1.42.0", False)])
def test_a_launcher_forks_where_it_knows_flower(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, found: str, *, forks: bool
) -> None:
    module = importlib.import_module("flwr.supercore.superexec.run_superexec")
    monkeypatch.setattr(launcher, "version", lambda _: found)
    monkeypatch.setattr(module, "get_executor", module.get_executor)  # it is replaced, and put back after the test
    monkeypatch.setattr(module, "run_superexec", lambda **_: None)
    monkeypatch.setenv("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", "9")
    (tmp_path / "secret").write_bytes(b"s")
    launcher._serve(Launch("127.0.0.1:1", str(tmp_path / "secret"), (), warm=False, poll_seconds=0.4))
    assert module.get_executor()._forks is forks
    assert os.environ["FLWR_SUPEREXEC_TASK_POLL_INTERVAL"] == "0.4"
    assert ("each message starts Python anew" in caplog.text) is not forks
