"""Run a function in a forked child, and return its result as if it had been called directly.

    from mem_isolate import execute_in_isolated_process

    result = execute_in_isolated_process(parse, "untrusted.bin")

Whatever the function does to memory (leaks, fragments, corrupts, crashes) happens to the child and is gone with it.
The function and its arguments are never pickled, since the child is a copy of the process; only what it returns or
raises is, and comes back through shared memory. One file, standard library only, CPython 3.8 or newer on POSIX:
copy it into your project. ``python3 mem_isolate.py`` shows on your own machine what it does.

The file reads from top to bottom: errors, libc, shared memory, exceptions on their way, what a child renews, the
child, its stack after a crash, the process as its parent sees it, the call, waiting, the outcome, the public face; then
huge pages and the tour. To see a call whole before its parts, begin with ``_run``, ``_fork`` and ``_Child.run``.
"""

# SPDX-License-Identifier: MIT
# SPDX-FileCopyrightText: 2026 The mem_isolate authors
# Documentation, tests, benchmark and newer versions: the README of the repository mem-isolate-python.
#
# 1.1.0 (2026-11-26)  Crashes and timeouts say where; errors say what the call cost; generator functions; large results
#                     are rebuilt while they are made; nothing that other threads own is finalised in a child.
# 1.0.0 (2026-11-23)  The first version.

from __future__ import annotations

import collections.abc
import contextlib
import contextvars
import copyreg
import errno
import functools
import gc
import io
import logging
import mmap
import numbers
import operator
import os
import pickle
import posix
import re
import select
import signal
import struct
import sys
import threading
import time
import traceback
import types
import weakref
from itertools import accumulate, chain, islice, repeat, starmap, takewhile
from math import inf
from signal import Signals
from types import FunctionType, MethodType

TYPE_CHECKING = False  # importing typing would take longer than all the rest

if sys.platform == "win32":
    raise ImportError("mem_isolate needs fork(2), which Windows does not have; run it under WSL or Linux")
try:
    import _imp  # the import lock
    import ctypes
    import fcntl
    import resource
    from ctypes import PyDLL, pythonapi
except (ImportError, OSError) as error:  # the latter where Python is linked statically
    raise ImportError(
        f"mem_isolate cannot import ctypes, fcntl or resource here ({error}): it needs CPython on POSIX, linked "
        "dynamically, with ctypes.PyDLL, and must be imported by the main interpreter"
    ) from error
try:
    import faulthandler
except ImportError:  # some builds leave it out: then errors come without the child's stack
    faulthandler: Any = None  # type: ignore[no-redef]

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator
    from typing import Any, NoReturn, TypeVar, overload

    from typing_extensions import ParamSpec

    P = ParamSpec("P")
    R = TypeVar("R")
else:

    def overload(function):
        return function


__version__ = "1.1.0"
__all__ = ["execute_in_isolated_process", "execute_in_isolated_process_async", "isolated", "use_huge_pages"]
__all__ += ["MemIsolateError"]
__all__ += ["CallableDidNotExecuteError", "RegionCreationError", "ForkError", "ChildSetupError"]
__all__ += ["CallableExecutedError", "SerializationError", "DeserializationError", "ResultDeliveryError"]
__all__ += ["CallableStatusUnknownError", "KilledBySignalError", "UnexpectedExitStatusError"]
__all__ += ["CallableTimeoutError", "WaitError"]

_logger = logging.getLogger("mem_isolate")


# ---------------------------------------------------------------------------------------------------------- Errors
# Three levels: the base; what became of the callable, which decides whether to retry; the step that failed.


class MemIsolateError(Exception):
    """The isolated call failed; ``__cause__`` is the exception underneath, where there is one.

    After a crash or a timeout that is the child's Python stack. What the callable itself raises is not wrapped in
    this: it is raised as it is.
    """

    #: The signal that ended the child (an ``int`` for a real-time signal); None after any other end, and a timeout.
    signal: Signals | int | None = None
    #: The status that the child ended with, or None.
    exit_status: int | None = None
    #: The child's process id; None before there was one.
    pid: int | None = None
    #: The most memory that the child had resident, in bytes, what it inherited included; None where unknown, and while
    #: it runs.
    peak_memory: int | None = None
    #: What the child used of the processors, in seconds, user and system; None where unknown.
    cpu_time: float | None = None

    def __init__(self, message: str, **details: object) -> None:
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
    """The callable ended, or yielded, but the outcome or item did not arrive: retry only what may run twice."""


class SerializationError(CallableExecutedError):
    """The result or an item cannot be pickled; or an exception that was raised cannot, or does not unpickle."""


class DeserializationError(CallableExecutedError):
    """Rebuilding the result or an item in the parent raised ``__cause__``."""


class ResultDeliveryError(CallableExecutedError):
    """The child ended, or could not write, after the callable had returned (``signal``, ``exit_status``)."""


class CallableStatusUnknownError(MemIsolateError):
    """The child ended while the callable was running: retry only what may run twice."""


class KilledBySignalError(CallableStatusUnknownError):
    """A signal ended the child while the callable was running: ``signal``."""

    signal: Signals | int  # pyright: ignore[reportIncompatibleVariableOverride]


class UnexpectedExitStatusError(CallableStatusUnknownError):
    """The child ended by ``os._exit``, ``exec`` or the like while the callable was running: ``exit_status``."""

    exit_status: int  # pyright: ignore[reportIncompatibleVariableOverride]


class CallableTimeoutError(CallableStatusUnknownError, TimeoutError):
    """The call did not end within ``timeout`` seconds; the child was killed."""

    #: The limit, in seconds.
    timeout: float


class WaitError(CallableStatusUnknownError):
    """How the child ended cannot be learnt, and no outcome arrived."""


class _ChildTraceback(Exception):
    """The ``__cause__`` of what the callable raised, and of a crash or timeout: the stack as the child saw it."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


# ------------------------------------------------------------------------------------------------ libc and the C API
# fork must keep the GIL (PyDLL): if another thread took it at the fork, the child would wait for it for ever. Calls
# that may block must release it (CDLL), so that other threads run meanwhile. The rest keep it, since getting it back
# from busy threads takes milliseconds: `_libc_...` keeps it, but for wait4, fallocate, madvise; `_libc.` releases it.

_LINUX = sys.platform.startswith("linux")
_libc = ctypes.CDLL(None, use_errno=True)
_libc_holding_gil = PyDLL(None, use_errno=True)
_libc_no_errno = PyDLL(None)  # holds it too; for calls whose errno nobody reads: saving it costs a child page faults
_libc_fork = _libc_holding_gil.fork
_libc_exit = _libc_no_errno._exit
_libc_close = _libc_no_errno.close
_libc_waitpid = _libc_no_errno.waitpid
_libc_sigmask = _libc_no_errno.pthread_sigmask
_libc_sigaction = _libc_no_errno.sigaction
_libc_memcpy = _libc_no_errno.memcpy
_libc_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
_libc_memfd_create = getattr(_libc_holding_gil, "memfd_create", None)  # Linux 3.17, glibc 2.27
_libc_eventfd = getattr(_libc_holding_gil, "eventfd", None)  # Linux, FreeBSD 13
_libc_prctl = getattr(_libc_no_errno, "prctl", None)  # Linux has it
_KNOWS_STACK_T = _LINUX and not os.uname().machine.startswith("mips")  # others have its fields in another order
_libc_sigaltstack = getattr(_libc_no_errno, "sigaltstack", None) if _KNOWS_STACK_T else None
_libc_fpending = getattr(_libc_no_errno, "__fpending", None)  # glibc and musl: bytes that wait in a C stream
_libc_fpurge = getattr(_libc_no_errno, "__fpurge", None) or getattr(_libc_no_errno, "fpurge", None)  # or of the BSDs

# Where off_t has two sizes (32-bit glibc), the functions whose names end in 64 take the large one.
_libc_mmap = getattr(_libc_holding_gil, "mmap64", None) or _libc_holding_gil.mmap
_libc_mmap.restype = ctypes.c_void_p
_libc_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
_libc_munmap = _libc_no_errno.munmap
_libc_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc_fallocate = getattr(_libc, "fallocate64", None) or getattr(_libc, "fallocate", None)  # Linux has it
if _libc_fallocate is not None:
    _libc_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc_madvise_holding_gil = _libc_no_errno.madvise
_libc_madvise_holding_gil.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_MADV_DONTFORK = getattr(mmap, "MADV_DONTFORK", None)  # Linux has it

# wait4 is waitpid that also tells what the child used; a libc without it ignores the fourth argument of waitpid.
_libc_wait4 = getattr(_libc, "wait4", None) or _libc.waitpid
_libc_wait4_holding_gil = getattr(_libc_holding_gil, "wait4", None) or _libc_holding_gil.waitpid
# struct rusage begins with two times of two words each, then the peak; musl's on 32 bits is different, and not read.
_USAGE_IS_KNOWN = hasattr(_libc, "wait4") and (sys.maxsize > 2**32 or hasattr(_libc, "gnu_get_libc_version"))
_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024

_view_of_memory = _libc_no_errno.PyMemoryView_FromMemory
_view_of_memory.restype = ctypes.py_object
_view_of_memory.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int]
_PYBUF_WRITE = 0x200
_READ_WRITE = mmap.PROT_READ | mmap.PROT_WRITE
_MMAP_SHARED = _READ_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, -1, 0  # and what follows them: no file, no offset
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 16  # of the mmap function

_C_STREAMS = []
for _stream in ("stdout", "stderr", "__stdoutp", "__stderrp"):  # the latter two on macOS and FreeBSD
    with contextlib.suppress(ValueError):
        _C_STREAMS.append(ctypes.c_void_p.in_dll(_libc, _stream))

_PR_SET_PDEATHSIG = 1
_FALLOC_FL_KEEP_SIZE, _FALLOC_FL_PUNCH_HOLE = 1, 2
_MFD_CLOEXEC, _MFD_ALLOW_SEALING = 1, 2
_EFD_NONBLOCK, _EFD_CLOEXEC = os.O_NONBLOCK, os.O_CLOEXEC
_F_DUPFD_CLOEXEC = fcntl.F_DUPFD_CLOEXEC
_F_ADD_SEALS = 1033  # in the fcntl module from 3.9 on
_F_SEAL_EVERYTHING = 1 | 2 | 4 | 8  # seal, shrink, grow, write
_SIG_BLOCK, _SIG_SETMASK = int(signal.SIG_BLOCK), int(signal.SIG_SETMASK)
_FAULTS = {  # what faulthandler reports, and its words for it
    Signals.SIGSEGV: "Segmentation fault",
    Signals.SIGBUS: "Bus error",
    Signals.SIGFPE: "Floating",  # "point exception", from 3.13 on with a hyphen
    Signals.SIGILL: "Illegal instruction",
    Signals.SIGABRT: "Aborted",
}
_Ending = ctypes.c_int * 80  # what wait4 fills in
_STATUS, _USAGE_AT = 0, 8  # in there: the index of the status, the offset of a struct rusage
_SignalSet = _Ending  # a sigset_t has 128 bytes in glibc and musl
_ALL_BUT_FAULTS = _SignalSet()  # all but faults: one that is blocked kills without running the handler that tells where
_libc.sigfillset(_ALL_BUT_FAULTS)
for _fault in _FAULTS:
    _libc.sigdelset(_ALL_BUT_FAULTS, int(_fault))

# Linux 5.3; os has it from Python 3.9 on, libc (glibc 2.36) for older ones.
_pidfd_open: Any = getattr(os, "pidfd_open", None) or getattr(_libc_holding_gil, "pidfd_open", None)
_pidfd_send_signal = getattr(signal, "pidfd_send_signal", None)

_clock = time.monotonic
if hasattr(time, "clock_gettime"):  # not in all builds for macOS; and test suites replace time.monotonic
    _clock = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
_read, _write = posix.read, posix.write  # eventlet replaces those of os, and lets other greenlets run in them
_getpid, _getppid, _set_wakeup_fd = os.getpid, os.getppid, signal.set_wakeup_fd
_gettrace, _getprofile, _getrecursionlimit = sys.gettrace, sys.getprofile, sys.getrecursionlimit
_getppid()  # so that the dynamic linker has resolved it, which it would else do in each child

# A signal handler of Python's may raise between any two bytecodes, even while this thread blocks signals: another
# thread takes the signal, and the main thread runs the handler. What must not be torn apart is therefore one step of C.


def _step(function: Callable[..., Any], *arguments: Any) -> Iterator[Any]:
    """An iterator that, when it is advanced, calls a C function once and yields its result."""
    return starmap(function, (arguments,))


_THIS_FILE = _step.__code__.co_filename  # as tracebacks have it: __file__ is another where there is only bytecode


def _keep(results: list[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Call a C function and append what it returns, in one step of C."""
    results.extend(_step(function, *arguments))


def _drain(items: list[Any], function: Callable[..., Any], *arguments: Any) -> None:
    """Take each item out and call a C function with it, in one step of C."""
    if items:
        taken = map(list.pop, repeat(items, len(items)))
        sum(map(function, taken, *map(repeat, arguments)))  # any would stop at a close that fails


def _is_from_handler(error: BaseException) -> bool:
    """Whether a signal handler raised this error, where only errors of the system are expected.

    A handler is a function that was passed the frame which called it; one that deletes that argument goes unnoticed.
    """
    for frame, _ in traceback.walk_tb(error.__traceback__):
        code, caller = frame.f_code, frame.f_back
        if code.co_filename == _THIS_FILE:  # no handler; and to ask for its locals would keep them alive
            continue
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4)  # CO_VARARGS: *args comes last
        for name in code.co_varnames[:count]:
            value = frame.f_locals.get(name)
            if caller and any(item is caller for item in (value if type(value) is tuple else (value,))):
                return True
    return False


def _raise_if_from_handler(error: BaseException) -> None:
    if _is_from_handler(error):
        raise error


class _tolerating(contextlib.suppress):  # no contextmanager: an exception that hits a generator's end is lost
    """Go on behind the block after an error of these kinds, unless a signal handler raised it."""

    def __exit__(self, kind: Any, error: Any, frames: Any) -> bool:
        return bool(super().__exit__(kind, error, frames)) and not _is_from_handler(error)


