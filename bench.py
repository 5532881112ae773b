"""What an isolated call costs, beside what you would use instead. Measured here and now: nothing is estimated.

    python3 bench.py               at most a minute on two cores; takes some 3 GiB of memory
    python3 bench.py --quick       ten seconds, without the largest results and parents
    python3 bench.py --json FILE   writes every sample as well, for machines
    python3 bench.py --markdown    prints its tables for a README

The processes that make the calls are fresh interpreters, asked over a pipe for one round at a time. So rows that are
compared take turns, none runs in a process that another has changed, and a call that hangs can be killed and counted.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import ctypes
import functools
import importlib.util
import json
import mmap
import os
import pickle
import platform
import resource
import select
import signal
import subprocess
import sys
import threading
import time
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mem_isolate
from mem_isolate import execute_in_isolated_process, use_huge_pages

HAS_NUMPY = importlib.util.find_spec("numpy") is not None
KIB, MIB, GIB = 1024, 1024**2, 1024**3

#: A round repeats a row's call for about this long; a slower call is made once.
ROUND_SECONDS = 0.015
#: A round that has not ended by then hangs: where threads may bring that about, and where nothing should. So many
#: rounds of a row may hang before it is given up.
HUNG_WITH_THREADS, HUNG, HANGS_BORNE = 3.0, 30.0, 3
#: How long all of it takes, but for starting Python and what a first round takes too long.
FULL_SECONDS, QUICK_SECONDS = 56.0, 8.5


# ---- Words for quantities.


def duration(seconds):
    if seconds < 0:
        return f"-{duration(-seconds)}"
    for unit, length in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= length:
            return f"{three_digits(seconds / length)} {unit}"
    return f"{three_digits(seconds * 1e9)} ns"


def three_digits(number):
    return f"{number:.{max(0, 2 - len(str(int(number))) + 1)}f}"


def size_text(size):
    for unit, length in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size >= length:
            return f"{size / length:.4g} {unit}"
    return f"{size} bytes"


# ---- What is compared. Each has `answer` run in another process and returns what it returned, or, to show what the
# ---- process alone costs, has a child do nothing.

PAYLOAD: Any = 42

# `fork` keeps the GIL, or another thread could take it where the child does not exist; `waitpid` lets other threads run.
libc_fork = ctypes.PyDLL(None).fork
libc_exit = ctypes.PyDLL(None)._exit
libc_waitpid = ctypes.CDLL(None).waitpid


def answer():
    """The function to isolate: it returns an object that the calling process has already."""
    return PAYLOAD


def labelled(label):
    """Give a contender the name that its rows show, where that is not the function's own."""

    def set_label(function):
        function.label = label
        return function

    return set_label


def direct_function_call():
    return answer()


def fork_alone():
    if libc_fork() == 0:
        libc_exit(0)


def fork_with_wait():
    pid = libc_fork()
    if pid == 0:
        libc_exit(0)
    libc_waitpid(pid, None, 0)


@labelled("fork + shared mmap + pickle, bare")
def bare_call():
    """The least that brings a result back: nothing is flushed, no signal, death, limit or exception is provided for."""
    region = mmap.mmap(-1, 64 * KIB)
    pid = libc_fork()
    if pid == 0:
        result = pickle.dumps(answer(), protocol=5)
        region[: len(result)] = result
        libc_exit(0)
    libc_waitpid(pid, None, 0)
    result = pickle.loads(region)
    region.close()
    return result


@labelled("execute_in_isolated_process")
def isolated_call():
    return execute_in_isolated_process(answer)


@labelled("os.fork + os.waitpid")
def os_fork_with_wait():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


@labelled("os.fork + pipe + pickle by hand")
def pipe_by_hand():
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with open(writer, "wb") as stream:
                pickle.dump(answer(), stream, protocol=5)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        result = pickle.load(stream)
    os.waitpid(pid, 0)
    return result


@labelled("multiprocessing.Process + Pipe")
def multiprocessing_pipe():
    import multiprocessing

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(answer()))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    receiver.close()
    return result


@labelled("fresh ProcessPoolExecutor")
def fresh_executor():
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("fork")) as executor:
        return executor.submit(answer).result()


