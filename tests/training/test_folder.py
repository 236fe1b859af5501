import errno
import os
import signal
import subprocess
import sys

import pytest

from batchnorm.training import checkpoint, figures
from batchnorm.training.folder import (
    CHECKPOINT,
    LOCK,
    PICTURES,
    REPORT,
    WriteError,
    earlier_files,
    last_folder,
    new_folder,
    next_folder,
    output_folder,
    write_atomically,
    write_together,
)
from batchnorm.training.options import InputError


def test_a_folder_without_files_disappears_again(tmp_path):
    with output_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_stays(tmp_path):
    with output_folder(tmp_path / "a" / "b") as folder:
        (folder / "c").write_text("kept")
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c"]
    assert (tmp_path / "a" / "b" / "c").read_text() == "kept"


def test_a_folder_that_was_there_stays_even_empty(tmp_path):
    with output_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_unusable_folder_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written to"), output_folder(path):
            pytest.fail("an unusable folder was yielded")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_fails_inside_is_no_fault_of_the_folder(tmp_path):
    with pytest.raises(OSError, match="of the body"), output_folder(tmp_path / "a"):
        raise OSError("of the body")
    with pytest.raises(OSError, match="of the body"), new_folder(tmp_path / "a" / "b"):
        raise OSError("of the body")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    with output_folder(tmp_path) as folder:
        message = rf"--output .*: another run \(process {os.getpid()}\) is writing to it; wait .* another folder"
        with pytest.raises(InputError, match=message), output_folder(tmp_path):
            pytest.fail("two runs held one folder")
        assert (folder / LOCK).exists()  # the one that was refused has left it in place
    with output_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_was_killed_holds_nothing(tmp_path):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom batchnorm.training.folder import output_folder\n"
        "with output_folder(Path(sys.argv[1])):\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, tmp_path], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with output_folder(tmp_path) as folder:
        (folder / "a").write_text("written")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_lock_file_that_its_holder_just_removed_is_no_lock(tmp_path, monkeypatch):
    """Between opening the file and locking it, the earlier holder may have removed it."""
    import fcntl

    lock, opened = fcntl.flock, []

    def remove_first(descriptor, operation):
        if not opened:
            (tmp_path / LOCK).unlink()
        opened.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with output_folder(tmp_path):
        assert len(opened) == 2
        with pytest.raises(InputError, match="another run"), output_folder(tmp_path):
            pytest.fail("two runs held one folder")


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def fail(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", fail)
    with pytest.raises(InputError, match=r"cannot be written to \(No locks available\)"), output_folder(tmp_path / "a"):
        pytest.fail("an unlocked folder was yielded")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, lambda temporary: temporary.write_text("first"))

    def fail(temporary):
        temporary.write_text("sec")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(WriteError) as caught:
        write_atomically(path, fail)
    assert str(caught.value) == f"cannot write {path} (No space left on device)"
    assert path.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_files_that_belong_together_are_replaced_together(tmp_path):
    def write(text):
        return lambda path: path.write_text(text)

    def fail(path):
        raise OSError("no reason given")

    write_together(tmp_path, {"a": write("first"), "b": write("first")})
    with pytest.raises(WriteError) as caught:
        write_together(tmp_path, {"a": write("second"), "b": fail})
    assert str(caught.value) == f"cannot write {tmp_path / 'b'} (no reason given)"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "first", "b": "first"}
    write_together(tmp_path, {"a": write("third"), "b": write("third")})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "third", "b": "third"}


def test_the_names_of_a_run_are_those_of_its_files():
    assert checkpoint.CHECKPOINT == CHECKPOINT
    assert tuple(f"{figure.name}.png" for figure in figures.FIGURES) == PICTURES


@pytest.mark.parametrize("name", [CHECKPOINT, *REPORT])
def test_any_file_of_a_run_counts_as_one(tmp_path, name):
    assert earlier_files(tmp_path) == []
    (tmp_path / "notes.txt").write_text("of the user")
    assert earlier_files(tmp_path) == []
    (tmp_path / name).write_text("of a run")
    assert earlier_files(tmp_path) == [name]


def test_folders_are_numbered_after_all_that_hold_a_run(tmp_path):
    first = tmp_path / "report"
    assert next_folder(first) == last_folder(first) == first
    first.mkdir()
    assert next_folder(first) == first  # without a run
    (first / CHECKPOINT).write_text("")
    assert next_folder(first) == tmp_path / "report-2"
    assert last_folder(first) == first
    for name in ("report-3", "report-10", "report-x", "report-012", "other-40"):
        (tmp_path / name).mkdir()
        (tmp_path / name / CHECKPOINT).write_text("")
    (tmp_path / "report-11").mkdir()
    assert next_folder(first) == tmp_path / "report-11"
    assert last_folder(first) == tmp_path / "report-10"
    assert next_folder(tmp_path / "missing" / "report") == tmp_path / "missing" / "report"
