"""The benchmarks measure what they say: the cases, the floor, the verdicts, the command."""

import csv

import numpy as np
import pytest
from benchmark_cases import case
from benchmarks import calls, targets
from benchmarks.__main__ import app
from benchmarks.cases import GRID_LIMIT, LAYOUTS, OPERATIONS, all_cases, lenet, quick_cases, resnet50
from benchmarks.contestants import (
    COMPILED,
    EAGER,
    FLOOR,
    IN_PLACE,
    JAX,
    ONEDNN,
    OURS,
    participants,
)
from benchmarks.floors import memory_passes, moved_bytes, slice_bytes
from benchmarks.machine import Machine
from benchmarks.report import cases_table, grid_table, targets_table
from benchmarks.results import Result, geometric_mean, read_csv, write_csv
from benchmarks.targets import TARGETS, evaluate
from benchmarks.timing import Effort, Timing
from benchmarks.worker import Plan, measure, rows
from PIL import Image
from typer.testing import CliRunner

from batchnorm.training.options import InputError

L2 = 2**20
HERE = Machine(
    "c0ffee-dirty", "2026-01-02 03:04", "a machine, 2 cores", "Linux", "g++ 12", "3.11", "0.1", "2.13", "0.10", "2.4"
)

#: He et al. 2016, table 1, by hand: channels and side of each distinct batch norm, for images of 224 x 224.
RESNET50 = {
    (64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28),
    (256, 28), (256, 14), (1024, 14), (512, 14), (512, 7), (2048, 7),
}  # fmt: skip


class TestCases:
    def test_the_grid_is_resnet50(self):
        shapes = resnet50()
        assert len(shapes) == 12
        assert {(C, H) for _, C, H, _ in shapes} == RESNET50
        assert all(N == 32 and H == W for N, _, H, W in shapes)
        assert {case.shape for case in all_cases() if case.family == "grid"} == set(shapes)

    def test_lenet_is_that_of_the_demo(self):
        assert lenet() == ((64, 6, 24, 24), (64, 16, 8, 8), (256, 120), (256, 84))

    def test_both_runs_have_each_operation_layout_and_family(self):
        for cases in (all_cases(), quick_cases()):
            assert {case.operation for case in cases} == set(OPERATIONS)
            assert {case.layout for case in cases} == set(LAYOUTS)
            assert {case.dtype for case in cases} == {"float32", "bfloat16"}
            assert len(cases) == len(set(cases))
        assert set(quick_cases()) < set(all_cases())
        assert max(case.bytes for case in all_cases()) == 411_041_792

    def test_the_targets_speak_of_tensors_up_to_32_megabytes(self):
        small = {case.shape for case in all_cases() if case.is_in_grid and case.dtype == "float32"}
        assert small == {shape for shape in resnet50() if 4 * np.prod(shape) <= GRID_LIMIT}
        assert len(small) == 8
        assert len({case.shape for case in all_cases() if case.is_in_grid and case.dtype == "bfloat16"}) == 10


class TestFloors:
    def test_a_slice_is_what_a_channel_occupies_in_lines(self):
        assert slice_bytes(case()) == 32 * 56 * 56 * 4
        assert slice_bytes(case(dtype="bfloat16")) == 32 * 56 * 56 * 2
        assert slice_bytes(case(layout="channels-last")) == 32 * 56 * 56 * 64
        assert slice_bytes(case(layout="channels-last", dtype="bfloat16")) == 32 * 56 * 56 * 64
        assert slice_bytes(case(layout="NC", shape=(2, 3))) == 2 * 3 * 4  # all of x, less than a line a row
        assert slice_bytes(case(layout="masked", shape=(32, 256, 512))) == 32 * 256 * 64

    @pytest.mark.parametrize(
        ("operation", "fits", "streams"),
        [
            ("forward", {"copy": 1}, {"read": 1, "copy": 1}),
            ("forward-out", {"copy-into": 1}, {"read": 1, "copy-into": 1}),
            ("inference", {"copy": 1}, {"copy": 1}),
            ("forward+backward", {"copy": 1, "add": 1}, {"read": 3, "copy": 1, "add": 1}),
            ("relu", {"copy": 1, "add": 1}, {"read": 3, "copy": 1, "add": 1}),
            ("add+relu", {"add": 2, "copy": 1}, {"read": 2, "add": 3}),
        ],
    )
    def test_passes(self, operation, fits, streams):
        assert memory_passes(case(operation), L2) == fits
        assert memory_passes(case(operation, "channels-last"), L2) == streams

    @pytest.mark.parametrize(
        ("operation", "fits", "streams"), [("forward", 8, 12), ("forward+backward", 20, 32), ("add+relu", 32, 44)]
    )
    def test_bytes_of_an_element(self, operation, fits, streams):
        """Forward 8 or 12 bytes of float32, backward 12 or 20; a residual is 4 more, and dresidual with it 8."""
        for layout, expected in (("NCHW", fits), ("channels-last", streams)):
            chosen = case(operation, layout)
            assert moved_bytes(chosen, L2) == expected * np.prod(chosen.shape)

    def test_backward_needs_two_slices_in_the_cache(self):
        chosen = case("forward+backward")
        assert memory_passes(chosen, 2 * slice_bytes(chosen)) == {"copy": 1, "add": 1}
        assert memory_passes(chosen, 2 * slice_bytes(chosen) - 1) == {"copy": 1, "read": 2, "add": 1}

    def test_the_floor_is_the_sum_of_the_timed_passes(self):
        timings = {"read": Timing(1, 2, 3, 9), "copy": Timing(4, 5, 6, 8), "add": Timing(7, 8, 9, 7)}
        timings[OURS], timings[EAGER] = Timing(20, 38, 50, 7), Timing(70, 76, 90, 5)
        found = {r.contestant: r for r in rows(case("forward+backward", "channels-last"), 2, timings, 0.25, L2)}
        assert (found[FLOOR].p20, found[FLOOR].p50, found[FLOOR].p80, found[FLOOR].rounds) == (14, 19, 24, 7)
        assert found[FLOOR].ratio == 0.5
        assert found[EAGER].ratio == 2
        assert found[OURS].ratio == 1
        assert found[OURS].others == 0.25


