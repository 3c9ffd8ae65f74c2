"""Results as JSON lines: a line per measured cell, written as soon as it is measured, so that a run can be resumed.

A file holds one suite's results in one environment. Its lines are of two kinds:

    {"run": {"environment": {…}, "date": …, "command": …, "commit": …}}     the cells below come from this run
    {"cell": {…}, "contenders": {…}, …}                                     a cell's name and what was measured
"""

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

QUIET = 0.03
"""Share of the CPUs' time that other processes may use during a measurement; on an idle desktop about 1 %."""


class Records:
    """The results in `path`, none if there is no file. If a cell was measured twice, the later measurement counts."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Text after the last newline is a line that an interrupted run did not finish.
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
        """Begin a run. Results of another environment no longer count.

        Returns the names of the facts that differ from those of the last run. The file changes with the first `append`.
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
    """Whether other processes used a noticeable share of the CPUs during the measurement."""
    return (record.get("other_load") or 0.0) > QUIET
