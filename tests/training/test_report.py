import html.parser
import re
from itertools import combinations

import matplotlib as mpl
import pytest
from matplotlib.figure import Figure as Canvas
from PIL import Image

from batchnorm.training import charts, figures, report
from batchnorm.training.run import write_report
from batchnorm.training.summary import finding

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


@pytest.mark.usefixtures("undrawn")
def test_what_the_user_named_is_text_not_markup(metrics):
    metrics["data"]["name"] = "<script>alert(1)</script>"
    metrics["command"] = "batchnorm train --data '<b>'"
    text = report.render(metrics)
    assert "<script" not in text
    assert "--data &#x27;&lt;b&gt;&#x27;" in text


@pytest.mark.usefixtures("undrawn")
def test_a_stopped_run_says_so(metrics):
    assert "was stopped after" not in report.render(metrics)
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
    text = report.render(metrics)
    assert "activations is not finite in the plain network’s first layer and not finite in its last hidden one" in text
    assert "with batch norm it is not finite. The norm of the gradient" in text


def test_one_epoch_is_enough_for_a_page(made_up):
    assert "digits, 1 epoch</title>" in report.render(made_up([300], [320]))


RUNS = {
    "one epoch": ([36], [320]),
    "two epochs": ([36, 150], [320, 328]),
    "two epochs, sooner": ([150, 200], [320, 328]),
    "low and sooner": ([36, 36, 36, 71, 86], [71, 150, 320, 330, 340]),
    "sooner by an epoch": ([*[36] * 4, 200, *[190] * 25], [*[36] * 3, 320, *[330] * 26]),
    "the same": ([340] * 6, [340] * 6),
    "plain sooner": ([330, 340, 345], [36, 150, 250]),
}


@pytest.mark.parametrize("run", RUNS)
def test_no_text_of_a_chart_lies_on_another(made_up, run):
    metrics = made_up(*RUNS[run], planned=30)
    for figure in figures.FIGURES:
        for panel in figure.panels:
            with mpl.rc_context(charts.STYLE):
                canvas = Canvas(figsize=charts.PANEL_SIZE, layout="constrained")
                axes = canvas.subplots()
                panel.draw(axes, metrics)
                canvas.draw_without_rendering()
            ticks = [label for axis in (axes.xaxis, axes.yaxis) for label in visible_labels(axis)]
            boxes = [(text.get_text(), text.get_window_extent()) for text in (*axes.texts, *ticks) if text.get_text()]
            for (one, box), (other, another) in combinations(boxes, 2):
                assert not box.overlaps(another), f"{panel.title}: {one!r} lies on {other!r}"
            names = [text.get_text() for text in visible_labels(axes.yaxis)]
            assert len(names) == len(set(names)), f"{panel.title}: {names}"


def visible_labels(axis):
    low, high = sorted(axis.get_view_interval())
    return [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]


def test_the_epochs_are_marked_only_where_one_network_was_sooner(made_up):
    def marks(metrics):
        axes = Canvas().subplots()
        figures.LEARNING.panels[0].draw(axes, metrics)
        return sorted(text.get_text() for text in axes.texts if "epoch" in text.get_text()), len(axes.lines)

    assert marks(made_up([150, 200], [320, 328])) == (["epoch 1", "epoch 2"], 5)
    assert marks(made_up([340, 345], [150, 200])) == (["epoch 1", "epoch 2"], 5)
    assert marks(made_up([340, 341], [341, 342])) == ([], 2)


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
