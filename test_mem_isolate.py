"""The promises of mem_isolate, each with a test that fails when the promise is broken.

``pytest`` runs what takes a minute or two, ``pytest -m stress`` the slow, repeated tests, and
``pytest -m "stress or not stress"`` all of them.
"""

import _imp
import ast
import asyncio
import builtins
import collections
import concurrent.futures
import contextlib
import contextvars
import copy
import ctypes
import dataclasses
import errno
import faulthandler
import fractions
import functools
import gc
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging.handlers
import math
import mmap
import multiprocessing
import operator
import os
import pickle
import posix
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import typing
import warnings
import weakref
from pathlib import Path

import mem_isolate
from mem_isolate import (
    CallableStatusUnknownError,
    CallableTimeoutError,
    ChildSetupError,
    DeserializationError,
    ForkError,
    KilledBySignalError,
    MemIsolateError,
    RegionCreationError,
    ResultDeliveryError,
    SerializationError,
    UnexpectedExitStatusError,
    WaitError,
    execute_in_isolated_process,
    execute_in_isolated_process_async,
    isolated,
)

call, call_async = execute_in_isolated_process, execute_in_isolated_process_async

# ------------------------------------------------------------------------------------------------------- The harness

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
BULK = 1_000_000  # bytes that no implementation would keep inline in its control region
BUFFERED = {"PYTHONUNBUFFERED": ""}  # which would hide what buffers do
THE_END = "--- came to the end ---"
UNDER_PYTEST = "pytest" in sys.modules

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.malloc.restype, LIBC.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

if UNDER_PYTEST:
    import pytest
else:

    class StandIn:
        """Stands for pytest in the new interpreters of in_fresh_process, which start twice as fast without it."""

        def __getattr__(self, name):
            return self

        def __call__(self, *arguments, **_):
            return arguments[0] if len(arguments) == 1 and inspect.isfunction(arguments[0]) else self

    pytest = StandIn()

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the marker is registered in .pytest.ini; do without one too
    stressing = "'stress' in (config.getoption('-m') or '').replace('not stress', '')"
    STRESS = [pytest.mark.stress, pytest.mark.skipif(f"not ({stressing})", reason="run with -m stress")]
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
root_only = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
has_pidfd = pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs os.pidfd_open (Linux, Python 3.9)")
has_uvloop = pytest.mark.skipif(importlib.util.find_spec("uvloop") is None, reason="needs uvloop")


def stress(test):
    """Mark a test that is slow or repeats itself: it runs only where ``-m`` names ``stress``."""
    return functools.reduce(lambda test, mark: mark(test), STRESS, test)


def repetitions(few, many):
    """Repeat a test's calls a ``few`` times by default, and with ``-m stress`` as ``many`` as it takes to be sure."""
    in_short = pytest.mark.skipif(stressing, reason="runs at length")
    return pytest.mark.parametrize("repeat", [pytest.param(few, marks=in_short), pytest.param(many, marks=STRESS)])


def cases(names, *rows):
    """Run a test for each row of a table. A row begins with the name of the case, be it an argument or not."""
    count = len(names.split(","))
    return pytest.mark.parametrize(names, [pytest.param(*row[-count:], id=row[0]) for row in rows])


@pytest.fixture(autouse=True)
def nothing_hangs_or_is_left_behind():
    """Every test ends, with the descriptors, children and signal mask it began with."""
    faulthandler.dump_traceback_later(240, exit=True)
    descriptors, mask = open_descriptors(), signal.pthread_sigmask(signal.SIG_BLOCK, [])
    yield
    faulthandler.cancel_dump_traceback_later()
    assert open_descriptors() == descriptors
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
    assert_no_child_is_left()


@functools.lru_cache(maxsize=None)
def bytecode_folder():
    """Where new interpreters keep this module compiled, also if they should not write beside it."""
    return tempfile.TemporaryDirectory()


CALL_A_FUNCTION = (
    # A shell's background job ignores SIGINT, and so would this process.
    "import importlib, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    "getattr(importlib.import_module(sys.argv[1]), sys.argv[2])(*sys.argv[3:])"
)


def in_fresh_process(function, *arguments, env=None, expect=0, python=(), output=subprocess.PIPE, cwd=None):
    """Call a function, or run code or a script, in a new interpreter, a session's leader; return what that printed.

    If it hangs, it and what it started get SIGABRT, so that faulthandler prints their stacks, and the test fails.
    """
    what = ["-c", function] if isinstance(function, str) else [function]
    if callable(function):
        what = ["-c", CALL_A_FUNCTION, function.__module__, function.__name__]
    command = [str(part) for part in (sys.executable, *python, *what, *arguments)]
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode_folder().name, "PYTHONIOENCODING": "utf-8"}
    environment.update({"PYTHONFAULTHANDLER": "1", "PYTHONPATH": str(HERE), **(env or {})})
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    options = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT, "cwd": cwd}
    process = subprocess.Popen(command, start_new_session=True, env=environment, **options)
    for seconds, end in [(120, signal.SIGABRT), (5, signal.SIGKILL), (None, None)]:
        try:
            printed = process.communicate(timeout=seconds)[0]
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, end)
    text = (printed or b"").decode(errors="replace")
    assert seconds == 120, f"{function} hung:\n{text}"
    status = process.returncode
    assert status == expect, f"{function} ended with {status}:\n{text}"
    return text


def fresh(test=None, **options):
    """Run the body of a test in a process of its own, and see that one process, and only one, comes to its end."""
    if test is None:
        return functools.partial(fresh, **options)
    if not UNDER_PYTEST:
        return test

    @functools.wraps(test)
    def wrapper(**arguments):
        printed = in_fresh_process(run_body_of, test.__name__, json.dumps(arguments, default=str), **options)
        assert printed.count(THE_END) == 1, printed

    return wrapper


def fresh_on_linux(test):
    return linux_only(fresh(test))


def run_body_of(name, arguments):
    stdout = os.dup(1)
    globals()[name](**json.loads(arguments))
    os.write(stdout, THE_END.encode())


def wait_until(condition, seconds=10):
    """Wait until ``condition()`` is true; fail after a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not true after {seconds} s: {condition}"
        time.sleep(0.001)


def open_descriptors():
    numbers = []
    for number in sorted(map(int, os.listdir("/dev/fd"))):
        with contextlib.suppress(OSError):  # the one by which they were listed is not open any more
            os.fstat(number)
            numbers.append(number)
    return numbers


def bulks():
    """The files for large results that this process holds (Linux)."""
    return [number for number in open_descriptors() if "memfd:mem_isolate" in os.readlink(f"/proc/self/fd/{number}")]


def assert_no_child_is_left():
    raised(ChildProcessError, os.waitpid, -1, os.WNOHANG)


def is_gone(pid):
    """Whether no process has this id, not even a zombie."""
    with contextlib.suppress(ProcessLookupError):
        return os.kill(pid, 0)
    return True


def shared_numbers(count):
    """Integers in memory that this process shares with every process forked from now on, all 0."""
    return (ctypes.c_longlong * count).from_buffer(mmap.mmap(-1, 8 * count))


def state_of_the_caller():
    return {
        "descriptors": open_descriptors(),
        "blocked": sorted(map(int, signal.pthread_sigmask(signal.SIG_BLOCK, []))),
        "handlers": {int(number): signal.getsignal(number) for number in signal.valid_signals()},
        "threads": threading.active_count(),
        "collector": gc.get_threshold(),
    }


@contextlib.contextmanager
def background_threads(*bodies):
    """Call each body over and over, in a thread of its own, until the block ends."""
    stopped = threading.Event()

    def repeat(body):
        while not stopped.is_set():
            body()

    with concurrent.futures.ThreadPoolExecutor(max(len(bodies), 1)) as pool:
        repeated = [pool.submit(repeat, body) for body in bodies]
        try:
            yield
        finally:
            stopped.set()
    assert [thread.result() for thread in repeated] == [None] * len(bodies)


def in_thread(function):
    """What ``function()`` returns or raises in a thread of its own."""
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="caller") as pool:
        return pool.submit(function).result()


def burn_the_gil():
    for _ in range(10_000):
        pass


def start_a_thread_of_c():
    """A thread that the interpreter does not know, and that takes the signals which the only one it knows blocks."""
    lock = ctypes.create_string_buffer(64)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(lock))  # the thread waits there for ever
    LIBC.pthread_mutex_lock(lock)
    assert LIBC.pthread_create(ctypes.byref(ctypes.c_ulong()), None, LIBC.pthread_mutex_lock, lock) == 0


def become_the_reaper_of_orphans():
    """Let orphans of this process's children become its own (Linux), so that it sees them end."""
    if sys.platform.startswith("linux"):
        assert LIBC.prctl(36, 1, 0, 0, 0) == 0  # PR_SET_CHILD_SUBREAPER


def reap_all(*_):
    """Reap every child and orphan that has ended; return whether none is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True


def kibibytes(file, field):
    """The sum of a field's values, in KiB, in a file like /proc/meminfo."""
    return sum(int(value) for value in re.findall(rf"^{field}:\s+(\d+) kB", Path(file).read_text(), re.MULTILINE))


def mappings():
    return Path("/proc/self/maps").read_text().splitlines() if sys.platform.startswith("linux") else []


def leave_address_space(extra):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + extra, hard))


def square(number):
    return number * number


def raise_it(error):
    raise error


def raised(kind, function, *arguments, **keywords):
    """The exception of this kind that calling the function raises."""
    try:
        function(*arguments, **keywords)
    except kind as error:
        return error
    raise AssertionError(f"{kind} was not raised")


def kill_self(number):
    os.kill(os.getpid(), number)


def changed(something, **attributes):
    """An exception or something else, with attributes that differ from what it was made with."""
    for name, value in attributes.items():
        setattr(something, name, value)
    return something


class Interrupt(
    TimeoutError, BlockingIOError, ProcessLookupError, PermissionError, EOFError, KeyError, ValueError, RuntimeError
):
    """What signal handlers of these tests raise: all that the module itself expects in some places."""


def interrupt(*_):
    raise Interrupt


class OnPickle:
    """A result on whose pickling something happens."""

    def __init__(self, function, *arguments):
        self.reduce = functools.partial(function, *arguments)

    def __reduce__(self):
        return self.reduce()


@functools.lru_cache(None)
def patterned(size, seed=0):
    return random.Random(seed).getrandbits(8 * size).to_bytes(size, "little") if size else b""


class Holder:
    """Holds a buffer that protocol 5 pickles out of band, as the pickle module's own example does."""

    def __init__(self, buffer):
        self.buffer = buffer

    def __reduce_ex__(self, protocol):
        return Holder, (pickle.PickleBuffer(self.buffer),)

    def __eq__(self, other):
        return isinstance(other, Holder) and memoryview(self.buffer) == memoryview(other.buffer)


def holder_of(size, seed=0):
    return Holder(bytearray(patterned(size, seed)))


def exception_state(error):
    """What an exception carries besides traceback and chain: args, attributes, what C keeps, the members of a group.

    Except ``AttributeError.obj``, the object that had no such attribute, which can be anything, a module for example.
    """
    slots = {name for kind in type(error).__mro__ for name in vars(kind) if inspect.isdatadescriptor(vars(kind)[name])}
    slots -= {"obj"} if isinstance(error, AttributeError) else set()
    state = {name: getattr(error, name, "unset") for name in slots if name[0] != "_"}
    state.update(vars(error), args=error.args)
    for name in {"args", "exceptions"} & set(state):
        state[name] = deep_state(state[name])
    return type(error), state


def deep_state(value):
    if isinstance(value, (tuple, list)):
        return [deep_state(item) for item in value]
    return exception_state(value) if isinstance(value, BaseException) else value


def checked(kind, error):
    """The error, seen to be of exactly this class and to survive pickling and copying."""
    assert type(error) is kind, repr(error)
    twins = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for twin in [*twins, copy.copy(error), copy.deepcopy(error)]:
        assert (str(twin), repr(exception_state(twin))) == (str(error), repr(exception_state(error)))
    return error


def failure(kind, function, *arguments, **keywords):
    """The error of this class that isolating the function raises."""
    return checked(kind, raised(MemIsolateError, call, function, *arguments, **keywords))


# ------------------------------------------------------------------------------------------------------- Public face


def test_every_public_name_is_there_and_documented_and_errors_form_the_promised_tree():
    functions = ["execute_in_isolated_process", "execute_in_isolated_process_async", "isolated", "use_huge_pages"]
    tree = {
        "CallableDidNotExecuteError": ["RegionCreationError", "ForkError", "ChildSetupError"],
        "CallableExecutedError": ["SerializationError", "DeserializationError", "ResultDeliveryError"],
        "CallableStatusUnknownError": ["KilledBySignalError", "UnexpectedExitStatusError", "WaitError"],
    }
    bases = {"MemIsolateError": (Exception,), **dict.fromkeys(tree, (MemIsolateError,))}
    bases.update({name: (getattr(mem_isolate, kind),) for kind, names in tree.items() for name in names})
    bases["CallableTimeoutError"] = (CallableStatusUnknownError, TimeoutError)
    assert sorted(mem_isolate.__all__) == sorted([*bases, *functions])
    assert [name for name in mem_isolate.__all__ if not inspect.getdoc(getattr(mem_isolate, name))] == []
    assert re.match(r"\d+\.\d+", mem_isolate.__version__)
    assert {name: getattr(mem_isolate, name).__bases__ for name in bases} == bases
    assert {getattr(mem_isolate, name).__module__ for name in bases} == {"mem_isolate"}


def test_it_uses_only_the_standard_library_and_forks_only_through_libc():
    nodes = list(ast.walk(ast.parse(Path(mem_isolate.__file__).read_text(encoding="utf-8"))))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    if hasattr(sys, "stdlib_module_names"):
        assert imported - sys.stdlib_module_names <= {"typing_extensions"}
    assert imported & {"multiprocessing", "subprocess", "pty", "_posixsubprocess", "_multiprocessing"} == set()
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    used = {node.attr for node in attributes if node.value.id in ("os", "posix")}
    banned = {"fork", "forkpty", "_exit", "wait", "waitpid", "wait3", "wait4", "pipe", "pipe2", "popen", "system"}
    assert used & banned == set()


def test_repository_holds_only_the_promised_files():
    git = ["git", "-C", str(HERE), "ls-files"]
    listed = subprocess.run(git, stdout=subprocess.PIPE, check=False, text=True) if shutil.which("git") else None
    if not (HERE / ".git").exists() or listed is None or not listed.stdout:
        pytest.skip("not a checkout that git lists")
    files = {"mem_isolate.py", "test_mem_isolate.py", "bench.py", "README.md", "LICENSE"}
    assert {name for name in listed.stdout.split() if not name.startswith(".")} == files


@cases(
    "missing, action, word",
    # Windows has neither of these modules: an import that stumbles over one of them has not said why.
    ("sys.platform = 'win32'; sys.modules['fcntl'] = sys.modules['resource'] = None", "", "Windows"),
    ("import ctypes; del ctypes.PyDLL, ctypes.pythonapi", "", "PyDLL"),
    ("sys.platform = 'darwin'", "mem_isolate.isolated(memory_limit=1 << 30)(print)", "memory_limit"),
    ("sys.platform = 'freebsd14'", "mem_isolate.isolated(memory_limit=1 << 30)(print)", "memory_limit"),
)
def test_what_a_system_cannot_do_is_refused_on_import_or_when_decorating(missing, action, word):
    code = f"import sys; {missing}\ntry: import mem_isolate; {action}\nexcept {{}} as error: print('refused:', error)"
    printed = in_fresh_process(code.format("NotImplementedError" if action else "ImportError"))
    assert printed.startswith("refused:") and word in printed


