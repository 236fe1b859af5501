"""The race is fair, and all contestants compute the same."""

import dataclasses
import itertools

import numpy as np
import pytest
from benchmark_cases import case
from benchmarks.arrays import make
from benchmarks.cases import OPERATIONS, quick_cases
from benchmarks.contestants import (
    COMPILED,
    EAGER,
    IN_PLACE,
    JAX,
    NUMPY,
    ONEDNN,
    OURS,
    contestants,
    missing,
    participants,
)
from benchmarks.timing import WARM_CALLS, Effort, race, rounds_for, takes_part
from benchmarks.worker import compiled_cases, is_disturbed


class TestRace:
    def test_turns_are_interleaved_and_everyone_is_timed_by_itself(self):
        log, now = [], itertools.count()

        def contestant(name):
            from benchmarks.contestants import Contestant

            return Contestant(name, run=lambda: log.append(name), warm_caches=lambda: log.append(f"warm_caches {name}"))

        effort = Effort(seconds=1, fewest=2, most=4)
        large = case(shape=(32, 64, 112, 112))
        timings = race([contestant("a"), contestant("b")], large, effort, {"a": 0.0, "b": 1.0}, lambda: next(now))
        length = WARM_CALLS + 2
        turns = [log[i : i + length] for i in range(0, len(log), length)]
        untimed_then_timed = [[name] * WARM_CALLS + [f"warm_caches {name}", name] for name, *_ in turns]
        assert turns == untimed_then_timed
        order = "".join(turn[0] for turn in turns)
        assert (order.count("a"), order.count("b")) == (4, 2)
        assert "b" in order[:-2], "b's rounds are spread over the race"
        assert {name: (t.p50, t.rounds) for name, t in timings.items()} == {"a": (0.001, 4), "b": (0.001, 2)}

    def test_rounds_share_the_time(self):
        assert rounds_for(0.01, Effort(seconds=2, fewest=5, most=50), contestants=10) == 20
        assert rounds_for(9.0, Effort(seconds=2, fewest=5, most=50), contestants=10) == 5
        assert rounds_for(0.0, Effort(seconds=2, fewest=5, most=50), contestants=10) == 50
        for rounds, total in itertools.combinations(range(1, 30), 2):
            assert sum(takes_part(number, rounds, total) for number in range(total)) == rounds

    def test_a_race_is_disturbed_by_who_needs_its_cores(self, monkeypatch):
        monkeypatch.setattr("os.cpu_count", lambda: 4)
        assert not is_disturbed(0.1, threads=4)
        assert is_disturbed(0.2, threads=4)
        assert not is_disturbed(2.1, threads=2)
        assert is_disturbed(2.2, threads=2)

    def test_torch_compile_takes_part_once_where_it_is_quick(self):
        assert len(compiled_cases(quick_cases(), quick=True)) == 1
        assert len(compiled_cases(quick_cases(), quick=False)) == len(quick_cases()) - 2  # all but forward-out


PEERS = (EAGER, IN_PLACE, ONEDNN, JAX, NUMPY)
TINY = [case(operation, layout, (4, 5, 3, 2)) for operation in OPERATIONS for layout in ("NCHW", "channels-last")]
TINY += [case(operation, "channels-last", (4, 5, 3, 2), "bfloat16") for operation in ("inference", "add+relu")]
TINY += [case(operation, "NC", (7, 5)) for operation in ("forward+backward", "inference", "relu")]
TINY += [case("forward+backward", "masked", (3, 7, 5), dtype) for dtype in ("float32", "bfloat16")]


class TestContestants:
    @pytest.mark.parametrize("chosen", TINY, ids=str)
    def test_everyone_computes_the_same(self, chosen):
        names = [name for name in participants(chosen, compiles=False) if name in PEERS]
        arrays = make(chosen)
        racing = [c for c in contestants(chosen, arrays, names) if c.unpack is not None]
        results = {c.name: c.unpack(c.run()) for c in racing}
        ours = results[OURS]
        expected = {"y", "dx", "dgamma", "dbeta"} if chosen.has_backward else {"y"}
        assert set(ours) == expected | ({"dresidual"} if chosen.has_residual else set())
        assert ours["y"].std() > 0.5
        assert set(results) >= {OURS, *names}
        tolerance = 1e-5 if chosen.dtype == "float32" else 2**-6  # two roundings to 8 bits
        for found in results.values():
            assert found.keys() == ours.keys()
            for name, value in found.items():
                if name != "y" and chosen.has_residual and chosen.dtype == "bfloat16":
                    continue  # PyTorch rounds before it adds the residual: another sign of a sum near 0, another dx
                assert value.shape == ours[name].shape
                np.testing.assert_allclose(value, ours[name], rtol=0, atol=tolerance * max(1, abs(ours[name]).max()))

    def test_torch_compile_computes_the_same_functions(self):
        """Compiling takes seconds; what is compiled are these functions of eager PyTorch, here with a mask."""
        from benchmarks import peer_pytorch

        chosen = case("forward+backward", "masked", (3, 7, 5))
        arrays = make(chosen)
        eager, compiled = (peer_pytorch.function_of(chosen, arrays, peer) for peer in (EAGER, COMPILED))
        y = eager(arrays.x, arrays.gamma, arrays.beta)
        np.testing.assert_allclose(compiled(arrays.x, arrays.gamma, arrays.beta), y, atol=1e-6)
        assert (y[~arrays.kept] == 0).all()
        assert 0 < arrays.kept.sum() < 21

    def test_a_peer_that_is_not_installed_is_named(self, monkeypatch):
        monkeypatch.setattr("benchmarks.contestants.find_spec", lambda module: None)
        assert missing(PEERS) == {JAX: "jax"}

    def test_all_contestants_get_the_same_numbers_and_ours_a_tensor_in_the_layout(self):
        chosen = case("add+relu", "channels-last", (4, 5, 3, 2))
        arrays = make(chosen)
        assert arrays.x.stride()[1] == arrays.dy.stride()[1] == arrays.residual.stride()[1] == 1
        np.testing.assert_array_equal(arrays.x, make(dataclasses.replace(chosen, layout="NCHW")).x)
