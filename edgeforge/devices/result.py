"""The record of one artifact's run on one device: ``edgeforge.device_result/1``, read as the stranger's file it is.

Its JSON schema: `edgeforge results --schema`. Raw samples are kept; summaries are computed from them."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from edgeforge.errors import InvalidInput

SCHEMA = "edgeforge.device_result/1"
#: Longest file that is read, in bytes: a thousand profiled nodes and ten thousand samples are below a megabyte.
MAX_BYTES = 16 << 20
#: Sources by what their figures are. Only devices stand in comparison tables.
DEVICES = ("device-hosted", "device-usb", "device-app")
#: Clock that a run may lose between its first and its last tenth before it counts as throttled.
THROTTLED = 1.15
PERCENTS = (10, 50, 90, 99)

#: No markup and no control characters: these texts end up in pages, tables and terminals.
Text = Annotated[str, StringConstraints(max_length=400, pattern=r"^[^<>\x00-\x1f\x7f-\x9f]*$")]
#: Also a file name.
Id = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,79}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Positive = Annotated[float, Field(ge=0, le=1e15)]


def _utc(text: str) -> str:
    if not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", text):
        raise ValueError("not a UTC time like 2026-01-31T12:00:00Z")
    return text


class Closed(BaseModel):
    """Unknown keys and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Device(Closed):
    """``os``: with its version; ``soc``: the chipset's part number (SM8650), where known."""

    name: Text
    os: Text = ""
    soc: Text = ""


class Runtime(Closed):
    """What executed the artifact; ``versions``: of runtime, drivers and compiler, by name."""

    name: Text
    versions: dict[Text, Text] = Field(default_factory=dict, max_length=64)


class Conditions(Closed):
    """None: not known. thermal: Android's thermal status (0 none .. 6 shutdown) before and after the run. other_chip:
    how the device's chip is not the bundle's target, where it was run all the same."""

    threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    power_mode: Text = ""
    battery_percent: Annotated[float, Field(ge=0, le=100)] | None = None
    charging: bool | None = None
    thermal_before: Annotated[int, Field(ge=0, le=6)] | None = None
    thermal_after: Annotated[int, Field(ge=0, le=6)] | None = None
    other_chip: Text = ""


class NodeTime(Closed):
    """One operation of the device's profile; unit: NPU, GPU or CPU."""

    name: Text
    op: Text = ""
    us: Positive
    unit: Text = ""
    cycles: Annotated[int, Field(ge=0)] | None = None


class Golden(Closed):
    """The golden vectors on the device against the simulator's integers. ``identical``: share, 0..1; ``where``: output
    and position of the first integer that departs, or why none was compared. "not checked": the artifact ran, its
    outputs were not kept."""

    status: Literal["identical", "differs", "float islands", "not checked", "not run"]
    identical: Annotated[float, Field(ge=0, le=1)] | None = None
    max_lsb: Annotated[int, Field(ge=0)] | None = None
    where: Text = ""