def fill_descriptors_and_go_wrong(path, function, first=3):
    os.closerange(first, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    number = os.open(path, os.O_RDWR | os.O_CREAT)
    while number < 600:
        number = os.dup(number)
    function()


@fresh
def test_it_does_without_what_only_linux_has(tmp_path):
    """Without memfd, pidfd and the like, as on macOS: by an unlinked temporary file, and libc's waiting alone."""
    missing = [(os, "memfd_create pidfd_open preadv"), (signal, "pidfd_send_signal SIGRTMIN SIGRTMAX")]
    for place, names in [*missing, (time, "clock_gettime")]:
        for name in names.split():
            vars(place).pop(name, None)
    tempfile.tempdir, tmp_path, sys.platform = tmp_path, Path(tmp_path), "darwin"
    module = imported_anew()
    anew = module.execute_in_isolated_process
    for module._libc_memfd_create in (module._libc_memfd_create, None):
        for size in (0, 5, 60_000, 70_000, 5_000_000):
            assert anew(bytearray, size) == bytearray(size)
        raised(module.UnexpectedExitStatusError, anew, os._exit, 7)
        raised(module.KilledBySignalError, anew, kill_self, signal.SIGTERM)
        raised(KeyError, anew, raise_it, KeyError(1))
        late = raised(module.CallableTimeoutError, module.isolated(go_wrong, timeout=0.5), time.sleep, 60)
        assert "in go_wrong" in str(late)
        raised(module.KilledBySignalError, anew, fill_descriptors_and_go_wrong, tmp_path / "precious", SEGFAULT)
        assert (tmp_path / "precious").read_bytes() == b""
        assert os.listdir(tmp_path) == ["precious"]
    posix.unlink = lambda path: os.rename(path, tmp_path / "as NFS does")
    assert anew(bytes, 5_000_000) == bytes(5_000_000)
    module._libc_eventfd = None
    pieces = [bytes([number % 256]) * 70_000 for number in range(400)]  # more than a socket takes messages
    assert anew(lambda: pieces) == asyncio.run(module.execute_in_isolated_process_async(lambda: pieces)) == pieces
    before, items = open_descriptors(), module.isolated(countdown)(9)
    assert next(items) == 9
    os.close(max(open_descriptors()))  # one that cannot be closed again does not keep the others open
    items.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("value", [None, 5, "len", [int]], ids=str)
def test_a_non_callable_is_a_type_error_before_anything_is_forked(value, monkeypatch):
    monkeypatch.setattr(mem_isolate, "_libc_fork", lambda: pytest.fail("forked"))
    attempts = [lambda: call(value), lambda: asyncio.run(call_async(value)), lambda: isolated(timeout=5)(value)]
    if value is not None:  # isolated(None) is isolated() with no option set
        attempts.append(lambda: isolated(value))
    for attempt in attempts:
        assert type(value).__name__ in str(raised(TypeError, attempt))
    for attempt in (call, lambda: call(callable=len)):
        raised(TypeError, attempt)


@cases(
    "option, error, values",
    ("timeout", ValueError, [0, -0.5, fractions.Fraction(-1, 2), math.inf, math.nan, 10**400]),
    ("timeout", TypeError, ["1", [1], 1j, True]),
    ("memory_limit", ValueError, [0, -1, -(2**70)]),
    ("memory_limit", TypeError, ["64M", 1.5, 64e6, [1], True]),
    ("tiemout", TypeError, [1]),
)
def test_bad_option_is_refused_when_decorating(option, error, values):
    for value in values:
        assert option in str(raised(error, isolated, **{option: value}))


def pid_and_arguments(*arguments, **named):
    return os.getpid(), arguments, named


async def pid_and_arguments_async(*arguments, **named):
    await asyncio.sleep(0)
    return os.getpid(), arguments, named


def test_every_keyword_argument_is_the_callables():
    named = dict.fromkeys(["timeout", "memory_limit", "callable", "self", "function", "func", "args", "kwargs"], 1)
    assert call(dict, **named) == asyncio.run(call_async(dict, **named)) == named
    for decorate in (isolated, isolated(timeout=60)):
        assert decorate(pid_and_arguments)(1, **named)[1:] == ((1,), named)
        assert asyncio.run(decorate(pid_and_arguments_async)(1, **named))[1:] == ((1,), named)


def test_memory_mutation():
    """Memory of four kinds: a class's, an argument's, C's and a closure's."""
    argument, buffer, enclosed = [], (ctypes.c_int * 1)(), 0

    def read():
        return [Kept.alive, len(argument), buffer[0], enclosed]

    def add_one_to_each(argument):
        nonlocal enclosed
        Kept.alive, buffer[0], enclosed = Kept.alive + 1, buffer[0] + 1, enclosed + 1
        return argument.append(1) or read()

    assert call(add_one_to_each, argument) == call(add_one_to_each, argument) == [1] * 4
    assert read() == [0] * 4


def test_callable_and_arguments_are_never_pickled(tmp_path):
    started, unpicklable = iter([1, 2]), OnPickle(raise_it, ValueError("an argument was pickled"))
    next(started)
    seen = call(lambda argument, *, key: (id(argument), id(key)), started, key=LIBC.malloc)
    assert seen == (id(started), id(LIBC.malloc))
    assert call(lambda *arguments: len(arguments), unpicklable, threading.Lock()) == 2
    assert call(started.__next__) == 2
    with open(tmp_path / "file", "w+") as stream:
        call(lambda: stream.write("from the child") and stream.flush())
        assert (tmp_path / "file").read_text() == "from the child"


class CallableObject:
    """Adds."""

    def __init__(self, number):
        self.number = number

    def __call__(self, other: int, *, times: int = 1) -> int:
        """Add it."""
        return (self.number + other) * times


@cases(
    "function, arguments, result",
    ("builtin", len, ("four",), 4),
    ("bound in C", "a-b".split, ("-",), ["a", "b"]),
    ("getter", operator.itemgetter(1), ("ab",), "b"),
    ("partial", functools.partial(functools.partial(pow, 2), 5), (), 32),
    ("class", fractions.Fraction, (1, 3), fractions.Fraction(1, 3)),
    ("object", CallableObject(2), (5,), 7),
    ("bound", CallableObject(2).__call__, (5,), 7),
    ("lambda", lambda n: n + 1, (5,), 6),
    ("isolated", isolated(abs), (-5,), 5),
    ("no options", isolated(timeout=None, memory_limit=None)(abs), (-5,), 5),
)
def test_any_callable_can_be_isolated_and_keeps_its_looks(function, arguments, result):
    for wrapped in (isolated(function), isolated()(function), isolated(timeout=60)(function)):
        assert wrapped.__wrapped__ is function
        for attribute in ("__name__", "__qualname__", "__doc__", "__module__"):
            if hasattr(function, attribute):
                assert getattr(wrapped, attribute) == getattr(function, attribute)
        with contextlib.suppress(ValueError):  # some builtins have none
            signature = inspect.signature(function)
            assert inspect.signature(wrapped) == signature
        assert wrapped(*arguments) == call(function, *arguments) == result


@isolated
def isolated_function(number: int, *, mark: str = "!") -> tuple:
    """Tell what arrived."""
    return os.getpid(), number, mark


class Methods:
    """Of every kind, isolated inside and outside of what makes them that."""

    @isolated
    def method(self, number: int, *, mark: str = "!") -> tuple:
        """Tell what arrived."""
        return os.getpid(), type(self).__name__, number, mark

    @isolated(timeout=60)
    @classmethod
    def class_method(cls, number: int, *, mark: str = "!") -> tuple:
        """Tell what arrived."""
        return os.getpid(), cls.__name__, number, mark

    @isolated
    @staticmethod
    async def async_static_method(number: int, *, mark: str = "!") -> tuple:
        """Tell what arrived."""
        return os.getpid(), number, mark

    @staticmethod
    @isolated(timeout=60)
    def static_method(number: int, *, mark: str = "!") -> tuple:
        """Tell what arrived."""
        return os.getpid(), number, mark


METHODS = [name for name in vars(Methods) if name.endswith("method")]


@pytest.mark.parametrize("name", ["isolated_function", *[f"Methods.{name}" for name in METHODS]])
def test_functions_and_methods_keep_their_looks_and_are_pickled_by_name(name):
    function = operator.attrgetter(name)(sys.modules[__name__])
    assert (function.__qualname__, function.__module__, function.__doc__) == (name, __name__, "Tell what arrived.")
    assert inspect.iscoroutinefunction(function) is ("async" in name)
    first = "self, " if name == "Methods.method" else ""
    assert str(inspect.signature(function)) == f"({first}number: int, *, mark: str = '!') -> tuple"
    assert typing.get_type_hints(function) == {"number": int, "mark": str, "return": tuple}
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        data = pickle.dumps(function, protocol)
        assert pickle.loads(data) == function
        assert len(data) < 150, "not by name"


@pytest.mark.parametrize("owner", [Methods, type("Inherited", (Methods,), {})])
@pytest.mark.parametrize("name", METHODS)
def test_methods_of_every_kind_are_bound_as_any_other(owner, name):
    methods = [getattr(owner(), name)]
    methods.append(functools.partial(owner.method, owner()) if name == "method" else getattr(owner, name))
    if owner is Methods:
        methods.append(pickle.loads(pickle.dumps(methods[0])))
    for method in methods:
        outcome = method(1, mark="?")
        pid, *arguments = asyncio.run(outcome) if inspect.iscoroutine(outcome) else outcome
        assert pid != os.getpid()
        assert arguments == [*([] if "static" in name else [owner.__name__]), 1, "?"]


def test_async_callables_of_other_kinds_stay_awaitable():
    partial = functools.partial(pid_and_arguments_async, 2)
    assert asyncio.run(isolated(partial)(3))[1] == asyncio.run(call_async(partial, 3))[1] == (2, 3)
    assert asyncio.run(isolated(timeout=60)(Methods.async_static_method)(3))[1:] == (3, "!")
    caller = type("AsyncCallable", (), {"__call__": lambda self, *arguments: pid_and_arguments_async(*arguments)})()
    assert asyncio.run(call_async(caller, 3))[1] == (3,)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@stress
@fresh(python=["-W", "ignore::DeprecationWarning"])
def test_isolated_functions_can_be_sent_through_multiprocessing(method):
    with multiprocessing.get_context(method).Pool(1) as pool:  # workers are daemons, which it itself refuses children
        for function in (isolated_function, Methods().method, Methods.class_method, Methods.static_method):
            assert pool.apply_async(function, [5]).get(60)[-2:] == (5, "!")


def test_cloudpickle_keeps_closure_and_options():
    cloudpickle = pytest.importorskip("cloudpickle")
    five = 5

    async def asynchronous():
        return five

    for decorate in (isolated, isolated(timeout=60)):
        assert cloudpickle.loads(cloudpickle.dumps(decorate(lambda: five)))() == 5
        assert asyncio.run(cloudpickle.loads(cloudpickle.dumps(decorate(asynchronous)))()) == 5
    limited = cloudpickle.loads(cloudpickle.dumps(isolated(timeout=0.05)(lambda: time.sleep(60))))
    assert raised(CallableTimeoutError, limited).timeout == 0.05


TYPED_SAMPLE = """\
import signal
from typing import Any, Callable, Coroutine, Iterator, Optional, Union
import mem_isolate
from mem_isolate import execute_in_isolated_process, execute_in_isolated_process_async, isolated

def scale(number: int, by: float = 2.0, *, unit: str = "m") -> str: return f"{number * by} {unit}"
async def fetch(address: str, *, retries: int = 3) -> bytes: return address.encode() * retries
@isolated
def count(to: int) -> Iterator[int]: yield from range(to)
@isolated(timeout=5, memory_limit=1 << 30)
def limited(number: int) -> str: return str(number)
class Parser:
    @isolated
    def method(self, number: int) -> str: return str(number)
    @classmethod
    @isolated(timeout=1)
    async def class_method(cls, number: int) -> str: return str(number)

text: str = isolated(scale)(1, by=3.0, unit="km") + execute_in_isolated_process(scale, 1, by=3.0)
text = isolated(timeout=None)(scale)(1, 3.0) + isolated(lambda number: str(number))(1) + limited(1)
text = Parser().method(1) + mem_isolate.__version__
number: int = max(count(3)) + isolated(len)("four") + mem_isolate.use_huge_pages()
function: Callable[[int], str] = isolated(limited)
asynchronous: Callable[[str], Coroutine[Any, Any, bytes]] = isolated(fetch)

async def main() -> None:
    data: bytes = await isolated(fetch)("here", retries=2) + await execute_in_isolated_process_async(fetch, "here")
    text: str = await execute_in_isolated_process_async(scale, 1, by=3.0) + await Parser.class_method(1)
    async for number in await execute_in_isolated_process_async(count, 3): print(number + 1)
    for number in await execute_in_isolated_process_async(count, 3): print(number)  # refused
    (await execute_in_isolated_process_async(fetch, "here")).nothing  # refused
    (await execute_in_isolated_process_async(scale, 1)).nothing  # refused
    await execute_in_isolated_process_async(fetch, 5)  # refused

limited("one")  # refused
execute_in_isolated_process(scale, 1, colour="red")  # refused
Parser.class_method("one")  # refused
isolated(timeout="5")  # refused
wrong: int = isolated(scale)(1)  # refused

def attributes(killed: mem_isolate.KilledBySignalError, late: mem_isolate.CallableTimeoutError) -> float:
    number: Union[signal.Signals, int] = killed.signal
    memory: Optional[int] = killed.peak_memory
    as_builtin: TimeoutError = late
    return late.timeout
"""


@pytest.mark.parametrize("checker, options", [("mypy", ["--strict", "--cache-dir", ".cache"]), ("pyright", [])])
def test_type_checkers_know_parameters_results_and_options(checker, options, tmp_path):
    pytest.importorskip(checker)
    if subprocess.call([sys.executable, "-m", checker, "--version"]):
        pytest.skip(f"{checker} does not start here")  # pyright fetches what it is made of
    shutil.copy(mem_isolate.__file__, str(tmp_path / "mem_isolate.py"))
    (tmp_path / "sample.py").write_text(TYPED_SAMPLE)
    command = [sys.executable, "-m", checker, *options, "sample.py", "mem_isolate.py"]
    process = subprocess.run(command, cwd=str(tmp_path), capture_output=True, check=False, text=True, timeout=200)
    lines = enumerate(TYPED_SAMPLE.splitlines(), 1)
    refused = {("sample.py", str(number)) for number, line in lines if line.endswith("# refused")}
    complaints = set(re.findall(r"(\w+\.py):(\d+)(?::\d+ -|:) error: ", process.stdout))
    assert complaints == refused, process.stdout + process.stderr


def test_tour_shows_that_all_of_it_works_and_version_and_help_are_told():
    file = Path(mem_isolate.__file__)
    printed, text = in_fresh_process(file), file.read_bytes()
    for fact in ["256 MiB", "RSS", "SIGSEGV", "global", "random", "Traceback", "64 MiB"]:
        assert fact in printed
    assert len(re.findall(r"\d ?(?:ms|s)\b", printed)) >= 5, printed
    date = re.search(rf"^# {re.escape(mem_isolate.__version__)} \((\S+)\)", text.decode(), re.MULTILINE).group(1)
    told = f"mem_isolate {mem_isolate.__version__} ({date}) sha256 {hashlib.sha256(text).hexdigest()}\n"
    assert in_fresh_process(file, "--version") == told
    assert "--version" in in_fresh_process(file, "--help")


PAGE_FAULTS_OF_A_CALL = """
import os, resource, statistics
from mem_isolate import _libc_exit, _libc_fork, isolated
def faults(call):
    def count():
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt
        call()
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_minflt - before
    return statistics.median(count() for _ in range(20))
print(int(faults(isolated(int)) - faults(lambda: os.waitpid(_libc_fork() or _libc_exit(0), 0))))
"""


@linux_only
def test_protection_costs_a_single_threaded_process_few_page_faults():
    # In a process that has imported nothing else: how many pages its objects are strewn over decides too.
    faults = in_fresh_process(PAGE_FAULTS_OF_A_CALL, env={"PYTHONFAULTHANDLER": ""})
    # Before 3.11 a child is guarded more heavily.
    assert int(faults) <= (127 if sys.version_info >= (3, 11) else 147)


# ----------------------------------------------------------------------------------------------------------- Results


def test_result_comes_back_equal_of_the_same_type_and_with_its_shared_and_circular_references():
    values = [None, Ellipsis, NotImplemented, True, -1.5, 1 << 20_000, "", "\0 \ud800 €", (), b"", bytearray(b"x")]
    values += [{1: {"a": [{2, 3}, frozenset("ab")]}}, types.SimpleNamespace(a=[1]), ValueError, ForkError, raise_it]
    values += [[b"a" * 70_000, bytearray(300_000), ""] * 3, list(map(str, range(200_000))), b"123 " * 25_000_000]
    for value in values:
        result = call(lambda value=value: value)
        assert type(result) is type(value)
        assert result == value
    shared = [holder_of(100_000), bytearray(BULK)] * 2
    shared.append(shared)
    result = call(lambda: shared)
    assert result[0] is result[2] and result[1] is result[3] and result[4] is result


@cases(
    "make",
    ("bytes", lambda size: patterned(2 * MIB)[:size]),
    ("str", lambda size: patterned(2 * MIB).hex()[:size]),
    ("writable buffer", lambda size: Holder(bytearray(patterned(2 * MIB)[:size]))),
    ("read-only buffer", lambda size: Holder(patterned(2 * MIB)[:size])),
)
def test_results_of_every_size_come_back_whole(make):
    for power, more in itertools.product([0, 6, 8, 11, 12, 13, 14, 15, 16, 17, 20, 21], [-1, 0, 1]):
        value = make(2**power + more)
        result = call(copy.copy, value)
        assert type(result) is type(value) and result == value, (power, more)


SIZES = [[0], [1, 0, 4096], [100, BULK, 0, 5000], [10] * 3000, [70_000] * 20, [70_000], [100_000, 80_000]]
SIZES += [[200_000, 300_000], [262_143], [262_144], [0, 1, 65_535, 65_536, 65_537, 7, MIB + 3, 0, 4095, 200_001, 4097]]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("in_stream", [0, 70_000, 500_000, 1_225_000])
def test_out_of_band_buffers_come_back_in_order_whole_and_writable(sizes, in_stream):
    """Whichever is the largest: the stream or a buffer; each may be inline, in the bulk, mapped or read from there."""
    contents = [patterned(size, seed) for seed, size in enumerate(sizes)]
    lines = [f"{number:01000}" for number in range(in_stream // 1000)]
    same, result, read_only = call(
        lambda: (lines, [Holder(bytearray(content)) for content in contents], [*map(Holder, contents)])
    )
    assert same == lines
    assert [bytes(holder.buffer) for holder in result] == contents == [bytes(holder.buffer) for holder in read_only]
    for holder in result:
        view = memoryview(holder.buffer)
        assert not view.readonly
        view[:1] = b"!"[: len(view)]


def deeply_nested(depth=200_000):
    return functools.reduce(lambda value, _: [value], range(depth), [])


class StrRaises(Exception):
    def __str__(self):
        raise ZeroDivisionError("str of an exception")

    __repr__ = __str__

    def with_traceback(self, frames):
        raise ValueError("no traceback for you")


@cases(
    "word, make",
    ("generator", lambda: (number for number in [1])),
    ("lock", threading.Lock),
    ("function", lambda: lambda: None),
    ("memoryview", lambda: memoryview(b"x")),
    ("LocalClass", lambda: [1, {"key": type("LocalClass", (), {})()}]),
    ("contiguous", lambda: pickle.PickleBuffer(memoryview(bytearray(MIB))[::2])),
    ("recursion", deeply_nested),
    ("not today", lambda: OnPickle(raise_it, ValueError("not today"))),
    ("not now", lambda: OnPickle(raise_it, SystemExit("not now"))),
    ("not ever", lambda: OnPickle(raise_it, KeyboardInterrupt("not ever"))),
    ("OnPickle", lambda: OnPickle(raise_it, StrRaises())),
    ("PicklesAs", lambda: OnPickle(raise_it, PicklesAs(sys.exit))),
    ("of type OnPickle", lambda: OnPickle(raise_it, PicklesAs(lambda: (int, ("5",))))),
    ("cannot be pickled", lambda: OnPickle(raise_it, PicklesAs(lambda: (raise_it, (ValueError("no unpickling"),))))),
)
def test_a_result_that_cannot_be_pickled_is_told(word, make):
    assert word.lower() in str(failure(SerializationError, make)).lower()


def rebuild(error, only_outside=None):
    if os.getpid() != only_outside:
        raise error


@pytest.mark.parametrize("everywhere", [True, False], ids=["nowhere", "only in the child"])
@pytest.mark.parametrize("more", ["", "x" * BULK], ids=["small", "large"])
def test_a_result_that_cannot_be_rebuilt_is_told_and_keeps_no_descriptor(everywhere, more):
    def make():
        return OnPickle(lambda: (rebuild, (ZeroDivisionError("rebuilding"), None if everywhere else os.getpid()))), more

    before = open_descriptors()
    error = failure(DeserializationError, make)
    assert isinstance(error.__cause__, ZeroDivisionError)
    assert "rebuilding" in str(error)
    assert open_descriptors() == before and error.__traceback__


@fresh_on_linux
def test_result_is_private_memory_of_the_parent():
    """A later child cannot change it, and the parent may."""
    wanted = [b"a" * size for size in (1000, 70_000, 4 * MIB, 4 * MIB)]
    results = call(lambda: [Holder(bytearray(content)) for content in wanted])

    def change_in_a_later_child():
        for result in results:
            result.buffer[:] = b"c" * len(result.buffer)
        scribble_over_all_that_is_shared("100")

    call(change_in_a_later_child)
    assert [bytes(result.buffer) for result in results] == wanted
    for result in results[::2]:
        result.buffer[:] = b"e" * len(result.buffer)
    expected = [{ord("e")}, {ord("a")}] * 2
    assert call(lambda: [set(result.buffer) for result in results]) == expected
    assert [set(result.buffer) for result in results] == expected


def scribble_over_all_that_is_shared(pattern):
    for addresses, permissions, *_ in map(str.split, mappings()):
        if permissions.startswith("rw") and permissions.endswith("s"):
            first, last = (int(address, 16) for address in addresses.split("-"))
            if pattern == "random":
                ctypes.memmove(first, patterned(4096, last - first), 4096)
            else:
                ctypes.memset(first, int(pattern), min(last - first, 1 << 20))
    for descriptor in open_descriptors()[3:]:
        with contextlib.suppress(OSError):
            os.pwrite(descriptor, b"junk" * (os.fstat(descriptor).st_size // 4), 0)
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 1 << 16)


READY_GO_DONE = shared_numbers(3)


def let_the_attack_begin():
    READY_GO_DONE[1] = 1
    wait_until(lambda: READY_GO_DONE[2])


@pytest.mark.parametrize("attack", ["write", "truncate", "map"])
@fresh_on_linux
def test_living_grandchild_cannot_change_the_result(attack):
    def attack_every_descriptor():
        """Spoil whatever descriptor this process holds, once the parent is rebuilding the result."""
        mapped, descriptors = [], open_descriptors()[3:]
        for descriptor in descriptors if attack == "map" else []:
            with contextlib.suppress(OSError, ValueError):
                os.ftruncate(descriptor, 4 * MIB)
                mapped.append(mmap.mmap(descriptor, 4 * MIB))
        READY_GO_DONE[0] = 1
        wait_until(lambda: READY_GO_DONE[1], seconds=30)
        with open("/dev/zero", "rb", buffering=0) as zeros:
            for mapping in mapped:
                with contextlib.suppress(OSError):  # what would be SIGBUS, were it written to by hand
                    zeros.readinto(mapping)
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0) if attack == "truncate" else os.pwrite(descriptor, bytes(4 * MIB), 0)
        READY_GO_DONE[2] = 1

    def leave_an_attacker_and_return(make):
        if not os.fork():
            try:
                attack_every_descriptor()
            finally:
                os._exit(0)
        wait_until(lambda: READY_GO_DONE[0])
        return [OnPickle(lambda: (let_the_attack_begin, ())), holder_of(100_000), make(3 * MIB)]

    for make in (holder_of, patterned):
        READY_GO_DONE[:] = [0] * 3
        _, holder, large = call(leave_an_attacker_and_return, make)
        assert READY_GO_DONE[2] and holder == holder_of(100_000) and large == make(3 * MIB)


@linux_only
@pytest.mark.parametrize("sizes", [[3 * MIB], [100_000]])
def test_result_that_a_child_cuts_short_is_an_error(sizes):
    def return_and_truncate():
        sys.stdout = types.SimpleNamespace(flush=lambda: [os.ftruncate(bulk, 0) for bulk in bulks()])
        return list(map(holder_of, sizes))

    assert isinstance(failure(DeserializationError, return_and_truncate).__cause__, EOFError)


def test_other_threads_run_while_what_held_a_large_result_is_freed(monkeypatch):
    """That takes a tenth of a second or more for some hundred MiB: so it is a close that does not keep the GIL."""
    closed, close = [], mem_isolate._libc.close
    monkeypatch.setattr(mem_isolate._libc, "close", lambda number: closed.append(number) or close(number))
    for form in itertools.islice(forms(lambda size: [holder_of(size)] * 3), 4):
        for size in (MIB, 100_000):
            assert len(form(size)) and closed
            closed.clear()


@fresh_on_linux
def test_keeping_one_of_ten_results_keeps_only_its_memory():
    def memory_in_use():
        """MiB: resident here, and shared memory of the whole system."""
        gc.collect()
        return [kibibytes("/proc/self/smaps", "Rss") // 1024, kibibytes("/proc/meminfo", "Shmem") // 1024]

    def wait_until_grown_by(least, most):
        """With time for other processes, which may use shared memory for a while."""
        wait_until(lambda: max(now - then for now, then in zip(memory_in_use(), before)) <= most)
        assert memory_in_use()[0] - before[0] >= least

    same, before = memoryview(patterned(4 * MIB)), memory_in_use()
    for position in (0, 9):
        holders = call(lambda: [holder_of(4 * MIB) for _ in range(10)])
        assert all(holder.buffer == same for holder in holders)  # reads, and so maps, every page
        wait_until_grown_by(38, 80)
        kept = holders[position]
        del holders
        wait_until_grown_by(3, 12)
        assert kept.buffer == same
        del kept
        wait_until_grown_by(-4, 3)


@linux_only
def test_large_results_are_not_copied_neither_buffers_in_the_parent_nor_text_in_the_child(caplog):
    before = kibibytes("/proc/self/status", "RssAnon")
    holder = call(lambda: Holder(bytearray(64 * MIB)))
    assert not any(holder.buffer[:: MIB // 4])
    assert kibibytes("/proc/self/status", "RssAnon") - before < 16 * 1024
    text = "€" * (32 * MIB)  # in UTF-8 that is 96 MiB
    with caplog.at_level(logging.DEBUG, "mem_isolate"):
        assert call(lambda: 5) == 5 and call(lambda: text) == text
    peak_of_a_number, peak_of_the_text = [record.peak_memory for record in caplog.records]
    assert peak_of_the_text - peak_of_a_number < 24 * MIB


def test_kept_results_use_few_mappings_and_no_descriptors():
    """A process may have 65,530 mappings."""
    descriptors, before = open_descriptors(), len(mappings())
    results = [call(holder_of, 100_000) for _ in range(30)] + call(lambda: [holder_of(100_000) for _ in range(1000)])
    assert open_descriptors() == descriptors and len(mappings()) - before < 10
    assert all(result == holder_of(100_000) for result in results)


@cases(
    "kind, make",
    ("Fortran order", lambda np: np.asfortranarray(np.arange(60_000.0).reshape(200, 300))),
    ("every other", lambda np: np.arange(240_000).reshape(400, 600)[::2, ::3]),
    ("unaligned", lambda np: np.frombuffer(bytearray(800_001), dtype="f8", offset=1)),
    ("structured", lambda np: np.zeros(20_000, dtype=[("when", "M8[s]"), ("what", "f4")])),
    ("objects", lambda np: np.array([1, "two", None] * 9000, dtype=object)),
    ("frozen", lambda np: np.frombuffer(patterned(800_000), dtype="i8")),
)
def test_arrays_come_back_writable_aligned_and_in_their_order(kind, make):
    np = pytest.importorskip("numpy")
    expected, (_, result) = make(np), call(lambda: (bytes(65_530), make(np)))
    assert (type(result), result.dtype, result.shape) == (type(expected), expected.dtype, expected.shape)
    assert (result == expected).all() and result.flags.aligned
    if expected.flags.f_contiguous or expected.flags.c_contiguous:
        assert result.flags.f_contiguous == expected.flags.f_contiguous
    if kind != "frozen":
        result[...] = np.zeros_like(result)


# -------------------------------------------------------------------------------------------------------- Exceptions


class TwoArguments(Exception):
    def __init__(self, code, text):
        super().__init__(f"{code}: {text}")
        self.code, self.text = code, text


class KeywordOnly(Exception):
    def __init__(self, *, path):
        super().__init__(f"no good: {path}")
        self.path = path


class WithSlots(Exception):
    __slots__ = ("unset", "obj")

    def __init__(self, where):
        super().__init__("slots")
        self.obj = where


class OwnNew(Exception):
    def __new__(cls, one, two):
        return super().__new__(cls, one)

    def __init__(self, one, two):
        self.two = two


class OwnNewGroup(getattr(builtins, "ExceptionGroup", Exception)):
    """As the documentation of ExceptionGroup has it."""

    def __new__(cls, errors, exit_code):
        return changed(super().__new__(cls, f"exit code: {exit_code}", errors), exit_code=exit_code)


class OneArgument(UnicodeDecodeError):
    def __init__(self, reason):
        super().__init__("utf-8", b"abc", 0, 1, reason)
        self.args = (reason,)


class AttemptError(OSError):
    """An OSError with its own ``__init__``, where C fills its fields in ``__init__`` and not in ``__new__``."""

    def __init__(self, attempt, number):
        super().__init__(number, os.strerror(number), "/path")
        self.attempt = attempt


class RefusesToCompare:
    def __eq__(self, other):
        raise ZeroDivisionError


class ReplyError(OSError):
    """Leaves to C nothing to fill in, as the errors of smtplib; and ``reply`` is of the class and of the object."""

    def __init__(self, code, text):
        self.args = (code, text)
        vars(self)["reply"] = text

    reply = property(lambda self: vars(self)["reply"])


class KeyedOSError(KeyError, OSError):
    """Two builtin bases, of which not the first but the second keeps something in C."""


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Refuses that any attribute of it be set, ``__traceback__`` and what pickle sets included."""

    code: int


def noted(error):
    if hasattr(error, "add_note"):
        error.add_note("seen before")
        error.add_note("twice")
    return changed(error, extra=[1, {"deep": (2,)}])


EXCEPTIONS = [
    *(ValueError(), ValueError("text", 2, None), KeyError("key"), noted(LookupError("x")), MemoryError("m")),
    *(changed(ValueError("old"), args=("new", 2)), ValueError(b"x" * BULK), ValueError(KeyError("inside"), [1])),
    *(GeneratorExit("g"), KeyboardInterrupt("k"), type("Interruption", (BaseException,), {})("no name leads to it")),
    *(SystemExit(), SystemExit("text"), changed(SystemExit(1), code=9)),
    *(StopIteration({"value": 1}), changed(StopIteration(1), value=2), StopAsyncIteration(1)),
    *(OSError("only text"), OSError(errno.EXDEV, "two files", "/a", None, "/b"), raised(OSError, os.stat, "/none")),
    *(changed(OSError(errno.EIO, "later"), filename="/later"), BlockingIOError(errno.EAGAIN, "again", 5)),
    changed(UnicodeDecodeError("utf-8", b"\xff\xfe", 0, 1, "invalid"), end=2, reason="other"),
    UnicodeTranslateError("text", 1, 2, "why"),
    *(SyntaxError("bad", ("file.py", 3, 4, "so(urce")), SyntaxError("made of anything", ("file.py", 3, [], "text"))),
    *(ModuleNotFoundError("no x", name="x", path="/x.py"), raised(AttributeError, lambda: os.nope)),
    raised(NameError, eval, "not_a_name"),
    *(subprocess.CalledProcessError(3, ["cmd"], b"out", b"err"), noted(json.JSONDecodeError("bad", "document", 3))),
    *(TwoArguments(1, "one"), noted(TwoArguments(2, "two")), KeywordOnly(path="/p"), WithSlots("here"), OwnNew(1, 2)),
    *(AttemptError(3, errno.EACCES), KeyedOSError(errno.ENOENT, "no such key", "/k"), FrozenError(4), StrRaises("s")),
    *(OneArgument("why"), changed(OSError("old"), args=(errno.ENOENT, "no file")), ReplyError(535, "no")),
]
if sys.version_info >= (3, 11):
    inner_group = builtins.ExceptionGroup("inner", [KeyError("k"), noted(OSError(2, "no file", "/x"))])
    EXCEPTIONS += [
        noted(builtins.ExceptionGroup("outer", [TwoArguments(1, "one"), inner_group])),
        builtins.BaseExceptionGroup("base", [KeyboardInterrupt(), SystemExit(4)]),
        OwnNewGroup([TwoArguments(1, "one"), KeyError()], 3),
    ]


@pytest.mark.parametrize("error", EXCEPTIONS, ids=lambda error: type(error).__name__)
def test_exception_arrives_with_its_type_args_attributes_and_notes(error):
    caught = raised(type(error), call, raise_it, error)
    assert exception_state(caught) == exception_state(error)
    if not isinstance(error, StrRaises):
        assert (str(caught), repr(caught)) == (str(error), repr(error))
    text = str(caught.__cause__)
    assert "Traceback (most recent call last)" in text and "in raise_it" in text


@fresh
def test_recursion_limit_leaves_room_for_the_callable_and_breaks_nothing_where_it_strikes():
    """Wherever that is, in parent or child, no child is left and none comes out of the call."""

    def descend(frames, function=int):
        return descend(frames - 1, function) if frames else function()

    assert sys.getrecursionlimit() == 1000
    assert call(descend, 900) == 0
    assert "in descend" in str(raised(RecursionError, call, descend, 2000).__cause__)
    outcomes, before = [], state_of_the_caller()
    for frames in [800, 900, *range(930, 1000)]:
        try:
            outcomes.append(descend(frames, lambda: call(int, "5")))
        except (RecursionError, MemIsolateError) as error:
            outcomes.append(type(error))
        assert state_of_the_caller() == before
        assert_no_child_is_left()
    assert outcomes[0] == 5 and outcomes[-1] is RecursionError


def fail_in_a_chain(link):
    try:
        try:
            raise_it(changed(KeyError("innermost"), lock=threading.Lock()))
        except KeyError as error:
            if link == "cause":
                raise OSError(2, "the middle") from error
            raise OSError(2, "the middle")
    except OSError:
        raise ValueError("outermost")


@pytest.mark.parametrize("link, words", [("cause", "direct cause"), ("context", "During handling")])
def test_cause_holds_the_childs_traceback_with_its_chain(link, words):
    """The chain travels as text only, so that what is in it need not be picklable."""
    caught = raised(ValueError, call, fail_in_a_chain, link)
    text = str(caught.__cause__)
    assert re.search(f"innermost.*{words}.*the middle.*During handling.*ValueError: outermost", text, re.DOTALL)
    assert text.count("in fail_in_a_chain") >= 3
    assert "raise_it(changed(KeyError" in text, "the source lines are missing"
    shown = "".join(traceback.format_exception(type(caught), caught, caught.__traceback__))
    assert mem_isolate.__file__ not in text
    assert "innermost" in shown and "in raised" in shown


class PicklesAs(OnPickle, Exception):
    """An exception on whose pickling something happens."""


@cases(
    "name, make",  # which is done in the child
    ("attribute", "ValueError", lambda: changed(ValueError("locked"), lock=threading.Lock())),
    ("class made in the child", "LocalError", lambda: type("LocalError", (Exception,), {})("nobody can import me")),
    ("reduce raises", "PicklesAs", lambda: PicklesAs(raise_it, ZeroDivisionError("no pickling"))),
    ("reduce exits", "PicklesAs", lambda: PicklesAs(sys.exit)),
    ("load raises", "PicklesAs", lambda: PicklesAs(lambda: (raise_it, (ZeroDivisionError("no unpickling"),)))),
    ("load raises outside", "PicklesAs", lambda: PicklesAs(lambda: (rebuild, (ZeroDivisionError(), os.getpid())))),
    ("loads int", "PicklesAs", lambda: PicklesAs(lambda: (int, ("5",)))),
    ("nonsense", "PicklesAs", lambda: PicklesAs(lambda: 5)),
)
def test_exception_that_cannot_travel_is_told_with_its_type_and_traceback(name, make):
    raised(ValueError, call, raise_it, PicklesAs(lambda: (ValueError, ("only the rest of its state cannot",))))
    told = str(failure(SerializationError, lambda: raise_it(make())))
    assert name in told and "Traceback (most recent call last)" in told and "in raise_it" in told


def test_nested_calls_and_their_errors_arrive_with_every_traceback():
    def nest(depth):
        return [os.getpid(), *(call(nest, depth - 1) if depth else [])]

    assert len({os.getpid(), *nest(4)}) == 5
    assert call(call, bytes, BULK) == bytes(BULK)
    caught = raised(TwoArguments, call, call, raise_it, TwoArguments(1, "one"))
    assert exception_state(caught) == exception_state(TwoArguments(1, "one"))
    assert "in raise_it" in str(caught.__cause__) and str(caught.__cause__).count("Traceback (most") >= 2
    error = failure(KilledBySignalError, call, kill_self, signal.SIGKILL)
    assert error.signal is signal.SIGKILL and "in execute_in_isolated_process" in str(error.__cause__)


def forms(function):
    """The forms that a call can have; the last two run an event loop."""

    async def generator(*arguments):
        yield function(*arguments)

    async def exhaust(*arguments):
        return [item async for item in isolated(generator)(*arguments)]

    yield functools.partial(call, function)
    yield isolated(function)
    yield lambda *arguments: list(isolated(lambda: (yield function(*arguments)))())
    yield lambda *arguments: asyncio.run(call_async(function, *arguments))
    yield lambda *arguments: asyncio.run(exhaust(*arguments))


def local_class(*bases):
    return type("LocalError", (*bases, Exception), {"__str__": lambda self: f"local {self.args}"})


class SetsItsState(Exception):
    def __setstate__(self, state):
        self.__dict__.update(state, restored=self.args)


def test_an_exception_of_a_class_that_nobody_can_import_arrives_as_itself():
    """One that was there at the fork is found by identity, also where others have its name."""
    for cls in (local_class(), local_class(KeyError), local_class(OSError)):
        error = cls(5, "five")
        error.attribute = {"kept": True}
        for form in forms(raise_it):
            arrived = raised(cls, form, error)
            assert type(arrived) is cls and arrived.args == (5, "five") and arrived.attribute == {"kept": True}
            assert type(raised(ValueError, form, ValueError(error)).args[0]) is cls
    for form in forms(lambda: raise_it(local_class()("from the child"))):  # of a class that was made there
        assert "LocalError: local ('from the child',)" in str(raised(SerializationError, form))
    for end in (pytest.fail, pytest.skip):  # whose classes cannot be found by name either
        error = raised(end.Exception, call, end, "why")
        assert type(error) is end.Exception and error.msg == "why"
    for form in forms(raise_it):
        error = changed(SetsItsState("told"), attribute=[1])
        assert vars(raised(SetsItsState, form, error)) == {"attribute": [1], "restored": ("told",)}
    assert type(raised(OSError, call, raise_it, OSError(RefusesToCompare())).args[0]) is RefusesToCompare


@pytest.mark.parametrize("registered", ["", "another copy"])
def test_exceptions_arrive_where_sys_modules_does_not_hold_this_very_module(registered, monkeypatch):
    specification = importlib.util.spec_from_file_location("of_a_plugin", mem_isolate.__file__)
    plugin = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(plugin)
    if registered:
        monkeypatch.setitem(sys.modules, "of_a_plugin", mem_isolate)
    for error in (KeyError("key"), AttemptError(3, errno.EACCES), local_class()("here")):
        arrived = raised(type(error), plugin.execute_in_isolated_process, raise_it, error)
        assert exception_state(arrived) == exception_state(error)
    end = functools.partial(plugin.execute_in_isolated_process, os._exit)
    assert raised(plugin.UnexpectedExitStatusError, plugin.isolated(end), 3).exit_status == 3


def test_reports_of_pytest_and_ipython_hide_the_frames_of_the_module():
    for function, arguments in ((divmod, [1, 0]), (os._exit, [3]), (threading.Lock, [])):
        for form in forms(function):
            frames = next(zip(*traceback.walk_tb(raised(Exception, form, *arguments).__traceback__)))
            ours = [frame for frame in frames if frame.f_code.co_filename == mem_isolate.__file__]
            assert ours and all(frame.f_locals.get("__tracebackhide__") is True for frame in ours)


class Kept:
    alive = 0  # those that somebody refers to

    def __init__(self, *how):
        self.how = how
        Kept.alive += 1

    def __del__(self):
        Kept.alive -= 1

    def __reduce__(self):
        rebuild, *arguments = self.how or (Kept, pickle.PickleBuffer(bytes(3 * MIB)))
        return rebuild, tuple(arguments)


def interrupt_the_parent(*_):
    LIBC.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)


@fresh
def test_after_a_call_that_failed_nothing_keeps_its_arguments_or_result():
    """Each is gone at once, without the garbage collector; asyncio would keep some, by cycles of its own."""
    ends = [
        (ZeroDivisionError, lambda _: 1 / 0),
        (ValueError, lambda kept: raise_it(ValueError(kept))),
        (UnexpectedExitStatusError, lambda _: os._exit(5)),
        (SerializationError, lambda kept: [kept, bytes(MIB), threading.Lock()]),
        (DeserializationError, lambda kept: [kept, list(range(100_000)), Kept(divmod, 1, 0)]),
        (KeyboardInterrupt, interrupt_the_parent),
        (KeyboardInterrupt, lambda kept: [kept, Kept(os.kill, os.getppid(), signal.SIGINT)]),
    ]
    gc.disable()
    for number, (kind, function) in enumerate(ends):
        for form in itertools.islice(forms(function), 3):
            assert str(raised(kind, lambda: form(Kept())).__cause__)
            assert Kept.alive == 0, f"a frame or a buffer keeps it after end {number}"


# ------------------------------------------------------------------------------------------------------------ Output


def say(who, by_c=True):
    """Print ``<who stream>`` on each stream, unflushed and without the newline that might flush it."""
    for name in ("stdout", "stderr"):
        getattr(sys, name).write(f"<{who} {name}>")
    if by_c:
        LIBC.puts(f"<{who} C>".encode())


def print_around_calls():
    def say_and(who, function, *arguments):
        say(who)
        return function(*arguments)

    say("before")
    call(say, "child")
    say("between")
    for who, *end in [
        ("raising", raise_it, KeyError()),
        ("leaving", sys.exit),
        ("unpicklable", threading.Lock),
        ("outer", call, say, "inner"),
    ]:
        with contextlib.suppress(KeyError, SystemExit, SerializationError):
            call(say_and, who, *end)
    with contextlib.suppress(UnexpectedExitStatusError):
        call(os._exit, 1)
    for _ in call(lambda: (yield say("left", by_c=False)) or time.sleep(60)):
        break
    with contextlib.redirect_stderr(None):
        for _ in call(lambda: (yield print("<alone stdout>")) or time.sleep(60)):
            break
    say("after")


@pytest.mark.parametrize("kind", ["file", "pipe", "terminal"])
def test_nothing_printed_is_lost_or_doubled(kind, tmp_path):
    if kind == "file":
        write = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT | os.O_APPEND)
        read = os.open(tmp_path / "output", os.O_RDONLY)
    else:
        read, write = os.pipe() if kind == "pipe" else os.openpty()
    in_fresh_process(print_around_calls, env=BUFFERED, output=write)
    os.close(write)
    printed = b""
    with contextlib.suppress(OSError):  # EIO: the terminal's other side is closed
        for part in iter(functools.partial(os.read, read, 65536), b""):
            printed += part
    os.close(read)
    speakers = ["before", "between", "after", "child", "raising", "leaving", "unpicklable", "outer", "inner"]
    expected = [f"<{who} {stream}>" for who in speakers for stream in ("stdout", "stderr", "C")]
    expected = sorted([*expected, "<left stdout>", "<left stderr>", "<alone stdout>"])
    assert sorted(re.findall(r"<[^>]*>", printed.decode())) == expected


def test_text_pending_in_other_files_of_the_parent_is_written_once(tmp_path):
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    c_stream = ctypes.c_void_p(libc.fopen(bytes(tmp_path / "c"), b"w"))
    with open(tmp_path / "python", "w") as stream:
        stream.write("pending")
        libc.fputs(b"pending", c_stream)
        call(int)
        failure(UnexpectedExitStatusError, os._exit, 0)
    libc.fclose(c_stream)
    assert [(tmp_path / name).read_text() for name in ("c", "python")] == ["pending", "pending"]


def full_pipe():
    """A pipe into which nothing more goes, and a function that empties it."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    os.set_blocking(read, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write, b"." * 4096)
    return read, write, lambda: os.read(read, MIB)


def test_text_that_cannot_be_flushed_before_the_call_is_not_printed_twice(monkeypatch):
    """The pipe is full, and by the end of the callable it is not any more."""
    read, write, drain = full_pipe()
    with os.fdopen(write, "w") as stream, monkeypatch.context() as patch:
        stream.write("pending")
        patch.setattr(sys, "stdout", stream)
        text = call(drain)
        stream.flush()
        text += drain()
    os.close(read)
    assert text.strip(b".") == b"pending"


@fresh(env=BUFFERED)
def test_text_that_another_thread_prints_between_flush_and_fork_is_not_printed_twice():
    usual, stdout, (read, write) = mem_isolate._other_threads, os.dup(1), os.pipe()

    def print_meanwhile():
        LIBC.puts(b"from C")
        sys.stdout.write("from Python\n")
        return usual()

    os.dup2(write, 1)
    with background_threads(lambda: time.sleep(0.01)):
        mem_isolate._other_threads = print_meanwhile
        call(print, "from the child")
    LIBC.fflush(None)
    sys.stdout.flush()
    os.dup2(stdout, 1)
    assert sorted(os.read(read, MIB).decode().splitlines()) == ["from C", "from Python", "from the child"]


def test_timeout_covers_the_flush_of_what_the_callable_printed():
    """What was delivered before the flush counts; the child, whose flush never ends, does not stay."""

    def print_into_a_full_pipe():
        _, write, _ = full_pipe()
        os.set_blocking(write, True)
        sys.stdout = os.fdopen(write, "w")
        print("x" * 1000)
        return os.getpid()

    assert is_gone(isolated(timeout=0.2)(print_into_a_full_pipe)())


@pytest.mark.parametrize("broken_in", ["parent", "child"])
def test_a_bad_stream_breaks_nothing(broken_in, monkeypatch):
    closed, detached, (read, write) = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO()), os.pipe()
    closed.close()
    detached.detach()
    os.close(read)

    def look_and_fail():
        caller = sys._getframe(1)
        raise ValueError(f"broken for {caller.f_code.co_name}")

    failing = changed(io.StringIO(), flush=look_and_fail)
    unwritable = [open(place, "w") for place in [write, "/dev/full"] if place == write or os.path.exists(place)]

    def print_and_end(stream, end, *arguments):
        sys.stdout = sys.stderr = stream
        with contextlib.suppress(Exception):
            print("to nowhere")
        return end(*arguments)

    for stream in [None, object(), Broken(), closed, detached, failing, *unwritable]:
        if stream in unwritable:
            stream.write("pending")
        with monkeypatch.context() as patch:
            if broken_in == "parent":
                patch.setattr(sys, "stdout", stream)
                patch.setattr(sys, "stderr", stream)
            assert [len(call(print_and_end, stream, bytes, size)) for size in (5, BULK)] == [5, BULK]
            raised(KeyError, call, print_and_end, stream, raise_it, KeyError())
            failure(UnexpectedExitStatusError, print_and_end, stream, os._exit, 3)
            assert list(isolated(lambda stream=stream: (yield print_and_end(stream, int)))()) == [0]
    for stream in unwritable:
        raised(OSError, stream.close)


@pytest.mark.parametrize("closed", [[1], [0, 1, 2]], ids=["stdout", "all"])
@fresh(env=BUFFERED)
def test_closed_standard_descriptors_break_nothing(closed):
    """As daemons have it: what a call opens may get those numbers, and the callable prints to them."""
    saved = [os.dup(number) for number in range(3)]

    def noisy(size):
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                print("noise", file=stream)
        LIBC.puts(b"noise from C")
        with contextlib.suppress(OSError):
            os.write(1, b"8 bytes\n")  # as many as a counter takes
        return os.urandom(1) * size

    for number in closed:
        os.close(number)
    try:
        results = [call(noisy, size) for size in (5, BULK)]
    finally:
        for number in range(3):
            os.dup2(saved[number], number)
    assert [len(result) for result in results] == [5, BULK]
    assert [len(set(result)) for result in results] == [1, 1], "what was printed is in the result"


def print_past_replaced_streams():
    def print_to_a_stdout_of_the_childs_own():
        sys.stdout = os.fdopen(1, "w")
        sys.stdout.write("child 2;")

    stdout = sys.stdout
    stdout.write("parent 1;")
    with contextlib.redirect_stdout(io.StringIO()):
        call(lambda: sys.__stdout__.write("child 1;"))
    stdout.write("parent 2;")
    call(print_to_a_stdout_of_the_childs_own)
    stdout.write("parent 3;")
    del sys.stdout
    call(lambda: sys.__stdout__.write("child 3;"))
    stdout.write("parent 4;")


def test_nothing_printed_past_a_replaced_stdout_is_lost_or_doubled():
    expected = "parent 1;child 1;parent 2;child 2;parent 3;child 3;parent 4;"
    assert in_fresh_process(print_past_replaced_streams, env=BUFFERED) == expected


# ----------------------------------------------------------------------------------------------------------- Threads

#: Threads that ask for the GIL 25 times as often as usual ask for it so much more often in the middle of a fork, too.
EAGER = 0.0002


def start_and_join_a_thread():
    thread = threading.Thread(target=burn_the_gil)
    thread.start()
    thread.join()


@repetitions(30, 300)
@pytest.mark.parametrize("how", ["logging", "printing"])
@fresh(env=BUFFERED)
def test_threads_and_children_write_to_one_file(how, tmp_path, repeat):
    """No child hangs, no line is lost, torn or doubled."""
    sys.setswitchinterval(EAGER)
    path, written = Path(tmp_path, "lines"), collections.Counter()
    if how == "printing":
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    else:
        logging.basicConfig(filename=path, format="%(message)s", level=logging.INFO)

    def write(who, number):
        line = f"{who} {number} of many"
        if how == "logging":
            logging.info(line)
        else:
            sys.stdout.write(line + "\n")  # print would do it in two pieces, and others come in between
            sys.stdout.flush()

    def write_a_line(who):
        write(who, written[who])
        written[who] += 1

    with background_threads(*[functools.partial(write_a_line, who) for who in ("first", "second")]):
        for number in range(repeat):
            call(write, "child", number)
    written["child"] = repeat
    expected = {f"{who} {i} of many": 1 for who, count in written.items() for i in range(count)}
    assert collections.Counter(path.read_text().split("\n")[:-1]) == expected
    assert min(written["first"], written["second"]) > 100


def importing(folder):
    """What children and what threads do: import the same slow module, each in a module of their own."""
    Path(folder, "imported_slowly.py").write_text("import time\ntime.sleep(0.001)\nWHOLE = True\n")
    for name in ("threads", "children"):
        Path(folder, f"imported_by_{name}.py").write_text("import imported_slowly\n")
    sys.path.insert(0, folder)

    def import_again():
        for name in ("imported_slowly", "imported_by_threads"):
            sys.modules.pop(name, None)
        importlib.import_module("imported_by_threads")

    def import_in_the_child():
        slow = importlib.import_module("imported_by_children").imported_slowly
        assert slow.WHOLE and importlib.import_module("imported_slowly").WHOLE

    return import_in_the_child, [import_again]


@repetitions(20, 150)
@pytest.mark.parametrize("callers", [1, 4])
@pytest.mark.parametrize("what", ["burn", "start threads", "import"])
@fresh
def test_child_never_hangs_beside_busy_threads_and_may_do_what_they_were_doing(what, callers, tmp_path, repeat):
    """A child does what other threads of the parent were in the middle of at the fork, and returns."""
    sys.setswitchinterval(EAGER)
    in_the_child, in_threads = burn_the_gil, [burn_the_gil] * 3
    if what == "start threads":
        in_the_child, in_threads = start_and_join_a_thread, [burn_the_gil] + [start_and_join_a_thread] * 3
    elif what == "import":
        in_the_child, in_threads = importing(tmp_path)
    with background_threads(*in_threads), concurrent.futures.ThreadPoolExecutor(callers) as pool:
        call_all = map if callers == 1 else pool.map
        results = call_all(isolated(lambda number: in_the_child() or square(number)), range(repeat))
        assert list(results) == [square(number) for number in range(repeat)]
    assert_no_child_is_left()


@fresh
def test_child_forgets_which_imports_threads_of_the_parent_waited_for(tmp_path):
    """Or a thread of the child that gets the ident of one of those might see a deadlock, and import half a module."""
    blocked, outcomes = sys.modules["_frozen_importlib"]._blocking_on, []

    def call_while_a_thread_waits_for_this_import():
        waiting = threading.Thread(target=importlib.import_module, args=["imported"], daemon=True)
        waiting.start()
        wait_until(lambda: blocked.get(waiting.ident))
        outcomes.append(call(lambda: bool(blocked.get(waiting.ident))))

    threading.body_of_imported = call_while_a_thread_waits_for_this_import
    Path(tmp_path, "imported.py").write_text("import threading\nthreading.body_of_imported()\n")
    sys.path.insert(0, tmp_path)
    importlib.import_module("imported")
    assert outcomes == [False]


@repetitions(20, 200)
@fresh
def test_child_never_hangs_beside_or_in_threads_that_only_c_knows(repeat):
    sys.setswitchinterval(EAGER)
    running, results, threads = [], [], [ctypes.c_void_p() for _ in range(4)]

    @ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)
    def burn(_):
        running.append(None)
        while len(results) < 2 * repeat:
            burn_the_gil()

    def make_calls(_=None):
        results.extend(call(square, number) for number in range(repeat))

    caller = type(burn)(make_calls)
    for thread, function in zip(threads, [burn, burn, burn, caller]):
        assert LIBC.pthread_create(ctypes.byref(thread), None, function, None) == 0
    wait_until(lambda: len(running) == 3)
    assert threading.active_count() == 1, "threading knows of these threads, so they prove nothing"
    make_calls()
    for thread in threads:
        LIBC.pthread_join(thread, None)
    assert sorted(results) == sorted([number**2 for number in range(repeat)] * 2)


@fresh
def test_threading_tells_the_truth_in_the_child():
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()

    def look():
        other.join()  # as that thread does not exist here, nobody would wake a child that waited for it
        here = threading.current_thread()
        assert here is threading.main_thread() and here.ident == threading.get_ident() and not other.is_alive()
        return here.name, threading.active_count(), threading.enumerate() == [here]

    assert call(look) == ("MainThread", 1, True)
    assert in_thread(lambda: call(look)) == ("caller_0", 1, True)
    assert threading.current_thread() is threading.main_thread() and threading.active_count() == 2
    ended.set()
    other.join()
    assert call(look) == ("MainThread", 1, True)


def test_odd_handlers_beside_a_thread_and_a_half_imported_asyncio_keep_no_child_from_starting(monkeypatch):
    class OtherQueue(queue.Queue):
        def __init__(self, name, size):
            super().__init__(size)

    class OtherBuffer(io.BufferedWriter):
        def __init__(self, path):
            super().__init__(io.FileIO(path, "w"))

    class OtherHandler(logging.StreamHandler):
        stream = property(lambda self: raise_it(RuntimeError("not open")), lambda self, stream: None)

        def createLock(self):
            vars(self).setdefault("created", []).append(1)
            assert self.created == [1]
            super().createLock()

    class Proxy:
        """Says that it is what it stands for, as Flask's stream for errors does."""

        __class__ = property(lambda self: type(sys.stderr))

        def __getattr__(self, name):
            return getattr(sys.stderr, name)

    handlers = [logging.handlers.QueueHandler(OtherQueue("name", 3)), OtherHandler(), logging.StreamHandler(Proxy())]
    handlers.append(logging.StreamHandler(io.TextIOWrapper(OtherBuffer(os.devnull))))
    with background_threads(lambda: time.sleep(0.01)):
        assert call(square, 3) == 9
    for handler in handlers:
        handler.close()
    monkeypatch.setitem(sys.modules, "asyncio", types.ModuleType("asyncio"))  # another thread is only importing it
    assert call(square, 3) == 9


@fresh
def test_thread_that_a_signal_handler_starts_just_before_the_fork_is_no_danger():
    """There is bytecode between the look for threads and the fork: of handlers, too."""
    usual, ended, looks = mem_isolate._handle_signals, threading.Event(), []

    def start_a_thread():
        if not looks:
            threading.Thread(target=ended.wait, daemon=True).start()
        looks.append(usual())

    mem_isolate._handle_signals = start_a_thread
    assert call(lambda: len(sys._current_frames())) == 1 and len(looks) == 4
    assert_no_child_is_left()
    ended.set()


IMPORT_WITH_A_STACK = """
import ctypes
libc, memory, found = ctypes.PyDLL(None), (ctypes.c_char * (1 << 18))(), (ctypes.c_size_t * 3)()
own = (ctypes.c_size_t * 3)(ctypes.addressof(memory), 0, 1 << 18)
assert libc.sigaltstack(own, None) == 0
import mem_isolate
assert libc.sigaltstack(None, found) == 0 and found[:] == own[:]
"""


@linux_only
@pytest.mark.parametrize("where", ["main thread", "thread"])
@fresh(env={"PYTHONFAULTHANDLER": ""})
def test_stack_for_signal_handlers_is_left_to_the_thread(where):
    size = 1 << 18
    memory, theirs, found = (ctypes.c_char * size)(), *((ctypes.c_size_t * 3)() for _ in range(2))

    def check():
        for flags in (2, 0):  # none, and one of its own
            theirs[:] = [ctypes.addressof(memory), flags, size]
            LIBC.sigaltstack(theirs, None)
            LIBC.sigaltstack(None, theirs)
            assert "string_at" in str(failure(KilledBySignalError, ctypes.string_at, 0))
            LIBC.sigaltstack(None, found)
            assert found[:] == theirs[:]

    check() if where == "main thread" else in_thread(check)
    in_fresh_process(IMPORT_WITH_A_STACK, env={"PYTHONFAULTHANDLER": ""})
    os.devnull = "/does/not/exist"
    assert imported_anew().execute_in_isolated_process(square, 3) == 9


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="ctypes tells them of every call")
@fresh
def test_no_audit_hook_runs_between_fork_and_repair():
    """It would be bytecode, at which the child may wait for ever for a thread that it does not have."""
    parent = os.getpid()
    sys.addaudithook(lambda event, _: os._exit(9) if event.startswith("ctypes") and os.getpid() != parent else None)
    with background_threads(lambda: time.sleep(0.01)):
        assert call(square, 3) == 9


@pytest.mark.skipif("t" not in getattr(sys, "abiflags", ""), reason="needs a free-threaded build")
@fresh
def test_free_threaded_build_refuses_to_fork_beside_other_threads():
    assert call(square, 3) == 9
    with background_threads(burn_the_gil):
        for refused in (lambda: call(square, 3), lambda: in_thread(isolated(burn_the_gil))):
            assert "thread" in str(raised(ForkError, refused)).lower()
    assert call(square, 4) == 16
    assert_no_child_is_left()


# ------------------------------------------------------------------------------------------------- What is inherited


def process_state():
    """All that a callable might change outside of memory, or in memory that the interpreter itself looks at."""
    limits, umask = [name for name in dir(resource) if name.startswith("RLIMIT_")], os.umask(0)
    os.umask(umask)
    return {
        **state_of_the_caller(),
        "random": random.getstate(),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_debug(), gc.get_freeze_count()),
        "timer": signal.getitimer(signal.ITIMER_REAL),
        "files": {number: os.fstat(number)[:3] for number in open_descriptors()},
        "directory": (os.getcwd(), umask),
        "environment": dict(os.environ),
        "limits": {name: resource.getrlimit(getattr(resource, name)) for name in limits},
        "interpreter": (sys.getrecursionlimit(), sys.getswitchinterval(), sys.excepthook, list(sys.path)),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "threads": threading.enumerate(),
        "shared mappings": [line for line in mappings() if line.split()[1] == "rw-s" or "memfd" in line],
    }


def upset_everything(end, *arguments):
    random.seed(99)
    gc.set_threshold(7)
    (gc.disable if gc.isenabled() else gc.enable)()
    gc.freeze()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    signal.signal(signal.SIGUSR2, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 1000)
    os.open("/", os.O_RDONLY)
    os.closerange(3, 200)
    os.chdir("/")
    os.umask(0o777)
    os.environ["UPSET"] = "yes"
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
    sys.setrecursionlimit(500)
    sys.setswitchinterval(1)
    sys.excepthook = sys.stdout = sys.stderr = None
    sys.path.clear()
    ctypes.set_errno(77)
    return end(*arguments)


@pytest.mark.parametrize("end", ["returning", "raising", "dying"])
def test_nothing_else_reaches_the_parent(end):
    before = {**process_state(), "errno": ctypes.get_errno()}
    if end == "returning":
        assert call(upset_everything, str, "end") == "end"
    elif end == "raising":
        raised(KeyError, call, upset_everything, raise_it, KeyError("end"))
    else:
        failure(UnexpectedExitStatusError, upset_everything, os._exit, 1)
    after = {**process_state(), "errno": ctypes.get_errno()}
    assert [name for name in before if before[name] != after[name]] == []


@fresh
def test_callable_finds_what_the_calling_thread_has():
    local = threading.local()

    def look():
        handlers = [id(signal.getsignal(number)) for number in sorted(signal.valid_signals())]
        threads = threading.get_ident(), local.value, signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return threads, handlers, gc.isenabled(), id(sys.unraisablehook), random.getstate(), _imp.lock_held()

    def look_on_both_sides():
        local.value = f"of thread {threading.get_ident()}"
        for lock in (_imp.acquire_lock, _imp.release_lock):  # the import lock
            lock()
            before = look()
            assert call(look) == before == look()
        assert call(os.getppid) == os.getpid() != call(os.getpid)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for mask in (set(), {signal.SIGUSR1, signal.SIGTERM}, {signal.SIGCHLD}, signal.valid_signals()):
        (gc.disable if gc.isenabled() else gc.enable)()
        random.random()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        look_on_both_sides()
        in_thread(look_on_both_sides)


@fresh
def test_no_at_fork_hook_runs_and_none_is_lost_or_left_behind(tmp_path):
    trace, names = Path(tmp_path, "trace"), ["before", "after_in_parent", "after_in_child"]
    descriptor = os.open(trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    in_thread(int)  # concurrent.futures has hooks of its own
    hooks = {name: functools.partial(os.write, descriptor, name.encode() + b" ") for name in names}
    os.register_at_fork(**hooks)
    lists = [next(found for found in gc.get_referrers(hook) if type(found) is list) for hook in hooks.values()]
    before = [list(found) for found in lists]
    assert "mem_isolate" not in [getattr(hook, "__module__", "") for hook in itertools.chain(*before)]

    def make_calls():
        assert call(call, bytes, BULK) == bytes(BULK)
        raised(KeyError, call, raise_it, KeyError())
        raised(UnexpectedExitStatusError, call, os._exit, 1)

    make_calls()
    with background_threads(burn_the_gil, burn_the_gil):
        make_calls()
        in_thread(make_calls)
    assert trace.read_text() == "" and lists == before
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert sorted(trace.read_text().split()) == sorted(names), "the caller's own forks lost their hooks"


def test_atexit_handlers_run_in_the_parent_only():
    code = "import atexit, os, sys; from mem_isolate import execute_in_isolated_process as call"
    code += "; atexit.register(os.write, 1, b'exit '); call(int)\ntry: call(sys.exit)\nexcept SystemExit: pass"
    assert in_fresh_process(code) == "exit "


class Tell:
    """Writes its name and the process in which it is finalised to a file."""

    def __init__(self, path, name, cycle=False):
        self.path, self.name, self.itself = path, name, cycle and self

    def __del__(self, open=open, getpid=os.getpid):
        with open(self.path, "a") as file:
            file.write(f"{getpid()} {self.name}\n")


def wait_until_finalised_here(path, names):
    wait_until(lambda: sorted(path.read_text().splitlines()) == sorted(f"{os.getpid()} {name}" for name in names))


@fresh
def test_garbage_of_the_parent_is_finalised_there_alone(tmp_path):
    """The collector is due after every possible number of allocations, so at some point in a child, too."""
    path = Path(tmp_path, "finalised")
    for number in range(300):
        gc.disable()
        Tell(path, number, cycle=True)
        gc.set_threshold(gc.get_count()[0] + number, 10, 10)
        gc.enable()
        assert call(square, number) == square(number)
    gc.disable()
    Tell(path, "collected", cycle=True)
    for threads in (0, 2):
        with background_threads(*[burn_the_gil] * threads):
            assert call(lambda: (gc.enable(), gc.collect(), "collected")[2]) == "collected"
            raised(SystemExit, call, sys.exit)
    gc.collect()
    wait_until_finalised_here(path, [*range(300), "collected"])


@fresh
def test_what_other_threads_own_is_finalised_in_the_parent_alone(tmp_path):
    """Values of threading.local and of context variables, also of a context that a thread is running in."""
    path, local, variable = Path(tmp_path, "finalised"), threading.local(), contextvars.ContextVar("variable")
    ready, done = threading.Semaphore(0), threading.Event()

    def wait(name, depth, most):
        variable.set(Tell(path, f"{name}, context {depth}"))
        if depth < most:
            return contextvars.copy_context().run(wait, name, depth + 1, most)
        local.value = Tell(path, f"{name}, local")
        ready.release()
        done.wait()

    def look_at_our_own(name):
        variable.set(name)
        local.value = Tell(path, name)
        look = isolated(lambda: (gc.collect(), local.value.name, variable.get())[1:])
        return [look() for _ in range(10)] == [(name, name)] * 10

    threads = [threading.Thread(target=wait, args=(n, 0, n % 3), daemon=True) for n in range(6)]
    for thread in threads:
        thread.start()
        ready.acquire()
    assert look_at_our_own("main")
    assert not path.exists(), f"finalised in children of {os.getpid()}:\n{path.read_text()}"
    assert in_thread(lambda: look_at_our_own("caller"))
    del local.value, threads[:], thread  # from 3.14 on a Thread owns its context
    done.set()
    contexts = [f"{n}, context {depth}" for n in range(6) for depth in range(n % 3 + 1)]
    wait_until_finalised_here(path, [*contexts, *[f"{n}, local" for n in range(6)], "main", "caller"])


@fresh
def test_child_does_not_write_to_the_parents_wakeup_descriptor():
    handled, (reader, writer) = [], socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    signal.signal(signal.SIGUSR1, lambda *_: handled.append(os.getpid()))
    signal.set_wakeup_fd(writer.fileno())

    def signal_myself():
        kill_self(signal.SIGUSR1)
        burn_the_gil()
        return handled == [os.getpid()]

    for caller in (lambda function: function(), in_thread):
        assert caller(lambda: call(signal_myself))
        raised(BlockingIOError, reader.recv, 1)
    assert signal_myself() and reader.recv(10) == bytes([signal.SIGUSR1])
    assert signal.set_wakeup_fd(-1) == writer.fileno()


@fresh
def test_what_a_traceback_keeps_of_a_call_is_no_memory():
    """Whoever looks at it later, as a debugger does, may read what is there."""
    mem_isolate._libc_fork = lambda: -1
    caught = raised(ForkError, call, int)
    frames = [frame for frame, _ in traceback.walk_tb(caught.__traceback__)]
    assert frames[-1].f_locals
    for view in [item for item in gc.get_objects() if type(item) is memoryview]:
        with contextlib.suppress(ValueError):  # released
            bytes(view[:1]), bytes(view[-1:])


@fresh_on_linux
def test_calls_of_a_daemon_that_was_forked_during_a_call_keep_their_descriptors():
    """It has closed all that there were, as daemons do, so that its own get the same numbers."""
    started = shared_numbers(1)
    threading.Thread(target=call, args=(lambda: (started.__setitem__(0, 1), time.sleep(60)),), daemon=True).start()
    wait_until(lambda: started[0])
    items = isolated(lambda: (yield from [bytes(MIB)] * 9))()
    next(items)
    child = os.fork()
    if child == 0:
        os.closerange(3, 5000)
        good = list(isolated(countdown)(3)) == [3, 2, 1] and call(bytes, BULK) == bytes(BULK)
        os._exit(0 if good and "string_at" in str(failure(KilledBySignalError, ctypes.string_at, 0)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="it cannot be found")
@fresh
def test_file_that_only_faulthandler_holds_is_not_finalised_in_a_child():
    faulthandler.enable(tempfile.NamedTemporaryFile())
    (file,) = (found for found in gc.get_referents(faulthandler) if hasattr(found, "name"))
    name = file.name
    del file
    assert call(square, 3) == 9 and os.path.exists(name)


@linux_only
@pytest.mark.parametrize("way", ["threads", "loop"])
def test_a_child_does_not_keep_the_result_of_a_call_that_was_under_way(way):
    arrived, held = shared_numbers(2), shared_numbers(2)

    def wait(mine, others=2):
        arrived[mine] = 1
        wait_until(lambda: sum(arrived) >= others)
        held[mine] = len(bulks())

    if way == "threads":
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(isolated(wait), range(2)))
    else:
        for _ in call(lambda: (yield wait(0, others=1))):
            asyncio.run(call_async(wait, 1))
    assert list(arrived) == [1, 1] and max(held) <= 1


def imported_anew():
    return sys.modules.pop("mem_isolate") and importlib.import_module("mem_isolate")


@pytest.mark.parametrize("imported", ["before", "after"])
@pytest.mark.parametrize("library", ["gevent", "eventlet"])
def test_greenlets_run_while_a_call_waits_and_none_of_them_in_the_child(library, imported):
    """Whether the module is imported before or after the monkey patching; the child has a hub of its own."""
    pytest.importorskip(library)
    assert in_fresh_process(calls_among_greenlets, library, imported, python=("-Wignore",)) == THE_END


def calls_among_greenlets(library, imported):
    green = importlib.import_module(library)
    (green.monkey_patch if library == "eventlet" else importlib.import_module("gevent.monkey").patch_all)()
    new_pool = green.GreenPool if library == "eventlet" else importlib.import_module("gevent.pool").Pool
    module = mem_isolate if imported == "before" else imported_anew()
    parent, handler = os.getpid(), logging.StreamHandler(io.StringIO())
    numbers = shared_numbers(5)  # turns in the parent and in children, ends in children; two children that meet

    def take_turns():
        try:
            while True:
                green.sleep(0.001)
                numbers[os.getpid() != parent] += 1
        finally:
            numbers[2] += os.getpid() != parent

    def wait_in_every_way():
        before, received = numbers[0], []
        wait_until(lambda: numbers[0] > before + 9)  # that is, greenlets of the parent run while it waits
        left, right = socket.socketpair()
        green.spawn(lambda: received.append(left.recv(5)))
        green.sleep(0.001)
        right.sendall(b"hello")
        squares = list(new_pool(2).imap(lambda number: green.sleep(0.001) or number**2, range(4)))
        handler.handle(logging.makeLogRecord({"msg": "hello"}))
        return received, squares, socket.getaddrinfo("127.0.0.1", 80)[0][4], subprocess.check_output(["echo", "hello"])

    def meet(mine):
        numbers[3 + mine] = 1
        wait_until(lambda: numbers[4 - mine])
        return list(range(100_000))  # read while it is written

    for body in (take_turns, take_turns, handler.acquire):
        green.spawn(body)
    for limited in [module.isolated(wait_in_every_way, timeout=20)] * 3 + [module.isolated(wait_in_every_way)]:
        green.sleep(0.01)
        assert limited() == ([b"hello"], [0, 1, 4, 9], ("127.0.0.1", 80), b"hello\n")
    assert list(new_pool(2).imap(module.isolated(meet, timeout=20), range(2))) == [list(range(100_000))] * 2
    raised(module.CallableTimeoutError, module.isolated(time.sleep, timeout=0.1), 60)
    caller = green.spawn(module.execute_in_isolated_process, time.sleep, 60)
    green.sleep(0.05)
    caller.kill()
    raised(ChildProcessError, sys.modules["posix"].waitpid, -1, os.WNOHANG)  # the real one
    assert list(numbers[1:3]) == [0, 0], "greenlets of the parent ran, or ended, in a child"
    sys.modules["posix"].write(1, THE_END.encode())
    os._exit(0)


@fresh
def test_no_lock_of_logging_or_of_the_standard_library_is_waited_for(tmp_path):
    """A thread holds all of them: calls are not delayed, their timeouts not stretched, and the child can log."""
    path, held, done = Path(tmp_path, "log"), threading.Event(), threading.Event()
    logger, waiting = logging.getLogger("held"), logging.handlers.QueueHandler(queue.Queue())
    logger.handlers = [*[logging.FileHandler(path) for _ in range(20)], waiting]
    importlib.import_module("_strptime"), importlib.import_module("concurrent.futures.thread")
    standard = [(sys.modules.get(module), lock) for module, lock, _ in mem_isolate._STANDARD_LOCKS]
    others = [getattr(module, lock) for module, lock in standard if hasattr(module, lock)]

    def hold():
        with contextlib.ExitStack() as stack:
            for lock in {*[handler.lock for handler in logger.handlers], waiting.queue.mutex, logging._lock, *others}:
                stack.enter_context(lock)
            held.set()
            done.wait()

    def use_all():
        logger.warning("child")
        asyncio.run(asyncio.sleep(0, time.strptime("2026", "%Y") and tempfile.gettempdir()))
        return in_thread(lambda: logging.getLogger("new").name)

    def duration():
        started = time.monotonic()
        name = isolated(timeout=20)(use_all)()
        raised(CallableTimeoutError, isolated(time.sleep, timeout=0.1), 60)
        assert name == "new"
        return time.monotonic() - started

    usual = duration()
    threading.Thread(target=hold, daemon=True).start()
    held.wait()
    assert duration() < usual + 0.7  # the shortest time that would be worth waiting for a lock is a second
    done.set()
    assert path.read_text() == "child\n" * 40 and waiting.queue.empty()


SUBINTERPRETERS = [name for name in ("_interpreters", "_xxsubinterpreters") if importlib.util.find_spec(name)]


@pytest.mark.skipif(not SUBINTERPRETERS, reason="this Python has no subinterpreters")
@fresh
def test_calls_from_a_subinterpreter_are_refused_and_all_others_until_it_is_closed():
    module = importlib.import_module(SUBINTERPRETERS[0])
    legacy = ("legacy",) if sys.version_info >= (3, 13) else ()  # without extension modules the import is refused
    named = {"isolated": False} if (3, 9) <= sys.version_info < (3, 13) else {}
    interpreters = [module.create(*legacy, **named) for _ in range(2)]
    read, write = os.pipe()
    code = "import mem_isolate as m, os\ntry: m.execute_in_isolated_process(int)\nexcept m.ForkError as error: "
    module.run_string(interpreters[0], f"{code}os.write({write}, str(error).encode())")
    assert b"subinterpreter" in os.read(read, 1000)
    while interpreters:
        for threads in (0, 2):
            with background_threads(*[burn_the_gil] * threads):
                for form in forms(square):
                    assert "subinterpreter" in str(raised(ForkError, form, 3))
        module.destroy(interpreters.pop())
    assert call(square, 3) == 9


PARTS = "os.register_at_fork threading._after_fork logging._handlerList _imp.acquire_lock pythonapi.PyThreadState_Get "
PARTS += "_frozen_importlib._module_locks pythonapi.PyThreadState_Next pythonapi.PyInterpreterState_ThreadHead"


@pytest.mark.parametrize("missing", [*PARTS.split(), "pythonapi.PyOS_AfterFork_Child"])
@fresh
def test_without_a_private_part_of_cpython_only_calls_beside_threads_are_refused(missing):
    """As in a later version that no longer has it; the error names what is missing."""
    place, part = missing.split(".")

    class Less(ctypes.PyDLL):
        def __getattr__(self, name):
            return super().__getattr__("no such function" if name == part else name)

    if place == "os":
        os.register_at_fork = lambda **_: None
    elif place == "pythonapi":
        ctypes.pythonapi = Less(None)
    else:
        twin, original = types.ModuleType(place), sys.modules[place]
        vars(twin).update((name, value) for name, value in vars(original).items() if name != part)
        sys.modules[place] = twin
    module = imported_anew()
    assert module.execute_in_isolated_process(square, 3) == 9
    named = {"register_at_fork": "hooks", "PyThreadState_Get": "PyThreadState_Get|thread state"}.get(part, part)
    with background_threads(burn_the_gil):
        assert re.search(named, str(raised(module.ForkError, module.execute_in_isolated_process, square, 3)))
    assert module.execute_in_isolated_process(square, 3) == 9


@fresh
def test_parts_of_cpython_are_found_among_frozen_objects_which_stay_frozen():
    gc.freeze()
    module = imported_anew()
    with background_threads(burn_the_gil):
        assert module.execute_in_isolated_process(square, 3) == 9
    assert gc.get_freeze_count() > 1000


# ----------------------------------------------------------------------------------------------------------- Signals


@repetitions(50, 500)
@fresh
def test_storm_of_alarms_changes_nothing(repeat):
    """Each of them cuts a system call short; none of that stretches a limit, either."""
    alarms, handled_in, parent = [], shared_numbers(2), os.getpid()

    def handle(*_):
        alarms.append(None)
        handled_in[os.getpid() == parent] += 1

    signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    for number in range(repeat):
        assert call(square, number) == square(number)
        assert_no_child_is_left()
    raised(CallableTimeoutError, isolated(timeout=0.2)(time.sleep), 10)
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(alarms) > repeat / 2, f"only {len(alarms)} alarms: no storm"
    assert handled_in[0] == 0, "an alarm of the parent was handled in a child, too"


def assert_nothing_is_left_after_an_exception(before, where):
    assert_no_child_is_left()
    changed = {name: value for name, value in state_of_the_caller().items() if value != before[name]}
    assert not changed, f"left behind after an exception: {changed}, raised at\n" + "".join(where)


@repetitions(60, 350)
@pytest.mark.parametrize("beside", ["nothing", "threads", "a thread of C", "a temporary file"])
@fresh_on_linux
def test_handler_that_raises_at_any_moment_leaves_nothing_behind(beside, repeat):
    """The exception arrives; the child is dead and reaped; mask, handlers, descriptors, mappings are as before.

    Other threads take the signals that this one blocks, and the handlers run in this one all the same: between any two
    bytecodes, also between the fork and what is done with the pid.
    """
    caught, armed, where = 0, False, []

    def interrupt(_, frame):
        if armed:
            where[:] = traceback.format_stack(frame, 5)
            raise Interrupt

    def block_all_signals_and_sleep():
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        time.sleep(0.001)

    signal.signal(signal.SIGALRM, interrupt)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    ballast = bytearray(64 * MIB)  # so that a fork takes a while
    ballast[:: mmap.PAGESIZE] = b"\1" * len(ballast[:: mmap.PAGESIZE])
    if beside == "a thread of C":
        start_a_thread_of_c()
    if beside == "a temporary file":
        mem_isolate._libc_memfd_create = None
    forms = [(int, "5"), (time.sleep, 0.001), (bytes, MIB), (block_all_signals_and_sleep,)]
    with background_threads(*[functools.partial(time.sleep, 0.05)] * 2 * (beside == "threads")):
        started = time.monotonic()
        expected = [call(*form) for form in forms * 5]
        span, before, mapped = 1.5 / 20 * (time.monotonic() - started), state_of_the_caller(), len(mappings())
        for number in range(repeat):
            armed, where[:] = True, []
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, span))
                assert call(*forms[number % 4]) == expected[number % 4]
                assert not where, "an exception did not arrive that was raised at\n" + "".join(where)
                armed, span = False, span * 0.9  # so that the handler goes on hitting two calls of three under any load
            except Interrupt:
                caught, armed, span = caught + 1, False, span * 1.05
            signal.setitimer(signal.ITIMER_REAL, 0)
            assert_nothing_is_left_after_an_exception(before, where)
        assert repeat * 0.1 < caught < repeat * 0.95, f"{caught} interruptions in {repeat} calls"
        assert len(mappings()) <= mapped + 10
    del ballast


@fresh_on_linux
def test_handler_that_raises_at_every_single_call_in_the_module_leaves_nothing_behind():
    """One point after the other: the start of each Python function and the end of each C function it calls."""
    parent, lost = os.getpid(), []

    def count_points(frame, event, _):
        nonlocal points
        code = frame.f_code
        if event not in ("call", "c_return") or code.co_filename != mem_isolate.__file__:
            return
        if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
            return  # one that is closed or goes on is reported as called, though no handler can run there
        if os.getpid() == parent and signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, []):
            points += 1
            if points == chosen:
                where[:] = traceback.format_stack(frame, 4)
                signal.raise_signal(signal.SIGALRM)

    def leave_a_generator():
        with contextlib.closing(isolated(countdown)(10**7)) as items:
            next(items)

    signal.signal(signal.SIGALRM, interrupt)
    large = [bytes(100_000), holder_of(300_000)]
    calls = [functools.partial(call, *arguments) for arguments in [(int,), (bytes, 70_000), (divmod, 1, 0)]]
    calls += [lambda: list(isolated(countdown)(2)), leave_a_generator]
    calls += [lambda: isolated(time.sleep, timeout=0.001)(60), lambda: call(lambda: large)]
    calls += [lambda: call(kill_self, 40), lambda: asyncio.run(call_async(int))]
    calls += [lambda: asyncio.run(collect(isolated(countdown_async)(2)))]
    for form in calls:
        before, chosen, where = state_of_the_caller(), 0, ["nowhere"]
        while where:
            chosen, points, where = chosen + 1, 0, []
            try:
                sys.setprofile(count_points)
                form()
            except Interrupt:
                assert where
            except (ZeroDivisionError, MemIsolateError) as error:
                lost += where and [f"{error!r} arrived, not the exception of the handler, raised at\n", *where]
            else:
                lost += where and ["the exception of the handler did not arrive, raised at\n", *where]
            finally:
                sys.setprofile(None)
            assert_nothing_is_left_after_an_exception(before, where)
        assert chosen > 10, "hardly any point to interrupt at was found"
    assert not lost, "".join(lost)


