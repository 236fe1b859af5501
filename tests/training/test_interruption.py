"""Ctrl-C: noted the first time, the end of the process the second time."""

import os
import signal
import subprocess
import sys

from batchnorm.training.interruption import EXIT_CODE, noting_interrupts


def test_the_first_is_noted_and_the_handler_put_back():
    before = signal.getsignal(signal.SIGINT)
    with noting_interrupts() as is_stopped:
        assert not is_stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_stopped()
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ends_the_process_at_once():
    program = (
        "import os, signal\n"
        "from batchnorm.training.interruption import noting_interrupts\n"
        "with noting_interrupts() as is_stopped:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('noted', is_stopped(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('still here', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (EXIT_CODE, "noted True\n")
