import dataclasses

import numpy as np
import pytest

from batchnorm.training.data import enlarge, load_folder, stratified_test
from batchnorm.training.options import InputError

PIXELS = np.random.default_rng(7).integers(0, 256, (60, 28, 28))
LABELS = np.arange(60) % 10


def write_set(write_idx, prefix, suffix="", joint="-"):
    write_idx(f"{prefix}-images{joint}idx3-ubyte{suffix}", PIXELS)
    write_idx(f"{prefix}-labels{joint}idx1-ubyte{suffix}", LABELS)


def test_the_digits_are_all_there_and_split_by_class(digits):
    assert len(digits.train_labels) + len(digits.test_labels) == 1797
    assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (28, 28)
    assert digits.train_images.dtype == np.float32
    assert digits.train_images.min() == 0
    assert digits.train_images.max() == 1
    whole = np.bincount(np.concatenate([digits.train_labels, digits.test_labels]))
    np.testing.assert_array_equal(np.bincount(digits.test_labels), np.round(0.2 * whole))


def test_no_digit_trains_and_tests(digits):
    train = {image.tobytes() for image in digits.train_images}
    assert not any(image.tobytes() in train for image in digits.test_images)


def test_enlarging_keeps_planes_and_constants():
    rows, columns = np.mgrid[0:8, 0:8].astype(np.float32)
    plane = enlarge(np.stack([3 * rows - 2 * columns + 1, np.full((8, 8), 5, np.float32)]))
    position = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    inside = (position >= 0) & (position <= 7)
    expected = 3 * position[:, None] - 2 * position[None, :] + 1
    np.testing.assert_allclose(plane[0][np.ix_(inside, inside)], expected[np.ix_(inside, inside)], atol=1e-5)
    np.testing.assert_allclose(plane[1], 5, rtol=1e-6)


def test_the_split_takes_a_fifth_of_every_class_and_is_always_the_same():
    labels = np.repeat(np.arange(10, dtype=np.int32), [10, 20, 30, 5, 5, 5, 10, 10, 10, 15])
    tests = stratified_test(labels)
    np.testing.assert_array_equal(np.bincount(labels[tests]), [2, 4, 6, 1, 1, 1, 2, 2, 2, 3])
    np.testing.assert_array_equal(tests, stratified_test(labels))


@pytest.mark.parametrize("joint", ["-", "."])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_folder_with_both_sets_keeps_their_roles(write_idx, tmp_path, suffix, joint):
    write_set(write_idx, "train", suffix, joint)
    write_idx(f"t10k-images{joint}idx3-ubyte{suffix}", PIXELS[:20])
    write_idx(f"t10k-labels{joint}idx1-ubyte{suffix}", LABELS[:20])
    data = load_folder(tmp_path)
    np.testing.assert_array_equal(data.train_images, (PIXELS / 255).astype(np.float32))
    np.testing.assert_array_equal(data.test_labels, LABELS[:20])


@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_a_single_set_is_split(write_idx, tmp_path, prefix):
    write_set(write_idx, prefix)
    data = load_folder(tmp_path)
    assert (len(data.train_labels), len(data.test_labels)) == (50, 10)
    np.testing.assert_array_equal(np.bincount(data.test_labels), np.ones(10))


def test_what_disagrees_or_is_missing_is_named(write_idx, tmp_path):
    with pytest.raises(InputError, match="no IDX files; expected train-images-idx3-ubyte"):
        load_folder(tmp_path)
    with pytest.raises(InputError, match="missing: no such folder; pass the folder that holds the IDX files"):
        load_folder(tmp_path / "missing")
    images = write_idx("train-images-idx3-ubyte", PIXELS)
    with pytest.raises(InputError) as caught:
        load_folder(images)
    assert str(caught.value) == f"--data {images}: a file; pass the folder that holds the IDX files, here {tmp_path}"
    with pytest.raises(InputError, match="its labels are missing"):
        load_folder(tmp_path)
    write_idx("train-labels-idx1-ubyte", LABELS[:-1])
    with pytest.raises(InputError, match=r"holds 60 images, but .* 59 labels"):
        load_folder(tmp_path)
    write_idx("train-labels-idx1-ubyte", np.where(np.arange(60) == 13, 10, LABELS))
    with pytest.raises(InputError, match="label 10 at index 13; labels go from 0 to 9"):
        load_folder(tmp_path)
    write_idx("train-labels-idx1-ubyte", LABELS)
    write_idx(images.name, PIXELS[:, :, :27])
    with pytest.raises(InputError, match="28x27 pixels; the network takes 28x28"):
        load_folder(tmp_path)
    write_idx(images.name, PIXELS[:0])
    write_idx("train-labels-idx1-ubyte", LABELS[:0])
    with pytest.raises(InputError, match="holds no images"):
        load_folder(tmp_path)
    write_idx(images.name, PIXELS[:3])
    write_idx("train-labels-idx1-ubyte", LABELS[:3])
    with pytest.raises(InputError, match="3 images are too few"):
        load_folder(tmp_path)


def test_the_limit_keeps_the_first_training_images(digits):
    few = digits.limited(7)
    np.testing.assert_array_equal(few.train_labels, digits.train_labels[:7])
    assert len(few.test_labels) == len(digits.test_labels)
    assert digits.limited(None) is digits


def test_the_fingerprint_sees_every_part(tiny):
    changed = tiny.test_labels.copy()
    changed[-1] = (changed[-1] + 1) % 10
    others = [
        tiny.limited(49),
        dataclasses.replace(tiny, test_labels=changed),
        dataclasses.replace(tiny, train_images=tiny.train_images[::-1]),
    ]
    assert len({data.fingerprint() for data in (tiny, *others)}) == 4
    assert dataclasses.replace(tiny, name="another").fingerprint() == tiny.fingerprint()
