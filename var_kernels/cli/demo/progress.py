"""What the terminal shows while the demo runs: the phase at work, and the time left of the whole."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Phases:
    """Named phases with the share of the run that each is expected to take; ``seconds`` holds what they took."""

    def __init__(self, console: Console, expected: dict[str, float]):
        self.expected, self.seconds, self.console = expected, {}, console
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
        self._bar.start()
        return self

    def __exit__(self, *exc_info) -> None:
        self._bar.stop()

    @contextmanager
    def phase(self, name: str, steps: int = 1) -> Iterator[Callable[[], None]]:
        """Yields ``advance``, to be called once per step."""
        began, share = time.monotonic(), self.expected[name]
        task = self._bar.add_task(name, total=steps)
        done = 0

        def advance() -> None:
            nonlocal done
            if done < steps:
                done += 1
                self._bar.advance(task)
                self._bar.advance(self._total, share / steps)

        yield advance
        while done < steps:
            advance()
        self.seconds[name] = time.monotonic() - began
        self._bar.remove_task(task)
        self.console.print(f"  [green]✓[/green] {name} [dim]{self.seconds[name]:.1f} s[/dim]", highlight=False)
