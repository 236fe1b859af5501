"""Widely used networks, small where their configuration allows it, with small inputs.

torchvision 0.28.0 and transformers 5.24.0. Weights are random, those of the batch norms too, and always the same.
"""

from collections.abc import Callable
from functools import partial
from pkgutil import resolve_name
from typing import Any

import torch
from benchmarks.vision import load_torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map

Example = Any  # a tensor, a tuple of positional arguments or a dict of named ones
Factory = Callable[[], tuple[nn.Module, Example]]


def build(name: str) -> tuple[nn.Module, Example]:
    """A network in float64 and training mode, and an example of its input that requires gradients."""
    torch.manual_seed(0)
    model, example = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    refuses_gradients = hasattr(model, "freeze_feature_encoder")  # of speech, in training: it sets requires_grad itself

    def prepared(value: Any) -> Any:
        is_floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.double().requires_grad_(not refuses_gradients) if is_floating else value

    return model.double().to(torch.get_default_device()).train(), tree_map(prepared, example)


def vision(name: str, *shape: int, **options: Any) -> Factory:
    """A network of torchvision, by name."""
    return lambda: (load_torchvision().models.get_model(name, weights=None, **options), torch.randn(shape))


def features_of_vgg() -> tuple[nn.Module, Example]:
    """The convolutional part alone, because the rest has most of the 133 million parameters."""
    return load_torchvision().models.vgg11_bn(init_weights=False).features, torch.randn(4, 3, 32, 32)


def small_maxvit() -> tuple[nn.Module, Example]:
    """A MaxVit with windows of 2 x 2, called with positional arguments."""
    sizes = {"stem_channels": 8, "block_channels": [8, 16], "block_layers": [1, 2], "head_dim": 4}
    maxvit = load_torchvision().models.MaxVit((32, 32), partition_size=2, stochastic_depth_prob=0.2, **sizes)
    return maxvit, (torch.randn(4, 3, 32, 32),)


def frozen_resnet() -> tuple[nn.Module, Example]:
    """A short ResNet with the frozen batch norms of torchvision."""
    package = load_torchvision()
    model = package.models.ResNet(
        package.models.resnet.BasicBlock, [1, 1, 1, 1], norm_layer=package.ops.FrozenBatchNorm2d
    )
    for buffer in model.buffers():
        buffer.uniform_(0.5, 1.5)
    return model, torch.randn(4, 3, 32, 32)


def huggingface(name: str, inputs: dict[str, Any], part: str = "", **config: Any) -> Factory:
    """A model class of transformers, built from its configuration; `part` selects a submodule.

    Callables among the inputs are called to make their tensors.
    """

    def make() -> tuple[nn.Module, Example]:
        load_torchvision()  # which transformers would import
        model_class = resolve_name(f"transformers.{name}")
        model = model_class(model_class.config_class(**config)).get_submodule(part)
        return model, {key: value() if callable(value) else value for key, value in inputs.items()}

    return make


def floats(*shape: int) -> Callable[[], Tensor]:
    return partial(torch.randn, shape)


def tokens(*shape: int) -> Callable[[], Tensor]:
    return partial(torch.randint, 3, 20, shape)


def images(size: int, batch: int = 4) -> dict[str, Any]:
    return {"pixel_values": floats(batch, 3, size, size)}


# Pieces of the configurations of transformers.
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STAGES = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 1, 1]}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2]}
NECK = {"neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 8, "use_batch_norm_in_fusion_residual": True}
HGNET = {
    "stem_channels": [3, 8, 8], "stage_in_channels": [8, 16, 16, 32], "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 32, 32], "hidden_sizes": [16, 16, 32, 32], "stage_num_blocks": [1, 1, 2, 1],
    "stage_numb_of_layers": [2, 2, 2, 2],
}  # fmt: skip
WAVES = {
    "conv_dim": [8, 8, 8], "conv_stride": [4, 4, 2], "conv_kernel": [8, 4, 2], "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2, "apply_spec_augment": False,
}  # fmt: skip
CONFORMER = {**LAYERS, "subsampling_conv_channels": 8, "num_mel_bins": 16, "conv_kernel_size": 9}
DETECTOR = {
    "encoder_hidden_dim": 16, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "d_model": 16, "num_queries": 6,
    "decoder_in_channels": [16, 16, 16], "decoder_ffn_dim": 32, "decoder_layers": 2, "decoder_attention_heads": 2,
    "num_denoising": 0,
}  # fmt: skip
RT_RESNET = {
    "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1],
    "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"],
}  # fmt: skip