def _os_error(what: str = "") -> OSError:
    """The error of the last call that kept errno."""
    code = ctypes.get_errno()
    return OSError(code, what or os.strerror(code))


# ---------------------------------------------------------------------------------------------------- Shared memory
# What a child returns is one stream of bytes. Its first part is in the region, an anonymous shared mapping, behind a
# header of five words. That works without a descriptor, and small as it is, little of it is in the way of a callable's
# wild pointers. What does not fit there goes to the bulk, a file in memory that nobody has mapped while the callable
# runs; a counter tells the parent how much the child has written there, so that it can read along. Nothing that was
# written is written over. Large buffers follow the stream, each on pages of its own, so that one can be mapped. The
# items of a generator come before its outcome, in a ring at the start of the bulk.

_PAGE = mmap.PAGESIZE
_SHARED_SIZE = 64 * 1024  # only the pages that are used cost anything
_HEADER_SIZE = 5 * 8
# Its words: how far the child came; of the outcome: its kind, number of buffers, where its stream starts, its length.
_PROGRESS, _KIND, _BUFFERS, _START, _LENGTH = range(5)
_LAST_WORDS_SIZE = 4096  # at the end, for a message where the bulk cannot be written
_REGION_SIZE = _SHARED_SIZE - _HEADER_SIZE - _LAST_WORDS_SIZE
_OUT_OF_BAND = 64 * 1024  # bytes from which on a buffer is not pickled, but written and read on its own
_MAPPED = 256 * 1024  # bytes from which on the largest is mapped; a process may have 65,530 mappings
_READ_AHEAD = 1 << 18  # bytes that the parent reads at a time
_PIECE = 4 << 20  # bytes that are written, then published, at a time
_NAP = 50e-6  # seconds that small items of a generator are let come together
_RING = 64 << 20  # bytes that a generator's child may be ahead of its reader
_WORD = struct.Struct("=Q")
_ITEM = struct.Struct("=QQ")  # goes before each item of a generator: length of its stream, number of its buffers
_NOT_YET = object()  # instead of an item: there is none to read now

# How far the child came. Not small numbers, so that hardly a stray write is taken for one of them.
_NOT_STARTED, _RUNNING, _RETURNED, _DELIVERED = struct.unpack("4Q", b"notstartrunning!returneddelivers")
# What the child delivers.
_RESULT, _RAISED, _UNPICKLABLE, _UNWRITTEN, _SETUP_FAILED = range(5)

# The file position of the bulk, at which faulthandler writes the child's stack: far behind any result.
_REPORT_AT = 1 << 40  # bytes, which ext4 allows
_LOWEST_NUMBERS = (1000, 512, 64, 3)  # out of the way of the callable's own; select takes none from 1,024 on
# fcntl's third argument is variadic, which ctypes cannot pass everywhere; Python's own gives the GIL away.
_fcntl: Any = _libc_holding_gil.fcntl if _LINUX else fcntl.fcntl


class _Shared:
    """The memory and descriptors that the parent and the child of one call share."""

    header: Any = None  # the five words, as integers
    region: Any = None  # the bytes behind them: the first of the stream, then room for last words
    identity: os.stat_result | None = None  # of a bulk that may have a name; one without is known by that

    def __init__(self) -> None:
        self.parent = _getpid()
        # Each is filled and emptied in one step of C, by _keep and _drain.
        self.mapping: list[int] = []  # the address of header, region and last words
        self.bulk: list[int] = []  # a descriptor
        self.counter: list[int] = []  # an eventfd (else two connected sockets): the child adds the bytes it published
        self.room: list[int] = []  # likewise, of a generator: the parent adds the bytes it took
        self.published = 0  # bytes of the bulk that the parent may read
        self.freed = 0  # bytes at its start that were given back
        self.received = 0  # bytes of items and outcome, buffers included

    def make(self, sends: bool) -> None:
        """Make them all; raise OSError where memory or descriptors are wanting."""
        _keep(self.mapping, _libc_mmap, None, _SHARED_SIZE, *_MMAP_SHARED)
        start = self.mapping[0]
        if start == _MAP_FAILED:
            self.mapping.clear()
            raise _os_error("no memory for the result")
        self.header = _view_of_memory(start, _HEADER_SIZE, _PYBUF_WRITE).cast("Q")
        self.region = _view_of_memory(start + _HEADER_SIZE, _REGION_SIZE + _LAST_WORDS_SIZE, _PYBUF_WRITE)
        self.header[_PROGRESS] = _NOT_STARTED
        if not _make_bulk(self.bulk):  # not for every bulk: fstat costs page faults
            self.identity = os.fstat(self.bulk[0])
        _make_counter(self.counter, _EFD_CLOEXEC | _EFD_NONBLOCK, high=sends)
        if sends:
            _make_counter(self.room, _EFD_CLOEXEC, high=True)

    def read_counter(self) -> bool:
        """Add what the child has published since; return whether that was anything."""
        before = self.published
        with _tolerating(BlockingIOError):
            self.published += _read_told(self.counter[0])
            while _libc_eventfd is None:  # sockets may hold more messages than are read at once
                self.published += _read_told(self.counter[0])
        return self.published > before

    def free(self, end: int) -> None:
        """Give back the memory of the bulk up to here, where that is worth a system call."""
        end -= end % _PAGE
        if end - self.freed >= 1 << 20:
            _punch(self.bulk[0], self.freed, end)
            self.freed = end

    def close_descriptors(self) -> None:
        _drain(self.counter, _libc_close)
        _drain(self.room, _libc_close)
        large = self.published or self.received > _REGION_SIZE  # to free it takes a while, and others may run
        _drain(self.bulk, _libc.close if large else _libc_close)

    def release(self) -> None:
        """Give back all that is still held; a second call goes on where the first was cut short."""
        for view in (self.header, self.region):
            if view is not None:
                view.release()  # nobody may look there any more, a debugger in a traceback's frames included
        self.close_descriptors()
        if _getpid() == self.parent:  # in a process forked meanwhile, something else may lie there
            _drain(self.mapping, _libc_munmap, _SHARED_SIZE)


def _read_told(descriptor: int) -> int:
    """The bytes that the other side has told of, by a counter, since this was asked last."""
    return sum(memoryview(_read(descriptor, 4096)).cast("Q"))  # a socket gives all the messages that wait


def _punch(bulk: int, start: int, end: int) -> None:
    """Give back the memory of a part of the bulk, which then reads as zeros."""
    if _libc_fallocate is not None and start < end:
        _libc_fallocate(bulk, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, start, end - start)


