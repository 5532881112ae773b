"""Run a function in a forked child, and return its result as if it had been called directly.

    from mem_isolate import execute_in_isolated_process

    result = execute_in_isolated_process(parse, "untrusted.bin")

Whatever the function does to memory (leaks, fragments, corrupts, crashes) happens to the child and is gone with it.
The function and its arguments are never pickled, since the child is a copy of the process; only what it returns or
raises is, and comes back through shared memory. One file, standard library only, CPython 3.8 or newer on POSIX:
copy it into your project. ``python3 mem_isolate.py`` shows on your own machine what it does.

The file reads from top to bottom: errors, libc, the call and what it holds, the child, the parent, the public face.
"""

from __future__ import annotations

import collections.abc
import contextlib
import copyreg
import errno
import functools
import gc
import io
import itertools
import logging
import math
import mmap
import numbers
import operator
import os
import pickle
import select
import signal
import struct
import sys
import threading
import time
import traceback
import types

TYPE_CHECKING = False  # importing typing would take longer than all the rest

if sys.platform == "win32":
    raise ImportError("mem_isolate needs fork(2), which Windows does not have; run it under WSL or Linux")
try:
    import _imp  # the import lock
    import ctypes
    import fcntl
    import resource
    from ctypes import PyDLL, pythonapi
except ImportError as error:
    raise ImportError(
        f"mem_isolate needs CPython on POSIX: it calls fork through ctypes.PyDLL, and here {error}"
    ) from error

if TYPE_CHECKING:
    import asyncio
    from typing import Any, Callable, Coroutine, Iterable, Iterator, NoReturn, TypeVar, overload

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
    R = TypeVar("R")
else:

    def overload(function):
        return function


__version__ = "1.0.0"
__all__ = [
    "execute_in_isolated_process",
    "execute_in_isolated_process_async",
    "isolated",
    "use_huge_pages",
    "MemIsolateError",
    "CallableDidNotExecuteError",
    "RegionCreationError",
    "ForkError",
    "ChildSetupError",
    "CallableExecutedError",
    "SerializationError",
    "DeserializationError",
    "ResultDeliveryError",
    "CallableStatusUnknownError",
    "KilledBySignalError",
    "UnexpectedExitStatusError",
    "CallableTimeoutError",
    "WaitError",
]

_logger = logging.getLogger("mem_isolate")


# ---------------------------------------------------------------------------------------------------------- Errors
# Three levels: the base; what became of the callable, which decides whether to retry; the step that failed.


class MemIsolateError(Exception):
    """The isolated call failed; ``__cause__`` is the exception underneath, where there is one.

    What the callable itself raises is not wrapped in this: it is raised as it is.
    """

    #: The signal that ended the child (an ``int`` for a real-time signal), or None.
    signal: Any = None
    #: The status that the child ended with, or None.
    exit_status: Any = None

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.__dict__.update(details)


class CallableDidNotExecuteError(MemIsolateError):
    """The callable did not start: it is safe to retry."""


class RegionCreationError(CallableDidNotExecuteError):
    """The memory for the result could not be made, for want of memory or descriptors."""


class ForkError(CallableDidNotExecuteError):
    """``fork`` failed, or forking here would be unsafe; the message says which."""


class ChildSetupError(CallableDidNotExecuteError):
    """The child ended before it reached the callable."""


class CallableExecutedError(MemIsolateError):
    """The callable ran to its end, but its outcome did not arrive: retry only what may run twice."""


class SerializationError(CallableExecutedError):
    """The result cannot be pickled; or the exception that the callable raised cannot, or does not unpickle."""


class DeserializationError(CallableExecutedError):
    """Rebuilding the result in the parent raised ``__cause__``."""


class ResultDeliveryError(CallableExecutedError):
    """The child ended, or could not write, after the callable had returned (``signal``, ``exit_status``)."""


class CallableStatusUnknownError(MemIsolateError):
    """The child ended while the callable was running: retry only what may run twice."""


class KilledBySignalError(CallableStatusUnknownError):
    """A signal ended the child while the callable was running: ``signal``."""

    signal: signal.Signals


class UnexpectedExitStatusError(CallableStatusUnknownError):
    """The child ended by ``os._exit``, ``exec`` or the like while the callable was running: ``exit_status``."""

    exit_status: int


class CallableTimeoutError(CallableStatusUnknownError, TimeoutError):
    """The call did not end within ``timeout`` seconds; the child was killed."""

    #: The limit, in seconds.
    timeout: float


class WaitError(CallableStatusUnknownError):
    """How the child ended cannot be learnt, and no outcome arrived."""


class _ChildTraceback(Exception):
    """The ``__cause__`` of what the callable raised: the traceback as the child saw it."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# ------------------------------------------------------------------------------------------------ libc and the C API
# fork must keep the GIL (PyDLL): if another thread took it at the fork, the child would wait for it for ever. Calls
# that may block must release it (CDLL), so that other threads run meanwhile. Those that cannot block keep it too, for
# to get it back from busy threads takes milliseconds.

_libc = ctypes.CDLL(None, use_errno=True)
_libc_holding_gil = PyDLL(None, use_errno=True)
_libc_quick = PyDLL(None)  # likewise, for calls whose errno nobody asks for: to keep it costs page faults in the child
_libc_fork = _libc_holding_gil.fork
_libc_exit = _libc_quick._exit
_libc_waitpid = _libc.waitpid
_libc_waitpid_nohang = _libc_holding_gil.waitpid
_libc_close = _libc_quick.close
_libc_memfd_create = getattr(_libc_holding_gil, "memfd_create", None)  # Linux 3.17, glibc 2.27
_libc_sigmask = _libc_quick.pthread_sigmask
_libc_prctl = getattr(_libc_quick, "prctl", None)  # Linux has it
_libc_fallocate = getattr(_libc, "fallocate", None)  # Linux has it
_libc_fpending = getattr(_libc_quick, "__fpending", None)  # glibc and musl: bytes that wait in a C stream
_libc_fpurge = getattr(_libc_quick, "__fpurge", None) or getattr(_libc_quick, "fpurge", None)  # the latter on the BSDs
_libc_mmap = _libc_holding_gil.mmap
_libc_mmap.restype = ctypes.c_void_p
_libc_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc_munmap = _libc_quick.munmap
_libc_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc_madvise_quick = _libc_quick.madvise
_libc_madvise_quick.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_DONTFORK = getattr(mmap, "MADV_DONTFORK", None)  # Linux has it
_memoryview = pythonapi.PyMemoryView_FromMemory
_memoryview.restype = ctypes.py_object
_memoryview.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_PYBUF_WRITE = 0x200
_MMAP_SHARED = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0  # and descriptor, offset
_MAP_FAILED = ctypes.c_void_p(-1).value

_C_STREAMS = []
for _stream in ("stdout", "stderr", "__stdoutp", "__stderrp"):  # the latter two on macOS and FreeBSD
    with contextlib.suppress(ValueError):
        _C_STREAMS.append(ctypes.c_void_p.in_dll(_libc, _stream))

_PR_SET_PDEATHSIG = 1
_MAP_FIXED = 16  # of the mmap function
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_F_ADD_SEALS = 1033  # in the fcntl module from 3.9 on
_F_SEAL_EVERYTHING = 1 | 2 | 4 | 8  # seal, shrink, grow, write
_SIG_BLOCK, _SIG_SETMASK = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)
_SignalSet = ctypes.c_char * 128  # sigset_t has 128 bytes in glibc and musl, fewer elsewhere
_EVERY_SIGNAL = _SignalSet()
_libc.sigfillset(_EVERY_SIGNAL)

_pidfd_open = getattr(os, "pidfd_open", None)  # Linux 5.3, Python 3.9
_pidfd_send_signal = getattr(signal, "pidfd_send_signal", None)

_get_interpreter = getattr(pythonapi, "PyInterpreterState_Get", None) or pythonapi._PyInterpreterState_Get  # 3.8
_newest_interpreter = pythonapi.PyInterpreterState_Head
_newest_thread = pythonapi.PyInterpreterState_ThreadHead
_next_thread = pythonapi.PyThreadState_Next
_get_interpreter.restype = pythonapi.PyInterpreterState_Main.restype = _newest_interpreter.restype = ctypes.c_void_p
pythonapi.PyOS_AfterFork_Child.restype = None
for _function in (_newest_thread, _next_thread):
    _function.argtypes, _function.restype = [ctypes.c_void_p], ctypes.c_void_p

_MAIN_INTERPRETER = pythonapi.PyInterpreterState_Main()
_IN_SUBINTERPRETER = _get_interpreter() != _MAIN_INTERPRETER
_FREE_THREADED = "t" in sys.abiflags


def _keep(results: list[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Call a C function and append what it returns, in one step of C: no signal handler can raise in between.

    Signals are blocked where this is used, but another thread may take one, and its handler runs in the main thread.
    """
    results.extend(itertools.starmap(function, (arguments,)))