@pytest.mark.parametrize("owner, step", [("_Shared", "release"), ("_Process", "signal_and_wait")])
def test_a_clean_up_that_is_interrupted_again_and_again_goes_on(monkeypatch, owner, step):
    """As by Ctrl-C, whose handler is in C and so leaves no trace of itself in the exception."""
    owner, left = getattr(mem_isolate, owner), [KeyboardInterrupt()] * 5
    usual = getattr(owner, step)
    monkeypatch.setattr(owner, step, lambda *arguments: raise_it(left.pop()) if left else usual(*arguments))
    raised(KeyboardInterrupt, isolated(block_every_signal_and_sleep, timeout=0.1), 60)
    assert left == []


def rebuild_slowly():
    signal.setitimer(signal.ITIMER_REAL, 0.001)
    wait_until(lambda: not signal.getitimer(signal.ITIMER_REAL)[0])
    return "rebuilt"


@fresh
def test_child_in_which_a_step_fails_at_once_never_reaches_the_callers_code():
    mem_isolate._freeze = functools.partial(raise_it, MemoryError())
    assert failure(ChildSetupError, int).exit_status == 1


@pytest.mark.skipif(importlib.util.find_spec("_testcapi") is None, reason="needs _testcapi")
@fresh
def test_memory_that_fails_around_the_fork_never_lets_the_child_out_into_the_callers_code():
    testcapi, parent, let_out = importlib.import_module("_testcapi"), os.getpid(), shared_numbers(1)
    for many in (2, 4, 8):
        for first in range(100, 320):
            testcapi.set_nomemory(first, first + many)
            try:
                call(testcapi.remove_mem_hooks)
            except BaseException:
                pass
            testcapi.remove_mem_hooks()
            if os.getpid() != parent:
                let_out[0] += 1
                os._exit(0)
            reap_all()
    assert not let_out[0]


