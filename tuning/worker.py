"""A process that measures for another, and may hang or crash: it is killed and started anew, and costs one answer.

A kernel that is wrong can leave a GPU's context unusable or never return. Neither ends the tuner: after anything but an
answer or a wrong result (AssertionError) the next request has a new process.
"""

from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from dsv3c.errors import TuneError


class WorkerError(Exception):
    """A request without an answer: it raised, took too long, or ended the process."""


class Worker:
    """Calls `function` in a process of its own, which lives from one request to the next.

    Args:
        function: of a module, so that a new process can import it.
        limit_s: seconds a request may take; the first of a process also starts that, and has `start_s` more.
    """

    def __init__(self, function: Callable[..., Any], *, limit_s: float, start_s: float = 60.0):
        self._function, self._limit_s, self._start_s = function, limit_s, start_s
        self._process: Any = None
        self._pipe: Connection | None = None
        self.starts = 0

    def __call__(self, *request: Any) -> Any:
        """function(*request).

        Raises:
            WorkerError: it raised, hung, or crashed; its message says which.
            TuneError: no process can be started.
        """
        if self._process is not None and not self._process.is_alive():
            self.close()  # something ended it between requests
        if self._process is None:
            self._start()
        assert self._pipe is not None
        with suppress(ConnectionError):  # that it ended just now is seen below
            self._pipe.send(request)
        answer, error, usable = self._wait(self._limit_s)
        if not usable:
            self.close()
        if error is not None:
            raise WorkerError(error)
        return answer

    def _start(self) -> None:
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self._function, theirs), daemon=True)
        process.start()
        self._process = process
        theirs.close()
        self.starts += 1
        try:
            self._wait(self._start_s)
        except WorkerError as error:
            raise TuneError(f"worker: expected a process to start, found: it {error}") from error

    def _wait(self, seconds: float) -> Any:
        assert self._pipe is not None
        try:
            if self._pipe.poll(seconds):
                return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._process.join()
            code = self._process.exitcode
            self.close()
            raise WorkerError(f"crashed: the process ended with {code}") from None
        self.close()
        raise WorkerError(f"hung: no answer in {seconds:g} s")

    def close(self) -> None:
        """Ends the process, at once; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._pipe is not None
            self._pipe.close()
            self._process = self._pipe = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(function: Callable[..., Any], pipe: Connection) -> None:
    with suppress(EOFError, KeyboardInterrupt):  # the parent is gone
        pipe.send(None)
        while True:
            request = pipe.recv()
            try:
                pipe.send((function(*request), None, True))
            except Exception as error:  # whatever a kernel or its compiler raises
                reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                pipe.send((None, reason, isinstance(error, AssertionError)))
