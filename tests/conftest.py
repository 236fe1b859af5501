"""XLA's options, before JAX is imported; a generator for each test; what the extension answered."""

import gc
import os
from collections import Counter

import pytest
from seeds import generator_of

# Most programs are small and run once: without optimization, by the older emitters and in one piece they are compiled
# in an eighth of the time. Flags of the environment come last, and win, as in `make coverage`, which compiles all
# programs as for users; so does `support/optimized.py`, where rounding or the program itself is what a test is about.
QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0",
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
)
os.environ["XLA_FLAGS"] = " ".join(
    (*QUICK_COMPILATION, "--xla_force_host_platform_device_count=8", os.environ.get("XLA_FLAGS", ""))
)


def pytest_collection_finish():
    """Exclude the million objects of the collected tests from every pass of the garbage collector."""
    gc.collect()
    gc.freeze()


ENTRIES = ("normalize", "gradients")


class Answers:
    """How often each entry of the extension was called, and how often it declined."""

    def __init__(self):
        self.calls, self.declined = Counter(), Counter()

    def recording(self, name, function):
        def call(*arguments, **options):
            self.calls[name] += 1
            result = function(*arguments, **options)
            self.declined[name] += type(result) is not tuple
            return result

        return call

    def taken(self):
        """The calls since this was asked last, by entry; raises if one of them was declined."""
        assert not self.declined.total(), f"declined: {dict(self.declined)} of {dict(self.calls)}"
        calls = dict(self.calls)
        self.calls.clear()
        return calls


@pytest.fixture
def rng(request):
    """Random numbers of the test's own, so that it sees under any selection what it sees in the suite."""
    return generator_of(request.node.nodeid)


@pytest.fixture
def extension(monkeypatch):
    """What the extension answers during a test, as `Answers`."""
    from batchnorm import _native

    answers = Answers()
    for name in ENTRIES:
        monkeypatch.setattr(_native, name, answers.recording(name, getattr(_native, name)))
    return answers


@pytest.fixture
def undrawn(monkeypatch):
    """Reports of training without charts: these take seconds, and have tests of their own."""
    from batchnorm.training import charts

    monkeypatch.setattr(charts, "svg", lambda panel, metrics: "<svg></svg>")
    monkeypatch.setattr(charts, "write_png", lambda figure, metrics, path: path.write_bytes(b"a picture"))
