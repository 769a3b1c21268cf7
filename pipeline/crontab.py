"""When a schedule runs: cron's fields as Kubeflow reads them, or a period.

Kubeflow's cron has a field for seconds in front. It also accepts five fields and takes them for seconds to months:
`0 3 * * 1`, meant as Mondays at three, would be January. Five fields are therefore given the seconds here.
"""

import re

from kfp_server_api import V2beta1CronSchedule, V2beta1PeriodicSchedule, V2beta1Trigger

from components.errors import InputError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
FIELDS = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, DAYS),
)
"""The six fields: name, lowest and highest value, names for values. Sunday is 0 and not 7."""
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
EXAMPLE = (
    "accepted: five fields (minute, hour, day of the month, month, day of the week), or six with seconds first, as in "
    '"0 3 * * 1"'
)


def trigger(cron: str | None, every: str | None) -> V2beta1Trigger:
    """What sets off the runs of a schedule. Raises InputError unless exactly one of both is given, and in form."""
    if (cron is None) == (every is None):
        raise InputError('give --cron or --every, and not both: --cron "0 3 * * 1", or --every 6h.')
    if cron is not None:
        return V2beta1Trigger(cron_schedule=V2beta1CronSchedule(cron=six_fields(cron)))
    return V2beta1Trigger(periodic_schedule=V2beta1PeriodicSchedule(interval_second=str(period(str(every)))))


def shown(found: V2beta1Trigger | None) -> str:
    """When a trigger sets off, for people; empty where nothing is known of it."""
    if found is None:
        return ""
    if found.cron_schedule is not None:
        return str(found.cron_schedule.cron)
    if found.periodic_schedule is None:
        return ""
    seconds = int(found.periodic_schedule.interval_second)
    unit = next(unit for unit in reversed(SECONDS) if seconds % SECONDS[unit] == 0)
    return f"every {seconds // SECONDS[unit]}{unit}"


def six_fields(cron: str) -> str:
    """Cron's fields as Kubeflow wants them, seconds first. Raises InputError naming the field that is wrong."""
    parts = cron.split()
    if len(parts) == 5:
        parts.insert(0, "0")
    if len(parts) != 6:
        raise InputError(f"--cron is {cron!r}, {len(parts)} fields; {EXAMPLE}.")
    for part, (name, low, high, names) in zip(parts, FIELDS, strict=True):
        for item in part.split(","):
            if not _is_item(item, low, high, names):
                words = f" or {names[0]} to {names[-1]}" if names else ""
                raise InputError(
                    f"--cron is {cron!r}: the {name} is {item!r}; accepted: {low} to {high}{words}, *, ?, ranges (1-5) "
                    "and steps (*/2)."
                )
    return " ".join(parts)


def period(text: str) -> int:
    """Seconds of a period such as 90s, 30m, 6h, 2d or 1w. Raises InputError for anything else."""
    match = re.fullmatch(r"([1-9][0-9]*)([smhdw])", text)
    if match is None:
        raise InputError(f"--every is {text!r}; accepted: a whole number and its unit, as in 30m, 6h, 2d or 1w.")
    return int(match[1]) * SECONDS[match[2]]


def _is_item(item: str, low: int, high: int, names: tuple[str, ...]) -> bool:
    """Whether this is one item of a cron field: *, a value or a range, with or without a step."""
    span, slash, step = item.partition("/")
    if slash and not (step.isascii() and step.isdigit() and int(step) > 0):
        return False
    if span in ("*", "?"):
        return True
    values = [_value(word, names) for word in span.split("-")]
    return len(values) <= 2 and all(low <= value <= high for value in values) and values == sorted(values)


def _value(word: str, names: tuple[str, ...]) -> int:
    """A number, or the number that a name stands for; -1 for neither."""
    if word.lower() in names:
        return names.index(word.lower()) + (1 if names is MONTHS else 0)
    return int(word) if word.isascii() and word.isdigit() else -1
