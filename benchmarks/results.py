"""The results: one row for each contestant of a case, in memory and as CSV."""

import csv
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import NamedTuple

from batchnorm.training.folder import write_atomically
from batchnorm.training.options import InputError
from benchmarks.cases import Case
from benchmarks.machine import DISTURBED, UNKNOWN, Machine

KEY = tuple(field.name for field in fields(Machine))
COLUMNS = (*KEY, "threads", "instruction_set", "family", "operation", "dtype", "layout", "shape", "contestant")
FIGURES = ("p20_us", "p50_us", "p80_us", "rounds", "ratio", "others", "disturbed")


@dataclass(frozen=True)
class Result:
    """One contestant in one case.

    Attributes:
        instruction_set: That of batchnorm's kernels; the other contestants choose their own.
        p20, p50, p80: Microseconds of a call.
        rounds: Number of rounds in which it took part.
        ratio: Its median divided by ours in the same race: above 1 ours is faster.
        others: Number of cores that other processes kept busy meanwhile.
        is_disturbed: Whether these include cores that the race needed.
    """

    case: Case
    threads: int
    instruction_set: str
    contestant: str
    p20: float
    p50: float
    p80: float
    rounds: int
    ratio: float
    others: float
    is_disturbed: bool


def geometric_mean(ratios: Iterable[float]) -> float:
    """The geometric mean of ratios: that of 2 and 1/2 is 1.

    Example:
        >>> geometric_mean([2.0, 0.5])
        1.0
    """
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(sum(logarithms) / len(logarithms))


class Summary(NamedTuple):
    """The geometric mean and the worst of some ratios, and whether disturbed measurements are part of them."""

    mean: float
    worst: float
    is_mean_disturbed: bool
    is_worst_disturbed: bool


def summarize(results: Sequence[Result]) -> Summary:
    """A contestant's time divided by ours over its cases; the worst is the lowest."""
    worst = min(results, key=lambda result: result.ratio)
    mean = geometric_mean(result.ratio for result in results)
    return Summary(mean, worst.ratio, any(result.is_disturbed for result in results), worst.is_disturbed)


def over_floor(floors: Sequence[Result]) -> Summary:
    """Our time divided by the floor over its cases; the worst is the largest."""
    found = summarize(floors)
    return found._replace(mean=1 / found.mean, worst=1 / found.worst)


def write_csv(path: Path, results: Sequence[Result], machine: Machine) -> None:
    """Write all rows; the file is complete or absent."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([*COLUMNS, *FIGURES])
            for r in results:
                times = [f"{value:.7g}" for value in (r.p20, r.p50, r.p80)]
                shape = "x".join(map(str, r.case.shape))
                case = (r.case.family, r.case.operation, r.case.dtype, r.case.layout, shape)
                load = (f"{r.others:.2f}", int(r.is_disturbed))
                key = (*astuple(machine), r.threads, r.instruction_set, *case, r.contestant)
                writer.writerow([*key, *times, r.rounds, f"{r.ratio:.7g}", *load])

    write_atomically(path, write)


def read_csv(path: Path) -> tuple[list[Result], Machine]:
    """Read the results and the machine that `write_csv` wrote.

    In a file of an earlier version, the instruction set is unknown, and each case is disturbed during which other
    processes were busy, because the number of idle cores is unknown.

    Raises:
        InputError: The file cannot be read, or was not written by `write_csv`.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        results = [_result(row) for row in rows]
        machine = Machine(**{name: rows[0][name] for name in KEY if name in rows[0]})
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--read {path}: cannot be read ({error})") from None
    except (KeyError, IndexError, TypeError, ValueError, csv.Error):
        raise InputError(f"--read {path}: not a results.csv of this program") from None
    return results, machine


def parse_shape(text: str) -> tuple[int, ...]:
    """Sizes separated by x, commas or spaces, in parentheses or not.

    Raises:
        ValueError: The text is anything else.

    Example:
        >>> parse_shape("32x64x56x56"), parse_shape("(256, 120)")
        ((32, 64, 56, 56), (256, 120))
    """
    sizes = tuple(int(size) for size in re.split(r"[x,\s]+", text.strip("() ,")))
    if min(sizes) < 1:
        raise ValueError(f"a size of {min(sizes)}")
    return sizes


def _result(row: dict[str, str]) -> Result:
    case = Case(row["family"], row["operation"], row["dtype"], row["layout"], parse_shape(row["shape"]))
    p20, p50, p80, ratio, others = (float(row[name]) for name in ("p20_us", "p50_us", "p80_us", "ratio", "others"))
    return Result(
        case,
        int(row["threads"]),
        row.get("instruction_set", UNKNOWN),
        row["contestant"],
        p20,
        p50,
        p80,
        int(row["rounds"]),
        ratio,
        others,
        is_disturbed=row["disturbed"] == "1" if "disturbed" in row else others > DISTURBED,
    )
