import copy
import json
from itertools import chain

import numpy as np
import pytest
from safetensors.numpy import load_file

from batchnorm.training import checkpoint, loop
from batchnorm.training.folder import REPORT
from batchnorm.training.loop import train
from batchnorm.training.measurements import NETWORKS
from batchnorm.training.network import LAYERS, Probe, Score, StepResult
from batchnorm.training.options import FRAMEWORKS, InputError, Options


def without_seconds(histories):
    histories = copy.deepcopy(histories)
    for history in histories.values():
        for epoch in history["epochs"]:
            del epoch["seconds"]
    return histories


def options(framework="torch", epochs=2, **changes):
    return Options(framework=framework, epochs=epochs, batch_size=8, **changes)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_continued_run_equals_an_unbroken_one_to_the_bit(tiny, tmp_path, recorder, framework):
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
    unbroken = train(options(framework, 4), tiny, tmp_path / "unbroken", recorder)
    train(options(framework, 1), tiny, tmp_path / "broken", recorder)
    train(options(framework, 3), tiny, tmp_path / "broken", recorder, resume=True)
    broken = train(options(framework, 4), tiny, tmp_path / "broken", recorder, resume=True)
    assert without_seconds(broken) == without_seconds(unbroken)
    a, b = (load_file(tmp_path / name / checkpoint.CHECKPOINT) for name in ("unbroken", "broken"))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_what_a_run_records(tiny, tmp_path, recorder):
    histories = train(options(epochs=2), tiny, tmp_path, recorder)
    assert recorder.started == (0, 2, 6)  # 50 images are 6 batches of 8, two images sit out
    assert recorder.batches == (["plain"] * 6 + ["batch_norm"] * 6) * 2
    assert recorder.epochs == [{name: histories[name]["epochs"][index] for name in NETWORKS} for index in (0, 1)]
    for name in NETWORKS:
        assert [epoch["epoch"] for epoch in histories[name]["epochs"]] == [1, 2]
        assert [probe["epoch"] for probe in histories[name]["probes"]] == [0, 1, 2]
    assert histories["plain"]["gamma_beta"] == {}
    assert [len(layer["gamma"]) for layer in histories["batch_norm"]["gamma_beta"].values()] == [6, 16, 120, 84]
    assert all(epoch["test_accuracy_batch"] is None for epoch in histories["plain"]["epochs"])
    assert all(0 <= epoch["test_accuracy_batch"] <= 1 for epoch in histories["batch_norm"]["epochs"])


class SeenImages:
    """A network that only notes which images it is trained on."""

    def __init__(self, tiny):
        self.index = {image.tobytes(): number for number, image in enumerate(tiny.train_images)}
        self.seen = []

    def step(self, images, labels):
        self.seen.append([self.index[image.tobytes()] for image in images])
        return StepResult(1.0, 1)

    def evaluate(self, images, labels, *, training):
        return Score(1.0, np.arange(len(labels)) % 2 == 0)

    def probe(self, images, labels):
        values = {layer.name: np.zeros((2, 3), np.float32) for layer in LAYERS}
        return Probe(values, values, dict.fromkeys(values, 0.0))

    def gamma_beta(self):
        return {}

    def state(self):
        return {}


def test_both_networks_see_the_same_batches_in_an_order_of_their_epoch(tiny, tmp_path, recorder, monkeypatch):
    networks = [SeenImages(tiny) for _ in range(4)]
    waiting = iter(networks)
    monkeypatch.setattr(loop, "build", lambda options, *, batch_norm: next(waiting))
    train(options(epochs=2, seed=1), tiny, tmp_path, recorder)
    train(options(epochs=2, seed=2), tiny, tmp_path, recorder)
    assert networks[0].seen == networks[1].seen
    assert len(networks[0].seen) == 12
    first, second = (list(chain(*networks[0].seen[start : start + 6])) for start in (0, 6))
    assert len(set(first)) == len(set(second)) == 48, "no image twice in an epoch"
    assert first != second
    assert networks[2].seen != networks[0].seen


class Answers(SeenImages):
    """Right about given test images."""

    def __init__(self, tiny, right):
        super().__init__(tiny)
        self.right = {tiny.test_images[number].tobytes() for number in right}

    def evaluate(self, images, labels, *, training):
        return Score(1.0, np.array([(image.tobytes() in self.right) != training for image in images]))


