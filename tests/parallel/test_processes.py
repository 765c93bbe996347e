"""The end of programs of several processes."""

import ctypes
import sys
import threading
import time

import pytest
import torch.distributed as dist

from gossamer import parallel

pytestmark = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="this torch has no gloo")


def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def as_gloo(seconds, work):
    """A thread with the name of gloo's, which works for some seconds and then rests."""
    ended = threading.Event()

    def run():
        ctypes.CDLL(None).prctl(15, b"pt_gloo_runloop", 0, 0, 0)  # PR_SET_NAME
        started.set()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            work()
        ended.set()
        rest.wait()

    started, rest = threading.Event(), threading.Event()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(10)
    return thread, ended, rest


@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of threads from /proc")
@pytest.mark.parametrize("work", [lambda: sum(range(100)), lambda: time.sleep(0.002)], ids=["computes", "wakes"])
def test_shutdown_waits_for_threads_of_gloo(work):
    alone()
    thread, ended, rest = as_gloo(0.3, work)
    parallel.shutdown()
    assert ended.is_set()
    assert not dist.is_initialized()
    rest.set()
    thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the states of threads from /proc")
def test_a_thread_that_does_not_rest_is_told():
    alone()
    thread, ended, rest = as_gloo(0.6, lambda: time.sleep(0.002))
    with pytest.warns(RuntimeWarning, match="still work after 0.1 s"):
        parallel.shutdown(timeout=0.1)
    assert not ended.is_set()
    assert not dist.is_initialized()
    rest.set()
    thread.join()


@pytest.mark.parametrize("timeout", [0, -1.0, float("inf"), float("nan"), "1", True])
def test_timeout_must_be_positive(timeout):
    alone()
    try:
        with pytest.raises((TypeError, ValueError), match="timeout"):
            parallel.shutdown(timeout=timeout)
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


def test_without_a_group():
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallel.shutdown()
