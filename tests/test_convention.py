"""`Convention`: invalid records, names and documentation."""

import re
from dataclasses import FrozenInstanceError, fields, replace

import pytest

import batchnorm as bn
from batchnorm.convention import Convention
from batchnorm.conventions import find

VALID = bn.CONVENTIONS["pytorch"]


@pytest.mark.parametrize(("field", "value", "message"), [
    ("eps", -1.0, "eps is -1.0; it must be finite and >= 0"),
    ("eps", float("inf"), "eps is inf"),
    ("eps_train", "within", "eps_train is 'within'; allowed are 'inside', 'outside', 'absent'"),
    ("eps_eval", None, "eps_eval is None; allowed are 'inside'"),
    ("tracked", "variance", "tracked is 'variance'; allowed are 'var', 'std', 'std_eps', 'rstd', 'var_eps', 'log10_std'"),
    ("tracked", "rstd", "eps_eval is 'inside', but the tracked rstd already contains eps; use 'absent'"),
    ("running_correction", 2, "running_correction is 2; the divisor count - c is used with c = 0 or 1"),
    ("masked_running_correction", 2, "masked_running_correction is 2"),
    ("normalize_correction", -1, "normalize_correction is -1"),
    ("decay", 1.5, "decay is 1.5; it is the weight of the old running value"),
    ("decay", -0.1, "decay is -0.1"),
    ("debias", "yes", "debias is 'yes'"),
    ("initial_spread", float("nan"), "initial_spread is nan; it must be finite"),
    ("single", "raise", "single is 'raise'"),
    ("update", "never", "update is 'never'; allowed are 'training', 'always'"),
    ("affine", "none", "affine is 'none'"),
    ("zero_eps", "maybe", "zero_eps is 'maybe'"),
])  # fmt: skip
def test_invalid_fields_are_refused(field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(VALID, **{field: value})


def test_inconsistent_fields_are_refused():
    with pytest.raises(ValueError, match="eps_train is 'outside', but the tracked std_eps has eps inside the root"):
        replace(VALID, tracked="std_eps", eps_eval="absent", eps_train="outside")
    with pytest.raises(ValueError, match="sums with debias 'weight_sum' need one"):
        replace(VALID, decay=None, debias="weight_sum")
    with pytest.raises(TypeError, match=re.escape("decay is True (bool)")):
        replace(VALID, decay=True)


def test_record_is_frozen_and_hashable():
    with pytest.raises(FrozenInstanceError):
        VALID.eps = 1.0  # type: ignore[misc]
    assert hash(VALID) == hash(replace(VALID))
    assert len(set(bn.CONVENTIONS.values())) == len(bn.CONVENTIONS)


def test_names():
    assert set(bn.CONVENTIONS) == {
        "zygote-gist", "lasagne-gist", "cs231n", "d2l", "returnn-common-demo",
        "pytorch", "flax", "keras", "tensorflow-fused", "returnn",
    }  # fmt: skip
    for name, record in bn.CONVENTIONS.items():
        assert find(name) is record
        assert record.name == name
        assert len(record.source) > 20
    with pytest.raises(TypeError):
        bn.CONVENTIONS["mine"] = VALID  # type: ignore[index]
    with pytest.raises(ValueError, match="did you mean 'flax'"):
        find("Flax ")


def test_every_field_is_documented():
    for field in fields(Convention):
        assert f"        {field.name}: " in Convention.__doc__, field.name


def test_correction_depends_on_the_mask_where_the_system_does():
    assert bn.CONVENTIONS["returnn"].correction(masked=True) == 0
    assert bn.CONVENTIONS["returnn"].correction(masked=False) == 1
    assert VALID.correction(masked=True) == VALID.correction(masked=False) == 1
