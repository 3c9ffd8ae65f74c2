"""A progress bar that needs nothing: tqdm's where tqdm is installed, else a counter line."""

import sys
from collections.abc import Iterator, Sized


class CounterLine:
    """The part of tqdm's interface that the benchmarks use."""

    def __init__(self, items: Sized) -> None:
        self.items = items
        self.done = 0

    def __iter__(self) -> Iterator:
        for item in self.items:
            yield item
            self.done += 1
        print(file=sys.stderr)

    def set_description(self, text: str) -> None:
        print(f"\r\x1b[K{self.done}/{len(self.items)} {text}", end="", file=sys.stderr, flush=True)


def progress(items: Sized):
    """Iterate over items with a bar on stderr; `set_description` names the current item."""
    try:
        from tqdm import tqdm
    except ImportError:
        return CounterLine(items)
    return tqdm(items)