def test_the_records_count_what_only_one_network_got_right(tiny, tmp_path, recorder, monkeypatch):
    answers = {False: [0, 1, 2, 3, 4], True: [3, 4, 5]}
    monkeypatch.setattr(loop, "build", lambda options, *, batch_norm: Answers(tiny, answers[batch_norm]))
    histories = train(options(epochs=1), tiny, tmp_path, recorder)
    plain, normalized = (histories[name]["epochs"][0] for name in NETWORKS)
    assert (plain["test_only"], normalized["test_only"]) == (3, 1)
    assert (plain["test_accuracy"], normalized["test_accuracy"]) == (5 / 22, 3 / 22)
    assert (plain["test_accuracy_batch"], normalized["test_accuracy_batch"]) == (None, 19 / 22)


def test_a_new_run_removes_the_page_of_the_one_it_replaces(tiny, tmp_path, recorder):
    for name in (*REPORT, "notes.txt"):
        (tmp_path / name).write_text("earlier")
    train(options(epochs=5), tiny, tmp_path, recorder, is_stopped=lambda: True)
    assert {path.name for path in tmp_path.iterdir()} == {*REPORT, "notes.txt"}  # not one epoch: all stays
    train(options(epochs=1), tiny, tmp_path, recorder)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint.CHECKPOINT, "notes.txt"}
    (tmp_path / "report.html").write_text("of this run")
    train(options(epochs=2), tiny, tmp_path, recorder, resume=True)
    assert (tmp_path / "report.html").read_text() == "of this run"


def test_the_seed_decides_the_run(tiny, tmp_path, recorder):
    first, again, other = (
        without_seconds(train(options(epochs=1, seed=seed), tiny, tmp_path, recorder)) for seed in (3, 3, 4)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize(("batches", "epochs"), [(3, 0), (11, 0), (12, 0), (13, 1), (24, 1)])
def test_stopping_gives_up_the_epoch_at_hand_only(tiny, tmp_path, recorder, batches, epochs):
    histories = train(options(epochs=5), tiny, tmp_path, recorder, is_stopped=lambda: len(recorder.batches) >= batches)
    assert [len(histories[name]["epochs"]) for name in NETWORKS] == [epochs, epochs]
    assert len(recorder.batches) == batches
    assert (tmp_path / checkpoint.CHECKPOINT).exists() == (epochs > 0)


def test_a_stopped_run_continues_to_the_same_numbers(tiny, tmp_path, recorder):
    (tmp_path / "unbroken").mkdir()
    unbroken = train(options(epochs=3), tiny, tmp_path / "unbroken", recorder)
    recorder.batches.clear()
    train(options(epochs=3), tiny, tmp_path, recorder, is_stopped=lambda: len(recorder.batches) >= 20)
    assert without_seconds(train(options(epochs=3), tiny, tmp_path, recorder, resume=True)) == without_seconds(unbroken)


def test_a_finished_run_trains_no_further(tiny, tmp_path, recorder):
    histories = train(options(epochs=2), tiny, tmp_path, recorder)
    recorder.batches.clear()
    assert train(options(epochs=2), tiny, tmp_path, recorder, resume=True) == histories
    assert recorder.batches == []
    with pytest.raises(InputError, match="has 2 epochs; pass --epochs 2 or more"):
        train(options(epochs=1), tiny, tmp_path, recorder, resume=True)


def test_a_batch_larger_than_the_set_is_refused(tiny, tmp_path, recorder):
    with pytest.raises(InputError, match="--batch-size is 51, there are only 50 images"):
        train(Options(framework="torch", batch_size=51), tiny, tmp_path, recorder)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the statistics of a batch are not finite:RuntimeWarning")
def test_a_diverging_run_is_recorded_without_numbers(tiny, tmp_path, recorder):
    histories = train(options(epochs=1, learning_rate=1e30, activation="identity"), tiny, tmp_path, recorder)
    assert histories["plain"]["epochs"][0]["train_loss"] is None
    json.dumps(histories, allow_nan=False)  # raises where a number is not finite
    run, _ = checkpoint.load(tmp_path, *identity_of(tmp_path))
    assert run["histories"] == histories


def identity_of(folder):
    run = json.loads(checkpoint.safe_open(folder / checkpoint.CHECKPOINT, framework="numpy").metadata()[checkpoint.KEY])
    return run["identity"], run["fingerprint"]
