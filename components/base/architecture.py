"""The small model made here: a byte-level BPE tokenizer and a Llama-architecture network, untrained."""

from collections.abc import Iterable
from typing import Any

from components.base.settings import Size

SIZES: dict[Size, tuple[int, int, int, int, int]] = {
    # hidden, layers, heads, key-value heads, feed-forward
    "1m": (128, 4, 4, 2, 352),
    "3m": (192, 6, 6, 2, 512),
    "7m": (256, 8, 4, 2, 704),
    "40m": (512, 12, 8, 4, 1408),
}
PAD, END = "<|pad|>", "<|end|>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer with a pad token of its own, role tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END, *ROLE_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=PAD, eos_token=END, additional_special_tokens=list(ROLE_TOKENS)
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def untrained_llama(size: Size, tokenizer: Any, max_positions: int) -> Any:
    """A Llama with random weights for the tokenizer's vocabulary; tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from components.blocks import slim
    from components.products import quicken

    hidden, layers, heads, kv_heads, feed_forward = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=feed_forward,
        max_position_embeddings=max_positions,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    quicken(model)
    slim(model)
    return model