def result(chosen, contestant, ratio, threads=2):
    return Result(chosen, threads, contestant, 90.0, 100.0, 110.0, 7, ratio, 0.0)


class TestVerdicts:
    def test_geometric_mean(self):
        assert geometric_mean([4.0, 1.0]) == pytest.approx(2)
        assert geometric_mean([2.0, 2.0, 16.0]) == pytest.approx(4)

    def test_mean_and_worst_are_judged_as_the_target_says(self):
        shapes = [shape for shape in resnet50() if case(shape=shape).is_in_grid][:2]
        found = [result(case(shape=shape), EAGER, ratio) for shape, ratio in zip(shapes, (2.0, 9.0), strict=True)]
        found.append(result(case(shape=resnet50()[0]), EAGER, 0.1))  # 103 MB: not in the grid
        found.append(result(case(shape=shapes[0]), EAGER, 0.1, threads=1))
        verdicts, threads = evaluate(found)
        assert threads == 2
        forward = next(v for v in verdicts if v.target.text == "NCHW float32, forward" and v.target.contestant == EAGER)
        assert (forward.cases, forward.mean, forward.lowest) == (2, pytest.approx(18**0.5), 2.0)
        assert forward.figure == forward.mean
        assert forward.is_met is True
        assert forward.worst.shape == shapes[0]
        slower = next(v for v in verdicts if v.target.contestant == EAGER and v.target.text == "every case of the grid")
        assert (slower.figure, slower.is_met) == (2.0, True)
        assert {v.is_met for v in verdicts if v not in (forward, slower)} == {None}

    def test_the_floor_is_an_upper_limit_for_every_case(self):
        found = [result(case(), FLOOR, 1 / 1.2), result(case("relu"), FLOOR, 1 / 1.3)]
        verdict = evaluate(found)[0][0]
        assert verdict.is_met is False
        assert verdict.worst.operation == "relu"
        row = targets_table([verdict], 2).rows[0]
        assert row[0] == "missed"
        assert row[3] == "worst at most 1.25"
        assert row[5:7] == ("1.25", "1.30")
        assert evaluate(found[:1])[0][0].is_met is True

    def test_every_target_has_cases_in_the_full_run_that_its_peer_takes_part_in(self):
        for target in TARGETS:
            about = [case for case in all_cases() if target.is_about(case)]
            assert about, target
            assert target.contestant == FLOOR or any(target.contestant in participants(case) for case in about), target
        large = next(target for target in TARGETS if target.where == "large")
        assert {case.family for case in all_cases() if large.is_about(case)} == {"grid", "huge"}

    def test_without_two_threads_the_most_that_were_measured_are_judged(self):
        assert evaluate([result(case(), EAGER, 5.0, threads) for threads in (1, 8)])[1] == 8
        assert targets.THREADS == 2

    def test_tables_show_ratios_and_leave_out_who_was_not_there(self):
        found = [result(case(), name, r) for name, r in {OURS: 1, FLOOR: 0.8, "copy": 0.5, EAGER: 3.456}.items()]
        table = cases_table(found)
        assert dict(zip(table.header, table.rows[0], strict=True)) == {
            "threads": "2", "operation": "forward", "type": "float32", "layout": "NCHW", "shape": "32x64x56x56",
            "ours, us": "100", "x floor": "1.25", "x copy": "2.00", "PyTorch": "3.46", "ours on NumPy, us": "",
        }  # fmt: skip
        assert grid_table(found).rows == [("2", "forward", "float32", "NCHW", "1", "1.25 (1.25)", "3.46 (3.46)")]
        assert table.markdown().splitlines()[1].startswith("| --- | --- |")
        assert len({len(line) for line in table.text().splitlines()}) <= 2