def _make_bulk(descriptors: list[int]) -> bool:
    """Append the descriptor of a file in memory; return whether it surely has no links, by which a child knows it."""
    if _libc_memfd_create is not None:
        _keep(descriptors, _libc_memfd_create, b"mem_isolate", _MFD_CLOEXEC | _MFD_ALLOW_SEALING)
        if descriptors[0] >= 0:
            _move_up(descriptors)
            return _LINUX
        descriptors.clear()
        if ctypes.get_errno() in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
            raise _os_error()
    import tempfile  # for a kernel or sandbox without memfd_create

    path = f"{tempfile.gettempdir()}/mem_isolate-{os.urandom(8).hex()}"
    made = _step(posix.open, path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    descriptors.extend(chain(made, filter(None, _step(posix.unlink, path))))  # in one step; drops None
    _move_up(descriptors)
    return False  # NFS renames a file that is open


def _make_counter(descriptors: list[int], flags: int, high: bool = False) -> None:
    """Append an eventfd, or two connected sockets: the first is read, the last written."""
    if _libc_eventfd is not None:
        _keep(descriptors, _libc_eventfd, 0, flags)
        if descriptors[0] >= 0 and (high or descriptors[0] <= 2):  # 0 to 2: a standard stream is closed
            _move_up(descriptors)
    else:
        ends = (ctypes.c_int * 2)()
        made = _step(_libc_holding_gil.socketpair, 1, 1, 0, ends)  # AF_UNIX, SOCK_STREAM
        descriptors.extend(chain(filter(None, made), ends))  # one step of C, as in _keep: -1 first, where it failed
        if descriptors[0] >= 0:
            _move_up(descriptors)  # and so closed where the callable executes something else
            _move_up(descriptors)
            os.set_blocking(descriptors[0], not flags & _EFD_NONBLOCK)
    if descriptors[0] < 0:
        descriptors.clear()
        raise _os_error()


def _move_up(descriptors: list[int]) -> None:
    """Exchange the first descriptor for one with a high number, at the end of the list.

    Low numbers stand for closed standard streams, or are soon some file's of a callable that closes all it can.
    """
    for lowest in _LOWEST_NUMBERS:
        try:
            _keep(descriptors, _fcntl, descriptors[0], _F_DUPFD_CLOEXEC, lowest)
        except OSError as error:  # of Python's fcntl
            if lowest == _LOWEST_NUMBERS[-1] or _is_from_handler(error):
                raise
            continue
        if descriptors[-1] >= 0:
            any(map(_libc_close, map(descriptors.pop, (0,))))
            return
        descriptors.pop()  # the process may not have numbers as high as that
    raise _os_error()


def _offsets(end: int, lengths: Iterable[int]) -> Iterable[int]:
    """Where each buffer is, on pages of its own behind a stream that ends here; then where the last one ends."""
    return accumulate(-(-length // _PAGE) * _PAGE for length in (end, *lengths))


class _Writer:
    """The child's end of the stream: the file that a pickler writes to."""

    # A dict would cost each child a page fault or two.
    __slots__ = ("shared", "region", "start", "position", "buffers", "failed", "bulk", "counter", "publishes")

    def __init__(self, shared: _Shared, publishes: bool = True) -> None:
        self.shared, self.region = shared, shared.region
        self.start = self.position = 0
        self.buffers: list[memoryview] = []
        self.failed = False  # which tells a failed write from an object that cannot be pickled
        self.bulk = self.counter = -1  # descriptors of the child's own, once they are needed
        self.publishes = publishes

    def write(self, data: Any) -> None:
        start, end = self.position, self.position + len(data)
        if end <= _REGION_SIZE:
            self.region[start:end] = data
        else:
            with memoryview(data) as view:
                fits = max(_REGION_SIZE - start, 0)
                self.region[start : start + fits] = view[:fits]
                self.write_bulk(max(start - _REGION_SIZE, 0), view[fits:], self.publishes)
        self.position = end

    def write_bulk(self, offset: int, data: memoryview, publish: bool = False) -> None:
        try:
            if self.bulk < 0:
                self.bulk = self.open_bulk()
                # A child of the callable's has the bulk too, and could change it before the parent reads.
                if self.publishes and _libc_waitpid(-1, None, os.WNOHANG) < 0:
                    self.counter = _counter_if_still_ours(self.shared.counter)
            written = 0
            while written < data.nbytes:
                count = os.pwrite(self.bulk, data[written : written + _PIECE], offset + written)
                written += count
                if publish and self.counter >= 0:
                    self.tell(count)
        except Exception:
            self.failed = True
            raise

    def tell(self, count: int) -> None:
        try:
            _write(self.counter, _WORD.pack(count))
        except OSError:  # something else has its number: then the parent reads when the child is gone
            self.counter = -1

    def open_bulk(self) -> int:
        """The bulk's descriptor: the parent's, opened anew, for the callable may have closed or reused the child's."""
        number = self.shared.bulk[0]
        # In the /proc of another pid namespace the parent's number would be somebody else's.
        with contextlib.suppress(Exception):  # of an `open` that the callable or a test replaced, too
            if os.readlink("/proc/self") == str(_getpid()):
                with open(f"/proc/{self.shared.parent}/fd/{number}", "r+b", buffering=0) as file:
                    number = fcntl.fcntl(file.fileno(), _F_DUPFD_CLOEXEC, 3)  # not as stdout
        found, identity = os.fstat(number), self.shared.identity
        ours = os.path.samestat(found, identity) if identity else found.st_nlink == 0  # it has no name
        if not ours or (number == self.shared.bulk[0] and found.st_size):  # one not opened anew must be empty still
            raise OSError(errno.EBADF, "the callable closed the descriptor for large results")
        return number

    def keep_out_of_band(self, buffer: pickle.PickleBuffer) -> bool:
        """Set a large buffer aside, to be written as it is behind what is pickled; a small one is pickled instead."""
        view = buffer.raw()
        small = view.nbytes < _OUT_OF_BAND
        if not small:
            self.buffers.append(view)
        return small

    def deliver(self, kind: int) -> None:
        """End the stream with a table of the buffers' lengths, write them behind it, and fill in all of the header."""
        count, header = len(self.buffers), self.shared.header  # where the callable can have written
        if count:
            lengths = [view.nbytes for view in self.buffers]
            self.write(struct.pack(f"={count}Q", *lengths))
            for offset, view in zip(_offsets(max(self.position - _REGION_SIZE, 0), lengths), self.buffers):
                self.write_bulk(offset, view)
        header[_KIND], header[_BUFFERS], header[_START] = kind, count, self.start
        header[_LENGTH] = self.position - self.start
        header[_PROGRESS] = _DELIVERED


def _counter_if_still_ours(descriptors: list[int]) -> int:
    """The eventfd to write to, or -1 where the callable closed it, another file has its number, or it is a socket."""
    another: list[int] = []
    with contextlib.suppress(OSError):
        found = os.fstat(descriptors[-1])
        _make_counter(another, _EFD_CLOEXEC)  # closed when the child ends, which is soon
        # All eventfds share one inode (with epolls, which cannot be written); a socket cannot be told from others.
        return descriptors[-1] if os.path.samestat(found, os.fstat(another[0])) else -1
    return -1


class _ItemSender:
    """A generator's child writes its items through the start of the bulk, which is a ring: a pipe that holds much.

    Each item is a header, its pickle with a table of its buffers' lengths at the end, and those buffers. The counters
    run on: of what is in the ring, the next byte to write is at ``sent % _RING``.
    """

    def __init__(self, writer: _Writer) -> None:
        shared = writer.shared
        self.writer, self.bulk, self.counter, self.room = writer, shared.bulk[0], shared.counter[-1], shared.room[0]
        self.sent = self.taken = 0  # bytes
        self.streams = _streams()[:2]

    def send(self, item: Any) -> None:
        if _getpid() != self.pid:  # no fork hook tells: C code may fork too
            _libc_exit(0)  # a process that the body forked came back out of it
        _flush_python(self.streams)  # the reader may leave at this item, and the child is killed then
        buffers = self.writer.buffers = []
        try:
            stream = pickle.dumps(item, 5, buffer_callback=self.writer.keep_out_of_band)
        except MemoryError:  # which memory_limit may have caused, as anywhere in the body
            raise
        except Exception as error:
            _raise_if_from_handler(error)
            raise _UnpicklableItem(type(item).__qualname__) from error
        if buffers:
            stream += struct.pack(f"={len(buffers)}Q", *[view.nbytes for view in buffers])
        header = _ITEM.pack(len(stream), len(buffers))
        parts: list[Any] = [header + stream] if len(stream) < _OUT_OF_BAND else [header, stream]
        try:
            for part in (*parts, *buffers):
                self.write(part)
        except OSError as error:
            self.writer.failed = not _is_from_handler(error)
            raise
        self.writer.buffers = []

    def write(self, data: Any) -> None:
        """Write bytes as there comes to be room, and publish them."""
        while True:
            place = self.sent % _RING
            room = min(_RING - self.sent + self.taken, _RING - place, _PIECE)
            if room == 0:
                self.taken += _read_told(self.room)  # waits
                continue
            written = os.pwrite(self.bulk, data if len(data) <= room else memoryview(data)[:room], place)
            self.sent += written  # first, for a handler may raise: the outcome is to come behind all that is published
            _write(self.counter, _WORD.pack(written))
            if written == len(data):
                return
            data = memoryview(data)[written:]

    def send_all(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Run a generator function of either kind to its end in the child; return what it returns."""
        writer = self.writer
        self.pid = _getpid()
        try:
            items = function(*args, **kwargs)
            if isinstance(items, types.AsyncGeneratorType):
                return _run_coroutine(self.send_async, items)
            while True:
                try:
                    item = next(items)
                except StopIteration as stop:
                    return stop.value
                self.send(item)
                del item  # or it would be there while the next is made
        finally:
            # What comes now goes behind the items, for the parent may not have taken the last.
            writer.start = writer.position = _REGION_SIZE + min(self.sent, _RING)
            writer.bulk = self.bulk

    async def send_async(self, items: AsyncIterator[Any]) -> None:
        async for item in items:
            self.send(item)
            del item


class _UnpicklableItem(Exception):
    """What stopped a generator in the child: its argument is the type of the item."""


class _Reader(io.RawIOBase):
    """The parent's end of the stream; ``more`` waits until it goes on behind a position, and says up to where."""

    def __init__(self, shared: _Shared, position: int, more: Callable[[float], int]) -> None:
        self.shared, self.position, self.more = shared, position, more
        self.loaded: memoryview | None = None  # the rest of the stream, where the bulk is needed for something else

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self.loaded is not None:
            count = min(len(buffer), len(self.loaded))
            buffer[:count], self.loaded = self.loaded[:count], self.loaded[count:]
            return count
        count = max(min(len(buffer), self.more(self.position) - self.position), 0)
        _read_stream(self.shared, self.position, memoryview(buffer)[:count])
        self.position += count
        # But not the last _READ_AHEAD bytes: the table may be among them, and take_buffers reads that again.
        self.shared.free(self.position - _REGION_SIZE - _READ_AHEAD)
        return count

    def unpickler(self, buffers: Iterable[Any]) -> pickle.Unpickler:
        return _Unpickler(io.BufferedReader(self, _READ_AHEAD), buffers=buffers)

    def load(self, end: int) -> None:
        """Read the rest of the stream at once."""
        rest = memoryview(bytearray(max(end - self.position, 0)))
        self.loaded = _read_stream(self.shared, self.position, rest)

    def take_buffers(self) -> Iterator[Any]:
        """Wait for all buffers; each is in memory of its own that nobody else can change, and the largest is mapped."""
        shared, end = self.shared, self.more(inf)
        count = shared.header[_BUFFERS]
        lengths = _read_stream(shared, end - 8 * count, memoryview(bytearray(8 * count))).cast("Q").tolist()
        largest = max(lengths, default=0)
        shared.received += sum(lengths)
        mapped = lengths.index(largest) if largest >= _MAPPED else -1
        memory: list[Any] = []
        for offset, length in zip(_offsets(max(end - _REGION_SIZE, 0), lengths), lengths):
            to_map = len(memory) == mapped
            memory.append(offset if to_map else _read_stream(shared, _REGION_SIZE + offset, _new_memory(length)))
        if mapped >= 0:
            self.load(end)  # which mapping cuts away
            memory[mapped] = _map(shared, memory[mapped], largest)
        yield from memory


def _new_memory(length: int) -> memoryview:
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)
    if length >= _PIECE:
        with _tolerating(OSError, AttributeError):  # Linux has it, and may not have been built with it
            memory.madvise(mmap.MADV_HUGEPAGE)  # to fill it takes a third of the time
    return memoryview(memory)


def _read_stream(shared: _Shared, position: int, view: memoryview) -> memoryview:
    """Fill a view from the region and the bulk, whole; return it."""
    length = len(view)
    done = max(min(_REGION_SIZE - position, length), 0)
    view[:done] = shared.region[position : position + done]
    while done < length:
        piece = view[done : done + (1 << 30)]  # some systems refuse to read 2 GiB at once
        count = _read_at(shared.bulk[0], piece, position + done - _REGION_SIZE)
        if count == 0:
            raise EOFError("the result was cut short")
        done += count
    return view


def _read_at(bulk: int, memory: Any, offset: int) -> int:
    """Fill memory, or a part of it, from a place in a file; return how much."""
    if hasattr(os, "preadv"):
        return os.preadv(bulk, [memory], offset)
    data = os.pread(bulk, len(memory), offset)  # macOS 10
    memory[: len(data)] = data
    return len(data)


def _seal(shared: _Shared) -> bool:
    """Forbid all change of the bulk, which a process that the callable left may hold; return whether that worked."""
    # It does not while the bulk is mapped; and nothing of what is sealed can be given back.
    return bool(_libc_no_errno.fcntl(shared.bulk[0], _F_ADD_SEALS, _F_SEAL_EVERYTHING) == 0)


def _map(shared: _Shared, offset: int, length: int) -> memoryview:
    """A piece of the bulk, mapped privately where the rest of it can be cut away and it can be sealed."""
    bulk = shared.bulk[0]
    _punch(bulk, 0, offset)
    _punch(bulk, offset + length, os.fstat(bulk).st_size)  # the rest of its last page is padding
    if _libc_fallocate is None or not _seal(shared):
        return _read_stream(shared, _REGION_SIZE + offset, _new_memory(length))
    if os.fstat(bulk).st_size < offset + length:
        raise EOFError("the result was cut short")
    # An mmap object of Python's would hold a duplicate of the descriptor as long as the result lives. So it makes an
    # anonymous mapping, which has none, and libc maps the file in its place.
    memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if _libc_mmap(address, length, _READ_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED, bulk, offset) != address:
        raise _os_error("the result could not be mapped")
    return memoryview(memory)


# ---------------------------------------------------------------------------------------------- Exceptions on their way

_SLOT_TYPES = (types.MemberDescriptorType, types.GetSetDescriptorType)


class _ExceptionPickler(pickle.Pickler):
    """Pickles exceptions to be rebuilt without ``__init__``, which may want other arguments than ``args``."""

    def persistent_id(self, obj: Any) -> Any:
        """Functions of this file go by name alone: ``sys.modules`` may have another copy in its place, or none."""
        name: Any = obj.__name__ if type(obj) is FunctionType else None
        return name if name and globals().get(name) is obj else None

    def reducer_override(self, obj: Any) -> Any:
        cls = type(obj)
        if isinstance(obj, type) and issubclass(obj, BaseException) and not _is_found_by_name(obj):
            return _class_of_this_process, (id(obj), obj.__module__, obj.__qualname__)
        if not isinstance(obj, BaseException) or cls in copyreg.dispatch_table:
            return NotImplemented
        reduces_itself = cls.__reduce__ is not _builtin_base(cls).__reduce__
        if reduces_itself or cls.__reduce_ex__ is not vars(object)["__reduce_ex__"]:
            return NotImplemented  # the class knows better
        reduced = obj.__reduce__()
        if _builtin_base(cls).__name__ == "BaseExceptionGroup":  # made of these, whatever the args of a subclass are
            reduced = cls, (obj.message, obj.exceptions), *reduced[2:]  # type: ignore[attr-defined]
        if _sets_its_own_state(cls):
            return (_new_exception, (cls, reduced[1]), *reduced[2:])
        if isinstance(obj, OSError) and obj.errno is None and not (obj.args and obj.args[0] is None):
            reduced = cls, ()  # its __init__, unlike that of OSError, has taken no errno out of its arguments
        return _new_exception, (cls, reduced[1]), _exception_state(obj), None, None, _set_exception_state


class _Unpickler(pickle.Unpickler):
    def persistent_load(self, name: str) -> Any:
        return globals()[name]


def _is_found_by_name(cls: type) -> bool:
    with contextlib.suppress(Exception):  # of a module's own __getattr__ too
        return operator.attrgetter(cls.__qualname__)(sys.modules[cls.__module__]) is cls
    return False


def _class_of_this_process(address: int, module: str, name: str) -> type:
    """Find a class of exceptions by its address, which is the child's too where it was there at the fork."""
    seen: set[type] = set()
    waiting: list[type] = [BaseException]
    for cls in waiting:
        if id(cls) == address and (cls.__module__, cls.__qualname__) == (module, name):
            return cls
        if cls not in seen:
            seen.add(cls)
            waiting += cls.__subclasses__()
    raise pickle.UnpicklingError(f"its class {module}.{name} cannot be found: it was made in the child")


def _builtin_base(cls: Any) -> Any:
    while cls.__flags__ & 1 << 9:  # Py_TPFLAGS_HEAPTYPE: made at run time
        cls = cls.__base__  # not the MRO, which may begin with a class that has another layout in C
    return cls


def _sets_its_own_state(cls: type[BaseException]) -> bool:
    return cls.__setstate__ is not _builtin_base(cls).__setstate__


def _new_exception(cls: type, arguments: tuple[Any, ...]) -> BaseException:
    base = _builtin_base(cls)
    error: BaseException = base.__new__(cls, *arguments)
    if type(error) is not cls:  # OSError chooses a class by errno
        error = base.__new__(cls)
    with _tolerating(Exception):  # of args that are not what it was made of
        base.__init__(error, *arguments)  # fills in what the class keeps in C, such as OSError.errno
    return error


def _exception_state(error: BaseException) -> dict[str, Any]:
    """All attributes, those in slots and in C included; but not AttributeError.obj, which can be anything."""
    if _sets_its_own_state(type(error)):
        return {}
    left_out = vars(AttributeError).get("obj")  # from 3.10 on
    slots = [item for cls in type(error).__mro__ for item in vars(cls).items() if isinstance(item[1], _SLOT_TYPES)]
    names = [name for name, kind in slots if name[:2] != "__" and kind is not left_out and hasattr(error, name)]
    return {**{name: getattr(error, name) for name in names}, "__dict__": vars(error), "args": error.args}


def _set_exception_state(error: BaseException, state: dict[str, Any]) -> None:
    for name, value in state.items():
        if value is None and getattr(error, name, error) is None:
            continue  # OSError shows a None that was set, and does not show one that was not
        with _tolerating(AttributeError, TypeError):  # some cannot be set: ExceptionGroup.message
            object.__setattr__(error, name, value)  # the class's own may refuse, as a frozen dataclass does


def _name(function: Callable[..., Any]) -> str:
    name = None
    with _tolerating(Exception):  # of a __getattr__ that expects no such question
        name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else f"a {type(function).__qualname__} object"


def _say(error: BaseException) -> str:
    with _tolerating(Exception):  # of a SyntaxError that was made of anything
        return "".join(traceback.format_exception_only(type(error), error)).strip()  # also where str(error) raises
    return type(error).__qualname__


# ------------------------------------------------------------------------------- Other threads, and what a child renews
# A child has one thread. What the others were doing at the fork is put right in two steps: the interpreter by its own
# repair, in C (see _fork), before the child runs any bytecode; the standard library's locks by _renew, after.

_LOCK_TYPES = (type(threading.Lock()), type(threading.RLock()))  # at the import; gevent replaces them
_bootstrap: Any = sys.modules["_frozen_importlib"]
# Locks of the standard library's own modules that another thread may hold at any moment.
_STANDARD_LOCKS = (
    ("_strptime", "_cache_lock", "Lock"),
    ("asyncio.events", "_lock", "Lock"),
    ("asyncio.mixins", "_global_lock", "Lock"),
    ("concurrent.futures.thread", "_global_shutdown_lock", "Lock"),
    ("sysconfig", "_CONFIG_VARS_LOCK", "RLock"),
    ("tempfile", "_once_lock", "Lock"),
)
_FREE_THREADED = "t" in sys.abiflags
#: Private parts of CPython that calls beside other threads lean on, and that this version does not have.
_missing_parts: list[str] = []


# Our own, since types declared on ctypes.pythonapi hold for everybody; of its type, since tests put in a lesser one.
_python = type(pythonapi)(None)


def _python_function(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(_python, name, None)
    if function is None:
        _missing_parts.append(name)
        return lambda *_: None
    function.restype, function.argtypes = restype, argtypes or None
    return function


_PRIVATE_PARTS = "_imp.acquire_lock _frozen_importlib._module_locks _frozen_importlib._blocking_on"
_PRIVATE_PARTS += " threading._after_fork logging._handlerList"
for _owner, _part in [part.split(".") for part in _PRIVATE_PARTS.split()]:
    if not hasattr(sys.modules[_owner], _part):
        _missing_parts.append(f"{_owner}.{_part}")
# Declared with no types: converting an object costs page faults, and a result of 1 would end the steps in _fork.
_has_attribute = _python_function("PyObject_HasAttr", None)
_repair_interpreter = _python_function("PyOS_AfterFork_Child", None)
_handle_signals = _python_function("PyErr_CheckSignals", ctypes.c_int)
_increment_reference = _python_function("Py_IncRef", None, ctypes.c_void_p)
_newest_interpreter = _python_function("PyInterpreterState_Head", ctypes.c_void_p)
_newest_thread = _python_function("PyInterpreterState_ThreadHead", ctypes.c_void_p, ctypes.c_void_p)
_next_thread = _python_function("PyThreadState_Next", ctypes.c_void_p, ctypes.c_void_p)
_MAIN_INTERPRETER = _python_function("PyInterpreterState_Main", ctypes.c_void_p)()


def _other_threads() -> bool:
    """Whether the interpreter knows another thread: also one that C code made, which ``threading`` misses.

    The threads are walked in one step of C. Between two bytecodes the GIL may go to the newest thread, which ends and
    is freed: the walk would go on in freed memory, and may find nobody.
    """
    if _missing_parts:
        return threading.active_count() > 1
    return any(_walk_to_another_thread())


def _walk_to_another_thread() -> Iterator[Any]:
    return map(_next_thread, map(_newest_thread, (_MAIN_INTERPRETER,)))


def _find_child_hooks() -> list[Any]:
    """Find the interpreter's own list of hooks from ``os.register_at_fork(after_in_child=...)``.

    The repair runs these hooks too, unless the list is empty.
    """

    def mark() -> None:
        pass

    def holders() -> list[list[Any]]:
        return [holder for holder in gc.get_referrers(mark) if type(holder) is list]

    os.register_at_fork(after_in_child=mark)
    found = holders()
    if not found and gc.get_freeze_count():  # get_referrers does not look among frozen objects
        gc.unfreeze()
        found = holders()
        gc.freeze()
    if not found:
        _missing_parts.append("the list of at-fork hooks")
        return []
    found[0].remove(mark)
    return found[0]


def _find_what_threads_own() -> list[int]:
    """Find where in a thread state of C the pointers to its ``threading.local`` values and to its context are."""
    state = _python_function("PyThreadState_Get", ctypes.c_void_p)()

    def offset_of(address: int | None) -> int:
        words = (ctypes.c_void_p * 120).from_address(state)
        return list(words).index(address) * ctypes.sizeof(ctypes.c_void_p)

    try:
        if sys.version_info < (3, 13):
            owner = _python_function("PyThreadState_GetDict", ctypes.c_void_p)()
        else:  # an object whose end tells each threading.local of the end of the thread
            probe = threading.local()
            probe.value = None
            owner = next(id(ref()) for found in gc.get_referents(probe) if type(found) is set for ref in found)
        context = contextvars.Context()
        return [offset_of(owner), context.run(offset_of, id(context))]
    except (ValueError, StopIteration, TypeError):
        _missing_parts.append("what a thread state owns")
        return []


_child_hooks = _find_child_hooks()
_OWNED = _find_what_threads_own()


def _keep_what_threads_own() -> Iterator[Any]:
    """A step for the child: take a reference to what each thread owns, and never give it back.

    The repair deletes the states of the other threads. What only they kept alive would be finalised: files deleted
    under the parent, connections closed. No bytecode may run before the repair, so iterators of C do it: they walk
    the states, whose next function takes no notice of its second argument, and copy a pointer out of each. (To read it
    by ``from_address`` would call audit hooks, which are bytecode; from 3.14 on, any call through ctypes does.)
    """

    def owned(offset: int) -> Iterator[Any]:
        states = accumulate(chain(map(_newest_thread, (_MAIN_INTERPRETER,)), repeat(0)), _next_thread)
        addresses = map(operator.add, takewhile(bool, states), repeat(offset))
        word = ctypes.c_void_p()
        copied = map(_libc_memcpy, repeat(ctypes.byref(word)), addresses, repeat(ctypes.sizeof(word)))
        return map(operator.attrgetter("value"), map(operator.itemgetter(1), zip(copied, repeat(word))))

    return map(_increment_reference, chain(*map(owned, _OWNED)))


def _streams() -> tuple[Any, ...]:
    """Return stdout and stderr, and the original ones, for they may have been replaced."""
    return getattr(sys, "stdout", None), getattr(sys, "stderr", None), sys.__stdout__, sys.__stderr__


def _flush_python(streams: Iterable[Any]) -> bool:
    """Flush Python streams, all of them; return False if one is closed or broken."""
    flushed = True
    for stream in streams:
        try:
            if stream is not None:
                stream.flush()
        except Exception as error:
            _raise_if_from_handler(error)
            flushed = False
    return flushed


def _flush(*streams: Any) -> bool:
    """Flush them, and C's stdout and stderr."""
    flushed = _flush_python(streams)
    for pointer in _C_STREAMS:  # not fflush(NULL): that waits for a thread that is reading from stdin
        if _libc_fpending is None or _libc_fpending(pointer):
            _libc.fflush(pointer)
    return flushed


def _renew_streams() -> None:
    """Empty the buffers of stdout, stderr and the streams of logging, and free their locks.

    What the parent could not write yet is the parent's to write; and another thread may have been printing.
    """
    for found in (*_streams(), *_handlers()):
        with contextlib.suppress(Exception):  # it is closed or detached, or its attributes are computed
            stream: Any = getattr(found, "stream", found)
            buffer, kinds = stream.buffer, (io.BufferedWriter, io.BufferedRandom)
            # The types themselves: a proxy can say that it is an instance of anything.
            kind: Any = next((kind for kind in kinds if issubclass(type(buffer), kind)), None)
            if kind and issubclass(type(stream), io.TextIOWrapper):
                raw = buffer.raw
                kind.__init__(buffer, io.BytesIO())  # a new lock, an empty buffer: what the stream holds is lost there
                io.TextIOWrapper.flush(stream)
                kind.__init__(buffer, raw)
    if _libc_fpurge is not None:
        for pointer in _C_STREAMS:
            _libc_fpurge(pointer)


def _handlers() -> list[Any]:
    """Return the handlers of logging, with None for one that has just gone."""
    return [reference() for reference in list(getattr(logging, "_handlerList", ()))]


def _renew_logging() -> None:
    """Make the locks of logging and its handlers anew: another thread may have held one.

    The parent takes none of them before the fork: CPython once did, deadlocked, and stopped doing so (bpo-36533).
    """
    logging._lock = threading.RLock()  # type: ignore[attr-defined]
    for handler in _handlers():
        if isinstance(getattr(handler, "lock", None), (*_LOCK_TYPES, type(threading.Lock()), type(threading.RLock()))):
            logging.Handler.createLock(handler)
        with contextlib.suppress(Exception):
            queue = handler.queue  # a QueueHandler's; what waits there is the parent's to handle
            if issubclass(type(queue), sys.modules["queue"].Queue):
                sys.modules["queue"].Queue.__init__(queue, queue.maxsize)


def _renew(hooks: list[Any]) -> None:
    """Free the child from what the threads that it does not have were doing at the fork."""
    _child_hooks[:] = hooks  # for later forks
    for name, reference in list(_bootstrap._module_locks.items()):  # imported anew: it was half imported
        if getattr(reference(), "owner", None) not in (None, threading.get_ident()):
            sys.modules.pop(name, None)
    _bootstrap._module_locks.clear()
    _bootstrap._blocking_on.clear()
    threading._after_fork()  # type: ignore[attr-defined]  # only this thread is left, and it is the main thread
    for module_name, name, kind in _STANDARD_LOCKS:
        module = sys.modules.get(module_name)
        if hasattr(module, name):
            setattr(module, name, getattr(threading, kind)())
    _renew_logging()


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
    if asyncio.run.__module__ != "asyncio.runners":  # nest_asyncio's uses the loop that is set
        asyncio.set_event_loop(asyncio.new_event_loop())


def _leave_hubs() -> None:
    """Let the callable wait under gevent or eventlet without running the parent's other greenlets."""
    local: Any = sys.modules.get("gevent._hub_local")
    hub = local.get_hub_if_exists() if hasattr(local, "set_hub") else None
    if hub is not None:
        loop = hub.loop
        local.set_hub(None)
        local.set_loop(None)
        if loop.default:  # all default loops are one struct of C, timers included; only they can watch subprocesses
            for _ in range(getattr(loop, "activecnt", 0)):  # the next one would count these too, and never be idle
                loop.unref()
            loop.destroy()
        hub.loop = type(loop)(default=False)  # never runs: where a lock or queue wakes the parent's greenlets
        hub.switch = _refuse_hub
    local = getattr(sys.modules.get("eventlet.hubs"), "_threadlocal", None)
    if hasattr(local, "hub"):
        del local.hub


def _refuse_hub(*_: Any) -> None:
    raise RuntimeError("this lock, queue or socket of gevent's belongs to the parent's hub; make one in the callable")


# --------------------------------------------------------------------------------------------------------- The child
# Each object that the child touches costs it a page fault, since the reference count in it is written to, and so does
# each cache that the parent did not fill: hence the local names, and what the parent prepares for the child.

# From 3.13 on an exception of a property, though it goes nowhere, is told to sys.unraisablehook, which would print it.
_REPORTS_PROPERTIES = sys.version_info >= (3, 13)
_say_nothing = id  # any function of C that takes one argument


class _Child:
    """What the child does between the fork and its exit. Signals are blocked except while the callable runs.

    ``run`` and ``deliver`` are properties because C runs them, by asking whether the attribute is there: an exception
    goes nowhere then. No signal handler can carry the child out into the caller's code.
    """

    failure: BaseException | None = None

    def __init__(self, writer: _Writer, mask: Any, blocked: Any, setup: Any, teardown: Any, *call: Any) -> None:
        """``call``: function, args, kwargs."""
        self.writer, shared = writer, writer.shared
        dump = pickle.Pickler(writer, 5, buffer_callback=writer.keep_out_of_band).dump
        hook = sys.unraisablehook if _REPORTS_PROPERTIES else None
        self.plan: Any = (shared.header, shared.parent, mask, blocked, setup, teardown, *call, writer, dump, hook)

    @property
    def run(self) -> None:
        header, parent, mask, blocked, setup, teardown, function, args, kwargs, writer, dump, unraisablehook = self.plan
        try:
            pid = _getpid()
            if _libc_prctl is not None:
                _libc_prctl(_PR_SET_PDEATHSIG, 9)  # SIGKILL
                if _getppid() not in (parent, 0):  # it died before that; 0 stands for one in another namespace
                    _libc_exit(1)
            _set_wakeup_fd(-1)  # the parent's event loop listens there
            try:
                for step in setup:
                    step()
            except BaseException as error:
                _deliver_failure(writer, "the child could not be set up", error, kind=_SETUP_FAILED)
                _libc_exit(1)
            streams, recursion_limit = _streams(), _getrecursionlimit()
            value = failure = None
            if unraisablehook is not None:
                sys.unraisablehook = unraisablehook
            header[_PROGRESS] = _RUNNING
            try:
                _libc_sigmask(_SIG_SETMASK, mask, None)
                value = function(*args, **kwargs)
                _libc_sigmask(_SIG_BLOCK, blocked, None)
            except BaseException as error:
                self.failure = failure = error
                _libc_sigmask(_SIG_BLOCK, blocked, None)
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
            if teardown is not None:
                teardown()
            _deliver_outcome(writer, dump, value, failure)
            if _streams() != streams:
                _flush(*_streams())
            _flush(*streams)
            _libc_exit(0)
        except BaseException as error:  # signal handlers raised one after the other
            self.failure = error
            sys.unraisablehook = _say_nothing

    @property
    def run_guarded(self) -> None:
        try:
            self.run
        except BaseException as error:
            self.failure = error

    @property
    def deliver(self) -> None:
        """Deliver the last exception where signal handlers cut ``run`` short."""
        header, parent, *_ = self.plan
        if self.failure is not None and _getppid() in (parent, 0) and header[_PROGRESS] in (_RUNNING, _RETURNED):
            _deliver_outcome(self.writer, None, None, self.failure)


def _deliver_outcome(writer: _Writer, dump: Any, value: Any, failure: BaseException | None) -> None:
    """Pickle the value, or the failure where there is one, and call the outcome delivered."""
    if failure is None:
        try:
            if type(value) is str and len(value) > _OUT_OF_BAND:
                _dump_text(writer.write, value)
            else:
                dump(value)
            writer.deliver(_RESULT)
        except BaseException as error:
            what = f"its result, of type {type(value).__qualname__}, cannot be pickled (return plain data instead)"
            _deliver_failure(writer, what, error)
        return
    if writer.failed:  # an item could not be written
        return _deliver_failure(writer, "", failure)
    if isinstance(failure, _UnpicklableItem):
        what = f"an item, of type {failure.args[0]}, cannot be pickled (yield plain data instead)"
        return _deliver_failure(writer, what, failure.__cause__ or failure)
    try:
        BaseException.with_traceback(failure, _below_the_call(failure.__traceback__))
        text = "".join(traceback.format_exception(type(failure), failure, failure.__traceback__))
    except Exception:  # of a chain that is too long, of a SyntaxError that was made of anything
        text = _say(failure)
        with contextlib.suppress(Exception):
            text = "".join(["Traceback (most recent call last):\n", *traceback.format_tb(failure.__traceback__), text])
    try:  # without its state where that holds what the class itself knows not to pickle
        _deliver_exception(writer, _RAISED, text, (failure, _exception_state(failure)), (failure, {}))
    except BaseException as error:
        _deliver_failure(writer, f"it raised {type(failure).__qualname__}, which cannot be pickled", error, text)


def _below_the_call(frames: types.TracebackType | None) -> types.TracebackType | None:
    """Leave out the frames of this file that called the callable."""
    run: Any = vars(_Child)["run"]
    callers = run.fget.__code__, _ItemSender.send_all.__code__, _ItemSender.send_async.__code__, _run_coroutine.__code__
    kept: Any = []
    while frames is not None:
        if frames.tb_frame.f_code not in callers:
            kept.append(frames)
        frames = frames.tb_next
    for entry, following in zip(kept, kept[1:]):
        if entry.tb_next is not following:  # setting it walks all that follow, to find loops
            entry.tb_next = following
    return kept[0] if kept else None


def _dump_text(write: Callable[[bytes], None], text: str) -> None:
    """Pickle a large str slice by slice: the pickler would hold a copy of all of it."""

    def slices() -> Iterator[bytes]:
        return (text[i : i + (1 << 20)].encode("utf-8", "surrogatepass") for i in range(0, len(text), 1 << 20))

    write(b"\x80\x05\x8d" + struct.pack("<Q", sum(map(len, slices()))))  # PROTO 5, BINUNICODE8
    for piece in slices():
        write(piece)
    write(pickle.STOP)


def _deliver_exception(writer: _Writer, kind: int, text: str, *exceptions: tuple[Any, Any]) -> None:
    """Deliver a text, then the first of these exceptions, each with its state, that can be pickled.

    So the text arrives whatever becomes of the exception.
    """
    for exception in exceptions:
        # After a stream whose pickling failed: the parent may be reading that, so it stays as it is.
        writer.start, writer.buffers, writer.publishes = writer.position, [], False
        pickler = _ExceptionPickler(writer, 5, buffer_callback=writer.keep_out_of_band)
        try:
            pickler.dump(text)
            pickler.dump(exception)
            return writer.deliver(kind)
        except BaseException:
            if exception is exceptions[-1]:
                raise


def _deliver_failure(writer: _Writer, what: str, error: Any, text: str = "", kind: int = _UNPICKLABLE) -> None:
    """Deliver what went wrong in the child itself, with its cause if that can be pickled."""
    message = f"{what}: {_say(error)}" + (text and f"\n{text}")
    with contextlib.suppress(BaseException):
        if not writer.failed:
            return _deliver_exception(writer, kind, message, (error, {}), (None, {}))
    # Where the bulk cannot be written: in the place that was kept free for this.
    message = f"its outcome could not be written: {_say(error)}"[:500] + (text and f"\n{text[-500:]}")
    said, cause = pickle.dumps(message), pickle.dumps((None, {}))
    with contextlib.suppress(BaseException):
        pickled = pickle.dumps((error, {}))
        cause = pickled if len(said + pickled) <= _LAST_WORDS_SIZE else cause
    header, words = writer.shared.header, said + cause
    writer.region[_REGION_SIZE : _REGION_SIZE + len(words)] = words
    header[_KIND], header[_LENGTH] = _UNWRITTEN, len(words)
    header[_PROGRESS] = _DELIVERED


# ---------------------------------------------------------------------------------------- A crash or a hang tells where
# The standard library's faulthandler writes the child's stack into the bulk, at the descriptor's position. It is
# enabled in the parent, just around the fork: a child that inherits it saves dozens of page faults. Where somebody
# handles one of its signals already (a JVM lives by that), it is enabled in the child instead, and not for those.

_SignalAction = ctypes.c_char * 256  # struct sigaction has 152 bytes in glibc and musl; the handler comes first
_FAULT_NUMBERS = tuple(map(int, _FAULTS))
_action_memory = bytearray(256 * len(_FAULTS))
# What libc knows of them, read anew for each call, and the addresses of the handlers in there.
_fault_actions = [_SignalAction.from_buffer(_action_memory, 256 * index) for index in range(len(_FAULTS))]
_fault_handlers = memoryview(_action_memory).cast("P")[:: 256 // struct.calcsize("P")]
_FRAME = re.compile(r'  File "(.*)", line (\d+) in (.*)\n')
_STACK = re.compile(r"^((?:Current thread|Thread) .*)\n((?:  File .*\n)*)", re.MULTILINE)
_MAIN_THREAD, _get_ident = threading.main_thread().ident or 0, threading.get_ident
_SS_DISABLE = 2  # the flag of a stack_t that says there is none
_WITHOUT_C_STACK = (False,) if sys.version_info >= (3, 14) else ()  # since to show that allocates memory


def _let_report(process: _Process, bulk: int, mask: Any, with_timeout: bool) -> None:
    """Add steps to the fork, so that the child can say where it crashed or hung; nobody's handlers are touched."""
    try:
        if faulthandler is None or resource.getrlimit(resource.RLIMIT_FSIZE)[0] != resource.RLIM_INFINITY:
            return  # beyond that limit the child would die of SIGXFSZ instead
        os.lseek(bulk, _REPORT_AT, os.SEEK_SET)
    except OSError as error:  # the file system knows no files as large as that
        _raise_if_from_handler(error)
        return
    enable = _step(faulthandler.enable, bulk, True, *_WITHOUT_C_STACK)
    any(map(_libc_sigaction, _FAULT_NUMBERS, repeat(None), _fault_actions))
    if faulthandler.is_enabled() or any(_fault_handlers):
        process.in_child.append(enable)
        process.kept = gc.get_referents(faulthandler)  # up to 3.13, a file that the child must not finalise
        for number, action, handler in zip(_FAULT_NUMBERS, _fault_actions, _fault_handlers):
            if handler:
                process.in_child.append(_step(_libc_sigaction, number, _SignalAction.from_buffer_copy(action), None))
    else:
        process.before.append(enable)
        process.after.append(_step(faulthandler.disable))
    if with_timeout:
        _let_report_timeouts(process, bulk, mask)
    if _libc_sigaltstack is not None and _get_ident() != _thread_with_stack:
        # A handler for a stack overflow needs a stack of its own, which faulthandler gives to one thread only.
        theirs = ctypes.create_string_buffer(3 * ctypes.sizeof(ctypes.c_void_p))
        process.before.append(_step(_libc_sigaltstack, _alternative_stack(), theirs))
        process.after.insert(0, _step(_libc_sigaltstack, theirs, None))


def _let_report_timeouts(process: _Process, bulk: int, mask: Any) -> None:
    # macOS and OpenBSD have no real-time signals; those of FreeBSD are beyond what Python before 3.11 takes.
    last = min(getattr(signal, "SIGRTMAX", 0), signal.NSIG - 1)
    for number in range(getattr(signal, "SIGRTMIN", 1), last + 1) or [int(signal.SIGVTALRM)]:
        if not _handler_of(number) and not _libc_no_errno.sigismember(mask, number):
            process.timeout_signal = number
            process.blocked = _SignalSet.from_buffer_copy(_ALL_BUT_FAULTS)
            _libc_no_errno.sigdelset(process.blocked, number)
            process.before.append(_step(faulthandler.register, number, bulk, True, True))
            process.after.append(_step(faulthandler.unregister, number))
            return


def _let_faulthandler_take_its_stack() -> int:
    """Enable faulthandler once, and return the thread whose handlers have its stack from then on.

    It gives one, for good, to the thread that enables it first; but not instead of one that a thread has already.
    """
    any(map(_libc_sigaction, _FAULT_NUMBERS, repeat(None), _fault_actions))
    if faulthandler is None or faulthandler.is_enabled() or any(_fault_handlers) or _libc_sigaltstack is None:
        return _MAIN_THREAD
    before, after = (ctypes.create_string_buffer(struct.calcsize("@PiN")) for _ in range(2))
    _libc_sigaltstack(None, before)
    with _tolerating(OSError), open(os.devnull, "wb") as file:  # a chroot may have none
        faulthandler.enable(file)
        faulthandler.disable()
    _libc_sigaltstack(None, after)
    if after.raw == before.raw:  # before 3.9 the interpreter does it when it starts
        return _MAIN_THREAD
    if struct.unpack("@PiN", before)[1] == _SS_DISABLE:
        return _get_ident()
    _libc_sigaltstack(before, None)
    return 0


@functools.lru_cache(maxsize=None)
def _alternative_stack() -> Any:
    """A stack_t for handlers, made once: address, flags, size."""
    size, flags = 1 << 17, 0
    memory = _libc_mmap(None, size, _READ_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if memory == _MAP_FAILED:
        memory, flags, size = 0, _SS_DISABLE, 0  # an overflow will have no report
    return ctypes.create_string_buffer(struct.pack("@PiN", memory, flags, size))


_thread_with_stack = _let_faulthandler_take_its_stack()


def _handler_of(number: int) -> int:
    """The address of a signal's handler (those of C too, unlike ``signal.getsignal``); 0: the default, 1: ignored."""
    action = _SignalAction()
    _libc_sigaction(int(number), None, action)
    return ctypes.c_void_p.from_buffer(action).value or 0


def _is_of_this_file(frame: traceback.FrameSummary) -> bool:
    own = _THIS_FILE.encode("ascii", "backslashreplace").decode()  # as faulthandler writes it
    # The tour's functions are users of this file as any others.
    return frame.filename in (own, _THIS_FILE) and (frame.lineno or 0) < _tour.__code__.co_firstlineno


def _read_report(bulk: int, place: int, fault: str) -> tuple[str, str]:
    """What the child wrote of its stack: in few words, for a message, and whole. Frames of this file are left out.

    A process that the callable forked may have crashed and written one too: what begins with ``fault`` is the child's.
    """
    size = min(max(os.fstat(bulk).st_size - place, 0), 1 << 24)
    dump = os.pread(bulk, size, place).decode("ascii", "backslashreplace")
    start = dump.rfind(fault) if fault else 0
    if start < 0:
        return "", ""
    blocks = dump[start:].splitlines()[:1] if fault else []
    where: list[traceback.FrameSummary] = []
    for thread, lines in _STACK.findall(dump, start):
        found = [traceback.FrameSummary(file, int(line), name) for file, line, name in _FRAME.findall(lines)]
        # The child's own stack begins at its `run`.
        called = takewhile(lambda frame: frame.name.split(".")[-1] != "run" or not _is_of_this_file(frame), found)
        frames = [frame for frame in called if not _is_of_this_file(frame)]
        if thread.startswith("Current"):
            where = frames
        shown = "".join(traceback.StackSummary.from_list(frames[::-1]).format())
        blocks.append(thread.replace("first", "last") + "\n" + (shown or "  (no Python frame)\n"))
    return _in_few_words(where), "\n".join(blocks)


def _in_few_words(frames: list[traceback.FrameSummary]) -> str:
    """Name the innermost line, and the one in another file that led there."""

    def say(frame: traceback.FrameSummary) -> str:
        parts = frame.filename.split("/")
        short = "/".join(parts[-2:] if parts[-1] == "__init__.py" else parts[-1:])
        return f"{frame.name} ({short}:{frame.lineno})"

    if not frames:
        return ""
    callers = [frame for frame in frames if frame.filename != frames[0].filename]
    return f" in {say(frames[0])}" + (f", called from {say(callers[0])}" if callers else "")


# ----------------------------------------------------------------------------------- The process, as its parent sees it

# Interned strings, so these are the keys of _Child's dict, which keeps them where they are. Before 3.11 a handler may
# raise at the first instruction of an except, where nothing catches it: hence run_guarded.
_RUN = ctypes.c_void_p(id("run" if sys.version_info >= (3, 11) else "run_guarded"))
_DELIVER = ctypes.c_void_p(id("deliver"))
_freeze, _chained = gc.freeze, chain.from_iterable
_NOT_ALONE = -2  # instead of a pid: there was no fork, for another thread had come up


class _Process:
    """A child from fork to reaping."""

    gone = expired = killed = False
    timeout_signal = 0  # what makes the child write its stack and end
    blocked = _ALL_BUT_FAULTS  # the signals that are, in the child, but while the callable runs
    wait_error: BaseException | None = None
    steps: Any = ()  # of the fork: to free them while the child lives would copy the pages that they share
    kept: Any = ()  # what the child's faulthandler must not be the last to let go

    def __init__(self) -> None:
        self.pids: list[int] = []  # the child's, -1 or _NOT_ALONE where there is none; then what last steps returned
        self.opened: list[int] = []  # a file of the child's in /proc
        self.waited: list[Any] = []  # what the steps of signal_and_wait returned, wait4's pid among it
        self.watch: list[int] = []  # a descriptor that becomes readable when the child ends
        self.ending = _Ending()
        # Steps of C around the fork, besides those of every call. Each returns something false, or nothing: the first
        # that is true is taken for the child's pid.
        self.before: list[Iterator[Any]] = []
        self.in_child: list[Iterator[Any]] = []
        self.after: list[Iterator[Any]] = []

    @property
    def pid(self) -> int:
        return self.pids[0] if self.pids else -1

    def reap(self, wait: bool = False) -> bool:
        """Look whether the child is gone, or wait until it is."""
        if self.pid in self.waited and not os.WIFSTOPPED(self.ending[_STATUS]):
            self.gone = True
        wait4, options = (_libc_wait4, 0) if wait else (_libc_wait4_holding_gil, os.WNOHANG)
        while not self.gone:
            pid = wait4(self.pid, ctypes.byref(self.ending), options, ctypes.byref(self.ending, _USAGE_AT))
            if pid > 0 and os.WIFSTOPPED(self.ending[_STATUS]):  # it asked to be traced, and would wait for ever
                self.killed = True
                self.send(signal.SIGKILL)
            elif pid > 0:
                self.gone = True
            elif pid == 0:
                return False
            elif wait:
                self.reap()  # EINTR, or a code that a signal handler has replaced by one of its own: a look tells
            elif ctypes.get_errno() != errno.EINTR:
                self.wait_error = _os_error()  # ECHILD: somebody else reaped it, or SIGCHLD is ignored
                self.gone = True
        return True

    def send(self, number: int, wait: bool = False) -> None:
        """Send a signal, if the child is still there, and perhaps wait for its end; raise where that is forbidden."""
        deliver = self.signal_and_wait if wait else any
        # By pidfd, where there is one: it cannot hit a process that got the pid after somebody reaped ours.
        try:
            if self.watch and _pidfd_send_signal:
                deliver(_step(_pidfd_send_signal, self.watch[0], number))
                return
        except OSError as error:  # a sandbox that does not know it
            _raise_if_from_handler(error)
            if isinstance(error, ProcessLookupError):
                return
        with _tolerating(ProcessLookupError):
            deliver(_step(os.kill, self.pid, number))

    def signal_and_wait(self, signalling: Iterator[Any]) -> None:
        """Do it in one step of C, with signals blocked.

        A killed child takes a moment to go. Handlers that raise all the time would cut each wait for it short.
        """
        mask = _SignalSet()
        _libc_sigmask(_SIG_BLOCK, None, mask)
        block = _step(_libc_sigmask, _SIG_BLOCK, _ALL_BUT_FAULTS, mask)
        wait = _step(_libc_wait4, self.pid, ctypes.byref(self.ending), 0, ctypes.byref(self.ending, _USAGE_AT))
        unblock = _step(_libc_sigmask, _SIG_SETMASK, mask, None)
        try:
            self.waited.extend(chain(block, signalling, wait, unblock))
        finally:
            any(unblock)  # where it could not be sent

    def kill(self) -> None:
        """Kill and reap; give up a child that this process is not permitted to kill."""
        if self.reap():
            return
        self.killed = True
        try:
            self.send(signal.SIGKILL, wait=True)
        except OSError as error:
            _raise_if_from_handler(error)
            self.wait_error, self.gone = error, True
            if not isinstance(error, PermissionError):  # it has become another user's
                raise
        self.reap(wait=True)

    def costs(self) -> dict[str, Any]:
        """What the child used, as the attributes of an error."""
        costs: dict[str, Any] = {"pid": self.pid if self.pid > 0 else None, "peak_memory": None, "cpu_time": None}
        if self.gone and self.wait_error is None and self.pid > 0 and _USAGE_IS_KNOWN:
            user, user_us, system, system_us, peak = struct.unpack_from("5l", self.ending, _USAGE_AT)
            micro = (user_us & 0xFFFFFFFF) + (system_us & 0xFFFFFFFF)  # of macOS, whose upper half is anything
            costs.update(peak_memory=peak * _PEAK_UNIT, cpu_time=user + system + micro / 1e6)
        return costs


def _fork(process: _Process, child: _Child, mask: Any, threads: bool) -> bool:
    """Fork; the child runs ``child`` and exits. Return False if there are other threads, which ``threads`` denies.

    All of it is one step of C: the parent's part ends at the first call that returns something true, which is fork,
    with the pid; in the child fork returns 0, and the list goes on to its own end. So the pid cannot be lost, the
    signal mask is put back, and the child cannot get out into the caller's code.
    The child must not run any bytecode before the repair: it may have inherited a request to hand the GIL to a thread
    that it does not have. Freezing comes first, since any allocation may set off a collection: the parent's garbage
    is never finalised a second time, and the pages of its heap stay shared.
    """
    # A signal that has come, but whose handler has not run, would be handled in the child too. Most are handled before
    # signals are blocked, since a process that a handler starts inherits the mask.
    before = [_step(_handle_signals), _step(_libc_sigmask, _SIG_BLOCK, _ALL_BUT_FAULTS, mask), _step(_handle_signals)]
    in_parent = [True]
    in_child = [_step(in_parent.clear), _step(_freeze)]
    if _REPORTS_PROPERTIES:
        in_child.append(_step(setattr, sys, "unraisablehook", _say_nothing))
    after = [*process.after, _step(_libc_sigmask, _SIG_SETMASK, mask, None)]
    if threads:
        before.append(_step(_imp.acquire_lock))  # the repair makes it anew
        in_child += [_keep_what_threads_own(), _step(_child_hooks.clear), _step(_repair_interpreter)]
        after.insert(0, _step(_imp.release_lock))
    address, end = ctypes.c_void_p(id(child)), _step(_libc_exit, 1)
    life = [_step(_has_attribute, address, _RUN), _step(_libc_sigmask, _SIG_BLOCK, _ALL_BUT_FAULTS, None)]
    life.append(starmap(_has_attribute, repeat((address, _DELIVER), 3)))
    if threads or _missing_parts:
        look_again: Iterator[Any] = iter(())
    else:  # the last handlers may have started a thread; then there is this instead of a pid
        look_again = map(operator.mul, map(bool, _walk_to_another_thread()), repeat(_NOT_ALONE))
    before += [*process.before, look_again, _step(_libc_fork)]
    steps = [*before, *in_child, *process.in_child, *life, end]
    process.steps = steps, after, child
    try:
        process.pids.extend(chain(islice(filter(None, _chained(steps)), 1), _chained(after)))
    finally:
        if not process.pids:  # a step raised: before the fork or, where memory is exhausted, in the child
            if not in_parent:
                any(end)  # without asking for memory
            for undo in after:
                with contextlib.suppress(RuntimeError):  # the import lock is not held yet
                    any(undo)
    if process.pid == _NOT_ALONE:
        return False
    if process.pid < 0:
        cause = _os_error()
        raise ForkError(f"fork failed: {cause}; free processes or memory, or raise their limits") from cause
    return True


def _watch_end(process: _Process) -> None:
    """Get a descriptor that becomes readable when the child ends, where the system has such a thing."""
    try:
        if _pidfd_open:
            _keep(process.watch, _pidfd_open, process.pid, 0)
            if process.watch[0] < 0:
                process.watch.clear()
        elif not _LINUX and hasattr(select, "kqueue"):  # macOS and the BSDs
            kqueue: Any = select
            with contextlib.closing(kqueue.kqueue()) as queue:
                flags = kqueue.KQ_EV_ADD | kqueue.KQ_EV_ONESHOT
                queue.control([kqueue.kevent(process.pid, kqueue.KQ_FILTER_PROC, flags, kqueue.KQ_NOTE_EXIT)], 0)
                _keep(process.watch, os.dup, queue.fileno())
    except OSError as error:  # no descriptor is free, a sandbox forbids it, or the kernel does not know it
        _raise_if_from_handler(error)


def _offer_to_oom_killer(process: _Process) -> None:
    """Have the kernel, if memory runs out, end the child and not this process: 300 is Chromium's figure."""
    if not _LINUX or _handler_of(signal.SIGCHLD) == 1:  # ignored: the pid may be another's by now
        return
    opened = process.opened
    _keep(opened, _libc_no_errno.open, b"/proc/%d/oom_score_adj" % process.pid, os.O_RDWR | os.O_CLOEXEC)
    score = ctypes.create_string_buffer(16)
    # If the child is still there now, it was when the file was opened: the file is its own, whoever else reaps.
    if opened[0] >= 0 and not process.reap() and _libc_no_errno.read(opened[0], score, 15) > 0:
        score.value = b"%d" % min(int(score.value) + 300, 1000)
        _libc_no_errno.write(opened[0], score, len(score.value))
    _drain(opened, _libc_close)  # where a handler raises before that, the end of the call does it


# ---------------------------------------------------------------------------------------------------------- The call

_in_flight: dict[int, _Shared] = {}  # of all calls: a child closes those of others


class _Call:
    """One isolated call: ``start`` it, ``look`` at the child between sleeps, take its ``_outcome``.

    As a context manager it gives back all that it holds, however the call went. A signal handler may raise on the
    way into an exit, so a call is entered five times: in storms of them, three exits were missed once in 3,000 calls.
    """

    ended = False
    report_at = _REPORT_AT
    rebuilt: Any = None  # a result that was read while the child wrote it, in a list of one, or the exception it raised
    most_memory = 0  # that the child may have, in bytes, where there is a limit
    times_looked = 0  # at the child
    hurried = False  # whether a generator's last item came just now

    def __init__(
        self, function: Callable[..., Any], timeout: float | None, memory_limit: int | None, sends: bool = False
    ) -> None:
        _need_frames(16)
        self.function, self.timeout, self.memory_limit = function, timeout, memory_limit
        self.sends = sends  # items, as a generator function of either kind does
        self.shared = _Shared()
        self.process = _Process()
        self.started = self.restart_clock()

    def restart_clock(self) -> float:
        now = _clock()
        self.deadline = inf if self.timeout is None else now + self.timeout
        return now

    def start(self, args: tuple[Any, ...], kwargs: dict[str, Any], through: Callable[..., Any] | None = None) -> None:
        """Fork; the child calls the function, or ``through`` with the function as its first argument."""
        flushed = _flush(*_streams())  # or the child would print again what waits in them
        shared = self.shared
        try:
            _in_flight[id(self)] = shared
            shared.make(self.sends)
            if self.memory_limit is not None:
                self.most_memory = _data_size() + self.memory_limit
        except (OSError, MemoryError) as error:
            _raise_if_from_handler(error)
            raise RegionCreationError(f"no memory or descriptor for the result could be had: {error}") from error
        writer = _Writer(shared, not self.sends)
        if self.sends:
            through = _ItemSender(writer).send_all
        function, args = (through, (self.function, *args)) if through else (self.function, args)
        while not _launch(self, writer, flushed, function, args, kwargs):
            self.process = _Process()  # the steps of the other are used up
        _watch_end(self.process)

    def look(self) -> float | None:
        """Look at the child: return the seconds until the next look, or None when it is gone; at the deadline, kill it.

        Where the end of the child ends the sleep, it is a second: a signal that arrives just before it does not end it,
        and its handler, which may raise, must not wait longer. The first sleep is 10 ms: only a child that outlives
        it is worth the cost of _offer_to_oom_killer.
        """
        process = self.process
        if process.reap():
            return None
        looks, self.times_looked = self.times_looked, self.times_looked + 1
        if looks == 1:
            _offer_to_oom_killer(process)
        left = self.deadline - _clock()
        if left > 0:
            if process.watch:
                longest = 1.0 if looks else 0.01
            else:
                longest = 0.001 * 1.5 ** min(looks, 7)  # at most 17 ms
            return min(longest, left)
        asked, process.expired = process.expired, True
        if asked or not process.timeout_signal:
            process.kill()
            return None
        # It is to say where it is, and to end; it gets 0.1 s more for that.
        self.deadline = _clock() + 0.1
        self.report_at = os.lseek(self.shared.bulk[0], 0, os.SEEK_CUR)
        with _tolerating(PermissionError):
            process.send(process.timeout_signal)
        return self.look()

    def new_error(self, kind: type[MemIsolateError], message: str, **details: object) -> MemIsolateError:
        return kind(message, **details, **self.process.costs())

    def __enter__(self) -> _Call:
        return self

    def __exit__(self, *raised: object) -> None:
        ended, failed = False, None
        for _ in range(20):  # signal handlers may raise on and on, but not for ever
            try:
                ended = self.give_back()
                break
            except BaseException as error:
                failed = error
        try:
            if failed is not None:
                raise failed
            if ended and _logger.getEffectiveLevel() <= logging.DEBUG:  # isEnabledFor expects a KeyError, of whomever
                _log(self, raised[0])
        finally:
            del failed  # which refers to this frame

    def give_back(self) -> bool:
        """Leave nothing behind; a second call goes on where the first was cut short, a third does nothing."""
        if self.ended:
            return False
        try:
            if not self.process.gone and self.process.pid > 0:
                self.process.kill()
            _drain(self.process.opened, _libc_close)
            _drain(self.process.watch, _libc_close)
        finally:
            if _rebuilding or _resting:
                _wake_collector(id(self))
            self.shared.release()
            _in_flight.pop(id(self), None)
        self.rebuilt = None  # an exception refers to this call
        self.ended = True
        return True


def _launch(call: _Call, writer: _Writer, flushed: bool, function: Any, args: Any, kwargs: Any) -> bool:
    """Fork; return False if another thread has come up meanwhile, which a signal handler may have started."""
    process, shared, mask = call.process, call.shared, _SignalSet()
    _libc_sigmask(_SIG_BLOCK, None, mask)
    _let_report(process, shared.bulk[0], mask, call.timeout is not None)
    threads = _other_threads()
    _refuse_unsafe_fork(threads)
    setup, teardown = _child_setup(call, threads, flushed)
    child = _Child(writer, mask, process.blocked, setup, teardown, function, args, kwargs)
    if not _fork(process, child, mask, threads):
        return False
    if _MADV_DONTFORK and (threads or function is not call.function):
        # While this child runs, another thread, or this one if it need not wait, may fork: not with this region.
        _libc_madvise_holding_gil(shared.mapping[0], _SHARED_SIZE, _MADV_DONTFORK)
    return True


def _need_frames(count: int) -> None:
    """Raise RecursionError while nothing is held yet, if what follows would meet the recursion limit half-way."""
    if count:
        _need_frames(count - 1)


def _refuse_unsafe_fork(threads: bool) -> None:
    if _newest_interpreter() not in (_MAIN_INTERPRETER, None):
        raise ForkError("a process that has a subinterpreter cannot be forked safely; close it, or leave it")
    if threads and _FREE_THREADED:
        raise ForkError("a free-threaded Python cannot be forked safely while it has more than one thread")
    if threads and _missing_parts:
        missing = ", ".join(_missing_parts)
        raise ForkError(f"this Python cannot be forked safely while it has more than one thread: it lacks {missing}")


def _child_setup(call: _Call, threads: bool, flushed: bool) -> tuple[list[Callable[[], None]], Any]:
    """What the child has to do before it calls the function, and after, besides what every child has to."""
    setup: list[Callable[[], None]] = []
    teardown = None
    greenlets = "gevent" in sys.modules or "eventlet" in sys.modules
    if threads or greenlets:
        setup.append(functools.partial(_renew, list(_child_hooks)))
    if threads or not flushed:
        setup.append(_renew_streams)
    if len(_in_flight) > 1:
        setup.append(functools.partial(_close_others, call.shared))
    if _rebuilding:
        setup.append(_wake_collector)
    if "asyncio" in sys.modules:
        setup.append(_leave_event_loop)
    if greenlets:
        setup.append(_leave_hubs)
    if call.memory_limit is not None:
        limits = resource.getrlimit(resource.RLIMIT_DATA)
        setup.append(functools.partial(_limit_memory, call.most_memory, limits))
        teardown = functools.partial(_lift_memory_limit, limits)
    return setup, teardown


def _close_others(own: _Shared) -> None:
    """Close what belongs to other threads' calls, or this child would keep the memory of their results."""
    kept = {*own.bulk, *own.counter, *own.room}
    for shared in list(_in_flight.values()):
        if shared is not own:
            for numbers in (shared.bulk, shared.counter, shared.room):  # stale ones where os.fork copied this process
                numbers[:] = set(numbers) - kept
            shared.close_descriptors()


def _data_size() -> int:
    """The private memory of this process, in bytes."""
    try:
        with io.FileIO("/proc/self/status") as status:  # `open` may be replaced, as by a test
            return int(status.readall().partition(b"VmData:")[2].split()[0]) << 10
    except (FileNotFoundError, PermissionError, IndexError) as error:
        _raise_if_from_handler(error)
        raise NotImplementedError(f"memory_limit needs /proc, to know what the process has already: {error}") from error


def _limit_memory(most: int, limits: tuple[int, int]) -> None:
    soft, hard = limits
    limit = min(limit for limit in (most, soft, hard, sys.maxsize) if limit != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    if resource.getrlimit(resource.RLIMIT_DATA)[0] != limit:  # some sandboxes: the caller gets ChildSetupError
        raise NotImplementedError("this system does not enforce RLIMIT_DATA, which memory_limit needs")


def _lift_memory_limit(limits: tuple[int, int]) -> None:
    with contextlib.suppress(Exception):  # the callable lowered the hard limit, or left a hook that refuses
        resource.setrlimit(resource.RLIMIT_DATA, limits)


# ------------------------------------------------------------------------------------- Waiting, and reading along


def _sleep(call: _Call, seconds: float) -> None:
    """Sleep until the child ends or publishes something, or so long; where only its end matters, until that."""
    process, counter = call.process, call.shared.counter
    if call.hurried:  # many small items: to be woken for each would take longer than to rebuild it
        time.sleep(_NAP)
        if call.shared.read_counter():
            return
    descriptors = [*process.watch, *counter[:1]]
    if not hasattr(select, "poll"):  # eventlet takes it away, and lets others run in select
        select.select(descriptors, [], [], seconds)
    elif not (process.watch or call.timeout or call.sends or "gevent" in sys.modules):  # no pidfd: wait in wait4
        _offer_to_oom_killer(process)
        process.reap(wait=True)
    else:
        poller = select.poll()
        for descriptor in descriptors:
            poller.register(descriptor, select.POLLIN)
        ready = poller.poll(seconds * 1000)
        if len(ready) == 1 and [ready[0][0]] == process.watch:
            return
    call.hurried = call.shared.read_counter() and call.sends


async def _sleep_async(call: _Call, seconds: float) -> None:
    """Sleep likewise, while the event loop goes on; what is published is waited for by generators only."""
    import asyncio

    loop = asyncio.get_running_loop()
    descriptors = call.process.watch + (call.shared.counter[:1] if call.sends else [])
    woken = loop.create_future()
    try:
        for descriptor in descriptors:
            loop.add_reader(descriptor, woken.cancel)  # unlike set_result, it may be called again
        await asyncio.wait([woken], timeout=seconds)
    finally:
        for descriptor in descriptors:
            loop.remove_reader(descriptor)
    if call.sends:
        call.shared.read_counter()


# The garbage collector would walk a large result again and again while it is rebuilt, so it rests meanwhile. That is
# done by its threshold, not by gc.disable: enabling it is the user's, whose result may do so while it is rebuilt.

_rebuilding: set[int] = set()  # the calls that do
_resting: dict[str, tuple[int, ...]] = {}  # the user's thresholds, while there are any such calls


def _rest_collector(call: int) -> None:
    _rebuilding.add(call)
    # It is one step of C: another thread may be doing the same, or just be putting them back.
    ask_and_keep = map(_resting.setdefault, ("thresholds",), _step(gc.get_threshold))
    list(chain(ask_and_keep, _step(gc.set_threshold, 0)))


def _wake_collector(call: int | None = None) -> None:
    """End the rest for a call; without one, in a child that was forked while other threads were rebuilding."""
    _rebuilding.clear() if call is None else _rebuilding.discard(call)
    if _rebuilding or not _resting:
        return
    if gc.get_threshold()[0]:
        _resting.clear()  # the result has set its own
    else:
        with _tolerating(KeyError):  # another thread has just done it
            any(starmap(gc.set_threshold, map(_resting.pop, ("thresholds",))))


def _read_along(call: _Call) -> None:
    """Rebuild the result while the child writes it; what the child says in the end counts, not what was rebuilt."""
    shared = call.shared
    if not shared.published or call.rebuilt is not None:
        return

    def more(position: float) -> Any:
        """Wait until the stream goes on behind a position, or the child is gone; return up to where it goes."""
        while _REGION_SIZE + shared.published <= position:
            seconds = call.look()
            if seconds is None:
                progress, kind, _, start, length = shared.header.tolist()
                if (progress, kind) != (_DELIVERED, _RESULT):
                    raise EOFError("the child did not finish its result")  # of which _outcome will say more
                return start + length
            _sleep(call, seconds)
        return _REGION_SIZE + shared.published

    _rest_collector(id(call))
    reader = _Reader(shared, 0, more)
    try:
        call.rebuilt = [reader.unpickler(reader.take_buffers()).load()]
    except Exception as error:
        _raise_if_from_handler(error)
        call.rebuilt = error


class _ItemReceiver:
    """The parent's end of the ring."""

    def __init__(self, call: _Call) -> None:
        self.call, self.shared = call, call.shared
        self.taken = self.told = 0  # bytes, and those of them that the child knows of
        self.chunk = memoryview(b"")  # what was read ahead
        self.stay_in_this_process()
        call.started = call.restart_clock()

    def published(self, items: Iterator[Any]) -> Iterator[Any]:
        """Those items that are there already."""
        while True:
            self.stay_in_this_process()
            found = [next(items)]
            if found[0] is _NOT_YET:
                return
            yield found.pop()  # and it is kept nowhere here, so that it goes when the reader drops it

    def stay_in_this_process(self) -> None:
        if _getpid() != self.shared.parent:
            raise RuntimeError("this iterator belongs to the process that made it")

    def items(self) -> Iterator[Any]:
        """Rebuild each item when it is asked for; yield ``_NOT_YET`` while there is nothing more to read."""
        while True:
            chunk, end = self.chunk, 0
            while end + _ITEM.size <= len(chunk):
                start = end + _ITEM.size
                length, count = _ITEM.unpack_from(chunk, end)
                if count or start + length > len(chunk):
                    break
                end = start + length
                yield self.rebuild(chunk[start:end], ())
            self.chunk = chunk[end:]
            self.call.restart_clock()
            if not self.chunk:
                many = yield from self.wait()
                self.chunk = memoryview(self.read(bytearray(min(many, _READ_AHEAD))))
                continue
            yield (yield from self.take_item())

    def take_item(self) -> Generator[Any, None, Any]:
        """Rebuild one that has buffers, or that is not whole in what was read."""
        length, count = _ITEM.unpack((yield from self.take(bytearray(_ITEM.size))))
        stream = yield from self.take(bytearray(length))
        buffers = []
        for size in stream[length - 8 * count :].cast("Q"):
            buffers.append((yield from self.take(_new_memory(size))))
        return self.rebuild(stream, buffers)

    def wait(self) -> Generator[Any, None, int]:
        """Wait until there is something to read; return how many bytes in one piece."""
        while self.taken >= self.shared.published:
            yield _NOT_YET
        return min(self.shared.published - self.taken, _RING - self.taken % _RING)

    def take(self, memory: Any) -> Generator[Any, None, memoryview]:
        """Fill memory with what comes next; return a view of it."""
        view = memoryview(memory)
        done = min(len(view), len(self.chunk))
        view[:done], self.chunk = self.chunk[:done], self.chunk[done:]
        while done < len(view):
            many = yield from self.wait()
            done += len(self.read(view[done : done + many]))
        return view

    def read(self, memory: Any) -> Any:
        if _read_at(self.shared.bulk[0], memory, self.taken % _RING) < len(memory):
            raise self.call.new_error(DeserializationError, "the items were cut short")
        self.taken += len(memory)
        self.shared.received += len(memory)
        if self.taken - self.told >= _RING // 8:  # so seldom that a socket takes it, and before the child must wait
            _write(self.shared.room[-1], _WORD.pack(self.taken - self.told))
            self.told = self.taken
        return memory

    def rebuild(self, stream: memoryview, buffers: Iterable[Any]) -> Any:
        try:
            return pickle.loads(stream, buffers=buffers)
        except Exception as error:
            _raise_if_from_handler(error)
            message = f"{_name(self.call.function)} yielded an item, but rebuilding it raised {_say(error)}"
            raise self.call.new_error(DeserializationError, message) from error


# ------------------------------------------------------------------------------------------ The outcome, in the parent


def _outcome(call: _Call) -> Any:
    """Return or raise what the child delivered, or say what became of it."""
    __tracebackhide__ = True
    if not call.process.gone:  # the drivers' loops over call.look end with StopIteration, whoever raises it
        raise RuntimeError("a signal handler raised StopIteration")
    progress, kind, count, start, length = call.shared.header.tolist()
    if progress != _DELIVERED:
        raise _failure(call, progress)
    call.shared.received += length
    if kind != _RESULT:
        _raise_delivered(call, kind, start, start + length)
    try:
        if call.rebuilt is not None:
            if isinstance(call.rebuilt, Exception):
                raise call.rebuilt
            return call.rebuilt.pop()
        if not count and start + length <= _REGION_SIZE:
            return pickle.loads(call.shared.region[start : start + length])
        _rest_collector(id(call))
        reader = _Reader(call.shared, start, lambda _: start + length)
        buffers = list(reader.take_buffers())
        if reader.loaded is None and not _seal(call.shared):  # what the child left could change it while it is read
            reader.load(start + length)
        return reader.unpickler(buffers).load()
    except Exception as error:
        _raise_if_from_handler(error)
        message = f"{_name(call.function)} returned, but rebuilding its result raised {_say(error)}"
        raise call.new_error(DeserializationError, message) from error


def _raise_delivered(call: _Call, kind: int, start: int, end: int) -> NoReturn:
    """Raise what the callable raised, or what went wrong in the child; both are a text and an exception behind it."""
    __tracebackhide__ = True
    name = _name(call.function)
    text, error, state = "", None, {}
    unpickler: Any = None
    expected: Any = BaseException if kind == _RAISED else (BaseException, type(None))
    try:
        if kind == _UNWRITTEN:
            unpickler = _Unpickler(io.BytesIO(call.shared.region[_REGION_SIZE : _REGION_SIZE + end - start]))
        else:
            reader = _Reader(call.shared, start, lambda _: end)
            unpickler = reader.unpickler(reader.take_buffers())
        text = unpickler.load()
        error, state = unpickler.load()
        if not isinstance(error, expected):
            raise TypeError(f"it unpickles to {type(error).__qualname__}")
        _set_exception_state(error, state)
    except Exception as failed:
        _raise_if_from_handler(failed)
        if kind == _RAISED:
            message = f"{name} raised an exception that does not unpickle ({_say(failed)}):\n{text}"
            raise call.new_error(SerializationError, message) from failed
        error = None
    unpickler = None  # whose memo holds them
    failures = {_UNPICKLABLE: SerializationError, _UNWRITTEN: ResultDeliveryError, _SETUP_FAILED: ChildSetupError}
    try:
        if kind == _RAISED:
            raise error from _ChildTraceback(text)  # type: ignore[misc]
        raise call.new_error(failures.get(kind, DeserializationError), f"{name}: {text}") from error
    finally:
        del error, state  # which refer to this frame, through a traceback


def _failure(call: _Call, progress: int) -> MemIsolateError:
    """The error for a child that is gone and delivered nothing."""
    name, process = _name(call.function), call.process
    kind, ending, details = _ending(process, call.sends)
    fault = _FAULTS.get(details.get("signal"))  # type: ignore[arg-type]
    where = report = ""
    if (process.expired and process.timeout_signal) or fault:  # else a process that the callable forked wrote it
        head = "" if process.expired else f"Fatal Python error: {fault}"
        with _tolerating(Exception):  # of want of memory, or of a late import to show source lines
            where, report = _read_report(call.shared.bulk[0], call.report_at, head)
    if process.expired:
        cannot = process.killed and not isinstance(process.wait_error, (ChildProcessError, type(None)))
        killed = f"cannot be killed ({process.wait_error})" if cannot else "was killed"
        kind, details = CallableTimeoutError, {"timeout": call.timeout}
        message = f"{name} did not end within {call.timeout:g} s, and {killed}{where}; "
        message += "allow more time, or retry if it may run twice"
    elif progress == _NOT_STARTED:
        kind, message = ChildSetupError, f"the child did not reach {name}: {ending}{where}; it is safe to retry"
    elif progress == _RETURNED:
        kind, message = ResultDeliveryError, f"{name} ended, but the child did not deliver its outcome: {ending}{where}"
    else:
        message = f"the child did not survive {name}: {ending}{where}; retry only if it may run twice"
    error = call.new_error(kind, message, **details)
    error.__cause__ = _ChildTraceback(report) if report else process.wait_error
    return error


def _ending(process: _Process, sends: bool) -> tuple[type[MemIsolateError], str, dict[str, Any]]:
    """How a child ended: the error for it if the callable was running, what to say of it, and the error's details."""
    status = process.ending[_STATUS]
    if process.wait_error is not None:
        return WaitError, f"its end cannot be learnt ({process.wait_error})", {}
    if not os.WIFSIGNALED(status):
        status = os.WEXITSTATUS(status)
        return UnexpectedExitStatusError, f"it ended with status {status}", {"exit_status": status}
    number = os.WTERMSIG(status)
    with _tolerating(ValueError):  # a real-time signal has no name
        number = Signals(number)
    ending = f"it was killed by {getattr(number, 'name', f'signal {number}')}"
    if number == signal.SIGKILL and not process.killed:
        peak = process.costs()["peak_memory"]
        ending += ", most likely by the kernel because memory ran out, the machine's or a container's"
        ending += f" (its peak was {peak / 2**20:.0f} MiB)" if peak else ""
        ending += ", or because the thread that asked for the first item has ended" if sends else ""
    return KilledBySignalError, ending, {"signal": number}


# The drivers. Why a call is entered five times, _Call says. No loop here ends with an `if`: CPython 3.13 leaves the
# jump back that follows it, where signal handlers run, out of the `with` block.


def _run(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    with call, call, call, call, call:
        call.start(args, kwargs)
        for seconds in iter(call.look, None):
            _sleep(call, seconds)
            _read_along(call)
        return _outcome(call)


async def _run_async(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    __tracebackhide__ = True
    _need_loop()
    with call, call, call, call, call:
        call.start(args, kwargs, through=_run_coroutine)
        for seconds in iter(call.look, None):
            await _sleep_async(call, seconds)
        return _outcome(call)


def _iterate(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generator[Any, None, Any]:
    __tracebackhide__ = True
    with call, call, call, call, call:
        receiver = _ItemReceiver(call)
        items = receiver.items()
        call.start(args, kwargs)
        for seconds in chain(iter(call.look, None), (0,)):  # once more when the child is gone
            _sleep(call, seconds)
            yield from receiver.published(items)
        return _outcome(call)


async def _iterate_async(call: _Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AsyncIterator[Any]:
    __tracebackhide__ = True
    _need_loop()
    with call, call, call, call, call:
        receiver = _ItemReceiver(call)
        items = receiver.items()
        # Nobody closes this iterator where its loop has been closed.
        forgotten = weakref.finalize(receiver, call.__exit__, GeneratorExit)
        try:
            call.start(args, kwargs)
            for seconds in chain(iter(call.look, None), (0,)):  # once more when the child is gone
                await _sleep_async(call, seconds)
                for item in receiver.published(items):
                    yield item
            _outcome(call)
        finally:
            forgotten.detach()


def _need_loop() -> None:
    import asyncio

    asyncio.get_running_loop()  # raises RuntimeError outside of one: before anything is started


def _run_coroutine(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call a function in the child and, if it is an ``async def`` one, run what it returns in a fresh event loop."""
    value = function(*args, **kwargs)
    if not isinstance(value, collections.abc.Coroutine):
        return value
    import asyncio

    return asyncio.run(value)


def _log(call: _Call, error: Any) -> None:
    outcome = "returned" if error is None else f"raised {error.__name__}"
    pid, peak, cpu_time = call.process.costs().values()
    seconds = _clock() - call.started
    message = "%s in child %s %s after %.6f s, %d bytes returned, peak memory %s bytes, processor time %s s"
    values = _name(call.function), pid, outcome, seconds, call.shared.received, peak, cpu_time
    _logger.debug(message, *values, extra={"child_pid": pid, "peak_memory": peak, "cpu_time": cpu_time})


# --------------------------------------------------------------------------------------------------- The public face


def execute_in_isolated_process(callable: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R:
    """Call ``callable(*args, **kwargs)`` in a forked child, wait, and return what it returns or raise what it raises.

    Callable and arguments can be anything, for they are not pickled; the result must be picklable. An exception
    arrives with its type, arguments, attributes and notes; its ``__cause__`` shows the child's traceback. Errors of
    the call itself are `MemIsolateError`: `CallableDidNotExecuteError` (safe to retry), `CallableExecutedError`, or
    `CallableStatusUnknownError`. A non-callable is a `TypeError`. For limits, and generator functions, see `isolated`.
    """
    __tracebackhide__ = True
    if _kind_of(callable) == "generator":
        return _iterate(_Call(callable, None, None, sends=True), args, kwargs)  # type: ignore[return-value]
    return _run(_Call(callable, None, None), args, kwargs)  # type: ignore[no-any-return]


@overload
async def execute_in_isolated_process_async(
    callable: Callable[P, Coroutine[Any, Any, R]], /, *args: P.args, **kwargs: P.kwargs
) -> R: ...
@overload
async def execute_in_isolated_process_async(
    callable: Callable[P, Iterator[R]], /, *args: P.args, **kwargs: P.kwargs
) -> AsyncIterator[R]: ...
@overload
async def execute_in_isolated_process_async(callable: Callable[P, R], /, *args: P.args, **kwargs: P.kwargs) -> R: ...
async def execute_in_isolated_process_async(callable: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Like `execute_in_isolated_process`, while the event loop goes on; ``callable`` may be ``async def`` too.

    Such a function runs in an event loop of its own in the child. Cancelling kills and reaps the child first. A result
    is rebuilt in the loop's thread. Awaited with a generator function of either kind, it returns an async iterator.
    """
    __tracebackhide__ = True
    if _kind_of(callable):
        return _iterate_async(_Call(callable, None, None, sends=True), args, kwargs)
    return await _run_async(_Call(callable, None, None), args, kwargs)


def _kind_of(function: Any) -> str:
    """Whether it is a generator function, an asynchronous one, or neither; partials and methods are looked through."""
    if not callable(function):
        raise TypeError(f"expected a callable, not {type(function).__name__}")
    while type(function) is not FunctionType:
        if type(function) is functools.partial:
            function = function.func  # pyright: ignore[reportFunctionMemberAccess]
        elif type(function) is MethodType:
            function = function.__func__  # pyright: ignore[reportFunctionMemberAccess]
        else:
            return ""
    flags = function.__code__.co_flags
    return "generator" if flags & 0x20 else "async generator" if flags & 0x200 else ""  # inspect.CO_GENERATOR, ...


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

    ``timeout``: seconds of wall clock for the whole call but the rebuilding of its result, a positive real number;
    when they are over the child has 0.1 s to write its stack, is killed, and `CallableTimeoutError` raised.
    ``memory_limit``: bytes of private memory that the callable may add to what the process has at the call, a positive
    int (Linux; elsewhere `NotImplementedError`); Python code that wants more gets `MemoryError`. A bad value is a
    `TypeError` or `ValueError` here, not at the call.

    Functions, ``async def`` functions, methods, static and class methods and other callables keep their signature,
    name and docs. The result is a plain function: it pickles by its name, which leads to it where it was decorated.

    Of a generator function one child runs the whole body, from when the first item is asked for. Items come as they
    are yielded, then what the body returns or raises; ``timeout`` is for each item, and ``memory_limit`` counts the
    pickling of items. The child may be some 64 MiB ahead, and ends with the iterator, or with the thread that asked
    for the first item: it is killed, no ``finally`` of the body runs, and what its C stdio holds is lost, with what it
    printed after the last item that it sent. ``send`` and ``throw`` do not reach the body.
    """
    _check_limits(timeout, memory_limit)
    timeout = None if timeout is None else float(timeout)
    decorate = functools.partial(_isolate, timeout=timeout, memory_limit=memory_limit)
    return decorate if function is None else decorate(function)


def _isolate(function: Any, timeout: float | None, memory_limit: int | None) -> Any:
    if isinstance(function, (staticmethod, classmethod)):
        return type(function)(_isolate(function.__func__, timeout, memory_limit))
    import inspect

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return _run(_Call(function, timeout, memory_limit), args, kwargs)

    async def async_wrapper(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        return await _run_async(_Call(function, timeout, memory_limit), args, kwargs)

    def generator(*args: Any, **kwargs: Any) -> Generator[Any, None, Any]:
        __tracebackhide__ = True
        return (yield from _iterate(_Call(function, timeout, memory_limit, sends=True), args, kwargs))

    async def async_generator(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        __tracebackhide__ = True
        items: Any = _iterate_async(_Call(function, timeout, memory_limit, sends=True), args, kwargs)
        try:
            async for item in items:
                yield item
        finally:
            await items.aclose()

    wrappers: dict[str, Any] = {"generator": generator, "async generator": async_generator}
    chosen = wrappers.get(_kind_of(function)) or (async_wrapper if inspect.iscoroutinefunction(function) else wrapper)
    return functools.wraps(function)(chosen)


def _check_limits(timeout: Any, memory_limit: Any) -> None:
    if timeout is not None:
        if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
            raise TypeError(f"timeout must be a number of seconds or None, not {timeout!r}")
        try:
            seconds = float(timeout)
        except OverflowError:
            seconds = inf
        if not 0 < seconds < inf:
            raise ValueError("timeout must be positive and finite; None means no limit")
    if memory_limit is not None:
        if isinstance(memory_limit, bool) or not isinstance(memory_limit, int):
            raise TypeError(f"memory_limit must be an int of bytes or None, not {memory_limit!r}")
        if memory_limit <= 0:
            raise ValueError(f"memory_limit must be positive, not {memory_limit!r}; None means no limit")
        if not _LINUX:
            raise NotImplementedError("memory_limit needs Linux, whose RLIMIT_DATA bounds all private memory")


# -------------------------------------------------------------------------------------------------------- Huge pages

_HUGE_PAGE = 2 << 20
_FULL = _HUGE_PAGE - _HUGE_PAGE // 21  # what must be resident of a block: filling the rest adds 5 % at most
_MADV_POPULATE_WRITE, _MADV_COLLAPSE = 23, 25
_libc_madvise = _libc.madvise
_libc_madvise.argtypes = _libc_madvise_holding_gil.argtypes
# VmFlags of stacks, of locked and hugetlb memory, of what forks skip or empty, and of what refuses huge pages.
_LEFT_ALONE = frozenset([b"gd", b"lo", b"ht", b"dc", b"wf", b"nh"])


def use_huge_pages() -> int:
    """Move this process's resident private memory into huge pages (Linux 6.1); return the bytes that are in them now.

    Forking then copies 512 times fewer page-table entries, so later calls cost a process with gigabytes of live memory
    about a tenth. Call it once those are loaded (it takes seconds per GiB, and other threads go on meanwhile), and
    again when much of them was replaced. Contents stay, RSS grows by at most 5 %. Left alone: memory that is mostly
    untouched, locked, a stack, or shared with a living process. Returns 0 where the system cannot do it.
    """
    other_size = _PAGE * _PAGE // 8 != _HUGE_PAGE  # as many small ones as a page has room for entries of 8 bytes
    if other_size or _libc_madvise(0, 0, _MADV_COLLAPSE) != 0:  # the kernel does not know this advice
        return 0
    moved = 0
    # /proc may not be there, or not for a process that has changed its user.
    with _tolerating(OSError), open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for first, last in _private_anonymous_mappings():
            for start in range(first, last, 64 * _HUGE_PAGE):  # large steps through reservations of terabytes
                end = min(start + 64 * _HUGE_PAGE, last)
                if _resident(pagemap.fileno(), start, end) < _FULL:
                    continue
                for block in range(start, end, _HUGE_PAGE):
                    # Other threads may have mapped something else there by now: look again, just before.
                    if _resident(pagemap.fileno(), block, block + _HUGE_PAGE) >= _FULL and _collapse(block):
                        moved += _HUGE_PAGE
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
    entries = os.pread(pagemap, (end - start) // _PAGE * 8, start // _PAGE * 8)
    return entries[7 if sys.byteorder == "little" else 0 :: 8].count(0x81) * _PAGE


def _collapse(block: int) -> bool:
    if _libc_madvise(block, _HUGE_PAGE, _MADV_COLLAPSE) == 0:
        return True
    if ctypes.get_errno() not in (errno.EINVAL, errno.EAGAIN):
        return False
    # Older kernels (6.12 is one) want a page writable, and a fork leaves none. This makes one so, unchanged.
    _libc_madvise(block, _PAGE, _MADV_POPULATE_WRITE)
    return bool(_libc_madvise(block, _HUGE_PAGE, _MADV_COLLAPSE) == 0)


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

    def leak() -> int:
        ctypes.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(256 << 20))), 1, 256 << 20)
        return resident()

    def change() -> float:
        state["changed"] = True
        return random.random()

    def crash() -> None:
        ctypes.string_at(0)

    def leaks() -> str:
        before, child, after = resident(), execute_in_isolated_process(leak), resident()
        verdict = "gone" if after - before < 8 else "still there"
        return f"{verdict}: the child grew to {child} MiB, the parent's RSS from {before} to {after} MiB"

    def changes() -> str:
        same = execute_in_isolated_process(change) == execute_in_isolated_process(change) == random.random()
        verdict = "unchanged" if same and not state["changed"] else "changed"
        return f"{verdict}: the parent's global is {state}, and its generator {'where it was' if same else 'elsewhere'}"

    def returns() -> str:
        return f"{len(execute_in_isolated_process(lambda: os.urandom(1 << 20) * 64)) >> 20} MiB"

    steps: dict[str, tuple[str, Callable[[], object]]] = {  # what is tried, and how what comes of it begins
        "leak 256 MiB of C memory": ("gone", leaks),
        "change a global and the random state": ("unchanged", changes),
        "return 64 MiB": ("64 MiB", returns),
        "raise an exception": ("KeyError", isolated(lambda: state["no such key"])),
        "segfault": ("KilledBySignalError", isolated(crash)),
        "sleep 60 s with timeout=0.3": ("CallableTimeoutError", lambda: isolated(time.sleep, timeout=0.3)(60)),
        "take 1 GiB with memory_limit=256 MiB": ("MemoryError", lambda: isolated(bytes, memory_limit=1 << 28)(1 << 30)),
    }
    if not _LINUX:  # no /proc, no RLIMIT_DATA
        steps = {title: step for title, step in steps.items() if "256 MiB" not in title}
    print(f"mem_isolate {__version__} on Python {sys.version.split()[0]}, {os.uname().sysname} {os.uname().release}")
    failures = 0
    for title, (expected, step) in steps.items():
        started = time.perf_counter()
        try:
            said = str(step())
        except Exception as error:
            traceback_of_the_child = str(error.__cause__ or "").strip().strip('"').rstrip()
            said = f"{type(error).__name__}: {error}{traceback_of_the_child}"
        milliseconds = (time.perf_counter() - started) * 1000
        good = said.startswith(expected)
        failures += not good
        print(f"{'ok  ' if good else 'FAIL'} {title} ({milliseconds:.1f} ms): " + said.replace("\n", "\n         "))
    print(f"{failures} of {len(steps)} did not do what they should" if failures else "This platform is supported.")
    return 1 if failures else 0


def _main(arguments: list[str]) -> int:
    import argparse

    parser = argparse.ArgumentParser(description="Without options: a tour, which tries here what mem_isolate promises.")
    parser.add_argument("--version", action="store_true", help="print version, date and SHA-256, to compare copies by")
    if not parser.parse_args(arguments).version:
        return _tour()
    import hashlib

    with open(__file__, "rb") as file:
        text = file.read()
    newest = re.search(r"^# ([0-9.]+) \((.*?)\)", text.decode(), re.MULTILINE)  # of the history at the top
    date = newest[2] if newest else "date unknown"
    print(f"mem_isolate {__version__} ({date}) sha256 {hashlib.sha256(text).hexdigest()}")
    return 0


def _warm_up() -> None:
    """Deliver a few times to nobody, so that children find the interpreter's caches filled.

    Each child would else fill them for itself, which costs a trivial call some 10 page faults.
    """
    shared = _Shared()
    shared.header = memoryview(bytearray(_HEADER_SIZE)).cast("Q")
    shared.region = memoryview(bytearray(_REGION_SIZE))
    for _ in range(16):
        child = _Child(_Writer(shared), None, None, [], None, _warm_up, (), {})
        *_, dump, _ = child.plan
        _deliver_outcome(child.writer, dump, None, None)


_warm_up()  # last, since another global would make the interpreter forget what it learnt about those

if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
