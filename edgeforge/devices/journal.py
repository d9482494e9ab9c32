"""What a hosted run has begun, on disk before it is begun: a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeforge.errors import InvalidInput

NAME = ".hub-journal"


@dataclass
class Journal:
    """plan: what was asked for (a run with another plan is not this run). tasks: "device | artifact" -> the device as
    the hub names it, and what became of it. ids: kind ("model", "dataset", "job") -> our name -> the hub's id."""

    path: Path
    run_id: str
    created: str
    plan: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    ids: dict[str, dict[str, str]] = field(default_factory=lambda: {"model": {}, "dataset": {}, "job": {}})

    @classmethod
    def read(cls, folder: Path) -> Journal | None:
        """The journal of an unfinished run, or None. Raises InvalidInput when it cannot be read."""
        path = folder / NAME
        if not path.exists():
            return None
        try:
            return cls(path=path, **json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise InvalidInput(f"{path} is damaged: {error} -> delete it to begin anew") from None

    def write(self) -> None:
        """Whole or not at all, and on the disk when this returns."""
        self.path.parent.mkdir(exist_ok=True)
        part = self.path.with_name(f"{NAME}.part")
        kept = {key: getattr(self, key) for key in ("run_id", "created", "plan", "tasks", "ids")}
        with part.open("w") as stream:
            json.dump(kept, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(self.path)

    def note(self, kind: str, name: str, id: str) -> None:
        self.ids[kind][name] = id
        self.write()

    def close(self, task: str, state: str, reason: str = "") -> None:
        self.tasks[task] |= {"state": state, "reason": reason}
        self.write()
