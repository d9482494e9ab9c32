"""Steps of a long export: what an interrupted one has finished, the next one of the same things takes over."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeforge.bundle import file_hash, put, writable
from edgeforge.errors import InvalidInput, Unsupported

#: ``step(name, make, *paths)``: what ``make`` returns (JSON), having written the files and folders ``paths``.
Step = Callable[..., Any]


def at_once(name: str, make: Callable[[], Any], *paths: str) -> Any:
    """A step that leaves nothing for later."""
    return make()


@dataclass(frozen=True)
class Steps:
    """``folder``: the bundle in the making. ``done``: a record per finished step, written when its files are complete:
    what it returned, and their hashes (a step whose files are not those any more is made again)."""

    folder: Path
    done: Path
    say: Callable[[str], None]

    def __call__(self, name: str, make: Callable[[], Any], *paths: str) -> Any:
        record = self.done / f"{name}.json"
        if record.is_file():
            kept = json.loads(record.read_text())
            if kept["files"] == self.hashes(paths):
                self.say(f"{name}: taken over from an interrupted export")
                return kept["made"]
        for path in paths:
            _remove(self.folder / path)
        text = json.dumps({"made": make(), "files": self.hashes(paths)})
        unfinished = record.with_suffix(".part")
        unfinished.write_text(text)
        unfinished.replace(record)
        return json.loads(text)["made"]

    def hashes(self, paths: tuple[str, ...]) -> dict[str, str]:
        """sha256 of every file that lies there now."""
        places = [self.folder / path for path in paths]
        files = [file for place in places for file in (place, *sorted(place.rglob("*"))) if file.is_file()]
        return {file.relative_to(self.folder).as_posix(): file_hash(file) for file in files}


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


@contextmanager
def resumable(out: Path, key: str, say: Callable[[str], None]) -> Iterator[Steps]:
    """Steps whose folder becomes ``out`` when the block ends well. After any other end but a refusal of the input they
    stay beside ``out``, for an export with the same ``key``; one with another key removes them."""
    writable(out)
    place = out.parent / f".{out.name}.{key[:16]}.part"
    for other in out.parent.glob(f".{out.name}.*.part"):
        if other != place:
            shutil.rmtree(other)
    steps = Steps(place / "bundle", place / "done", say)
    for folder in (steps.folder, steps.done):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield steps
        put(steps.folder, out)
    except (InvalidInput, Unsupported):
        shutil.rmtree(place)
        raise
    except KeyboardInterrupt:
        say(f"what is finished lies in {place}: the same export goes on from there")
        raise
    shutil.rmtree(place)