def _drain(items: list[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Take each item out and call a C function with it, likewise in one step."""
    if items:
        taken = map(list.pop, itertools.repeat(items, len(items)))
        any(map(function, taken, *map(itertools.repeat, arguments)))


def _came_from_a_signal_handler(error: BaseException) -> bool:
    """Whether a handler raised it: that is a function whose argument is the very frame that called it."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code, caller = frame.f_code, frame.f_back
        for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + 1]:  # and that of *args
            value = frame.f_locals.get(name)
            if caller and any(item is caller for item in (value if type(value) is tuple else (value,))):
                return True
    return False


def _streams() -> tuple[Any, ...]:
    """Return stdout and stderr and, where they have been replaced, the original ones too."""
    stdout, stderr = getattr(sys, "stdout", None), getattr(sys, "stderr", None)
    if stdout is sys.__stdout__ and stderr is sys.__stderr__:
        return stdout, stderr
    return stdout, stderr, sys.__stdout__, sys.__stderr__


def _flush(*streams: Any) -> bool:
    """Flush streams of Python, and C's stdout and stderr; one that is closed or broken breaks nothing, but is told."""
    flushed = True
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except Exception as error:
            if _came_from_a_signal_handler(error):
                raise
            flushed = False
    for pointer in _C_STREAMS:  # not fflush(NULL): that waits for a thread that is reading from stdin
        if _libc_fpending is None or _libc_fpending(pointer):
            _libc.fflush(pointer)
    return flushed


# ----------------------------------------------------------------------------------------------------- Other threads

_turns = threading.RLock()  # held by the thread that is about to fork
_acquire_turn = operator.methodcaller("acquire", True, 5)
_acquire_soon = operator.methodcaller("acquire", True, 0.05)
_release = operator.methodcaller("release")
_LOCK_TYPES = (type(threading.Lock()), type(threading.RLock()))
_bootstrap: Any = sys.modules["_frozen_importlib"]
# Locks of the standard library's own modules that another thread may hold at any moment.
_STANDARD_LOCKS = (
    ("_strptime", "_cache_lock"),
    ("asyncio.events", "_lock"),
    ("asyncio.mixins", "_global_lock"),
    ("concurrent.futures.thread", "_global_shutdown_lock"),
    ("sysconfig", "_CONFIG_VARS_LOCK"),
    ("tempfile", "_once_lock"),
)


def _other_threads() -> bool:
    """Whether the interpreter knows another thread: also one that C code made, which ``threading`` misses.

    The threads are walked in one step of C. Between two bytecodes the GIL may go to the newest thread, which ends and
    is freed: the walk would go on in freed memory, and may find nobody.
    """
    newest = map(_newest_thread, (_MAIN_INTERPRETER,))
    return _newest_interpreter() != _MAIN_INTERPRETER or any(map(_next_thread, newest))


def _handlers() -> list[Any]:
    """Return the handlers of logging, with None for one that has just gone."""
    return [reference() for reference in list(logging._handlerList)]  # type: ignore[attr-defined]


def _find_child_hooks() -> list[Any]:
    """Find the interpreter's own list of hooks from ``os.register_at_fork(after_in_child=...)``.

    ``PyOS_AfterFork_Child``, which repairs the interpreter in a child, runs these hooks too unless the list is empty.
    """

    def mark() -> None:
        pass

    os.register_at_fork(after_in_child=mark)
    if gc.get_freeze_count():  # get_referrers does not look among frozen objects
        gc.unfreeze()
        holders = gc.get_referrers(mark)
        gc.freeze()
    else:
        holders = gc.get_referrers(mark)
    for holder in holders:
        if type(holder) is list:
            holder.remove(mark)
            return holder
    raise ImportError("mem_isolate did not find the interpreter's list of at-fork hooks")


_child_hooks = _find_child_hooks()


class _OtherThreads:
    """What a process with other threads needs around a fork; one without them pays for none of this."""

    def __init__(self) -> None:
        self.hooks = _child_hooks[:]  # for the child to put back
        # Lists for _keep and _drain:
        self.turn: list[Any] = []
        self.logging_locks: list[Any] = []
        self.import_lock: list[None] = []

    def hold_locks(self) -> None:
        """Take the lock of logging and of every handler, so that no thread is in the middle of a record at the fork.

        Threads may hold one while they wait for another, and a handler may be stuck: so all are given back and tried
        again when one is not to be had soon, and in the end it goes without (as bpo-36533 taught CPython itself).
        """
        self.turn.extend(filter(_acquire_turn, [_turns]))  # or calls from several threads would compete for the rest
        locks = [logging._lock, *(getattr(handler, "lock", None) for handler in _handlers())]  # type: ignore[attr-defined]
        locks = list({id(lock): lock for lock in locks if isinstance(lock, _LOCK_TYPES)}.values())  # some share one
        for _ in range(4):
            _drain(self.logging_locks, _release)
            self.logging_locks.extend(filter(_acquire_soon, locks))
            if len(self.logging_locks) == len(locks):
                break

    def fork(self, forks: Iterator[int], pids: list[int]) -> None:
        """Fork, and in the child run CPython's own repair of the interpreter, all in one step of C.

        The child may not run any bytecode before the repair: it may have inherited a request to hand the GIL to a
        thread that does not exist there, and would wait for it for ever. So iterators of C do it, of which
        ``children`` yields in the child only. The repair would run the hooks too, so it is given an empty list.
        """
        _keep(self.import_lock, _imp.acquire_lock)  # the repair makes it anew; from 3.13 on it releases it
        forks = itertools.filterfalse(pids.append, forks)  # append returns None, so that each pid is handed on
        children = itertools.filterfalse(None, forks)
        emptied = map(_child_hooks.__delitem__, itertools.repeat(slice(None)))
        # zip empties the list once there is a child, and hands the repair two arguments, of which it takes no notice.
        any(itertools.starmap(pythonapi.PyOS_AfterFork_Child, zip(children, emptied)))

    def release_locks(self) -> None:
        if self.import_lock:
            with contextlib.suppress(RuntimeError):  # not held: an earlier try at this was interrupted
                _imp.release_lock()
            self.import_lock.clear()
        _drain(self.logging_locks, _release)
        _drain(self.turn, _release)

    def repair(self) -> None:
        """Free the child from what the threads that it does not have were doing at the fork."""
        # 1. The interpreter itself is repaired already (see fork). The hooks go back, for later forks.
        _child_hooks[:] = self.hooks
        # 2. Imports: a module that another thread was in the middle of importing is imported anew.
        for name, reference in list(_bootstrap._module_locks.items()):
            if getattr(reference(), "owner", None) not in (None, threading.get_ident()):
                sys.modules.pop(name, None)
        _bootstrap._module_locks.clear()
        _bootstrap._blocking_on.clear()
        # 3. threading: only this thread is left, and it is the main thread.
        threading._after_fork()  # type: ignore[attr-defined]
        # 4. Logging: a lock that was not to be had in time is made anew; logging's own first, which createLock takes.
        held = set(map(id, self.logging_locks))
        if id(logging._lock) not in held:  # type: ignore[attr-defined]
            logging._lock = threading.RLock()  # type: ignore[attr-defined]
        for handler in _handlers():
            if isinstance(getattr(handler, "lock", None), _LOCK_TYPES) and id(handler.lock) not in held:
                handler.createLock()
        global _turns
        if not self.turn:
            _turns = threading.RLock()
        self.release_locks()
        # 5. Single locks.
        for module_name, name in _STANDARD_LOCKS:
            module = sys.modules.get(module_name)
            if hasattr(module, name):
                setattr(module, name, threading.RLock() if "CONFIG" in name else threading.Lock())


# ---------------------------------------------------------------------------------------------------------- The call
# Child and parent share two things. The region is an anonymous shared mapping: progress, a header, and results that
# fit. It works without a descriptor, and small as it is, little of it is in the way of a callable's wild pointers. The
# bulk is a file in memory for all that does not fit; nobody has it mapped while the callable runs.

_HEADER_SIZE = 5 * 8  # five words: progress, kind of outcome, number of buffers, length of the stream, in the bulk?
_PROGRESS, _KIND, _BUFFERS, _LENGTH, _IN_BULK = range(5)
_SHARED_SIZE = 64 * 1024  # only the pages that are used cost anything
_REGION_SIZE = _SHARED_SIZE - _HEADER_SIZE
_PAGE = mmap.PAGESIZE
_OUT_OF_BAND = 64 * 1024  # bytes from which on a buffer is worth reading on its own
_MAPPED = 256 * 1024  # and mapping, of which a process may have 65,530

# How far the child came. Not small numbers, so that hardly a stray write is taken for one of them.
_NOT_STARTED, _RUNNING, _RETURNED, _DELIVERED = struct.unpack("4Q", b"notstartrunning!returneddelivers")
# What the child delivers.
_RESULT, _RAISED, _UNPICKLABLE, _UNWRITTEN, _SETUP_FAILED = range(5)

_clock = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)  # time.monotonic may be replaced by a test suite
_getpid, _getppid, _freeze, _set_wakeup_fd = os.getpid, os.getppid, gc.freeze, signal.set_wakeup_fd
_gettrace, _getprofile, _getrecursionlimit = sys.gettrace, sys.getprofile, sys.getrecursionlimit
_getppid()  # so that the dynamic linker has resolved it, which it would else do in each child
_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)


