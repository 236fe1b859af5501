import errno
import gzip
import json
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import batchnorm
from batchnorm import cli
from batchnorm.cli import app
from batchnorm.training.folder import output_folder

QUICK = ("--framework", "torch", "--images", "48", "--batch-size", "16")
FILES = {"checkpoint.safetensors", "metrics.json", "report.html"}


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments, **options):
    """A process of its own, for what needs signals or a fresh interpreter."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "batchnorm.cli", *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
    )


def without_seconds(path):
    metrics = json.loads(path.read_text("utf-8"))
    text = json.dumps([metrics["histories"], metrics["summary"]])
    return re.sub(r'"seconds": [0-9.e-]+', "", text)


def test_version_and_help():
    assert invoke("--version").stdout == f"batchnorm {batchnorm.__version__}\n"
    result = invoke("train", "--help")
    assert result.exit_code == 0
    assert "--resume" in result.stdout


def test_the_command_line_starts_without_any_framework():
    code = (
        "import sys, batchnorm.cli; print([m for m in ('jax', 'torch', 'sklearn', 'matplotlib') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("framework", "other"), [("torch", "jax"), ("jax", "torch")])
def test_only_the_framework_chosen_is_imported(tmp_path, framework, other):
    code = (
        "import sys\nfrom batchnorm.training.network import build\nfrom batchnorm.training.options import Options\n"
        f"build(Options(framework={framework!r}), batch_norm=True)\nprint({other!r} in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_reports_and_its_continuation_equals_an_unbroken_one(tmp_path, request):
    unbroken = invoke("train", *QUICK, "--epochs", 2, "--output", tmp_path / "a", "--json")
    assert unbroken.exit_code == 0, unbroken.output
    results = json.loads(unbroken.stdout)
    assert results["complete"] is True
    assert results["epochs_done"] == 2
    assert results["command"] == "batchnorm train --framework torch --epochs 2 --batch-size 16 --images 48"
    assert set(results["summary"]) == {"plain", "batch_norm"}
    assert results["comparison"]["test_images"] == 359
    assert results["comparison"]["better"] is None
    assert ": equal within noise (difference " in results["finding"]
    assert {path.name for path in (tmp_path / "a").iterdir()} > FILES

    request.getfixturevalue("undrawn")
    first = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path / "b")
    assert first.exit_code == 0, first.output
    assert "test accuracy" in first.stdout
    assert "95 % interval" in first.stdout
    assert "With batch norm LeNet gets" in first.stdout
    assert "report.html" not in first.stdout
    assert f"The report is {tmp_path / 'b' / 'report.html'}" in first.stderr
    second = invoke("train", *QUICK, "--epochs", 2, "--output", tmp_path / "b", "--resume")
    assert second.exit_code == 0, second.output
    assert "epoch 2/2" in second.stderr
    assert "epoch 1/2" not in second.stderr
    assert without_seconds(tmp_path / "a" / "metrics.json") == without_seconds(tmp_path / "b" / "metrics.json")


BAD = {
    "activation": (("--activation", "sigmoide"), "--activation is sigmoide; it must be one of sigmoid"),
    "framework": (("--framework", "tensorflow"), "--framework is tensorflow; it must be one of jax, torch"),
    "batch size of 1": (("--batch-size", 1), "--batch-size is 1; it must be at least 2"),
    "batch too large": (("--framework", "torch", "--batch-size", 5000), "there are only 1438 images"),
    "no such folder": (("--data", "/does/not/exist"), "--data /does/not/exist: no such folder"),
    "both sets": (("--data", ".", "--dataset", "digits"), "exclude each other"),
    "both ways on": (("--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
    "nothing to resume": (("--framework", "torch", "--resume"), "leave out --resume to start a new run"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_exit_code_2_and_no_file(tmp_path, case):
    arguments, message = BAD[case]
    result = invoke("train", *arguments, "--output", tmp_path / "new" / "report")
    assert result.exit_code == 2
    assert result.stdout == ""
    *progress, line = result.stderr.splitlines()
    assert line.startswith("batchnorm train: ")
    assert message in line
    assert progress in ([], ["digits: 1,438 images to train on, 359 to test"])
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_output_folder_is_found_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    result = invoke("train", *QUICK, "--output", tmp_path / "file")
    assert result.exit_code == 2
    assert "cannot be written to" in result.stderr
    assert "epoch" not in result.stderr
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("damage", ["truncated", "wrong magic", "counts"])
def test_damaged_images_are_one_line_and_exit_code_2(tmp_path, damage):
    images = struct.pack(">BBBBIII", 0, 0, 8, 3, 40, 28, 28) + bytes(40 * 784)
    labels = struct.pack(">BBBBI", 0, 0, 8, 1, 40) + bytes(np.arange(40, dtype=np.uint8) % 10)
    if damage == "truncated":
        images = images[:-1]
    elif damage == "wrong magic":
        images = b"\x00\x00\x0d\x03" + images[4:]
    else:
        labels = struct.pack(">BBBBI", 0, 0, 8, 1, 39) + labels[8:-1]
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(labels)
    result = invoke("train", "--data", tmp_path, "--output", tmp_path / "report")
    message = {"truncated": "cut short", "wrong magic": "starts with 00 00 0d 03", "counts": "40 images, but"}[damage]
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "report").exists()


@pytest.mark.usefixtures("undrawn")
def test_a_checkpoint_of_other_options_is_left_alone(tmp_path):
    assert invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path).exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    result = invoke("train", *QUICK, "--epochs", 2, "--output", tmp_path, "--resume", "--seed", 1)
    assert result.exit_code == 2
    assert "--seed is 1, the checkpoint's is 0" in result.stderr
    other_images = [*QUICK[:3], "64", *QUICK[4:]]
    result = invoke("train", *other_images, "--epochs", 2, "--output", tmp_path, "--resume")
    assert result.exit_code == 2
    assert "trained on other images" in result.stderr
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.usefixtures("undrawn")
def test_a_run_is_never_replaced_unasked(tmp_path):
    assert invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path).exit_code == 0
    before = contents(tmp_path)
    again = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path)
    assert again.exit_code == 2
    assert again.stderr.splitlines() == [  # nothing was loaded or computed
        f"batchnorm train: --output {tmp_path}: holds an earlier run (checkpoint.safetensors and 7 more); continue it "
        "with --resume, keep it and choose another --output, or replace it with --overwrite"
    ]
    assert contents(tmp_path) == before
    asked = invoke("train", *QUICK, "--epochs", 1, "--seed", 1, "--output", tmp_path, "--overwrite")
    assert asked.exit_code == 0, asked.output
    assert contents(tmp_path).keys() == before.keys()
    assert json.loads((tmp_path / "metrics.json").read_text("utf-8"))["options"]["seed"] == 1


@pytest.mark.usefixtures("undrawn")
def test_the_default_folder_is_a_new_one_each_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "batchnorm-report"
    earlier.mkdir()
    (earlier / "report.html").write_text("an earlier page")
    second = invoke("train", *QUICK, "--epochs", 1)
    assert second.exit_code == 0, second.output
    assert second.stderr.endswith(f"The report is {Path('batchnorm-report-2', 'report.html')}\n")
    resumed = invoke("train", *QUICK, "--epochs", 2, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "batchnorm-report-2" in resumed.stderr
    assert json.loads((tmp_path / "batchnorm-report-2" / "metrics.json").read_text("utf-8"))["epochs_done"] == 2
    assert contents(earlier) == {"report.html": b"an earlier page"}
    assert "the default is a new one each time" in " ".join(invoke("train", "--help").stdout.split())


def test_a_second_run_in_a_folder_is_refused_before_it_computes(tmp_path):
    with output_folder(tmp_path / "report"):
        for options in ((), ("--resume",), ("--overwrite",)):
            result = invoke("train", *QUICK, "--output", tmp_path / "report", *options)
            assert result.exit_code == 2
            (line,) = result.stderr.splitlines()
            assert f"another run (process {os.getpid()}) is writing to it; wait until it ends" in line
    assert list(tmp_path.iterdir()) == []


def full(number, monkeypatch, of):
    """Let writing the file called `of` fail."""

    def failing(write):
        def write_or_fail(path, *arguments):
            if path.name == of:
                raise OSError(number, os.strerror(number))
            return write(path, *arguments)

        return write_or_fail

    for name in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, name, failing(getattr(Path, name)))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch, number):
    (tmp_path / "report.html").write_text("an earlier page")
    (tmp_path / "checkpoint.safetensors").write_bytes(b"an earlier checkpoint")
    before = contents(tmp_path)
    full(number, monkeypatch, "checkpoint.safetensors")
    result = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"batchnorm train: cannot write {tmp_path / 'checkpoint.safetensors'} ({os.strerror(number)}); the earlier "
        "run there is unchanged"
    )
    assert contents(tmp_path) == before
    result = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path / "new")
    assert result.stderr.endswith(f"({os.strerror(number)}); nothing was left behind\n")
    assert contents(tmp_path) == before  # read_bytes of a folder would fail: there is none


@pytest.mark.usefixtures("undrawn")
def test_a_disk_that_fills_up_keeps_the_checkpoint_and_the_report_is_made_later(tmp_path, monkeypatch):
    arguments = ("train", *QUICK, "--epochs", 1, "--output", tmp_path / "a")
    with monkeypatch.context() as context:
        full(errno.ENOSPC, context, "report.html")
        result = invoke(*arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"batchnorm train: cannot write {tmp_path / 'a' / 'report.html'} (No space left on device); the checkpoint of "
        f"1 epoch is kept: make {tmp_path / 'a'} writable or free some space, and continue with --resume"
    )
    assert contents(tmp_path / "a").keys() == {"checkpoint.safetensors"}
    later = invoke(*arguments, "--resume")
    assert later.exit_code == 0, later.output
    assert contents(tmp_path / "a").keys() > FILES


@pytest.mark.usefixtures("undrawn")
def test_results_that_cannot_be_printed_are_in_a_file(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_show", fail)
    result = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path, "--json")
    assert result.exit_code == 1
    message = f"cannot write the results to stdout (No space left on device); they are in {tmp_path / 'metrics.json'}"
    assert message in result.stderr


class TestProgram:
    """The name of the program in advice is one that the user's shell can run."""

    @pytest.fixture
    def script(self, tmp_path):
        script = tmp_path / "a b" / "batchnorm"
        script.parent.mkdir()
        script.write_text("#!/bin/sh\n")
        script.chmod(0o755)
        return script

    def test_on_the_path(self, script, monkeypatch):
        monkeypatch.setenv("PATH", str(script.parent))
        monkeypatch.setattr(sys, "argv", [str(script)])
        assert shutil.which("batchnorm") == str(script)
        assert cli._program() == "batchnorm"

    @pytest.mark.parametrize("is_another_there", [False, True])
    def test_in_an_environment_that_is_not_active(self, script, tmp_path, monkeypatch, is_another_there):
        if is_another_there:
            shutil.copy(script, tmp_path / "batchnorm")
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["a b/batchnorm"])
        assert cli._program() == "'a b/batchnorm'"

    def test_as_a_module(self, script, monkeypatch):
        monkeypatch.setenv("PATH", str(script.parent))
        monkeypatch.setattr(sys, "argv", [cli.__file__])
        assert cli._program() == f"{shlex.quote(sys.executable)} -m batchnorm.cli"


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child process there")
class TestInterrupt:
    @pytest.mark.usefixtures("undrawn")  # in this process
    def test_ctrl_c_leaves_a_report_and_the_way_on(self, tmp_path):
        process = start("train", *QUICK, "--epochs", 2000, "--output", tmp_path / "a b")
        checkpoint = tmp_path / "a b" / "checkpoint.safetensors"
        wait_for(checkpoint.exists, process)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
        assert process.returncode == 130, stderr
        assert "Traceback" not in stderr
        metrics = json.loads((tmp_path / "a b" / "metrics.json").read_text("utf-8"))
        done = metrics["epochs_done"]
        assert 1 <= done < 2000
        assert not metrics["complete"]
        assert "With batch norm LeNet gets" in stdout
        command = f"{shlex.quote(sys.executable)} -m batchnorm.cli train --framework torch"
        assert f"stopped after {done} of 2000 epochs; continue with: {command}" in stderr
        assert f"--output '{tmp_path / 'a b'}' --resume" in stderr
        assert f"stopped after {done} of 2000 epochs" in (tmp_path / "a b" / "report.html").read_text("utf-8")
        assert not list((tmp_path / "a b").glob(".*"))

        resumed = invoke("train", *QUICK, "--epochs", done + 1, "--output", tmp_path / "a b", "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert json.loads((tmp_path / "a b" / "metrics.json").read_text("utf-8"))["epochs_done"] == done + 1

    @pytest.mark.parametrize("moment", ["while it imports", "before the first epoch"])
    def test_ctrl_c_before_the_first_epoch_leaves_nothing(self, tmp_path, monkeypatch, moment):
        if moment == "while it imports":
            monkeypatch.setenv("PYTHONPROFILEIMPORTTIME", "1")  # prints each import to stderr
        images = ("--framework", "torch", "--batch-size", "2", "--epochs", "2")
        process = start("train", *images, "--output", tmp_path / "report")
        if moment == "while it imports":
            assert any(line.split()[-1] == "batchnorm.training.download" for line in process.stderr)
        else:
            wait_for((tmp_path / "report").exists, process)
        process.send_signal(signal.SIGINT)
        try:
            stdout, stderr = process.communicate(timeout=4)
        except subprocess.TimeoutExpired:  # it may strike in an import that swallows everything
            process.send_signal(signal.SIGINT)
            stdout, stderr = process.communicate(timeout=60)
        # A shell shows 130 for both: CPython ends itself by the signal where the interrupt struck inside an exec().
        assert process.returncode in {130, -signal.SIGINT}, stderr
        assert stdout == ""
        assert "Traceback" not in stderr
        said = [line for line in stderr.splitlines() if not line.startswith("import time:")]
        assert said[-1].startswith("batchnorm train: stopped")
        assert list(tmp_path.iterdir()) == []


def wait_for(condition, process, seconds=60):
    limit = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.02)


def test_the_module_can_be_run(tmp_path):
    process = start("--version", cwd=tmp_path)
    assert process.communicate(timeout=30)[0] == f"batchnorm {batchnorm.__version__}\n"
    assert process.returncode == 0
    assert Path(batchnorm.__file__).name == "__init__.py"
