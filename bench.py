"""What an isolated call costs, beside what you would write instead: measured here and now, nothing is estimated.

    python3 bench.py                    in a minute or two; takes some 4 GiB of memory for a while
    python3 bench.py --quick            in some 15 seconds, with smaller results and parents
    python3 bench.py --json FILE        writes every sample as well, for machines
    python3 bench.py --check            shows what this project aims at too; exit status 1 where an aim is missed
    python3 bench.py --against OLD.py   compares the trivial call with that of another copy of the module

Each row has a fresh interpreter of its own, which is asked over a pipe for one round at a time. So the rows of a case
take turns, none is measured in a process that another has changed, and a call that hangs can be killed.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import gc
import importlib.util
import io
import json
import os
import pickle
import platform
import resource
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import timeit
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional

import mem_isolate
from mem_isolate import KilledBySignalError, execute_in_isolated_process, isolated, use_huge_pages

HERE = Path(__file__).resolve().parent
MIB = 1024**2
#: A case takes at least so many rounds. In each, a row's call is repeated for about so long; a slower one is made once.
ROUNDS, ROUND_SECONDS = 5, 0.015
ANSWER_SECONDS = 60  # a process that has not answered by then hangs

# ---- The functions that are called. What they return is there before: making it is not measured.

Function = Callable[[], Any]
data: Any = None


def answer() -> Any:
    return data


def items() -> Iterator[Any]:
    number, item = data
    for _ in range(number):
        yield item


def crash() -> None:
    ctypes.string_at(0)


@dataclass
class Buffer:
    """Stands for an array where there is no NumPy: it is pickled out of band, as one of NumPy's is."""

    contents: Any

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Buffer, (pickle.PickleBuffer(self.contents) if protocol >= 5 else self.contents,)


def array_of(size: int) -> Any:
    if importlib.util.find_spec("numpy"):
        return importlib.import_module("numpy").full(size // 8, 1.5)
    return Buffer(bytearray(b"x") * size)


# ---- The peers: ways of having a function called. They return what it returns, or nothing.

# `fork` keeps the GIL, which another thread of the parent could take; `waitpid` lets other threads run.
libc_fork, libc_exit = ctypes.PyDLL(None).fork, ctypes.PyDLL(None)._exit
libc_waitpid = ctypes.CDLL(None).waitpid


def fork_alone(function: Function) -> None:
    if libc_fork() == 0:
        libc_exit(0)


def fork_and_wait(function: Function) -> None:
    pid = libc_fork()
    if pid == 0:
        libc_exit(0)
    libc_waitpid(pid, None, 0)


def isolated_crash(function: Function) -> None:
    with contextlib.suppress(KilledBySignalError):
        execute_in_isolated_process(function)
        raise RuntimeError("it did not crash")


def from_threads(threads: int, function: Function) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(execute_in_isolated_process, [function] * CALLS_OF_THREADS))


def os_fork_and_wait(function: Function) -> None:
    pid = os.fork()
    if pid == 0:
        function()
        os._exit(0)
    os.waitpid(pid, 0)


def items_by_hand(function: Function) -> Iterator[Any]:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            with open(writer, "wb") as stream:
                for item in function():
                    pickle.dump(item, stream, protocol=5)
                    stream.flush()
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as source, contextlib.suppress(EOFError):
        while True:
            yield pickle.load(source)
    os.waitpid(pid, 0)


def by_hand(function: Function) -> Any:
    [result] = items_by_hand(lambda: [function()])
    return result


# What brings at-fork hooks is imported where it is used: they would cost time in the processes of other rows.


def by_multiprocessing(function: Function) -> Any:
    import multiprocessing

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(function()))
    process.start()
    sender.close()
    result = receiver.recv()
    process.join()
    receiver.close()
    return result