@fresh
def test_handler_that_raises_stop_iteration_ends_the_call_and_not_the_wait_for_the_child():
    """Nobody is told that a child has ended which still runs."""

    def alarm(frame, event, _):
        if event == "call" and frame.f_code.co_name == "look":
            sys.setprofile(None)
            signal.raise_signal(signal.SIGALRM)

    signal.signal(signal.SIGALRM, lambda *_: next(iter(())))
    for form in (call, call_in_a_loop, lambda *what: list(isolated(lambda: (yield call(*what)))())):
        sys.setprofile(alarm)
        assert "StopIteration" in str(raised(RuntimeError, form, time.sleep, 60))
        assert_no_child_is_left()


@fresh
def test_exception_of_a_handler_is_not_taken_for_one_of_the_result():
    class InterruptsAdvice(mmap.mmap):
        def madvise(self, *_):
            os.kill(os.getpid(), signal.SIGALRM)
            wait_until(lambda: False, 5)

    signal.signal(signal.SIGALRM, interrupt)
    raised(Interrupt, call, lambda: OnPickle(lambda: (rebuild_slowly, ())))
    mem_isolate.mmap = types.SimpleNamespace(**{**vars(mmap), "mmap": InterruptsAdvice})
    raised(Interrupt, call, lambda: [holder_of(8 * MIB), holder_of(9 * MIB)])
    signal.setitimer(signal.ITIMER_REAL, 0.2)  # while the parent waits for the rest
    raised(Interrupt, call, lambda: [bytes(BULK), OnPickle(time.sleep, 60)])
    assert_no_child_is_left()


