import json

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchnorm.training import checkpoint
from batchnorm.training.measurements import Epoch
from batchnorm.training.options import InputError

IDENTITY = {"framework": "torch", "batch_size": 8, "seed": 0}
STATES = {
    "plain": {"parameters.conv1": np.arange(6, dtype=np.float32)},
    "batch_norm": {"parameters.conv1": np.ones((2, 3), np.float32), "steps": np.array(4.0, np.float32)},
}


def history(epochs=2, **changes):
    values = {**dict.fromkeys(Epoch.__annotations__, 0.5), "train_loss": None, "test_only": 3, **changes}
    return {"epochs": [{**values, "epoch": 1 + number} for number in range(epochs)], "probes": [], "gamma_beta": {}}


def run(**changes):
    histories = {"plain": history(), "batch_norm": history()}
    return {"format": 2, "identity": IDENTITY, "fingerprint": "f", "histories": histories, **changes}


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path, run(), STATES)
    loaded, states = checkpoint.load(tmp_path, IDENTITY, "f")
    assert loaded == run()
    assert {name: list(arrays) for name, arrays in states.items()} == {
        name: list(arrays) for name, arrays in STATES.items()
    }
    for network, arrays in STATES.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(states[network][name], array)
            assert states[network][name].dtype == array.dtype
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.CHECKPOINT]


def test_another_experiment_is_refused_with_the_difference(tmp_path):
    checkpoint.save(tmp_path, run(), STATES)
    with pytest.raises(
        InputError, match="--batch-size is 9, the checkpoint's is 8; --seed is 1, the checkpoint's is 0"
    ):
        checkpoint.load(tmp_path, {**IDENTITY, "batch_size": 9, "seed": 1}, "f")
    with pytest.raises(InputError, match="trained on other images"):
        checkpoint.load(tmp_path, IDENTITY, "g")
    with pytest.raises(InputError, match="does not exist; leave out --resume"):
        checkpoint.load(tmp_path / "elsewhere", IDENTITY, "f")


def with_metadata(**changes):
    return lambda path: save_file(STATES["plain"], path, {checkpoint.KEY: json.dumps(run(**changes))})


DAMAGED = {
    "no metadata": lambda path: save_file(STATES["plain"], path),
    "not JSON": lambda path: save_file(STATES["plain"], path, {checkpoint.KEY: "{"}),
    "a list": lambda path: save_file(STATES["plain"], path, {checkpoint.KEY: "[]"}),
    "another format": with_metadata(format=1),
    "a format that is no number": with_metadata(format="2"),
    "more than known": with_metadata(more=1),
    "no histories": with_metadata(histories={}),
    "no epochs": with_metadata(histories={"plain": history(0), "batch_norm": history(0)}),
    "uneven histories": with_metadata(histories={"plain": history(1), "batch_norm": history(2)}),
    "longer histories": with_metadata(histories={"plain": history(2), "batch_norm": history(1)}),
    "text for a number": with_metadata(histories={"plain": history(), "batch_norm": history(seconds="1")}),
    "a share for a count": with_metadata(histories={"plain": history(), "batch_norm": history(test_only=0.5)}),
    "no number at all": with_metadata(histories={"plain": history(), "batch_norm": history(seconds=None)}),
    "epochs that are no list": with_metadata(histories={"plain": history(), "batch_norm": {**history(), "epochs": {}}}),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "a huge header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_checkpoint_is_one_clear_line(tmp_path, damage):
    checkpoint.save(tmp_path, run(), STATES)
    DAMAGED[damage](tmp_path / checkpoint.CHECKPOINT)
    with pytest.raises(InputError, match="is not a checkpoint of this program, or it is damaged") as caught:
        checkpoint.load(tmp_path, IDENTITY, "f")
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("; replace --resume by --overwrite to start a new run")


def test_the_checkpoint_of_an_earlier_version_is_called_so(tmp_path):
    earlier = history()
    for epoch in earlier["epochs"]:
        del epoch["test_only"]
    with_metadata(format=1, histories={"plain": earlier, "batch_norm": earlier})(tmp_path / checkpoint.CHECKPOINT)
    with pytest.raises(InputError, match=r"\(format 1, this version reads 2\)"):
        checkpoint.load(tmp_path, IDENTITY, "f")
