"""The page of a run: one HTML file, a pure function of the metrics, without scripts or external resources."""

import html
from collections.abc import Sequence
from importlib.resources import files
from itertools import zip_longest
from typing import Any

from batchnorm.training import charts, figures
from batchnorm.training.comparison import Comparison
from batchnorm.training.measurements import BATCH_NORM, PLAIN, ProbeRecord
from batchnorm.training.network import DECAY, HIDDEN, LAYERS
from batchnorm.training.summary import NAMES, Metrics, count, epochs_to_best, finding, percent, percent_between

ACCURACY = "Share of the test images each network gets right."
LOSS = "Mean loss over each epoch, on a logarithmic scale: equal steps down are equal ratios."
SIGNAL_CAPTIONS = (
    "Standard deviation of a channel’s values over images and positions, ahead of the activation (root mean square "
    "over the layer’s channels; logarithmic).",
    "Euclidean norm of the loss’s gradient for each layer’s weights (logarithmic). Both charts measure the same 256 "
    "training images every time, or all where there are fewer.",
)
INSIDE = (
    "The same training images’ values on either side of each batch norm, both ahead of the activation. Blue is after: "
    "the line is the median, the inner band holds the middle half of the values, the outer band the middle nine "
    "tenths. Grey is before: the same five quantiles as lines. Epoch 0 is before training, when gamma is 1 and beta 0."
)
LEARNED = (
    "Batch norm gives every channel mean 0 and variance 1, then multiplies by gamma and adds beta. Each dot is one "
    "channel after the last epoch, the cross is where all of them started. Right of the cross a channel’s differences "
    "are passed on enlarged, left of it reduced; above and below it the channel is shifted up and down. The scales "
    "differ by layer."
)
MODE_CAPTIONS = (
    "Accuracy on the test images with running averages (blue) and with the statistics of test batches of the "
    "training’s size (grey). The scale does not start at zero.",
    "Blue minus grey, in percentage points; {image}. Running averages lag behind weights that still move, which can "
    "pull the first bars down; statistics that are stale for another reason would keep a gap open.",
)
SCALE = "Pixels are divided by the largest value their format can hold, so that they lie between 0 and 1."


def render(metrics: Metrics) -> str:
    """The report as HTML: the finding, then curves, reasons, parameters, modes, and how it was run."""
    sections = (
        _section("What happened", _happened(metrics), figures.LEARNING, metrics, (_accuracy_caption(metrics), LOSS)),
        _section("What reaches the layers", _signal(metrics), figures.SIGNAL, metrics, SIGNAL_CAPTIONS),
        _section("Inside each layer", INSIDE, figures.DISTRIBUTIONS, metrics),
        _section("What batch norm learned", LEARNED, figures.GAMMA_BETA, metrics),
        _section("Training mode and inference mode", _modes(metrics), figures.MODES, metrics, _mode_captions(metrics)),
        _how(metrics),
    )
    style = files("batchnorm.training").joinpath("report.css").read_text("utf-8")
    title = f"LeNet with and without batch norm: {metrics['data']['name']}, {count(metrics['epochs_done'], 'epoch')}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        f'<header>\n<p class="kicker">{html.escape(title)}</p>\n<h1>{html.escape(finding(metrics))}</h1>\n'
        f"{_stopped(metrics)}{_table(metrics)}</header>\n{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, text: str, figure: charts.Figure, metrics: Metrics, captions: Sequence[str] = ()) -> str:
    panels = "".join(
        f"<figure>{charts.svg(panel, metrics)}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>\n"
        for panel, caption in zip_longest(figure.panels, captions)
    )
    return (
        f'<section>\n<h2>{title}</h2>\n<p>{html.escape(text)}</p>\n<div class="panels">\n{panels}</div>\n</section>\n'
    )


def _stopped(metrics: Metrics) -> str:
    if metrics["complete"]:
        return ""
    asked, done = metrics["options"]["epochs"], metrics["epochs_done"]
    return (
        f'<p class="notice">This run was stopped after {done} of {count(asked, "epoch")}; --resume continues it.</p>\n'
    )


def _table(metrics: Metrics) -> str:
    summary, comparison = metrics["summary"], metrics["comparison"]
    level = f"{100 * comparison['confidence']:g} % interval"
    rows = [
        ("Test accuracy", [percent(summary[name]["test_accuracy"]) for name in NAMES]),
        (f"Its {level}", [percent_between(comparison["intervals"][name]) for name in NAMES]),
        (
            "Best, at epoch",
            [f"{percent(summary[name]['best_test_accuracy'])}, {summary[name]['best_epoch']}" for name in NAMES],
        ),
        *([epochs_to_best(comparison["sooner"])] if comparison["sooner"] else []),
        ("Seconds of training", [f"{summary[name]['seconds']:.1f}" for name in NAMES]),
    ]
    head = "".join(f'<th scope="col" class="{name}">{NAMES[name]}</th>' for name in NAMES)
    body = "".join(
        f'<tr><th scope="row">{label}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for label, cells in rows
    )
    return f"<table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n{_noise(metrics)}"


def _noise(metrics: Metrics) -> str:
    """The note on the computation and the meaning of the intervals."""
    comparison, histories = metrics["comparison"], metrics["histories"]
    plain, normalized = (histories[name]["epochs"][-1]["test_only"] for name in (PLAIN, BATCH_NORM))
    return (
        f'<p class="note">Of the {count(comparison["test_images"], "test image")}, {normalized} '
        f"{'was' if normalized == 1 else 'were'} right with batch norm only and {plain} without it only. Intervals at "
        f"{100 * comparison['confidence']:g} %: Wilson’s for an accuracy, Newcombe’s for the difference on the same "
        "images (1998, method 10). One network counts as sooner where it reached the other’s best before the other did "
        "and was ahead by more than noise just then, by an interval widened for the number of epochs (Bonferroni). The "
        "intervals are about which images the test happens to have; they leave out that another seed gives other "
        "networks.</p>\n"
    )


