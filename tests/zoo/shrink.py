"""Tiny configurations of any transformers model, by rules on the names of configuration attributes.

A configuration is taken with its defaults; sizes, depths, experts, vocabularies and special ids that are too large are
replaced, whatever follows from them is left out for the class to derive again, and sub-configurations are treated
alike. Numbers after the head (softcap, scale) get values that show when they are missed. ``overrides.py`` holds what
the rules cannot know.
"""

import re
from typing import Any

VOCAB = 211
WIDTH = 64
HEADS = 4
HEAD_DIM = WIDTH // HEADS

_SKIPPED = {"model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}

# (pattern of the whole name, value that replaces a positive int). The first match counts.
_SIZES = [
    (r"(type|segment)_vocab_size|task_type_vocab_size|num_channels|in_channels|out_channels|chunk_size_.*", None),
    (r".*vocab_size.*|vocab_offset|audio_vocab_size|n_vocab", VOCAB),
    (r"codebook_size|num_embeddings|num_embeds|encoder_hash_byte_group_vocab", 64),
    (
        r"(swa_)?(head_dim|v_head_dim|global_head_dim)|kv_channels|d_kv|d_head|dim_head|.*attention_head_(dim|size)",
        HEAD_DIM,
    ),
    (
        r"linear_(key_|value_)?head_dim|(resampler_|index_|indexer_)?(head_dim|dim_head)|qk_(nope|rope)_head_dim",
        HEAD_DIM,
    ),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r".*_lora_rank|gated_norm_rank|laurel_rank|hc_lowrank|adapter_rank", 16),
    (r"(.*_)?mamba_d_ssm", 2 * WIDTH),
    (r"mamba_(n_heads|num_heads)", 8),
    (r"mamba_(d_head|head_dim|headdim)", HEAD_DIM),
    (r"mamba_n_?groups|n_groups", 1),
    (r"mamba_d_state|state_size|ssm_state_size", 8),
    (r"mamba_chunk_size|chunk_size", 16),
    (r"mamba_dt_rank|time_step_rank", 4),
    (r"(.*_)?(num_)?(key_value_heads|kv_heads|kv_n_heads|query_groups)", None),  # below: by the ratio to the heads
    (r"(.*_)?(num_attention_heads|attention_heads|n_heads?|num_heads|num_(key|value)_heads|resampler_heads)", HEADS),
    (r"n_routed_experts|(moe_)?num_(local_)?experts|zero_expert_num", 4),
    (r"num_experts_per_tok(en)?|(moe_)?top_?k(_experts)?|moe_k|num_selected_experts", 2),
    (r"n_group|topk_group|num_expert_group|num_limited_groups", 1),
    (r"(n|num|moe_num)_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|num_nextn_predict_layers|moe_layer_start_index|moe_layer_interval", 1),
    (r"decoder_sparse_step|encoder_sparse_step|expert_capacity", None),
    (r"(.*_)?(intermediate_size(_mlp)?|ffn_dim|d_ff|dim_ff|dff|mlp_dim|ffn_hidden_size|feed_forward_size|d_inner)", 96),
    (r"n_inner|expert_ffn_hidden_size|prompt_mid_dim|share_expert_dim", 96),
    (r"(.*_)?(num_hidden_layers|num_layers|n_layers?|encoder_layers|decoder_layers|depth|num_(de|en)coder_layers)", 2),
    (r"layers|num_blocks|num_layers_per_stack|num_global_layers|num_adapter_layers|resampler_depth", 2),
    (r"num_kv_shared_layers|num_sparse_(en|de)coder_layers|aligner_num_add_layers|num_timestamp_prediction_layers", 1),
    (r"n_embd|d_model|dim|(out_|proj_)?dim|lru_width|word_embed_proj_dim|n_embed", WIDTH),
    (
        r"(.*_)?(hidden_size(_global|_per_layer_input)?|embed_dim|embedding_size|embedding_dim|emb_dim|hidden_dim)",
        WIDTH,
    ),
    (
        r"(.*_)?(projection_dim|projector_(in|out)put_dim|adapter_(in|out)(put)?_(dim|size)|model_dim|feature_dim"
        r"|encoder_cross_output_size)",
        WIDTH,
    ),
    (r"mm_tokens_per_image|image_seq(_)?length|num_image_tokens|video_seq_length", 16),
    (r"(.*_)?image_size|resolution|crop_size", 32),
    (r"patch_size", 8),
    (r"num_query_tokens|resampler_n(um)?_latents|latent_query_num", 4),
    (
        r"sliding_window(_size)?|attention_window_size|local_attention|attention_chunk_size|local_attention_window_len",
        8,
    ),
    (r"n_positions|n_ctx|max_seq_len|context_length|max_position_embeddings|t2u_max_position_embeddings", 128),
]
_SIZES = [(re.compile(pattern), value) for pattern, value in _SIZES]

# What follows the head, at values that the softmax of a small model notices.
_AFTER_HEAD = {
    "final_logit_softcapping": 7.5,
    "logits_soft_cap": 4.0,
    "output_logit_soft_cap": 3.5,
    "logit_scale": 0.37,
    "logits_scaling": 2.5,
    "lm_head_multiplier": 0.3,
    "output_multiplier": 0.6,
    "logits_mup_width_multiplier": 2.5,
}
_AUX_COEFFICIENTS = {"router_aux_loss_coef": 0.3, "aux_loss_coef": 0.3}
_TOKEN_ID = re.compile(r".*(_token_id|_token_index|_token_ids|_index|_start_id|_end_id|newline_id|image_patch_id|_id)")


