"""The images of a run: their source, their scaling, and the split into training and test set."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from batchnorm.training.idx import read_idx
from batchnorm.training.options import InputError

SIDE = 28  # of the network's input, in pixels
CLASSES = 10
TEST_SHARE = 0.2  # for a data set without its own test set

Floats = NDArray[np.float32]
Labels = NDArray[np.int32]


@dataclass(frozen=True)
class ImageSet:
    """Images `(N, 28, 28)` of float32 in [0, 1] and labels `(N,)` in 0..9, for training and for testing.

    `source` and `split` are sentences for the report. Pixels are divided by the largest value the format can hold (16
    for the digits, 255 for IDX) and not standardized, so the input of the first layer does not depend on the split.
    """

    name: str
    source: str
    split: str
    train_images: Floats
    train_labels: Labels
    test_images: Floats
    test_labels: Labels

    def limited(self, images: int | None) -> "ImageSet":
        """The same set with only its first `images` training images; `None` keeps all."""
        if images is None:
            return self
        return replace(self, train_images=self.train_images[:images], train_labels=self.train_labels[:images])

    def fingerprint(self) -> str:
        """SHA-256 of the images and labels, split included: equal exactly if a run may be continued."""
        digest = hashlib.sha256()
        for part in (self.train_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr(part.shape).encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def load_digits() -> ImageSet:
    """The 1,797 scans of handwritten digits bundled with scikit-learn, 8x8 pixels enlarged to 28x28.

    Writers appear in the training and in the test set alike, as in every random split of these scans.
    """
    import sklearn
    from sklearn.datasets import load_digits as bundled_digits

    digits = bundled_digits()
    images = enlarge((digits.images / 16).astype(np.float32))
    return _split_set(
        "digits",
        "Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998), "
        f"the 1,797 scans bundled with scikit-learn {sklearn.__version__}, enlarged from 8x8 to 28x28 pixels",
        images,
        digits.target.astype(np.int32),
    )


def load_folder(folder: Path, name: str | None = None, source: str | None = None) -> ImageSet:
    """Load MNIST-like IDX files from a folder, gzipped or not, under their usual names.

    Files `train-*` and `t10k-*` keep their roles; if only one of the two is present, it is split.

    Raises:
        InputError: the folder or its files are missing, damaged, or disagree with each other.
    """
    if not folder.exists():
        raise InputError(f"--data {folder}: no such folder; pass the folder that holds the IDX files")
    if not folder.is_dir():
        raise InputError(f"--data {folder}: a file; pass the folder that holds the IDX files, here {folder.parent}")
    sets = {prefix: _read_pair(folder, prefix) for prefix in ("train", "t10k")}
    found = {prefix: pair for prefix, pair in sets.items() if pair is not None}
    name = name or folder.resolve().name
    source = source or f"IDX files ({' and '.join(found)}) of the folder {name}"
    if not found:
        raise InputError(
            f"--data {folder}: no IDX files; expected train-images-idx3-ubyte and train-labels-idx1-ubyte, or the same "
            "with t10k, each also with .gz"
        )
    if len(found) == 1:
        return _split_set(name, source, *next(iter(found.values())))
    return ImageSet(name, source, "the data set's own", *found["train"], *found["t10k"])


def enlarge(images: Floats) -> Floats:
    """Square images `(N, n, n)` enlarged to 28x28 by bilinear interpolation between pixel centers.

    Example:
        >>> enlarge(np.ones((2, 8, 8), np.float32)).shape
        (2, 28, 28)
    """
    n = images.shape[-1]
    position = np.clip((np.arange(SIDE) + 0.5) * n / SIDE - 0.5, 0, n - 1)
    left = np.minimum(position.astype(int), n - 2)
    weights = np.zeros((SIDE, n))
    weights[np.arange(SIDE), left] = 1 - (position - left)
    weights[np.arange(SIDE), left + 1] = position - left
    enlarged: Floats = np.einsum("ai,nij,bj->nab", weights, images, weights, optimize=True).astype(np.float32)
    return enlarged


def stratified_test(labels: Labels) -> NDArray[np.bool_]:
    """Mask of the test images: a fifth of every class, the same for every run whatever its seed.

    Example:
        >>> int(stratified_test(np.repeat(np.arange(10, dtype=np.int32), 20)).sum())
        40
    """
    generator = np.random.default_rng(0)
    tests = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        tests[members[: max(1, round(TEST_SHARE * len(members)))]] = True
    return tests


def _split_set(name: str, source: str, images: Floats, labels: Labels) -> ImageSet:
    tests = stratified_test(labels)
    if tests.all():
        raise InputError(f"{name}: {len(labels)} images are too few to set a fifth of every class aside for testing")
    split = "a random fifth of every class is the test set, the same for every seed"
    return ImageSet(name, source, split, images[~tests], labels[~tests], images[tests], labels[tests])


def _read_pair(folder: Path, prefix: str) -> tuple[Floats, Labels] | None:
    """The images and labels from the files of this prefix, or None if both are absent."""
    image_path = _find(folder, f"{prefix}-images", "idx3-ubyte")
    label_path = _find(folder, f"{prefix}-labels", "idx1-ubyte")
    if image_path is None and label_path is None:
        return None
    if image_path is None or label_path is None:
        present, missing = (image_path, "labels") if image_path else (label_path, "images")
        raise InputError(f"{present}: its {missing} are missing from the folder; put {prefix}-{missing}-* beside it")
    pixels = read_idx(image_path, ndim=3)
    labels = read_idx(label_path, ndim=1)
    if len(pixels) != len(labels):
        raise InputError(f"{image_path} holds {len(pixels)} images, but {label_path} {len(labels)} labels")
    if pixels.shape[1:] != (SIDE, SIDE):
        raise InputError(f"{image_path}: images of {pixels.shape[1]}x{pixels.shape[2]} pixels; the network takes 28x28")
    if not len(labels):
        raise InputError(f"{image_path}: holds no images")
    if labels.max() >= CLASSES:
        raise InputError(f"{label_path}: label {labels.max()} at index {labels.argmax()}; labels go from 0 to 9")
    return (pixels / np.float32(255)).astype(np.float32), labels.astype(np.int32)


def _find(folder: Path, stem: str, kind: str) -> Path | None:
    """The file of that stem under one of the names in use; an unpacked one is preferred, as faster to read."""
    names = [f"{stem}{joint}{kind}{suffix}" for suffix in ("", ".gz") for joint in ("-", ".")]
    return next((folder / name for name in names if (folder / name).exists()), None)