class TestFiles:
    def test_results_come_back_from_their_file(self, tmp_path):
        found = [result(case(), OURS, 1.0), result(case("relu", "NC", (256, 120)), EAGER, 2.5, threads=1)]
        write_csv(tmp_path / "results.csv", found, HERE)
        assert read_csv(tmp_path / "results.csv") == (found, HERE)
        assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]

    def test_a_file_of_something_else_is_refused(self, tmp_path):
        (tmp_path / "other.csv").write_text("a,b\n1,2\n")
        with pytest.raises(InputError, match="not a results"):
            read_csv(tmp_path / "other.csv")
        with pytest.raises(InputError, match="cannot be read"):
            read_csv(tmp_path / "none.csv")


class TestCommand:
    def invoke(self, *arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    def test_a_run_writes_its_table_csv_picture_and_markdown(self, tmp_path):
        """In a process of its own, as every run; only PyTorch takes part, the others take seconds to load."""
        output = tmp_path / "report"
        options = (
            "--family",
            "tiny",
            "--family",
            "lenet",
            "--operation",
            "forward",
            "--layout",
            "nchw",
            "--threads",
            1,
        )
        done = self.invoke(
            *options, "--dtype", "float32", "--peer", "pytorch", "--seconds", 0.01, "--output", output, "--targets",
            "--markdown", tmp_path / "table.md",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        assert "2x3x4x4" in done.stdout
        assert "64x16x8x8" in done.stdout
        assert "not measured" in done.stdout
        assert f"Written: {output / 'results.csv'}" in done.stderr
        with (output / "results.csv").open(newline="") as file:
            written = list(csv.DictReader(file))
        assert {row["contestant"] for row in written} == {OURS, FLOOR, "copy", EAGER}
        assert len(written) == 3 * 4
        assert all(0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"]) for row in written)
        assert all(int(row["rounds"]) >= 7 and row["threads"] == "1" and row["torch"] for row in written)
        with Image.open(output / "speed.png") as picture:
            assert picture.width > 1000
        markdown = (tmp_path / "table.md").read_text()
        assert "### Targets, 1 thread" in markdown
        assert "| 1 | forward | float32 | NCHW | 2x3x4x4 |" in markdown

        again = self.invoke("--read", output / "results.csv", "--output", tmp_path / "again")
        assert again.exit_code == 0, again.output
        assert again.stdout == done.stdout.partition("\nTargets")[0]
        assert [path.name for path in (tmp_path / "again").iterdir()] == ["speed.png"]

    def test_measuring_here_gives_a_row_for_every_contestant(self):
        chosen = case("add+relu", "channels-last", (2, 3, 4, 4), family="tiny")
        note, *others, measured = measure(Plan(1, (chosen,), (EAGER, IN_PLACE), frozenset(), Effort(0.001, fewest=1)))
        assert "fastest read" in note.text
        assert all("other processes" in note.text for note in others)
        assert [r.contestant for r in measured] == [OURS, FLOOR, "add", "copy", EAGER, IN_PLACE]

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--operation", "backwards"), "--operation is backwards; it must be one of forward, forward+backward"),
            (("--peer", "caffe"), "--peer is caffe; it must be one of PyTorch, PyTorch-in-place"),
            (("--shape", "64by64"), "--shape is 64by64; it must be sizes such as 32x64x56x56"),
            (("--threads", 0), "--threads is 0; it must be 1 to"),
            (("--seconds", 0), "--seconds is 0.0; it must be above 0"),
            (("--layout", "NC", "--family", "huge"), "no case is left by these options"),
            (("--read", "missing.csv"), "--read missing.csv: cannot be read"),
        ],
    )
    def test_bad_input_is_one_line_and_exit_code_2(self, tmp_path, monkeypatch, arguments, message):
        monkeypatch.chdir(tmp_path)
        done = self.invoke(*arguments)
        assert done.exit_code == 2
        assert done.stdout == ""
        assert done.stderr.startswith("benchmarks: ")
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_the_list_names_who_takes_part(self):
        done = self.invoke("--list", "--family", "huge")
        assert done.stdout.splitlines() == [
            f"forward float32 NCHW (32, 256, 112, 112): {EAGER}, {COMPILED}, {ONEDNN}, {JAX}",
            f"forward+backward float32 NCHW (32, 256, 112, 112): {EAGER}, {COMPILED}, {JAX}",
        ]


class TestCalls:
    def test_every_way_of_a_small_call_is_timed(self, capsys):
        tables = {
            "NumPy": calls.numpy_calls((4, 3)),
            "forward": calls.layer_calls((4, 3), backward=False),
            "both passes": calls.layer_calls((2, 3, 2, 2), backward=True),
        }
        for title, ways in tables.items():
            calls.report(title, (4, 3), ways, Effort(seconds=0, fewest=1))
            title_line, *rows = capsys.readouterr().out.strip().splitlines()
            assert title_line == f"{title} (4, 3)"
            assert [row[2:30].strip() for row in rows] == list(ways)
            assert rows[0].endswith("1.00")
            assert all(float(row.split()[-1]) > 0 for row in rows)

    def test_the_ways_compute_what_they_say(self):
        ways = calls.numpy_calls((16, 3))
        np.testing.assert_allclose(ways["forward"]()[0].mean(0), 0, atol=1e-6)
        masked = ways["masked"]()
        assert (masked == 0).all(axis=1).any()
        assert np.abs(ways["batch_norm, inference"]()).max() > 0
