"""Which models the fast forward pass knows: those whose arithmetic tests compare with Hugging Face's."""

from typing import Any

from torch import nn

from components.generation.dense import is_dense

CLASSES = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
ROPE_TYPES = {"default", "linear", "llama3", "yarn"}
"""Rotary frequencies that do not depend on how long the sequence is."""


def is_known(model: Any) -> bool:
    """Whether `components.generation.llama` computes what the model does, adapters included."""
    base = model
    if hasattr(model, "peft_config"):
        if any(str(config.peft_type.value) != "LORA" for config in model.peft_config.values()):
            return False
        base = model.get_base_model()
    kind = type(base)
    if kind.__name__ not in CLASSES or not kind.__module__.startswith("transformers.models."):
        return False
    return _attends_to_all(base.config) and _rotates_whole_heads(base) and _is_plain(base)


def _attends_to_all(config: Any) -> bool:
    """No layer with a sliding window."""
    if getattr(config, "layer_types", None):
        return all(kind == "full_attention" for kind in config.layer_types)
    return getattr(config, "sliding_window", None) is None


def _rotates_whole_heads(base: Any) -> bool:
    rope = base.config.rope_parameters or {}
    return rope.get("rope_type") in ROPE_TYPES and rope.get("partial_rotary_factor", 1.0) == 1.0


def _is_plain(base: Any) -> bool:
    """Embedding and projections are what they are in a model that nobody quantised or wrapped."""
    if type(base.model.embed_tokens) is not nn.Embedding or not is_dense(base.lm_head):
        return False
    names = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
    return all(
        is_dense(getattr(part, name))
        for layer in base.model.layers
        for part, own in zip((layer.self_attn, layer.mlp), names, strict=True)
        for name in own
    )
