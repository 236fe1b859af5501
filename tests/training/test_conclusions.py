"""Every sentence that draws a conclusion, against made-up results for which it is right or wrong."""

import html
import re
from itertools import product

import pytest

from batchnorm.training import charts, report
from batchnorm.training.comparison import compare
from batchnorm.training.measurements import BATCH_NORM, PLAIN
from batchnorm.training.summary import finding

LEVEL = [340] * 30
RISING = [min(36 + 12 * number, 343) for number in range(30)]

#: Results, and the sentences of finding that follow the accuracies.
FINDINGS = {
    "batch norm better and sooner": (
        {"plain": [36, 36, 150, 200], "batch_norm": [250, 300, 330, 340]},
        ": 39.0 points better (95 % interval +33.9 to +44.0). The network with batch norm reached the plain network’s "
        "best in 1 epoch instead of 4.",
    ),
    "equal but sooner": (
        {"plain": RISING, "batch_norm": [330, 338, *[345] * 28], "apart": 3},
        ": equal within noise (difference +0.6 points, 95 % interval −1.3 to +2.5). The network with batch norm "
        "reached the plain network’s best in 3 epochs instead of 27.",
    ),
    "plain better and sooner": (
        {"plain": [300, 330, 340, 341], "batch_norm": [36, 100, 200, 250]},
        ": 25.3 points worse (95 % interval −30.0 to −20.9). The plain network reached the best of the one with batch "
        "norm in 1 epoch instead of 4.",
    ),
    "plain better, neither sooner": (
        {"plain": [300, 300, 300, 340], "batch_norm": [300, 300, 300, 310]},
        ": 8.4 points worse (95 % interval −11.6 to −5.6). Neither network was sooner by more than noise.",
    ),
    "one image apart": (
        {"plain": [340, 345, 350, 352], "batch_norm": [342, 352, 350, 353], "apart": 2},
        ": equal within noise (difference +0.3 points, 95 % interval −1.4 to +2.0). Neither network was sooner by more "
        "than noise.",
    ),
    "the same": (
        {"plain": LEVEL, "batch_norm": LEVEL},
        ": equal within noise (difference 0.0 points, 95 % interval −1.1 to +1.1). Neither network was sooner by more "
        "than noise.",
    ),
    "all right": (
        {"plain": [359] * 3, "batch_norm": [359] * 3},
        ": equal within noise (difference 0.0 points, 95 % interval −1.1 to +1.1). Neither network was sooner by more "
        "than noise.",
    ),
    "the plain one at chance": (
        {"plain": [36, 36, 45], "batch_norm": [320, 328, 330]},
        ": 79.4 points better (95 % interval +74.6 to +83.1). The plain network has not measurably left chance, the "
        "10.3 % of one answer for all images.",
    ),
    "batch norm at chance": (
        {"plain": [320, 328, 330], "batch_norm": [36, 36, 36]},
        ": 81.9 points worse (95 % interval −85.4 to −77.3). The network with batch norm has not measurably left "
        "chance, the 10.3 % of one answer for all images.",
    ),
    "both at chance": (
        {"plain": [36, 36, 38], "batch_norm": [38, 37, 36]},
        ": equal within noise (difference −0.6 points, 95 % interval −1.9 to +0.7). Neither network has measurably "
        "left chance, the 10.3 % of one answer for all images.",
    ),
    "plain diverged": (
        {"plain": [200, 36, 36], "batch_norm": [320, 328, 330], "diverged": (PLAIN, 2)},
        ": 81.9 points better (95 % interval +77.3 to +85.4). The plain network diverged: its loss was not finite in "
        "epoch 2.",
    ),
    "batch norm diverged": (
        {"plain": [200, 250, 300], "batch_norm": [320, 328, 36], "diverged": (BATCH_NORM, 3)},
        ": 73.5 points worse (95 % interval −77.6 to −68.4). The network with batch norm diverged: its loss was not "
        "finite in epoch 3.",
    ),
    "one epoch": (
        {"plain": [300], "batch_norm": [320], "planned": 30},
        ": 5.6 points better (95 % interval +3.2 to +8.2).",
    ),
    "one epoch, equal": (
        {"plain": [300], "batch_norm": [303], "planned": 30, "apart": 5},
        ": equal within noise (difference +0.8 points, 95 % interval −1.3 to +3.0).",
    ),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_the_finding_says_what_the_numbers_bear_and_no_more(made_up, case):
    results, sentences = FINDINGS[case]
    metrics = made_up(**results)
    plain, normalized = (results[name][-1] / 3.59 for name in ("plain", "batch_norm"))
    when = " after 1 of 30 epochs" if "planned" in results else ""
    assert finding(metrics) == (
        f"With batch norm LeNet gets {normalized:.1f} % of the 359 test images right{when}, without it {plain:.1f} %"
        + sentences
    )


def test_few_images_prove_little(made_up):
    assert ": equal within noise (" in finding(made_up([6, 6], [9, 9], n=10, apart=1))
    assert " points better (" in finding(made_up([600, 600], [900, 900], n=1000, apart=100))


def text_of(page):
    body = page[page.index("<body>") :]
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


@pytest.fixture
def words(made_up, monkeypatch):
    """A function from made-up results to the metrics and all words of the page; its charts are not drawn."""
    monkeypatch.setattr(charts, "svg", lambda panel, metrics: "<svg></svg>")

    def make(*arguments, variation=(0.002, 1.0), **results):
        metrics = made_up(*arguments, **results)
        for name, value in zip((PLAIN, BATCH_NORM), variation, strict=True):
            metrics["histories"][name]["probes"][0]["layers"]["dense2"]["after"]["variation"] = value
        return metrics, text_of(report.render(metrics))

    return make


FINALS = (36, 200, 300, 340, 343, 356)


@pytest.mark.parametrize("epochs", [1, 2, 12])
def test_no_page_claims_what_its_numbers_deny(words, epochs):
    """A grid of starts and ends of both networks; what may be said follows from the counts alone."""
    for start, plain_end, end in product((36, 250), FINALS, FINALS):
        plain = [start + (plain_end - start) * number // epochs for number in range(1, epochs + 1)]
        normalized = [300 + (end - 300) * number // epochs for number in range(1, epochs + 1)]
        metrics, page = words(plain, normalized, planned=epochs + 3)
        difference = normalized[-1] - plain[-1]
        # All disagreements lie on one side here: Newcombe's interval excludes 0 from six images on, and of 359 images
        # no claim can rest on fewer than five (2 ** (1 - 5) > 0.05, the exact test of McNemar).
        if abs(difference) >= 6:
            assert f"points {'better' if difference > 0 else 'worse'} (95 % interval" in page
        if abs(difference) < 5:
            assert "equal within noise" in page
        assert ("did better." in page) == (metrics["comparison"]["better"] is not None)
        is_batch_norm_sooner = "reached the plain network’s best in" in page
        is_plain_sooner = "reached the best of the one with batch norm in" in page
        assert is_batch_norm_sooner <= any(b > p for p, b in zip(plain[:-1], normalized[:-1], strict=True))
        assert is_plain_sooner <= any(p > b for p, b in zip(plain[:-1], normalized[:-1], strict=True))
        assert not (is_batch_norm_sooner and is_plain_sooner)
        is_sooner = is_batch_norm_sooner or is_plain_sooner
        assert ("Dotted:" in page) == ("Epochs to " in page) == is_sooner
        if epochs == 1:
            assert "sooner." not in page
        if max(plain) <= 36:
            subject = "Neither network has" if max(normalized) <= 36 else "The plain network has not"
            assert f"{subject} measurably left chance" in page
            assert not is_sooner
        if min(max(plain), max(normalized)) >= 200:
            assert "measurably" not in page


@pytest.mark.parametrize(
    ("variation", "results", "sentence"),
    [
        ((0.002, 1), ([36, 150], [320, 340]), "The network whose last hidden layer varied more did better."),
        ((0.002, 1), ([320, 340], [36, 150]), "The network whose last hidden layer varied less did better."),
        ((1, 0.002), ([36, 150], [320, 340]), "The network whose last hidden layer varied less did better."),
        ((1, 0.002), ([320, 340], [36, 150]), "The network whose last hidden layer varied more did better."),
        ((0.002, 1), (RISING, [345] * 30), "The network whose last hidden layer varied more was sooner."),
        (
            (0.002, 1),
            (LEVEL, LEVEL),
            "By the end of this run that difference left no trace in the accuracy beyond noise.",
        ),
        ((0.6, 1), ([36, 150], [320, 340]), "In the last hidden layer the two differ by less than a factor of 2."),
        ((None, 1), ([36, 150], [320, 340]), ""),
        ((0, 1), ([36, 150], [320, 340]), ""),
    ],
)
def test_the_signal_is_set_beside_the_outcome(words, variation, results, sentence):
    _, page = words(*results, variation=variation)
    after = re.search(r"with batch norm\. (.*?) ?Standard deviation", page)[1]
    assert after == sentence


def test_no_outcome_is_explained_where_a_network_diverged(words):
    _, page = words([200, 36], [320, 330], diverged=(PLAIN, 2))
    assert "last hidden layer varied" not in page
    assert "The plain network diverged: its loss was not finite in epoch 2." in page


def test_the_page_states_the_images_the_method_and_what_it_leaves_out(words):
    _, page = words([330, 341], [335, 350], apart=4)
    assert "Of the 359 test images, 13 were right with batch norm only and 4 without it only." in page
    assert "Its 95 % interval 92.2 to 96.8 % 95.3 to 98.7 %" in page
    assert "Newcombe’s for the difference on the same images (1998, method 10)" in page
    assert "one image of 359 is 0.28" in page
    _, page = words([340], [341])
    assert "Of the 359 test images, 1 was right with batch norm only and 0 without it only." in page


def test_an_epoch_that_is_picked_is_held_to_a_wider_interval(made_up):
    """Nine images ahead at the first epoch: more than noise if it is one of two, and not if it is one of thirty."""
    short = made_up([331, 340], [340, 340])["comparison"]
    assert short["sooner"] == {"network": BATCH_NORM, "epoch": 1, "other_epoch": 2}
    long = made_up([331, *[339] * 28, 340], [340, *[340] * 29])["comparison"]
    assert long["sooner"] is None


def test_records_that_contradict_each_other_are_refused(made_up):
    metrics = made_up([300, 310], [320, 330])
    metrics["histories"][PLAIN]["epochs"][1]["test_only"] += 1
    with pytest.raises(ValueError, match=r"epoch 2: by the plain network's record both .* 309 .* batch norm's 310"):
        compare(metrics["histories"], 359, 0.1)
