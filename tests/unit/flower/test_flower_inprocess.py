"""The in-process Grid: sequential and forked workers, death and replacement, order, state, nothing left behind."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from federated.errors import ConfigError
from federated.flower import InProcessGrid
from federated.flower.inprocess import default_workers

Make = Callable[..., Any]
both = pytest.mark.parametrize("workers", [1, 2], ids=["sequential", "forked"])


def app_of(answer: Callable[[Message, Context], Any]) -> ClientApp:
    app = ClientApp()
    app.train()(answer)
    return app


def echo(message: Message, context: Context) -> Message:
    """Answers with the text it was sent, its node and how often it was called."""
    count = int(context.state["count"]["n"]) + 1 if "count" in context.state else 1  # type: ignore[call-overload,index]
    context.state["count"] = ConfigRecord({"n": count})
    record = {"text": message.content["in"]["text"], "partition": context.node_config["partition-id"], "count": count}
    record |= {"pid": os.getpid(), "of": context.node_config["num-partitions"]}
    return Message(RecordDict({"out": ConfigRecord(record)}), reply_to=message)


def letters(*nodes: int, text: str = "hello") -> list[Message]:
    return [Message(RecordDict({"in": ConfigRecord({"text": text})}), node, "train") for node in nodes]


def out(reply: Message) -> dict[str, Any]:
    return dict(reply.content["out"])


def ask(grid: InProcessGrid, *nodes: int, text: str = "hello", timeout: float = 60.0) -> list[Message]:
    return list(grid.send_and_receive(letters(*nodes, text=text), timeout=timeout))


def children() -> set[int]:
    return {process.pid for process in multiprocessing.active_children() if process.pid is not None}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not Path(f"/proc/{pid}/stat").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


@pytest.fixture(autouse=True)
def _nothing_left() -> Any:
    """No test here may leave a process or a thread behind."""
    processes, threads = children(), set(threading.enumerate())
    yield
    assert children() == processes
    assert {thread for thread in threading.enumerate() if thread.is_alive()} <= threads


class TestAnswers:
    @both
    def test_each_node_answers_its_own_message(self, workers: int):
        with InProcessGrid(app_of(echo), 5, workers=workers) as grid:
            replies = ask(grid, 1, 3, 5)
        found = {reply.metadata.src_node_id: out(reply) for reply in replies}
        assert {node: (value["partition"], value["of"], value["text"]) for node, value in found.items()} == {
            node: (node - 1, 5, "hello") for node in (1, 3, 5)
        }

    @both
    def test_two_ways_of_working_give_the_same(self, federation: Make, workers: int):
        made, plain = federation(rounds=2), federation(rounds=2)
        made.run(clients=5, grid={"workers": workers})
        plain.run(clients=5)
        assert made.strategy.version_id == plain.strategy.version_id
        assert made.tensors == plain.tensors

    def test_sequential_stays_in_this_process(self):
        with InProcessGrid(app_of(echo), 3) as grid:
            assert {out(reply)["pid"] for reply in ask(grid, 1, 2, 3)} == {os.getpid()}

    def test_forked_workers_are_at_work_at_the_same_time(self, tmp_path: Path):
        def meets(message: Message, context: Context) -> Message:
            (tmp_path / str(os.getpid())).touch()
            end = time.monotonic() + 30
            while len(list(tmp_path.iterdir())) < 2 and time.monotonic() < end:
                time.sleep(0.01)
            return echo(message, context)

        with InProcessGrid(app_of(meets), 2, workers=2) as grid:
            pids = {out(reply)["pid"] for reply in ask(grid, 1, 2)}
        assert len(pids) == 2
        assert os.getpid() not in pids

    @both
    def test_a_node_s_state_is_its_own_and_stays(self, workers: int):
        with InProcessGrid(app_of(echo), 3, workers=workers) as grid:
            for _ in range(3):
                ask(grid, 1, 2)
            counts = {reply.metadata.src_node_id: out(reply)["count"] for reply in ask(grid, 1, 2, 3)}
        assert counts == {1: 4, 2: 4, 3: 1}

    @both
    def test_replies_say_what_they_answer_and_each_has_its_own_id(self, workers: int):
        with InProcessGrid(app_of(echo), 3, workers=workers) as grid:
            sent = list(grid.push_messages(letters(1, 2, 3)))
            replies = collect(grid, sent)
        assert {reply.metadata.reply_to_message_id for reply in replies} == set(sent)
        assert len({reply.metadata.message_id for reply in replies}) == 3

    @both
    def test_only_the_replies_that_are_asked_for_are_handed_out(self, workers: int):
        with InProcessGrid(app_of(echo), 2, workers=workers) as grid:
            first, second = grid.push_messages(letters(1, 2))
            assert len(collect(grid, [second])) == 1
            assert len(collect(grid, [first])) == 1
            assert list(grid.pull_messages([first, second, "unknown"])) == []

    @both
    def test_a_hundred_nodes(self, workers: int):
        with InProcessGrid(app_of(echo), 100, workers=workers) as grid:
            assert list(grid.get_node_ids()) == list(range(1, 101))
            replies = ask(grid, *range(1, 101))
        assert sorted(out(reply)["partition"] for reply in replies) == list(range(100))

    @both
    def test_a_timeout_ends_the_wait(self, workers: int):
        def stuck(message: Message, context: Context) -> Message:
            time.sleep(0.2 if workers == 1 else 60)
            return echo(message, context)

        began = time.monotonic()
        with InProcessGrid(app_of(stuck), 3, workers=workers) as grid:
            assert len(ask(grid, 1, 2, 3, timeout=0.1)) < 3
        assert time.monotonic() - began < 20

    def test_flower_s_older_calls(self):
        with InProcessGrid(app_of(echo), 1) as grid:
            grid.set_run(1)
            with pytest.raises(NotImplementedError, match="no registered run"):
                _ = grid.run
            made = grid.create_message(RecordDict({"in": ConfigRecord({"text": "old"})}), "train", 1, "7")
            assert made.metadata.group_id == "7"
            assert [out(reply)["text"] for reply in grid.send_and_receive([made])] == ["old"]


def collect(grid: InProcessGrid, ids: list[str], seconds: float = 60.0) -> list[Message]:
    end, found = time.monotonic() + seconds, []
    while len(found) < len(ids) and time.monotonic() < end:
        found += grid.pull_messages(ids)
    return found


class TestOrder:
    def orders(self, shuffle: int | None, workers: int = 1) -> list[list[int]]:
        with InProcessGrid(app_of(echo), 8, workers=workers, shuffle=shuffle) as grid:
            return [[reply.metadata.src_node_id for reply in ask(grid, *range(1, 9))] for _ in range(3)]

    def test_natural_order_is_the_order_of_sending(self):
        assert self.orders(None) == [list(range(1, 9))] * 3

    @both
    def test_a_shuffled_order_depends_on_its_seed_alone(self, workers: int):
        assert self.orders(7, workers) == self.orders(7)

    def test_each_batch_and_each_seed_has_an_order_of_its_own(self):
        found = self.orders(7) + self.orders(8)
        assert len({tuple(order) for order in found}) == 6
        assert all(sorted(order) == list(range(1, 9)) for order in found)


class TestTrouble:
    @both
    @pytest.mark.parametrize("error", [ValueError("boom"), SystemExit(1), MemoryError(), RecursionError()], ids=repr)
    def test_an_exception_is_an_error_reply_and_the_next_message_is_answered(self, workers: int, error: Any):
        def raises(message: Message, context: Context) -> Message:
            if message.content["in"]["text"] == "bad":
                raise error
            return echo(message, context)

        with InProcessGrid(app_of(raises), 2, workers=workers) as grid:
            (bad,) = ask(grid, 1, text="bad")
            (good,) = ask(grid, 1)
        assert bad.has_error()
        assert out(good)["text"] == "hello"

    @both
    @pytest.mark.parametrize(
        "answer", [None, "text", RecordDict(), "itself"], ids=["None", "text", "content", "itself"]
    )
    def test_an_answer_that_is_no_reply_is_an_error_reply(self, workers: int, answer: Any):
        def nonsense(message: Message, context: Context) -> Any:
            if message.content["in"]["text"] == "bad":
                return message if answer == "itself" else answer
            return echo(message, context)

        with InProcessGrid(app_of(nonsense), 2, workers=workers) as grid:
            replies = ask(grid, 1, 2, text="bad", timeout=20)
            good = ask(grid, 1, 2, timeout=20)
        assert len(replies) == len(good) == 2
        assert all("no reply to its message" in reply.error.reason for reply in replies)

    def test_a_worker_that_dies_is_an_error_reply_and_is_replaced(self):
        def dies(message: Message, context: Context) -> Message:
            if message.content["in"]["text"] == "bad":
                os._exit(3)
            return echo(message, context)

        with InProcessGrid(app_of(dies), 4, workers=2) as grid:
            before = children()
            for _ in range(3):
                bad = ask(grid, 1, 2, 3, text="bad")
                assert [reply.error.reason for reply in bad] == ["the worker process ended with exit code 3"] * 3
            assert sorted(out(reply)["partition"] for reply in ask(grid, 1, 2, 3, 4)) == [0, 1, 2, 3]
            assert len(children()) == 2
            assert not children() & before

    def test_a_worker_killed_from_outside_loses_its_message_only(self):
        def slow(message: Message, context: Context) -> Message:
            if message.content["in"]["text"] == "bad":
                time.sleep(60)
            return echo(message, context)

        with InProcessGrid(app_of(slow), 2, workers=2) as grid:
            ids = list(grid.push_messages([*letters(1, text="bad"), *letters(2)]))
            (good,) = collect(grid, ids[1:])
            for pid in children() - {out(good)["pid"]}:
                os.kill(pid, signal.SIGKILL)
            (bad,) = collect(grid, ids[:1])
        assert bad.error.reason == "the worker process ended with exit code -9"

    def test_a_state_that_was_lost_with_a_worker_is_the_one_before(self):
        def dies(message: Message, context: Context) -> Message:
            reply = echo(message, context)
            if message.content["in"]["text"] == "bad":
                os._exit(1)
            return reply

        with InProcessGrid(app_of(dies), 1, workers=2) as grid:
            ask(grid, 1)
            ask(grid, 1, text="bad")
            assert [out(reply)["count"] for reply in ask(grid, 1)] == [2]

    def test_a_reply_that_cannot_leave_the_worker_is_an_error_reply(self):
        def unpicklable(message: Message, context: Context) -> Message:
            reply = echo(message, context)
            if message.content["in"]["text"] == "bad":
                reply.content.__dict__["lock"] = threading.Lock()
            return reply

        with InProcessGrid(app_of(unpicklable), 1, workers=2) as grid:
            (bad,) = ask(grid, 1, text="bad")
            assert bad.has_error()
            assert [out(reply)["text"] for reply in ask(grid, 1)] == ["hello"]

    def test_a_system_that_cannot_fork_says_so(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
        with pytest.raises(ConfigError, match=r"engine\.workers = 2: this system cannot fork"):
            InProcessGrid(app_of(echo), 2, workers=2)
        InProcessGrid(app_of(echo), 2).close()


class TestAbandoning:
    @both
    def test_messages_that_nobody_waits_for_are_not_answered(self, workers: int, tmp_path: Path):
        def notes(message: Message, context: Context) -> Message:
            time.sleep(0.05)
            (tmp_path / message.content["in"]["text"]).write_text("")
            return echo(message, context)

        with InProcessGrid(app_of(notes), 1, workers=workers) as grid:
            ids = [next(iter(grid.push_messages(letters(1, text=str(number))))) for number in range(30)]
            grid.abandon(ids[:-1])
            assert len(collect(grid, ids[-1:])) == 1
        assert len(list(tmp_path.iterdir())) <= 1 + workers

    @both
    def test_answers_that_come_too_late_are_not_kept(self, workers: int):
        with InProcessGrid(app_of(echo), 3, workers=workers) as grid:
            ids = list(grid.push_messages(letters(1, 2, 3)))
            assert len(collect(grid, ids[2:])) == 1
            grid.abandon(ids)
            assert grid._mail.replies == {}
            assert list(grid.pull_messages(ids)) == []
            assert len(ask(grid, 1)) == 1

    def test_a_slow_round_does_not_delay_the_next_one(self, federation: Make, honest: Make):
        """Sequential: what round 1 did not get to in time is not worked on in round 2."""
        made = federation(rounds=2, round={"deadline": 0.4, "quorum": 0.1})
        worked: list[tuple[int, int]] = []

        def slow(message: Message, task: Any) -> Message:
            worked.append((len(made.events("round_start")), task.round_number))
            time.sleep(0.15 if task.round_number == 1 else 0.0)
            return honest(message, task)

        made.run(clients=8, script={f"client-{number:03d}": slow for number in range(8)})
        assert "late" in {event["status"] for event in made.events("client") if event["round_number"] == 1}
        assert {now for now, _ in worked} == {1, 2}
        assert [task for now, task in worked if now != task] == []


class TestClosing:
    @both
    def test_closing_twice_is_closing_once(self, workers: int):
        grid = InProcessGrid(app_of(echo), 2, workers=workers)
        ask(grid, 1)
        grid.close()
        grid.close()

    def test_closing_ends_workers_whatever_they_do(self):
        def stuck(message: Message, context: Context) -> Message:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(600)
            return echo(message, context)

        began = time.monotonic()
        with InProcessGrid(app_of(stuck), 2, workers=2) as grid:
            grid.push_messages(letters(1, 2))
            time.sleep(0.1)
        assert time.monotonic() - began < 10

    def test_an_error_inside_the_block_ends_the_workers_too(self):
        with pytest.raises(ZeroDivisionError), InProcessGrid(app_of(echo), 2, workers=2):
            _ = 1 / 0
        assert children() == set()

    def test_workers_do_not_outlive_a_parent_that_is_killed(self, tmp_path: Path):
        """kill -9 leaves the parent no moment to clean up: idle and busy workers must notice by themselves."""
        script = textwrap.dedent("""
            import multiprocessing, pathlib, sys, time
            from flwr.app import ConfigRecord, Message, RecordDict
            from flwr.clientapp import ClientApp
            from federated.flower.inprocess import InProcessGrid
            app = ClientApp()
            @app.train()
            def train(message, context):
                time.sleep(1.0)
                return Message(RecordDict({"out": ConfigRecord({"big": b"x" * 5_000_000})}), reply_to=message)
            grid = InProcessGrid(app, 3, workers=3)
            grid.push_messages([Message(RecordDict(), node, "train") for node in (1, 2)])
            time.sleep(0.2)
            print(*[process.pid for process in multiprocessing.active_children()], flush=True)
            time.sleep(600)
        """)
        command, quiet = [sys.executable, "-c", script], subprocess.DEVNULL
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=quiet, text=True) as parent:
            assert parent.stdout is not None
            pids = [int(pid) for pid in parent.stdout.readline().split()]
            parent.kill()
        assert len(pids) == 3
        end = time.monotonic() + 20
        while any(alive(pid) for pid in pids) and time.monotonic() < end:
            time.sleep(0.1)
        left = [pid for pid in pids if alive(pid)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert left == []


def test_memory_of_the_parent_does_not_grow_with_the_number_of_nodes() -> None:
    """Each reply holds a megabyte; the cohort is answered and dropped one by one."""

    def large(message: Message, context: Context) -> Message:
        return Message(RecordDict({"out": ConfigRecord({"big": bytes(1_000_000)})}), reply_to=message)

    def peak(nodes: int) -> int:
        with InProcessGrid(app_of(large), nodes) as grid:
            waiting = set(grid.push_messages(letters(*range(1, nodes + 1))))
            gc.collect()
            tracemalloc.start()
            while waiting:
                for reply in grid.pull_messages(waiting):
                    waiting.discard(reply.metadata.reply_to_message_id)
                    del reply
            found = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return found

    assert peak(40) < peak(4) + 2_000_000


def test_one_worker_per_core(monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_workers() >= 1
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert default_workers() == 1
