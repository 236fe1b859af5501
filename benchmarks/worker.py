"""Measurement: one process for each number of threads, pinned to as many cores, in which all contestants race."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, TypeVar

from benchmarks.cases import Case
from benchmarks.contestants import AGAINST, COMPILED, FLOOR, OURS, PEERS, contestants, participants
from benchmarks.floors import memory_passes
from benchmarks.machine import Others, cache_sizes, cores, instruction_set_in_use, is_disturbed
from benchmarks.results import Result
from benchmarks.timing import Effort, Timing, race, warm_up

if TYPE_CHECKING:
    from benchmarks.contestants import Contestant

T = TypeVar("T")

#: The variables that restrict PyTorch, oneDNN and XLA to the instructions of one of the kernels' sets.
AVX2_VARIABLES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "XLA_FLAGS": "--xla_cpu_max_isa=AVX2"}
PEER_VARIABLES = {"avx2": AVX2_VARIABLES}


@dataclass(frozen=True)
class Plan:
    """The cases that one process measures; `compiled` are those in which torch.compile takes part."""

    threads: int
    instruction_set: str
    cases: tuple[Case, ...]
    peers: tuple[str, ...]
    compiled: frozenset[Case]
    effort: Effort


@dataclass(frozen=True)
class Note:
    """A message for the user."""

    text: str


class WorkerError(RuntimeError):
    """The measuring process ended early."""


def measured(plan: Plan) -> Iterator[list[Result] | Note]:
    """Yield the results of each case as soon as they are available, measured in a separate process.

    Raises:
        WorkerError: The process died or failed; what it wrote is on stderr.
    """
    return in_process(measure, plan)


def in_process(task: Callable[[Plan], Iterator[T]], plan: Plan) -> Iterator[T]:
    """Yield what a task yields in a process with the threads and the instruction set of a plan.

    JAX, oneDNN and OpenMP choose their number of threads when they are loaded, by the cores that the process may use:
    pinning the process is the only way that works for all of them. The kernels choose their instruction set likewise.

    Raises:
        WorkerError: The process died or failed; what it wrote is on stderr.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_main, args=(sender, task, plan), daemon=True)
    process.start()
    sender.close()
    try:
        while (message := receiver.recv()) is not None:
            yield message
    except EOFError:
        process.join()
        raise WorkerError(f"the measuring process ended with code {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()


def _main(sender: Connection, task: Callable[[Plan], Iterator[object]], plan: Plan) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C, and ends this process
    confine(plan)
    for message in task(plan):
        sender.send(message)
    sender.send(None)


def confine(plan: Plan) -> None:
    """Limit this process, and every library that it will load, to the threads and the instruction set of a plan."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores()[: plan.threads])
    os.environ |= {
        "BATCHNORM_INSTRUCTION_SET": plan.instruction_set,
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "JAX_PLATFORMS": "cpu",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # its worker processes would wait for work while the clock runs
        **PEER_VARIABLES.get(plan.instruction_set, {}),
    }


def measure(plan: Plan) -> Iterator[list[Result] | Note]:
    """Measure a plan in this process; yields what `measured` yields.

    Raises:
        RuntimeError: The kernels of this process do not use the plan's instruction set.
    """
    import torch

    from benchmarks.passes import fastest_reader

    if instruction_set_in_use() != plan.instruction_set:
        raise RuntimeError(f"the instruction set is {instruction_set_in_use()}; the plan's is {plan.instruction_set}")
    torch.set_num_threads(plan.threads)
    yield Note(f"{plan.threads} thread{'s' * (plan.threads > 1)}: the fastest read of a tensor is {fastest_reader()}")
    absent: set[str] = set()
    for case in plan.cases:
        yield from _measure_case(case, plan, absent)


def _measure_case(case: Case, plan: Plan, absent: set[str]) -> Iterator[list[Result] | Note]:
    from benchmarks.arrays import make

    names = participants(case, compiles=case in plan.compiled)
    racing: list[Contestant] = []
    estimates: dict[str, float] = {}
    arrays = make(case)
    for contestant in contestants(case, arrays, [name for name in names if name in plan.peers]):
        try:
            estimates[contestant.name] = warm_up(contestant)
        except Exception as error:  # a peer's compiler can raise anything: the race goes on without it
            if contestant.name not in PEERS:
                raise
            if contestant.name not in absent:
                yield Note(f"{contestant.name} is left out of {case}: {str(error).strip().splitlines()[0]}")
            absent.add(contestant.name)
            continue
        racing.append(contestant)
    timings, others = least_disturbed(racing, case, plan, estimates)
    if is_disturbed(others, plan.threads):
        yield Note(f"{case}: other processes kept {others:.1f} cores busy; measure it again on a quiet machine")
    yield rows(case, plan, timings, others, cache_sizes().l2)


def least_disturbed(
    racing: "Sequence[Contestant]", case: Case, plan: Plan, estimates: dict[str, float]
) -> tuple[dict[str, Timing], float]:
    """The race with the least load by other processes, and that load in cores; one that is undisturbed ends the search.

    `estimates` are the seconds of a call, from `warm_up`.
    """
    attempts = []
    for _ in range(plan.effort.attempts):
        watch = Others()
        timings = race(racing, case, plan.effort, estimates)
        attempts.append((timings, watch.cores()))
        if not is_disturbed(attempts[-1][1], plan.threads):
            break
    return min(attempts, key=lambda attempt: attempt[1])


def rows(case: Case, plan: Plan, timings: dict[str, Timing], others: float, l2: int) -> list[Result]:
    """The results of a race and the floor, the sum of the timed passes, each with its ratio to ours."""
    parts = [(timings[name], times) for name, times in memory_passes(case, l2).items()]
    p20, p50, p80 = (sum(getattr(part, name) * times for part, times in parts) for name in ("p20", "p50", "p80"))
    floor = Timing(p20, p50, p80, rounds=min(part.rounds for part, _ in parts))
    return [
        Result(
            case,
            plan.threads,
            plan.instruction_set,
            name,
            t.p20,
            t.p50,
            t.p80,
            t.rounds,
            ratio=t.p50 / timings[AGAINST.get(name, OURS)].p50,
            others=others,
            is_disturbed=is_disturbed(others, plan.threads),
        )
        for name, t in {OURS: timings[OURS], FLOOR: floor, **timings}.items()
    ]


def compiled_cases(cases: Sequence[Case], *, quick: bool) -> frozenset[Case]:
    """The cases in which torch.compile takes part: all, or one if quick, because compiling takes 2 to 16 seconds."""
    eligible = [case for case in cases if COMPILED in participants(case)]
    return frozenset([case for case in eligible if case.operation == "add+relu"][:1] if quick else eligible)
