"""Percentiles of token lengths."""

from components.validate.lengths import summary


def test_percentiles_are_the_smallest_length_that_covers_their_share() -> None:
    # 1..100: 50 rows have up to 50 tokens, 95 up to 95; 10 of 100 are longer than 90.
    lengths = summary("prompts", list(range(100, 0, -1)), max_length=90)
    assert (lengths.p50, lengths.p95, lengths.p99, lengths.longest) == (50, 95, 99, 100)
    assert lengths.truncated == 0.1


def test_one_length_is_every_percentile() -> None:
    lengths = summary("prompts", [7], max_length=7)
    assert (lengths.p50, lengths.p95, lengths.p99, lengths.longest, lengths.truncated) == (7, 7, 7, 7, 0.0)