def by_executor(function: Function) -> Any:
    """A fresh one for each call: a worker that was there before would not see what the caller's memory holds now."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        if function is items:
            return list(pool.map(abs, range(ITEMS_MAPPED)))
        return pool.submit(function).result()


def python_importing(modules: str, function: Function) -> None:
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import {modules}"
    subprocess.run([sys.executable, "-I", "-c", code], check=True)


# ---- What is measured.


@dataclass(frozen=True)
class Peer:
    name: str
    call: Optional[Callable[[Function], Any]]  # None: the function itself is called
    units: int = 1  # in a call; of a generator, each item is one
    huge_pages: bool = False
    memory_limit: Optional[int] = None


@dataclass(frozen=True)
class Case:
    name: str
    function: Function
    make_data: Callable[[], Any]
    peers: List[Peer]
    unit: str = "call"
    base: str = "isolated"  # the peer that the ratios are to
    busy_threads: int = 0
    parent_mib: int = 0
    seconds: float = 2.0


CALLS_OF_THREADS, ITEMS_MAPPED = 16, 2_000
ISOLATED, CRASH = Peer("isolated", execute_in_isolated_process), Peer("isolated", isolated_crash)
LIMITED = Peer("isolated, memory_limit", None, memory_limit=1024 * MIB)
IN_HUGE_PAGES = Peer("isolated, huge pages", execute_in_isolated_process, huge_pages=True)
THREADS = [Peer(f"isolated, {n} threads", functools.partial(from_threads, n), CALLS_OF_THREADS) for n in (2, 4, 8)]
DIRECT, FORK_ALONE = Peer("direct function call", None), Peer("fork alone", fork_alone)
FORK_AND_WAIT, OS_FORK = Peer("fork and wait", fork_and_wait), Peer("os.fork and wait", os_fork_and_wait)
BY_HAND, ITEMS_BY_HAND = Peer("by hand", by_hand), Peer("by hand", items_by_hand)
MULTIPROCESSING, EXECUTOR = Peer("multiprocessing", by_multiprocessing), Peer("ProcessPoolExecutor", by_executor)
RESULT = [ISOLATED, BY_HAND, MULTIPROCESSING]
IMPORTS = {"what it imports": "ctypes, logging, mmap, pickle", "mem_isolate": "mem_isolate"}
PYTHONS = [Peer(name, functools.partial(python_importing, modules)) for name, modules in IMPORTS.items()]
# first what the Rust crate's own benchmark measures, under its names
CALLS = [DIRECT, FORK_ALONE, FORK_AND_WAIT, ISOLATED, LIMITED, OS_FORK, BY_HAND, MULTIPROCESSING, EXECUTOR]
TRIVIAL = Case("returns 42", answer, lambda: 42, CALLS, seconds=8)


def tables(quick: bool) -> Dict[str, List[Case]]:
    mib, ints, rows, small = (16, 100_000, 20_000, 20_000) if quick else (256, 1_000_000, 200_000, 100_000)
    arrays, streams = mib // 8, [ISOLATED, ITEMS_BY_HAND]
    parents = {size: [ISOLATED, IN_HUGE_PAGES] for size in ((16, 64, 256) if quick else (64, 256, 1024))}
    parents[max(parents)].insert(0, FORK_AND_WAIT)
    return {
        "What a call costs": [TRIVIAL],
        "Large results": [
            Case(f"{mib} MiB of bytes", answer, lambda: b"x" * (mib * MIB), RESULT),
            Case(f"{mib} MiB array", answer, lambda: array_of(mib * MIB), RESULT),
            Case(f"{ints:,} ints", answer, lambda: list(range(ints)), RESULT),
            Case(f"{rows:,} dicts", answer, lambda: [{"id": i, "x": i / 7} for i in range(rows)], RESULT),
        ],
        "Generators": [
            Case(f"{small:,} small items", items, lambda: (small, 42), [*streams, EXECUTOR], "item"),
            Case(f"{arrays} arrays of 8 MiB", items, lambda: (arrays, array_of(8 * MIB)), streams, "item"),
        ],
        "Threads, crashes, imports": [
            Case("3 busy threads", answer, lambda: 42, [ISOLATED, BY_HAND], busy_threads=3, seconds=3),
            Case("called from threads", answer, lambda: 42, [ISOLATED, *THREADS]),
            Case("segmentation fault", crash, lambda: None, [CRASH, OS_FORK]),
            Case("python3, importing", answer, lambda: None, PYTHONS, base="mem_isolate"),
        ],
        "Large parents": [
            Case(f"parent of {mib} MiB", answer, lambda: 42, peers, parent_mib=mib) for mib, peers in parents.items()
        ],
    }


# The most that a row's median should be of that of another row of its case, or in a unit.
AIMS = [
    ("returns 42", "isolated", "fork and wait", 2.0),
    ("returns 42", "isolated", "by hand", 0.75),
    ("returns 42", "isolated", "multiprocessing", 0.4),
    ("returns 42", "isolated", "faults", 140),
    ("256 MiB of bytes", "isolated", "by hand", 0.8),
    ("256 MiB array", "isolated", "by hand", 0.35),
    ("256 MiB array", "isolated", "multiprocessing", 0.15),
    ("1,000,000 ints", "isolated", "by hand", 0.95),
    ("1,000,000 ints", "isolated", "multiprocessing", 0.6),
    ("200,000 dicts", "isolated", "by hand", 0.95),
    ("200,000 dicts", "isolated", "multiprocessing", 0.75),
    ("100,000 small items", "isolated", "µs", 3.0),
    ("100,000 small items", "isolated", "ProcessPoolExecutor", 0.03),
    ("32 arrays of 8 MiB", "isolated", "by hand", 0.6),
    ("3 busy threads", "isolated", "by hand", 0.9),
    ("parent of 1024 MiB", "isolated", "fork and wait", 1.15),
    ("parent of 1024 MiB", "isolated, huge pages", "isolated", 0.2),
    ("python3, importing", "mem_isolate", "what it imports", 1.2),
]

# ---- Measuring: the process of a row.


def work(quick: bool, case_name: str, peer_name: str) -> None:
    """Make one call and look at its result; then take a round for each line that comes, the first only to try."""
    global data
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    try:
        case = next(case for cases in tables(quick).values() for case in cases if case.name == case_name)
        peer = next(peer for peer in case.peers if peer.name == peer_name)
        data, _touched = case.make_data(), bytearray(b"x") * (case.parent_mib * MIB)
        if peer.huge_pages and not use_huge_pages():
            raise RuntimeError("no huge pages here")
        function = isolated(memory_limit=peer.memory_limit)(case.function) if peer.memory_limit else case.function
        call = functools.partial(peer.call, function) if peer.call else function
        if case.function is items:
            call = functools.partial(lambda stream: sum(1 for _ in stream()), call)
        result, calls = call(), 0
        units = result if case.function is items else peer.units
        if case.function is answer and result is not None and pickle.dumps(result, 5) != pickle.dumps(data, 5):
            raise RuntimeError("the result is not what the function returns")
        del result
        for _ in sys.stdin:
            seconds, faults = take_round(call, calls or 1, case.busy_threads)
            print(json.dumps({"seconds": seconds / units, "faults": faults} if calls else {}), flush=True)
            calls = calls or max(1, int(ROUND_SECONDS / seconds))
    except Exception as error:
        print(json.dumps({"failure": f"{type(error).__name__}: {error}"}), flush=True)


def take_round(call: Function, calls: int, busy_threads: int) -> tuple[float, float]:
    """The seconds and the child page faults of a call, beside threads of pure Python that contend for the GIL."""
    busy = [True]

    def burn() -> None:
        while busy:
            pass

    threads = [threading.Thread(target=burn) for _ in range(busy_threads)]
    for thread in threads:
        thread.start()
    try:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        # with the garbage collector, as in the programs that make such calls
        seconds = timeit.timeit(call, setup=gc.enable, number=calls)
        while libc_waitpid(-1, None, 0) > 0:
            pass  # only what was waited for counts: "fork alone" leaves its children
        return seconds / calls, (resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before) / calls
    finally:
        busy.clear()
        for thread in threads:
            thread.join()


@dataclass
class Row:
    """A line of a table: the process that makes these calls, and what was measured of it."""

    case: Case
    peer: Peer
    quick: bool
    name: str
    folder: Path = HERE  # where the module is
    seconds: List[float] = field(default_factory=list)
    faults: List[float] = field(default_factory=list)
    failure: str = ""
    process: Any = None

    def start(self) -> None:
        code = f"import sys; sys.path[:0] = {[str(self.folder), str(HERE)]}; import bench; bench.work"
        job = (self.quick, self.case.name, self.peer.name)
        # Python 3.12 and later warn when a process with threads forks: printing that would be measured as well
        command = [sys.executable, "-W", "ignore", "-c", f"{code}{job}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)

    def stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()

    def take_turn(self) -> None:
        if self.failure:
            return
        with contextlib.suppress(BrokenPipeError):
            os.write(self.process.stdin.fileno(), b"\n")
        message: Dict[str, Any] = {"failure": f"hung: no answer in {ANSWER_SECONDS} seconds"}
        if select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
            message = json.loads(self.process.stdout.readline() or '{"failure": "its process died"}')
        self.failure = message.get("failure", "")
        if "seconds" in message:
            self.seconds.append(message["seconds"])
            self.faults.append(message["faults"])


def measure(rows: List[Row], seconds: float, progress: str) -> None:
    """Take rounds of the rows of one case until the time is up. On a terminal, a line tells where it is."""
    on_terminal = sys.stderr.isatty()
    try:
        for row in rows:
            row.start()
        for row in rows:
            row.take_turn()  # which waits until it is ready
        rounds, end = 0, time.monotonic() + seconds
        while (rounds < ROUNDS or time.monotonic() < end) and not all(row.failure for row in rows):
            for row in rows[:: -1 if rounds % 2 else 1]:  # so that no row always follows the same one
                if on_terminal:
                    line = f"{progress} {row.case.name}: {row.name}, round {rounds + 1}"
                    print(f"\r\033[K{line[:78]}", end="", file=sys.stderr, flush=True)
                row.take_turn()
            rounds += 1
    finally:
        for row in rows:
            row.stop()
        if on_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def median(values: List[float], part: float = 0.5) -> float:
    # not the one of `statistics`, which brings `random` and its at-fork hook into every process
    return sorted(values)[round(part * (len(values) - 1))]


# ---- Output.

BOLD, RED, GREEN, CYAN = 1, 31, 32, 36


def duration(seconds: float) -> str:
    units = (("s", 1.0), ("ms", 1e3), ("µs", 1e6), ("ns", 1e9))
    unit, number = next((unit, seconds * scale) for unit, scale in units if seconds * scale >= 0.9995 or unit == "ns")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


def paint(text: str, code: int) -> str:
    """Colour it, on a terminal."""
    wanted = text and sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return f"\033[{code}m{text}\033[0m" if wanted else text


def print_table(title: str, rows: List[Row]) -> None:
    """The rows of each case together; bars compare them."""
    room = max(6, min(24, shutil.get_terminal_size((100, 24)).columns - 76))
    print("\n" + paint(f"{title:<43}{'per ' + rows[0].case.unit:>8}{'ratio':>14}{'faults':>9}", BOLD))
    for row in rows:
        group = [other for other in rows if other.case is row.case]
        label = f"{row.case.name if row is group[0] else '':<20}{row.name:<23}"
        if not row.seconds:
            print(label, paint(row.failure[:56], RED))
            continue
        medians = {other.name: median(other.seconds) for other in group if other.seconds}
        value = medians[row.name]
        spread = (median(row.seconds, 0.75) - median(row.seconds, 0.25)) / 2 / value
        spread_text = f"±{spread:.0%}" if spread >= 0.1 else ""
        ratio = f"{value / medians[row.case.base]:.2f}" if row.case.base in medians else ""
        faults = f"{median(row.faults):,.0f}" if row.peer.units == 1 and row.case.unit == "call" else ""
        eighths = round(value / max(medians.values()) * room * 8)
        bar = "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
        bar = paint(bar, GREEN if row.name == row.case.base else CYAN)
        line = f"{label}{duration(value):>8}{spread_text:>6}{ratio:>8}{faults:>9} {bar}{paint(row.failure[:24], RED)}"
        print(line.rstrip())


def print_sentences(array: str, medians: Dict[Any, float]) -> None:
    """What to remember."""
    for case, text in ((TRIVIAL.name, "An isolated call takes"), (array, f"A {array} comes back in")):
        with contextlib.suppress(KeyError):  # where one of them has failed
            ours, hand, process = (medians[case, name] for name in ("isolated", "by hand", "multiprocessing"))
            times = f"{hand / ours:.1f} times as fast as by hand (os.fork, pipe, pickle)"
            print(f"{text} {duration(ours)}: {times}, {process / ours:.1f} times as fast as multiprocessing.")


def print_verdicts(medians: Dict[Any, float], faults: Dict[Any, float], quick: bool) -> bool:
    """Each aim beside what was measured; return whether one was missed."""
    print("\n" + paint(f"{'Aims':<62}{'measured':>9}{'at most':>9}", BOLD))
    missed = False
    for case, name, other, at_most in AIMS:
        try:
            value = faults[case, name] if other == "faults" else medians[case, name]
            value /= {"faults": 1, "µs": 1e-6}.get(other) or medians[case, other]
        except KeyError:
            if quick:
                continue  # it has other cases
            value = float("inf")
        missed |= value > at_most
        verdict = paint("MISSED", RED) if value > at_most else paint("reached", GREEN)
        print(f"{case + ': ' + name + ' / ' + other:<62}{value:>9.2f}{at_most:>9.2f} {verdict}")
    return missed


def how(start: float, load: float) -> str:
    paths = map(Path, ("/proc/cpuinfo", "/sys/kernel/mm/transparent_hugepage/enabled"))
    cpu, huge_pages = (path.read_text() if path.exists() else "" for path in paths)
    model = cpu.partition("model name")[2].partition("\n")[0].strip("\t :") or "unknown processor"
    trust = ", too much for times to be trusted" if load > 0.75 * (os.cpu_count() or 1) else ""
    huge_pages, array = huge_pages.partition("[")[2].partition("]")[0] or "unknown", type(array_of(8)).__name__
    system = f"Python {platform.python_version()}, {platform.platform()}, {model}, {os.cpu_count()} cores"
    return f"""Medians of {ROUNDS} rounds or more that take turns; each row has its own process. ±: half the distance
