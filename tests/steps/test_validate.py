"""The validate step on good and broken data, and on broken model folders."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import DataDir, verify_manifest
from components.errors import InputError
from components.records import KINDS, SPLITS, Demonstration, Message, Preference, Prompt, Record
from components.validate.settings import ValidateSettings
from components.validate.step import run

CONTRADICTION = {"dimension": "harmless", "chosen_safe": False, "rejected_safe": True}
Edit = Callable[[list[dict[str, Any]]], None]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-architecture folder of a few thousand parameters with a byte-level tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(["<end>", *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}|{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def base(model_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    import shutil

    return shutil.copytree(model_folder, tmp_path / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two good rows of every kind in train, one in test."""
    records: dict[tuple[str, str], list[Record]] = {}
    for split, numbers in (("train", (1, 2)), ("test", (3,))):
        prompts = {number: (Message("user", f"ask {number}"),) for number in numbers}
        records["demonstrations", split] = [
            Demonstration(f"d{n}", prompt, f"answer {n}", f"d.jsonl:{n}") for n, prompt in prompts.items()
        ]
        records["preferences", split] = [
            Preference(f"p{n}", prompt, f"good {n}", f"bad {n}", "helpful", True, None, f"p.jsonl:{n}")
            for n, prompt in prompts.items()
        ]
        records["prompts", split] = [
            Prompt(f"q{n}", prompt, f"q.jsonl:{n}", "fact") for n, prompt in prompts.items()
        ]
    DataDir.write(tmp_path / "data", records, {}, {})
    return tmp_path / "data"


def rewrite(data: Path, kind: str, split: str, edit: Edit) -> None:
    """Change a table as another program might have written it: column types follow the values."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = data / kind / f"{split}.parquet"
    rows = pq.read_table(path).to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows), path)


def validate(data: Path, base: Path, **settings: Any) -> tuple[dict[str, Any], str]:
    """The content of report.json and the error's message, empty when there was none."""
    report = data.parent / "report"
    message = ""
    try:
        run(
            ValidateSettings.model_validate({"max_length": 64, "dimensions": ["helpful"], **settings}),
            data=data,
            base=base,
            report=report,
        )
    except InputError as error:
        message = str(error)
    content: dict[str, Any] = json.loads((report / "report.json").read_text())
    assert content["passed"] is (message == "")
    verify_manifest(report)
    return content, message


def found(content: dict[str, Any]) -> list[tuple[str, str, int | None, str | None]]:
    return [(row["level"], row["check"], row["row"], row["field"]) for row in content["findings"]]


def test_good_data_passes_with_its_counts_lengths_and_shares(data: Path, base: Path) -> None:
    content, message = validate(data, base)
    assert message == "" and content["findings"] == []
    metrics = content["metrics"]
    assert metrics["validate/num_rows"] == 9
    assert metrics["validate/share_helpful"] == 1.0
    # "ask 1" and "|" are 6 bytes, "answer 1" is 8, and the end is one token.
    assert metrics["validate/demonstrations_tokens_max"] == 6 + 8 + 1
    assert metrics["validate/prompts_tokens_p50"] == 6
    assert metrics["validate/preferences_truncated"] == 0.0
    page = (data.parent / "report" / "report.html").read_text()
    assert "passed" in page and "fact" in page and "http" not in page


def _set(index: int, **fields: Any) -> Edit:
    return lambda rows: rows[index].update(fields)


@pytest.mark.parametrize(
    ("kind", "edit", "check", "row", "field"),
    [
        ("demonstrations", _set(1, response=None), "missing", 2, "response"),
        ("demonstrations", _set(0, response=" \n"), "empty", 1, "response"),
        ("demonstrations", lambda rows: [row.pop("id") for row in rows], "missing", 1, "id"),
        ("demonstrations", _set(0, prompt=None), "missing", 1, "prompt"),
        ("demonstrations", _set(1, prompt=[]), "empty", 2, "prompt"),
        ("demonstrations", _set(1, prompt=[{"role": "robot", "content": "x"}]), "type", 2, "prompt"),
        ("demonstrations", _set(1, prompt=[{"role": "assistant", "content": "x"}]), "last turn", 2, "prompt"),
        ("demonstrations", _set(1, prompt=[{"role": "user", "content": ""}]), "empty", 2, "prompt"),
        ("demonstrations", lambda rows: [row.update(prompt=7) for row in rows], "type", 1, "prompt"),
        ("demonstrations", lambda rows: [row.update(response=7) for row in rows], "type", 1, "response"),
        ("preferences", _set(1, rejected="good 2"), "identical pair", 2, "rejected"),
        ("preferences", _set(0, dimension="funny"), "type", 1, "dimension"),
        ("preferences", lambda rows: [row.update(chosen_safe="y") for row in rows], "type", 1, "chosen_safe"),
        ("preferences", _set(1, **CONTRADICTION), "contradiction", 2, "chosen_safe"),
        ("prompts", lambda rows: [row.update(category=1) for row in rows], "type", 1, "category"),
        ("prompts", _set(1, prompt=[{"role": "user", "content": "Ask  3"}]), "leakage", 1, "prompt"),
        ("demonstrations", _set(1, response="x" * 63), "overlong", 2, "response"),
    ],
)
def test_what_is_wrong_with_a_row_is_reported_with_its_file_row_and_field(
    data: Path, base: Path, kind: str, edit: Edit, check: str, row: int, field: str
) -> None:
    rewrite(data, kind, "train", edit)
    content, message = validate(data, base, max_truncated=1.0)
    assert ("error", check, row, field) in found(content)
    split = "test" if check == "leakage" else "train"
    assert f"/{split}.parquet row {row}" in message
    assert f"field '{field}'" in message and "report.html" in message


