import numpy as np
import pytest

from batchnorm.training.measurements import PROBE_IMAGES, evaluate, is_probed, probe
from batchnorm.training.network import HIDDEN, LAYERS, Probe, Score


class FakeNetwork:
    """Scores by the labels themselves, and returns known values."""

    def __init__(self):
        self.sizes = []

    def evaluate(self, images, labels, *, training):
        self.sizes.append(len(labels))
        return Score(float(labels.mean()), labels % 2 == 1)

    def probe(self, images, labels):
        assert len(labels) <= PROBE_IMAGES
        values = np.stack([np.arange(101.0), np.full(101, 7.0)], axis=-1).astype(np.float32)
        before = {layer.name: values for layer in HIDDEN}
        return Probe(before, {**before, "conv2": values * np.inf}, dict.fromkeys((x.name for x in LAYERS), 2.0))


@pytest.mark.parametrize(("count", "batch", "sizes"), [(10, 3, [4, 3, 3]), (9, 3, [3, 3, 3]), (5, 8, [5]), (3, 2, [3])])
def test_evaluation_weighs_images_equally_and_has_no_small_batch(count, batch, sizes):
    network, labels = FakeNetwork(), np.arange(count) ** 2
    loss, right = evaluate(network, np.zeros((count, 28, 28)), labels, training=True, batch_size=batch)
    assert network.sizes == sizes
    assert loss == pytest.approx(labels.mean())
    np.testing.assert_array_equal(right, labels % 2 == 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_probe_holds_quantiles_and_the_variation_within_channels(tiny):
    record = probe(FakeNetwork(), tiny, 3)
    before = record["layers"]["conv1"]["before"]
    assert record["epoch"] == 3
    pooled = np.concatenate([np.arange(101.0), np.full(101, 7.0)])
    assert before["quantiles"] == pytest.approx(list(np.quantile(pooled, [0.05, 0.25, 0.5, 0.75, 0.95])))
    assert before["variation"] == pytest.approx(np.sqrt((np.arange(101.0).var() + 0) / 2))
    assert record["layers"]["conv2"]["after"]["variation"] is None
    assert record["gradients"] == dict.fromkeys((layer.name for layer in LAYERS), 2.0)


def test_long_runs_are_probed_ever_more_rarely():
    assert all(is_probed(epoch) for epoch in range(33))
    assert [epoch for epoch in range(33, 73) if is_probed(epoch)] == [*range(34, 65, 2), 68, 72]
    assert sum(map(is_probed, range(1025))) == 33 + 5 * 16
