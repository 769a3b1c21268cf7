"""The report of rl: its numbers, its alerts and its pictures, on one page that asks for nothing from elsewhere."""

import base64
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from components.artifacts import Metrics
from components.monitoring import Alert
from components.pages import number
from components.phases import PHASES
from components.rl.curves import CURVES, Curve
from components.rl.profile import COLOURS, WHAT, phase_totals
from components.rl.report import write_report

ALERTS = [Alert("kl_runaway", 12, "The KL is 31 & rising."), Alert("lambda_dead", 18, "Lambda is 0.002.")]
SCATTER = {"first": [(-1.0, 0.5), (0.0, 1.5)], "last": [(1.0, -1.0), (2.0, -2.0), (3.0, -3.0)]}
COST_METRICS = {"cost/window_mean", "cost/window_low", "cost/window_high", "cost/limit", "cost/lambda"}


def settings(name: str = "ppo_lag", **algorithm: Any) -> dict[str, Any]:
    bound = {"lambda_max": 5.0} if name == "ppo_lag" else {}
    return {"seed": 7, "algorithm": {"name": name, **bound, **algorithm}, "rollouts": 20}


def history(length: int = 20, names: set[str] | None = None) -> list[tuple[int, Metrics]]:
    """Plausible numbers of a PPO-Lag run, or those of them that are named."""
    rows = []
    for n in range(1, length + 1):
        row = {
            "rollout/score": n / 10,
            "rollout/kl_k1": 0.1 * n,
            "rollout/kl_k3": 0.11 * n,
            "rollout/cost": 0.5 - n / 10,
            "rollout/unsafe": 1 / n,
            "policy/entropy": 1 / n,
            "policy/first_ratio_gap": 1e-6,
            "loss/policy": 0.01 * math.sin(n),
            "loss/skipped_updates": float(n > 9),
            "data/samples": 128.0 * n,
            "data/tokens": 1500.0 * n,
            "perf/seconds": 30.0,
            "cost/window_mean": 0.5 - n / 10,
            "cost/window_low": 0.4 - n / 10,
            "cost/window_high": 0.6 - n / 10,
            "cost/limit": 0.0,
            "cost/lambda": 1 + n / 20,
        }
        rows.append((n, {name: value for name, value in row.items() if names is None or name in names}))
    return rows


@pytest.fixture
def written(tmp_path: Path) -> Any:
    """Writes a report and gives its text."""

    def write(*arguments: Any) -> str:
        path = tmp_path / "report" / "report.html"
        write_report(path, *arguments)
        return path.read_text("utf-8")

    return write


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run with all there is."""
    path = tmp_path_factory.mktemp("full") / "report.html"
    write_report(path, settings(), history(), SCATTER, ALERTS)
    return path.read_text("utf-8")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of the same run without alerts and single responses."""
    path = tmp_path_factory.mktemp("bare") / "report.html"
    write_report(path, settings(), history(), None, [])
    return path.read_text("utf-8")


