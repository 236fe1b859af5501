import pytest

from batchnorm.training.folder import output_folder, write_atomically
from batchnorm.training.options import InputError


def test_a_folder_without_files_disappears_again(tmp_path):
    with output_folder(tmp_path / "a" / "b") as folder:
        assert folder.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_stays(tmp_path):
    with output_folder(tmp_path / "a" / "b") as folder:
        (folder / "c").write_text("kept")
    assert (tmp_path / "a" / "b" / "c").read_text() == "kept"


def test_a_folder_that_was_there_stays_even_empty(tmp_path):
    with output_folder(tmp_path):
        pass
    assert tmp_path.is_dir()


def test_an_unusable_folder_is_named_and_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for path in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "new" / ("x" * 300)):
        with pytest.raises(InputError, match="cannot be written to"), output_folder(path):
            pytest.fail("an unusable folder was yielded")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    write_atomically(path, lambda temporary: temporary.write_text("first"))

    def fail(temporary):
        temporary.write_text("sec")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fail)
    assert path.read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
