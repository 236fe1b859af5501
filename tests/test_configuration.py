"""`show_config`, and the messages if a framework or the compiled extension is absent."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn
from batchnorm import _native, configuration


def run(program, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments, "-c", program] if program else [sys.executable, *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def without(*modules):
    """The head of a program in which these modules cannot be imported."""
    return f"import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"


# ---- frameworks ---------------------------------------------------------------------------------------------------

IMPORTING = "try:\n    import {}\nexcept ModuleNotFoundError as error:\n    print(error.name, error, sep='\\n')"


@pytest.mark.parametrize(("front_end", "module", "extra"), [
    ("batchnorm.torch", "torch", "torch"), ("batchnorm.jax", "jax", "jax"), ("batchnorm.flax", "jax", "jax"),
    ("batchnorm.flax", "flax", "jax"),
])  # fmt: skip
def test_absent_framework_names_its_extra(front_end, module, extra):
    done = run(without(module) + IMPORTING.format(front_end))
    name, message = done.stdout.splitlines()
    assert name == module
    assert message == f'{front_end} needs {module}, which is not installed; pip install "batchnorm[{extra}]"'


def test_a_framework_that_is_installed_reports_its_own_error(tmp_path):
    (tmp_path / "torch.py").write_text("import part_of_torch")
    done = run("import sys\n" + IMPORTING.format("batchnorm.torch"), PYTHONPATH=str(tmp_path))
    assert done.stdout.splitlines() == ["part_of_torch", "No module named 'part_of_torch'"]


# ---- the extension ------------------------------------------------------------------------------------------------

ABSENT = "import of batchnorm._native halted; None in sys.modules"


def test_absent_extension_is_warned_of_once_at_the_call():
    program = without("batchnorm._native") + (
        "import json, warnings, numpy as np, torch, jax.numpy as jnp, batchnorm as bn\n"
        "x = np.asarray([[1.0], [3.0]])\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    bn.forward(x, kernel='agnostic')\n"
        "    before = len(caught)\n"
        "    y = bn.forward(x, eps=0)[0]\n"  # line 9 of the program
        "    for convert in (np.asarray, torch.asarray, jnp.asarray):\n"
        "        bn.batch_norm(convert(x))\n"
        "warned = [[w.category.__name__, str(w.message), w.filename, w.lineno] for w in caught]\n"
        "print(json.dumps([before, y.tolist(), warned]))"
    )
    done = run(program)
    before, y, warned = json.loads(done.stdout)
    assert before == 0
    assert y == [[-1.0], [1.0]]
    (category, message, filename, line), *others = warned
    assert (category, filename, line, others) == ("RuntimeWarning", "<string>", 9, [])
    assert message.startswith(
        "batchnorm falls back to its generic implementation, which is slower: the compiled extension cannot be loaded "
        f"({ABSENT})"
    )
    assert "`pip install .` in its source tree compiles the extension" in message


def test_absent_extension_by_name():
    """An explicit choice raises without a warning; so does a front end without a generic implementation."""
    program = without("batchnorm._native") + (
        "import warnings, numpy as np, batchnorm as bn\nwarnings.simplefilter('error')\n"
        "by_name = lambda: bn.forward(np.ones((2, 1)), kernel='native')\n"
        "for attempt in (by_name, lambda: __import__('batchnorm.torch')):\n"
        "    try:\n        attempt()\n    except (ValueError, ImportError) as error:\n        print(error)"
    )
    by_name, by_import = run(program).stdout.splitlines()
    assert by_name.startswith(
        f"kernel 'native' does not serve this call: the compiled extension cannot be loaded ({ABSENT})"
    )
    assert by_import.startswith(
        f"batchnorm.torch needs the kernels, and the compiled extension cannot be loaded ({ABSENT})"
    )


def test_configuration_without_the_extension():
    program = without("batchnorm._native") + (
        "import json, warnings, batchnorm as bn\nwarnings.simplefilter('error')\n"
        "bn.show_config()\nprint(json.dumps(bn.show_config('dicts')))"
    )
    *printed, dicts = run(program).stdout.splitlines()
    found = json.loads(dicts)
    assert ABSENT in found["extension"]["reason"]
    assert found["kernels"]["numpy"] == f"agnostic: {found['extension']['reason']}"
    assert found["kernels"]["torch"].startswith("agnostic: the compiled extension cannot be loaded")
    assert found["threads"]["numpy"] is None
    assert any(ABSENT in line for line in printed)


def test_configuration_with_an_unknown_instruction_set():
    done = run("", "-m", "batchnorm", BATCHNORM_INSTRUCTION_SET="sse9")
    assert done.returncode == 0, done.stderr
    assert "reason                    the instruction set sse9 is not one of" in done.stdout
    assert "BATCHNORM_INSTRUCTION_SET sse9" in done.stdout


# ---- show_config --------------------------------------------------------------------------------------------------


def test_python_dash_m_prints_the_same(capsys):
    bn.show_config()
    here = capsys.readouterr().out.splitlines()
    done = run("", "-m", "batchnorm")
    there = done.stdout.splitlines()
    assert len(here) > 30
    assert [line for line in here if "waiting_bytes " not in line] == [
        line for line in there if "waiting_bytes " not in line
    ]


def test_a_closed_pipe_is_no_error_to_report():
    """As `python -m batchnorm | head -0`: exit status 1, as the shell's own tools, and nothing on stderr."""
    command = [sys.executable, "-m", "batchnorm"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 1)