between the quartiles, where large. Ratio: to the green row. Faults: page faults of the children. By hand: os.fork,
a pipe, pickle protocol 5 at both ends. Array: {array}. It took {time.monotonic() - start:.0f} s.
mem_isolate {mem_isolate.__version__}, {system}; huge pages: {huge_pages}; load before: {load:.1f}{trust}."""


def compare(old: Path, quick: bool) -> List[Row]:
    """The trivial call of this module and of another copy take turns, in several pairs of fresh processes."""
    import tempfile

    pairs, rows = (8 if quick else 30), []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in (("isolated", HERE / "mem_isolate.py"), ("isolated, other file", old)):
            place = Path(tempfile.mkdtemp(dir=folder))
            shutil.copy(file, place / "mem_isolate.py")
            rows.append(Row(TRIVIAL, ISOLATED, quick, name, place))
        for pair in range(pairs):
            measure(rows, 0.8, f"[{'#' * pair:.<{pairs}}]")
    here, there = rows
    ratios = [one / other for one, other in zip(here.seconds, there.seconds)]
    if ratios:
        low, middle, high = (median(ratios, part) for part in (0.25, 0.5, 0.75))
        faults = median(here.faults) - median(there.faults)
        print(f"A trivial call takes {middle:.3f} of its time with the other file, and {faults:+.1f} page faults")
        print(f"(quartiles {low:.3f} and {high:.3f} of {len(ratios)} rounds in {pairs} pairs of processes).")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what an isolated call costs, beside the alternatives.")
    parser.add_argument("--quick", action="store_true", help="some 15 seconds, with smaller results and parents")
    parser.add_argument("--check", action="store_true", help="show the project's aims; exit status 1 if one is missed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write everything, every sample too, to FILE")
    parser.add_argument("--against", metavar="OLD.py", type=Path, help="compare with another copy of the module")
    options = parser.parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # where it has no block characters
    start, load = time.monotonic(), os.getloadavg()[0]
    measured: Dict[str, List[Row]] = {}
    if options.against:
        measured["This file and another"] = compare(options.against, options.quick)
    else:
        cases = [(title, case) for title, cases in tables(options.quick).items() for case in cases]
        for done, (title, case) in enumerate(cases):
            rows = [Row(case, peer, options.quick, peer.name) for peer in case.peers]
            measured.setdefault(title, []).extend(rows)
            measure(rows, case.seconds / (8 if options.quick else 1), f"[{'#' * done:.<{len(cases)}}]")
    every_row = [row for rows in measured.values() for row in rows if row.seconds]
    medians = {(row.case.name, row.name): median(row.seconds) for row in every_row}
    faults = {(row.case.name, row.name): median(row.faults) for row in every_row}
    print_sentences(tables(options.quick)["Large results"][1].name, medians)
    for title, rows in measured.items():
        print_table(title, rows)
    print("\n" + how(start, load))
    missed = options.check and not options.against and print_verdicts(medians, faults, options.quick)
    if options.json:
        keys = ("name", "seconds", "faults", "failure")  # seconds are per unit, faults per call, of each round
        lines = [
            {"table": title, "case": row.case.name, "unit": row.case.unit, **{key: getattr(row, key) for key in keys}}
            for title, rows in measured.items()
            for row in rows
        ]
        options.json.write_text(json.dumps({"how": how(start, load), "quick": options.quick, "rows": lines}, indent=1))
    return int(missed)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
