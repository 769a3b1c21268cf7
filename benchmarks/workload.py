"""What ours and the peer are measured on: random models, pairs and prompts, made once and read by both.

    python benchmarks/workload.py FOLDER [--sizes 7m,40m] [--steps 7] [--data pairs.jsonl]

FOLDER then holds, for every size, policy/ and reward/: a Llama of random weights with 4096 tokens (0.5b: 32768) and a
reward model of the same size. whole/ and pass/ are data folders of ours: as many pairs as the measured steps learn
from and one step more, and as few as `dpo_later` needs, so that it soon meets them again. whole.json, pass.json and
prompts.json are the same rows for the peer, as text with the chat template applied. about.json is what the table says
of them.

Without --data the texts are made up: words of random syllables, as frequent as Zipf's law has it, in pairs of
responses that share a prompt; prompt and response together have 60 to --max-length tokens, all lengths equally often.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import absent  # noqa: F401  first: it stands in for libraries that are missing
from components.artifacts import DataDir, ModelCard, write_json
from components.batches import token_batches
from components.errors import InputError
from components.records import Demonstration, Message, Preference, Prompt, content_id, prompt_text
from components.tokens import encode_prompt, encode_response
from measurement import STANDARD, Load, pass_updates

LARGER = {"0.5b": (896, 24, 14, 2, 4864)}
"""Beyond the sizes of the base step: hidden, layers, heads, key-value heads, feed-forward."""
VOCABULARY, LARGE_VOCABULARY = 4096, 32768
DRAWN_WORDS = {VOCABULARY: 6000, LARGE_VOCABULARY: 110_000}
"""Words that are drawn, many of them more than once, for a text with that many tokens."""
SHORTEST = 60
"""Tokens of the shortest made-up sequence."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
MADE_UP = 2000
"""Pairs that are made up: enough text for either vocabulary."""


def build(folder: Path, sizes: Sequence[str], steps: int, data: Path | None = None, load: Load = STANDARD) -> None:
    """Write models and data. Raises InputError when `data` holds too few pairs or prompts of the lengths needed."""
    from components.base.architecture import train_tokenizer

    generator = random.Random(0)
    vocabulary = LARGE_VOCABULARY if LARGER.keys() & set(sizes) else VOCABULARY
    pairs = read(data) if data else made_up(generator, vocabulary, load.max_length)
    generator.shuffle(pairs)
    texts = (text for row in pairs for text in (prompt_text(row.prompt), row.chosen, row.rejected))
    tokenizer = train_tokenizer(texts, vocabulary)
    for size in sizes:
        write_models(folder / size, size, tokenizer)
    fitting = [row for row in pairs if longest(row, tokenizer) <= load.max_length]
    prompts = list(full_prompts(pairs, tokenizer, load.prompt_tokens))
    source, updates = str(data) if data else "the made-up pairs", 1 + steps
    needed, asked = load.rows * updates, load.responses // 2 * updates  # online_dpo takes two responses to a prompt
    for found, number, what in ((fitting, needed, f"pairs of at most {load.max_length} tokens"),
                                (prompts, asked, f"prompts of {load.prompt_tokens} tokens or more")):  # fmt: skip
        if len(found) < number:
            raise InputError(f"{source}: {len(found)} {what}; {steps} steps need {number}. Give more, or fewer steps.")
    write_data(folder, "whole", fitting[:needed], prompts[:asked], tokenizer)
    write_data(folder, "pass", fitting[: load.rows * pass_updates(steps)], prompts[:asked], tokenizer)
    about = {"data": data.name if data else "", "left_out": len(pairs) - len(fitting)}
    write_json(folder / "about.json", about | budgets(fitting[:needed], tokenizer, updates, load.pair_parts))


def read(path: Path) -> list[Preference]:
    """The pairs of a file in any form that preprocess takes. Raises InputError as it does."""
    from components.preprocess.settings import PreprocessSettings
    from components.preprocess.step import run as preprocess

    with TemporaryDirectory(prefix="plumbline-") as scratch:
        settings = PreprocessSettings.model_validate({"preferences": [{"path": str(path.resolve())}]})
        preprocess(settings, raw=None, data=Path(scratch))
        return [row for split in ("train", "test") for row in DataDir(Path(scratch)).preferences(split)]