def shrunk_config(config_class: type, overrides: dict[str, Any], *, decoder_only: bool) -> Any:
    """An instance of ``config_class`` a few thousand parameters wide. Keys of ``overrides`` may be dotted."""
    return config_class(**shrunk_kwargs(config_class, overrides, decoder_only=decoder_only))


def shrunk_kwargs(config_class: type, overrides: dict[str, Any], *, decoder_only: bool = False) -> dict[str, Any]:
    nested, flat = _split(overrides)
    first = {name: value for name, value in flat.items() if name.startswith("+")}  # needed to have defaults at all
    flat = {name: value for name, value in flat.items() if name not in first}
    default = config_class(**{name[1:]: value for name, value in first.items()})
    values = default.to_dict()
    kwargs: dict[str, Any] = {}
    layers = _kept_layers(values)
    for name, value in values.items():
        sub = _sub_config(config_class, default, name)
        if sub is not None:
            kwargs[name] = shrunk_kwargs(sub, nested.pop(name, {}))
            if hasattr(sub, "model_type"):
                kwargs[name].setdefault("model_type", sub.model_type)
        elif name not in _SKIPPED and not name.startswith("_"):
            new = _shrunk(name, value, values, layers)
            if new is not None:
                kwargs[name] = new
    if decoder_only:
        kwargs.update({name: True for name in ("is_decoder",) if name in values and not values[name]})
    if values.get("is_encoder_decoder") and not decoder_only:
        for name in ("decoder_start_token_id", "pad_token_id"):
            if values.get(name) is None:
                kwargs[name] = 0
    for name, inner in nested.items():  # a dict that is no configuration
        kept = {key: value for key, value in inner.items() if value is not DERIVED}
        kwargs[name] = {**(values.get(name) or {}), **kept}
    for name, value in first.items():
        kwargs.setdefault(name[1:], value)
    for name, value in flat.items():
        if value is DERIVED:
            kwargs.pop(name, None)
        else:
            kwargs[name] = value
    return kwargs


class DERIVED:
    """As an override: leave the attribute to the class. A class, because copies keep it what it is."""


def _split(overrides):
    nested, flat = {}, {}
    for name, value in overrides.items():
        head, dot, rest = name.partition(".")
        if dot:
            nested.setdefault(head, {})[rest] = value
        else:
            flat[name] = value
    return nested, flat


def _sub_config(config_class, default, name):
    if name not in getattr(config_class, "sub_configs", {}):
        return None
    value = default.__dict__.get(name)
    if value is not None and hasattr(value, "to_dict"):
        return type(value)
    sub = config_class.sub_configs[name]
    return None if value is None or sub.__name__ == "AutoConfig" else sub


def _kept_layers(values) -> list[int] | None:
    """Layers of which every kind is left: the first of each value of each per-layer list, and the last of all."""
    depth = values.get("num_hidden_layers") or values.get("n_layer") or 0
    lists = [v for k, v in values.items() if isinstance(v, list) and len(v) == depth > 2 and not _TOKEN_ID.fullmatch(k)]
    if not lists:
        return None
    kept = {0, depth - 1}
    for column in lists:
        if len({str(v) for v in column}) <= 6:
            kept |= {[str(v) for v in column].index(str(value)) for value in column}
    return sorted(kept)


def _shrunk(name: str, value: Any, values: dict, layers: list[int] | None) -> Any:
    """The value in the shrunk configuration; None leaves it to the class."""
    if name in _AFTER_HEAD:
        return None if value is None else _AFTER_HEAD[name]
    if name in _AUX_COEFFICIENTS:
        return _AUX_COEFFICIENTS[name]
    if name == "output_router_logits":
        return True
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return None
    if isinstance(value, float) and any(part in name for part in ("dropout", "pdrop", "layerdrop", "drop_rate")):
        return 0.0
    if isinstance(value, list):
        depth = values.get("num_hidden_layers") or values.get("n_layer")
        if layers is not None and len(value) == depth:
            return [_width(name, value[i]) for i in layers]
        if "intermediate_size" in name:
            return [_width(name, item) for item in value]
        if name.endswith("_token_ids"):
            return [_special_id(f"{name}{i}") for i in range(len(value))]
        return None
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
        return _shrunk_rope(value)
    if not isinstance(value, int) or value <= 0:
        return None
    if name in ("num_hidden_layers", "n_layer") and layers is not None:
        return len(layers)
    if "token_id" in name or (_TOKEN_ID.fullmatch(name) and value >= 24):
        return _special_id(name) if value >= VOCAB else None
    if re.fullmatch(r"(.*_)?(num_)?(key_value_heads|kv_heads|kv_n_heads|query_groups)", name):
        prefix = name.replace("num_key_value_heads", "num_attention_heads")
        heads = values.get(prefix) or values.get("num_attention_heads") or values.get("n_heads") or 0
        return value if value == 1 else (HEADS if value == heads else HEADS // 2)
    size = _width(name, value)
    return None if size == value else size


def _width(name: str, value: Any) -> Any:
    """The value, or the smaller one of the first of ``_SIZES`` that fits the name."""
    for pattern, size in _SIZES:
        if isinstance(value, int) and pattern.fullmatch(name):
            return value if size is None else min(value, size)
    return value


def _shrunk_rope(value: dict) -> dict | None:
    if "mrope_section" in value:
        sections = value["mrope_section"]
        half = HEAD_DIM // 2
        return {**value, "mrope_section": [half // 2, half // 4, half // 4][: len(sections)]}
    return None


def _special_id(name: str) -> int:
    """An id near the end of the vocabulary, the same for the same name wherever it stands."""
    stem = re.sub(r"(_token)?_(id|index)(s\d+)?$", r"\3", name)
    return VOCAB - 2 - _SPECIAL.setdefault(stem, len(_SPECIAL) % 60)


_SPECIAL: dict[str, int] = {}