# fmt: off
NETWORKS = {
    # torchvision, by its own names; quantized_ are those that can be quantized, before they are
    "resnet18": vision("resnet18", 4, 3, 64, 64),
    "resnet-frozen": frozen_resnet,
    "resnet50": vision("resnet50", 4, 3, 64, 64),
    "resnext50_32x4d": vision("resnext50_32x4d", 4, 3, 64, 64),
    "densenet121": vision("densenet121", 4, 3, 64, 64),
    "vgg11_bn-features": features_of_vgg,
    "inception_v3": vision("inception_v3", 2, 3, 299, 299, init_weights=False),
    "googlenet": vision("googlenet", 4, 3, 64, 64, init_weights=False),
    "efficientnet_b0": vision("efficientnet_b0", 4, 3, 64, 64),
    "efficientnet_v2_s": vision("efficientnet_v2_s", 4, 3, 64, 64),
    "mobilenet_v2": vision("mobilenet_v2", 4, 3, 64, 64),
    "mobilenet_v3_small": vision("mobilenet_v3_small", 4, 3, 64, 64),
    "shufflenet_v2_x1_0": vision("shufflenet_v2_x1_0", 4, 3, 64, 64),
    "mnasnet1_0": vision("mnasnet1_0", 4, 3, 64, 64),
    "regnet_y_400mf": vision("regnet_y_400mf", 4, 3, 64, 64),
    "maxvit": small_maxvit,
    "quantized_resnet18": vision("quantized_resnet18", 4, 3, 64, 64),
    "quantized_mobilenet_v2": vision("quantized_mobilenet_v2", 4, 3, 64, 64),
    "quantized_shufflenet_v2_x1_0": vision("quantized_shufflenet_v2_x1_0", 4, 3, 64, 64),
    "fcn_resnet50": vision("fcn_resnet50", 2, 3, 64, 64, weights_backbone=None),
    "deeplabv3_resnet50": vision("deeplabv3_resnet50", 4, 3, 64, 64, weights_backbone=None, aux_loss=True),
    "lraspp_mobilenet_v3_large": vision("lraspp_mobilenet_v3_large", 4, 3, 64, 64, weights_backbone=None),
    "r3d_18": vision("r3d_18", 2, 3, 4, 32, 32),
    "mc3_18": vision("mc3_18", 2, 3, 4, 32, 32),
    "r2plus1d_18": vision("r2plus1d_18", 2, 3, 4, 32, 32),
    # transformers, by the names of its folders
    "hf-resnet": huggingface("ResNetForImageClassification", images(32), **RESNET),
    "hf-resnet-basic": huggingface("ResNetForImageClassification", images(32), **RESNET, layer_type="basic"),
    "hf-regnet": huggingface("RegNetForImageClassification", images(32), **RESNET, groups_width=4),
    "hf-mobilenet_v1": huggingface(
        "MobileNetV1ForImageClassification", images(64), depth_multiplier=0.25, classifier_dropout_prob=0.1),
    "hf-mobilenet_v2": huggingface("MobileNetV2ForImageClassification", images(64, 8), depth_multiplier=0.25),
    "hf-mobilenet_v2-deeplab": huggingface("MobileNetV2ForSemanticSegmentation", images(64, 8), depth_multiplier=0.25),
    "hf-efficientnet": huggingface(
        "EfficientNetForImageClassification", images(64), width_coefficient=0.25, depth_coefficient=0.5,
        hidden_dim=320),
    "hf-align": huggingface(
        "AlignVisionModel", images(64), width_coefficient=0.25, depth_coefficient=0.5, hidden_dim=64),
    "hf-levit": huggingface(
        "LevitForImageClassificationWithTeacher", images(64), image_size=64, hidden_sizes=[16, 32, 48],
        num_attention_heads=[1, 2, 3], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    "hf-cvt": huggingface(
        "CvtForImageClassification", images(32), embed_dim=[8, 16, 24], num_heads=[1, 2, 3], depth=[1, 2, 3]),
    "hf-segformer": huggingface(
        "SegformerForSemanticSegmentation", images(64), **STAGES, num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16),
    "hf-glpn": huggingface(
        "GLPNForDepthEstimation", images(64), **STAGES, num_attention_heads=[1, 1, 2, 2], decoder_hidden_size=8),
    "hf-mobilevit": huggingface(
        "MobileViTForSemanticSegmentation", images(64), image_size=64, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32], aspp_out_channels=16),
    "hf-mobilevitv2": huggingface(
        "MobileViTV2ForImageClassification", images(64), image_size=64, width_multiplier=0.25,
        n_attn_blocks=[1, 1, 1], base_attn_unit_dims=[32, 32, 64]),
    "hf-swiftformer": huggingface(
        "SwiftFormerForImageClassification", images(64), depths=[1, 1, 1, 1], embed_dims=[8, 12, 16, 24],
        drop_path_rate=0.1),
    "hf-hgnet_v2": huggingface(
        "HGNetV2ForImageClassification", images(64), **HGNET, use_learnable_affine_block=True),
    "hf-pp_lcnet": huggingface("PPLCNetForImageClassification", images(64), scale=0.25),
    "hf-pp_ocrv5_mobile_det": huggingface(
        "PPOCRV5MobileDetForObjectDetection", images(64), neck_out_channels=16, layer_list_out_channels=[8, 8, 8, 8]),
    "hf-pp_ocrv6_small_det": huggingface(
        "PPOCRV6SmallDetForObjectDetection", images(64), neck_out_channels=16,
        layer_list_out_channels=[32, 32, 48, 64],
        backbone_config={
            "model_type": "pp_lcnet_v4", "stem_channels": [3, 16, 32],
            "block_configs": [
                [[3, 32, 32, 1, True]], [[3, 32, 32, 2, False]], [[3, 32, 48, 2, True]], [[3, 48, 64, 2, False]]],
            "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    "hf-textnet": huggingface(
        "TextNetForImageClassification", images(64), stem_out_channels=8, hidden_sizes=[8, 8, 16, 16, 24],
        conv_layer_kernel_sizes=[[[3, 3], [3, 1]], [[3, 3], [1, 3]], [[3, 3]], [[3, 3]]],
        conv_layer_strides=[[1, 2], [2, 1], [2], [2]]),
    "hf-uvdoc": huggingface(
        "UVDocModel", images(64, 2), backbone_config={
            "model_type": "uvdoc_backbone", "out_features": [f"stage{i}" for i in range(1, 7)]}),
    "hf-upernet": huggingface(
        "UperNetForSemanticSegmentation", images(64), hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8,
        backbone_config={"model_type": "convnext", **STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
    "hf-beit": huggingface(
        "BeitForSemanticSegmentation", images(32), **LAYERS | {"num_hidden_layers": 4}, image_size=32, patch_size=8,
        out_indices=[1, 2, 3, 4]),
    "hf-dpt": huggingface(
        "DPTForSemanticSegmentation", images(32), **LAYERS | {"num_hidden_layers": 4}, image_size=32, patch_size=8,
        backbone_out_indices=[0, 1, 2, 3], **NECK),
    "hf-zoedepth": huggingface(
        "ZoeDepthForDepthEstimation", images(32), **NECK, bottleneck_features=8, num_attractors=[4, 2, 1, 1],
        bin_embedding_dim=8, num_relative_features=8,
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0, "name": "one"}],
        backbone_config={
            "model_type": "beit", **LAYERS, "num_hidden_layers": 4, "image_size": 32, "patch_size": 8,
            "out_indices": [1, 2, 3, 4], "reshape_hidden_states": False}),
    "hf-vitpose": huggingface(
        "VitPoseForPoseEstimation", images(32), use_simple_decoder=False,
        backbone_config={
            "model_type": "vitpose_backbone", **LAYERS, "mlp_ratio": 2, "image_size": [32, 32], "patch_size": [8, 8],
            "out_indices": [2]}),
    "hf-vitmatte": huggingface(
        "VitMatteForImageMatting", {"pixel_values": floats(2, 4, 32, 32)}, hidden_size=16,
        convstream_hidden_sizes=[8, 8, 8], fusion_hidden_sizes=[8, 8, 8, 8],
        backbone_config={
            "model_type": "vitdet", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_channels": 4, "image_size": 32, "pretrain_image_size": 32, "out_features": ["stage1"]}),
    "hf-perceiver": huggingface(
        "PerceiverForImageClassificationConvProcessing", {"inputs": floats(2, 3, 64, 64)}, num_latents=4, d_latents=16,
        d_model=322, num_self_attends_per_block=1, num_self_attention_heads=2, num_cross_attention_heads=1,
        image_size=64),
    "hf-groupvit": huggingface(
        "GroupViTModel", {"input_ids": tokens(4, 7), **images(32)}, projection_dim=8, projection_intermediate_dim=16,
        text_config={**LAYERS, "vocab_size": 30, "bos_token_id": 0, "eos_token_id": 29},
        vision_config={
            **LAYERS, "depths": [1, 1, 1], "num_hidden_layers": 3, "num_group_tokens": [4, 2, 0],
            "num_output_groups": [4, 2, 2], "image_size": 32, "patch_size": 8}),
    "hf-sam3_lite_text": huggingface(
        "Sam3LiteTextTextModel", {"input_ids": tokens(4, 7)}, **LAYERS, vocab_size=20, projection_dim=8,
        repmixer_kernel_size=3, layer_scale_init_value=0.1),
    "hf-superglue": huggingface(
        "SuperGlueForKeypointMatching", {"pixel_values": floats(1, 2, 3, 64, 64)}, hidden_size=16,
        keypoint_encoder_sizes=[8, 16], gnn_layers_types=["self", "cross"], num_attention_heads=2,
        sinkhorn_iterations=5, initializer_range=0.3, keypoint_detector_config={
            "model_type": "superpoint", "encoder_hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16,
            "descriptor_decoder_dim": 16, "initializer_range": 0.3}),
    "hf-efficientloftr": huggingface(
        "EfficientLoFTRForKeypointMatching", {"pixel_values": floats(1, 2, 3, 64, 64)}, stage_num_blocks=[1, 1, 1],
        out_features=[16, 16, 32], stage_stride=[2, 1, 2], hidden_size=32, num_attention_layers=1,
        num_attention_heads=8),
    "hf-emu3": huggingface(
        "Emu3VQVAE", {"pixel_values": floats(2, 4, 3, 16, 16)}, "encoder", base_channels=32, channel_multiplier=[1, 1],
        num_res_blocks=1, attn_resolutions=[], hidden_size=32),
    "hf-rt_detr": huggingface(
        "RTDetrForObjectDetection", images(64), **DETECTOR, encoder_in_channels=[8, 16, 16], backbone_config=RT_RESNET),
    "hf-rt_detr-trained_backbone": huggingface(
        "RTDetrForObjectDetection", images(64), **DETECTOR, encoder_in_channels=[8, 16, 16], backbone_config=RT_RESNET,
        freeze_backbone_batch_norms=False),
    "hf-rt_detr_v2": huggingface(
        "RTDetrV2ForObjectDetection", images(64), **DETECTOR, encoder_in_channels=[8, 16, 16],
        backbone_config=RT_RESNET),
    "hf-d_fine": huggingface(
        "DFineForObjectDetection", images(64), **DETECTOR, encoder_in_channels=[16, 32, 32],
        freeze_backbone_batch_norms=False,
        backbone_config={"model_type": "hgnet_v2", **HGNET, "out_features": ["stage2", "stage3", "stage4"]}),
    "hf-deimv2": huggingface(
        "Deimv2ForObjectDetection", images(64), **DETECTOR, encoder_in_channels=[16, 32, 32],
        freeze_backbone_batch_norms=False,
        backbone_config={"model_type": "hgnet_v2", **HGNET, "out_features": ["stage2", "stage3", "stage4"]}),
    "hf-lw_detr": huggingface(
        "LwDetrForObjectDetection", images(64, 2), d_model=16, num_queries=6, group_detr=2, decoder_layers=1,
        decoder_ffn_dim=32, decoder_self_attention_heads=2, decoder_cross_attention_heads=2, c2f_num_blocks=1,
        projector_scale_factors=[1.0], backbone_config={
            "model_type": "lw_detr_vit", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 64, "pretrain_image_size": 64, "out_indices": [1, 2], "num_windows": 4}),
    "hf-wav2vec2_conformer": huggingface(
        "Wav2Vec2ConformerForCTC", {"input_values": floats(2, 2000)}, **LAYERS, **WAVES, vocab_size=12,
        hidden_act="swish"),
    "hf-hubert": huggingface(
        "HubertForCTC", {"input_values": floats(2, 2000)}, **LAYERS, **WAVES, conv_pos_batch_norm=True,
        vocab_size=12),
    "hf-seamless_m4t": huggingface(
        "SeamlessM4TForSpeechToText", {"input_features": floats(2, 40, 20), "decoder_input_ids": tokens(2, 5)},
        hidden_size=16, vocab_size=20, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32,
        speech_encoder_layers=2, speech_encoder_attention_heads=2, speech_encoder_intermediate_size=32,
        feature_projection_input_dim=20, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
        max_source_positions=64),
    "hf-speecht5": huggingface(
        "SpeechT5ForTextToSpeech", {
            "input_ids": tokens(2, 9), "decoder_input_values": floats(2, 6, 8), "speaker_embeddings": floats(2, 12)},
        vocab_size=20, hidden_size=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32,
        decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32, num_mel_bins=8, speaker_embedding_dim=12,
        speech_decoder_prenet_units=16, speech_decoder_postnet_layers=3, speech_decoder_postnet_units=8),
    "hf-parakeet": huggingface(
        "ParakeetForCTC", {"input_features": floats(2, 64, 16)}, encoder_config=CONFORMER, vocab_size=20,
        pad_token_id=0),
    "hf-lasr": huggingface(
        "LasrForCTC", {"input_features": floats(2, 64, 16)}, encoder_config=CONFORMER, vocab_size=20),
    "hf-granite_speech": huggingface(
        "models.granite_speech.modeling_granite_speech.GraniteSpeechCTCEncoder", {"hidden_states": floats(2, 20, 12)},
        input_dim=12, num_layers=2, hidden_dim=16, num_heads=2, dim_head=8, output_dim=10, context_size=8,
        max_pos_emb=16),
    "hf-granite_speech5": huggingface(
        "GraniteSpeech5ForCTC", {"input_features": floats(2, 64, 64)}, vocab_size=20,
        encoder_config={**LAYERS, "num_mel_bins": 16, "vocab_size": 20, "context_size": 16}),
    "hf-patchtst": huggingface(
        "PatchTSTForPrediction", {"past_values": floats(4, 32, 2)}, num_input_channels=2, patch_length=4,
        patch_stride=4, num_hidden_layers=2, d_model=16, num_attention_heads=2, ffn_dim=32, prediction_length=8,
        ff_dropout=0.1),
    "hf-patchtsmixer": huggingface(
        "PatchTSMixerForPrediction", {"past_values": floats(4, 32, 2)}, num_input_channels=2, norm_mlp="BatchNorm",
        prediction_length=8),
    "hf-informer": huggingface(
        "InformerForPrediction", {
            "past_values": floats(4, 25), "past_time_features": floats(4, 25, 1), "past_observed_mask": None,
            "future_values": floats(4, 8), "future_time_features": floats(4, 8, 1)},
        prediction_length=8, context_length=20, lags_sequence=[1, 2, 5], num_time_features=1, d_model=16),
    "hf-clap": huggingface(
        "ClapAudioModel", {"input_features": floats(2, 1, 64, 16), "is_longer": lambda: torch.tensor([[1], [0]]) > 0},
        window_size=4, num_mel_bins=16, spec_size=32, hidden_size=32, depths=[1, 1], num_attention_heads=[2, 2],
        patch_embeds_hidden_size=16, num_hidden_layers=2),
}
# fmt: on

#: Too slow for CI.
SLOW = {
    "densenet121", "resnet50", "resnext50_32x4d", "vgg11_bn-features", "inception_v3", "efficientnet_b0",
    "efficientnet_v2_s", "mobilenet_v2", "mnasnet1_0", "quantized_resnet18", "quantized_mobilenet_v2",
    "quantized_shufflenet_v2_x1_0",
    "fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large", "r3d_18", "mc3_18", "r2plus1d_18",
    "hf-mobilenet_v2", "hf-mobilenet_v2-deeplab", "hf-align", "hf-pp_ocrv5_mobile_det", "hf-uvdoc", "hf-vitpose",
    "hf-rt_detr_v2", "hf-d_fine",
}  # fmt: skip

#: Networks in which no batch norm is fused, and what consumes the results.
UNFUSED = {
    "resnet-frozen": "activations, but frozen layers of torchvision are not fused",
    "hf-cvt": "attention",
    "hf-sam3_lite_text": "convolutions, and sums of other results",
    "hf-superglue": "a transposition, and then to the activation",
    "hf-emu3": "x *= sigmoid(x)",
    "hf-hubert": "a convolution",
    "hf-patchtst": "a transposition",
    "hf-patchtsmixer": "a transposition",
    "hf-informer": "an ELU, which the kernels do not know",
    "hf-clap": "a transposition",
}
