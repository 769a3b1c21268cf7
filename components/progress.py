"""Progress of long work, as lines that a person can read in a log and `plumbline run` turns into a bar."""

import time

from components.ranks import is_first

INTERVAL_S = 2.0


class Progress:
    """Counts to `total` and prints `progress <label> <done>/<total> key=value ...`, every two seconds at most.

    Of several processes the first prints.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total, self.done = label, total, 0
        self._printed_at = 0.0

    def advance(self, n: int = 1, **values: float) -> None:
        """Count `n` more and, when it is time, print the count and the values."""
        self.done += n
        now = time.monotonic()
        if is_first() and (now - self._printed_at >= INTERVAL_S or self.done >= self.total):
            self._printed_at = now
            shown = "".join(f" {name}={value:.4g}" for name, value in values.items())
            print(f"progress {self.label} {self.done}/{self.total}{shown}", flush=True)
