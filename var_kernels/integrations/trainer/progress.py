"""Progress bars of what happens beside the steps: rate and time left, on the main process, unless switched off."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress_bar(args, title: str, total: int, unit: str) -> Iterator[Callable[[int], object]]:
    """Yields ``advance(count)``. args: the TrainingArguments, whose disable_tqdm counts; None: no bar."""
    if args is None or args.disable_tqdm or not args.should_save or not total:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit=unit, leave=False) as bar:
        yield bar.update
