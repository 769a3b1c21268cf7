"""Files and overrides to settings: precedence, and messages that say what to do."""

from pathlib import Path

import pytest

from components.errors import InputError
from pipeline.overrides import CONFIGS, resolve
from pipeline.settings import Settings


@pytest.fixture
def config(tmp_path: Path):
    def write(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(files: list[Path], *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        resolve(files, overrides)
    return str(caught.value)


def test_later_files_win_over_earlier_ones_and_overrides_over_both(config) -> None:
    first = config("sft: {training: {epochs: 2, batch_tokens: 64}}\nrl: {rollouts: 5}", "a.yaml")
    second = config("sft: {training: {epochs: 3}}", "b.yaml")
    settings = resolve([first, second], ["rl.rollouts=7"])
    assert (settings.sft.training.epochs, settings.sft.training.batch_tokens, settings.rl.rollouts) == (3, 64, 7)


def test_a_value_left_out_keeps_the_default_of_the_place_it_is_left_out_of(config) -> None:
    settings = resolve([config("cost: {training: {epochs: 1}}\nrl: {optimizer: {eps: 1e-6}}")])
    assert settings.cost.kind == "cost"
    assert settings.cost.training.optimizer == Settings().cost.training.optimizer
    assert settings.rl.optimizer.lr == Settings().rl.optimizer.lr


def test_numbers_without_a_point_before_their_exponent_are_numbers(config) -> None:
    file = config("rl: {critic_optimizer: {lr: 3e-4}}")
    rl = resolve([file], ["rl.optimizer.lr=1e-5", "rl.algorithm.kl_coef=2E-2"]).rl
    assert (rl.critic_optimizer.lr, rl.optimizer.lr, rl.algorithm.kl_coef) == (3e-4, 1e-5, 0.02)


def test_lists_are_replaced_whole(config) -> None:
    first = config("preprocess: {preferences: [a.jsonl, b.jsonl]}")
    settings = resolve([first], ["preprocess.preferences=[c.jsonl]"])
    assert [source.path for source in settings.preprocess.preferences] == ["c.jsonl"]


def test_names_that_a_person_chooses_are_merged_and_null_takes_one_out(config) -> None:
    path = config("evaluate: {thresholds: {a: {min: 1}, b: {max: 2}}}")
    thresholds = resolve([path], ["evaluate.thresholds.a=null", "evaluate.thresholds.b.at=high"]).evaluate.thresholds
    assert {name: (bound.max, bound.at) for name, bound in thresholds.items()} == {"b": (2, "high")}


def test_the_common_seed_reaches_every_step_that_states_none(config) -> None:
    settings = resolve([config("seed: 7\ndemo: {}\nsft: {seed: 1}")], ["cost.seed=2"])
    seeds = {task: settings.step(task).seed for task in settings.tasks()}
    assert (seeds.pop("sft"), seeds.pop("cost")) == (1, 2)
    assert set(seeds.values()) == {7}
    assert "demo" in seeds


def test_another_algorithm_drops_what_only_the_former_one_of_a_file_knows(config) -> None:
    lag = config("rl: {algorithm: {name: ppo_lag, cost_limit: 0.5, kl_coef: 0.3}}")
    algorithm = resolve([lag], ["rl.algorithm.name=ppo"]).rl.algorithm
    assert (algorithm.name, algorithm.kl_coef) == ("ppo", 0.3)
    overlay = config("rl: {algorithm: {name: ppo}}", "ppo.yaml")
    assert resolve([lag, overlay]).rl.algorithm == algorithm


def test_a_key_of_the_former_algorithm_is_an_error_where_the_new_one_is_named(config) -> None:
    message = complaint([], "rl.algorithm.name=ppo", "rl.algorithm.cost_limit=1")
    assert message.startswith("rl.algorithm.cost_limit is unknown; it belongs to another choice of name")
    assert "cost_limit is unknown" in complaint([config("rl: {algorithm: {name: ppo, cost_limit: 1}}")])


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("rl.algorithm.kl_coeff=1", ["rl.algorithm.kl_coeff is unknown", "did you mean rl.algorithm.kl_coef?"]),
        ("rl.kl_coef=1", ["rl.kl_coef is unknown", "did you mean rl.algorithm.kl_coef?"]),
        ("sftt.seed=1", ["sftt is unknown", "did you mean sft?"]),
        ("sft.training.epochs=many", ["sft.training.epochs is 'many'", "a valid integer"]),
        ("sft.training.epochs=0", ["sft.training.epochs is 0", "greater than or equal to 1"]),
        ("sft.training.optimizer.betas=[1,x]", ["sft.training.optimizer.betas.1 is 'x'", "a valid number"]),
        ("sft.training.optimizer.schedule=cosin", ["'cosin'", "'cosine', 'linear' or 'constant'"]),
        ("rl.algorithm.name=grpo2", ["rl.algorithm.name is 'grpo2'", "'ppo', 'ppo_lag'"]),
        ("rl.algorithm=ppo", ["rl.algorithm is 'ppo'", "rl.algorithm.name"]),
        ("preprocess.preferences=[{path: 3}]", ["preprocess.preferences.0.path is 3", "a valid string"]),
        ("evaluate.thresholds={a/b: {minn: 1}}", ["evaluate.thresholds.a/b.minn is unknown", "thresholds.a/b.min?"]),
        ("evaluate.thresholds={a/b: {min: x}}", ["evaluate.thresholds.a/b.min is 'x'"]),
        ("cost.kind=reward", ["cost.kind is 'reward'"]),
        ("sft.training.epochs=[1", ["sft.training.epochs is '[1'", "not YAML"]),
        ("sft.training", ["'sft.training' is not an override", "key=value"]),
        ("demo.yaml", ["'demo.yaml' is not an override", "-c demo.yaml"]),
    ],
)  # fmt: skip
def test_a_wrong_override_is_named_with_its_value_and_what_is_accepted(override: str, parts: list[str]) -> None:
    message = complaint([], override)
    for part in parts:
        assert part in message


def test_every_mistake_is_told_at_once_with_the_place_it_was_made(config) -> None:
    path = config("sft: {training: {epochs: 0}}")
    lines = complaint([path], "rl.rollouts=none").splitlines()
    assert lines[0].endswith(f"(set in {path})")
    assert lines[1].startswith("rl.rollouts is 'none'")
    assert lines[1].endswith("(set on the command line)")


def test_a_missing_file_is_named_with_the_configurations_there_are() -> None:
    message = complaint([Path("nowhere.yaml")])
    assert message.startswith("nowhere.yaml: no such configuration file")
    named = message.rpartition(": ")[2].removesuffix(".").split(", ")
    assert named == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"default", "demo", "hh", "ppo", "ppo_lag"} <= set(named)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("sft: {epochs: [}", "not YAML at line 1, column 16"),
        ("- a\n- b", "accepted: a mapping"),
        ("rl: {rollouts: 1}\nrl: {epochs: 2}", "line 2, column 1: key 'rl' is there twice"),
        ("images: {train: {{image}}}", "line 1, column 18: a key is a list or a mapping"),
    ],
)
def test_a_malformed_file_is_named_with_the_line(config, text: str, part: str) -> None:
    path = config(text)
    message = complaint([path])
    assert message.startswith(str(path))
    assert part in message


def test_a_packaged_configuration_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # a folder of that name is no configuration
    assert resolve([Path("demo")]).demo is not None
    assert resolve([Path("default")]).demo is None