class DeviceResult(Closed):
    """One artifact of one bundle on one device. ``bundle_sha256``: of the bundle's manifest.json, which holds the
    hashes of all its files. part: which graph of a language model. latency_us: every timed inference, in order.
    memory_mb: (milliseconds since the start of the run, resident MB). first_token_ms: of a prompt of one chunk.
    ``flags``: written by `edgeforge ingest`, whatever a file says."""

    schema_: Literal["edgeforge.device_result/1"] = Field(default=SCHEMA, alias="schema")
    source: Literal["device-hosted", "device-usb", "device-app", "host", "emulated", "loopback"]
    run_id: Id
    created: Annotated[str, AfterValidator(_utc)]
    bundle_sha256: Sha256
    artifact: Id
    part: Literal["", "prefill", "decode"] = ""
    device: Device
    runtime: Runtime
    conditions: Conditions = Conditions()
    latency_us: Annotated[tuple[Positive, ...], Field(max_length=100_000)] = ()
    percentiles_us: dict[str, float] = Field(default_factory=dict, max_length=16)
    load_ms: Positive | None = None
    first_run_ms: Positive | None = None
    peak_memory_mb: Positive | None = None
    memory_mb: Annotated[tuple[tuple[Positive, Positive], ...], Field(max_length=100_000)] = ()
    tokens_per_second: Positive | None = None
    first_token_ms: Positive | None = None
    nodes: Annotated[tuple[NodeTime, ...], Field(max_length=100_000)] = ()
    golden: Golden = Golden(status="not run")
    notes: Annotated[tuple[Text, ...], Field(max_length=64)] = ()
    flags: Annotated[tuple[Text, ...], Field(max_length=16)] = ()

    @model_validator(mode="after")
    def _summaries_follow_from_samples(self) -> DeviceResult:
        made = percentiles(self.latency_us)
        for key, value in self.percentiles_us.items():
            if key not in made or abs(value - made[key]) > 1e-3 * made[key] + 1e-6:
                raise ValueError(f"percentiles_us.{key} = {value} does not follow from latency_us ({made.get(key)})")
        object.__setattr__(self, "percentiles_us", made)
        object.__setattr__(self, "flags", flags(self))
        return self

    @property
    def p50_us(self) -> float | None:
        return self.percentiles_us.get("p50")

    @property
    def label(self) -> str:
        """The artifact as tables name it."""
        return f"{self.artifact} {self.part}".rstrip()

    @property
    def name(self) -> str:
        """Of its file among a bundle's results."""
        return f"{self.run_id}.{self.label.replace(' ', '.')}.json"

    def document(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    def text(self) -> str:
        return json.dumps(self.document(), indent=1, allow_nan=False) + "\n"


def percentiles(samples: tuple[float, ...]) -> dict[str, float]:
    """min, p10, p50, p90, p99, max and mean; empty without samples."""
    if not samples:
        return {}
    values = np.percentile(samples, PERCENTS)
    named = {f"p{p}": float(value) for p, value in zip(PERCENTS, values, strict=True)}
    return {"min": min(samples), **named, "max": max(samples), "mean": float(np.mean(samples))}


def flags(result: DeviceResult) -> tuple[str, ...]:
    """What a reader must know before believing a result."""
    c, found = result.conditions, []
    if result.golden.status == "differs":
        found.append("golden vectors differ")
    if result.golden.status in ("not run", "not checked"):
        found.append(f"golden vectors {result.golden.status}")
    if c.other_chip:
        found.append(c.other_chip)
    hot = [status for status in (c.thermal_before, c.thermal_after) if status]
    tenth = len(result.latency_us) // 10
    if hot:
        found.append(f"throttled: thermal status {max(hot)}")
    elif tenth >= 3:
        slower = float(np.median(result.latency_us[-tenth:]) / max(np.median(result.latency_us[:tenth]), 1e-9))
        if slower > THROTTLED and result.source in DEVICES:
            found.append(f"throttled: the last tenth is {slower:.2f} times as slow as the first")
    return tuple(found)


def read_result(path: Path) -> DeviceResult:
    """A result file from anywhere. Raises InvalidInput with every reason to refuse it; nothing in it is followed."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise InvalidInput(f"{path} is not a file -> name one JSON file")
        if about.st_size > MAX_BYTES:
            size, most = f"{about.st_size / 1e6:.0f} MB", f"{MAX_BYTES / 1e6:.0f} MB"
            raise InvalidInput(f"{path} has {size}, results have at most {most} -> this is no device result")
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise InvalidInput(f"{path}: {error.strerror} -> name a JSON file") from None
    return parse_result(data, str(path))


def parse_result(data: bytes, where: str) -> DeviceResult:
    """``data`` as a result; raises InvalidInput."""
    try:
        raw = json.loads(data.decode(), object_pairs_hook=_without_twins, parse_constant=_no_constant)
    except RecursionError:
        raise InvalidInput(f"{where}: nested too deeply -> this is no device result") from None
    except ValueError as error:
        raise InvalidInput(f"{where} is not JSON: {error} -> copy the file again") from None
    version = raw.get("schema") if isinstance(raw, dict) else None
    if version != SCHEMA:
        raise InvalidInput(f"{where}: schema {str(version)[:80]!r}, this EdgeForge reads {SCHEMA} -> another version?")
    try:
        return DeviceResult.model_validate(raw)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc']))[:80] or '(top)'}: {e['msg']}" for e in error.errors()[:20]]
        raise InvalidInput("\n".join([f"{where}: {error.error_count()} problem(s):", *lines])) from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
