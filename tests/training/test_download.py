import errno
import gzip
import hashlib
import http.server
import os
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from batchnorm.training import download
from batchnorm.training.download import DownloadError, cache_folder, fetch, load_fashion_mnist

CONTENT = bytes(range(256)) * 1000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/short":  # promises more than it sends
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:1000])
        else:
            super().do_GET()


@pytest.fixture
def server(tmp_path):
    """A server of the folder `tmp_path / "served"` on this machine; yields its address."""
    served = tmp_path / "served"
    served.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), lambda *arguments: Handler(*arguments, directory=str(served))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def ignore(name, done, total):
    pass


def test_a_file_is_fetched_once_with_its_progress(server, tmp_path):
    (tmp_path / "served" / "a").write_bytes(CONTENT)
    target = tmp_path / "cache" / "a"
    seen = []
    fetch(server + "a", target, MD5, lambda *progress: seen.append(progress))
    assert target.read_bytes() == CONTENT
    assert seen[-1] == ("a", len(CONTENT), len(CONTENT))
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    (tmp_path / "served" / "a").unlink()
    fetch(server + "a", target, MD5, ignore)  # served from the cache
    assert [path.name for path in target.parent.iterdir()] == ["a"]


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    (tmp_path / "served" / "a").write_bytes(CONTENT)
    target = tmp_path / "a"
    target.write_bytes(CONTENT[:-1])
    fetch(server + "a", target, MD5, ignore)
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("name", "message"), [("wrong", "has MD5 .* the published one is"), ("short", "MD5|cannot fetch"), ("none", "404")]
)
def test_a_failed_download_leaves_nothing(server, tmp_path, name, message):
    (tmp_path / "served" / "wrong").write_bytes(CONTENT + b"!")
    target = tmp_path / "cache" / "a"
    with pytest.raises(DownloadError, match=message):
        fetch(server + name, target, MD5, ignore)
    assert not target.parent.exists()


def test_an_interrupted_download_leaves_nothing(server, tmp_path):
    (tmp_path / "served" / "a").write_bytes(CONTENT)

    def interrupt(name, done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch(server + "a", tmp_path / "cache" / "a", MD5, interrupt)
    assert not (tmp_path / "cache").exists()


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(DownloadError) as caught:
        load_fashion_mnist(ignore, base_url="http://127.0.0.1:9/")  # port 9: nothing listens there
    message = str(caught.value)
    assert "t10k-labels-idx1-ubyte.gz" in message
    assert str(tmp_path / "batchnorm" / "fashion-mnist") in message
    assert "--data DIR" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_file_that_cannot_be_stored_is_named_and_leaves_nothing(server, tmp_path, monkeypatch, number):
    (tmp_path / "served" / "a").write_bytes(CONTENT)
    target = tmp_path / "cache" / "deeper" / "a"

    def fail(path, content):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(DownloadError) as caught:
        fetch(server + "a", target, MD5, ignore)
    assert str(caught.value).startswith(f"cannot write {target} ({os.strerror(number)}); nothing was kept")
    assert "connection" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "served" / "a").write_bytes(CONTENT)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DownloadError, match=r"cannot write .*file/cache/a \(Not a directory\)"):
        fetch(server + "a", tmp_path / "file" / "cache" / "a", MD5, ignore)


def test_all_four_files_become_a_data_set(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checksums = {}
    for name in download.FASHION_MNIST_MD5:
        count = 30 if name.startswith("train") else 20
        shape = (count, 28, 28) if "images" in name else (count,)
        content = struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + bytes(int(np.prod(shape)))
        (tmp_path / "served" / name).write_bytes(gzip.compress(content))
        checksums[name] = hashlib.md5((tmp_path / "served" / name).read_bytes()).hexdigest()
    monkeypatch.setattr(download, "FASHION_MNIST_MD5", checksums)
    data = load_fashion_mnist(ignore, base_url=server)
    assert data.name == "fashion-mnist"
    assert (len(data.train_labels), len(data.test_labels)) == (30, 20)


@pytest.mark.parametrize("value", ["", "relative/folder", None])
def test_the_cache_is_at_home_unless_told_otherwise(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
    assert cache_folder() == Path.home() / ".cache" / "batchnorm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder() == Path("/elsewhere/batchnorm")
