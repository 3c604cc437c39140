"""What the shrinking rules cannot know, by model type; keys may be dotted, "+" marks what the class needs to have
defaults at all, ``DERIVED`` leaves an attribute to the class. A trailing * makes a key a prefix of several types.
"""

import copy
from typing import Any

from tests.zoo.shrink import DERIVED, HEAD_DIM, HEADS, WIDTH

_HALF = HEAD_DIM // 2
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [_HALF // 2, _HALF // 4, _HALF // 4]}
_DECODER = {"decoder.is_decoder": True, "decoder.add_cross_attention": True}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_THREE_AXES = {**_ROPE, "mrope_section": [3, 3, 2]}
_BOTH_ROPES = {"full_attention": _THREE_AXES, "sliding_attention": _THREE_AXES}
_VQ = {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1, 1], "vq_config.latent_channels": 8}
_TOWER = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": HEADS}
_NO_TIMM = {"vision_config": {"model_type": "siglip_vision_model", "image_size": 32, "patch_size": 8, **_TOWER}}
_DOTS_LAYERS = {
    "2": {
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16},
        **{
            "head_dim": 2 * HEAD_DIM,
            "qk_nope_head_dim": HEAD_DIM,
            "qk_rope_head_dim": HEAD_DIM,
            "v_head_dim": HEAD_DIM,
        },
    }
}
_VLM_MROPE = {"text_config.rope_parameters": _MROPE}


def overrides(model_type: str) -> dict[str, Any]:
    found = dict(OVERRIDES.get(model_type, {}))
    for key, value in OVERRIDES.items():
        if key.endswith("*") and model_type.startswith(key[:-1]) and model_type not in OVERRIDES:
            found.update(value)
    return copy.deepcopy(found)  # some classes empty the dicts that they are given


