"""The preprocess step on files as users have them."""

import csv
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import DataDir, Metrics, read_manifest, verify_manifest
from components.errors import InputError
from components.preprocess.settings import PreprocessSettings
from components.preprocess.sources import locate, read_rows
from components.preprocess.step import run
from components.records import KINDS, SPLITS, Message, Preference, normalized
from components.storage import put_text


def preprocess(folder: Path, raw: Path | None = None, **settings: Any) -> tuple[DataDir, Metrics]:
    data = folder / "data"
    metrics = run(PreprocessSettings.model_validate(settings), raw=raw, data=data)
    return DataDir(data), metrics


def both_splits(data: DataDir, kind: str) -> list[Any]:
    return [record for split in SPLITS for record in data.load(kind, split)]


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(number: int, **more: Any) -> dict[str, Any]:
    return {
        "prompt": f"question {number}?",
        "chosen": f"right {number}",
        "rejected": f"wrong {number}",
        **more,
    }


def dropped(data: DataDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data.path / "dropped.jsonl").read_text().splitlines()]


def test_preferences_alone_give_demonstrations_and_prompts_too(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair(number) for number in range(50)])
    data, metrics = preprocess(tmp_path, preferences=str(file), test_share=0.2)
    assert {row.response for row in both_splits(data, "demonstrations")} == {f"right {n}" for n in range(50)}
    assert len(both_splits(data, "prompts")) == 50
    assert metrics["preprocess/num_rows"] == 150
    assert metrics["preprocess/num_preferences_train"] == len(data.preferences("train")) > 0
    assert metrics["preprocess/num_preferences_test"] == len(data.preferences("test")) > 0
    assert verify_manifest(data.path) == read_manifest(data.path)["digest"]


def test_no_prompt_is_in_both_splits_of_any_kind(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair(number) for number in range(80)])
    shouted = [{"prompt": f"QUESTION  {number}?", "response": "yes"} for number in range(80)]
    demonstrations = write_jsonl(tmp_path / "demonstrations.jsonl", shouted)
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [f"Question {number}?" for number in range(80)])
    data, _ = preprocess(
        tmp_path,
        preferences=str(pairs),
        demonstrations=str(demonstrations),
        prompts=str(prompts),
        test_share=0.3,
    )
    seen = {
        split: {normalized(row.prompt) for kind in KINDS for row in data.load(kind, split)}
        for split in SPLITS
    }
    assert not seen["train"] & seen["test"]
    assert len(seen["train"] | seen["test"]) == 80
    assert 10 <= len(seen["test"]) <= 40  # 24 expected, standard deviation 4


def test_a_prompt_pinned_to_test_is_a_test_prompt_everywhere(tmp_path: Path) -> None:
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [pair(number) for number in range(30)])
    held_out = write_jsonl(tmp_path / "held_out.jsonl", ["question 3?", "Question 4?"])
    training = write_jsonl(tmp_path / "training.jsonl", ["question 4?", "question 5?"])
    data, _ = preprocess(
        tmp_path,
        preferences=str(pairs),
        prompts=[{"path": str(training), "split": "train"}, {"path": str(held_out), "split": "test"}],
        test_share=0.0,
    )
    assert sorted(row.chosen for row in data.preferences("test")) == ["right 3", "right 4"]
    assert [row.prompt[0].content for row in data.prompts("train")] == ["question 5?"]
    assert len(data.prompts("test")) == 2


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_split(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [pair(number) for number in range(60)])
    digests = []
    for index, seed in enumerate((0, 0, 1)):
        data, _ = preprocess(tmp_path / str(index), preferences=str(file), test_share=0.3, seed=seed)
        digests.append(read_manifest(data.path)["digest"])
    assert digests[0] == digests[1] != digests[2]


