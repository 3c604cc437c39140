"""Progress of what happens beside the steps, on the main process: a bar, or, where bars are switched off as the command
does without a terminal, a line in the log every so often: share, rate and time left."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)
FIRST_LINE, LAST_PAUSE = 10.0, 30.0  # seconds: to the first line, and at most between two; the pauses double


@contextmanager
def progress_bar(args, title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yields ``advance(count)``. args: the TrainingArguments, whose disable_tqdm says which; None: nothing is shown."""
    if args is None or not args.should_save or not total:
        yield lambda count: None
        return
    if args.disable_tqdm:
        yield ProgressLines(title, total, unit).advance
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit=unit, unit_scale=total >= 100_000, leave=False) as bar:
        yield bar.update


class ProgressLines:
    """Lines in the log on ``total`` units of something, the first after ten seconds, within which many end."""

    def __init__(self, title: str, total: int, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self.title, self.total, self.unit, self.done, self._clock = title, total, unit, done, clock
        self._begun, self._first = clock(), done
        self._pause = FIRST_LINE
        self._next = self._begun + self._pause

    def advance(self, count: int) -> None:
        self.done += count
        now = self._clock()
        if now < self._next:
            return
        self._pause = min(2 * self._pause, LAST_PAUSE)
        self._next = now + self._pause
        rate = (self.done - self._first) / (now - self._begun)
        left = (self.total - self.done) / rate if rate else 0.0
        logger.info(
            "%s: %d of %d %ss (%.0f %%), %s, %s left", self.title, self.done, self.total, self.unit,
            100 * self.done / self.total, _rate(rate, self.unit), duration(left),
        )  # fmt: skip


def _rate(rate: float, unit: str) -> str:
    return f"{rate:.3g} {unit}s/s" if rate >= 1 or not rate else f"{1 / rate:.3g} s/{unit}"


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
