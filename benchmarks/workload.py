"""What ours and the peer are measured on: random models, pairs and prompts, made once and read by both.

    python benchmarks/workload.py FOLDER [--sizes 7m,40m] [--steps 7] [--data pairs.jsonl]

FOLDER then holds, for every size, policy/ and reward/: a Llama of random weights with 4096 tokens and a reward model
of the same size. whole/ and pass/ are data folders of ours: as many pairs as the measured steps learn from and one
step more, and as few as `dpo_later` needs, so that it soon meets them again. whole.json, pass.json and prompts.json
are the same rows for the peer, as text with the chat template applied. about.json is what the table says of them.

Without --data the texts are made up: words of random syllables, as frequent as Zipf's law has it, in pairs of
responses that share a prompt; prompt and response together have 60 to 256 tokens, all lengths equally often.
"""

import argparse
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from components.artifacts import DataDir, ModelCard, write_json
from components.batches import token_batches
from components.errors import InputError
from components.preprocess.settings import PreprocessSettings
from components.preprocess.step import run as preprocess
from components.records import Demonstration, Message, Preference, Prompt, content_id, prompt_text
from components.tokens import encode_prompt, encode_response
from measurement import MAX_LENGTH, PROMPT_TOKENS, ROWS, pass_updates

VOCABULARY = 4096
SHORTEST = 60
"""Tokens of the shortest made-up sequence."""
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
MADE_UP = 2000
"""Pairs that are made up: enough text for a vocabulary of 4096."""


def build(folder: Path, sizes: Sequence[str], steps: int, data: Path | None = None) -> None:
    """Write models and data. Raises InputError when `data` holds too few pairs or prompts of the lengths needed."""
    from components.base.architecture import train_tokenizer

    generator = random.Random(0)
    pairs = read(data) if data else made_up(generator)
    generator.shuffle(pairs)
    texts = (text for row in pairs for text in (prompt_text(row.prompt), row.chosen, row.rejected))
    tokenizer = train_tokenizer(texts, VOCABULARY)
    for size in sizes:
        write_models(folder / size, size, tokenizer)
    needed = ROWS * (1 + steps)
    fitting = [row for row in pairs if longest(row, tokenizer) <= MAX_LENGTH]
    prompts = list(full_prompts(pairs, tokenizer))
    source = str(data) if data else "the made-up pairs"
    for found, what in ((fitting, f"pairs of at most {MAX_LENGTH} tokens"),
                        (prompts, f"prompts of {PROMPT_TOKENS} tokens or more")):  # fmt: skip
        if len(found) < needed:
            raise InputError(f"{source}: {len(found)} {what}; {steps} steps need {needed}. Give more, or fewer steps.")
    write_data(folder, "whole", fitting[:needed], prompts[:needed], tokenizer)
    write_data(folder, "pass", fitting[: ROWS * pass_updates(steps)], prompts[:needed], tokenizer)
    about = {"data": data.name if data else "", "left_out": len(pairs) - len(fitting)}
    write_json(folder / "about.json", about | budgets(fitting[:needed], tokenizer, 1 + steps))


def read(path: Path) -> list[Preference]:
    """The pairs of a file in any form that preprocess takes. Raises InputError as it does."""
    with TemporaryDirectory(prefix="plumbline-") as scratch:
        settings = PreprocessSettings.model_validate({"preferences": [{"path": str(path.resolve())}]})
        preprocess(settings, raw=None, data=Path(scratch))
        return [row for split in ("train", "test") for row in DataDir(Path(scratch)).preferences(split)]


def made_up(generator: random.Random) -> list[Preference]:
    """Pairs of made-up words; a word is about 1.1 tokens."""

    def word() -> str:
        syllables = generator.choices([1, 2, 3], [2, 5, 3])[0]
        return "".join(generator.choice(CONSONANTS) + generator.choice(VOWELS) for _ in range(syllables))

    words = list(dict.fromkeys(word() for _ in range(6000)))
    weights = list(accumulate(1 / rank for rank in range(1, len(words) + 1)))

    def text(tokens: int) -> str:
        return " ".join(generator.choices(words, cum_weights=weights, k=max(2, round(tokens / 1.11))))

    pairs = []
    for number in range(MADE_UP):
        lengths = [generator.randint(SHORTEST, MAX_LENGTH) for _ in range(2)]
        share = generator.randint(SHORTEST // 3, min(lengths) * 2 // 3)
        prompt = (Message("user", text(share)),)
        chosen, rejected = (text(length - share) for length in lengths)
        pairs.append(Preference(str(number), prompt, chosen, rejected, "helpful", None, None, "made up"))
    return pairs


def longest(row: Preference, tokenizer: Any) -> int:
    """Tokens of the pair's longer sequence, prompt and end-of-sequence token included."""
    responses = (len(encode_response(tokenizer, text)) for text in (row.chosen, row.rejected))
    return len(encode_prompt(tokenizer, row.prompt)) + max(responses)


def full_prompts(pairs: Sequence[Preference], tokenizer: Any) -> Iterator[str]:
    """Texts that are exactly PROMPT_TOKENS tokens once the template is applied: the ends of prompts and responses."""
    room = PROMPT_TOKENS - len(encode_prompt(tokenizer, (Message("user", ""),)))
    for row in pairs:
        ids = encode_response(tokenizer, f"{prompt_text(row.prompt)}\n{row.chosen}", ended=False)
        text = tokenizer.decode(ids[-room:])
        if len(encode_prompt(tokenizer, (Message("user", text),))) == PROMPT_TOKENS:
            yield text


def write_models(folder: Path, size: str, tokenizer: Any) -> None:
    """A policy and a reward model of random weights."""
    import torch
    from transformers import LlamaForSequenceClassification

    from components.base.architecture import untrained_llama
    from components.models import policy_card, save_model

    torch.manual_seed(0)
    policy: Any = untrained_llama(size, tokenizer, max_positions=1024)  # type: ignore[arg-type]
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


def budgets(pairs: Sequence[Preference], tokenizer: Any, updates: int) -> dict[str, int]:
    """Tokens that the rows have for sft and for pairs, and the budgets with which they make that many batches.

    Our supervised training fills batches up to a number of tokens, rows of like length together, so a batch has
    sixteen rows on average; the peer's have sixteen each. Both learn from all rows in as many updates.
    """
    prompts = [len(encode_prompt(tokenizer, row.prompt)) for row in pairs]
    chosen, rejected = (
        [prompt + len(encode_response(tokenizer, text)) for prompt, text in zip(prompts, texts, strict=True)]
        for texts in ([row.chosen for row in pairs], [row.rejected for row in pairs])
    )
    both = [2 * max(lengths) for lengths in zip(chosen, rejected, strict=True)]  # as PairObjective counts

    def budget(lengths: Sequence[int]) -> int:
        fits: Callable[[int], bool] = lambda size: len(token_batches(lengths, size, 0)) <= updates  # noqa: E731
        return next(size for size in range(max(lengths), sum(lengths) + 1) if fits(size))

    return {
        "sft_tokens": sum(chosen),
        "pair_tokens": sum(chosen) + sum(rejected),
        "sft_budget": budget(chosen),
        "pair_budget": budget(both),
    }


def main() -> int:
    """0, or 2 with one message when the data do not suffice."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sizes", default="7m,40m")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    try:
        build(given.folder, given.sizes.split(","), given.steps, given.data)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