def test_rows_left_out_are_counted_and_listed_with_their_reason(tmp_path: Path) -> None:
    rows = [
        pair(1),
        pair(2, chosen="  \r\n "),
        pair(3, chosen="same", rejected=" same\n"),
        pair(1, chosen=" right 1 "),
        pair(1, dimension="harmless"),
    ]
    file = write_jsonl(tmp_path / "pairs.jsonl", rows)
    data, metrics = preprocess(tmp_path, preferences=str(file))
    assert [(row["file"], row["row"], row["reason"]) for row in dropped(data)] == [
        ("pairs.jsonl", 2, "empty"),
        ("pairs.jsonl", 3, "identical"),
        ("pairs.jsonl", 4, "duplicate"),
    ]
    assert metrics["preprocess/num_dropped"] == 3
    assert metrics["preprocess/dropped_duplicate"] == 1
    assert {row.dimension for row in both_splits(data, "preferences")} == {"helpful", "harmless"}


def test_weights_are_followed_as_far_as_the_scarcest_source_allows(tmp_path: Path) -> None:
    scarce = write_jsonl(tmp_path / "scarce.jsonl", [pair(number) for number in range(10)])
    plenty = write_jsonl(tmp_path / "plenty.jsonl", [pair(number) for number in range(100, 200)])
    data, metrics = preprocess(
        tmp_path, preferences=[{"path": str(scarce)}, {"path": str(plenty), "weight": 3.0}], test_share=0.2
    )
    origins = [row.source.split(":")[0] for row in both_splits(data, "preferences")]
    assert (origins.count("scarce.jsonl"), origins.count("plenty.jsonl")) == (10, 30)
    assert metrics["preprocess/dropped_weight"] == 70


def test_files_of_the_raw_folder_are_found_first_and_json_csv_and_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "demonstrations.json").write_text(json.dumps({"data": [{"prompt": "a?", "response": "b"}]}))
    with (raw / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "chosen", "rejected", "chosen_safe", "dimension"])
        writer.writeheader()
        writer.writerow(pair(1, chosen="two\nlines, one comma", chosen_safe="True", dimension=""))
    pq.write_table(pa.Table.from_pylist([{"prompt": "c?", "category": "fact"}]), raw / "prompts.parquet")
    data, _ = preprocess(
        tmp_path,
        raw=raw,
        demonstrations="demonstrations.json",
        preferences=["pairs.csv"],
        prompts="prompts.parquet",
        dimension="harmless",
    )
    (preference,) = both_splits(data, "preferences")
    assert isinstance(preference, Preference)
    assert preference.chosen == "two\nlines, one comma"
    assert (preference.dimension, preference.chosen_safe, preference.rejected_safe) == (
        "harmless",
        True,
        None,
    )
    assert preference.source == "pairs.csv:1"
    assert [row.response for row in both_splits(data, "demonstrations")] == ["b"]
    assert [row.category for row in both_splits(data, "prompts")] == ["fact"]
    assert "raw" in read_manifest(data.path)["parents"]


def test_zipped_hh_transcripts_become_turns_and_diverging_dialogues_are_left_out(tmp_path: Path) -> None:
    start = "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: sing"
    rows = [
        {"chosen": start + "\n\nAssistant: la\n\nla", "rejected": start + "\n\nAssistant: no"},
        {"chosen": start + "\n\nAssistant: la", "rejected": "\n\nHuman: other\n\nAssistant: no"},
        {"chosen": start, "rejected": start + "\n\nAssistant: no"},
    ]
    file = tmp_path / "hh.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(json.dumps(row) for row in rows).encode()))
    data, _ = preprocess(tmp_path, preferences=[{"path": str(file), "dimension": "harmless"}])
    (row,) = both_splits(data, "preferences")
    assert row.prompt == (Message("user", "hello"), Message("assistant", "hi"), Message("user", "sing"))
    assert (row.chosen, row.rejected, row.dimension) == ("la\n\nla", "no", "harmless")
    assert [left["reason"] for left in dropped(data)] == ["diverging", "unanswered"]


