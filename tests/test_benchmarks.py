"""The benchmarks measure what they say: the cases, the floor, the verdicts, the command."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from benchmark_cases import BEST, case, machine, result
from benchmarks import calls
from benchmarks.__main__ import Early, app
from benchmarks.arrays import make
from benchmarks.cases import GRID_LIMIT, LAYOUTS, OPERATIONS, all_cases, lenet, quick_cases, resnet50
from benchmarks.contestants import (
    COMPILED,
    EAGER,
    FLOOR,
    IN_PLACE,
    JAX,
    ONEDNN,
    OPENVINO,
    OURS,
    contestants,
    missing,
    participants,
)
from benchmarks.floors import memory_passes, moved_bytes, slice_bytes
from benchmarks.results import read_csv, write_csv
from benchmarks.timing import Effort, Timing
from benchmarks.worker import Plan, measure, rows
from PIL import Image
from typer.testing import CliRunner

from batchnorm import _native
from batchnorm.training.options import InputError

L2 = 2**20

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
        chosen, plan = case("forward+backward", "channels-last"), Plan(2, "avx2", (), (), frozenset(), Effort())
        found = {r.contestant: r for r in rows(chosen, plan, timings, 0.25, L2)}
        assert (found[FLOOR].p20, found[FLOOR].p50, found[FLOOR].p80, found[FLOOR].rounds) == (14, 19, 24, 7)
        assert found[FLOOR].ratio == 0.5
        assert found[EAGER].ratio == 2
        assert found[OURS].ratio == 1
        assert {(r.threads, r.instruction_set, r.others) for r in found.values()} == {(2, "avx2", 0.25)}


class TestFiles:
    def test_results_come_back_from_their_file(self, tmp_path):
        found = [result(case(), OURS, 1.0), result(case("relu", "NC", (256, 120)), EAGER, 2.5, threads=1)]
        found.append(result(case(), EAGER, 3.0, instruction_set="avx2", is_disturbed=True))
        write_csv(tmp_path / "results.csv", found, machine())
        assert read_csv(tmp_path / "results.csv") == (found, machine())
        assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]

    def test_a_file_of_an_earlier_version_is_read(self, tmp_path):
        """Without the instruction sets, OpenVINO and marks; the load tells which cases may have been disturbed."""
        (tmp_path / "results.csv").write_text(
            "commit,date,machine,os,compiler,python,batchnorm,torch,jax,numpy,"
            "threads,family,operation,dtype,layout,shape,contestant,p20_us,p50_us,p80_us,rounds,ratio,others\n"
            'c0ffee,2026-01-02 03:04,"a machine, 2 cores",Linux,g++ 12,3.11,0.1,2.13,0.10,2.4,'
            "2,grid,forward,float32,NCHW,32x64x56x56,batchnorm,90,100,110,7,1,0.01\n"
            'c0ffee,2026-01-02 03:04,"a machine, 2 cores",Linux,g++ 12,3.11,0.1,2.13,0.10,2.4,'
            "2,grid,relu,float32,NCHW,32x64x56x56,batchnorm,90,100,110,7,1,0.16\n"
        )
        (quiet, busy), found = read_csv(tmp_path / "results.csv")
        assert quiet == result(case(), OURS, 1.0, instruction_set="unknown", others=0.01)
        assert busy == result(case("relu"), OURS, 1.0, instruction_set="unknown", others=0.16, is_disturbed=True)
        assert (found.numpy, found.openvino, found.instruction_sets) == ("2.4", "not installed", "unknown")

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
        assert f"\nTargets, 1 thread, {BEST}: " in done.stdout
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
        assert f"| 1 | {BEST} | forward | float32 | NCHW | 2x3x4x4 |" in markdown

        again = self.invoke("--read", output / "results.csv", "--output", tmp_path / "again")
        assert again.exit_code == 0, again.output
        assert again.stdout == done.stdout.partition("\nTargets")[0]
        assert [path.name for path in (tmp_path / "again").iterdir()] == ["speed.png"]

    def test_measuring_here_gives_a_row_for_every_contestant(self):
        chosen = case("add+relu", "channels-last", (2, 3, 4, 4), family="tiny")
        peers, effort, used = (EAGER, IN_PLACE), Effort(0.001, fewest=1), _native.instruction_set()
        note, *others, measured = measure(Plan(1, used, (chosen,), peers, frozenset(), effort))
        assert "fastest read" in note.text
        assert all("other processes" in note.text for note in others)
        assert [r.contestant for r in measured] == [OURS, FLOOR, "add", "copy", EAGER, IN_PLACE]
        assert {r.instruction_set for r in measured} == {used}

    def test_figures_of_another_instruction_set_are_not_measured(self):
        plan = Plan(1, "sse9", (case(),), (), frozenset(), Effort())
        with pytest.raises(RuntimeError, match=f"is {_native.instruction_set()}; the plan's is sse9"):
            next(measure(plan))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--operation", "backwards"), "--operation is backwards; it must be one of forward, forward+backward"),
            (("--peer", "caffe"), "--peer is caffe; it must be one of PyTorch, PyTorch-in-place"),
            (("--shape", "64by64"), "--shape is 64by64; it must be sizes such as 32x64x56x56"),
            (("--threads", 0), "--threads is 0; it must be 1 to"),
            (("--seconds", 0), "--seconds is 0.0; it must be above 0"),
            (("--instruction-set", "sse9"), f"--instruction-set is sse9; it must be one of {BEST}"),
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

    def test_an_unknown_instruction_set_in_the_environment_is_one_line(self, tmp_path):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks", "--output", tmp_path / "report"],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "BATCHNORM_INSTRUCTION_SET": "sse9"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2
        assert done.stderr.startswith("benchmarks: the instruction set sse9 is not one of")
        assert len(done.stderr.splitlines()) == 1
        assert list(tmp_path.iterdir()) == []

    def test_each_instruction_set_is_measured_by_its_kernels(self, tmp_path):
        """The worst last, which the environment of the tests does not select."""
        sets = list(dict.fromkeys((BEST, _native.instruction_sets()[-1])))
        options = [option for name in sets for option in ("--instruction-set", name)]
        done = self.invoke(
            *options, "--shape", "2x3", "--operation", "forward", "--peer", "none", "--threads", 1,
            "--seconds", 0.001, "--quick", "--output", tmp_path, "--targets",
        )  # fmt: skip
        assert done.exit_code == 0, done.output
        found, _ = read_csv(tmp_path / "results.csv")
        assert [r.instruction_set for r in found if r.contestant == OURS] == sets
        for name in sets:
            assert f"1        {name} " in done.stdout
            assert f"Targets, 1 thread, {name}: geometric mean (worst)" in done.stdout

    def test_all_is_every_instruction_set_of_this_machine(self, tmp_path, monkeypatch):
        def stop(plans):
            asked.extend(plan.instruction_set for plan in plans)
            return [], machine(), Early("stopped", 130)

        asked = []
        monkeypatch.setattr("benchmarks.__main__._measure", stop)
        done = self.invoke("--instruction-set", "all", "--quick", "--output", tmp_path / "report")
        assert done.exit_code == 130
        assert asked == _native.instruction_sets()


class TestOpenVINO:
    def test_it_takes_part_in_inference_of_float32_images(self, monkeypatch):
        assert OPENVINO in participants(case("inference"))
        for other in (case("forward"), case("inference", "channels-last"), case("inference", dtype="bfloat16")):
            assert OPENVINO not in participants(other)
        monkeypatch.setattr("benchmarks.contestants.find_spec", lambda module: None)
        assert missing([EAGER, OPENVINO]) == {OPENVINO: "openvino"}

    def test_it_computes_the_same_and_allocates_its_results(self):
        pytest.importorskip("openvino")
        chosen = case("inference", shape=(4, 5, 3, 2))
        ours, *_, peer = contestants(chosen, make(chosen), [OPENVINO])
        first, second = peer.run(), peer.run()
        assert first.data_ptr() != second.data_ptr()
        np.testing.assert_allclose(peer.unpack(first)["y"], ours.unpack(ours.run())["y"], atol=1e-5)
        np.testing.assert_array_equal(first, second)


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
