"""Fashion-MNIST, fetched once into a cache and checked against its published checksums."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from batchnorm.training.data import ImageSet, load_folder
from batchnorm.training.folder import WriteError, new_folder, write_atomically

FASHION_MNIST_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"

# MD5 of each file, from the README of github.com/zalandoresearch/fashion-mnist.
FASHION_MNIST_MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
TIMEOUT = 30  # seconds without data

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, the bytes so far and the total, if the server reports it."""


class DownloadError(RuntimeError):
    """The files could not be fetched or are not the published ones; the message says what to do."""


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/batchnorm`, or `~/.cache/batchnorm` if the variable is unset, empty or relative."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "batchnorm"


def load_fashion_mnist(progress: Progress, base_url: str = FASHION_MNIST_URL) -> ImageSet:
    """Load Fashion-MNIST from the cache, downloading missing files first.

    Raises:
        DownloadError: no connection, or a file whose checksum is not the published one.
    """
    folder = cache_folder() / "fashion-mnist"
    for name, md5 in FASHION_MNIST_MD5.items():
        fetch(base_url + name, folder / name, md5, progress)
    source = "Fashion-MNIST (H. Xiao, K. Rasul and R. Vollgraf, 2017), the official files of Zalando Research"
    return load_folder(folder, "fashion-mnist", source)


def fetch(url: str, path: Path, md5: str, progress: Progress) -> None:
    """Download `url` to `path`, unless the file is there already.

    Nothing is written, not even a folder, before all bytes have arrived (30 MB at most) and the checksum matches: an
    interrupted or corrupt download leaves nothing behind. The publisher provides MD5 sums, which detect damage but do
    not protect against an attacker.

    Raises:
        DownloadError: the file cannot be fetched or stored, or its MD5 is another.
    """
    if path.exists() and _md5(path.read_bytes()) == md5:
        return
    content = _download(url, path, progress)
    if (found := _md5(content)) != md5:
        raise DownloadError(f"{url} has MD5 {found}, the published one is {md5}; nothing was kept, try again later")
    try:
        with new_folder(path.parent):
            write_atomically(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        reason = error if isinstance(error, WriteError) else f"cannot write {path} ({error.strerror or error})"
        raise DownloadError(
            f"{reason}; nothing was kept. Make room there, or set XDG_CACHE_HOME to another folder"
        ) from None


def _download(url: str, path: Path, progress: Progress) -> bytes:
    """Download the bytes at `url`; `path` is their destination, for progress and messages."""
    content = bytearray()
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0) or None
            while piece := response.read(1 << 16):
                content += piece
                progress(path.name, len(content), total)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        if isinstance(error, urllib.error.HTTPError):
            error.close()  # it holds the connection
        reason = error.reason if type(error) is urllib.error.URLError else error
        raise DownloadError(
            f"cannot fetch {url} ({reason}); without a connection put {', '.join(FASHION_MNIST_MD5)} into "
            f"{path.parent}, or pass --data DIR with MNIST-like files, or leave out --dataset to train on the bundled "
            "digits"
        ) from None
    return bytes(content)


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()
