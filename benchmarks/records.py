"""Results as JSON lines: a line per measured cell, written as soon as it is measured, so that a run can go on later.

A file holds one suite's results in one environment. Its lines are of two kinds:

    {"run": {"environment": {…}, "date": …, "command": …, "commit": …}}     the cells below come from this run
    {"cell": {…}, "contenders": {…}, …}                                     a cell's name and what was measured
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

QUIET = 0.03
"""Share of the CPUs that other processes may take of a measurement; an idle desktop takes about 1 %."""


class Records:
    """The results in `path`, none where there is no file. Of a cell that was measured twice the later one counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # What follows the last end of line was being written when a run was cut off.
        text = path.read_text() if path.exists() else ""
        self.entries: list[dict] = [json.loads(line) for line in text.split("\n")[:-1]]
        self.written = False

    @property
    def runs(self) -> list[dict]:
        return [entry["run"] for entry in self.entries if "run" in entry]

    @property
    def cells(self) -> dict[str, dict]:
        return {key(entry["cell"]): entry for entry in self.entries if "cell" in entry}

    @property
    def environment(self) -> dict:
        return self.runs[-1]["environment"] if self.runs else {}

    def start(self, environment: dict, occasion: dict[str, str]) -> list[str]:
        """Begin a run. What was measured in another environment no longer counts.

        Returns the names of what has changed in the environment. The file changes with the first `append`.
        """
        changed = [name for name in environment if self.runs and self.environment.get(name) != environment[name]]
        if changed:
            self.entries = []
        self.entries.append({"run": {"environment": environment, **occasion}})
        self.written = False
        return changed

    def append(self, record: dict) -> None:
        self.entries.append(record)
        if self.written:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".part")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in self.entries))
        partial.rename(self.path)
        self.written = True


def key(cell: dict) -> str:
    return json.dumps(cell, sort_keys=True)


def is_disturbed(record: dict) -> bool:
    """Whether other processes took a noticeable part of the CPUs meanwhile."""
    return (record.get("other_load") or 0.0) > QUIET