#: These import more than mem_isolate does, at-fork hooks among it: in a process of their own, nobody else pays for that.
HEAVY = (multiprocessing_pipe, fresh_executor)
FROM_ANOTHER_PROCESS = (isolated_call, pipe_by_hand, *HEAVY)


# ---- The process that makes the calls: a fresh interpreter in a given state.


def bytes_of(size):
    return b"x" * size


def ndarray_of(size):
    import numpy

    return numpy.full(size // 8, 1.5)


#: In a list of different ints, each takes 8 bytes for the reference and 28 for itself.
BYTES_PER_INT = 36


def ints_of(size):
    return list(range(size // BYTES_PER_INT))


PAYLOADS: dict[str, Callable[[int], Any]] = {
    "int": lambda size: 42,
    "bytes": bytes_of,
    "ndarray": ndarray_of,
    "list of ints": ints_of,
}


@dataclass(frozen=True)
class State:
    """What the calling process is like. Rows of one state share a process; every other state has one of its own."""

    payload: str = "int"
    size: int = 0
    touched_mib: int = 0
    huge_pages: bool = False
    calling_threads: int = 1
    busy_threads: int = 0
    #: The contender that has this process for itself.
    reserved_for: str = ""

    @property
    def has_threads(self):
        return self.busy_threads > 0 or self.calling_threads > 1

    def start(self):
        return Caller(self)


def serve(description):
    """Be the calling process of that description: say what preparing it did, then measure one round per line read."""
    global PAYLOAD
    state = State(**json.loads(description))
    PAYLOAD = PAYLOADS[state.payload](state.size)
    touched = bytearray(b"x") * (state.touched_mib * MIB)
    start = time.perf_counter()
    collapsed = use_huge_pages() if state.huge_pages else 0
    reply(collapsed=collapsed, seconds=time.perf_counter() - start, touched=len(touched))
    for line in sys.stdin:
        contender, calls = json.loads(line)
        try:
            reply(**measure(globals()[contender], calls, state))
        except Exception as error:  # noqa: BLE001 (whatever it is, its row shows it)
            reply(failure=f"{type(error).__name__}: {error}")


def reply(**message):
    print(json.dumps(message), flush=True)


def measure(call, calls, state):
    """Time the calls, and count the page faults of their children. 0 calls mean one whose result is checked."""
    results = []
    statement = call if calls else lambda: results.append(call())
    threads = state.calling_threads
    per_thread = max(1, calls // threads)
    with busy_threads(state.busy_threads):
        faults = child_page_faults()
        if threads == 1:
            seconds = timeit.timeit(statement, number=per_thread)
        else:
            seconds = timeit.timeit(lambda: call_from_threads(statement, per_thread, threads), number=1)
        reap_children()
        faults = child_page_faults() - faults
    if not all(result is None or is_payload(result) for result in results):
        raise ValueError("the result is not what the function returned")
    return {"seconds": seconds / (per_thread * threads), "child_faults": faults / (per_thread * threads)}


def call_from_threads(call, per_thread, threads):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: [call() for _ in range(per_thread)], range(threads)))


@contextlib.contextmanager
def busy_threads(count):
    """Keep threads of pure Python at work, contending for the GIL, for as long as the block runs."""
    going, at_work = [True], threading.Barrier(count + 1)

    def burn():
        at_work.wait()
        while going:
            pass

    threads = [threading.Thread(target=burn) for _ in range(count)]
    for thread in threads:
        thread.start()
    at_work.wait()
    try:
        yield
    finally:
        going.clear()
        for thread in threads:
            thread.join()


def child_page_faults():
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt


def reap_children():
    """Wait for the children that `fork_alone` leaves: only then do their page faults count."""
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def is_payload(result):
    equal = result == PAYLOAD
    return equal if isinstance(equal, bool) else bool(equal.all())


# ---- The runner's end of it.


class CallHung(Exception):
    """The call did not return in time; its process was killed and replaced."""


class CallFailed(Exception):
    """The call raised, or returned something wrong."""


class CallerDied(CallFailed):
    """The call took its process down, which was replaced."""


def fresh_interpreter(code):
    """The command that runs this code where it can import this file and the module."""
    # Python 3.12 and later warn when a process with threads forks: printing that would be measured as well
    return [sys.executable, "-W", "ignore", "-c", f"import sys; sys.path.insert(0, {compiled()!r}); {code}"]


@functools.lru_cache
def compiled():
    """A folder with the bytecode of both, since an import is not slow for want of a cache that may be written."""
    import py_compile
    import tempfile

    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    for source in (Path(__file__), Path(mem_isolate.__file__)):
        py_compile.compile(str(source), cfile=f"{folder.name}/{source.stem}.pyc", doraise=True)
    return folder.name


class Caller:
    """A process in which calls are made, and the children it has."""

    def __init__(self, state):
        self.state = state
        self.notes: list[str] = []
        self._launch()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._kill()

    def wait_until_ready(self):
        """Learn what preparing it did, and make a note of that."""
        moved = self._receive(HUNG)
        if self.state.huge_pages:
            size, seconds = size_text(moved["collapsed"]), duration(moved["seconds"])
            self.notes = [f"use_huge_pages() moved {size} into huge pages in {seconds}"]

    def measure(self, contender, calls):
        """Have the process make that many calls; return the seconds and child page faults that each took."""
        try:
            self._send([contender.__name__, calls])
            return self._receive(HUNG_WITH_THREADS if self.state.has_threads else HUNG)
        except (CallHung, CallerDied):
            self._kill()
            self._launch()
            self.wait_until_ready()
            raise

    def _launch(self):
        self.process = subprocess.Popen(
            [*fresh_interpreter("import bench; bench.serve(sys.argv[1])"), json.dumps(asdict(self.state))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def _kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def _send(self, message):
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise CallerDied("the calling process died") from error

    def _receive(self, seconds):
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise CallHung(f"no answer in {seconds:.0f} seconds")
        line = self.process.stdout.readline()
        if not line:
            raise CallerDied("the calling process died")
        message = json.loads(line)
        if "failure" in message:
            raise CallFailed(message["failure"])
        return message


@dataclass(frozen=True)
class NothingImported:
    """In place of a `State`: each measurement is one import statement in a fresh interpreter."""

    notes = ()

    def start(self):
        return contextlib.nullcontext(self)

    def wait_until_ready(self):
        pass

    def measure(self, statement, calls):
        command = fresh_interpreter(f"import timeit; print(timeit.timeit({statement!r}, number=1))")
        faults = child_page_faults()
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
        return {"seconds": float(output), "child_faults": child_page_faults() - faults}


# ---- Rows, and the groups in which they take turns.


@dataclass
class Row:
    """A contender in a state, and what was measured of it. An import statement is a contender too."""

    contender: Callable[[], Any] | str
    state: State | NothingImported = State()
    detail: str = ""
    calls: int | None = None
    seconds: list[float] = field(default_factory=list)
    child_faults: list[float] = field(default_factory=list)
    attempts: int = 0
    hangs: int = 0
    failure: str = ""

    @property
    def label(self):
        name = label_of(self.contender)
        return f"{name}, {self.detail}" if self.detail else name

    @property
    def median(self):
        return median(self.seconds)

    @property
    def remark(self):
        hangs = f"hung {self.hangs} of {self.attempts} times" if self.hangs else ""
        return self.failure or hangs

    def take_turn(self, caller, round_seconds):
        if self.failure or self.hangs == HANGS_BORNE:
            return
        try:
            if self.calls is None:
                self._call_first(caller, round_seconds)
            else:
                self._keep(self._ask(caller, self.calls))
        except CallHung:
            self.hangs += 1
        except CallFailed as error:
            self.failure = str(error)

    def _call_first(self, caller, round_seconds):
        """Have one call's result checked. It tells how many calls make a round, and is one if it is slow enough."""
        sample = self._ask(caller, 0)
        self.calls = max(1, int(round_seconds / max(sample["seconds"], 1e-9)))
        self._keep(sample if self.calls == 1 else self._ask(caller, self.calls))

    def _ask(self, caller, calls):
        self.attempts += max(1, calls)
        return caller.measure(self.contender, calls)

    def _keep(self, sample):
        self.seconds.append(sample["seconds"])
        self.child_faults.append(sample["child_faults"])


def label_of(contender):
    return contender if isinstance(contender, str) else getattr(contender, "label", contender.__name__)


def median(values):
    # not the one of `statistics`, which would bring `random` and its at-fork hook into every calling process
    ordered, middle = sorted(values), len(values) // 2
    return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


@dataclass
class Group:
    """Rows that take turns, in a share of the time that is set by their weight."""

    title: str
    rows: list[Row]
    weight: float
    round_seconds: float = ROUND_SECONDS
    fewest_rounds: int = 3
    rounds: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self):
        return f"{self.rounds} round{'s' * (self.rounds != 1)}"

    def measure(self, ends_at, progress):
        """Take rounds until the time is up, to the nearest whole one."""
        with contextlib.ExitStack() as running:
            states = dict.fromkeys(row.state for row in self.rows)
            callers = {state: running.enter_context(state.start()) for state in states}
            for state, caller in callers.items():
                self._prepare(caller, [row for row in self.rows if row.state == state])
            longest = 0.0
            while self.rounds < self.fewest_rounds or time.monotonic() + longest / 2 < ends_at:
                start = time.monotonic()
                # there and back again, so that no row always follows the same one
                for row in self.rows[:: -1 if self.rounds % 2 else 1]:
                    progress.show(self, row)
                    row.take_turn(callers[row.state], self.round_seconds)
                self.rounds += 1
                longest = max(longest, time.monotonic() - start)

    def _prepare(self, caller, rows):
        try:
            caller.wait_until_ready()
            self.notes += caller.notes
        except (CallFailed, CallHung) as error:
            for row in rows:
                row.failure = f"not prepared: {error}"


# ---- What is measured.


OVERHEAD, IMPORTS = "a function that returns 42", "import statements"
MODULE, FOUNDATIONS = "import mem_isolate", "import ctypes, mmap, pickle, logging"
MILLION_INTS = 1_000_000 * BYTES_PER_INT
LARGEST = 256 * MIB
COLLAPSED = "in huge pages"
COLLAPSED_CALL = f"{isolated_call.label}, {COLLAPSED}"


@dataclass
class Section:
    """A table: groups of rows, each row compared with the one of its group whose label is the baseline."""

    title: str
    baseline: str
    groups: list[Group]
    #: Show calls per second instead of seconds per call.
    as_rate: bool = False

    def value(self, row):
        return 1 / row.median if self.as_rate else row.median

    def value_text(self, row):
        return f"{self.value(row):,.0f}/s" if self.as_rate else duration(row.median)

    def ratio(self, row, group):
        """To the baseline, or None where that was not measured."""
        baseline = next((row for row in group.rows if row.label == self.baseline and row.seconds), None)
        return self.value(row) / self.value(baseline) if baseline else None


def plan(quick):
    sizes = (KIB, 4 * MIB) if quick else (KIB, 64 * KIB, MIB, 16 * MIB, LARGEST)
    yield overhead()
    yield result_size("bytes", sizes)
    if HAS_NUMPY:
        yield result_size("ndarray", sizes)
    yield result_size("list of ints", (KIB, MILLION_INTS) if quick else (KIB, 64 * KIB, MIB, MILLION_INTS, LARGEST))
    yield parent_size((0, 256) if quick else (0, 128, 1024))
    yield calling_threads((1, 2) if quick else (1, 2, 4))
    yield busy_parent()
    yield imports()


def every_row(sections):
    return [(section, group, row) for section in sections for group in section.groups for row in group.rows]


def row(contender, detail="", **state):
    reserved_for = label_of(contender) if contender in HEAVY else ""
    return Row(contender, State(reserved_for=reserved_for, **state), detail)


def overhead():
    by_libc = (fork_alone, fork_with_wait, bare_call, isolated_call)
    contenders = (direct_function_call, *by_libc, os_fork_with_wait, pipe_by_hand)
    group = Group(OVERHEAD, [row(contender) for contender in (*contenders, *HEAVY)], weight=7)
    return Section("Overhead", label_of(fork_with_wait), [group])


#: One round with 256 MiB takes seconds; where a goal depends on it, there should be three.
LARGEST_WEIGHT = {"bytes": 12, "ndarray": 15, "list of ints": 6}


def result_size(kind, sizes):
    groups = [
        Group(
            result_title(kind, size),
            [row(contender, payload=kind, size=size) for contender in (isolated_call, pipe_by_hand, *HEAVY)],
            weight=LARGEST_WEIGHT[kind] if size == LARGEST else 2 if size == MILLION_INTS else 0.6,
            fewest_rounds=1 if size == LARGEST else 3,
        )
        for size in sizes
    ]
    return Section(f"Size of the result: {kind}", label_of(isolated_call), groups)


def result_title(kind, size):
    return f"{size // BYTES_PER_INT:,} ints" if kind == "list of ints" else f"{kind} of {size_text(size)}"


def parent_size(sizes):
    """The largest parent takes turns with one like it whose memory is in huge pages."""
    groups = []
    for mib in sizes:
        contenders = (fork_with_wait, isolated_call)
        rows = [row(contender, touched_mib=mib) for contender in contenders]
        if mib == sizes[-1]:
            rows += [row(contender, COLLAPSED, touched_mib=mib, huge_pages=True) for contender in contenders]
        groups.append(Group(parent_title(mib), rows, weight=7 if mib == 1024 else 1))
    return Section("Size of the parent: memory touched", label_of(fork_with_wait), groups)


def parent_title(mib):
    return f"parent of {size_text(mib * MIB)}"


def calling_threads(counts):
    rows = [row(isolated_call, f"{count} thread{'s' * (count > 1)}", calling_threads=count) for count in counts]
    group = Group("calling threads", rows, weight=3, round_seconds=0.2)
    return Section("Calls from several threads at once", rows[0].label, [group], as_rate=True)


def busy_parent():
    groups = [
        Group(
            busy_title(count),
            [row(contender, busy_threads=count) for contender in (pipe_by_hand, isolated_call)],
            weight=4 if count else 0.7,
            round_seconds=0,  # one call a round, so that each one that hangs is seen and counted
        )
        for count in (0, 3)
    ]
    return Section("Calls while other threads are busy", label_of(pipe_by_hand), groups)


def busy_title(count):
    return f"{count or 'no'} busy threads"


def imports():
    group = Group(
        IMPORTS, [Row(statement, NothingImported()) for statement in (FOUNDATIONS, MODULE)], 1.5, fewest_rounds=7
    )
    return Section("Import, each in a fresh interpreter", FOUNDATIONS, [group])


# ---- The figures to reach.

LARGE_ARRAY, LARGE_BYTES = result_title("ndarray", LARGEST), result_title("bytes", LARGEST)
MILLION_TITLE = result_title("list of ints", MILLION_INTS)
#: Each is a row's median divided by that of another row of its group, and the most that it should be.
RATIOS_TO_REACH = (
    ("trivial call / fork + waitpid through ctypes", 1.35, OVERHEAD, isolated_call, fork_with_wait),
    ("trivial call / os.fork + pipe + pickle by hand", 0.65, OVERHEAD, isolated_call, pipe_by_hand),
    ("trivial call / multiprocessing.Process + Pipe", 0.40, OVERHEAD, isolated_call, multiprocessing_pipe),
    ("3 busy threads: trivial call / os.fork + pipe by hand", 0.90, busy_title(3), isolated_call, pipe_by_hand),
    ("256 MiB ndarray / pipe by hand", 0.35, LARGE_ARRAY, isolated_call, pipe_by_hand),
    ("256 MiB ndarray / multiprocessing", 0.15, LARGE_ARRAY, isolated_call, multiprocessing_pipe),
    ("256 MiB bytes / pipe by hand", 0.85, LARGE_BYTES, isolated_call, pipe_by_hand),
    ("list of a million ints / multiprocessing", 1.00, MILLION_TITLE, isolated_call, multiprocessing_pipe),
    ("1 GiB parent: trivial call / fork + waitpid", 1.15, parent_title(1024), isolated_call, fork_with_wait),
    ("1 GiB parent: call after use_huge_pages() / before", 0.20, parent_title(1024), COLLAPSED_CALL, isolated_call),
)


@dataclass(frozen=True)
class Figure:
    """What was measured, None where its rows were not, beside the most that it should be."""

    name: str
    goal: float
    value: float | None
    text: Callable[[float], str] = "{:.2f}".format
    #: The Python release that the goal was set for, if not for all.
    release: tuple[int, int] | None = None

    @property
    def cells(self):
        return [self.name, "-" if self.value is None else self.text(self.value), self.text(self.goal), self.verdict]

    @property
    def verdict(self):
        if self.value is None:
            return "not measured"
        if self.release not in (None, sys.version_info[:2]):
            return "a goal for {}.{}".format(*self.release)
        return "reached" if self.value <= self.goal else "MISSED"


def figures(sections):
    measured = {(group.title, row.label): row for _, group, row in every_row(sections) if row.seconds}

    def combined(combine, group, *contenders):
        rows = [measured.get((group, label_of(contender))) for contender in contenders]
        return combine(*rows) if all(rows) else None

    for name, goal, group, contender, other in RATIOS_TO_REACH:
        yield Figure(name, goal, combined(lambda one, two: one.median / two.median, group, contender, other))
    faults = combined(lambda trivial: median(trivial.child_faults), OVERHEAD, isolated_call)
    yield Figure("child page faults of a trivial call", 125, faults, "{:.0f}".format, release=(3, 11))
    beyond = combined(lambda module, foundations: module.median - foundations.median, IMPORTS, MODULE, FOUNDATIONS)
    yield Figure("import beyond ctypes, mmap, pickle and logging", 0.005, beyond, duration)


# ---- Output.


def machine():
    """What the figures belong to."""
    processor = line_of("/proc/cpuinfo", "model name").partition(":")[2].strip() or platform.processor() or "unknown"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    load = os.getloadavg()[0]
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    huge_pages = line_of("/sys/kernel/mm/transparent_hugepage/enabled", "[").partition("[")[2].partition("]")[0]
    return {
        "machine": f"{processor}, {cores} cores, {size_text(memory)}, {platform.machine()}",
        "kernel": f"{platform.system()} {platform.release()}, transparent huge pages: {huge_pages or 'not known'}",
        "libc": " ".join(platform.libc_ver()).strip() or "not known",
        "Python": f"{platform.python_implementation()} {platform.python_version()}{'' if has_gil else ', without GIL'}",
        "NumPy": numpy_version() if HAS_NUMPY else "not installed: no rows with an ndarray",
        "mem_isolate": mem_isolate.__version__,
        "load": f"{load:.2f} when this began{', too much for times to be trusted' if load > 0.75 * cores else ''}",
    }


def numpy_version():
    # imported here, since it brings `random` with its at-fork hook, which no calling process should have
    from importlib.metadata import version

    return version("numpy")


def line_of(path, text):
    """The first line of a file that contains the text, or nothing."""
    with contextlib.suppress(OSError), open(path) as lines:
        return next((line for line in lines if text in line), "")
    return ""


def cells_of(section, group, row):
    if not row.seconds:
        return [row.label, "-", "-", "-", row.remark]
    ratio = section.ratio(row, group)
    ratio_text = "-" if ratio is None else f"{ratio:.2f}"
    return [row.label, section.value_text(row), ratio_text, f"{median(row.child_faults):,.0f}", row.remark]


SECTION_COLUMNS = ("median", "ratio", "child faults")
FIGURE_COLUMNS = ("Figures to reach", "measured", "at most", "verdict")


class Terminal:
    """Aligned columns, with bars to compare the rows of a group."""

    BAR_WIDTH = 24

    def __init__(self):
        try:
            "\u2588".encode(sys.stdout.encoding or "ascii")
            self.blocks = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589\u2588"
        except UnicodeEncodeError:
            self.blocks = " #"

    def heading(self, machine):
        for name, text in machine.items():
            print(f"{name:<12} {text}")

    def section(self, section):
        print("{:<46}{:>10}{:>8}{:>14}".format(section.title, *SECTION_COLUMNS))
        for group in section.groups:
            print(f"  {group.title} ({group.summary}, ratio to {section.baseline})")
            longest = max((section.value(row) for row in group.rows if row.seconds), default=0)
            for row in group.rows:
                bar = self.bar(section.value(row) / longest) if row.seconds else ""
                label, *numbers, remark = cells_of(section, group, row)
                line = "    {:<42}{:>10}{:>8}{:>14}".format(label, *numbers)
                print(line, *filter(None, (bar, remark)))
            for note in group.notes:
                print(f"    {note}")

    def bar(self, fraction):
        steps = len(self.blocks) - 1
        whole, part = divmod(round(fraction * self.BAR_WIDTH * steps), steps)
        return self.blocks[-1] * whole + self.blocks[part].strip()

    def figures(self, figures):
        for cells in [FIGURE_COLUMNS, *(figure.cells for figure in figures)]:
            print("{:<56}{:>10}{:>10}  {}".format(*cells))


class Markdown:
    """Tables for a README."""

    def heading(self, machine):
        print(*(f"- {name}: {text}" for name, text in machine.items()), sep="\n")

    def section(self, section):
        self._row(section.title, *SECTION_COLUMNS, "")
        self._row("---", "---:", "---:", "---:", "---")
        for group in section.groups:
            group_title = f"*{group.title}* ({group.summary}, ratio to {section.baseline})"
            self._row(group_title, "", "", "", "; ".join(group.notes))
            for row in group.rows:
                self._row(*cells_of(section, group, row))

    def figures(self, figures):
        self._row(*FIGURE_COLUMNS)
        self._row("---", "---:", "---:", "---")
        for figure in figures:
            self._row(*figure.cells)

    def _row(self, *cells):
        print("|", " | ".join(cell.replace("|", "\\|") for cell in cells), "|")


def as_json(facts, sections, reached):
    """Everything, flat, with times in seconds per call: what each round measured, and the medians."""
    return {
        "machine": facts,
        "rows": [
            {
                "section": section.title,
                "group": group.title,
                "label": row.label,
                "median": row.median if row.seconds else None,
                "ratio": section.ratio(row, group) if row.seconds else None,
                "child_faults": median(row.child_faults) if row.seconds else None,
                "seconds": row.seconds,
                "calls_per_round": row.calls,
                "attempts": row.attempts,
                "hangs": row.hangs,
                "failure": row.failure,
            }
            for section, group, row in every_row(sections)
        ],
        "notes": [note for section in sections for group in section.groups for note in group.notes],
        "figures": [
            {"name": figure.name, "value": figure.value, "goal": figure.goal, "verdict": figure.verdict}
            for figure in reached
        ],
    }


class Progress:
    """One line on stderr that says how far things are; where that is no terminal, one line for each group."""

    WIDTH, EVERY = 24, 0.1

    def __init__(self, seconds):
        self.seconds, self.start = seconds, time.monotonic()
        self.on_terminal = sys.stderr.isatty()
        self.shown, self.group = 0.0, ""

    def show(self, group, row):
        elapsed = time.monotonic() - self.start
        if self.on_terminal and elapsed - self.shown >= self.EVERY:
            done = min(1.0, elapsed / self.seconds)
            bar = ("#" * round(done * self.WIDTH)).ljust(self.WIDTH, ".")
            line = f"[{bar}] {elapsed:3.0f} s  {group.title}: {row.label}"
            print(f"\r\033[K{line[:79]}", end="", file=sys.stderr, flush=True)
            self.shown = elapsed
        elif not self.on_terminal and group.title != self.group:
            print(f"{elapsed:3.0f} s of {self.seconds:.0f}: {group.title}", file=sys.stderr, flush=True)
            self.group = group.title

    def clear(self):
        if self.on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def main():
    options = parse_options()
    seconds = QUICK_SECONDS if options.quick else FULL_SECONDS
    output = Markdown() if options.markdown else Terminal()
    facts, sections, progress = machine(), list(plan(options.quick)), Progress(seconds)
    output.heading(facts)
    weights = sum(group.weight for section in sections for group in section.groups)
    done = 0.0
    for section in sections:
        for group in section.groups:
            # what one group leaves of its time, or takes too much, is the next one's gain or loss
            done += group.weight
            group.measure(progress.start + seconds * done / weights, progress)
        progress.clear()
        print()
        output.section(section)
    reached = list(figures(sections))
    print()
    output.figures(reached)
    if options.json:
        options.json.write_text(json.dumps(as_json(facts, sections, reached), indent=1) + "\n")
    print(f"\nAll of it took {time.monotonic() - progress.start:.0f} seconds.")


def parse_options():
    parser = argparse.ArgumentParser(description="Measure what an isolated call costs, beside the alternatives.")
    parser.add_argument("--quick", action="store_true", help="ten seconds, without the largest results and parents")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, every sample too, to FILE")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