def test_what_it_says():
    found = bn.show_config(mode="dicts")
    assert list(found) == [
        "versions", "kernels", "extension", "threads", "environment", "caches", "result_memory",
    ]  # fmt: skip
    import numpy

    assert found["versions"]["batchnorm"] == bn.__version__
    assert found["versions"]["numpy"] == numpy.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["kernels"]["numpy"] == "native"
    assert found["kernels"]["jax"] == "native on a CPU, agnostic elsewhere"
    assert found["extension"]["instruction_set"] == _native.instruction_set()
    assert found["extension"]["supported_here"] == _native.instruction_sets()
    assert found["extension"]["file"] == _native.__file__
    assert found["result_memory"]["smallest_bytes"] == 1 << 18


def test_contents_from_the_build():
    build, found = _native.build, bn.show_config(mode="dicts")
    assert set(_native.instruction_sets()) <= set(build["instruction_sets"])
    assert found["extension"]["compiled"] == build["instruction_sets"]
    assert found["extension"]["compiler"].split()[0] in ("GCC", "Clang")
    assert found["result_memory"]["most_waiting_bytes"] == 512 << 20
    assert found["result_memory"]["longest_wait_seconds"] == 10


def test_threads_that_were_set():
    threads = _native.num_threads()
    try:
        bn.set_num_threads(3)
        assert bn.show_config(mode="dicts")["threads"]["numpy"] == 3
    finally:
        bn.set_num_threads(threads)


def test_frameworks_are_not_imported():
    done = run(
        "import sys, batchnorm as bn\nbn.show_config()\nprint({'torch', 'jax', 'jaxlib', 'flax'} & set(sys.modules))"
    )
    assert done.stdout.splitlines()[-1] == "set()"
    assert "  torch                     2." in done.stdout


def test_packages_that_are_not_installed(monkeypatch, capsys):
    installed = configuration.version
    monkeypatch.setattr(configuration, "version", lambda name: None if name in ("torch", "jax") else installed(name))
    bn.show_config()
    printed = capsys.readouterr().out.splitlines()
    assert '  torch                     not installed; pip install "batchnorm[torch]"' in printed
    assert "  jax                       jax is not installed" in printed
    assert bn.show_config("dicts")["versions"]["torch"] is None


def test_jaxlib_that_is_too_old():
    assert configuration.refusal_of_jaxlib(_native.xla_version) is None
    reason = configuration.refusal_of_jaxlib((0, 99))
    assert reason.startswith("jaxlib has version 0.")
    assert reason.endswith("of XLA's interface, and the extension was compiled for 0.99")


def test_caches_as_linux_tells(tmp_path):
    for index, (level, kind, size) in enumerate(
        [("1", "Data", "48K"), ("1", "Instruction", "32K"), ("2", "Unified", "2048K"), ("3", "Unified", None)]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, value in (("level", level), ("type", kind), ("size", size)):
            if value is not None:
                (folder / name).write_text(f"{value}\n")
    assert configuration.caches(None, tmp_path) == {"L1": 48 << 10, "L2": 2 << 20}
    assert configuration.caches(None, tmp_path / "nowhere") == {}
    l2, l3 = _native.caches()
    assert configuration.caches(_native, tmp_path) == {"L1": 48 << 10, "L2": l2, "L3": l3}


@pytest.mark.skipif(not Path("/sys/devices/system/cpu/cpu0/cache/index2/size").exists(), reason="Linux tells no sizes")
def test_the_caches_of_the_extension_are_those_that_linux_tells():
    told = configuration.caches(None)
    assert _native.caches()[0] == told["L2"]
    assert _native.caches()[1] == told.get("L3", _native.caches()[1])


def test_cache_sizes_by_environment():
    done = run("", "-m", "batchnorm", BATCHNORM_L2="524288", BATCHNORM_L3="12m")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for line in ("BATCHNORM_L2 524288", "BATCHNORM_L3 12m", "L2 512 KiB", "L3 12 MiB"):
        assert line in [" ".join(one.split()) for one in lines]


@pytest.mark.parametrize("size", ["0", "-1", "32 MB", "1.5M", "M", "9999999M"])
def test_cache_size_that_is_none(size):
    """`show_config` reports it, and a call raises the same error."""
    done = run("", "-m", "batchnorm", BATCHNORM_L3=size)
    assert done.returncode == 0, done.stderr
    message = f"BATCHNORM_L3 is {size!r}; it must be a cache size in bytes, or with a unit: 512K, 32M"
    assert message in done.stdout
    call = run("import numpy as np, batchnorm as bn\nbn.forward(np.ones((2, 1), np.float32))", BATCHNORM_L3=size)
    assert call.returncode == 1
    assert f"ValueError: {message}" in call.stderr


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode is 'json'; it must be 'stdout', which prints, or 'dicts'"):
        bn.show_config(mode="json")
