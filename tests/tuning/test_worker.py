"""A worker that hangs or crashes costs one request; the next is answered by another process."""

import os
import signal
from pathlib import Path

import pytest

from dsv3c.errors import TuneError
from dsv3c.tuning.worker import Worker, WorkerError


@pytest.fixture
def fakes(monkeypatch):
    """A module that a new process can import."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    import misbehave

    return misbehave


def choice(x):
    return [("ours", {"x": x})], 1


def test_answers_come_from_one_process(fakes):
    with Worker(os.getpid, limit_s=30) as worker:
        first, second = worker(), worker()
    assert first == second != os.getpid()
    assert worker.starts == 1


def test_a_wrong_result_is_an_answer(fakes):
    with Worker(fakes.measure, limit_s=30) as worker:
        with pytest.raises(WorkerError, match="AssertionError: bits differ"):
            worker(*choice(7))
        assert worker(*choice(3))[0].median_us == fakes.PEAK_US + 6
    assert worker.starts == 1


def test_what_spoils_the_process_costs_one_request(fakes):
    with Worker(fakes.measure, limit_s=30) as worker:
        with pytest.raises(WorkerError, match="RuntimeError: CUDA error: an illegal memory access"):
            worker(*choice(8))
        assert worker(*choice(3))
    assert worker.starts == 2


def test_a_process_that_somebody_ended_costs_nothing(fakes):
    with Worker(os.getpid, limit_s=30) as worker:
        process = worker()
        os.kill(process, signal.SIGKILL)
        worker._process.join()
        assert worker() != process


def test_a_crash_costs_one_request(fakes):
    with Worker(fakes.measure, limit_s=30) as worker:
        worker(*choice(3))
        with pytest.raises(WorkerError, match="crashed: the process ended with -6"):
            worker(*choice(6))
        assert worker(*choice(3))
    assert worker.starts == 2


def test_a_hang_costs_one_request(fakes):
    with Worker(fakes.measure, limit_s=0.5) as worker:
        worker(*choice(3))
        with pytest.raises(WorkerError, match=r"hung: no answer in 0\.5 s"):
            worker(*choice(5))
        assert worker(*choice(3))
    assert worker.starts == 2


def test_a_process_that_cannot_start_ends_the_tuning(fakes):
    """As when the function cannot be imported there; restarting it for every trial would never end."""
    with Worker(len, limit_s=30, start_s=0.0) as worker, pytest.raises(TuneError, match="worker: expected a process"):
        worker([])