def cut_short(error):
    """Raise this on the next line of the code that called the callable, as the handler of a signal may."""

    def trace(_, event, __):
        if event == "line":
            raise error
        return trace

    frame = sys._getframe()
    while frame.f_code.co_filename != mem_isolate.__file__:
        frame = frame.f_back
    frame.f_trace = trace
    sys.settrace(lambda *_: None)


@pytest.mark.parametrize("cut", [False, True], ids=["in order", "cut short"])
@fresh
def test_no_signal_is_handled_while_an_exception_is_delivered(cut):
    error = PicklesAs(lambda: kill_self(signal.SIGUSR1) or (LookupError, ("as it is",)))

    def fail():
        signal.signal(signal.SIGUSR1, interrupt)
        if cut:
            cut_short(error)
        raise ZeroDivisionError if cut else error

    assert raised(LookupError, call, fail).args == ("as it is",)


@fresh
def test_a_process_that_the_callable_forked_delivers_nothing_though_a_handler_raises_in_it():
    def fork_and_exit():
        if os.fork():
            os.wait()
            os._exit(3)
        cut_short(LookupError())
        raise ZeroDivisionError

    assert failure(UnexpectedExitStatusError, fork_and_exit).exit_status == 3


@repetitions(60, 400)
@fresh_on_linux
def test_child_under_fire_never_reaches_the_callers_code(tmp_path, repeat):
    """Handlers raise before, during and after the callable: what follows the call runs once, in the parent."""
    parent, fork, outcomes = os.getpid(), mem_isolate._libc_fork, collections.Counter()
    kinds, numbers = [Interrupt, KeyboardInterrupt, SystemExit], list(range(200_000))
    # Before 3.11 no code gets through while signals come faster than it runs; the child ends then.
    expected = (*kinds, *[CallableStatusUnknownError] * (sys.version_info < (3, 11)))
    log = os.open(Path(tmp_path, "passages"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def work_for_a_moment(seconds):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass
        return "returned", numbers

    signal.signal(signal.SIGALRM, lambda *_: raise_it(kinds[os.getpid() % 3]))
    start_fire = functools.partial(signal.setitimer, signal.ITIMER_REAL)
    mem_isolate._libc_fork = lambda: fork() or start_fire(1e-5 + number % 20 * 1e-4, number % 3 * 1e-4) and 0
    for number in range(repeat):
        try:
            outcome = call(work_for_a_moment, number % 2 * 0.002)[0]
        except expected as error:
            outcome = type(error).__name__
        os.write(log, b"%d " % os.getpid())
        if os.getpid() != parent:
            os._exit(1)
        outcomes[outcome] += 1
    assert Path(tmp_path, "passages").read_text().split() == [str(parent)] * repeat, "a child escaped"
    assert "returned" in outcomes and len(outcomes) > 2, outcomes
    assert_no_child_is_left()


# ------------------------------------------------------------------------------------------------ Crashes and limits


@pytest.mark.parametrize("without", ["nothing", "_libc_eventfd"])
@fresh
def test_no_descriptor_left_is_a_region_creation_error(without):
    """And from some number of descriptors on, the call works."""
    vars(mem_isolate)[without] = None
    limited = isolated(memory_limit=1 << 30)(bytes) if sys.platform.startswith("linux") else isolated(bytes)
    highest, outcomes = max(open_descriptors()), []
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    for limit in [0, *range(highest + 1, highest + 8)]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        try:
            outcomes.append(limited(BULK) == bytes(BULK))
        except RegionCreationError as error:
            assert error.__cause__.errno == errno.EMFILE
            assert (error.pid, error.peak_memory, error.cpu_time) == (None, None, None)
            outcomes.append(False)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        assert max(open_descriptors()) == highest
    assert outcomes == sorted(outcomes) and outcomes[:2] == [False, False] and outcomes[-2:] == [True, True]


@fresh_on_linux
def test_a_parent_with_little_memory_left_tells_where_a_child_crashed_or_hung():
    crash, hang = (ctypes.string_at, 0), (time.sleep, 60)
    raised(KilledBySignalError, call, go_wrong, *crash)
    leave_address_space(8 * MIB)
    for arguments in (crash, hang):
        assert "go_wrong" in str(raised(CallableStatusUnknownError, isolated(timeout=0.5)(go_wrong), *arguments))


@fresh_on_linux
def test_no_address_space_left_is_a_region_creation_error():
    leave_address_space(0)
    try:
        failure(RegionCreationError, int)
    finally:
        leave_address_space(1 << 40)
    assert call(int, "5") == 5
    mem_isolate._view_of_memory = lambda *_: raise_it(MemoryError())
    failure(RegionCreationError, int)


def test_a_fork_that_fails_is_a_fork_error_and_can_be_tried_again(monkeypatch, either_way):
    before = process_state()
    for number in (errno.EAGAIN, errno.ENOMEM, errno.ENOSYS):
        with monkeypatch.context() as patch:
            patch.setattr(mem_isolate, "_libc_fork", lambda number=number: ctypes.set_errno(number) and None or -1)
            error = failure(ForkError, int)
            assert isinstance(error.__cause__, OSError) and error.__cause__.errno == number
            assert os.strerror(number) in str(error)
            patch.setattr(mem_isolate, "_libc_fork", lambda: raise_it(KeyError()))
            raised(KeyError, isolated(timeout=60)(int))
        assert process_state() == before
        assert call(int, "5") == 5


@cases("word, die, how", ("SIGKILL", kill_self, signal.SIGKILL), ("7", os._exit, 7), ("0", os._exit, 0))
def test_a_child_that_ends_before_or_after_the_callable_is_told_as_such(word, die, how, monkeypatch):
    fork, ran = mem_isolate._libc_fork, shared_numbers(1)
    after = failure(ResultDeliveryError, OnPickle, die, how)
    monkeypatch.setattr(mem_isolate, "_libc_fork", lambda: fork() or die(how))
    before = failure(ChildSetupError, operator.setitem, ran, 0, 1)
    for error in (after, before):
        assert (error.signal, error.exit_status) == ((signal.SIGKILL, None) if word == "SIGKILL" else (None, int(word)))
        assert word in str(error)
    assert ran[0] == 0


REAL_TIME = getattr(signal, "SIGRTMIN", signal.SIGTERM) + 1  # has no name of its own


@cases(
    "end, value, word",  # the error says the value in an attribute, and the word in its message
    ("SIGTERM", (kill_self, signal.SIGTERM), signal.SIGTERM, "SIGTERM"),
    ("real-time signal", (kill_self, REAL_TIME), REAL_TIME, str(REAL_TIME)),
    ("_exit 7", (os._exit, 7), 7, "7"),
    ("_exit 0", (os._exit, 0), 0, "0"),
    ("C exit 5", (LIBC.exit, 5), 5, "5"),
    ("exec", (os.execv, "/bin/sh", ["sh", "-c", "exit 9"]), 9, "9"),
)
def test_a_callable_that_ends_the_child_is_told_with_signal_or_status(end, value, word):
    kind = KilledBySignalError if end[0] is kill_self else UnexpectedExitStatusError
    error = failure(kind, *end)
    told = error.signal if kind is KilledBySignalError else error.exit_status
    assert (told, type(told)) == (value, type(value)) and re.search(rf"\b{word}\b", str(error))


@fresh
def test_where_the_end_cannot_be_learnt_the_stage_is_still_right():
    """With SIGCHLD ignored the kernel keeps no exit status: the progress word alone tells what happened."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    errors = [failure(WaitError, os._exit, 7), failure(ResultDeliveryError, OnPickle, os._exit, 7)]
    fork = mem_isolate._libc_fork
    mem_isolate._libc_fork = lambda: fork() or os._exit(7)
    errors.append(failure(ChildSetupError, int))
    for error in errors:
        assert isinstance(error.__cause__, ChildProcessError) and error.pid > 0
        assert (error.signal, error.exit_status, error.peak_memory, error.cpu_time) == (None, None, None, None)


def test_an_outcome_that_was_delivered_counts_however_the_child_ends(monkeypatch):
    monkeypatch.setattr(mem_isolate, "_libc_exit", lambda code: kill_self(signal.SIGKILL))
    assert call(bytes, BULK) == bytes(BULK)
    raised(KeyError, call, raise_it, KeyError())


def limit_files(size, disposition, end, *arguments):
    signal.signal(signal.SIGXFSZ, disposition)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    return end(*arguments)


@pytest.mark.parametrize("end", [(bytes, BULK), (raise_it, ValueError("x" * BULK))], ids=["bytes", "raised"])
@pytest.mark.parametrize("disposition", [signal.SIG_IGN, signal.SIG_DFL], ids=["ignored", "deadly"])
@pytest.mark.parametrize("size", [0, BULK // 2])
def test_an_outcome_that_cannot_be_written_is_a_result_delivery_error(size, disposition, end):
    """RLIMIT_FSIZE set by the callable: a write is cut short, the next fails; SIGXFSZ does not kill the child then."""
    error = failure(ResultDeliveryError, limit_files, size, disposition, *end)
    assert isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EFBIG
    assert os.strerror(errno.EFBIG) in str(error) and error.signal is None
    assert call(limit_files, 0, disposition, str, "small") == "small"


@linux_only
@pytest.mark.parametrize("size", [10, 100_000, 2 * MIB])
@pytest.mark.parametrize("make", [patterned, holder_of], ids=["bytes", "buffer"])
@pytest.mark.parametrize("spoil", ["close", "reuse", "fill", "socket", "epoll"])
def test_descriptors_lost_by_the_callable_spoil_neither_the_result_nor_a_file(spoil, make, size, tmp_path):
    ours, theirs = socket.socketpair()

    def spoil_and(end, *arguments):
        last = max(open_descriptors())
        os.dup2(ours.fileno(), 0)
        os.closerange(3, 4096)
        epoll = select.epoll()
        if spoil in ("reuse", "socket", "epoll"):  # the numbers that there were, for a file with something in it, ...
            file = 0 if spoil == "socket" else epoll.fileno()
            if spoil == "reuse":
                file = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
                os.write(file, b"precious")
            for descriptor in {*range(3, last + 3)} - {file}:
                os.dup2(file, descriptor)
        elif spoil == "fill":  # and for empty ones
            for number in range(60):
                os.open(tmp_path / f"empty {number}", os.O_RDWR | os.O_CREAT)
        return end(*arguments)

    value = make(size)
    assert call(spoil_and, lambda: value) == value
    raised(KeyError, call, spoil_and, raise_it, KeyError())
    assert {path.read_bytes() for path in tmp_path.iterdir()} <= ({b"precious"} if spoil == "reuse" else {b""})
    ours.close()
    with theirs:
        assert theirs.recv(100) == b""


@fresh_on_linux
def test_parent_without_memory_for_the_result_gets_a_typed_error():
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    leave_address_space(64 * MIB)
    before = len(mappings())

    def make(kind, size):
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        return kind(bytearray(size))

    raised(MemoryError, call, bytes, 128 * MIB)  # the callable has what the process has left
    for kind in (bytes, Holder):
        failure(DeserializationError, make, kind, 128 * MIB)
        assert call(len, bytearray(MIB)) == MIB
    assert call(make, bytes, 16 * MIB).count(0) == 16 * MIB
    assert len(mappings()) <= before + 3


@repetitions(30, 200)
@pytest.mark.parametrize("reaper", ["ignored", "handler", "thread"])
@fresh
def test_outcome_arrives_though_somebody_else_reaps_the_child(reaper, repeat):
    def wait_for_any():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, 0)
        time.sleep(0)

    handlers = {"ignored": signal.SIG_IGN, "handler": reap_all, "thread": signal.SIG_DFL}
    signal.signal(signal.SIGCHLD, handlers[reaper])
    with background_threads(*[wait_for_any] * (reaper == "thread")):
        for number in range(repeat):
            assert call(square, number) == square(number)
            if number % 10 == 0:
                assert call(bytes, MIB) == bytes(MIB)
                raised(ZeroDivisionError, call, divmod, 1, 0)
                for end in ((os._exit, 3), (kill_self, signal.SIGKILL)):
                    raised(CallableStatusUnknownError, call, *end)
    assert_no_child_is_left()


def run_state(pid):
    """The kernel's letter for what a process does: S while it sleeps, T while it is stopped."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@fresh_on_linux
def test_child_and_parent_may_be_stopped_and_continued():
    def stop_both(pids):
        helper = os.fork()
        if helper:
            os.waitpid(helper, 0)
            return "went on"
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: run_state(pid) == "T")
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        os._exit(0)

    for _ in range(5):
        assert call(lambda: stop_both([os.getppid(), os.getpid()])) == "went on"


@repetitions(8, 100)
@pytest.mark.parametrize("caller", ["main", "thread"])
@pytest.mark.parametrize("moment", ["any moment", "before the callable", "in the callable"])
@fresh_on_linux
def test_child_dies_with_its_parent(caller, moment, repeat):
    """Or does not even start the callable, where the parent has died before."""
    become_the_reaper_of_orphans()
    reached, fork = shared_numbers(3), mem_isolate._libc_fork  # by the parent, by the child, by the callable

    def fork_and_be_late():
        caller, pid = os.getpid(), fork()
        if pid == 0:
            reached[1] = 1
            wait_until(lambda: os.getppid() != caller)
        return pid

    def sleep_in_the_child():
        reached[2] = 1
        time.sleep(600)

    def start():
        reached[0] = 1
        call(sleep_in_the_child)

    if moment == "before the callable":
        mem_isolate._libc_fork = fork_and_be_late
    for _ in range(repeat if moment == "any moment" else 3):
        reached[:] = [0, 0, 0]
        victim = os.fork()
        if victim == 0:
            start() if caller == "main" else in_thread(start)
        wait_until(lambda: reached[["any moment", "before the callable", "in the callable"].index(moment)])
        if moment == "any moment":
            deadline = time.perf_counter() + random.uniform(0, 0.002)
            while time.perf_counter() < deadline:
                pass
        os.kill(victim, signal.SIGKILL)
        wait_until(reap_all, 5)
        assert moment != "before the callable" or not reached[2], "the callable was started for nobody"


def child(*_):
    return "child"


def raise_on_delivery(frame, *_):
    if frame.f_code is mem_isolate._deliver_outcome.__code__:
        raise Interrupt


def fork_and_return_last():
    pid = os.fork()
    if pid == 0:
        return "grandchild"
    status = os.waitpid(pid, 0)[1]
    return "child" if os.WIFEXITED(status) else f"child of a grandchild that ended with {status}"


class Broken:
    def __getattr__(self, name):
        raise Interrupt(name)


HOARD = []


def exhaust_memory():
    leave_address_space(64 << 20)
    for size in (1 << 20, 1 << 12, 400, 100, 16):
        with contextlib.suppress(MemoryError):
            while True:
                HOARD.append(bytes(size))


SOME_MODULES = "mem_isolate pickle _pickle io os sys traceback ctypes mmap builtins".split()
RAISING_HOOKS = [(sys, "excepthook"), (sys, "unraisablehook"), (threading, "excepthook")]
MISBEHAVIOUR = {
    "forks": lambda: "child" if os.fork() else "grandchild",
    "forks, and returns last": fork_and_return_last,
    "forks, and the grandchild raises": lambda: child(os.waitpid(os.fork() or sys.exit("grandchild"), 0)),
    "leaves a thread": lambda: child(threading.Thread(target=time.sleep, args=(600,)).start()),
    "breaks stdout": lambda: child(setattr(sys, "stdout", Broken()), setattr(sys, "stderr", Broken())),
    "lets stdout exit": lambda: child(setattr(sys, "stdout", changed(io.StringIO(), flush=sys.exit))),
    "closes what it opened": lambda: child(os.closerange(3, 1000)),
    "closes everything": lambda: child(os.closerange(0, 1000)),
    "traces": lambda: child(sys.settrace(lambda *_: None), sys.setprofile(lambda *_: None)),
    "sets a tracer that raises": lambda: child(sys.settrace(raise_on_delivery)),
    "sets a profiler that raises": lambda: child(sys.setprofile(raise_on_delivery)),
    "sets hooks that raise": lambda: child([setattr(module, hook, interrupt) for module, hook in RAISING_HOOKS]),
    "blocks signals": lambda: child(signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())),
    "deletes modules": lambda: child([sys.modules.pop(name, None) for name in SOME_MODULES]),
    "lowers the recursion limit": lambda: child(sys.setrecursionlimit(50)),
    "lowers the recursion limit and raises": lambda: interrupt(sys.setrecursionlimit(50)),
}
#: What breaks so much that, depending on the interpreter, a typed error is all that can be promised.
GRAVE_MISBEHAVIOUR = {"deletes all modules and raises": lambda: interrupt(sys.modules.clear())}
if sys.platform.startswith("linux"):
    GRAVE_MISBEHAVIOUR["exhausts memory"] = lambda: child(exhaust_memory())
    GRAVE_MISBEHAVIOUR["exhausts memory and raises"] = lambda: interrupt(exhaust_memory())