OVERRIDES: dict[str, dict[str, Any]] = {
    # None by default, but needed
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "hunyuan_v1*": {"head_dim": HEAD_DIM},
    "hunyuan_vl": {
        "text_config.head_dim": HEAD_DIM,
        "text_config.rope_parameters": {**_ROPE, "mrope_section": [2, 2, 2, 2]},
    },
    "ministral": {"head_dim": HEAD_DIM},
    "nemotron": {"num_key_value_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp_text": (
        _qsa := {
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": HEAD_DIM,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
    ),
    "qwen4_exp": {f"text_config.{name}": value for name, value in _qsa.items()},
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "blip-2": {"image_token_index": 190},
    "instructblip": {"image_token_index": 190},
    "instructblipvideo": {"video_token_index": 190},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "cohere_compass_text": {"rope_parameters": _BOTH_ROPES},
    "cohere_compass": {"text_config.rope_parameters": _BOTH_ROPES},
    "xlm": {"causal": True},
    **{name: {"is_decoder": True} for name in ("big_bird", "megatron-bert", "rembert", "roformer")},
    "encoder-decoder": {**_DECODER, "+encoder": {"model_type": "bert"}, "+decoder": {"model_type": "bert"}},
    "vision-encoder-decoder": {**_DECODER, "+encoder": {"model_type": "vit"}, "+decoder": {"model_type": "gpt2"}},
    "musicgen": {
        "+text_encoder": {"model_type": "t5"},
        "+audio_encoder": {"model_type": "encodec"},
        "+decoder": {"model_type": "musicgen_decoder"},
    },
    "musicgen_melody": {
        "+text_encoder": {"model_type": "t5"},
        "+audio_encoder": {"model_type": "encodec"},
        "+decoder": {"model_type": "musicgen_melody_decoder"},
    },
    "granite4_vision": {
        "+text_config": {"model_type": "granite"},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[-1, 0]],
        "spatial_target_layers": [1],
    },
    "step3p7": {"text_config.sliding_window": 8},
    "qwen3_omni_moe": {
        "talker_config.spatial_merge_size": 2,
        "talker_config.text_config.shared_expert_intermediate_size": 32,
    },
    "chameleon": {"vocabulary_map": {"<image>": 5, "IMGIMGAZ": 150, "IMGIMGBZ": 151}, **_VQ},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|extra_200|>": 6}, **_VQ},
    # sizes that depend on each other
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "mamba2": {"num_heads": 8},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "n_mamba_heads": 2,
        "attention_hidden_size": DERIVED,
        "attention_head_dim": DERIVED,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "hybrid", "hybrid"],
        "hybrid_layer_ids": [1, 2],
        "n_mamba_heads": 8,
        "attention_hidden_size": DERIVED,
        "attention_head_dim": DERIVED,
        "mamba_headdim": DERIVED,
        "kv_channels": DERIVED,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": DERIVED},
    "hrm_text": {"num_layers_per_stack": DERIVED},
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [3, 4],
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": 2,
        "num_buckets": 4,
        "hash_seed": 0,
    },
    "xlstm": {"num_blocks": 2, "qk_dim_factor": 1.0},
    "gemma4_assistant": {
        "+text_config": (_none := {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}),
        **{f"text_config.{name}": 0 for name in _none},
        "text_config.num_kv_shared_layers": DERIVED,
    },
    "gemma4_unified_assistant": {"text_config.num_kv_shared_layers": DERIVED},
    "mistral4": {"head_dim": DERIVED, "qk_head_dim": DERIVED},
    "mistral_large4": {"text_config.kv_source_layers": DERIVED},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "fun_asr_nano": {"adaptor_config.intermediate_size": WIDTH // 4},
    # towers of a library that is not needed for text
    "fast_vlm": _NO_TIMM,
    "perception_lm": {"vision_config.model_args": {"embed_dim": WIDTH}},
    # rotary sections of three axes
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [3, 3, 2]}},
    "glm46v": _VLM_MROPE,
    "glm4v": _VLM_MROPE,
    "glm4v_moe": {"text_config.rope_parameters": {**_MROPE, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm_ocr": _VLM_MROPE,
    "glmga": _VLM_MROPE,
    "paddleocr_vl": _VLM_MROPE,
    "qwen2_5_vl": _VLM_MROPE,
    "qwen2_vl": _VLM_MROPE,
    "qwen2_5_omni_thinker": {"vision_start_token_id": 190, **_VLM_MROPE},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 190},
    # parts that are large by default
    "led": {"attention_window": 8},
    "pegasus_x": {"block_size": 8, "num_global_tokens": 4},
    "dots3_note_text": {"per_layer_config": _DOTS_LAYERS},
    "dots3_note": {"text_config.per_layer_config": _DOTS_LAYERS},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        **(
            _sam := {
                "vision_config.sam_config.output_channels": 16,
                "vision_config.sam_config.downsample_channels": [16, 32],
            }
        ),
    },
    "unlimited_ocr": _sam,
    "muse_spark": {"audio_config.hidden_sizes": [16, 16, 16, 16], "audio_config.num_attention_heads": 2},
    "vibevoice_asr": {
        f"{part}_tokenizer_encoder_config.{name}": value
        for part in ("acoustic", "semantic")
        for name, value in (("num_filters", 2), ("depths", [1] * 7))
    },
    "florence2": {
        "vision_config.embed_dim": [16, 32],
        "vision_config.num_heads": [2, 2],
        "vision_config.num_groups": [2, 2],
        "vision_config.depths": [1, 1],
        "vision_config.patch_size": [7, 3],
        "vision_config.patch_stride": [4, 2],
        "vision_config.patch_padding": [3, 1],
        "vision_config.patch_prenorm": [False, True],
        "vision_config.window_size": 4,
    },
    "janus": {
        "vq_config.base_channels": 32,
        "vq_config.channel_multiplier": [1, 1],
        "vq_config.latent_channels": 8,
    },
    "kyutai_speech_to_text": {
        "codec_config.upsample_groups": WIDTH,
        "codec_config.num_filters": 8,
        "codec_config.upsampling_ratios": [4, 2],
    },
}