@pytest.mark.parametrize(
    ("kind", "edit", "check", "row"),
    [
        ("demonstrations", lambda rows: rows.append(rows[0]), "duplicate", 3),
        (
            "preferences",
            lambda rows: rows.append({**rows[0], "chosen": "bad 1", "rejected": "good 1"}),
            "conflict",
            3,
        ),
        ("prompts", _set(0, prompt=[{"role": "user", "content": "a"}] * 2), "alternation", 1),
    ],
)
def test_what_may_be_meant_is_a_warning(
    data: Path, base: Path, kind: str, edit: Edit, check: str, row: int
) -> None:
    rewrite(data, kind, "train", edit)
    content, message = validate(data, base)
    assert message == ""
    assert [(level, name, number) for level, name, number, _ in found(content)] == [("warn", check, row)]


def test_overlong_responses_may_be_allowed_and_too_many_truncated_rows_are_an_error(
    data: Path, base: Path
) -> None:
    rewrite(data, "demonstrations", "train", _set(1, response="x" * 70))
    content, message = validate(data, base, overlong="warn")
    assert [level for level, check, *_ in found(content) if check == "overlong"] == ["warn"]
    assert "33% of sequences are longer than validate.max_length (64 tokens)" in message
    assert validate(data, base, overlong="warn", max_truncated=0.5)[1] == ""


def test_a_kind_split_or_dimension_that_later_steps_need_must_have_rows(data: Path, base: Path) -> None:
    rewrite(data, "prompts", "test", list.clear)
    rewrite(data, "demonstrations", "test", list.clear)
    content, message = validate(data, base, dimensions=["helpful", "harmless"])
    few = [(row["level"], row["file"]) for row in content["findings"] if row["check"] == "too few"]
    assert few == [
        ("error", "prompts/test.parquet"),
        ("error", "preferences/train.parquet"),
        ("error", "preferences/test.parquet"),
        ("warn", "demonstrations/test.parquet"),
    ]
    assert "validate.min_test" in message and "no harmless preferences" in message


def test_a_folder_without_tables_is_reported_and_does_not_crash(tmp_path: Path, base: Path) -> None:
    (tmp_path / "data").mkdir()
    content, _ = validate(tmp_path / "data", base)
    assert sum(row["check"] == "file" for row in content["findings"]) == len(KINDS) * len(SPLITS)


def test_the_message_names_five_errors_and_counts_the_rest(data: Path, base: Path) -> None:
    rewrite(
        data,
        "demonstrations",
        "train",
        lambda rows: rows.extend({**rows[0], "response": ""} for _ in range(9)),
    )
    content, message = validate(data, base, max_findings=7)
    assert "validate found 9 errors" in message
    assert "demonstrations/train.parquet row 7 (d.jsonl:1), field 'response': is empty" in message
    assert "row 8" not in message and "and 4 more" in message
    assert sum(row["check"] == "empty" for row in content["findings"]) == 7


def test_text_from_the_data_is_escaped_on_the_page(data: Path, base: Path) -> None:
    rewrite(data, "preferences", "train", _set(0, dimension="<script>alert(1)</script>"))
    validate(data, base)
    page = (data.parent / "report" / "report.html").read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


def _edit_json(name: str, **fields: Any) -> Callable[[Path], None]:
    def edit(base: Path) -> None:
        path = base / name
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


def _cut_weights(base: Path) -> None:
    content = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(content[:-10])


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda base: (base / "config.json").unlink(), "base/config.json: no such file"),
        (lambda base: (base / "config.json").write_text("{"), "base/config.json: cannot be read"),
        (_edit_json("config.json", model_type="t5"), "'model_type': not a causal language model"),
        (_edit_json("config.json", architectures=["LlamaForScores"]), "'architectures': saved"),
        (_edit_json("config.json", model_type="unheard"), "base/config.json: cannot be read"),
        (_edit_json("config.json", vocab_size=100), "'vocab_size': the tokenizer has 257 tokens"),
        (_edit_json("config.json", max_position_embeddings=32), "'max_position_embeddings': fewer positions"),
        (lambda base: (base / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda base: (base / "tokenizer.json").write_text("{}"), "the tokenizer cannot be read"),
        (_edit_json("tokenizer_config.json", eos_token=None, pad_token=None), "no eos_token"),
        (_cut_weights, "not a whole safetensors file"),
        (
            lambda base: (base / "model.safetensors").rename(base / "pytorch_model.bin"),
            ".bin weights are pickles",
        ),
        (
            lambda base: (base / "model.safetensors").rename(base / "model.safetensors.index.json"),
            "base/model.safetensors.index.json, field 'weight_map'",
        ),
    ],
)
def test_a_broken_model_folder_is_told_before_weights_are_loaded(
    data: Path, base: Path, damage: Callable[[Path], object], expected: str
) -> None:
    damage(base)
    assert expected in validate(data, base)[1]


def test_a_missing_chat_template_is_a_warning_and_one_that_refuses_a_prompt_an_error(
    data: Path, base: Path
) -> None:
    (base / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
    content, message = validate(data, base)
    assert "the base model's chat template refuses it: no system turns" in message
    assert sum(row["check"] == "template" for row in content["findings"]) == 9
    (base / "chat_template.jinja").unlink()
    content, message = validate(data, base)
    assert message == ""
    assert [(row["level"], row["field"]) for row in content["findings"]] == [("warn", "chat_template")]