@fresh
def test_outcome_is_right_whatever_the_callable_did():
    """One outcome, from the child itself; nobody else comes out of the callable."""
    become_the_reaper_of_orphans()
    parent, outcomes = os.getpid(), {}
    for what, function in [*MISBEHAVIOUR.items(), *GRAVE_MISBEHAVIOUR.items()]:
        try:
            outcomes[what] = call(function)
        except BaseException as error:
            outcomes[what] = error if isinstance(error, MemIsolateError) else type(error)
        if os.getpid() != parent:
            os.write(1, THE_END.encode())  # which is one too many
            os._exit(1)
        wait_until(reap_all, 5)
    expected = {what: Interrupt if what.endswith("and raises") else "child" for what in outcomes}
    for what in GRAVE_MISBEHAVIOUR:
        if isinstance(outcomes[what], MemIsolateError):
            del outcomes[what], expected[what]
    assert outcomes == expected, outcomes
    assert call(lambda: setattr(builtins, "open", None) or bytes(BULK)) == bytes(BULK)
    assert call(lambda: sys.setrecursionlimit(50) or deeply_nested(200)) == deeply_nested(200)


@fresh_on_linux
def test_call_does_not_wait_for_a_daemon_of_the_callable():
    daemon = shared_numbers(1)

    def leave_a_daemon():
        if os.fork() == 0:
            os.setsid()
            daemon[0] = os.getpid()
            time.sleep(600)
        wait_until(lambda: daemon[0])
        return "right"

    become_the_reaper_of_orphans()
    assert call(leave_a_daemon) == "right"
    assert os.waitpid(-1, os.WNOHANG) == (0, 0), "the daemon died with the call"
    os.kill(daemon[0], signal.SIGKILL)
    wait_until(reap_all, 5)


@fresh_on_linux
def test_wild_pointers_of_the_callable_do_not_hurt_the_parent():
    """The outcome is right, or a typed error says what happened."""

    def scribble_and(pattern, end, *arguments):
        scribble_over_all_that_is_shared(pattern)
        return end(*arguments)

    for pattern in ("0", "1", "2", "3", "255", "random"):
        for end, *arguments in [(bytes, 5), (bytes, MIB), (os._exit, 7), (os.kill, 0, 0)]:
            try:
                result = call(scribble_and, pattern, end, *arguments)
                assert end is not os._exit and result == end(*arguments), (pattern, end)
            except MemIsolateError as error:
                assert str(error)
    error = failure(ResultDeliveryError, scribble_and, "7", limit_files, 0, signal.SIG_IGN, bytes, BULK)
    assert error.__cause__.errno == errno.EFBIG
    assert call(square, 3) == 9


@fresh_on_linux
def test_later_child_cannot_scribble_on_a_call_in_flight():
    go = shared_numbers(1)

    def wait_and_end():
        yield os.getpid()
        wait_until(lambda: go[0])
        yield b"A" * 1500

    items = isolated(wait_and_end)()
    pid = next(items)
    go[0] = 1
    wait_until(lambda: run_state(pid) == "Z")  # it has delivered, and nobody has read it
    call(scribble_over_all_that_is_shared, "100")
    assert list(items) == [b"A" * 1500]


@linux_only
@pytest.mark.parametrize("named", [True, False])
def test_in_another_pid_namespace_no_file_of_a_stranger_or_of_the_callable_is_written_to(named, tmp_path, monkeypatch):
    """Its /proc knows the parent's pid as that of somebody else."""
    monkeypatch.setattr(os, "readlink", lambda path: "0")
    monkeypatch.setattr(mem_isolate, "open", lambda *_: pytest.fail("opened a stranger's"), raising=False)
    assert call(bytes, BULK) == bytes(BULK)

    def reuse_all_descriptors():
        file = os.open(tmp_path / "file", os.O_RDWR)
        (tmp_path / "file").write_bytes(b"" if named else b"precious")
        assert named or os.unlink(tmp_path / "file") is None
        for descriptor in range(3, 1100):
            os.dup2(file, descriptor)
        return bytes(BULK)

    (tmp_path / "file").touch()
    with (tmp_path / "file").open() as file:
        failure(ResultDeliveryError, reuse_all_descriptors)
        assert file.read() == ("" if named else "precious")


@linux_only
def test_child_that_asked_to_be_traced_does_not_stay_behind():
    error = failure(KilledBySignalError, lambda: (LIBC.ptrace(0, 0, 0, 0), kill_self(signal.SIGTERM)))  # PTRACE_TRACEME
    assert "memory" not in str(error)


def test_a_stop_is_not_taken_for_the_end_of_a_child_that_is_killed(monkeypatch):
    """As a traced child may stop, for a signal of somebody else, when it is about to be killed."""
    wait4 = mem_isolate._libc_wait4

    def see_a_stop(pid, ending, *_):
        monkeypatch.setattr(mem_isolate, "_libc_wait4", wait4)
        ctypes.cast(ending, ctypes.POINTER(ctypes.c_int))[0] = signal.SIGSTOP << 8 | 0x7F
        return pid

    monkeypatch.setattr(mem_isolate, "_libc_wait4", see_a_stop)
    raised(CallableTimeoutError, isolated(block_every_signal_and_sleep, timeout=0.5))
    assert mem_isolate._libc_wait4 is wait4


# ------------------------------------------------------------------- Crashes and timeouts say where and at what cost

FRAME = re.compile(r'File "([^"]+)", line (\d+),? in ([\w<>]+)')
LOCK = threading.Lock()


def report(kind, function, *arguments):
    """The error of exactly this class that the function raises, and the frames of its cause, as {name: line}."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    error = checked(kind, raised(MemIsolateError, function, *arguments))
    frames = FRAME.findall(str(error.__cause__))
    assert mem_isolate.__file__ not in [file for file, _, _ in frames], str(error.__cause__)
    assert "raised" not in [name for _, _, name in frames], str(error.__cause__)  # it lies above the call
    return error, {name: int(line) for _, line, name in frames}


def names(error, frames, function):
    """Whether the message alone, often all that a log keeps, names this function and its line."""
    return re.search(rf"\b{function}\b.*\b{frames[function]}\b", str(error))


@pytest.fixture(params=["disable", "enable"])
def either_way(request):
    """The test runs with and without a faulthandler that the user enabled in the parent."""
    before = faulthandler.is_enabled()
    getattr(faulthandler, request.param)()
    yield
    assert faulthandler.is_enabled() == (request.param == "enable")
    (faulthandler.enable if before else faulthandler.disable)()


def go_wrong(function, *arguments):
    return function(*arguments)


async def go_wrong_in_a_loop(function, *arguments):
    await asyncio.sleep(0)
    go_wrong(function, *arguments)


def go_wrong_beside_a_thread(function):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    go_wrong(function)


def call_in_a_loop(*arguments):
    return asyncio.run(call_async(*arguments))


def read_beyond_the_end_of_a_file():
    with tempfile.TemporaryFile() as file:
        file.truncate(mmap.PAGESIZE)
        page = mmap.mmap(file.fileno(), mmap.PAGESIZE)
        file.truncate(0)
        return page[0]


def loop():
    while True:
        pass


FAULTS = [signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL]
CRASHES = {
    "SIGSEGV by string_at": (ctypes.string_at, 0),
    "SIGBUS by read_beyond_the_end_of_a_file": (read_beyond_the_end_of_a_file,),
    "SIGABRT by abort": (os.abort,),
    **{f"{number.name} by raise_signal": (signal.raise_signal, number) for number in FAULTS},
}
if os.uname().machine == "x86_64":  # others divide by zero without a word
    CRASHES["SIGFPE by div"] = (LIBC.div, 1, 0)


SEGFAULT = functools.partial(go_wrong, ctypes.string_at, 0)
OVERFLOW = functools.partial(go_wrong, faulthandler._stack_overflow)
STOP = functools.partial(signal.raise_signal, signal.SIGSTOP)
DEEP = functools.reduce(lambda function, _: functools.partial(go_wrong, function), range(300), SEGFAULT)
NAMESAKE = compile("string_at(0)", "/srv/mem_isolate.py", "eval")
IN_C = {crash: what for crash, what in CRASHES.items() if not inspect.isfunction(what[0])}  # where it has no frame


@cases(
    "crash, function, expected",  # the names of all frames, the innermost first, or of some where the last is "..."
    *[(crash, functools.partial(call, go_wrong, *what), ["go_wrong"]) for crash, what in IN_C.items()],
    ("SIGBUS", lambda: call(go_wrong, read_beyond_the_end_of_a_file), ["read_beyond_the_end_of_a_file", "go_wrong"]),
    ("SIGSEGV", functools.partial(call, go_wrong, ctypes.string_at, 0), ["string_at", "go_wrong"]),
    ("thread", lambda: in_thread(isolated(SEGFAULT)), ["string_at", "go_wrong"]),
    ("busy threads", background_threads(burn_the_gil, burn_the_gil)(isolated(SEGFAULT)), ["string_at", "go_wrong"]),
    ("async def", lambda: call_in_a_loop(go_wrong_in_a_loop, SEGFAULT), ["string_at", "go_wrong_in_a_loop", "..."]),
    ("generator", lambda: list(isolated(lambda: (yield SEGFAULT()))()), ["string_at", "go_wrong", "<lambda>"]),
    ("pickled", isolated(lambda: OnPickle(SEGFAULT)), ["string_at", "go_wrong", "__reduce__"]),
    ("deep", isolated(DEEP), ["string_at", "go_wrong"]),
    ("namesake", isolated(lambda: eval(NAMESAKE, vars(ctypes))), ["string_at", "<module>", "<lambda>"]),
    ("beside a thread", lambda: isolated(go_wrong_beside_a_thread)(SEGFAULT), ["string_at", "_bootstrap", "..."]),
    ("in a thread", lambda: isolated(in_thread)(SEGFAULT), ["string_at", "in_thread", "..."]),
    ("overflow", isolated(OVERFLOW), ["go_wrong"]),
    ("overflow in a thread", lambda: in_thread(isolated(OVERFLOW)), ["go_wrong"]),
)
def test_a_crash_tells_where_however_it_was_called(crash, function, expected, either_way):
    error, frames = report(ResultDeliveryError if crash == "pickled" else KilledBySignalError, function)
    name = crash.split()[0] if crash.startswith("SIG") else "SIGSEGV"
    assert error.signal is signal.Signals[name] and name in str(error) and names(error, frames, expected[0])
    assert set(expected) - {"..."} <= set(frames) and "call_in_a_loop" not in frames, str(error.__cause__)
    assert set(frames) <= set(expected) or expected[-1] == "...", str(error.__cause__)
    line = go_wrong.__code__.co_firstlineno + 1
    assert frames.get("go_wrong", line) == line
    assert type(error.__cause__) is type(raised(ZeroDivisionError, call, divmod, 1, 0).__cause__)


def test_its_own_frames_are_left_out_wherever_the_file_lies():
    code = compile(Path(mem_isolate.__file__).read_bytes(), "/srv/\N{LATIN SMALL LETTER E WITH ACUTE}.py", "exec")
    exec(code, elsewhere := {"__name__": "elsewhere"})
    error = raised(elsewhere["KilledBySignalError"], elsewhere["execute_in_isolated_process"], SEGFAULT)
    assert {name for _, _, name in FRAME.findall(str(error.__cause__))} == {"string_at", "go_wrong"}


@pytest.mark.parametrize("end", [SEGFAULT, loop, STOP], ids=["crash", "loop", "stopped"])
def test_the_crash_of_a_grandchild_is_not_taken_for_the_childs(end, either_way):
    def fork_and_go_on():
        for crash in (read_beyond_the_end_of_a_file, lambda: read_beyond(ctypes.string_at, 0)):
            grandchild = os.fork()
            os.waitpid(grandchild, 0) if grandchild else crash()
        end()

    def read_beyond(function, *arguments):
        function(*arguments)

    kind = KilledBySignalError if end is SEGFAULT else CallableTimeoutError
    error, frames = report(kind, isolated(timeout=0.4)(fork_and_go_on))
    assert ("fork_and_go_on" in frames) == (end is not STOP)
    assert not re.search("read_beyond|SIGBUS", f"{error} {error.__cause__}")
    if end is loop and hasattr(signal, "SIGRTMIN"):  # where the caller has left no signal to ask the child by
        before = signal.pthread_sigmask(signal.SIG_BLOCK, range(signal.SIGRTMIN, signal.SIGRTMAX + 1))
        error = raised(CallableTimeoutError, isolated(timeout=0.4)(fork_and_go_on))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        assert error.__cause__ is None and "read_beyond" not in str(error)


def use(seen, function, *arguments):
    seen[0], used = os.getpid(), b"x" * (64 * MIB)
    while time.process_time() < 0.1:
        pass
    return function(*arguments) if used else None


def says_size(text, size):
    sizes = re.findall(r"(\d+(?:\.\d+)?)\s*(b|Ki?B|Mi?B|Gi?B)", text.replace(",", ""))
    return any(abs(float(number) * 1024 ** "bKMG".index(unit[0]) - size) < size / 10 for number, unit in sizes)


@cases(
    "outcome, kind, what",  # and the class of the module's error that the call raises, if it does
    ("result", None, (int,)),
    ("exception", None, (divmod, 1, 0)),
    ("crash", KilledBySignalError, (ctypes.string_at, 0)),
    ("SIGKILL", KilledBySignalError, (signal.raise_signal, signal.SIGKILL)),
    ("exit", UnexpectedExitStatusError, (os._exit, 3)),
    ("timeout", CallableTimeoutError, (time.sleep, 60)),
    ("no pickle", SerializationError, (threading.Lock,)),
    ("no unpickling", DeserializationError, (lambda: OnPickle(lambda: (int, ("x",))),)),
    ("exit when pickled", ResultDeliveryError, (lambda: OnPickle(os._exit, 4),)),
)
def test_errors_and_debug_records_tell_outcome_pid_memory_and_time(outcome, kind, what, caplog):
    seen, limited = shared_numbers(1), isolated(timeout=0.8 if kind is CallableTimeoutError else 60)(use)
    with caplog.at_level(logging.DEBUG, "mem_isolate"), contextlib.suppress(ZeroDivisionError):
        error = report(kind, limited, seen, *what)[0] if kind else limited(seen, *what) and None
    (record,) = caplog.records
    text, pid, memory, seconds = record.getMessage(), record.child_pid, record.peak_memory, record.cpu_time
    assert re.match(r"use .*returned after \d+\.\d+ s, [1-9]" if outcome == "result" else "use .*rror", text)
    assert pid == seen[0] and 0.09 < seconds < 10
    resident = of_files = 0
    if sys.platform == "linux":
        resident, of_files = (int(pages) * mmap.PAGESIZE for pages in Path("/proc/self/statm").read_text().split()[1:3])
    # Pages of files are not copied by a fork: the child has only those of them that it touches.
    assert resident - of_files + 50 * MIB < memory < resident + 150 * MIB
    assert re.search(rf"\b{pid}\b", text) and says_size(text, memory), text
    assert any(abs(float(number) - seconds) < 0.01 for number in re.findall(r"\d+\.\d+", text)), text
    if kind:
        assert kind.__name__ in text and (error.pid, error.peak_memory, error.cpu_time) == (pid, memory, seconds)
        assert bool(re.search("out.of.memory|memory ran out", str(error), re.IGNORECASE)) == (outcome == "SIGKILL")
        assert outcome != "SIGKILL" or says_size(str(error), memory)


def test_debug_record_is_of_all_items_and_buffers(caplog):
    with caplog.at_level(logging.DEBUG, "mem_isolate"):
        for _ in isolated(lambda: (yield from [bytes(MIB)] * 3), timeout=60)():
            time.sleep(0.1)
        call(lambda: [holder_of(100_000), holder_of(3 * MIB)])
    found, of_a_result = re.findall(r"returned after (\S+) s, (\d+) bytes", caplog.text)
    assert float(found[0]) > 0.3
    assert 3 * MIB < int(found[1]) < 4 * MIB and 3 * MIB < int(of_a_result[1]) < 4 * MIB


def test_every_call_leaves_one_debug_record_and_none_at_other_levels(caplog):
    nameless = type("Nameless", (Broken,), {"__call__": os.abort})()
    for level, count in [(logging.INFO, 0), (logging.DEBUG, 3)]:
        with caplog.at_level(level, "mem_isolate"):
            raised(KilledBySignalError, call, nameless)
            asyncio.run(isolated(pid_and_arguments_async)())
            raised(asyncio.TimeoutError, asyncio.run, asyncio.wait_for(call_async(time.sleep, 60), 0.05))
        assert [record.levelname for record in caplog.records] == ["DEBUG"] * count
    said = " ".join(record.getMessage() for record in caplog.records)
    words = ["^a Nameless object", "KilledBySignalError", "pid_and_arguments_async", "returned", "sleep", "Cancelled"]
    assert re.search(".*".join(words), said), said


def oom_score():
    return int(Path("/proc/self/oom_score_adj").read_text())


@fresh_on_linux
def test_the_child_is_the_first_that_the_kernel_kills_for_memory():
    def assert_it_stays(score):
        """From when the parent sleeps, and so has done what it had to do, for a while, should it look again."""
        wait_until(lambda: run_state(os.getppid()) == "S")
        deadline = time.monotonic() + 0.2
        while time.monotonic() < deadline:
            assert oom_score() == score

    for own in sorted({oom_score(), max(oom_score(), 900)}):
        Path("/proc/self/oom_score_adj").write_text(str(own))
        higher = functools.partial(wait_until, lambda own=own: oom_score() == min(own + 300, 1000))
        for function in (call, isolated(timeout=60)(go_wrong), call_in_a_loop):
            function(higher)
        pidfd_open, mem_isolate._pidfd_open = mem_isolate._pidfd_open, None
        call(higher)
        mem_isolate._pidfd_open = pidfd_open
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # then the pid may be another process's at any time
        call(assert_it_stays, own)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        assert oom_score() == own


def dispositions():
    """What libc's ``sigaction`` says of every signal: it knows C handlers, which ``signal.getsignal`` does not."""
    answers = {number: ctypes.create_string_buffer(256) for number in range(1, signal.NSIG)}
    return {n: answer.raw[:16] for n, answer in answers.items() if LIBC.sigaction(n, None, answer) == 0}


