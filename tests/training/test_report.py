import html.parser
import re

import pytest
from PIL import Image

from batchnorm.training import charts, figures, report
from batchnorm.training.run import write_report
from batchnorm.training.summary import finding, summarize

VOID = {"meta", "path", "rect", "use", "br", "link"}


class Page(html.parser.HTMLParser):
    """Collects what a page loads, its texts and identifiers, and checks that elements nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.ids, self.texts, self.tags = [], [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in {"src", "href", "srcset", "data", "action", "poster"}:
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def text(trained):
    return report.render(trained)


def test_the_page_loads_nothing_and_runs_nothing(text):
    page = Page(text)
    assert all(target.startswith("#") for target in page.loads)
    assert not re.search(r"https?://|@import|url\((?!#)", text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert len(text) < 1_500_000


def test_the_page_shows_every_panel_in_the_colours_of_either_mode(text):
    titles = [panel.title for figure in figures.FIGURES for panel in figure.panels]
    assert Page(text).tags.count("svg") == len(titles)
    assert all(title in text for title in titles)
    for figure in figures.FIGURES:
        for panel in figure.panels:
            assert f'role="img" aria-label="{panel.title}: {panel.description}"' in text
    body = text[text.index("<body>") :]
    assert not re.findall(r"#[0-9a-f]{6}\b(?![^<]*</text>)", re.sub(r'(?:href="|url\(|id=")#?\w+', "", body))
    for colour, variable in charts.VARIABLES.items():
        light, dark = re.findall(rf"{variable}: (#\w+);", text)
        assert light == colour, "the page in light mode has the colours of the PNG files"
        assert dark != light


def test_identifiers_are_unique_and_all_that_is_referred_to(text):
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'href="#(\w+)"|url\(#(\w+)\)', text)) <= {(i, "") for i in ids} | {("", i) for i in ids}


def test_the_page_is_a_function_of_the_metrics(metrics, text):
    assert report.render(metrics) == text
    assert f"<h1>{finding(metrics)}</h1>" in text


def test_what_the_user_named_is_text_not_markup(metrics):
    metrics["data"]["name"] = "<script>alert(1)</script>"
    metrics["command"] = "batchnorm train --data '<b>'"
    text = report.render(metrics)
    assert "<script" not in text
    assert "--data &#x27;&lt;b&gt;&#x27;" in text


def test_a_stopped_run_says_so(metrics, text):
    assert "was stopped after" not in text
    metrics["complete"], metrics["options"]["epochs"] = False, 9
    assert "This run was stopped after 3 of 9 epochs; --resume continues it." in report.render(metrics)


def test_a_diverged_run_still_has_a_page(metrics):
    for history in metrics["histories"].values():
        for epoch in history["epochs"]:
            epoch["train_loss"] = None
        for probe in history["probes"]:
            probe["gradients"] = dict.fromkeys(probe["gradients"])
            for layer in probe["layers"].values():
                for side in layer.values():
                    side["quantiles"], side["variation"] = [None] * 5, None
        for parameters in history["gamma_beta"].values():
            parameters["gamma"] = [None] * len(parameters["gamma"])
    assert "has the norm not finite" in report.render(metrics)


def test_one_epoch_is_enough_for_a_page(metrics):
    for history in metrics["histories"].values():
        del history["epochs"][1:], history["probes"][2:]
    metrics["epochs_done"] = 1
    metrics["summary"] = summarize(metrics["histories"])
    assert "1 epoch" in report.render(metrics)


def test_the_files_of_a_report(metrics, tmp_path):
    write_report(tmp_path, metrics)
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {figure.name for figure in figures.FIGURES}
    for name in pictures:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert image.size[0] == 2240
            assert image.size[1] in {740, 1480}
            assert len(image.convert("RGB").getcolors(1 << 24)) > 50  # not an empty page
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}.png" for name in pictures),
        "metrics.json",
        "report.html",
    }


@pytest.mark.parametrize(
    ("plain", "normalized", "message"),
    [
        ([0.1, 0.6, 0.9, 0.8], [0.7, 0.95, 0.9, 0.97], "it reached the plain network’s best in 2 epochs instead of 3."),
        ([0.1, 0.6, 0.9, 0.8], [0.9, 0.95, 0.9, 0.97], "it reached the plain network’s best in 1 epoch instead of 3."),
        ([0.1, 0.6, 0.9, 0.8], [0.7, 0.7, 0.7, 0.7], "it never reached the plain network’s best of 90.0 %."),
        ([0.1, 0.1, 0.1, 0.1], [0.7, 0.7, 0.7, 0.7], "the plain network has hardly left chance, 10.0 %."),
    ],
)
def test_the_finding_says_what_happened(metrics, plain, normalized, message):
    for name, accuracies in (("plain", plain), ("batch_norm", normalized)):
        first = metrics["histories"][name]["epochs"][0]
        metrics["histories"][name]["epochs"] = [
            {**first, "epoch": number, "test_accuracy": accuracy, "seconds": 2.0}
            for number, accuracy in enumerate(accuracies, 1)
        ]
    metrics["summary"] = summarize(metrics["histories"])
    assert finding(metrics).endswith(message)
    assert finding(metrics).startswith(
        f"With batch norm LeNet gets {100 * normalized[-1]:.1f} % of the test images right, without it "
        f"{100 * plain[-1]:.1f} %; "
    )
    assert metrics["summary"]["plain"]["seconds"] == 8
    assert metrics["summary"]["plain"]["best_epoch"] == plain.index(max(plain)) + 1
