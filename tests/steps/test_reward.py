"""The reward step end to end: reward and cost models on a tiny task, alone and as an ensemble."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from components.artifacts import DataDir, ModelCard, read_manifest, verify_manifest
from components.errors import InputError
from components.generation import Response
from components.models import load_policy, with_lora
from components.outputs import claimed
from components.reward import members, step
from components.reward.settings import RewardSettings
from components.reward.step import run
from components.scoring import SharedBackbone, load_scorer
from components.settings import Compute, Lora


@pytest.fixture
def settings(quick_training: Callable[..., Any]) -> Callable[..., RewardSettings]:
    def made(compute: Compute | None = None, **fields: Any) -> RewardSettings:
        training = quick_training(epochs=3, compute=compute or Compute(dtype="fp32"))
        return RewardSettings(**({"training": training} | fields))

    return made


def scores(folder: Path, data_folder: Path, text: str) -> torch.Tensor:
    prompts = [row.prompt for row in DataDir(data_folder).prompts("test")]
    return load_scorer(folder).score(prompts, [Response(text, (1, 2, 3), True)] * len(prompts))


def test_the_reward_model_prefers_what_people_chose(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(), data=data_folder, sft=policy_folder, model=tmp_path / "m")
    assert metrics["eval/accuracy"] == 1 and metrics["eval/num_pairs"] == 6
    assert metrics["loss/train"] < 0.3
    assert "eval/sign_accuracy" not in metrics
    assert (
        scores(tmp_path / "m", data_folder, "yes") > scores(tmp_path / "m", data_folder, "no, never")
    ).all()


def test_reward_scores_are_normalised_by_the_card(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(), data=data_folder, sft=policy_folder, model=tmp_path / "m")
    card = ModelCard.read(tmp_path / "m")
    assert (card.kind, card.step) == ("reward", "reward")
    assert (card.score_mean, card.score_std) == (metrics["score/mean"], metrics["score/std"])
    both = torch.cat([scores(tmp_path / "m", data_folder, text) for text in ("yes", "no, never")])
    assert both.mean().item() == pytest.approx(0, abs=0.3) and both.std().item() == pytest.approx(1, abs=0.3)
    assert read_manifest(tmp_path / "m")["parents"] == {
        "data": read_manifest(data_folder)["digest"],
        "sft": read_manifest(policy_folder)["digest"],
    }
    verify_manifest(tmp_path / "m")


def test_the_cost_model_puts_unsafe_above_zero_and_safe_below(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    made = settings(kind="cost", dimension="harmless")
    metrics = run(made, data=data_folder, sft=policy_folder, model=tmp_path / "m")
    assert metrics["eval/accuracy"] == metrics["eval/sign_accuracy"] == 1
    assert (scores(tmp_path / "m", data_folder, "yes") < 0).all()
    assert (scores(tmp_path / "m", data_folder, "no, never") > 0).all()
    card = ModelCard.read(tmp_path / "m")
    assert card.kind == "cost" and card.score_mean == 0 and card.score_std == metrics["score/std"]


@pytest.mark.parametrize(
    "fields", [{"compute": Compute(dtype="bf16")}, {"lora": Lora(rank=4)}], ids=["bf16", "lora"]
)
def test_bf16_and_adapters_learn_too(
    fields: Any, settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    metrics = run(settings(**fields), data=data_folder, sft=policy_folder, model=tmp_path / "m")
    assert metrics["eval/accuracy"] == 1
    better, worse = (scores(tmp_path / "m", data_folder, text) for text in ("yes", "no, never"))
    assert (better > worse).all()
    assert torch.cat([better, worse]).std().item() == pytest.approx(1, abs=0.4)


def test_flipped_labels_teach_the_opposite(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    data = DataDir(data_folder)
    flipped = {
        ("preferences", split): [
            replace(row, chosen=row.rejected, rejected=row.chosen) for row in data.preferences(split)
        ]
        for split in ("train", "test")
    }
    DataDir.write(tmp_path / "flipped", flipped, {}, {})
    run(settings(), data=tmp_path / "flipped", sft=policy_folder, model=tmp_path / "m")
    assert (
        scores(tmp_path / "m", data_folder, "yes") < scores(tmp_path / "m", data_folder, "no, never")
    ).all()


def test_no_preferences_of_the_dimension_is_an_error_that_says_what_to_set(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    helpful = [row for row in DataDir(data_folder).preferences("train") if row.dimension == "helpful"]
    DataDir.write(tmp_path / "data", {("preferences", "train"): helpful}, {}, {})
    with pytest.raises(
        InputError, match=r"no harmless preferences to train a cost model on.*cost\.dimension"
    ):
        run(
            settings(kind="cost", dimension="harmless"),
            data=tmp_path / "data",
            sft=policy_folder,
            model=tmp_path / "m",
        )


def test_no_held_out_preferences_give_a_model_without_held_out_metrics(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    train = DataDir(data_folder).preferences("train")
    DataDir.write(tmp_path / "data", {("preferences", "train"): train}, {}, {})
    metrics = run(settings(), data=tmp_path / "data", sft=policy_folder, model=tmp_path / "m")
    assert not any(name.startswith("eval/") for name in metrics) and "score/std" in metrics


def test_an_sft_model_without_a_tokenizer_is_an_error(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    load_policy(policy_folder).save_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="no tokenizer"):
        run(settings(), data=data_folder, sft=tmp_path / "bare", model=tmp_path / "m")


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def three(settings: Any, quick_training: Any) -> RewardSettings:
    return settings(members=3, training=quick_training(epochs=3, checkpoint_every=2))


@pytest.fixture
def ensemble(
    three: RewardSettings, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> tuple[Path, dict[str, float]]:
    folder = tmp_path / "run" / "ensemble"
    return folder, run(three, data=data_folder, sft=policy_folder, model=folder)


def test_the_first_member_is_the_model_that_is_trained_alone(
    settings: Any, ensemble: Any, data_folder: Path, policy_folder: Path, tmp_path: Path
) -> None:
    folder, metrics = ensemble
    alone = run(settings(), data=data_folder, sft=policy_folder, model=tmp_path / "alone")
    assert weights(folder) == weights(tmp_path / "alone")
    assert ModelCard.read(folder) == ModelCard.read(tmp_path / "alone")
    assert {name: value for name, value in metrics.items() if name in alone} == alone
    assert metrics.keys() - alone.keys() == {"eval/ensemble_accuracy", "eval/disagreement"}
    assert metrics["eval/ensemble_accuracy"] == 1 and metrics["eval/disagreement"] > 0
    assert not (tmp_path / "alone" / "members").exists()


def test_every_member_is_a_complete_model_of_its_own_in_one_manifest(
    ensemble: Any, data_folder: Path, tmp_path: Path
) -> None:
    folder, _ = ensemble
    further = [folder / "members" / "1", folder / "members" / "2"]
    assert sorted(folder.glob("members/*")) == further
    assert len({weights(path) for path in (folder, *further)}) == 3
    for path in further:
        better, worse = (scores(path, data_folder, text) for text in ("yes", "no, never"))
        assert (better > worse).all()
        assert torch.cat([better, worse]).std().item() == pytest.approx(1, abs=0.3)  # normalised by its own card
        assert ModelCard.read(path).score_mean not in (0, ModelCard.read(folder).score_mean)
        assert f"members/{path.name}/model.safetensors" in read_manifest(folder)["files"]
    verify_manifest(folder)
    with claimed("reward", folder, "--model"):  # nothing in it is foreign
        pass
    (further[1] / "card.json").write_text("{}")
    with pytest.raises(InputError, match=r"members/2/card\.json"):
        verify_manifest(folder)
    assert not list((folder.parent / "checkpoints").iterdir())


def test_an_interrupted_ensemble_trains_no_finished_member_again(
    three: RewardSettings,
    ensemble: Any,
    data_folder: Path,
    policy_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, metrics = ensemble
    trained: list[int] = []
    kills, again = [2, 0], tmp_path / "again" / "m"

    def watched(lesson: Any, number: int, keep: Any) -> Any:
        trained.append(number)
        if kills[:1] == [number]:
            raise KeyboardInterrupt(kills.pop(0))
        return train(lesson, number, keep)

    train = members.train_member
    for module in (members, step):
        monkeypatch.setattr(module, "train_member", watched)
    inputs = {"data": data_folder, "sft": policy_folder, "model": again}
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(three, **inputs)
    assert trained == [1, 2, 2, 0]
    (half,) = (again.parent / "checkpoints").glob("reward-2-finished-*/*/tensors.safetensors")
    half.write_bytes(b"half")  # a damaged one is trained again
    assert run(three, **inputs) == metrics
    assert trained[4:] == [2, 0]
    assert read_manifest(again)["digest"] == read_manifest(folder)["digest"]


def test_members_draw_other_pairs_and_keep_the_normalisation_to_the_same(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted: list[list[Any]] = []

    def fit(model: Any, objective: Any, rows: Any, *args: Any, finish: Any, **fields: Any) -> dict[str, float]:
        fitted.append(list(rows))
        finish({})
        return {}

    normalised: list[Any] = []
    monkeypatch.setattr(members, "fit", fit)
    monkeypatch.setattr(members, "normalization", lambda a, b, pairs, *rest: normalised.append(pairs) or (0.0, 1.0))
    run(settings(members=3), data=data_folder, sft=policy_folder, model=tmp_path / "run" / "m")
    one, two, first = fitted
    assert len(first) == 24 and len({tuple(pair.chosen) for pair in first}) == 24
    assert len(one) == len(two) == 24 and one != two
    assert all(len({tuple(pair.chosen) for pair in rows}) < 24 for rows in (one, two))  # drawn with replacement
    assert all(pair in first for pair in one + two)
    assert normalised[0] == normalised[1] == normalised[2]


def test_members_trained_with_adapters_are_saved_merged_and_apart(
    settings: Any, data_folder: Path, policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, again = tmp_path / "run" / "m", tmp_path / "again" / "m"
    made = settings(members=2, lora=Lora(rank=4))
    run(made, data=data_folder, sft=policy_folder, model=folder)
    host = with_lora(load_policy(policy_folder), Lora(rank=1))
    shared = SharedBackbone(host, read_manifest(policy_folder)["digest"], load_scorer)
    for path in (folder, folder / "members" / "1"):
        better, worse = (scores(path, data_folder, text) for text in ("yes", "no, never"))
        assert (better > worse).all()
        assert torch.cat([better, worse]).std().item() == pytest.approx(1, abs=0.4)
        prompts = [row.prompt for row in DataDir(data_folder).prompts("test")]
        guest = shared.load(path).score(prompts, [Response("yes", (1, 2, 3), True)] * len(prompts))
        torch.testing.assert_close(guest, better, atol=1e-5, rtol=1e-5)
        name = (path / "adapter").relative_to(folder).as_posix()
        files = {file for file in read_manifest(folder)["files"] if file.startswith(name)}
        assert files == {f"{name}/adapter_config.json", f"{name}/adapter_model.safetensors"}
    assert len(host.peft_config) == 3
    with monkeypatch.context() as patch:
        patch.setattr(step, "train_member", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(made, data=data_folder, sft=policy_folder, model=again)
    kept = load_file(next((again.parent / "checkpoints").glob("reward-1-finished-*/*/tensors.safetensors")))
    assert kept and all("lora_" in name or ".score." in name for name in kept)  # the other weights are the SFT model's
    run(made, data=data_folder, sft=policy_folder, model=again)
    assert verify_manifest(again) == verify_manifest(folder)
