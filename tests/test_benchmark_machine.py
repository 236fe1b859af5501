"""The report on a machine: sizes from its caches, bytes of each pass, and the command."""

import re

import pytest
import torch
from benchmark_cases import BEST, capabilities
from benchmarks.__main__ import app
from benchmarks.machine import cores, line_size, size
from benchmarks.machine_report import PASSES, Bandwidth, bandwidth_table, bandwidths, tensor_sizes
from benchmarks.timing import Effort, Timing
from benchmarks.worker import Plan, in_process
from typer.testing import CliRunner

from batchnorm import _native


class TestMachineReport:
    def test_sizes_follow_from_the_caches(self):
        assert tensor_sizes(1, 2**20, 2**25) == {"L2": 2**18, "L3": 2**23, "memory": 2**27}
        assert tensor_sizes(64, 2**20, 2**25) == {"L2": 2**24, "memory": 2**28}

    def test_speeds_count_the_bytes_of_each_pass(self, monkeypatch):
        """4096 bytes in 2 microseconds are 2.048 GB/s; copy moves twice as many, add three times."""
        timings = dict.fromkeys(PASSES, Timing(1, 2, 3, 9))
        monkeypatch.setattr("benchmarks.machine_report.cache_sizes", lambda: (2**14, 0))
        monkeypatch.setattr("benchmarks.machine_report.least_disturbed", lambda *_: (timings, 9.0))
        threads = torch.get_num_threads()
        first, memory = bandwidths(Plan(threads, BEST, (), (), frozenset(), Effort()))
        assert (first.threads, first.place, first.bytes) == (threads, "L2", threads * 4096)
        assert memory.bytes == threads * 2**16
        expected = {"read": 2.048 * threads, "copy-into": 4.096 * threads, "add-into": 6.144 * threads}
        assert first.speeds == pytest.approx(expected)
        assert first.is_disturbed

    def test_a_row_for_each_tensor_with_the_mark_of_load(self):
        speeds = {"read": 10.0, "copy-into": 20.04, "add-into": 30.0}
        found = [Bandwidth(1, "L2", 2**18, speeds, False), Bandwidth(2, "memory", 2**27, speeds, True)]
        table = bandwidth_table(found)
        assert table.header == ("threads", "x fits", "x", "copy", "read", "add")
        assert table.rows == [
            ("1", "L2", "256 KiB", "20.0", "10.0", "30.0"),
            ("2", "memory", "128 MiB", "20.0†", "10.0†", "30.0†"),
        ]
        assert table.text().splitlines()[-1].startswith("† Measured under load")

    def test_the_command_prints_and_writes_it(self, tmp_path, monkeypatch):
        monkeypatch.setattr("benchmarks.machine_report.measure", lambda plans: asked.extend(plans) or [])
        asked = []
        done = CliRunner().invoke(app, ["--machine-report", "--output", str(tmp_path / "report")])
        assert done.exit_code == 0, done.output
        assert [plan.threads for plan in asked] == sorted({1, len(cores())})
        facts = dict(re.split("  +", line, maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
        l2, l3 = _native.caches()
        assert facts["caches assumed by the kernels"] == f"L2 {size(l2)}, L3 {size(l3)}"
        assert facts["instruction set"].split()[0] == f"{_native.instruction_set()},"
        assert f"lines of {line_size()} bytes" in done.stdout
        assert (tmp_path / "report" / "machine.txt").read_text() == done.stdout
        assert done.stderr.splitlines()[-1] == f"Written: {tmp_path / 'report' / 'machine.txt'}"
        only_printed = CliRunner().invoke(app, ["--machine-report"])
        assert "Written" not in only_printed.stderr


@pytest.mark.skipif("avx2" not in _native.instruction_sets(), reason="the machine has no AVX2")
def test_peers_use_the_instruction_set_of_the_kernels(monkeypatch):
    """Against a PyTorch that uses AVX-512, the figures of AVX2 kernels would mean nothing."""
    monkeypatch.delenv("BATCHNORM_INSTRUCTION_SET", raising=False)
    assert list(in_process(capabilities, Plan(1, "avx2", (), (), frozenset(), Effort()))) == [("AVX2", "avx2")]
