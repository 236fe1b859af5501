"""The table of docs/deploying.md, for the installed tools: some recognize our layers, others need `restored`."""

import copy
import warnings

import pytest
import torch
from benchmarks.vision import load_torchvision
from small_networks import images, small_network
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.flop_counter import FlopCounterMode

import batchnorm.torch as bnt

load_torchvision()

with warnings.catch_warnings():  # these warn of deprecated parts of PyTorch while they are imported
    warnings.simplefilter("ignore")
    from torch.ao.quantization import get_default_qat_qconfig_mapping
    from torch.ao.quantization.quantize_fx import fuse_fx, prepare_qat_fx
    from torch.fx.experimental.optimization import fuse

from timm.layers import convert_sync_batchnorm, freeze_batch_norm_2d  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def trained_network():
    model = nn.Sequential(*small_network(), nn.Conv2d(4, 4, 1))
    model(images())
    return model


def updated(model):
    update_bn([images(2), images(3)], model)
    return model[1].running_var


def frozen(model):
    freeze_batch_norm_2d(model)
    return model.train()(images(2))


def synchronized(model):
    return type(convert_sync_batchnorm(model)[1])


def flops(model):
    with FlopCounterMode(display=False) as counter:
        model(images())
    return counter.get_total_flops()


def features(model):
    return create_feature_extractor(model.eval(), {"1": "normalized"})(images(2))["normalized"]


def folded(tool):
    def kinds(model):
        return [type(m) for m in tool(model.eval()).modules()][1:]

    return kinds


def prepared(model):
    model = prepare_qat_fx(model.train(), get_default_qat_qconfig_mapping("x86"), (images(),))
    return [type(m).__name__ for m in model.children()]


SEEN = {
    "update_bn": updated, "timm freeze": frozen, "timm synchronize": synchronized, "flops": flops,
    "feature extractor": features,
}  # fmt: skip
PASSED_BY = {"fuse_fx": folded(fuse_fx), "fx fuse": folded(fuse), "prepare_qat_fx": prepared}


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("tool", SEEN)
def test_sees_ours(tool, is_fused):
    ours = trained_network()
    bnt.replace(ours, fuse=is_fused, example=images())
    mine, other = (SEEN[tool](model) for model in (ours, trained_network()))
    if isinstance(other, torch.Tensor):
        torch.testing.assert_close(mine, other)
    else:
        assert mine == other


@pytest.mark.parametrize("tool", PASSED_BY)
def test_passes_ours_by_unless_restored(tool):
    """These tools compare exact classes."""
    expected, ours = PASSED_BY[tool](trained_network()), trained_network()
    bnt.replace(ours)
    assert PASSED_BY[tool](copy.deepcopy(ours)) != expected
    with bnt.restored(ours):
        assert PASSED_BY[tool](copy.deepcopy(ours)) == expected