class _Call:
    """One isolated call, and everything that it holds until ``end`` gives it back, however the call went."""

    header: Any = None  # the five words, as integers
    region: Any = None  # the bytes behind them
    sink: Any
    dump: Any
    threads: _OtherThreads | None = None
    unblocked = gone = expired = ended = False
    wait_error: OSError | None = None
    stream: Any = None  # what is unpickled
    buffers: list[Any]  # what belongs to that, out of band
    received = 0  # bytes

    def __init__(
        self,
        function: Callable[..., Any],
        timeout: float | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(f"expected a callable, not {type(function).__name__}")
        _need_frames(16)
        self.function = function
        self.timeout = timeout
        self.memory_limit = memory_limit
        self.started = _clock()
        self.parent = _getpid()
        self.mask = _SignalSet()
        _libc_sigmask(_SIG_BLOCK, None, self.mask)
        self.status = ctypes.c_int(-1)  # of waitpid
        # Lists of at most one, each filled and emptied in one step of C, as _keep and _drain do it:
        self.child: list[int] = []  # its pid; in the child 0, where fork failed -1
        self.mapping: list[int] = []  # the address of header and region
        self.bulk: list[int] = []  # the descriptor
        self.watch: list[int] = []  # a descriptor that becomes readable when the child ends

    # -- starting

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any], run: Callable[..., Any] | None = None) -> None:
        """Fork; the child calls the function (or ``run``), and does not return from here."""
        self.flushed = _flush(*_streams())  # or the child would print again what waits in them
        if _IN_SUBINTERPRETER:
            raise ForkError("a subinterpreter cannot be forked safely; call from the main interpreter")
        _libc_sigmask(_SIG_BLOCK, _EVERY_SIGNAL, None)
        try:
            _keep(self.mapping, _libc_mmap, None, _SHARED_SIZE, *_MMAP_SHARED)
            if self.mapping[0] == _MAP_FAILED:
                self.mapping.clear()
                raise OSError(ctypes.get_errno(), "no memory for the result")
            self.header = _memoryview(self.mapping[0], _HEADER_SIZE, _PYBUF_WRITE).cast("Q")
            self.region = _memoryview(self.mapping[0] + _HEADER_SIZE, _REGION_SIZE, _PYBUF_WRITE)
            self.header[_PROGRESS] = _NOT_STARTED
            _make_bulk(self.bulk)
            self.prepare()
        except (OSError, MemoryError) as error:
            if _came_from_a_signal_handler(error):
                raise
            raise RegionCreationError(f"no memory or descriptor for the result could be had: {error}") from error
        if _other_threads():  # as late as can be, since threads of C may come at any moment
            if _FREE_THREADED:
                raise ForkError("a free-threaded Python cannot be forked safely while it has more than one thread")
            self.threads = _OtherThreads()
            self.threads.hold_locks()
        # Looked up here, since it would cost the child more.
        become_the_child = _become_the_child
        child = self, self.header, self.mask, self.child_setup(), run or self.function, args, kwargs
        # One step of C forks and keeps the pid: a handler that raises in between would lose the child, or let it out.
        forks = itertools.starmap(_libc_fork, ((),))
        if self.threads is None:
            self.child.extend(forks)
        else:
            self.threads.fork(forks, self.child)
        if self.child[0] == 0:
            become_the_child(*child)
        if _MADV_DONTFORK and (self.threads is not None or run is not None):
            # A later child, forked while this one runs, does not get this region to scribble on.
            _libc_madvise_quick(self.mapping[0], _SHARED_SIZE, _MADV_DONTFORK)
        if self.threads is not None:
            self.threads.release_locks()
        if self.child[0] < 0:
            code = ctypes.get_errno()
            cause = OSError(code, os.strerror(code))
            raise ForkError(f"fork failed: {cause}; free processes or memory, or raise their limits") from cause
        _watch_end(self.child[0], self.watch)
        _libc_sigmask(_SIG_SETMASK, self.mask, None)
        self.unblocked = True

    def child_setup(self) -> list[Callable[[], None]]:
        """What the child has to do before it calls the function, besides what every child has to."""
        setup: list[Callable[[], None]] = []
        if self.threads is not None or not self.flushed:
            setup.append(_renew_streams)
        if self.threads is not None:
            setup.append(self.threads.repair)
        if "asyncio" in sys.modules:
            setup.append(_leave_event_loop)
        if self.memory_limit is not None:
            setup.append(self.limit_memory)
        return setup

    def prepare(self) -> None:
        """Make what the child needs to deliver a result: what is made here costs it no memory."""
        self.sink = _Sink(self)
        self.dump = pickle.Pickler(self.sink, 5, buffer_callback=self.sink.keep_out_of_band).dump

    # -- in the child

    def limit_memory(self) -> None:
        with open("/proc/self/status") as status:
            data = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData:"))
        self.data_limits = soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limits = (data + (self.memory_limit or 0), soft, hard, sys.maxsize)
        resource.setrlimit(
            resource.RLIMIT_DATA, (min(limit for limit in limits if limit != resource.RLIM_INFINITY), hard)
        )

    def lift_memory_limit(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the callable lowered the hard limit
            resource.setrlimit(resource.RLIMIT_DATA, self.data_limits)

    # -- waiting, in the parent

    def wait(self) -> None:
        """Wait until the child is gone; at the deadline, kill it."""
        looks = 0
        while not self.gone:
            if self.watch:
                poller = select.poll()
                poller.register(self.watch[0], select.POLLIN)
                poller.poll(self.pause(looks) * 1000)
            elif self.timeout is None:
                self.reap()
            else:
                time.sleep(self.pause(looks))
            self.look()
            looks += 1

    async def wait_async(self) -> None:
        """Wait likewise, while the event loop goes on."""
        import asyncio

        loop = asyncio.get_running_loop()
        looks = 0
        while not self.gone:
            if self.watch:
                ended = loop.create_future()
                loop.add_reader(self.watch[0], _wake, ended)
                try:
                    await asyncio.wait([ended], timeout=self.pause(looks))
                finally:
                    loop.remove_reader(self.watch[0])
            else:
                await asyncio.sleep(self.pause(looks))
            self.look()
            looks += 1

    def pause(self, looks: int) -> float:
        """Seconds until the next look at the child, after so many looks; never beyond the deadline.

        Where the end of the child wakes us, it is a second: a signal that comes just before the sleep does not end it,
        and its handler, which may raise, is to run soon all the same.
        """
        longest = 1.0 if self.watch else 0.001 * 1.5 ** min(looks, 7)  # at most 17 ms
        return longest if self.timeout is None else min(longest, self.remaining(self.timeout))

    def remaining(self, timeout: float) -> float:
        return max(self.started + timeout - _clock(), 0.0)

    def look(self) -> None:
        """Reap the child if it has ended, kill it if it should have."""
        late = self.timeout is not None and self.remaining(self.timeout) == 0
        if not self.reap(os.WNOHANG) and late:
            self.expired = True
            self.kill()

    def reap(self, options: int = 0) -> bool:
        """Wait for the child, or look with ``os.WNOHANG``; whether it is gone."""
        at_once = options == os.WNOHANG
        while not self.gone:
            waitpid = _libc_waitpid_nohang if at_once else _libc_waitpid
            pid = waitpid(self.child[0], ctypes.byref(self.status), os.WNOHANG if at_once else 0)
            if pid > 0 and os.WIFSTOPPED(self.status.value):  # it asked to be traced, and would wait for ever
                os.kill(self.child[0], signal.SIGKILL)
            elif pid > 0:
                self.gone = True
            elif not at_once:
                at_once = True  # EINTR, or a code that a signal handler has replaced by one of its own: a look tells
            elif pid == 0:
                if options == os.WNOHANG:
                    return False
                at_once = False  # it is still running: wait again
            elif ctypes.get_errno() != errno.EINTR:
                # ECHILD: somebody else reaped it, or SIGCHLD is ignored.
                self.wait_error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
                self.gone = True
        return True

    def kill(self) -> None:
        if not self.reap(os.WNOHANG):
            try:
                # By pidfd, where there is one: it cannot hit a process that got the pid after somebody reaped ours.
                if self.watch and _pidfd_send_signal:
                    _pidfd_send_signal(self.watch[0], signal.SIGKILL)
                else:
                    os.kill(self.child[0], signal.SIGKILL)
            except ProcessLookupError:
                pass
            except PermissionError as error:  # it has become another user's: nothing that we can do will end it
                self.wait_error, self.gone = error, True
            self.reap()

    # -- giving back

    def end(self) -> None:
        """Give back all that is still held; a second call goes on with what a signal handler's exception cut short."""
        if self.child == [0]:
            _libc_exit(1)  # the child never returns into the caller's code
        # A handler, or another task, may have changed the mask since start: that is to stay.
        save, self.unblocked = self.mask if self.unblocked else None, False
        _libc_sigmask(_SIG_BLOCK, _EVERY_SIGNAL, save)
        if self.threads is not None:
            self.threads.release_locks()
        if not self.gone and self.child and self.child[0] > 0:
            self.kill()
        for view in (self.header, self.region):
            if view is not None:
                view.release()  # nobody may look there any more, a debugger in a traceback's frames included
        self.header = self.region = self.sink = self.dump = None
        if self.stream is not None:
            self.stream.close()
            self.buffers.clear()  # which those frames would keep
        _drain(self.watch, _libc_close)
        _drain(self.bulk, _libc_close if self.received <= _REGION_SIZE else os.close)  # freeing much takes a while
        _drain(self.mapping, _libc_munmap, _SHARED_SIZE)
        self.ended = True
        _libc_sigmask(_SIG_SETMASK, self.mask, None)


def _make_bulk(descriptors: list[int]) -> None:
    if _libc_memfd_create is not None:
        _keep(descriptors, _libc_memfd_create, b"mem_isolate", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
        if descriptors[0] > 2:
            return
        code = ctypes.get_errno()
        if descriptors[0] >= 0:  # a standard stream is closed, and whatever is printed would go there
            _keep(descriptors, fcntl.fcntl, descriptors[0], fcntl.F_DUPFD_CLOEXEC, 3)
            _libc_close(descriptors.pop(0))
            return
        descriptors.clear()
        if code in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise OSError(code, os.strerror(code))
    import tempfile  # for a kernel or sandbox without memfd_create

    with tempfile.TemporaryFile() as file:  # has no name any more
        _keep(descriptors, fcntl.fcntl, file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)


def _watch_end(pid: int, descriptors: list[int]) -> None:
    """Add a descriptor that becomes readable when the process ends, where the system has such a thing."""
    try:
        if _pidfd_open:
            _keep(descriptors, _pidfd_open, pid)
        elif sys.platform != "linux" and hasattr(select, "kqueue"):  # macOS and the BSDs
            with contextlib.closing(select.kqueue()) as queue:
                flags = select.KQ_EV_ADD | select.KQ_EV_ONESHOT
                queue.control([select.kevent(pid, select.KQ_FILTER_PROC, flags, select.KQ_NOTE_EXIT)], 0)
                _keep(descriptors, os.dup, queue.fileno())
    except OSError as error:  # no descriptor is free, a sandbox forbids it, or the kernel does not know it
        if _came_from_a_signal_handler(error):
            raise


def _wake(ended: asyncio.Future[None]) -> None:
    if not ended.done():
        ended.set_result(None)


def _need_frames(count: int) -> None:
    """Raise RecursionError while nothing is held yet, if what follows would meet the recursion limit half-way."""
    if count:
        _need_frames(count - 1)


def _finish(call: _Call) -> None:
    """End a call, whatever signal handlers do: an exception of theirs that cuts this short is raised after another try."""
    try:
        call.end()
    except BaseException:
        _finish(call)
        raise


# --------------------------------------------------------------------------------------------------------- The child
# Each object that the child touches costs it a page fault, since the reference count in it is written to, and so does
# each cache that the parent did not fill: hence the local names, and what the parent prepares for the child.


def _be_the_child(
    call: _Call,
    header: memoryview,
    mask: ctypes.Array[ctypes.c_char],
    setup: list[Callable[[], None]],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> NoReturn:
    """Run the callable and deliver its outcome. Signals are blocked except while the callable runs."""
    # First of all, since any allocation may set off a collection: never finalise the parent's garbage a second time,
    # and leave the pages of its heap shared.
    _freeze()
    pid = _getpid()
    try:
        try:
            if _libc_prctl is not None:
                _libc_prctl(_PR_SET_PDEATHSIG, 9)
                if _getppid() not in (call.parent, 0):  # it died before that; 0 stands for one in another namespace
                    _libc_exit(1)
            _set_wakeup_fd(-1)  # the parent's event loop listens there
            if setup:
                for step in setup:
                    step()
        except BaseException as error:
            _deliver_failure(call, _SETUP_FAILED, "the child could not be set up", error)
            _libc_exit(1)
        streams, recursion_limit = _streams(), _getrecursionlimit()
        value = failure = None
        header[_PROGRESS] = _RUNNING
        try:
            try:
                _libc_sigmask(_SIG_SETMASK, mask, None)
                value = function(*args, **kwargs)
            finally:
                _libc_sigmask(_SIG_BLOCK, _EVERY_SIGNAL, None)
        except BaseException as error:
            _libc_sigmask(_SIG_BLOCK, _EVERY_SIGNAL, None)  # a handler may have raised before the one above did it
            failure = error
        if _getpid() != pid:
            _libc_exit(0)  # a process that the callable forked came back out of it
        header[_PROGRESS] = _RETURNED
        # What the callable set must not disturb the rest.
        if _gettrace() is not None:
            sys.settrace(None)
        if _getprofile() is not None:
            sys.setprofile(None)
        if _getrecursionlimit() < recursion_limit:
            sys.setrecursionlimit(recursion_limit)
        if setup and call.memory_limit is not None:  # without a setup there is none, and nothing to look up
            call.lift_memory_limit()
        _deliver_outcome(call, value, failure)
        if _streams() != streams:
            _flush(*_streams())
        _flush(*streams)
        _libc_exit(0)
    except BaseException as error:  # handlers raised one after the other, or something is broken
        failure = error
        for _ in range(1000):
            try:
                _libc_sigmask(_SIG_BLOCK, _EVERY_SIGNAL, None)
                break
            except BaseException:
                continue
        if _getpid() == pid and header[_PROGRESS] != _DELIVERED:
            _deliver_outcome(call, None, failure)
            _libc_exit(0)
    finally:
        _libc_exit(1)
    raise AssertionError("_exit returned")


if sys.version_info >= (3, 11):
    _become_the_child = _be_the_child
else:
    # There the interpreter looks for signals before almost every bytecode. Under a storm of them whose handlers raise,
    # exceptions come faster than any number of try and finally could stop them, and would carry the child out into the
    # caller's code. So the child runs in a __del__, out of which nothing is raised, and _exit follows, whatever happens:
    # a tuple deletes its items from the last to the first, in C. From 3.11 on this would only cost 20 page faults.

    def _become_the_child(*child: Any) -> None:
        guard = (_Leave(), _BeTheChild(*child))
        del guard

    class _BeTheChild:
        def __init__(self, *child: Any) -> None:
            self.child = child

        def __del__(self) -> None:
            _be_the_child(*self.child)

    class _Leave:
        __del__ = staticmethod(functools.partial(_libc_exit, 1))


def _leave_event_loop() -> None:
    """Let the callable run an event loop of its own although the parent's was running at the fork."""
    asyncio: Any = sys.modules.get("asyncio")
    if not hasattr(asyncio, "_set_running_loop"):
        return  # another thread was only importing it
    loop = asyncio._get_running_loop()
    if loop is not None:
        task = asyncio.current_task(loop)
        if task is not None:
            asyncio.tasks._leave_task(loop, task)
        asyncio._set_running_loop(None)


def _run_coroutine(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function in the child and, if it is an ``async def`` one, run what it returns in a fresh event loop."""
    value = function(*args, **kwargs)
    if not isinstance(value, collections.abc.Coroutine):
        return value
    import asyncio

    return asyncio.run(value)


def _renew_streams() -> None:
    """Empty the buffers of stdout, stderr and the streams of logging, and free their locks.

    What the parent could not write yet is the parent's to write; and another thread may have been printing.
    """
    for stream in (*_streams(), *(getattr(handler, "stream", None) for handler in _handlers())):
        with contextlib.suppress(OSError, ValueError):  # closed or detached
            buffer = getattr(stream, "buffer", None)
            if isinstance(stream, io.TextIOWrapper) and isinstance(buffer, (io.BufferedWriter, io.BufferedRandom)):
                raw = buffer.raw
                renew: Any = type(buffer).__init__  # with an empty buffer and a new lock
                renew(buffer, io.BytesIO())  # for what waits in the stream itself
                io.TextIOWrapper.flush(stream)
                renew(buffer, raw)
    if _libc_fpurge is not None:
        for pointer in _C_STREAMS:
            _libc_fpurge(pointer)


class _Sink:
    """The file that a child pickles to: into the region while it fits there, and all into the bulk once it does not."""

    __slots__ = ("header", "region", "parent", "bulk", "own_bulk", "buffers", "length", "in_bulk", "failed")

    def __init__(self, call: _Call) -> None:  # and does not keep it, for they would be a cycle
        self.header, self.region, self.parent, self.bulk = call.header, call.region, call.parent, call.bulk
        self.own_bulk: int | None = None
        self.buffers: list[memoryview] = []
        self.length = 0
        self.in_bulk = False
        self.failed = False  # which tells a failed write from an object that cannot be pickled

    def write(self, data: Any) -> None:
        start, end = self.length, self.length + len(data)
        if end > _REGION_SIZE or self.in_bulk:
            if not self.in_bulk:
                self.in_bulk = True
                self.write_at(0, self.region[:start])
            self.write_at(start, data)
        else:
            self.region[start:end] = data
        self.length = end

    def write_at(self, offset: int, data: Any) -> None:
        try:
            with memoryview(data) as view:
                written = 0
                while written < view.nbytes:  # no more than 1 GiB at once: some systems refuse 2
                    written += os.pwrite(self.open_bulk(), view[written : written + (1 << 30)], offset + written)
        except Exception:
            self.failed = True
            raise

    def open_bulk(self) -> int:
        """The bulk's descriptor: the parent's, opened anew, for the callable may have closed or reused the child's."""
        if self.own_bulk is None:
            self.own_bulk = number = self.bulk[0]
            # In the /proc of another pid namespace the parent's number would be somebody else's.
            with contextlib.suppress(OSError):
                if os.readlink("/proc/self") == str(_getpid()):
                    with open(f"/proc/{self.parent}/fd/{number}", "r+b", buffering=0) as file:
                        self.own_bulk = fcntl.fcntl(file.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)  # not as stdout
            found = os.fstat(self.own_bulk)
            if found.st_nlink or self.own_bulk == number and found.st_size:  # it has no name, and is still empty
                raise OSError(errno.EBADF, "the callable closed the descriptor for large results")
        return self.own_bulk

    def keep_out_of_band(self, buffer: pickle.PickleBuffer) -> bool:
        """Set a large buffer aside, to be written as it is; true where it is small and goes with the rest."""
        view = buffer.raw()
        if view.nbytes < _OUT_OF_BAND:
            return True
        self.buffers.append(view)
        return False

    def deliver(self, kind: int) -> None:
        """Write the buffers behind what was pickled, and fill in all of the header: the callable can have written there."""
        count = 0
        if self.buffers:
            count = len(self.buffers)
            lengths = [view.nbytes for view in self.buffers]
            self.write(struct.pack(f"={count}Q", *lengths))
            for offset, view in zip(_offsets(self.length if self.in_bulk else 0, lengths), self.buffers):
                self.write_at(offset, view)
        header = self.header
        header[_KIND], header[_BUFFERS], header[_LENGTH], header[_IN_BULK] = kind, count, self.length, self.in_bulk
        header[_PROGRESS] = _DELIVERED


class _ExceptionPickler(pickle.Pickler):
    """Pickles exceptions to be rebuilt without ``__init__``, which may want other arguments than ``args``."""

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        if not isinstance(obj, BaseException) or cls in copyreg.dispatch_table:
            return NotImplemented
        if cls.__reduce__ is not _builtin_base(cls).__reduce__ or vars(object)["__reduce_ex__"] is not getattr(
            cls, "__reduce_ex__", None
        ):
            return NotImplemented  # the class knows better
        return _new_exception, (cls, obj.__reduce__()[1]), _exception_state(obj), None, None, _set_exception_state


def _builtin_base(cls: Any) -> Any:
    while cls.__flags__ & 1 << 9:  # Py_TPFLAGS_HEAPTYPE: made at run time
        cls = cls.__base__  # not the MRO, which may begin with a class that has another layout in C
    return cls


def _new_exception(cls: type, arguments: tuple[Any, ...]) -> BaseException:
    base = _builtin_base(cls)
    error: BaseException = base.__new__(cls, *arguments)
    base.__init__(error, *arguments)  # fills in what the class keeps in C, such as OSError.errno
    return error


def _exception_state(error: BaseException) -> dict[str, Any]:
    """All attributes, those in slots and in C included; but not AttributeError.obj, which can be anything."""
    names = [name for cls in type(error).__mro__ for name, kind in vars(cls).items() if isinstance(kind, _SLOT_TYPES)]
    state = {
        name: getattr(error, name) for name in names if name[:2] != "__" and name != "obj" and hasattr(error, name)
    }
    return {**state, **vars(error), "args": error.args}


def _set_exception_state(error: BaseException, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if value is None and getattr(error, name, error) is None:
            continue  # OSError shows a None that was set, and does not show one that was not
        with contextlib.suppress(AttributeError, TypeError):  # some cannot be set: ExceptionGroup.message
            object.__setattr__(error, name, value)  # the class's own may refuse, as a frozen dataclass does


def _deliver_outcome(call: _Call, value: Any, failure: BaseException | None) -> None:
    if failure is None:
        sink = call.sink
        try:
            if type(value) is str and len(value) > _OUT_OF_BAND:
                _dump_text(sink.write, value)
            else:
                call.dump(value)
            sink.deliver(_RESULT)
        except BaseException as error:
            what = f"its result, of type {type(value).__qualname__}, cannot be pickled (return plain data instead)"
            _deliver_failure(call, _UNWRITTEN if sink.failed else _UNPICKLABLE, what, error)
        return
    text = "an exception whose traceback cannot be shown"
    with contextlib.suppress(Exception):
        failure.with_traceback(failure.__traceback__ and failure.__traceback__.tb_next)  # without this file's frame
        text = "".join(traceback.format_exception(type(failure), failure, failure.__traceback__))
    try:
        try:
            _deliver_exception(call, _RAISED, text, failure, _exception_state(failure))
        except Exception:  # the state may hold what the class itself knows not to pickle
            _deliver_exception(call, _RAISED, text, failure, {})
    except BaseException as error:
        what = f"it raised {type(failure).__qualname__}, which cannot be pickled"
        _deliver_failure(call, _UNWRITTEN if call.sink.failed else _UNPICKLABLE, what, error, text)


def _dump_text(write: Callable[[bytes], None], text: str) -> None:
    """Pickle a large str slice by slice: the pickler would hold a copy of all of it."""

    def slices() -> Iterator[bytes]:
        return (text[i : i + (1 << 20)].encode("utf-8", "surrogatepass") for i in range(0, len(text), 1 << 20))

    write(b"\x80\x05\x8d" + struct.pack("<Q", sum(map(len, slices()))))  # PROTO 5, BINUNICODE8
    for piece in slices():
        write(piece)
    write(pickle.STOP)


def _deliver_exception(call: _Call, kind: int, text: str, error: BaseException | None, state: dict[str, Any]) -> None:
    sink = call.sink = _Sink(call)
    pickler = _ExceptionPickler(sink, 5, buffer_callback=sink.keep_out_of_band)
    pickler.dump(text)
    pickler.dump((error, state))
    sink.deliver(kind)


def _deliver_failure(call: _Call, kind: int, what: str, error: BaseException, text: str = "") -> None:
    """Deliver what went wrong in the child itself, with its cause if that can be pickled."""
    if kind == _UNWRITTEN:
        what, text = "its outcome could not be written", ""  # which fits into the region
    message = f"{what}: {_say(error)}" + (text and f"\n{text}")
    try:
        _deliver_exception(call, kind, message, error, {})
    except Exception:
        _deliver_exception(call, kind, message, None, {})


def _offsets(end: int, lengths: Iterable[int]) -> Iterable[int]:
    """Where the buffers are in the bulk: behind its stream, each on pages of its own, so that it can be mapped."""
    return itertools.accumulate(-(-length // _PAGE) * _PAGE for length in (end, *lengths))


def _warm_up() -> None:
    """Deliver a few times to nobody, so that children find the interpreter's caches filled.

    Each child would else fill them for itself, which costs a trivial call some 10 page faults.
    """
    call = _Call(_warm_up)
    call.header = memoryview(bytearray(_HEADER_SIZE)).cast("Q")
    call.region = memoryview(bytearray(_REGION_SIZE))
    for _ in range(16):
        call.prepare()
        _deliver_outcome(call, None, None)


# -------------------------------------------------------------------------------------------------------- The parent


def _outcome(call: _Call) -> Any:
    """Return or raise what the child delivered, or say what became of it."""
    progress, kind, count, length, in_bulk = call.header.tolist()
    if progress != _DELIVERED:
        raise _failure(call, progress)
    try:
        if kind == _RESULT and not count and not in_bulk:
            call.received = length
            return pickle.loads(call.region[:length])
        _receive(call, count, length, bool(in_bulk))
        unpickler = pickle.Unpickler(call.stream, buffers=call.buffers)
        first = unpickler.load()  # the result; of all else a text, so that this arrives whatever comes next
    except Exception as error:
        if _came_from_a_signal_handler(error):
            raise
        message = f"{_name(call.function)} returned, but rebuilding its result raised {_say(error)}"
        raise DeserializationError(message) from error
    if kind == _RESULT:
        return first
    name = _name(call.function)
    second: Any = None
    state: Any = None
    try:
        second, state = unpickler.load()
        if kind == _RAISED and not isinstance(second, BaseException):
            raise TypeError(f"it unpickles to {type(second).__qualname__}")
        _set_exception_state(second, state)
    except Exception as error:
        if _came_from_a_signal_handler(error):
            raise
        if kind == _RAISED:
            message = f"{name} raised an exception that does not unpickle ({_say(error)}):\n{first}"
            raise SerializationError(message) from error
        second = None
    if kind == _RAISED:
        try:
            raise second from _ChildTraceback(first)
        finally:
            del second, state, unpickler  # which refer to this frame, through a traceback
    failures = {_UNPICKLABLE: SerializationError, _UNWRITTEN: ResultDeliveryError, _SETUP_FAILED: ChildSetupError}
    raise failures.get(kind, DeserializationError)(f"{name}: {first}") from second


def _failure(call: _Call, progress: int) -> MemIsolateError:
    """The error for a child that is gone and delivered nothing."""
    name = _name(call.function)
    if call.expired:
        killed = "was killed" if call.wait_error is None else f"cannot be killed ({call.wait_error})"
        message = (
            f"{name} did not end within {call.timeout:g} s, and {killed}; allow more time, or retry if it may run twice"
        )
        return CallableTimeoutError(message, timeout=call.timeout)
    details: dict[str, Any] = {}
    status = call.status.value
    if call.wait_error is not None:
        ending = f"its end cannot be learnt ({call.wait_error})"
    elif os.WIFSIGNALED(status):
        details["signal"] = number = os.WTERMSIG(status)
        with contextlib.suppress(ValueError):  # a real-time signal has no name
            details["signal"] = signal.Signals(number)
        ending = f"it was killed by {getattr(details['signal'], 'name', f'signal {number}')}"
    else:
        details["exit_status"] = os.WEXITSTATUS(status)
        ending = f"it ended with status {details['exit_status']}"
    if progress == _NOT_STARTED:
        error: MemIsolateError = ChildSetupError(
            f"the child did not reach {name}: {ending}; it is safe to retry", **details
        )
    elif progress == _RETURNED:
        error = ResultDeliveryError(f"{name} ended, but the child did not deliver its outcome: {ending}", **details)
    else:
        message = f"the child did not survive {name}: {ending}; retry only if it may run twice"
        if call.wait_error is not None:
            error = WaitError(message)
        else:
            error = (KilledBySignalError if "signal" in details else UnexpectedExitStatusError)(message, **details)
    error.__cause__ = call.wait_error
    return error


def _receive(call: _Call, count: int, length: int, in_bulk: bool) -> None:
    """Open the stream, and take the buffers behind it, each in memory of its own that nobody else can change.

    The largest piece of the bulk stays where it is: if a buffer, it is mapped; if the stream, it is read from there.
    All else moves to ordinary memory and is cut out of the bulk, so that no piece keeps another one's memory.
    """
    bulk, table = call.bulk[0], 8 * count
    packed = os.pread(bulk, table, length - table) if in_bulk else call.region[length - table : length]
    lengths = [length if in_bulk else 0, *struct.unpack(f"={count}Q", packed)]
    call.received = length - table + sum(lengths[1:])
    pieces = list(zip([0, *_offsets(lengths[0], lengths[1:])], lengths))
    largest = lengths.index(max(lengths))
    memory: list[Any] = [_read(bulk, *piece) if i != largest else None for i, piece in enumerate(pieces)]
    if largest > 0 and lengths[largest] >= _MAPPED:
        memory[largest] = _map_alone(bulk, *pieces[largest])
    elif in_bulk and largest == 0 and _seal(bulk):
        try:  # opened anew: a process left behind may move the descriptor's position
            call.buffers, call.stream = memory[1:], open(f"/proc/self/fd/{bulk}", "rb", buffering=1 << 18)
            return
        except OSError as error:  # there is no /proc
            if _came_from_a_signal_handler(error):
                raise
    if memory[largest] is None:
        memory[largest] = _read(bulk, *pieces[largest])
    call.buffers, call.stream = memory[1:], io.BytesIO(memory[0] if in_bulk else call.region[:length])


def _seal(bulk: int) -> bool:
    """Make the bulk unchangeable; False where the system cannot, or somebody has it mapped for writing.

    A process that the callable left behind may hold its descriptor, and could change a result while it is in use here.
    """
    sealed: bool = _libc_quick.fcntl(bulk, _F_ADD_SEALS, _F_SEAL_EVERYTHING) == 0
    return sealed


def _read(bulk: int, offset: int, length: int) -> memoryview:
    """A piece of the bulk, in fresh memory."""
    view = memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE) if length else b"")
    done = 0
    while done < length:
        count = os.preadv(bulk, [view[done : done + (1 << 30)]], offset + done)  # one call reads 2 GiB at most
        if count == 0:
            raise EOFError("the result was cut short")
        done += count
    return view


def _map_alone(bulk: int, offset: int, length: int) -> memoryview | None:
    """Map a piece of the bulk privately and free the rest of it; None where it cannot be sealed for that."""
    if _libc_fallocate is None:
        return None
    end = offset + -(-length // _PAGE) * _PAGE
    for start, size in ((0, offset), (end, os.fstat(bulk).st_size - end)):
        if size > 0:
            mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
            _libc_fallocate(bulk, mode, ctypes.c_long(start), ctypes.c_long(size))
    if not _seal(bulk):
        return None
    if os.fstat(bulk).st_size < offset + length:
        raise EOFError("the result was cut short")
    # An mmap object of Python's would hold a duplicate of the descriptor as long as the result lives. So it makes an
    # anonymous mapping, which has none, and libc maps the file in its place.
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    if _libc_mmap(address, length, writable, mmap.MAP_PRIVATE | _MAP_FIXED, bulk, offset) != address:
        raise OSError(ctypes.get_errno(), "the result could not be mapped")
    return memoryview(memory)


# The two tries are written out in both: a signal handler may raise on the way into _finish, for which is the second.


def _run(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        call.start(args, kwargs)
        call.wait()
        return _outcome(call)
    finally:
        try:
            _finish(call)
        finally:
            if not call.ended:  # a signal handler raised on the way into it
                _finish(call)
        if _logger.isEnabledFor(logging.DEBUG):
            _log(call)


async def _run_async(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        call.start((call.function, *args), kwargs, run=_run_coroutine)
        await call.wait_async()
        return _outcome(call)
    finally:
        try:
            _finish(call)
        finally:
            if not call.ended:  # a signal handler raised on the way into it
                _finish(call)
        if _logger.isEnabledFor(logging.DEBUG):
            _log(call)


def _log(call: _Call) -> None:
    error = sys.exc_info()[0]
    outcome = "returned" if error is None else f"raised {error.__name__}"
    pid = call.child[0] if call.child and call.child[0] > 0 else None
    seconds = _clock() - call.started
    message = "%s in child %s %s after %.6f s, %d bytes returned"
    _logger.debug(message, _name(call.function), pid, outcome, seconds, call.received)


def _name(function: Callable[..., Any]) -> str:
    try:
        name = getattr(function, "__qualname__", None)
    except Exception as error:  # of a __getattr__ that expects no such question
        if _came_from_a_signal_handler(error):
            raise
        name = None
    return name if isinstance(name, str) else f"a {type(function).__qualname__} object"


def _say(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception_only(type(error), error)).strip()  # also where str(error) raises
    except Exception as another:  # of a SyntaxError that was made of anything
        if _came_from_a_signal_handler(another):
            raise
        return type(error).__qualname__


# --------------------------------------------------------------------------------------------------- The public face


def execute_in_isolated_process(callable: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call ``callable(*args, **kwargs)`` in a forked child, wait, and return what it returns or raise what it raises.

    Callable and arguments can be anything, for they are not pickled; the result must be picklable. An exception
    arrives with its type, arguments, attributes and notes; its ``__cause__`` shows the child's traceback. Errors of
    the call itself are `MemIsolateError`: `CallableDidNotExecuteError` (safe to retry), `CallableExecutedError`, or
    `CallableStatusUnknownError`. A non-callable is a `TypeError`. For limits see `isolated`.
    """
    result: R = _run(_Call(callable), args, kwargs)
    return result


@overload
async def execute_in_isolated_process_async(
    callable: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
) -> R: ...
@overload
async def execute_in_isolated_process_async(callable: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
async def execute_in_isolated_process_async(callable: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Do the same while the asyncio event loop goes on; ``callable`` may be an ``async def`` function too.

    That runs in an event loop of its own in the child. Cancelling kills and reaps the child before it returns.
    """
    return await _run_async(_Call(callable), args, kwargs)


@overload
def isolated(
    function: Callable[P, R], /, *, timeout: float | None = None, memory_limit: int | None = None
) -> Callable[P, R]: ...
@overload
def isolated(
    function: None = None, /, *, timeout: float | None = None, memory_limit: int | None = None
) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def isolated(function: Any = None, /, *, timeout: float | None = None, memory_limit: int | None = None) -> Any:
    """Make a function run isolated at every call: ``@isolated``, or ``@isolated(timeout=10, memory_limit=2**30)``.

    ``timeout``: seconds of wall clock for the whole call but the rebuilding of its result, a positive real number; when
    they are over the child is killed and `CallableTimeoutError` raised. ``memory_limit``: bytes of private memory that the callable may add to
    what the process has at the call, a positive int (Linux; elsewhere `NotImplementedError`); Python code that wants
    more gets `MemoryError`. A bad value is a `TypeError` or `ValueError` here, not at the call.

    Functions, ``async def`` functions, methods, static and class methods and other callables keep their signature,
    name and docs. The result is a plain function: it pickles by its name, which leads to it where it was decorated.
    """
    _check_limits(timeout, memory_limit)
    timeout = None if timeout is None else float(timeout)
    if function is None:
        return lambda function: _isolate(function, timeout, memory_limit)
    return _isolate(function, timeout, memory_limit)


def _isolate(function: Any, timeout: float | None, memory_limit: int | None) -> Any:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_isolate(function.__func__, timeout, memory_limit))
    if not callable(function):
        raise TypeError(f"expected a callable, not {type(function).__name__}")
    import inspect

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
            return await _run_async(_Call(function, timeout, memory_limit), args, kwargs)

        return async_wrapper

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return _run(_Call(function, timeout, memory_limit), args, kwargs)

    return wrapper


def _check_limits(timeout: Any, memory_limit: Any) -> None:
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
            raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
        try:
            seconds = float(timeout)
        except OverflowError:
            seconds = math.inf
        if not 0 < seconds < math.inf:
            raise ValueError("timeout must be positive and finite; None means no limit")
    if memory_limit is not None:
        if isinstance(memory_limit, bool) or not isinstance(memory_limit, int):
            raise TypeError(f"memory_limit must be an int of bytes or None, not {memory_limit!r}")
        if memory_limit <= 0:
            raise ValueError(f"memory_limit must be positive, not {memory_limit!r}; None means no limit")
        if not sys.platform.startswith("linux"):
            raise NotImplementedError("memory_limit needs Linux, whose RLIMIT_DATA bounds all private memory")


# -------------------------------------------------------------------------------------------------------- Huge pages

_HUGE_PAGE = 2 << 20
_FULL = _HUGE_PAGE - _HUGE_PAGE // 21  # what must be resident of a block: filling the rest adds 5 % at most
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_libc_madvise = _libc.madvise
_libc_madvise.argtypes = _libc_madvise_quick.argtypes
# VmFlags of stacks, of locked and hugetlb memory, of what forks skip or empty, and of what refuses huge pages.
_LEFT_ALONE = frozenset([b"gd", b"lo", b"ht", b"dc", b"wf", b"nh"])


def use_huge_pages() -> int:
    """Move this process's resident private memory into huge pages (Linux 6.1); return the bytes that are in them now.

    Forking then copies 512 times fewer page-table entries, so later calls cost a process with gigabytes of live memory
    about a tenth. Call it once those are loaded (it takes seconds per GiB, and other threads go on meanwhile), and
    again when much of them was replaced. Contents stay, RSS grows by at most 5 %. Left alone: memory that is mostly
    untouched, locked, a stack, or shared with a living process. Returns 0 where the system cannot do it.
    """
    try:
        with open("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size") as file:
            size = int(file.read())
    except OSError:
        size = mmap.PAGESIZE * mmap.PAGESIZE // 8  # a sandbox may have no /sys
    if size != _HUGE_PAGE or _libc_madvise(0, 0, _MADV_COLLAPSE) != 0:  # the kernel does not know this advice
        return 0
    moved = 0
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            for first, last in _private_anonymous_mappings():
                for start in range(first, last, 64 * _HUGE_PAGE):  # large steps through reservations of terabytes
                    end = min(start + 64 * _HUGE_PAGE, last)
                    if _resident(pagemap.fileno(), start, end) < _FULL:
                        continue
                    for block in range(start, end, _HUGE_PAGE):
                        # Other threads may have mapped something else there by now: look again, just before.
                        if _resident(pagemap.fileno(), block, block + _HUGE_PAGE) >= _FULL and _collapse(block):
                            moved += _HUGE_PAGE
    except OSError:
        pass  # /proc is not there, or not for a process that has changed its user
    return moved


def _private_anonymous_mappings() -> list[tuple[int, int]]:
    """Find the writable ones that have something to move; of each, the part that consists of whole huge pages."""
    mappings = []
    first = last = 0
    movable = False
    with open("/proc/self/smaps", "rb") as smaps:
        for line in smaps:
            name, *values = line.split()
            if not name.endswith(b":"):  # the line that begins a mapping: 7f1e40000000-7f1e80000000 rw-p 0 00:00 0
                first, last = (int(address, 16) for address in name.split(b"-"))
                movable = values[0].startswith(b"rw") and values[3] == b"0"  # no inode: no file and not shared
            elif name == b"Rss:":
                movable &= int(values[0]) << 10 >= _FULL
            elif name == b"VmFlags:" and movable and _LEFT_ALONE.isdisjoint(values):
                mappings.append((-(-first // _HUGE_PAGE) * _HUGE_PAGE, last // _HUGE_PAGE * _HUGE_PAGE))
    return mappings


def _resident(pagemap: int, start: int, end: int) -> int:
    """Count the bytes in pages that are present (bit 63), anonymous (not 61) and in no other process (56)."""
    entries = os.pread(pagemap, (end - start) // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8)
    return entries[7 if sys.byteorder == "little" else 0 :: 8].count(0x81) * mmap.PAGESIZE


def _collapse(block: int) -> bool:
    done: bool = _libc_madvise(block, _HUGE_PAGE, _MADV_COLLAPSE) == 0
    if not done and ctypes.get_errno() in (errno.EINVAL, errno.EAGAIN):
        # Older kernels (6.12 is one) want a page writable, and a fork leaves none. This makes one so, unchanged.
        _libc_madvise(block, mmap.PAGESIZE, _MADV_POPULATE_WRITE)
        done = _libc_madvise(block, _HUGE_PAGE, _MADV_COLLAPSE) == 0
    return done


# ------------------------------------------------------------------------------------- The tour: python3 mem_isolate.py


def _tour() -> int:
    """Show the main job on this machine, a line for each thing tried; return 0 only if each did what it should."""
    import random

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    state = {"changed": False}

    def resident() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * _PAGE >> 20

    def leak() -> str:
        size = 256 << 20
        ctypes.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))), 1, size)
        return f"the child grew to {resident()} MiB"

    def crash() -> None:
        ctypes.string_at(0)

    def change() -> float:
        state["changed"] = True
        return random.random()

    def fail() -> None:
        state["no such key"]

    def hoard() -> None:
        bytearray(1 << 30)

    def leaks() -> tuple[bool, str]:
        before, said = resident(), execute_in_isolated_process(leak)
        return (
            resident() - before < 8,
            f"{said}; the parent's RSS was {before} MiB before and is {resident()} MiB after",
        )

    def crashes() -> tuple[bool, str]:
        try:
            return False, f"returned {execute_in_isolated_process(crash)}"
        except KilledBySignalError as error:
            return error.signal == signal.SIGSEGV, f"{type(error).__name__}: {error}"

    def changes() -> tuple[bool, str]:
        same = execute_in_isolated_process(change) == execute_in_isolated_process(change) == random.random()
        return same and not state["changed"], f"the parent's global is still {state}, and its generator where it was"

    def fails() -> tuple[bool, str]:
        try:
            return False, f"returned {execute_in_isolated_process(fail)}"
        except KeyError as error:
            lines = str(error.__cause__).strip().strip('"').strip().splitlines()
            return "in fail" in str(error.__cause__), "\n".join([f"{error!r}, and the child's traceback:", *lines])

    def returns() -> tuple[bool, str]:
        result = execute_in_isolated_process(lambda: os.urandom(1 << 20) * 64)
        return len(result) == 64 << 20, f"got {len(result) >> 20} MiB"

    def hangs() -> tuple[bool, str]:
        try:
            return False, f"returned {isolated(time.sleep, timeout=0.3)(60)}"
        except CallableTimeoutError as error:
            return True, f"{type(error).__name__}: {error}"

    def hoards() -> tuple[bool, str]:
        try:
            return False, f"returned {isolated(hoard, memory_limit=256 << 20)()}"
        except MemoryError as error:
            return True, f"{error!r} in the child, raised here"

    steps: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("leak 256 MiB of C memory", leaks),
        ("segfault", crashes),
        ("change a global and the random state", changes),
        ("raise an exception", fails),
        ("return 64 MiB", returns),
        ("sleep 60 s, with timeout=0.3", hangs),
        ("take 1 GiB, with memory_limit=256 MiB", hoards),
    ]
    if not sys.platform.startswith("linux"):
        steps = [step for step in steps if step[1] not in (leaks, hoards)]  # they need /proc and RLIMIT_DATA
    print(f"mem_isolate {__version__} on Python {sys.version.split()[0]}, {os.uname().sysname} {os.uname().release}")
    failures = 0
    for title, step in steps:
        started = time.perf_counter()
        try:
            good, said = step()
        except Exception as error:
            good, said = False, f"{type(error).__name__}: {error}"
        milliseconds = (time.perf_counter() - started) * 1000
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {title} ({milliseconds:.1f} ms): " + said.replace("\n", "\n         "))
    print(f"{failures} of {len(steps)} did not do what they should" if failures else "This platform is supported.")
    return 1 if failures else 0


_warm_up()  # last, since another global would make the interpreter forget what it learnt about those

if __name__ == "__main__":
    sys.exit(_tour())