def plain(page: str) -> str:
    """The page's words, without tags, pictures and style."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def captions(page: str) -> list[str]:
    return re.findall(r"<figcaption>(.*?)</figcaption>", page)


def caption(page: str, start: str) -> str:
    (found,) = [text for text in captions(page) if text.startswith(start)]
    return found


def pictures(page: str) -> list[str]:
    """The SVG of every picture."""
    return [base64.b64decode(found).decode() for found in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)"', page)]


def test_the_headline_has_algorithm_amounts_and_final_numbers(bare: str) -> None:
    words = plain(bare)
    for part in (
        "Reinforcement learning: ppo_lag no alerts",
        "Rollouts 20",
        "Samples 2,560",
        "Tokens 30,000",
        "Minutes 10.0",  # 20 rollouts of 30 s
        "Skipped updates 1",
        "Score 1.950",  # the mean of the last two, 1.9 and 2.0
        "Cost -1.450",
        "KL, nats per response 2.145",
        "Seed 7",
    ):
        assert part in words


def test_the_table_has_every_metric_at_the_start_at_the_end_and_at_its_extremes(bare: str) -> None:
    row = re.search(r"<tr><td>rollout/score</td>(.*?)</tr>", bare)
    assert row and re.findall(r">([^<]+)</td>", row[1]) == ["0.150", "1.950", "0.100", "2.000"]
    assert {name for _, metrics in history() for name in metrics} <= set(re.findall(r"<tr><td>([^<]+)</td>", bare))


PROFILE = [
    (1, {
        "perf/decode_s": 2.0, "perf/decode_tokens_per_s": 500.0, "perf/decode_peak_mb": 700.0,
        "perf/update_s": 5.0, "perf/update_tokens_per_s": 2000.0, "perf/update_peak_mb": 900.0,
        "perf/other_s": 1.0, "perf/seconds": 8.0,
    }),
    (2, {
        "perf/decode_s": 3.0, "perf/decode_tokens_per_s": 1000.0, "perf/decode_peak_mb": 650.0,
        "perf/checkpoint_s": 4.0,
        "perf/other_s": 5.0, "perf/seconds": 12.0,
    }),
]  # fmt: skip


def test_the_profile_has_seconds_shares_rates_and_peaks_of_all_rollouts(written: Any) -> None:
    totals = {total.phase: total for total in phase_totals(PROFILE)}
    assert list(totals) == ["decode", "update", "checkpoint", "other"]
    assert [total.seconds for total in totals.values()] == [5, 5, 4, 6]
    assert [total.share for total in totals.values()] == [0.25, 0.25, 0.2, 0.3]
    assert [total.tokens_per_s for total in totals.values()] == [(1000 + 3000) / 5, 2000, None, None]
    assert [total.peak_mb for total in totals.values()] == [700, 900, None, None]
    page = written(settings(), PROFILE, None, [])
    rows = [re.findall(r">([^<]+)</td>", row) for row in re.findall(r"<tr><td>\w+</td>.*?</tr>", page)][:4]
    assert [[row[0], *row[2:]] for row in rows] == [
        ["decode", "5.000", "25.0 %", "800", "700.0"], ["update", "5.000", "25.0 %", "2,000", "900.0"],
        ["checkpoint", "4.000", "20.0 %", "–", "–"], ["other", "6.000", "30.0 %", "–", "–"],
    ]  # fmt: skip
    assert [row[1] for row in rows] == [WHAT["decode"], WHAT["update"], WHAT["checkpoint"], WHAT["other"]]
    assert caption(page, "Seconds of each rollout") == (
        "Seconds of each rollout by phase; in all decode 5, update 5, checkpoint 4, other 6"
    )
    (picture,) = pictures(page)
    assert [COLOURS[name] in picture for name in ("decode", "update", "checkpoint", "read")] == [True] * 3 + [False]  # type: ignore[index]
    assert "another process" not in page


def test_what_another_process_did_meanwhile_is_said_to_reach_beyond_the_rollouts(written: Any) -> None:
    beside = [(number, row | {"perf/score_s": 4.0}) for number, row in PROFILE]
    assert "another process was at work" in written(settings(), beside, None, [])


def test_every_phase_is_explained_and_has_a_colour_of_its_own() -> None:
    assert tuple(WHAT) == tuple(COLOURS) == PHASES
    assert len(set(COLOURS.values())) == len(PHASES)


def test_a_run_whose_phases_nobody_measured_has_no_profile(bare: str) -> None:
    assert "Where the time went" not in bare


def test_alerts_are_told_with_their_rollout_and_text(full: str, bare: str, written: Any) -> None:
    words = plain(full)
    assert "ppo_lag 2 alerts" in words
    assert "12 kl runaway The KL is 31 &amp; rising." in words and "18 lambda dead Lambda is 0.002." in words
    assert "ppo_lag 1 alert Numbers" in plain(written(settings(), [], None, ALERTS[:1]))
    assert "ppo_lag no alerts" in plain(bare) and "Nothing to report." in plain(bare)


def test_alerts_are_marked_in_the_pictures(written: Any) -> None:
    rows = history(names={"policy/entropy", "cost/window_mean", "cost/lambda"})
    without, marked = (pictures(written(settings(), rows, None, alerts)) for alerts in ([], ALERTS))
    assert len(marked) == len(without) == 3
    uses = [after.count("<use") - before.count("<use") for before, after in zip(without, marked, strict=True)]
    assert uses == [2, 2, 2]  # a triangle for each of the two rollouts


def test_under_a_constraint_the_page_shows_the_band_the_limit_lambda_and_the_scatter(full: str) -> None:
    page = full
    assert caption(page, "Mean cost J_C with its 95 % confidence band").endswith(
        "J_C from 0.4 to -1.5, between -1.5 and 0.4, limit 0"
    )
    assert "lambda from 1.05 to 2" in caption(page, "Lambda")
    means = caption(page, "Single responses")
    assert "first reward -0.5, cost 1" in means and "last reward 2, cost -2" in means
    assert "FillBetween" in pictures(page)[0]
    assert 'class="wide"' in page


@pytest.mark.parametrize("absent", ["cost/window_low", "cost/limit"])
def test_a_run_that_logged_no_band_or_no_limit_has_a_page_all_the_same(absent: str, written: Any) -> None:
    page = written(settings(), history(names=COST_METRICS - {absent}), None, [])
    assert ("limit" in caption(page, "Mean cost")) == (absent != "cost/limit")
    assert ("FillBetween" in pictures(page)[0]) == (absent == "cost/limit")
    assert ("band" in caption(page, "Mean cost")) == (absent == "cost/limit")


def test_without_a_constraint_there_is_no_cost_on_the_page(written: Any) -> None:
    page = written(settings("dpo"), history(names={"loss/policy", "policy/entropy"}), None, [])
    assert len(captions(page)) == len(pictures(page)) == 2
    assert "Cost" not in plain(page) and "Samples" not in plain(page) and "J_C" not in page


@pytest.mark.parametrize("curve", CURVES, ids=lambda curve: curve.title)
def test_every_panel_is_drawn_from_its_metrics_alone(curve: Curve, written: Any) -> None:
    rows = [(n, dict.fromkeys(curve.metrics, float(n))) for n in (1, 2)]
    (found,) = captions(written(settings("grpo"), rows, None, []))
    assert found.startswith(curve.title)
    assert found.count("from 1 to 2") == len(curve.metrics)


def test_what_is_no_number_is_left_out_of_lines_and_means(written: Any) -> None:
    rows = history(10, {"policy/entropy"})
    rows[3][1]["policy/entropy"] = math.nan
    rows[4][1]["policy/entropy"] = math.inf
    page = written(settings("grpo"), [*rows, (11, {"loss/value": math.nan})], None, [])
    assert "between 0.1 and 1" in caption(page, "Entropy")
    assert len(captions(page)) == 1
    assert not re.search(r"\b(nan|inf)\b", plain(page))


def test_texts_are_escaped(written: Any) -> None:
    evil = "<script>alert('x')</script>"
    page = written(settings(evil, note=evil), history(3), None, [Alert(evil, 1, evil)])
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4


def test_the_page_asks_for_nothing_from_elsewhere(full: str) -> None:
    page = full
    assert not re.findall(r"https?://|url\(|@import|<link|<script", page)
    assert all(source.startswith("data:image/svg+xml;base64,") for source in re.findall(r'src="([^"]*)"', page))


class _Outline(HTMLParser):
    """Whether tags are balanced, and what each picture says instead of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str | None] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag == "img":
            self.texts.append(dict(attrs).get("alt"))
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_says_in_words_what_pictures_show(full: str) -> None:
    outline, page = _Outline(), full
    outline.feed(page)
    assert outline.open == []
    assert ("html", {"lang": "en"}) in outline.seen
    assert len(outline.texts) == len(captions(page)) == len(pictures(page)) == 9
    assert all(text and re.search(r"\d", text) for text in outline.texts)
    headers = [attributes for tag, attributes in outline.seen if tag == "th"]
    assert headers and all(attributes.get("scope") == "col" for attributes in headers)
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_same_arguments_give_the_same_page(full: str, written: Any) -> None:
    assert written(settings(), history(), SCATTER, ALERTS) == full
    assert written(settings(), history(19), SCATTER, ALERTS) != full


def test_settings_are_on_the_page_under_dotted_keys(written: Any) -> None:
    assert "algorithm.lambda_max 5.0" in plain(written(settings(), [], None, []))


def test_a_run_without_a_rollout_or_with_one_has_a_page(written: Any) -> None:
    assert "No rollouts." in plain(written(settings(), [], None, []))
    words = plain(written(settings(), history(1), None, []))
    assert "last rollout." in words and "means over one rollout" in words


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.000"), (0.12345, "0.123"), (-2.5, "-2.500"), (0.0001, "1.0e-04"), (1234.56, "1234.6"), (None, "–"),
        (math.nan, "–"),
    ],
)  # fmt: skip
def test_numbers_read_as_a_reader_wants_them(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_constrained_share_is_not_called_a_cost(written: Any) -> None:
    page = written(settings(constrain="unsafe"), history(), SCATTER, [])
    assert caption(page, "Share of unsafe responses J_C with its 95 % confidence band").endswith("limit 0")
    assert "Mean cost J_C" not in page