def assert_told(crashes):
    before, enabled = dispositions(), faulthandler.is_enabled()
    for crash in crashes:
        error, frames = report(KilledBySignalError, isolated(go_wrong), *CRASHES[crash])
        assert error.signal is signal.Signals[crash.split()[0]] and "go_wrong" in frames
    assert "loop" in report(CallableTimeoutError, isolated(timeout=0.2)(loop))[1]
    assert dispositions() == before and faulthandler.is_enabled() == enabled


def fail_beside_handlers(mode, path):
    file, heard = open(path, "wb"), []
    faulthandler.enable(file, all_threads=False) if mode == "enable" else faulthandler.disable()
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    assert_told(CRASHES)
    real_time = range(getattr(signal, "SIGRTMIN", 1), getattr(signal, "SIGRTMAX", 0) + 1)
    handled = [signal.SIGABRT, *real_time]
    for number in handled:
        signal.signal(number, lambda number, _: heard.append(number))
    signal.signal(signal.SIGFPE, signal.SIG_IGN)
    LIBC.signal(signal.SIGSEGV, ctypes.cast(LIBC._exit, ctypes.c_void_p))
    for limited in (isolated, isolated(timeout=60)):
        error, frames = report(UnexpectedExitStatusError, limited(SEGFAULT))
        assert error.exit_status == signal.SIGSEGV and frames == {}
        raising = [signal.SIGFPE, *handled]
        assert limited(lambda: list(map(signal.raise_signal, raising)) and heard)() == handled and not heard
        assert not {n for n, _ in dispositions().items() - limited(dispositions)().items()} & {signal.SIGSEGV, *handled}
    if real_time:
        assert report(CallableTimeoutError, isolated(timeout=0.2)(loop))[1] == {}
        signal.signal(real_time[-2], signal.SIG_DFL)
    assert_told([crash for crash in CRASHES if crash.startswith(("SIGBUS", "SIGILL"))])  # nobody else's
    os.truncate(path, 0)
    signal.raise_signal(signal.SIGILL)


@pytest.mark.parametrize("mode", ["disable", "enable"])
def test_handlers_and_faulthandler_of_others_are_left_alone_and_nothing_is_printed(mode, tmp_path):
    path = tmp_path / "dump"
    assert in_fresh_process(fail_beside_handlers, mode, path, expect=-signal.SIGILL) == ""
    dump = path.read_text()  # of the parent's crash, without all its threads, for the user did not ask for them
    assert ("fail_beside_handlers" in dump) == (mode == "enable") and "_bootstrap" not in dump


def test_a_faulthandler_that_the_callable_enables_or_disables_is_its_own(tmp_path, either_way):
    dump = tmp_path / "dump"
    for change in (faulthandler.disable, lambda: faulthandler.enable(dump.open("wb"))):
        error, frames = report(KilledBySignalError, isolated(lambda change: [change(), SEGFAULT()]), change)
        assert error.signal is signal.SIGSEGV and "SIGSEGV" in str(error) and frames == {}
    assert "go_wrong" in dump.read_text()


@cases("kind, function", ("crash", KilledBySignalError, SEGFAULT), ("timeout", CallableTimeoutError, loop))
def test_a_callable_that_reuses_descriptors_gets_no_dump_in_its_files(tmp_path, kind, function, either_way):
    for first in (3, 10**6):  # it closes all, or none
        limited = isolated(timeout=0.4)(fill_descriptors_and_go_wrong)
        _, frames = report(kind, limited, tmp_path / "file", function, first)
        assert (tmp_path / "file").read_bytes() == b""
    assert "fill_descriptors_and_go_wrong" in frames


def test_a_crash_is_told_with_few_descriptors_and_stays_what_it_is_with_small_files(either_way):
    def crash_with_few_descriptors():
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        return report(KilledBySignalError, call, SEGFAULT)[1]

    assert "go_wrong" in call(crash_with_few_descriptors)
    error, _ = report(KilledBySignalError, call, limit_files, 4096, signal.SIG_IGN, SEGFAULT)
    assert error.signal is signal.SIGSEGV
    assert call(limit_files, 4096, signal.SIG_DFL, raised, KilledBySignalError, call, SEGFAULT).signal is error.signal


def handle_every_signal_by(handler):
    for number in signal.valid_signals():
        with contextlib.suppress(OSError):
            signal.signal(number, handler)
    loop()


def block_every_signal_and_sleep(*_):
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    time.sleep(60)


@functools.lru_cache(maxsize=None)
def duration_of_a_sleep(seconds):
    start = time.perf_counter()
    call(time.sleep, seconds)
    return time.perf_counter() - start


@cases(
    "function, expected",  # frames that the error has, the innermost first
    ("loop", loop, ["loop"]),
    ("C with the GIL", lambda: go_wrong(ctypes.PyDLL(None).sleep, 60), ["go_wrong", "<lambda>"]),
    ("lock", lambda: [LOCK.acquire(), go_wrong(LOCK.acquire)], ["go_wrong", "<lambda>"]),
    ("async def", functools.partial(go_wrong_in_a_loop, time.sleep, 60), ["go_wrong", "go_wrong_in_a_loop"]),
    ("awaiting", functools.partial(asyncio.sleep, 60), ["select", "run_forever"]),
    ("beside a thread", lambda: go_wrong_beside_a_thread(loop), ["loop", "go_wrong", "_bootstrap"]),
    ("in a call of its own", lambda: go_wrong(isolated(time.sleep), 60), ["go_wrong", "<lambda>"]),
    ("without descriptors", lambda: [os.closerange(3, 256), loop()], ["loop", "<lambda>"]),
    ("pickling", lambda: OnPickle(go_wrong, time.sleep, 60), ["go_wrong", "__reduce__"]),
    ("pickling an exception", lambda: raise_it(PicklesAs(go_wrong, time.sleep, 60)), ["go_wrong", "__reduce__"]),
    ("all blocked", block_every_signal_and_sleep, []),
    ("all handled", lambda: handle_every_signal_by(lambda *_: None), []),
    ("all ignored", lambda: handle_every_signal_by(signal.SIG_IGN), []),
    ("stopped", STOP, []),
)
def test_a_timeout_tells_where_it_hung_and_comes_in_time(function, expected, either_way):
    """A tenth of a second later at most, in which the child may say where it is; a busy machine may delay one."""
    limited, durations = isolated(timeout=0.2)(function), []
    while not durations or min(durations) >= duration_of_a_sleep(0.4) and len(durations) < 3:
        start = time.perf_counter()
        run = functools.partial(asyncio.run, limited()) if inspect.iscoroutinefunction(limited) else limited
        error, frames = report(CallableTimeoutError, run)
        durations.append(time.perf_counter() - start)
        assert error.timeout == 0.2 and "0.2" in str(error) and "memory" not in str(error)
        assert set(expected) <= set(frames), str(error.__cause__)
        assert not expected or names(error, frames, expected[0])
        assert is_gone(error.pid)
    assert 0.199 < min(durations) < duration_of_a_sleep(0.4)


def test_timeout_may_be_any_positive_real_number():
    for short in (5e-324, 1e-6, fractions.Fraction(1, 50)):
        raised(CallableTimeoutError, isolated(timeout=short)(time.sleep), 60)
    for timeout in (60, sys.maxsize, 1e300, fractions.Fraction(121, 2)):
        assert isolated(timeout=timeout)(pow)(2, 5) == 32
        assert asyncio.run(isolated(timeout=timeout)(pid_and_arguments_async)(5))[1] == (5,)
        raised(ZeroDivisionError, isolated(timeout=timeout)(divmod), 1, 0)
        raised(KilledBySignalError, isolated(timeout=timeout)(kill_self), signal.SIGKILL)
    assert isolated(timeout=pytest.importorskip("numpy").float16(30))(pow)(2, 5) == 32


