import gzip
import json
import os
import re
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
from batchnorm.cli import app

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


def test_a_run_reports_and_its_continuation_equals_an_unbroken_one(tmp_path):
    unbroken = invoke("train", *QUICK, "--epochs", 2, "--output", tmp_path / "a", "--json")
    assert unbroken.exit_code == 0, unbroken.output
    results = json.loads(unbroken.stdout)
    assert results["complete"] is True
    assert results["epochs_done"] == 2
    assert results["command"] == "batchnorm train --framework torch --epochs 2 --batch-size 16 --images 48"
    assert set(results["summary"]) == {"plain", "batch_norm"}
    assert {path.name for path in (tmp_path / "a").iterdir()} > FILES

    first = invoke("train", *QUICK, "--epochs", 1, "--output", tmp_path / "b")
    assert first.exit_code == 0, first.output
    assert "test accuracy" in first.stdout
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


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for a child process there")
class TestInterrupt:
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
        assert f"stopped after {done} of 2000 epochs; continue with: batchnorm train --framework torch" in stderr
        assert f"--output '{tmp_path / 'a b'}' --resume" in stderr
        assert f"stopped after {done} of 2000 epochs" in (tmp_path / "a b" / "report.html").read_text("utf-8")
        assert not list((tmp_path / "a b").glob(".*"))

        resumed = invoke("train", *QUICK, "--epochs", done + 1, "--output", tmp_path / "a b", "--resume")
        assert resumed.exit_code == 0, resumed.output
        assert json.loads((tmp_path / "a b" / "metrics.json").read_text("utf-8"))["epochs_done"] == done + 1

    @pytest.mark.parametrize("moment", ["at once", "before the first epoch"])
    def test_ctrl_c_before_the_first_epoch_leaves_nothing(self, tmp_path, moment):
        images = ("--framework", "torch", "--batch-size", "2", "--epochs", "2")
        process = start("train", *images, "--output", tmp_path / "report")
        if moment == "before the first epoch":
            wait_for((tmp_path / "report").exists, process)
            time.sleep(0.3)
        else:
            time.sleep(0.6)
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
        assert stderr.splitlines()[-1].startswith("batchnorm train: stopped")
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