def test_a_folder_means_every_data_file_in_it(tmp_path: Path) -> None:
    for shard in ("a", "b"):
        (tmp_path / "set" / shard).mkdir(parents=True)
        write_jsonl(tmp_path / "set" / shard / "part.jsonl", [pair(ord(shard))])
    (tmp_path / "set" / "README.md").write_text("not data")
    data, _ = preprocess(tmp_path, preferences=str(tmp_path / "set"))
    assert sorted(row.source for row in both_splits(data, "preferences")) == [
        "a/part.jsonl:1",
        "b/part.jsonl:1",
    ]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        (
            "x.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": ',
            "x.jsonl row 3: not JSON",
        ),
        (
            "x.jsonl",
            '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}',
            "'rejected'",
        ),
        ("x.jsonl", '{"prompt": "a", "chosen": 5, "rejected": "c"}', "row 1: field 'chosen' is 5"),
        ("x.jsonl", '{"question": "a", "answer": "b"}', "keys question, answer"),
        ("x.json", '{"rows": []}', "an array of rows"),
        ("x.json", '{"a": 1}\n{"a": 2}', "ends in .jsonl"),
        ("x.csv", "prompt,chosen,rejected\na,b,c,d\n", "row 1: has more cells than the header's 3"),
        ("x.csv", ",prompt,chosen,rejected\n0,a,b,c\n1,a,b,c,d\n", "row 2: has more cells than the header's 4"),
        ("x.xlsx", "", "accepted: .json"),
        ("x.jsonl.gz", "not zipped", "gzip"),
        ("x.parquet", "not parquet", "not a Parquet file"),
        ("x.jsonl", '{"chosen": "bare", "rejected": "texts"}', "does not begin with a turn"),
        ("x.jsonl", '"a prompt alone"', "no form that preferences can come in"),
        (
            "x.jsonl",
            '{"prompt":"a","chosen":"b","rejected":"c","dimension":"funny"}',
            "'dimension' is 'funny'",
        ),
    ],
)
def test_a_malformed_row_names_file_row_and_field(
    tmp_path: Path, name: str, content: str, expected: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as error:
        preprocess(tmp_path, preferences=str(tmp_path / name))
    assert expected in str(error.value)
    assert name in str(error.value)


def test_a_missing_file_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"preprocess\.preferences\[0\]\.path: .*nowhere\.jsonl: no such file"
    ):
        preprocess(tmp_path, preferences=str(tmp_path / "nowhere.jsonl"))


def test_without_any_source_the_error_says_which_settings_to_fill(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="are both empty; give at least one"):
        preprocess(tmp_path, prompts="prompts.jsonl")


def test_a_format_that_cannot_hold_the_kind_is_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "x.jsonl", [pair(1)])
    with pytest.raises(InputError, match=r"preprocess\.preferences\[0\]\.format is prompt"):
        preprocess(tmp_path, preferences=[{"path": str(file), "format": "prompt"}])


def test_sources_are_one_path_a_list_of_paths_or_groups_and_survive_a_dump_without_nulls() -> None:
    one = PreprocessSettings.model_validate({"preferences": "a.jsonl"})
    many = PreprocessSettings.model_validate({"preferences": ["a.jsonl", {"path": "b.csv", "weight": 2}]})
    assert [source.path for source in one.preferences] == ["a.jsonl"]
    assert [source.weight for source in many.preferences] == [None, 2.0]
    assert PreprocessSettings.model_validate(many.model_dump(mode="json", exclude_none=True)) == many


def test_a_source_on_gs_is_copied_and_read(bucket: str, tmp_path: Path) -> None:
    put_text(json.dumps(pair(1)) + "\n", f"{bucket}/feedback/pairs.jsonl")
    data, _ = preprocess(tmp_path, preferences=f"{bucket}/feedback/pairs.jsonl")
    with pytest.raises(InputError, match=rf"preferences\[0\]\.path: {bucket}/nothing: no object there"):
        preprocess(tmp_path, preferences=f"{bucket}/nothing")
    assert [row.source for row in both_splits(data, "preferences")] == ["pairs.jsonl:1"]


def test_the_unnamed_index_that_pandas_writes_is_no_column(tmp_path: Path) -> None:
    import pandas as pd

    path = tmp_path / "pairs.csv"
    pd.DataFrame({"prompt": ["a, b", "c"], "response": ["d", "e"]}).to_csv(path)
    assert path.read_text().startswith(",prompt,response\n0,")
    assert [row.value for row in read_rows(path, "pairs.csv")] == [
        {"prompt": "a, b", "response": "d"},
        {"prompt": "c", "response": "e"},
    ]


def test_a_tilde_in_a_source_is_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.jsonl").write_text('"q"')
    assert locate("~/p.jsonl", "preprocess.prompts.0.path", None, tmp_path) == [tmp_path / "p.jsonl"]
