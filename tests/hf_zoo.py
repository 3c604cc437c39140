"""Causal LMs of transformers as tiny random models, with numbers after the head that differ from the defaults.

V = 97, D = 32, one or two layers, under 200k parameters where the class allows it. Weights are drawn with a
standard deviation that makes the softmax far from uniform, so that a wrong scale, softcap, bias or label shift shows.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

VOCAB = 97


@dataclass(frozen=True)
class Case:
    name: str  # class in transformers
    config: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    softcap: float | None = None
    moe: bool = False  # run with output_router_logits: the auxiliary loss is part of the model's own loss
    shift: bool = True
    variant: str = ""

    @property
    def id(self) -> str:
        return self.name + (f"-{self.variant}" if self.variant else "")


_IDS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LLAMA = {
    **_IDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_MHA = {name: value for name, value in _LLAMA.items() if name not in ("num_key_value_heads", "head_dim")}
_GPT = {**_IDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 8}
_BART = {
    **_IDS,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
_MAMBA2 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 16,
}


def llama(name: str, _scale: float = 1.0, _softcap: float | None = None, _moe: bool = False, _v: str = "", **config):
    experts = {**_EXPERTS, "output_router_logits": True, "router_aux_loss_coef": 0.3} if _moe else {}
    return Case(name, {**_LLAMA, **experts, **config}, _scale, _softcap, _moe, variant=_v)


ZOO = [
    llama("LlamaForCausalLM"),
    llama("LlamaForCausalLM", _v="tied", tie_word_embeddings=True),
    llama("MistralForCausalLM", sliding_window=4),
    llama("Qwen2ForCausalLM"),
    llama("Qwen3ForCausalLM", tie_word_embeddings=True),
    llama(
        "Qwen3NextForCausalLM",
        layer_types=["linear_attention", "full_attention"],
        **_EXPERTS,
        shared_expert_intermediate_size=16,
    ),
    llama("GemmaForCausalLM"),
    llama("Gemma2ForCausalLM", _softcap=7.5, final_logit_softcapping=7.5, sliding_window=4),
    llama("Gemma2ForCausalLM", _v="no softcap", final_logit_softcapping=None),
    llama("Gemma3ForCausalLM", _softcap=5.0, final_logit_softcapping=5.0),
    llama("VaultGemmaForCausalLM", _softcap=6.0, final_logit_softcapping=6.0),
    llama("NanoChatForCausalLM", _softcap=9.0, final_logit_softcapping=9.0),
    llama(
        "RecurrentGemmaForCausalLM",
        _softcap=4.0,
        logits_soft_cap=4.0,
        block_types=["recurrent", "attention"],
        attention_window_size=8,
        lru_width=32,
    ),
    llama("PhiForCausalLM"),
    llama("Phi3ForCausalLM"),
    llama("PhimoeForCausalLM", lm_head_bias=True, **_EXPERTS),
    Case("GPT2LMHeadModel", _GPT),
    Case("GPTJForCausalLM", _GPT),
    Case("CodeGenForCausalLM", _GPT),
    Case("GPTBigCodeForCausalLM", _GPT),
    Case(
        "GPTNeoForCausalLM",
        {
            **_IDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "max_position_embeddings": 64,
        },
    ),
    Case("GPTNeoXForCausalLM", _MHA),
    Case("CTRLLMHeadModel", {**_GPT, "dff": 48}),
    Case("OpenAIGPTLMHeadModel", _GPT),
    llama("MixtralForCausalLM", _moe=True),
    llama("OlmoForCausalLM"),
    llama("Olmo2ForCausalLM"),
    llama("OlmoeForCausalLM", _moe=True),
    llama("CohereForCausalLM", _scale=0.37, logit_scale=0.37),
    llama("Cohere2ForCausalLM", _scale=2.25, logit_scale=2.25),
    llama("GraniteForCausalLM", _scale=0.4, logits_scaling=2.5),
    # transformers 5.17 cannot compute the auxiliary loss of GraniteMoe, Dbrx and JetMoe
    llama("GraniteMoeForCausalLM", _scale=1 / 3, logits_scaling=3.0, **_EXPERTS),
    llama("HyperCLOVAXForCausalLM", _scale=0.6, logits_scaling=0.6),
    Case("FalconForCausalLM", {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    llama("FalconH1ForCausalLM", _scale=0.3, lm_head_multiplier=0.3, **_MAMBA2),
    llama("BambaForCausalLM", attn_layer_indices=[1], **_MAMBA2),
    llama(
        "JambaForCausalLM",
        _moe=True,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        mamba_d_state=8,
        mamba_dt_rank=4,
    ),
    Case("MambaForCausalLM", {**_IDS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "time_step_rank": 4}),
    Case(
        "Mamba2ForCausalLM",
        {
            **_IDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 16,
        },
    ),
    Case(
        "RwkvForCausalLM",
        {
            **_IDS,
            "hidden_size": 32,
            "attention_hidden_size": 32,
            "num_hidden_layers": 2,
            "context_length": 64,
            "use_cache": False,
        },
    ),
    Case(
        "xLSTMForCausalLM",
        {
            **_IDS,
            "hidden_size": 64,
            "embedding_dim": 64,
            "num_hidden_layers": 2,
            "num_blocks": 2,
            "num_heads": 4,
            "output_logit_soft_cap": 3.5,
            "chunk_size": 16,
            "qk_dim_factor": 1.0,
        },
        softcap=3.5,
    ),
    Case(
        "OPTForCausalLM",
        {
            **_IDS,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
        },
    ),
    Case("BloomForCausalLM", {**_IDS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    Case(
        "MptForCausalLM", {**_IDS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
    ),
    Case(
        "XGLMForCausalLM",
        {**_IDS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": 64},
    ),
    Case("BioGptForCausalLM", _MHA),
    llama("StableLmForCausalLM"),
    llama("Starcoder2ForCausalLM"),
    llama("PersimmonForCausalLM"),
    llama("NemotronForCausalLM"),
    llama("GlmForCausalLM"),
    llama("Glm4MoeForCausalLM", **_EXPERTS, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    Case(
        "DbrxForCausalLM",
        {
            **_IDS,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
    ),
    llama("JetMoeForCausalLM", kv_channels=8, **_EXPERTS),
    llama("Qwen2MoeForCausalLM", _moe=True, shared_expert_intermediate_size=16),
    llama("Qwen3MoeForCausalLM", _moe=True),
    llama("GptOssForCausalLM", _moe=True),
    llama("DeepseekV2ForCausalLM", **{**_EXPERTS, **_MLA}),
    llama("DeepseekV3ForCausalLM", **{**_EXPERTS, **_MLA}),
    llama("MiniMaxForCausalLM", _moe=True, layer_types=["linear_attention", "full_attention"], block_size=8),
    llama("SmolLM3ForCausalLM"),
    llama("Ernie4_5ForCausalLM"),
    llama(
        "Ernie4_5_MoeForCausalLM",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=16,
        moe_layer_start_index=0,
        moe_num_shared_experts=1,
    ),
    llama("HunYuanDenseV1ForCausalLM"),
    llama("SeedOssForCausalLM"),
    llama("ArceeForCausalLM"),
    llama("ApertusForCausalLM"),
    llama("HeliumForCausalLM"),
    llama("Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    llama(
        "ZambaForCausalLM",
        mamba_d_state=8,
        n_mamba_heads=2,
        mamba_dt_rank=4,
        num_hidden_layers=3,
        layers_block_type=["mamba", "hybrid", "hybrid"],
    ),
    Case("BartForCausalLM", _BART, shift=False),
    Case("MarianForCausalLM", _BART, shift=False),
]


def build(case: Case, *, seed: int = 0, std: float = 0.2) -> torch.nn.Module:
    """The case's model in eval mode, fp32, every matrix and head bias redrawn."""
    import transformers

    model_class = getattr(transformers, case.name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**case.config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("lm_head.bias"):
                parameter.normal_(std=std)
    return model


def batch(seed: int = 0, rows: int = 3, length: int = 11) -> dict[str, torch.Tensor]:
    """Ragged right-padded rows; labels ignored on padding, on a prompt of each row's own length and at one place."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB, (rows, length), generator=generator)
    lengths = torch.tensor([length, length - 4, length - 1, length - 6][:rows])
    positions = torch.arange(length)
    attention_mask = (positions < lengths[:, None]).long()
    input_ids = input_ids.where(attention_mask.bool(), 0)
    prompt = torch.tensor([3, 1, 0, 2][:rows])
    labels = input_ids.masked_fill((attention_mask == 0) | (positions < prompt[:, None]), -100)
    labels[0, 6] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