def made_up(generator: random.Random, vocabulary: int, max_length: int) -> list[Preference]:
    """Pairs of made-up words, enough different ones for the vocabulary; a word is about 1.1 tokens."""

    def word() -> str:
        syllables = generator.choices([1, 2, 3], [2, 5, 3])[0]
        return "".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(syllables))

    words = list(dict.fromkeys(word() for _ in range(DRAWN_WORDS[vocabulary])))
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(tokens: int) -> str:
        return " ".join(generator.choices(words, cum_weights=weights, k=max(2, round(tokens / 1.11))))

    pairs = []
    for number in range(MADE_UP):
        lengths = [generator.randint(SHORTEST, max_length) for _ in range(2)]
        share = generator.randint(SHORTEST // 3, min(lengths) * 2 // 3)
        prompt = (Message("user", text(share)),)
        chosen, rejected = (text(length - share) for length in lengths)
        pairs.append(Preference(str(number), prompt, chosen, rejected, "helpful", None, None, "made up"))
    return pairs


def longest(row: Preference, tokenizer: Any) -> int:
    """Tokens of the pair's longer sequence, prompt and end-of-sequence token included."""
    responses = (len(encode_response(tokenizer, text)) for text in (row.chosen, row.rejected))
    return len(encode_prompt(tokenizer, row.prompt)) + max(responses)


def full_prompts(pairs: Sequence[Preference], tokenizer: Any, tokens: int) -> Iterator[str]:
    """Texts of exactly so many tokens once the template is applied: the ends of prompts and responses."""
    room = tokens - len(encode_prompt(tokenizer, (Message("user", ""),)))
    for row in pairs:
        ids = encode_response(tokenizer, f"{prompt_text(row.prompt)}\n{row.chosen}", ended=False)
        text = tokenizer.decode(ids[-room:])
        if len(encode_prompt(tokenizer, (Message("user", text),))) == tokens:
            yield text


def write_models(folder: Path, size: str, tokenizer: Any) -> None:
    """A policy and a reward model of random weights."""
    import torch
    from transformers import LlamaForSequenceClassification

    from components.base import architecture
    from components.models import policy_card, save_model

    torch.manual_seed(0)
    with patch.dict(architecture.SIZES, LARGER):
        policy: Any = architecture.untrained_llama(size, tokenizer, max_positions=1024)  # type: ignore[arg-type]
    card = policy_card("", "base", tokenizer)
    save_model(policy, tokenizer, folder / "policy", card, settings={}, parents={})
    policy.config.num_labels = 1
    reward = LlamaForSequenceClassification(policy.config)
    scores = ModelCard("reward", "", "reward", card.template_digest)
    save_model(reward, tokenizer, folder / "reward", scores, settings={}, parents={})


def write_data(
    folder: Path, name: str, pairs: Sequence[Preference], prompts: Sequence[str], tokenizer: Any
) -> None:
    """The rows as a data folder of ours, and as JSON lists of texts for the peer."""
    asked = [Prompt(content_id(text), (Message("user", text),), "benchmark") for text in prompts]
    answered = [Demonstration(row.id, row.prompt, row.chosen, row.source) for row in pairs]
    labelled = [Preference(r.id, r.prompt, r.chosen, r.rejected, "helpful", None, None, r.source) for r in pairs]
    records: dict[tuple[str, str], list[Any]] = {
        ("demonstrations", "train"): answered, ("preferences", "train"): labelled, ("prompts", "train"): asked,
    }  # fmt: skip
    DataDir.write(folder / name, records, {}, {})

    def rendered(row: Preference | Prompt) -> str:
        return str(tokenizer.decode(encode_prompt(tokenizer, row.prompt)))

    texts = [{"prompt": rendered(row), "chosen": row.chosen, "rejected": row.rejected} for row in pairs]
    write_json(folder / f"{name}.json", texts)
    write_json(folder / "prompts.json", [{"prompt": rendered(row)} for row in asked])


def budgets(pairs: Sequence[Preference], tokenizer: Any, updates: int, pair_parts: int) -> dict[str, int]:
    """Tokens that the rows have for sft and for pairs, and the budgets with which they make that many batches.

    Our supervised training fills batches up to a number of tokens, rows of like length together, so a batch has as many
    rows on average as each of the peer's. Both learn from all rows in as many updates.
    """
    prompts = [len(encode_prompt(tokenizer, row.prompt)) for row in pairs]
    chosen, rejected = (
        [prompt + len(encode_response(tokenizer, text)) for prompt, text in zip(prompts, texts, strict=True)]
        for texts in ([row.chosen for row in pairs], [row.rejected for row in pairs])
    )
    both = [2 * max(lengths) for lengths in zip(chosen, rejected, strict=True)]  # as PairObjective counts

    def budget(lengths: Sequence[int], batches: int) -> int:
        fits: Callable[[int], bool] = lambda size: len(token_batches(lengths, size, 0)) <= batches  # noqa: E731
        return next(size for size in range(max(lengths), sum(lengths) + 1) if fits(size))

    return {
        "sft_tokens": sum(chosen),
        "pair_tokens": sum(chosen) + sum(rejected),
        "sft_budget": budget(chosen, updates),
        "pair_budget": budget(both, updates * pair_parts),
    }


def main() -> int:
    """0, or 2 with one message when the data do not suffice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="7m,40m")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--data", type=Path)
    Load.add_options(parser)
    given = vars(parser.parse_args())
    load = Load.taken(given)
    try:
        build(given["folder"], given["sizes"].split(","), given["steps"], given["data"], load)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
