"""A ledger is written ahead, never less than what may have been computed, and says what is wrong with it by name."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from itertools import count

import pytest

from federated.errors import PrivacyError
from federated.privacy import ledger as module
from federated.privacy.accounting import GaussianSteps, epsilon
from federated.privacy.ledger import ChargeKey, Ledger
from federated.privacy.ledger_records import read_chain, sealed

EVENT = GaussianSteps(1.0, 0.16, 50)
DATA = "d" * 64
DELTA = 1e-5


def key(round_number=1, **more):
    return ChargeKey(**{"run_id": "run-a", "round_number": round_number, "phase": 1, "plan_digest": "p" * 64, **more})


def opened(path, **more):
    return Ledger.open(path, **{"subject": "clinic", "data_digest": DATA, **more})


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledgers" / "clinic.ledger"


@pytest.fixture
def three(path):
    """A ledger of three charges, closed."""
    with opened(path) as ledger:
        for number in (1, 2, 3):
            ledger.charge(EVENT, key=key(number))
    return path


def test_charges_are_there_again_in_a_new_process(three):
    code = (
        "import sys\nfrom pathlib import Path\nfrom federated.privacy.ledger import Ledger\n"
        f"with Ledger.open(Path(sys.argv[1]), subject='clinic', data_digest={DATA!r}, create=False) as ledger:\n"
        "    print(len(ledger.events), ledger.head)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(three)], capture_output=True, text=True, check=True)
    with opened(three, create=False) as ledger:
        assert done.stdout.split() == ["3", ledger.head]
        assert ledger.events == (EVENT,) * 3
        assert [charge.key for charge in ledger.charges] == [key(1), key(2), key(3)]
        assert ledger.notice == ""


def test_the_head_moves_with_each_charge_and_no_two_histories_share_one(path, tmp_path):
    with opened(path) as one, opened(tmp_path / "other") as two:
        heads = [one.head, one.charge(EVENT, key=key()), one.charge(EVENT, key=key())]
        heads += [two.head, two.charge(EVENT, key=key()), two.charge(EVENT, key=key())]
        assert len(set(heads)) == 6
        assert one.head == heads[2]


def test_computing_again_is_a_further_charge(path):
    with opened(path) as ledger:
        assert not ledger.has(key())
        ledger.charge(EVENT, key=key())
        once = ledger.spent(DELTA)
        ledger.charge(EVENT, key=key())
        assert ledger.has(key())
        assert not ledger.has(key(2))
        assert not ledger.has(key(plan_digest="q"))
        assert ledger.spent(DELTA) == epsilon([EVENT, EVENT], DELTA) > once == epsilon([EVENT], DELTA)


def test_would_exceed_is_asked_before(path):
    within = {"target_delta": DELTA, "accountant": "rdp"}
    one, two = epsilon([EVENT], DELTA), epsilon([EVENT, EVENT], DELTA)
    with opened(path) as ledger:
        assert not ledger.would_exceed(EVENT, target_epsilon=one, **within)
        assert ledger.would_exceed(EVENT, target_epsilon=one * 0.999, **within)
        ledger.charge(EVENT, key=key())
        assert ledger.would_exceed(EVENT, target_epsilon=two * 0.999, **within)
        assert not ledger.would_exceed(GaussianSteps(0.0, 0.5, 0), target_epsilon=one, **within)
        assert ledger.would_exceed(GaussianSteps(0.0, 0.5, 1), target_epsilon=1e6, **within)


# ---- clocks, nonces, keys --------------------------------------------------------------------------------------------


def test_a_clock_that_goes_back_changes_nothing(path):
    times = iter([2e9, 1e9, -5.0, 0.0])
    with opened(path, clock=lambda: next(times), nonce=map(str, count()).__next__) as ledger:
        for number in (1, 2, 3):
            ledger.charge(EVENT, key=key(number))
        spent, head = ledger.spent(DELTA), ledger.head
    noted = [json.loads(line)["noted_at"] for line in path.read_bytes().splitlines()]
    assert noted == [2e9, 1e9, -5.0, 0.0]
    with opened(path, clock=lambda: -1.0) as ledger:
        assert (ledger.spent(DELTA), ledger.head, len(ledger.events)) == (spent, head, 3)


@pytest.mark.parametrize("wrong", [{"round_number": 0}, {"phase": True}, {"round_number": 1.0}, {"run_id": 3}])
def test_key_out_of_range(wrong):
    with pytest.raises(PrivacyError, match="the key of a charge"):
        key(**wrong)


# ---- refused by name -------------------------------------------------------------------------------------------------


def refused(path, said, **more):
    before = path.read_bytes() if path.is_file() else None
    with pytest.raises(PrivacyError, match=said):
        opened(path, **more)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_missing_where_one_is_expected(path):
    refused(path, "is missing, and one is expected: what was spent on this data is not known", create=False)
    assert not path.parent.exists()


def test_taken_away_while_it_is_opened(three, monkeypatch):
    locked = module._locked

    def taken(path, *, create):
        lock = locked(path, create=create)
        path.unlink()
        return lock

    monkeypatch.setattr(module, "_locked", taken)
    with pytest.raises(PrivacyError, match="is missing"):
        opened(three, create=False)


def test_another_subject_and_another_data_set(three):
    refused(three, "another subject's", subject="hospital")
    refused(three, r"of another data set \(digest dddddddddddd, expected eeeeeeeeeeee\)", data_digest="e" * 64)


def lines_of(path):
    return path.read_bytes().splitlines(keepends=True)


DAMAGE = {
    "an empty file": (lambda lines: [], r"line 1: the ledger's first record is not there"),
    "no first record": (lambda lines: lines[1:], "line 1: expected a record of"),
    "one taken out": (lambda lines: [*lines[:2], *lines[3:]], "line 3: it does not follow the record before it"),
    "two exchanged": (lambda lines: [lines[0], lines[2], lines[1], lines[3]], "line 2: it does not follow"),
    "one twice": (lambda lines: [*lines, lines[-1]], "line 5: it does not follow"),
    "a number edited": (
        lambda lines: [*lines[:2], lines[2].replace(b'"steps":50', b'"steps":5'), lines[3]],
        "line 3: its digest is not that of what it says",
    ),
    "spaces put in": (lambda lines: [*lines[:3], lines[3].replace(b":", b": ", 1)], "line 4: its digest is not"),
    "a key twice": (lambda lines: [*lines[:3], lines[3].replace(b"{", b'{"number":1,', 1)], "line 4: its digest"),
    "a byte flipped": (lambda lines: [*lines[:3], lines[3].replace(b"run", b"r\xff\x00")], "line 4: expected a record"),
    "a line cut in the middle": (lambda lines: [*lines[:2], lines[2][:50] + b"\n", lines[3]], "line 3: expected"),
    "another file": (lambda lines: [b"epsilon,delta\n"], "line 1: expected a record of"),
    "another file without an end": (lambda lines: [*lines, b"epsilon"], "line 5: not a record, nor the beginning"),
    "a whole record, edited, without an end": (
        lambda lines: [*lines[:3], lines[3].replace(b'"steps":50', b'"steps":5').rstrip()],
        "line 4: its digest is not",
    ),
    "only the beginning of the first": (lambda lines: [lines[0][:40]], "line 1: not a record, nor the beginning"),
    "nested without end": (lambda lines: [*lines, b"[" * 100_000 + b"\n"], "line 5: expected a record"),
    "an empty line": (lambda lines: [*lines[:2], b"\n", *lines[2:]], "line 3: expected a record"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_named_with_its_line(three, how):
    change, said = DAMAGE[how]
    three.write_bytes(b"".join(change(lines_of(three))))
    refused(three, f"the privacy ledger is damaged at {said}")


FORGED = {
    "another format": ({"format": "2"}, "line 1: expected the format"),
    "noise below zero": ({"event": {**EVENT.to_dict(), "noise_multiplier": -1.0}}, "line 4: noise_multiplier = -1.0"),
    "an event of another kind": ({"event": {"kind": "laplace"}}, "line 4: not an event of kind gaussian_steps"),
    "a key of another shape": ({"key": {"run_id": "a"}}, "line 4: not the key of a charge"),
    "a key that is a list": ({"key": []}, "line 4: not the key of a charge"),
    "another number": ({"number": 7}, "line 4: it does not follow"),
    "another previous": ({"previous": "0" * 64}, "line 4: it does not follow"),
}


@pytest.mark.parametrize("how", FORGED)
def test_sealed_but_wrong(three, how):
    """Whoever edits the file and mends the digest of what was edited."""
    change, said = FORGED[how]
    lines = lines_of(three)
    at = 0 if "format" in change else 3
    record = {**json.loads(lines[at]), **change}
    del record["digest"]
    lines[at] = sealed(record)[1]
    three.write_bytes(b"".join(lines))
    refused(three, f"damaged at {said}")


def test_what_json_takes_and_a_record_does_not(three):
    text = three.read_text()
    three.write_text(re.sub(r'"noted_at":[\d.]+', '"noted_at":NaN', text))
    refused(three, "line 1: it holds what no record can")


# ---- crashes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [1, 5, 11, 60, -2])
@pytest.mark.parametrize("zeros", [0, 30])
def test_a_torn_end_is_cut_off(three, kept, zeros):
    lines = lines_of(three)
    whole = b"".join(lines[:3])
    three.write_bytes(whole + lines[3][:kept] + b"\0" * zeros)
    with opened(three) as ledger:
        assert len(ledger.events) == 2
        assert ledger.notice.startswith("a charge that was only half written")
        assert three.read_bytes() == whole
        ledger.charge(EVENT, key=key(9))
    with opened(three) as ledger:
        assert [charge.key.round_number for charge in ledger.charges] == [1, 2, 9]
        assert ledger.notice == ""


def test_bytes_that_never_reached_the_disk_are_cut_off(three):
    whole = three.read_bytes()
    three.write_bytes(whole + b"\0" * 300)
    with opened(three) as ledger:
        assert len(ledger.events) == 3
    assert three.read_bytes() == whole


def test_a_whole_record_without_its_end_counts(three):
    whole = three.read_bytes()
    three.write_bytes(whole[:-1])
    with opened(three) as ledger:
        assert len(ledger.events) == 3
        assert "it is whole, and counts" in ledger.notice
    assert three.read_bytes() == whole


def test_every_cut_leaves_what_was_granted(three):
    """Wherever a crash cuts the file: the charges that had returned are there, and at most one more."""
    data = three.read_bytes()
    ends = [at + 1 for at, byte in enumerate(data) if byte == ord("\n")]
    for size in range(ends[0], len(data) + 1):
        chain = read_chain(data[:size], subject="clinic", data_digest=DATA)
        granted = sum(end <= size for end in ends[1:])
        assert len(chain.charges) == granted + (size + 1 in ends[1:])


KILL = """
import os, signal, sys
from pathlib import Path
from federated.privacy import ledger as module
from federated.privacy.accounting import GaussianSteps
from federated.privacy.ledger import ChargeKey, Ledger