@has_pidfd
def test_waiting_for_the_limit_does_not_poll_and_the_child_is_killed_by_pidfd_which_cannot_hit_another(monkeypatch):
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("killed by pid"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
    raised(CallableTimeoutError, isolated(timeout=0.3)(time.sleep), 60)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before < 8
    raised(CallableTimeoutError, isolated(timeout=0.1)(block_every_signal_and_sleep))


@root_only
@fresh_on_linux
def test_child_that_may_not_be_killed_is_told_and_leaves_nothing_else():
    os.setresuid(65534, 65534, 0)
    before = state_of_the_caller()
    error = raised(CallableTimeoutError, isolated(timeout=0.2)(lambda: (os.setresuid(0, 0, 0), time.sleep(0.6))))
    assert "cannot be killed" in str(error) and error.timeout == 0.2
    assert state_of_the_caller() == before


@pytest.mark.parametrize(
    "refused",
    ["_pidfd_open ENOSYS", "_pidfd_open EMFILE", "_pidfd_send_signal ENOSYS", "_pidfd_send_signal EPERM", "SIGCHLD -"],
)
@fresh
def test_calls_work_and_are_ended_where_pidfds_are_refused_or_sigchld_is_ignored(refused):
    what, name = refused.split()
    number = getattr(errno, name, None)
    if number:
        setattr(mem_isolate, what, lambda *_: raise_it(OSError(number, os.strerror(number))))
    else:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    assert call(pow, 2, 5) == isolated(timeout=60)(pow)(2, 5) == call_in_a_loop(pow, 2, 5) == 32
    raised(CallableTimeoutError, isolated(timeout=0.05)(time.sleep), 60)
    error = raised(CallableTimeoutError, isolated(block_every_signal_and_sleep, timeout=0.1))
    assert "was killed" in str(error) and "cannot" not in str(error)
    raised(CallableTimeoutError, asyncio.run, isolated(timeout=0.05)(asyncio.sleep)(60))
    raised(asyncio.TimeoutError, asyncio.run, asyncio.wait_for(call_async(time.sleep, 60), 0.05))
    raised(KeyboardInterrupt, call, interrupt_the_parent)
    assert_no_child_is_left()
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def c_malloc(size):
    """Leak memory of C's."""
    return LIBC.malloc(size) or raise_it(MemoryError())


def hoard(make, size):
    """Allocate until there is no more; return by how many MiB that made the process grow. Stop at 1 GiB."""
    before, reserve, kept = kibibytes("/proc/self/status", "VmData"), bytearray(MIB), []
    try:
        while len(kept) * size < 1024 * MIB:
            kept.append(make(size))
    except MemoryError:
        del reserve
    return (kibibytes("/proc/self/status", "VmData") - before) / 1024


@linux_only
@pytest.mark.parametrize("make, size", [(bytearray, MIB), (bytearray, 4096), (c_malloc, MIB), (c_malloc, 1000)])
def test_memory_limit_is_met_inside_the_child_and_does_not_count_what_the_parent_holds(make, size):
    held = bytearray(os.urandom(1024)) * (48 * 1024)  # 48 MiB of touched pages
    assert 24 <= isolated(memory_limit=32 * MIB)(hoard)(make, size) <= 33
    assert len(held) == 48 * MIB
    assert isolated(memory_limit=2**70)(pow)(2, 5) == 32  # which is no limit


@linux_only
@pytest.mark.parametrize("limit", [1, 32 * MIB])
def test_python_code_gets_a_memory_error_which_arrives_as_such(limit):
    before = resource.getrlimit(resource.RLIMIT_DATA)
    caught = raised(MemoryError, isolated(memory_limit=limit, timeout=60)(lambda: [[] for _ in range(10**8)]))
    assert "MemoryError" in str(caught.__cause__)  # where memory is out, the interpreter may have no traceback
    large = OnPickle(lambda: (len, (bytearray(64 * MIB),)))
    raised(MemoryError, list, isolated(memory_limit=limit, timeout=60)(lambda: (yield large))())
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    assert len(bytearray(64 * MIB)) == 64 * MIB


@linux_only
def test_result_of_nearly_the_memory_limit_can_be_returned():
    """Also one that takes as much again to pickle, and where the limit cannot be lifted."""
    broken = functools.partial(raise_it, RuntimeError())
    assert isolated(memory_limit=32 * MIB)(lambda: setattr(resource, "setrlimit", broken))() is None
    for kind in (bytes, bytearray, lambda size: ["€" * (size // 3)]):
        assert isolated(memory_limit=32 * MIB)(kind)(30 * MIB) == kind(30 * MIB)


@linux_only
def test_memory_limit_is_refused_where_the_system_cannot_do_it(monkeypatch):
    ran = shared_numbers(1)
    limited = isolated(memory_limit=64 * MIB)(ran.__setitem__)
    with monkeypatch.context() as patch:
        patch.setattr(resource, "setrlimit", lambda *_: None)  # as under qemu-user
        assert "memory_limit" in str(raised(ChildSetupError, limited, 0, 1))
    monkeypatch.setattr(mem_isolate, "_libc_fork", None)
    nowhere = types.SimpleNamespace(FileIO=lambda path: io.FileIO(f"/nowhere{path}"))
    monkeypatch.setattr(mem_isolate, "io", nowhere)
    assert "/proc" in str(raised(NotImplementedError, limited, 0, 1))
    assert ran[0] == 0


# ----------------------------------------------------------------------------------------------------------- asyncio


@pytest.fixture(scope="module", params=["asyncio.run", "asyncio.run in a thread", "uvloop"])
def run_in_a_loop(request):
    if request.param == "uvloop":
        uvloop = pytest.importorskip("uvloop", minversion="0.18")
        uvloop.run(asyncio.sleep(0))  # makes descriptors that libuv keeps
        return uvloop.run
    if request.param == "asyncio.run":
        return asyncio.run
    return lambda coroutine: in_thread(lambda: asyncio.run(coroutine))


def threads_of_the_system():
    return len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0


def test_30_calls_at_once_while_the_loop_keeps_turning(run_in_a_loop):
    places, turns = shared_numbers(30), shared_numbers(1)

    def meet_the_others(place):
        """Return when all are running at the same time, and the caller's loop has gone on turning while they did."""
        places[place] = 1
        wait_until(lambda: all(places), seconds=60)
        before = turns[0]
        wait_until(lambda: turns[0] > before + 20, seconds=60)
        return bytes(place * 4096)

    async def meet_the_others_async(place):
        await asyncio.sleep(0.01)
        return meet_the_others(place)

    async def main():
        threads = most_threads = threads_of_the_system()
        functions = [meet_the_others, meet_the_others_async] * 15
        task = asyncio.gather(*[call_async(function, place) for place, function in enumerate(functions)])
        while not task.done():
            turns[0] += 1
            most_threads = max(most_threads, threads_of_the_system())
            await asyncio.sleep(0.001)
        assert await task == [bytes(place * 4096) for place in range(30)]
        if hasattr(os, "pidfd_open"):
            assert most_threads == threads, "a thread was started"

    run_in_a_loop(main())


def test_outcomes_arrive_in_the_task_that_awaits(run_in_a_loop):
    name = contextvars.ContextVar("name")

    async def raise_it_async(error):
        await asyncio.sleep(0)
        raise error

    async def main():
        name.set("the task's")
        assert await call_async(name.get) == "the task's"
        for function in (pid_and_arguments, pid_and_arguments_async):
            pid, arguments, named = await call_async(function, 1, "two", three=3)
            assert (pid != os.getpid(), arguments, named) == (True, (1, "two"), {"three": 3})
        for function in (raise_it, raise_it_async):
            with pytest.raises(ValueError, match="no luck") as caught:
                await call_async(function, ValueError("no luck"))
            assert f"in {function.__name__}" in str(caught.value.__cause__)
        for kind, *what in [(KilledBySignalError, kill_self, signal.SIGKILL), (SerializationError, threading.Lock)]:
            with pytest.raises(kind):
                await call_async(*what)
        assert await call_async(bytes, 5 * MIB) == bytes(5 * MIB)

    run_in_a_loop(main())


async def started_call(pid):
    """A task whose callable has told its process id, and sleeps."""

    def report_pid_and_sleep():
        pid[0] = os.getpid()
        block_every_signal_and_sleep()

    task = asyncio.ensure_future(call_async(report_pid_and_sleep))
    while not pid[0] and not task.done():
        await asyncio.sleep(0.001)
    return await task if task.done() else task


@pytest.mark.parametrize("cancel", ["cancel", "cancel twice", "wait_for", "main returns"])
def test_cancelled_call_kills_and_reaps_the_child_before_it_returns(run_in_a_loop, cancel):
    pid = shared_numbers(1)

    async def main():
        task = await started_call(pid)
        if cancel == "main returns":
            return  # and asyncio.run cancels what is left
        if cancel == "wait_for":
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.02)
        else:
            task.cancel()
            if cancel == "cancel twice":
                await asyncio.sleep(0)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert is_gone(pid[0])

    run_in_a_loop(main())
    assert is_gone(pid[0])


def test_call_can_be_cancelled_at_every_turn_of_the_loop(run_in_a_loop):
    async def main():
        for turns in range(8):
            task = asyncio.ensure_future(call_async(time.sleep, 60))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_no_child_is_left()

    run_in_a_loop(main())


@pytest.mark.filterwarnings("ignore:coroutine method")
@pytest.mark.parametrize("what", ["call", "generator"])
def test_what_is_abandoned_with_its_loop_leaves_no_child(what):
    before, loop, pid = state_of_the_caller(), asyncio.new_event_loop(), shared_numbers(1)
    loop.set_exception_handler(lambda *_: None)

    async def first_item():
        async for item in isolated(countdown_async)(10**7):
            return item

    abandoned = loop.run_until_complete(started_call(pid) if what == "call" else first_item())
    if what == "call":
        abandoned._log_destroy_pending = False
    assert what == "call" or abandoned == 10**7
    loop.close()
    del abandoned
    gc.collect()
    assert_nothing_is_left_after_an_exception(before, "a closed loop")
    assert is_gone(pid[0]) or what == "generator"


@pytest.mark.parametrize("runner", ["asyncio", pytest.param("uvloop", marks=has_uvloop)])
@fresh
def test_ctrl_c_is_one_keyboard_interrupt_and_leaves_no_child_also_under_asyncio_run(runner):
    """A terminal sends it to the child too."""
    for sleep in (time.sleep, LIBC.sleep):
        raised(KeyboardInterrupt, call, lambda sleep=sleep: [os.killpg(0, signal.SIGINT), sleep(60)])
        assert_no_child_is_left()
    pid = shared_numbers(1)

    async def main():
        task = await started_call(pid)
        os.killpg(0, signal.SIGINT)
        await task

    raised(KeyboardInterrupt, importlib.import_module(runner).run, main())
    assert is_gone(pid[0])


def use_asyncio_run():
    raised(RuntimeError, asyncio.get_running_loop)
    return asyncio.run(use_a_loop())


async def use_a_loop():
    """Use what a loop has: timers, tasks, threads, pipes, signals, subprocesses, a nested isolated call."""
    loop, process_events = asyncio.get_running_loop(), []
    assert loop.is_running() and len(asyncio.all_tasks()) == 1
    loop.add_signal_handler(signal.SIGUSR1, process_events.append, "signal")
    kill_self(signal.SIGUSR1)
    reader, writer = os.pipe()
    loop.add_reader(reader, process_events.append, "pipe")
    os.write(writer, b"x")
    loop.call_soon_threadsafe(process_events.append, "soon")
    process = await asyncio.create_subprocess_exec("true")
    both = await asyncio.gather(asyncio.sleep(0.01, "timer"), loop.run_in_executor(None, str, "thread"))
    nested = await call_async(pow, 2, 5)
    loop.remove_reader(reader)
    return sorted({*process_events, *both}), await process.wait(), nested


def test_callable_may_use_asyncio_whatever_loop_runs_in_the_parent(run_in_a_loop):
    """And that loop goes on: the child shares its epoll, wake-up socket, signal descriptor, and leaves them alone."""
    expected = ["pipe", "signal", "soon", "thread", "timer"], 0, 32

    async def main():
        loop, seen, (reader, writer) = asyncio.get_running_loop(), asyncio.Queue(), os.pipe()
        loop.add_reader(reader, lambda: seen.put_nowait(os.read(reader, 9)))
        assert call(use_asyncio_run) == expected
        assert await isolated(timeout=60)(use_a_loop)() == expected
        for function in (use_a_loop, use_asyncio_run, lambda: gc.collect() and expected or expected):
            assert await call_async(function) == expected
            os.write(writer, b"ready")
            assert await asyncio.wait_for(seen.get(), 10) == b"ready"
            await asyncio.wait_for(loop.run_in_executor(None, loop.call_soon_threadsafe, seen.put_nowait, "woken"), 10)
            assert await asyncio.wait_for(seen.get(), 10) == "woken"
        loop.remove_reader(reader)
        os.close(reader)
        os.close(writer)

    assert call(use_asyncio_run) == expected
    run_in_a_loop(main())


def test_callable_has_an_event_loop_of_its_own_where_asyncio_run_is_patched(monkeypatch):
    """As by nest_asyncio, whose ``run`` uses the loop that is set."""
    steps = shared_numbers(2)

    async def other_task(parent=os.getpid()):
        while True:
            steps[os.getpid() == parent] += 1
            await asyncio.sleep(0)

    async def main():
        other = asyncio.ensure_future(other_task())
        await asyncio.sleep(0)
        monkeypatch.setattr(asyncio, "run", lambda main: asyncio.get_event_loop().run_until_complete(main))
        await isolated(asyncio.sleep)(0.05)
        other.cancel()

    asyncio.run(main())
    assert steps[1] > 1 and steps[0] == 0


# ----------------------------------------------------------------------------------------- Generators and the stream


def countdown(start):
    for number in range(start, 0, -1):
        yield number
    return "done"


async def countdown_async(start):
    for number in range(start, 0, -1):
        await asyncio.sleep(0)
        yield number


async def collect(items):
    return [item async for item in items]


def test_generator_function_runs_in_one_child_and_keeps_its_looks(monkeypatch):
    pids = set(isolated(lambda count: (yield from (os.getpid() for _ in range(count))))(5))
    assert len(pids) == 1 and pids != {os.getpid()}
    limited = isolated(countdown)
    assert inspect.isgeneratorfunction(limited) and limited.__name__ == "countdown"
    assert list(limited(1000)) == list(range(1000, 0, -1))
    assert list(call(countdown, 3)) == list(call(functools.partial(countdown, 3))) == [3, 2, 1]
    items = limited(1)
    assert next(items) == 1
    assert raised(StopIteration, next, items).value == "done"
    items = limited(1)
    monkeypatch.setattr(mem_isolate, "_libc_fork", lambda: -1)  # which is not tried before the first item is asked for
    raised(ForkError, next, items)


def test_async_generator_function_gives_an_asynchronous_iterator():
    async def main():
        decorated = isolated(timeout=30)(countdown_async)
        assert inspect.isasyncgenfunction(decorated)
        assert await collect(decorated(300)) == list(range(300, 0, -1))
        assert await collect(await call_async(countdown, 3)) == [3, 2, 1]
        assert await collect(await call_async(countdown_async, 3)) == [3, 2, 1]
        items = decorated(10**9)
        assert await items.__anext__() == 10**9
        await items.aclose()
        assert_no_child_is_left()

    asyncio.run(main())


def test_item_arrives_as_soon_as_it_is_yielded():
    go_on = shared_numbers(1)

    def wait_between():
        yield 1
        wait_until(lambda: go_on[0])
        yield 2

    items = isolated(timeout=20)(wait_between)()
    assert next(items) == 1
    go_on[0] = 1
    assert list(items) == [2]
    assert list(isolated(timeout=0.3)(lambda: (yield from map(time.sleep, [0.1] * 4)))()) == [None] * 4


@pytest.mark.parametrize("asynchronous", [False, True], ids=["def", "async def"])
@cases(
    "end, kind, word",  # what the body does when it is asked for a third item, its error, and a word that it says
    ("exception", lambda: raise_it(KeyError("raised")), KeyError, "in body"),
    ("SIGKILL", lambda: kill_self(signal.SIGKILL), KilledBySignalError, "or because the thread"),
    ("exit", lambda: os._exit(3), UnexpectedExitStatusError, "3"),
    ("timeout", lambda: time.sleep(60), CallableTimeoutError, "in body"),
    ("no pickle", threading.Lock, SerializationError, "lock"),
    ("no descriptor", lambda: os.closerange(3, 4096), ResultDeliveryError, "written: OSError: [Errno 9]"),
)
def test_what_was_yielded_before_a_failure_arrives_first(end, kind, word, asynchronous):
    arrived = []

    def body():
        yield "first"
        yield holder_of(100_000)
        yield end()

    async def body_async():
        for item in body():
            yield item

    async def read():
        async for item in limited(body_async)():
            arrived.append(item)

    limited = isolated(timeout=0.3 if kind is CallableTimeoutError else 60)
    items = limited(body)()
    error = raised(kind, asyncio.run, read()) if asynchronous else raised(kind, lambda: arrived.extend(items))
    assert arrived == ["first", holder_of(100_000)]
    assert word in f"{error} {error.__cause__}" and mem_isolate.__file__ not in f"{error.__cause__}"
    assert asynchronous or list(items) == []
    assert_no_child_is_left()


@pytest.mark.parametrize("leave", ["close", "forget", "throw"])
def test_leaving_a_generator_kills_and_reaps_its_child(leave):
    items = isolated(lambda: (yield from itertools.count()))()
    assert next(items) == 0
    if leave == "close":
        items.close()
    elif leave == "throw":
        raised(ZeroDivisionError, items.throw, ZeroDivisionError)
    else:
        for _ in items:
            break
        del items
    assert_no_child_is_left()


def test_generators_may_be_zipped_nested_and_mixed_with_calls():
    for triple in zip(*[isolated(countdown)(20) for _ in range(3)]):
        assert call(square, triple[0]) == triple[0] ** 2
        assert len(set(triple)) == 1
    assert call(lambda: list(isolated(countdown)(3))) == [3, 2, 1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda count: sum(isolated(countdown)(count)), [10, 20, 30, 40])) == [55, 210, 465, 820]


@linux_only
def test_child_runs_ahead_of_its_reader_only_so_far():
    made = shared_numbers(1)

    def make_many():
        yield os.getpid()
        for _ in range(300):
            made[0] += 1
            yield bytes(MIB)

    items = isolated(make_many)()
    pid = next(items)
    wait_until(lambda: made[0] >= 64 and run_state(pid) == "S")
    assert made[0] <= 70
    shared = kibibytes("/proc/meminfo", "Shmem")
    assert sum(len(next(items)) for _ in range(220)) == 220 * MIB
    assert kibibytes("/proc/meminfo", "Shmem") - shared < 100 << 10, "what was read is kept"
    assert len(list(items)) == 80 and made[0] == 300


def test_item_that_cannot_be_written_is_a_result_delivery_error(monkeypatch):
    """Though there is room for the outcome."""
    write = os.pwrite

    def fail_once(*_):
        os.pwrite = write
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "pwrite", fail_once)
    assert raised(ResultDeliveryError, next, isolated(countdown)(3)).__cause__.errno == errno.ENOSPC
    monkeypatch.undo()
    without = isolated(lambda: (yield) or os.closerange(3, 4096) or 1 / 0)()  # which its outcome needs
    with pytest.raises(ResultDeliveryError, match="(?s)written: .*Bad file descriptor.*ZeroDivisionError: division"):
        list(without)


@linux_only
def test_item_that_the_child_cuts_short_is_an_error():
    steps = shared_numbers(2)

    def make_and_truncate():
        yield "first"
        yield bytes(MIB)
        wait_until(lambda: steps[0])
        os.ftruncate(bulks()[0], 0)
        steps[1] = 1
        time.sleep(60)

    items = isolated(make_and_truncate, timeout=60)()
    assert next(items) == "first"
    steps[0] = 1
    wait_until(lambda: steps[1])
    assert "cut short" in str(raised(DeserializationError, next, items))


@pytest.mark.parametrize("when", ["pickled", "written", "full"])
@fresh_on_linux
def test_handler_that_raises_in_a_generator_arrives_behind_what_was_yielded(when):
    def body():
        signal.signal(signal.SIGALRM, interrupt)
        yield os.getpid()
        yield from "ab"
        if when == "pickled":
            yield OnPickle(os.kill, os.getpid(), signal.SIGALRM)
        elif when == "written":
            mem_isolate._write = lambda *data: (os.write(*data), os.kill(os.getpid(), signal.SIGALRM))
            yield "c"
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        while True:
            yield bytes(MIB)

    items = isolated(body, timeout=60)()
    child, got = next(items), []
    wait_until(lambda: run_state(child) == "Z")
    raised(Interrupt, got.extend, items)
    expected = {"pickled": ["a", "b"], "written": ["a", "b", "c"]}
    assert got[:3] == expected.get(when, ["a", "b", bytes(MIB)])


@linux_only
def test_an_item_is_kept_neither_while_the_next_is_made_nor_when_the_reader_drops_it():
    def body():
        for _ in range(3):
            yield Holder(bytearray(40 * MIB))

    async def body_async():
        for item in body():
            yield item
            del item

    limited = isolated(memory_limit=100 * MIB)
    assert len(list(limited(body)())) == len(asyncio.run(collect(limited(body_async)()))) == 3
    items = limited(body)()
    dropped = weakref.ref(next(items))
    assert dropped() is None


def test_generator_may_keep_processes_of_its_own():
    def lines():
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            for number in range(5):
                process.stdin.write(b"%d\n" % number)
                process.stdin.flush()
                yield process.stdout.readline()

    def fork_and_yield_last(fork):
        pid = fork()
        if pid == 0:
            yield "from the grandchild"
        yield os.WEXITSTATUS(os.waitpid(pid, 0)[1])

    assert list(isolated(lines)()) == [b"%d\n" % number for number in range(5)]
    for fork in (os.fork, ctypes.PyDLL(None).fork):
        assert list(isolated(fork_and_yield_last)(fork)) == [0]


def test_iterator_of_the_parent_is_refused_in_a_child_and_not_harmed():
    items = isolated(countdown)(100)
    assert next(items) == 100
    assert "belongs to the process" in str(raised(RuntimeError, call, next, items))
    call(items.close)

    def leave():
        memory = [mmap.mmap(-1, 1 << 16) for _ in range(40)]  # one of them where the region would be
        items.close()
        return sum(piece[0] for piece in memory)

    assert call(leave) == 0
    assert list(items) == list(range(99, 0, -1))


@pytest.mark.parametrize("collecting", [True, False])
@fresh
def test_large_result_is_rebuilt_while_it_is_made_and_leaves_the_collector_as_it_was(collecting):
    before, records = gc.get_threshold(), [{"number": number} for number in range(100_000)]
    (gc.enable if collecting else gc.disable)()
    assert call(lambda: records) == records
    failure(SerializationError, lambda: [*records, threading.Lock()])
    failure(ResultDeliveryError, lambda: [records, OnPickle(kill_self, signal.SIGKILL)])
    asked = call(lambda: [bytes(BULK), OnPickle(lambda: (call, (gc.get_threshold,)))])[1]
    assert asked == before  # in a child that is forked meanwhile
    assert gc.isenabled() == collecting and gc.get_threshold() == before
    call(lambda: [bytes(BULK), OnPickle(lambda: (gc.set_threshold, (333,)))])
    assert call(lambda: records) == records and gc.get_threshold()[0] == 333  # what the result has set, it stays


def memory_of_bulks():
    return sum(os.fstat(bulk).st_blocks * 512 for bulk in bulks())


@linux_only
def test_memory_of_a_large_result_is_given_back_while_it_is_rebuilt():
    lines = [str(number) * 20 for number in range(300_000)]  # 34 MiB
    *same, held = call(lambda: [*lines, OnPickle(lambda: (memory_of_bulks, ()))])
    assert same == lines and held < 8 * MIB


def items_of_every_size(seed, most):
    chance = random.Random(seed)
    for _ in range(100):
        size = min(chance.choice([0, chance.randrange(200), 1000, 70_000, 300_000, BULK]), most)
        plain = patterned(size, chance.randrange(4))
        held = Holder(bytearray(plain))
        yield chance.choice([plain, held, [plain[:99], held, Holder(plain[:500])]])
    return [Holder(bytearray(patterned(300_000))), patterned(1_000_000)]


@pytest.mark.parametrize("without", ["nothing", "_libc_eventfd"])
@pytest.mark.parametrize("ring", [100, 300_000, 8 * MIB])
@fresh
def test_items_of_every_size_go_through_the_ring_whole_and_in_order(ring, without):
    """Wherever in the bulk they come to lie; sockets serve where there is no eventfd."""
    mem_isolate._RING = ring
    vars(mem_isolate)[without] = None
    mem_isolate._read = lambda descriptor, _: os.read(descriptor, 8)  # of many messages in a socket, one

    for seed in range(2):
        items = isolated(items_of_every_size, timeout=60)(seed, 20 * ring)
        for expected in items_of_every_size(seed, 20 * ring):
            item = next(items)
            assert item == expected, seed
            assert not isinstance(item, Holder) or not memoryview(item.buffer).readonly
        returned = raised(StopIteration, next, items).value
        assert returned == [Holder(bytearray(patterned(300_000))), patterned(1_000_000)]


@fresh_on_linux
def test_a_child_that_is_as_far_ahead_as_it_may_be_overwrites_nothing():
    """The reader looks only while the child sleeps, that is, whenever the ring is full to the last byte."""
    pid, preadv, chance = shared_numbers(1), os.preadv, random.Random(1)
    lengths = [chance.choice([0, chance.randrange(300), 990, 3000]) for _ in range(100)]
    items = [patterned(length, number) for number, length in enumerate(lengths)]

    def make_all():
        pid[0] = os.getpid()
        yield from items

    def read_while_the_child_sleeps(*arguments):
        wait_until(lambda: not Path(f"/proc/{pid[0]}").exists() or run_state(pid[0]) in "SZ")
        return preadv(*arguments)

    mem_isolate._RING, mem_isolate._READ_AHEAD, os.preadv = 1000, 300, read_while_the_child_sleeps
    assert list(isolated(make_all)()) == items


# -------------------------------------------------------------------------------------------------------- Huge pages

HUGE_PAGE = 2 << 20
PAGES = HUGE_PAGE // mmap.PAGESIZE
THP_DISABLE = 41  # PR_SET_THP_DISABLE

collapses = sys.platform == "linux" and mmap.PAGESIZE == 4096 and LIBC.madvise(None, 0, 25) == 0  # MADV_COLLAPSE
needs_huge_pages = pytest.mark.skipif(not collapses, reason="needs Linux 6.1")


class SmallPages:
    """Whole 2 MiB blocks of private memory in 4 KiB pages, whatever the system's setting for huge pages is."""

    def __init__(self, blocks, touched=range(PAGES), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):
        LIBC.prctl(THP_DISABLE, 1, 0, 0, 0)  # until they are touched
        self.mapping = mmap.mmap(-1, (blocks + 1) * HUGE_PAGE, flags=flags)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self.mapping))
        self.address, self.size = -(-start // HUGE_PAGE) * HUGE_PAGE, blocks * HUGE_PAGE
        for block in range(self.address, self.address + self.size, HUGE_PAGE):
            for page in touched:
                ctypes.memset(block + page * mmap.PAGESIZE, page % 251 + 1, mmap.PAGESIZE)
        LIBC.prctl(THP_DISABLE, 0, 0, 0, 0)

    def digest(self):
        return hashlib.sha1((ctypes.c_char * self.size).from_address(self.address)).hexdigest()

    def resident(self):
        """One byte for each page, not 0 where there is one."""
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            entries = os.pread(pagemap.fileno(), self.size // mmap.PAGESIZE * 8, self.address // mmap.PAGESIZE * 8)
        return bytes(entry & 0x80 for entry in entries[7::8])

    def in_huge_pages(self):
        """The bytes of its mapping that are in huge pages, by what the kernel says."""
        mapping = r"^(\w+)-(\w+) .*\n(?:\w+: .*\n)*?AnonHugePages: +(\d+)"
        for first, last, size in re.findall(mapping, Path("/proc/self/smaps").read_text(), re.MULTILINE):
            if int(first, 16) <= self.address < int(last, 16):
                return int(size) << 10


@needs_huge_pages
@pytest.mark.parametrize("state", ["fresh", "write-protected by a fork"])
@fresh
def test_memory_moves_to_huge_pages_with_its_contents_and_stays_there(state):
    memory = SmallPages(16)
    LIBC.memcpy(ctypes.c_void_p(memory.address), os.urandom(memory.size), ctypes.c_size_t(memory.size))
    if state != "fresh":
        call(int)
    before, huge_before = memory.digest(), memory.in_huge_pages()
    assert mem_isolate.use_huge_pages() >= memory.size
    assert memory.in_huge_pages() - huge_before >= memory.size
    assert memory.digest() == before
    assert mem_isolate.use_huge_pages() >= memory.size  # what is in huge pages already counts
    for byte in 1, 2:  # also when the parent rewrites it between calls
        call(int)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        ctypes.memset(memory.address, byte, memory.size)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults < 16 * PAGES / 10
        assert memory.in_huge_pages() >= memory.size


@needs_huge_pages
@fresh
def test_huge_pages_let_rss_grow_by_five_percent_at_most():
    # Filling the holes of the second would add a tenth, of the third 511 times what is there.
    nearly_full = SmallPages(16, touched=range(PAGES - 22))
    others = [SmallPages(16, [page for page in range(PAGES) if page % 10]), SmallPages(16, [7]), SmallPages(64, [])]
    left = [memory.resident() for memory in others]
    with background_threads(*[functools.partial(time.sleep, 0.01)] * 8):  # whose stacks are untouched too
        rss = kibibytes("/proc/self/smaps_rollup", "Rss")  # the counter in /proc/self/statm may lag behind
        mem_isolate.use_huge_pages()
        assert 0 < kibibytes("/proc/self/smaps_rollup", "Rss") - rss <= rss * 0.05
    assert [memory.resident() for memory in others] == left
    assert nearly_full.resident() == b"\x80" * (16 * PAGES)


@needs_huge_pages
@fresh
def test_huge_pages_leave_special_memory_alone():
    memories = {"control": SmallPages(1), "shared": SmallPages(1, flags=mmap.MAP_SHARED)}
    # MADV_DONTFORK, MADV_WIPEONFORK, MADV_NOHUGEPAGE
    for kind, advice in [("not inherited", 10), ("emptied by forks", 18), ("huge pages refused", 15)]:
        memories[kind] = SmallPages(1)
        assert LIBC.madvise(memories[kind].address, memories[kind].size, advice) == 0
    asked, madvise = [], LIBC.madvise
    mem_isolate._libc_madvise = lambda address, *rest: asked.append(address) or madvise(address, *rest)
    mem_isolate.use_huge_pages()
    assert [kind for kind, memory in memories.items() if memory.address in asked] == ["control"]


@pytest.mark.parametrize("what", ["smaps", "pagemap", "pages of 4 KiB", "the advice"])
def test_huge_pages_that_the_system_does_not_have_give_zero(monkeypatch, what):
    def open_elsewhere(path, *rest, **named):
        return open(f"/nowhere{path}" if path.endswith(what) else path, *rest, **named)

    monkeypatch.setattr(mem_isolate, "open", open_elsewhere, raising=False)
    if what == "pages of 4 KiB":
        monkeypatch.setattr(mem_isolate, "_PAGE", 16384)
    if what == "the advice":
        monkeypatch.setattr(mem_isolate, "_libc_madvise", lambda *_: ctypes.set_errno(errno.EINVAL) and None or -1)
    assert mem_isolate.use_huge_pages() == 0


# ----------------------------------------------------------------------------------------------------------- The README
# Every block of code runs, and prints what the README says: "#> " behind a line, or the text block after it.

README = (HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else ""
BLOCKS = [
    pytest.param(*match.groups(), id=f"line {README[: match.start()].count(chr(10)) + 2}")
    for match in re.finditer(r"^```python\n(.*?)^```\n(?:\n?```text\n(.*?)^```\n)?", README, re.MULTILINE | re.DOTALL)
]
CODE = [block.values[0] for block in BLOCKS] if UNDER_PYTEST else []


def test_readme_is_whole():
    assert len(README.splitlines()) <= 400
    assert len(BLOCKS) == len(re.findall(r"```\s*py", README)), "a block is not in the form that is run"
    for name in mem_isolate.__all__:
        assert f"`{name}" in README, f"{name} is not in the README"


def run_block(folder, code, **options):
    (folder / "example.py").write_text(code, encoding="utf-8")
    return in_fresh_process(Path("example.py"), cwd=str(folder), env={"PYTHONFAULTHANDLER": ""}, **options)


def plain(text):
    """Without what differs between machines: line breaks, folders, and the lines of ctypes."""
    text = re.sub(r'File "[^"]*/(?=\w+/|example)', 'File "', " ".join(text.split()))
    return re.sub(r"(__init__\.py(?::|\", line ))\d+", r"\1N", text)


@pytest.mark.parametrize("code, text", BLOCKS)
def test_readme_block_prints_what_it_says(code, text, tmp_path):
    if "import coverage" in code:
        pytest.importorskip("coverage")
    expected = text or "\n".join(re.findall(r"#> (.*)", code))
    printed = run_block(tmp_path, code, expect=1 if text else 0)
    pattern = ".*".join(map(re.escape, plain(expected).split("...")))
    assert re.fullmatch(pattern, plain(printed)), f"{printed}\n{expected}"


def test_the_error_that_the_readme_shows(tmp_path):
    shown = re.search(r"## Errors\n```text\n(.*?)```", README, re.DOTALL).group(1)
    head = "import time\nfrom mem_isolate import isolated\n\n\n\n@isolated(timeout=0.2)\n"
    printed = run_block(tmp_path, f"{head}def resize():\n    time.sleep(60)\n\nresize()\n", expect=1)
    assert plain(shown) in plain(printed)


ISOLATED_TESTS = """
import ctypes, os, time
import pytest
from mem_isolate import execute_in_isolated_process

pytestmark, here = pytest.mark.isolated, os.getpid()

def test_passed_one(tmp_path): assert os.getpid() != here and tmp_path.exists()
def test_failed_one(): assert [1, 2] == [1, 3]
def test_failed_by_a_crash(): print("said before"); ctypes.string_at(0)
@pytest.mark.isolated(timeout=0.5)
def test_failed_by_a_hang(): time.sleep(60)
def test_failed_by_a_call(): pytest.fail("told to")
async def test_failed_coroutine(): pass
def test_skipped(): pytest.skip("the reason of skip")
def test_xfail_by_a_call(): pytest.xfail("the reason of xfail")
@pytest.mark.xfail(strict=True)
def test_xfail_by_a_mark(): ctypes.string_at(0)
class TestMethods:
    def test_passed_method(self): assert os.getpid() != here
    @pytest.mark.parametrize("number", [2])
    def test_failed_method(self, number): assert number == 1
def test_passed_with_capfd(capfd):
    execute_in_isolated_process(print, "hello")
    assert capfd.readouterr().out == "hello\\n"
"""


def test_the_conftest_that_the_readme_shows(tmp_path):
    (tmp_path / "conftest.py").write_text(next(code for code in CODE if "pytest_pyfunc_call" in code), encoding="utf-8")
    (tmp_path / "test_it.py").write_text(ISOLATED_TESTS, encoding="utf-8")
    options = ["-q", "-rA", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", "."]
    printed = in_fresh_process(f"import sys, pytest; sys.exit(pytest.main({options}))", cwd=str(tmp_path), expect=1)
    for how, name in re.findall(r"def (test_([a-z]+)\w*)", ISOLATED_TESTS):
        how, name = name.upper(), how
        where = r"SKIPPED \[1\] .*: the reason of skip" if how == "SKIPPED" else rf"{how} test_it.py::\S*{name}\b"
        assert re.search(rf"^{where}", printed, re.MULTILINE), printed
    assert "did not survive test_failed_by_a_crash: it was killed by SIGSEGV" in printed and "said before" in printed


# ------------------------------------------------------------------------------------------------------ The benchmark


@stress
def test_benchmark_measures_every_row_and_says_so_in_json(tmp_path):
    """The Rust crate's four rows come first, under its names; every row has five rounds or more, and none failed."""
    command = [sys.executable, "bench.py", "--quick", "--json", str(tmp_path / "rows.json")]
    ended = subprocess.run(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, timeout=200)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert 40 <= len(ended.stdout.splitlines()) <= 60
    assert "\033" not in ended.stdout and "MISSED" not in ended.stdout
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    crate = ["direct function call", "fork alone", "fork and wait", "isolated"]
    assert [row["name"] for row in rows[:4]] == crate
    names = " ".join(row["case"] for row in rows)
    for word in "bytes array ints dicts items threads called fault importing parent".split():
        assert word in names
    elsewhere = {"isolated, huge pages", "isolated, memory_limit"}  # not on every system
    assert {row["failure"] for row in rows if row["name"] not in elsewhere} == {""}
    assert all(len(row["seconds"]) == len(row["faults"]) >= 5 for row in rows if not row["failure"])
