"""Where results are kept: beside the bundle they belong to (``results/``), and in one database over all bundles."""

from __future__ import annotations

import csv
import io
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edgeforge.bundle import MANIFEST, Bundle, file_hash, load_bundle
from edgeforge.devices.result import DEVICES, DeviceResult, parse_result, read_result
from edgeforge.errors import InvalidInput

RESULTS = "results"
COLUMNS = (
    "model", "target", "precision", "artifact", "device", "soc", "source", "latency_ms", "p90_ms", "peak_memory_mb",
    "golden", "flags", "created", "run_id",
)  # fmt: skip
_TABLES = """
create table if not exists bundles (sha256 text primary key, path text, model text, target text, precision text);
create table if not exists results (bundle_sha256 text, run_id text, artifact text, source text, device text, soc text,
  created text, latency_ms real, p90_ms real, peak_memory_mb real, golden text, flags text, document text,
  primary key (bundle_sha256, run_id, artifact));
pragma user_version = 1;
"""


def default_database() -> Path:
    """``EDGEFORGE_RESULTS``, or a file in the user's data folder."""
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return Path(os.environ.get("EDGEFORGE_RESULTS") or home / "edgeforge" / "results.sqlite")


def bundle_hash(path: Path) -> str:
    """What identifies a bundle: the sha256 of its manifest, which holds the hashes of all other files."""
    return file_hash(path / MANIFEST)


def read_results(bundle: Path) -> list[DeviceResult]:
    """The results beside a bundle, oldest first; those of an earlier bundle in this place are left out."""
    expected = bundle_hash(bundle)
    found = [read_result(file) for file in sorted((bundle / RESULTS).glob("*.json"))]
    return sorted((r for r in found if r.bundle_sha256 == expected), key=lambda r: (r.created, r.run_id, r.label))


class Store:
    """The database. One connection per use, so that processes take turns."""

    def __init__(self, path: Path | None = None):
        self.path = path or default_database()

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            connection = sqlite3.connect(self.path, timeout=30)
            try:
                with connection:
                    connection.executescript(_TABLES)
                    yield connection
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise InvalidInput(
                f"results database {self.path}: {error} -> name another with EDGEFORGE_RESULTS"
            ) from None

    def add(self, result: DeviceResult, bundle: Bundle) -> bool:
        """Keep ``result`` beside ``bundle`` and in the database; False when both hold it already.

        Raises InvalidInput when it belongs to another bundle, names an artifact that the bundle lacks, or has the
        name of a different result."""
        expected = bundle_hash(bundle.path)
        if result.bundle_sha256 != expected:
            raise InvalidInput(
                f"the result is of bundle {result.bundle_sha256[:16]}, {bundle.path} is {expected[:16]}"
                " -> name the bundle that was run, unchanged"
            )
        if result.part not in [part.part for part in bundle.parts]:
            raise InvalidInput(f"{bundle.path} has no part {result.part!r} -> name the bundle that was run")
        record = bundle.manifest.backends.get(result.artifact)
        if record is None or record.status != "built":
            raise InvalidInput(f"{bundle.path} has no artifact {result.artifact!r} -> name the bundle that was run")
        fresh = _write_beside(bundle.path / RESULTS, result)
        with self._open() as connection:
            self._insert(connection, result, bundle)
        return fresh

    def _insert(self, connection: sqlite3.Connection, result: DeviceResult, bundle: Bundle) -> None:
        m, ms = bundle.manifest, {name: us / 1e3 for name, us in result.percentiles_us.items()}
        about = (result.bundle_sha256, str(bundle.path.resolve()), m.model, m.target, m.precision)
        connection.execute("insert or replace into bundles values (?, ?, ?, ?, ?)", about)
        row = (
            result.bundle_sha256, result.run_id, result.label, result.source, result.device.name, result.device.soc,
            result.created, ms.get("p50"), ms.get("p90"), result.peak_memory_mb, result.golden.status,
            "; ".join(result.flags), result.text(),
        )  # fmt: skip
        connection.execute(f"insert or ignore into results values ({', '.join('?' * len(row))})", row)

    def bundle_of(self, sha256: str) -> Path:
        """Where the bundle with that hash was last seen. Raises InvalidInput."""
        with self._open() as connection:
            found = connection.execute("select path from bundles where sha256 = ?", (sha256,)).fetchone()
        if found is None or not (Path(found[0]) / MANIFEST).is_file():
            raise InvalidInput(f"no bundle {sha256[:16]} is known here -> name it with --bundle")
        return Path(found[0])

    def rows(self, devices_only: bool = False, **where: str | None) -> list[dict[str, Any]]:
        """Results as rows of COLUMNS, fastest first within a model; latency_ms: the median. devices_only: real devices
        alone, the only rows that may be compared with each other as devices. where: exact values by column."""
        tests, values = [], []
        for column, value in where.items():
            if value is not None:
                assert column in COLUMNS, column
                tests.append(f"{column} = ?")
                values.append(value)
        if devices_only:
            tests.append(f"source in ({', '.join('?' * len(DEVICES))})")
            values += DEVICES
        query = f"select {', '.join(COLUMNS)} from results join bundles on bundle_sha256 = sha256"
        query += f" where {' and '.join(tests)}" if tests else ""
        query += " order by model, precision, latency_ms is null, latency_ms, run_id"
        with self._open() as connection:
            found = connection.execute(query, values)
            return [dict(zip(COLUMNS, row, strict=True)) for row in found]

    def documents(self) -> list[DeviceResult]:
        """Every result, whole."""
        with self._open() as connection:
            found = connection.execute("select document from results order by created, run_id, artifact").fetchall()
        return [parse_result(text.encode(), str(self.path)) for (text,) in found]


def _write_beside(folder: Path, result: DeviceResult) -> bool:
    """Write ``result`` under its name, whole or not at all; False when it stands there already."""
    folder.mkdir(exist_ok=True)
    file, text = folder / result.name, result.text()
    part = folder / f".{result.name}.{os.getpid()}"
    try:
        part.write_text(text)
        os.link(part, file)
    except FileExistsError:
        if file.read_text() != text:
            raise InvalidInput(f"{file} is another result with this run id -> nothing was changed") from None
        return False
    finally:
        part.unlink(missing_ok=True)
    return True


def ingest(file: Path, bundle: Path | None, store: Store) -> tuple[DeviceResult, bool]:
    """Check a result file against its bundle and keep it; (the result, False when it was known already)."""
    result = read_result(file)
    opened = load_bundle(bundle or store.bundle_of(result.bundle_sha256))
    return result, store.add(result, opened)


def to_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Rows for a spreadsheet. A text that a spreadsheet would run as a formula is quoted with an apostrophe."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"'{v}" if isinstance(v, str) and v[:1] in "=+-@" and v else v for k, v in row.items()})
    return stream.getvalue()