path, when, part = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
event, key = GaussianSteps(1.0, 0.16, 50), ChargeKey("run-a", 4, 1, "p" * 64)
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
write = os.write
ledger = Ledger.open(path, subject="clinic", data_digest="d" * 64)
if when == "before the write":
    module.os.write = die
if when == "within the write":
    module.os.write = lambda file, line: (write(file, line[:part]), die())
if when == "before the file is on disk":
    module.os.fsync = die
if when == "before the folder is":
    module._sync_folder = die
ledger.charge(event, key=key)
print("granted", flush=True)
die()
"""


@pytest.mark.parametrize(
    ("when", "part", "charges"),
    [
        ("before the write", 0, 3),
        ("within the write", 1, 3),
        ("within the write", 200, 3),
        ("before the file is on disk", 0, 4),
        ("before the folder is", 0, 4),
        ("after it was granted", 0, 4),
    ],
)
def test_killed_at(three, when, part, charges):
    command = [sys.executable, "-c", KILL, str(three), when, str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == ("granted\n" if when == "after it was granted" else "")
    with opened(three, create=False) as ledger:  # the lock of a killed process is gone
        assert len(ledger.events) == charges
        assert ledger.has(key(4)) == (charges == 4)


def test_killed_while_it_is_made(path):
    code = KILL.replace("ledger = Ledger", "module.os.fsync = die\nledger = Ledger")
    done = subprocess.run([sys.executable, "-c", code, str(path), "", "0"], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not path.exists()
    with opened(path) as ledger:
        assert ledger.events == ()


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_a_charge_that_cannot_be_written_grants_nothing(three, monkeypatch, call):
    before = three.read_bytes()

    def fails(*_):
        raise OSError(errno.EIO, "Input/output error")

    with opened(three) as ledger:
        with monkeypatch.context() as patch:
            patch.setattr(module.os, call, fails)
            with pytest.raises(PrivacyError, match="Input/output error; nothing was granted"):
                ledger.charge(EVENT, key=key(4))
        assert len(ledger.events) == 3
        assert three.read_bytes() == before
        with pytest.raises(PrivacyError, match="is not open in this process"):
            ledger.charge(EVENT, key=key(4))
    with opened(three) as ledger:
        ledger.charge(EVENT, key=key(4))


def test_a_folder_that_cannot_be_made_or_read(path, tmp_path):
    (tmp_path / "ledgers").write_text("a file")
    with pytest.raises(PrivacyError, match="cannot be read or written"):
        opened(path)


def test_a_ledger_that_is_a_folder(path):
    path.mkdir(parents=True)
    with pytest.raises(PrivacyError, match="cannot be read or written: Is a directory"):
        opened(path)
    path.rmdir()
    opened(path).close()


# ---- two at once -----------------------------------------------------------------------------------------------------


def test_two_processes_never_charge_at_once(three):
    code = (
        "from pathlib import Path\nfrom federated.privacy.ledger import Ledger\n"
        f"Ledger.open(Path({str(three)!r}), subject='clinic', data_digest={DATA!r})"
    )
    with opened(three):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "is in use by another process; two that charge it at once" in done.stderr
        refused(three, "is in use")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_failed_opening_leaves_no_lock(three):
    refused(three, "another subject's", subject="hospital")
    opened(three).close()


def test_a_fork_charges_nothing_and_lets_nobody_in(three):
    with opened(three) as ledger:
        child = os.fork()
        if child == 0:  # pragma: no cover - in the child
            try:
                ledger.charge(EVENT, key=key(4))
            except PrivacyError as error:
                ledger.close()
                os._exit(7 if "is not open in this process" in str(error) else 8)
            os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        refused(three, "is in use")
        ledger.charge(EVENT, key=key(4))
        ledger.close()
        ledger.close()
        with pytest.raises(PrivacyError, match="is not open"):
            ledger.charge(EVENT, key=key(5))


def test_closing_in_a_fork_leaves_the_lock_to_its_parent(three):
    with opened(three) as ledger:
        shared = os.dup(ledger._lock)
        ledger._owner = -1  # as in a forked child
    refused(three, "is in use")
    os.close(shared)
    opened(three).close()


# ---- restored copies -------------------------------------------------------------------------------------------------


def test_a_restored_copy_does_not_descend_from_what_was_acknowledged(three):
    backup = three.read_bytes()
    with opened(three) as ledger:
        old = ledger.head
        acknowledged = ledger.charge(EVENT, key=key(4))
        ledger.charge(EVENT, key=key(5))
        for head in (None, old, acknowledged, ledger.head):
            ledger.require_descends_from(head)
    three.write_bytes(backup)
    with opened(three) as ledger:
        ledger.require_descends_from(old)
        with pytest.raises(PrivacyError, match=f"head {acknowledged[:12]} that was last acknowledged: an older copy"):
            ledger.require_descends_from(acknowledged)
        ledger.charge(EVENT, key=key(4))  # the very same charge once more gives no head that was there before
        with pytest.raises(PrivacyError, match="an older copy"):
            ledger.require_descends_from(acknowledged)


def test_a_new_ledger_does_not_descend_either(three):
    with opened(three) as ledger:
        acknowledged, opening = ledger.head, ledger._opening
        ledger.require_descends_from(opening)
    three.unlink()
    with opened(three) as ledger, pytest.raises(PrivacyError, match="or another one was made"):
        ledger.require_descends_from(acknowledged)
