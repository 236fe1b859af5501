"""The checkpoint of a run: both networks' arrays, and the history as JSON metadata, in one safetensors file."""

import json
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, cast, get_args, get_origin, get_type_hints, is_typeddict

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_bytes

from batchnorm.training.folder import CHECKPOINT, write_atomically
from batchnorm.training.measurements import NETWORKS, History
from batchnorm.training.network import Arrays
from batchnorm.training.options import InputError

KEY = "batchnorm-train"  # of the metadata entry
FORMAT = 2


class Run(TypedDict):
    """The identity of a run, and its history by network; `fingerprint` is that of the images.

    `identity` holds the options that a continued run must share: all but the number of epochs.
    """

    format: int
    identity: dict[str, Any]
    fingerprint: str
    histories: dict[str, History]


def save(folder: Path, run: Run, states: dict[str, Arrays]) -> None:
    """Write the checkpoint, replacing the earlier one atomically.

    Raises:
        WriteError: it could not be written; the earlier one is unchanged.
    """
    arrays = {f"{network}/{name}": array for network, state in states.items() for name, array in state.items()}
    metadata = {KEY: json.dumps(run, allow_nan=False)}
    write_atomically(folder / CHECKPOINT, lambda path: path.write_bytes(to_bytes(arrays, metadata)))


def load(folder: Path, identity: dict[str, Any], fingerprint: str) -> tuple[Run, dict[str, Arrays]]:
    """Load the run and the networks' states, if the checkpoint in `folder` belongs to the same experiment.

    Raises:
        InputError: there is no checkpoint, it is damaged, or it belongs to other options or images.
    """
    path = folder / CHECKPOINT
    if not path.exists():
        raise InputError(f"--resume: {path} does not exist; leave out --resume to start a new run")
    try:
        with safe_open(path, framework="numpy") as file:
            run = _checked_run(json.loads((file.metadata() or {})[KEY]))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"--resume: {path} is not a checkpoint of this program, or it is damaged ({_first_line(error)}); "
            "replace --resume by --overwrite to start a new run"
        ) from None
    if differences := [
        f"--{name.replace('_', '-')} is {value}, the checkpoint's is {run['identity'].get(name)}"
        for name, value in identity.items()
        if run["identity"].get(name) != value
    ]:
        raise InputError(f"--resume: {'; '.join(differences)}; use the same options, or another --output")
    if run["fingerprint"] != fingerprint:
        raise InputError(f"--resume: {path} was trained on other images; use the same data, or another --output")
    states: dict[str, Arrays] = {network: {} for network in NETWORKS}
    for name, array in arrays.items():
        network, _, rest = name.partition("/")
        states.setdefault(network, {})[rest] = array
    return run, states


def _checked_run(run: Any) -> Run:
    if run["format"] != FORMAT:  # first: the records of another format have another structure
        raise ValueError(f"format {run['format']}, this version reads {FORMAT}")
    if not _conforms(run, Run) or set(run["histories"]) != set(NETWORKS):
        raise ValueError("its metadata has another form")
    numbers = [[epoch["epoch"] for epoch in run["histories"][network]["epochs"]] for network in NETWORKS]
    if any(found != list(range(1, len(numbers[0]) + 1)) for found in numbers) or not numbers[0]:
        raise ValueError("its epochs are not counted from 1, for both networks alike")
    return cast(Run, run)


def _conforms(value: Any, kind: Any) -> bool:
    """Whether a value from JSON matches an annotation; supports the annotations used in `Run`."""
    if kind is Any:
        return True
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        return (
            isinstance(value, dict)
            and value.keys() == hints.keys()
            and all(_conforms(value[name], hint) for name, hint in hints.items())
        )
    arguments = get_args(kind)
    if get_origin(kind) is UnionType:
        return any(_conforms(value, argument) for argument in arguments)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_conforms(item, arguments[0]) for item in value)
    if get_origin(kind) is dict:  # its keys are strings, as in all JSON
        return isinstance(value, dict) and all(_conforms(item, arguments[1]) for item in value.values())
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
