import os
import signal
import threading

import pytest

from autocompress.search.interrupts import interrupt_deferred


def test_an_interrupt_waits_for_the_end_of_the_block():
    done = []

    def interrupted():
        with interrupt_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("the whole block")

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert done == ["the whole block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_interrupt_nothing_happens():
    with interrupt_deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_is_passed_on():
    with pytest.raises(ValueError, match="inside"), interrupt_deferred():
        raise ValueError("inside")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_threads_may_use_it():
    ran = []

    def body():
        with interrupt_deferred():
            ran.append(True)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert ran == [True]
