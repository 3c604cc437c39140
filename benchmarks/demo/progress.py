"""Progress of the demo: the phase at work, the time left of it and of the whole; in a log file a line every half
minute."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from var_kernels.integrations.trainer.progress import duration

LINE_EVERY = 30.0  # seconds, where there is no terminal


class Phases:
    """Named phases with the share of the run that each is expected to take; ``seconds`` holds what they took."""

    def __init__(self, console: Console, expected: dict[str, float], clock: Callable[[], float] = time.monotonic):
        self.expected, self.seconds, self.console, self._clock = expected, {}, console, clock
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            speed_estimate_period=600,
        )
        self._total = self._bar.add_task("All", total=sum(expected.values()))

    def __enter__(self) -> "Phases":
        self._begun = self._clock()
        self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.stop()

    @contextmanager
    def phase(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Yields ``advance``, to be called once per step."""
        began, share = self._clock(), self.expected[name]
        task = self._bar.add_task(name, total=steps)
        done, said = 0, began

        def advance() -> None:
            nonlocal done, said
            if done == steps:
                return
            done += 1
            self._bar.advance(task)
            self._bar.advance(self._total, share / steps)
            now = self._clock()
            if not self.console.is_terminal and now - said >= LINE_EVERY and done < steps:
                said = now
                self._line(name, done, steps, now - began)

        yield advance
        while done < steps:
            advance()
        self.seconds[name] = self._clock() - began
        self._bar.remove_task(task)
        self.console.print(f"  [green]✓[/green] {name} [dim]{self.seconds[name]:.1f} s[/dim]", highlight=False)

    def _line(self, name: str, done: int, steps: int, seconds: float) -> None:
        all_done = sum(self.expected[earlier] for earlier in self.seconds) + self.expected[name] * done / steps
        rest = (sum(self.expected.values()) - all_done) * (self._clock() - self._begun) / all_done
        left = (steps - done) * seconds / done
        text = f"  {name}: {done} of {steps}, {duration(left)} left; all {duration(rest)} left"
        self.console.print(text, highlight=False, soft_wrap=True)
