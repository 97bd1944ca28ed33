"""The models: what one types behind `pnn-compile`, by group.

Small sizes, random weights, nothing downloaded. `zoo:NAME` is a case of tests/zoo.py.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

__all__ = ["CATALOG", "Specification", "specifications"]


@dataclass(frozen=True)
class Specification:
    """One model of the list.

    Attributes:
        text: The words behind `pnn-compile`, unique.
        group: Where it stands in the table.
        source: The model, as `load_source` takes it.
        inputs: Texts of `--input`.
        arguments: Texts of `--arg`.
    """

    text: str
    group: str
    source: str
    inputs: tuple[str, ...]
    arguments: tuple[str, ...]

    @property
    def library(self) -> str:
        """What must be installed: `timm`, `torchvision`, `hf`; `zoo` for nothing."""
        return self.source.partition(":")[0]


CATALOG: dict[str, str] = {
    "zoo": """
        zoo:mlp
        zoo:deep_linear
        zoo:conv_inplace
        zoo:conv1d
        zoo:deep_batchnorm
        zoo:custom_gradient
        zoo:dropout
        zoo:resnet
        zoo:unet
        zoo:dense_block
        zoo:inception
        zoo:segnet
        zoo:tied_language_model
        zoo:tied_linear
        zoo:reused_module
        zoo:many_inputs_outputs
        zoo:dict_output
        zoo:keyword_arguments
        zoo:lstm
        zoo:mixer
        zoo:boolean_mask_encoder
        zoo:float_mask_encoder
        zoo:encoder_decoder
        zoo:vision_transformer
        zoo:container_transformer
        zoo:view_write
        zoo:slice_assignment
        zoo:running_mean
        zoo:step_counter
        zoo:shape_branch
        zoo:unrolled_lstm
    """,
    "timm": """
        timm:resnet10t --input 2x3x64x64
        timm:resnet26 --input 2x3x64x64
        timm:ecaresnet26t --input 2x3x64x64
        timm:test_vit
        timm:vit_tiny_patch16_224 --arg img_size=64
        timm:deit_tiny_patch16_224 --arg img_size=64
        timm:deit3_small_patch16_224 --arg img_size=64
        timm:flexivit_small --arg img_size=96
        timm:beit_base_patch16_224 --arg img_size=64 --arg embed_dim=96 --arg num_heads=3
        timm:cait_xxs24_224 --arg img_size=64
        timm:coat_lite_tiny --arg img_size=64
        timm:convit_tiny --arg img_size=64
        timm:convmixer_768_32 --input 2x3x64x64
        timm:convnext_atto --input 2x3x64x64
        timm:convnextv2_atto --input 2x3x64x64
        timm:crossvit_9_240
        timm:darknet17 --input 2x3x64x64
        timm:cspresnet50 --input 2x3x64x64
        timm:cspnext_s --input 2x3x64x64
        timm:csatv2 --input 2x3x512x512
        timm:cpubone_nano --input 2x3x64x64
        timm:davit_tiny --input 2x3x64x64
        timm:densenet121 --input 2x3x64x64
        timm:dla46_c --input 2x3x64x64
        timm:dpn48b --input 2x3x64x64
        timm:edgenext_xx_small --input 2x3x64x64
        timm:efficientformer_l1
        timm:efficientformerv2_s0
        timm:efficientnet_b0 --input 2x3x64x64
        timm:efficientnetv2_rw_t --input 2x3x64x64
        timm:mixnet_s --input 2x3x64x64
        timm:tinynet_e --input 2x3x64x64
        timm:mobilenetv2_035 --input 2x3x64x64
        timm:efficientvit_b0 --input 2x3x64x64
        timm:efficientvit_m0
        timm:efficientvim_m1 --input 2x3x224x224
        timm:eva02_tiny_patch14_224 --arg img_size=56
        timm:fasternet_t0 --input 2x3x64x64
        timm:fastvit_t8 --input 2x3x64x64
        timm:focalnet_tiny_srf --input 2x3x64x64
        timm:gcvit_xxtiny
        timm:gernet_s --input 2x3x64x64
        timm:repvgg_a0 --input 2x3x64x64
        timm:ghostnet_050 --input 2x3x64x64
        timm:ghostnetv2_100 --input 2x3x64x64
        timm:halonet26t --input 2x3x256x256
        timm:botnet26t_256 --arg img_size=128 --input 2x3x128x128
        timm:lambda_resnet26t --input 2x3x128x128
        timm:hardcorenas_a --input 2x3x64x64
        timm:hgnetv2_b0 --input 2x3x64x64
        timm:hiera_tiny_224
        timm:hieradet_small --input 2x3x128x128
        timm:hrnet_w18_small --input 2x3x64x64
        timm:iformer_t --input 2x3x64x64
        timm:inception_next_atto --input 2x3x64x64
        timm:inception_v3 --input 2x3x128x128
        timm:inception_v4 --input 2x3x128x128
        timm:inception_resnet_v2 --input 2x3x128x128
        timm:lcnet_050 --input 2x3x64x64
        timm:lcnetv2_small --input 2x3x64x64
        timm:levit_128s
        timm:lowformer_b0 --input 2x3x64x64
        timm:mambaout_femto --input 2x3x64x64
        timm:test_maxvit --input 2x3x64x64 --arg img_size=64
        timm:coatnet_nano_rw_224 --arg img_size=64
        timm:poolformer_s12 --input 2x3x64x64
        timm:caformer_s18 --input 2x3x64x64
        timm:mixer_s16_224
        timm:gmlp_ti16_224
        timm:resmlp_12_224
        timm:mobilenetv3_small_050 --input 2x3x64x64
        timm:mobilenetv4_conv_small --input 2x3x64x64
        timm:mobilevit_xxs --input 2x3x64x64
        timm:mobilevitv2_050 --input 2x3x64x64
        timm:mvitv2_tiny --arg img_size=64
        timm:nest_tiny
        timm:nextvit_small --input 2x3x64x64
        timm:nfnet_l0 --input 2x3x64x64
        timm:pit_ti_224
        timm:pvt_v2_b0 --input 2x3x64x64
        timm:rdnet_tiny --input 2x3x64x64
        timm:regnetx_002 --input 2x3x64x64
        timm:regnety_002 --input 2x3x64x64
        timm:repghostnet_050 --input 2x3x64x64
        timm:repvit_m0_9 --input 2x3x64x64
        timm:res2net50_26w_4s --input 2x3x64x64
        timm:resnest14d --input 2x3x64x64
        timm:resnetv2_18 --input 2x3x64x64
        timm:resnetv2_50x1_bit --input 2x3x64x64
        timm:rexnet_100 --input 2x3x64x64
        timm:samvit_base_patch16_224 --arg embed_dim=96 --arg num_heads=4
        timm:selecsls42 --input 2x3x64x64
        timm:legacy_seresnet18 --input 2x3x64x64
        timm:sequencer2d_s
        timm:shvit_s1 --input 2x3x128x128
        timm:skresnet18 --input 2x3x64x64
        timm:starnet_s050 --input 2x3x64x64
        timm:swiftformer_xs --input 2x3x64x64
        timm:swin_tiny_patch4_window7_224 --arg img_size=112
        timm:swinv2_cr_tiny_224 --arg img_size=112
        timm:swinv2_tiny_window8_256 --arg img_size=128
        timm:tiny_vit_5m_224
        timm:tnt_s_patch16_224 --arg img_size=64
        timm:tresnet_m --input 2x3x64x64
        timm:twins_svt_small --input 2x3x64x64
        timm:twins_pcpvt_small --input 2x3x64x64
        timm:vgg11_bn --input 2x3x64x64
        timm:visformer_tiny
        timm:vit_relpos_small_patch16_224 --arg img_size=64
        timm:vit_tiny_r_s16_p8_224 --arg img_size=64
        timm:vitamin_small_224 --arg img_size=64
        timm:volo_d1_224 --arg img_size=64
        timm:ese_vovnet19b_slim --input 2x3x64x64
        timm:xception41 --input 2x3x64x64
        timm:legacy_xception --input 2x3x64x64
        timm:xcit_nano_12_p16_224 --arg img_size=64
        timm:naflexvit_base_patch16_gap --arg embed_dim=96 --arg num_heads=3 --input 2x3x64x64
    """,
    "torchvision": """
        torchvision:alexnet --input 2x3x64x64
        torchvision:convnext_tiny --input 2x3x64x64
        torchvision:densenet121 --input 2x3x64x64
        torchvision:efficientnet_b0 --input 2x3x64x64
        torchvision:efficientnet_v2_s --input 2x3x64x64
        torchvision:googlenet --input 2x3x64x64 --arg init_weights=False --arg aux_logits=False
        torchvision:inception_v3 --input 2x3x128x128 --arg init_weights=False --arg aux_logits=False
        torchvision:maxvit_t
        torchvision:mnasnet0_5 --input 2x3x64x64
        torchvision:mobilenet_v2 --input 2x3x64x64
        torchvision:mobilenet_v3_small --input 2x3x64x64
        torchvision:mobilenet_v3_large --input 2x3x64x64
        torchvision:regnet_x_400mf --input 2x3x64x64
        torchvision:regnet_y_400mf --input 2x3x64x64
        torchvision:resnet18 --input 2x3x64x64
        torchvision:resnet50 --input 2x3x64x64
        torchvision:resnext50_32x4d --input 2x3x64x64
        torchvision:wide_resnet50_2 --input 2x3x64x64
        torchvision:shufflenet_v2_x0_5 --input 2x3x64x64
        torchvision:squeezenet1_1 --input 2x3x64x64
        torchvision:swin_t --input 2x3x64x64
        torchvision:swin_v2_t --input 2x3x64x64
        torchvision:vgg11_bn --input 2x3x64x64
        torchvision:vgg16 --input 2x3x64x64
        torchvision:vit_b_32 --arg image_size=64 --input 2x3x64x64
        torchvision:deeplabv3_mobilenet_v3_large --input 2x3x64x64
        torchvision:fcn_resnet50 --input 2x3x64x64
        torchvision:lraspp_mobilenet_v3_large --input 2x3x64x64
        torchvision:r3d_18 --input 2x3x8x32x32
        torchvision:r2plus1d_18 --input 2x3x8x32x32
        torchvision:mc3_18 --input 2x3x8x32x32
        torchvision:s3d --input 2x3x16x224x224
        torchvision:swin3d_t --input 2x3x8x32x32
        torchvision:raft_small --input 1x3x128x128 --input 1x3x128x128
    """,
    "encoder": """
        hf:bert
        hf:BertForSequenceClassification
        hf:BertForMaskedLM
        hf:roberta
        hf:distilbert
        hf:albert
        hf:electra
        hf:deberta
        hf:deberta-v2
        hf:mpnet
        hf:modernbert
        hf:fnet
        hf:squeezebert
        hf:roformer
        hf:esm --arg vocab_size=64 --arg pad_token_id=1
        hf:xlm-roberta
        hf:nystromformer
        hf:longformer
        hf:big_bird
        hf:funnel
        hf:convbert
        hf:mobilebert
        hf:ibert
        hf:camembert
        hf:layoutlm
        hf:canine
    """,
    "decoder": """
        hf:gpt2
        hf:GPT2LMHeadModel
        hf:gpt_neo --arg num_layers=4 --arg "attention_types=[[['global','local'],2]]"
        hf:gpt_neox
        hf:gptj
        hf:opt
        hf:bloom
        hf:falcon
        hf:mpt
        hf:codegen
        hf:ctrl
        hf:llama
        hf:LlamaForCausalLM
        hf:mistral
        hf:gemma
        hf:gemma2
        hf:phi
        hf:phi3
        hf:qwen2
        hf:qwen3
        hf:olmo2
        hf:stablelm
        hf:starcoder2
        hf:cohere
        hf:granite
        hf:biogpt
        hf:xglm
        hf:xlnet --arg use_mems_eval=False --arg use_mems_train=False
        hf:openai-gpt
    """,
    "encoder-decoder": """
        hf:t5
        hf:T5ForConditionalGeneration
        hf:mt5
        hf:bart
        hf:BartForConditionalGeneration
        hf:mbart
        hf:pegasus
        hf:marian
        hf:m2m_100 --arg encoder_layerdrop=0.0 --arg decoder_layerdrop=0.0
        hf:blenderbot
        hf:led
        hf:longt5 --input input_ids=2x16:int64<256 --input attention_mask=2x16:int64 +
            --input decoder_input_ids=2x16:int64<256 --input decoder_attention_mask=2x16:int64
        hf:prophetnet
    """,
    "vision": """
        hf:vit
        hf:ViTForImageClassification
        hf:deit
        hf:beit
        hf:dinov2
        hf:swin --arg window_size=2
        hf:swinv2 --arg window_size=2
        hf:convnext
        hf:convnextv2
        hf:resnet
        hf:regnet
        hf:mobilenet_v2
        hf:mobilevit
        hf:segformer
        hf:poolformer
        hf:pvt
        hf:levit
        hf:cvt
        hf:focalnet
        hf:hiera
        hf:videomae
        hf:timesformer
        hf:detr
    """,
    "audio": """
        hf:wav2vec2 --arg layerdrop=0.0 --arg apply_spec_augment=False
        hf:hubert
        hf:wavlm --arg layerdrop=0.0 --arg apply_spec_augment=False
        hf:unispeech --arg layerdrop=0.0 --arg apply_spec_augment=False
        hf:data2vec-audio --arg layerdrop=0.0 --arg mask_time_prob=0.0
        hf:whisper --arg max_source_positions=32
        hf:speech_to_text --input input_features=2x64x80 --input decoder_input_ids=2x16:int64<256
        hf:audio-spectrogram-transformer --arg max_length=64 --input input_values=2x64x128
        hf:wav2vec2-bert --input input_features=2x64x160 --arg layerdrop=0.0 +
            --arg apply_spec_augment=False
        hf:encodec
    """,
    "state space": """
        hf:mamba
        hf:MambaForCausalLM
        hf:mamba2 --arg head_dim=32 --arg n_groups=2
        hf:falcon_mamba
        hf:rwkv
        hf:jamba
        hf:recurrent_gemma
        hf:xlstm
    """,
    "mixture of experts": """
        hf:mixtral
        hf:MixtralForCausalLM
        hf:qwen2_moe
        hf:qwen3_moe
        hf:olmoe
        hf:deepseek_v3 --arg head_dim=64 --arg num_key_value_heads=4 --arg n_group=2 +
            --arg topk_group=1
        hf:gpt_oss
        hf:switch_transformers --input input_ids=2x16:int64<256 --input attention_mask=2x16:int64 +
            --input decoder_input_ids=2x16:int64<256 --input decoder_attention_mask=2x16:int64
        hf:phimoe
        hf:granitemoe
        hf:dbrx
    """,
    "two towers": """
        hf:clip
        hf:siglip
        hf:blip
        hf:align
        hf:vilt
    """,
}
"""Group to lines of a command line; one that ends in + goes on in the next."""


def specifications() -> tuple[Specification, ...]:
    """Parse the catalog, in its own order."""
    found = []
    for group, lines in CATALOG.items():
        joined = re.sub(r" \+\n +", " ", lines)  # a line that ends in + goes on
        for line in filter(None, map(str.strip, joined.splitlines())):
            source, *words = shlex.split(line)
            options = list(zip(words[::2], words[1::2], strict=True))
            inputs = tuple(value for key, value in options if key == "--input")
            arguments = tuple(value for key, value in options if key == "--arg")
            found.append(Specification(line, group, source, inputs, arguments))
    return tuple(found)
