"""`python -m batchnorm` prints what `batchnorm.show_config` does."""

import os
import sys

import batchnorm

if __name__ == "__main__":
    try:
        batchnorm.show_config()
        sys.stdout.flush()
    except BrokenPipeError:  # `head` has closed the pipe; at exit the interpreter flushes stdout once more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
