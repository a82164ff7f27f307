"""What was measured, row by row on disk, so that a run can go on; rows of other files or other prompts than now are left out."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .limits import Limits
from .paired import readings

Row = dict[str, Any]


def fingerprint(names: Sequence[str]) -> str:
    """Names, sizes and times of files and of what lies in folders, as a short hash."""
    found = [file for path in map(Path, names) for file in ([path] if path.is_file() else sorted(path.rglob("*")))]
    facts = [(str(file), (held := file.stat()).st_size, held.st_mtime_ns) for file in found if file.is_file()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


class Journal:
    """Rows as they are measured, one JSON line each (`--resume`). `origin` goes into each row; `notes`: what is to be said.

    `scenario`: the identity of the prompts that are measured now (scenario.py), once it is known. Rows of others do not count.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], resume: bool, origin: Mapping[str, Any] | None = None) -> None:
        self.path, self.settings = path, json.dumps(settings, sort_keys=True)
        self.origin = {"piece": _now(), **(origin or {})}
        self.scenario: str | None = None
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._torn = False
        path.parent.mkdir(parents=True, exist_ok=True)
        if resume and path.is_file():
            text = path.read_text(errors="replace")
            self._torn = bool(text) and not text.endswith("\n")
            self.rows = [row for row in self._read(text) if row["settings"] == self.settings]
        if not resume:
            path.write_text("")

    def _read(self, text: str) -> list[Row]:
        found = []
        for number, line in enumerate(text.splitlines(), 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not {"settings", "round", "key"} <= row.keys():
                    raise ValueError(line)
                found.append(row)
            except ValueError:
                self.notes.append(f"line {number} of {self.path} is no whole row (an interrupted run?) and is left out.")
        return found

    def has(self, number: int, key: str) -> bool:
        """Whether that contender is done in that round, with the files and the prompts that it has now."""
        rows = self.of(key)
        now = not rows or "measured" not in rows[-1] or fingerprint(rows[-1]["measured"]) == rows[-1]["artefact"]
        return now and any(row["round"] == number for row in rows)

    def add(self, number: int, key: str, row: Row) -> None:
        """Keeps a row, on disk at once."""
        kept = {**row, **self.origin, "at": _now(), "round": number, "key": key, "settings": self.settings}
        if self.scenario is not None:
            kept["scenario"] = self.scenario
        self.rows.append(kept)
        with self.path.open("a") as stream:
            stream.write("\n" * self._torn + json.dumps(kept) + "\n")  # a torn line stays a line of its own
        self._torn = False

    def of(self, key: str) -> list[Row]:
        """The rows of a contender that measured something, in order; of one measured with other files since, the newest."""
        found = [row for row in self.rows if row["key"] == key and "error" not in row and not self._other(row)]
        return [row for row in found if row.get("artefact") == found[-1].get("artefact")]

    def others(self) -> int:
        """How many rows are of other prompts than now."""
        return sum(map(self._other, self.rows))

    def _other(self, row: Row) -> bool:
        return self.scenario is not None and row.get("scenario", self.scenario) != self.scenario

    def errors(self) -> dict[str, str]:
        """Contenders whose last try failed → why."""
        last = {row["key"]: row.get("error") for row in self.rows}
        return {key: error for key, error in last.items() if error is not None}

    def limits(self) -> list[Limits]:
        """The machine's limits, as often as they were read: beside each process, and in older journals once a round."""
        rounds = [Limits(row["read"], row["int8"], row["fp32"], row.get("bf16", 0.0)) for row in self.of("limits")]
        return rounds + [each for row in self.rows for each in readings(row)]

    def expected_s(self, key: str) -> float | None:
        """How long a process of that contender took at most, if it ever ran."""
        return max((row["wall_s"] for row in self.rows if row["key"] == key and "wall_s" in row), default=None)