def _happened(metrics: Metrics) -> str:
    data = metrics["data"]
    return (
        "Two networks, equal but for batch norm, start from the same weights and see the same "
        f"{data['train_images']:,} images in the same order. After every epoch both are tested on "
        f"{data['test_images']:,} images they were not trained on."
    )


def _accuracy_caption(metrics: Metrics) -> str:
    sooner = metrics["comparison"]["sooner"]
    if sooner is None:
        return ACCURACY
    other = "the plain network’s best" if sooner["network"] == BATCH_NORM else "batch norm’s best"
    return f"{ACCURACY} Dotted: {other}, and the epochs at which the networks reached it."


def _signal(metrics: Metrics) -> str:
    """The text on the signal in the layers before training, and on its relation to this run's outcome."""
    plain, normalized = (metrics["histories"][name]["probes"][0] for name in (PLAIN, BATCH_NORM))
    first, last = HIDDEN[0].name, HIDDEN[-1].name
    restored = " and ".join(dict.fromkeys(_number(_variation(normalized, layer)) for layer in (first, last)))
    return (
        "A layer can only learn from what differs between images. Before training, the variation of the values on "
        f"their way into the activations is {_number(_variation(plain, first))} in the plain network’s first layer and "
        f"{_number(_variation(plain, last))} in its last hidden one; with batch norm it is {restored}. The norm of the "
        f"gradient that reaches the first layer’s weights is {_number(plain['gradients'][first])} in the plain network "
        f"and {_number(normalized['gradients'][first])} with batch norm. "
        f"{_outcome(metrics['comparison'], _variation(plain, last), _variation(normalized, last))}"
    ).rstrip()


def _outcome(comparison: Comparison, plain: float | None, normalized: float | None) -> str:
    """The sentence that relates the variation in the last hidden layer to the outcome; empty if a network diverged."""
    sooner = comparison["sooner"]
    leader = comparison["better"] or (sooner["network"] if sooner else None)
    if not plain or not normalized or any(comparison["diverged"].values()):
        return ""
    if max(plain, normalized) < 2 * min(plain, normalized):
        return "In the last hidden layer the two differ by less than a factor of 2."
    if leader is None:
        return "By the end of this run that difference left no trace in the accuracy beyond noise."
    did = "did better" if comparison["better"] else "was sooner"
    return f"The network whose last hidden layer varied {_more_or_less(leader, plain, normalized)} {did}."


def _more_or_less(leader: str, plain: float, normalized: float) -> str:
    return "more" if (normalized > plain) == (leader == BATCH_NORM) else "less"


def _modes(metrics: Metrics) -> str:
    last = metrics["histories"][BATCH_NORM]["epochs"][-1]
    return (
        "In training mode batch norm uses the mean and variance of the batch at hand; in inference mode the running "
        f"averages it kept while training, which weigh the past by {DECAY} at every batch. After the last epoch the "
        f"network gets {percent(last['test_accuracy'])} of the test images right with running averages and "
        f"{_percent_or_dash(last['test_accuracy_batch'])} with the statistics of the test batches themselves."
    )


def _mode_captions(metrics: Metrics) -> tuple[str, ...]:
    images = metrics["comparison"]["test_images"]
    image = f"one image of {images:,} is {100 / images:.2g}"
    return tuple(caption.format(image=image) for caption in MODE_CAPTIONS)


def _how(metrics: Metrics) -> str:
    options, data = metrics["options"], metrics["data"]
    shape = ", ".join(f"{layer.name[:-1]} {layer.name[-1]}: {layer.outputs}" for layer in LAYERS)
    rows = (
        ("Command", f"<code>{html.escape(metrics['command'])}</code>"),
        ("Images", html.escape(data["source"]) + f". {SCALE}"),
        (
            "Split",
            f"{data['train_images']:,} for training, {data['test_images']:,} for testing: "
            f"{html.escape(data['split'])}.",
        ),
        (
            "Network",
            f"LeNet with {html.escape(options['activation'])} after each batch norm and average pooling after each "
            f"convolution of 5x5 pixels; outputs of {shape}. Without batch norm each layer has a bias, with it beta "
            "takes the bias’s place. Weights start normal with variance 1 / fan-in.",
        ),
        (
            "Training",
            f"{metrics['epochs_done']} of {count(options['epochs'], 'epoch')}, Adam at {options['learning_rate']:g}, "
            f"batches of {options['batch_size']}, seed {options['seed']}. Seconds count training steps and their "
            "compilation, not testing. One seed is one draw: another gives other figures.",
        ),
        ("Versions", html.escape(", ".join(f"{name} {value}" for name, value in _versions(metrics)))),
        (
            "Machine",
            f"{html.escape(metrics['environment']['system'])}, {count(metrics['environment']['cores'], 'core')}",
        ),
    )
    items = "".join(f"<dt>{term}</dt><dd>{text}</dd>\n" for term, text in rows)
    return f"<section>\n<h2>How it was run</h2>\n<dl>\n{items}</dl>\n</section>\n"


def _versions(metrics: Metrics) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in metrics["environment"].items() if name not in {"system", "cores"}]


def _variation(record: ProbeRecord, layer: str) -> float | None:
    return record["layers"][layer]["after"]["variation"]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def _percent_or_dash(share: float | None) -> str:
    return "–" if share is None else percent(share)
