"""Hosted devices: Qualcomm AI Hub through its own client (qai-hub).

    upload (or reuse) -> [compile to DLC -> link to a context binary] -> inference with profiling -> record

Everything made there has a name that follows from what it is, and is looked up before it is made: an answer that got
lost, or a process that was killed, makes nothing twice. So the client must not repeat a request that creates something
by itself (`created_once`)."""

from __future__ import annotations

import contextlib
import hashlib
import io
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from edgeforge.bundle import Bundle
from edgeforge.devices._hub_client import VERSION, Passing, Refused, asked, created_once, open_client, plain, tidied
from edgeforge.devices.golden import compare
from edgeforge.devices.host import new_run_id, now
from edgeforge.devices.journal import Journal
from edgeforge.devices.result import Device, DeviceResult, Golden, NodeTime, Runtime
from edgeforge.devices.runners import narrow, samples
from edgeforge.devices.store import RESULTS, Store, bundle_hash, read_results
from edgeforge.errors import BackendFailed, InvalidInput
from edgeforge.target import Target, load_target

#: Artifacts that the hub takes, the file that is uploaded, and the jobs that it goes through.
ROUTES = {
    "ort_qnn": ("model_ctx_qnn.bin", ("infer",)),
    "onnx_qdq": ("model.onnx", ("compile", "link", "infer")),
}
PAGE, PAGES = 50, 10
Say = Callable[[str], None]


@dataclass(frozen=True)
class Patience:
    """Pauses between tries of what failed for the moment, between looks at running jobs, and the end of waiting."""

    retries_s: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 60, 60)
    polls_s: tuple[float, ...] = (0.5, 1, 2, 5, 10)
    timeout_s: float = 3600


@dataclass(frozen=True)
class Upload:
    """One file to upload. ``name``: on the hub, from its contents."""

    artifact: str
    file: Path
    sha256: str
    size: int
    steps: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"edgeforge-{self.sha256[:32]}{self.file.suffix}"


def plan(bundle: Bundle, artifacts: Sequence[str], compile_only: bool = False) -> list[Upload]:
    """What would be uploaded; by default the artifact that needs no compilation there (with compile_only: that does).

    Raises InvalidInput for artifacts that were not built or that the hub does not take."""
    if bundle.prefill is not None:
        raise InvalidInput(f"{bundle.path} holds two graphs with state between them -> bench --on host")
    built = [name for name, record in bundle.manifest.backends.items() if record.status == "built" and name in ROUTES]
    usual = ("onnx_qdq",) if compile_only else ("ort_qnn", "onnx_qdq")
    chosen = artifacts or [name for name in usual if name in built][:1]
    if wrong := [name for name in chosen if name not in built]:
        raise InvalidInput(f"{', '.join(wrong)}: the hub takes {', '.join(ROUTES)} as far as built -> --backend")
    if not chosen:
        raise InvalidInput(f"{bundle.path} has nothing that the hub takes -> export with --backend onnx_qdq")
    found = []
    for artifact in chosen:
        name, steps = ROUTES[artifact]
        file = bundle.artifact(artifact) / name
        if file.with_name(f"{name}.data").is_file():
            raise InvalidInput(f"{artifact}: weights in a file of their own are not uploaded -> --backend ort_qnn")
        if not file.is_file():
            raise InvalidInput(f"{artifact}: its several contexts are not uploaded -> bench --on host")
        sha256 = bundle.manifest.sha256[file.relative_to(bundle.path).as_posix()]
        found.append(Upload(artifact, file, sha256, file.stat().st_size, steps))
    return found


def bench(
    bundle: Bundle,
    store: Store,
    devices: Sequence[str] = (),
    artifacts: Sequence[str] = (),
    compile_only: bool = False,
    patience: Patience = Patience(),
    say: Say = lambda line: None,
) -> list[DeviceResult]:
    """Run artifacts on hosted devices and keep their results; goes on with an interrupted run of the same plan.
    devices: names, targets or "chipset:NAME"; default: the bundle's target.

    Raises BackendFailed with the reasons of everything that failed, after the rest has been kept."""
    uploads = plan(bundle, artifacts, compile_only)
    run = _Run(bundle, store, uploads, devices or (bundle.target.name,), compile_only, patience, say)
    # The client prints; stdout is for the results.
    with contextlib.redirect_stdout(io.StringIO()), tidied(bundle.path / RESULTS / ".hub-client"):
        return run.finish()


def official(api_url: str) -> bool:
    """Whether results from there are those of devices: anything but Qualcomm's own service is a stand-in."""
    parts = urlsplit(api_url)
    return parts.scheme == "https" and (parts.hostname or "").endswith(".qualcomm.com")


@dataclass
class _Run:
    bundle: Bundle
    store: Store
    uploads: list[Upload]
    wanted: Sequence[str]
    compile_only: bool
    patience: Patience
    say: Say
    seen: dict[str, Any] = field(default_factory=dict)

    def finish(self) -> list[DeviceResult]:
        self.client = open_client()
        self.journal = self._journal()
        uploads = {upload.artifact: upload for upload in self.uploads}
        deadline, looks = time.monotonic() + self.patience.timeout_s, 0
        while open_tasks := [key for key, task in self.journal.tasks.items() if task["state"] == "open"]:
            for key in open_tasks:
                task = self.journal.tasks[key]
                try:
                    done = self._advance(key, task, uploads[task["artifact"]])
                except Refused as error:
                    self.journal.close(key, "failed", str(error))
                    self.say(f"{key}: {error}")
                else:
                    if done:
                        self.journal.close(key, "done")
            if not any(task["state"] == "open" for task in self.journal.tasks.values()):
                break
            if time.monotonic() > deadline:
                raise BackendFailed(f"jobs are still running after {self.patience.timeout_s:.0f} s -> run this again")
            time.sleep(self.patience.polls_s[min(looks, len(self.patience.polls_s) - 1)])
            looks += 1
        failed = [f"  {key}: {task['reason']}" for key, task in self.journal.tasks.items() if task["state"] == "failed"]
        made = [result for result in read_results(self.bundle.path) if result.run_id.startswith(self.journal.run_id)]
        self.journal.path.unlink()
        if failed:
            raise BackendFailed("\n".join([f"{len(failed)} of {len(self.journal.tasks)} runs failed:", *failed]))
        return made

    def _journal(self) -> Journal:
        """Of the interrupted run, or a new one with a task per device and artifact."""
        wanted = {
            "bundle": bundle_hash(self.bundle.path), "api_url": self.client.config.api_url,
            "devices": list(self.wanted), "artifacts": [upload.artifact for upload in self.uploads],
            "compile_only": self.compile_only,
        }  # fmt: skip
        folder = self.bundle.path / RESULTS
        journal = Journal.read(folder)
        if journal is not None:
            if journal.plan != wanted:
                asked = f"{', '.join(journal.plan['artifacts'])} on {', '.join(journal.plan['devices'])}"
                raise InvalidInput(
                    f"an interrupted run ({asked}) is not finished -> repeat it, or delete {journal.path}"
                )
            self.say(f"going on with run {journal.run_id}")
            return journal
        try:
            found = [self._device(name) for name in self.wanted]
        except Refused as error:
            raise BackendFailed(str(error)) from None
        new = Journal(folder / ".hub-journal", new_run_id(), now(), wanted)
        for device in found:
            for upload in self.uploads:
                self._check_chip(device, upload)
                about = {"name": device.name, "os": device.os, "attributes": list(device.attributes)}
                key = f"{device.name} {device.os} | {upload.artifact}"
                new.tasks[key] = {"device": about, "artifact": upload.artifact, "state": "open", "reason": ""}
        new.write()
        return new

    def _device(self, name: str) -> Any:
        """The hosted device of that name, of a target, or with that attribute ("chipset:..."); the newest system."""
        target = _target(name)
        names = (name, *(target.devices if target else ()))
        if ":" in name:
            found = self._try(lambda: self.client.get_devices(attributes=[name]))
            return max(found, key=_version) if found else _no_device(name)
        known = self._try(self.client.get_devices)
        for candidate in (*names, *(f"{one} (Family)" for one in names)):
            if matching := [device for device in known if device.name == candidate]:
                return max(matching, key=_version)
        return _no_device(name, [device.name for device in known])

    def _check_chip(self, device: Any, upload: Upload) -> None:
        target, mine = _target(device.name.removesuffix(" (Family)")), self.bundle.target.soc
        if upload.steps[0] != "infer" or target is None or target.soc is None or mine is None:
            return
        if target.soc.model != mine.model:
            raise InvalidInput(
                f"the context binary is for {mine.name}, {device.name} has {target.soc.name}"
                f" -> --backend onnx_qdq, or export for {target.name}"
            )

    def _advance(self, key: str, task: dict[str, Any], upload: Upload) -> bool:
        """Begin the next job of a task, or look at the running one; True when its result is kept."""
        import qai_hub

        device = qai_hub.Device(task["device"]["name"], task["device"]["os"], task["device"]["attributes"])
        steps = [step for step in upload.steps if step != "infer"] if self.compile_only else upload.steps
        model = self._model(upload)
        for step in steps:
            job = self._job(key, step, device, model)
            status = self._try(job.get_status)
            if status.failure:
                why = plain(status.message or "no reason given")
                raise Refused(f"{step} job {job.job_id} failed: {why} -> its logs: {job.url}")
            if not status.success:
                return False
            if step == "infer":
                self.store.add(self._result(task, upload, job), self.bundle)
            else:
                model = self._try(job.get_target_model)
        if self.compile_only:
            self.say(f"{key}: on the hub as model {model.model_id}")
        return True

    def _model(self, upload: Upload) -> Any:
        """The uploaded artifact."""

        def find() -> str | None:
            from qai_hub import public_rest_api as rest

            for page in range(PAGES):
                found = rest.get_model_list(self.client.config, page * PAGE, PAGE).models
                ids = [m.model_id for m in found if m.name == upload.name and m.file_upload_complete]
                if ids or len(found) < PAGE:
                    return ids[0] if ids else None
            return None

        def make() -> str:
            self.say(f"uploading {upload.artifact}: {upload.size / 1e6:.2f} MB")
            return self.client.upload_model(str(upload.file), name=upload.name).model_id

        key = f"model {self._once('model', upload.name, find, make)}"
        if key not in self.seen:
            self.seen[key] = self._try(lambda: self.client.get_model(key.partition(" ")[2]))
        return self.seen[key]

    def _dataset(self) -> Any:
        """The golden inputs. The NPU has no 64-bit integers: ids travel as int32."""
        inputs = self.bundle.golden_part("input")
        digest = hashlib.sha256(b"".join(name.encode() + a.tobytes() for name, a in sorted(inputs.items())))
        name = f"edgeforge-{digest.hexdigest()[:32]}.h5"

        def find() -> str | None:
            from qai_hub import public_rest_api as rest

            for page in range(PAGES):
                found = rest.get_dataset_list(self.client.config, page * PAGE, PAGE).datasets
                fresh = [d for d in found if not 0 < d.expiration_time.seconds < time.time() + 86400]
                ids = [d.dataset_id for d in fresh if d.name == name and d.file_upload_complete]
                if ids or len(found) < PAGE:
                    return ids[0] if ids else None
            return None

        def make() -> str:
            return self.client.upload_dataset(_samples(self.bundle, inputs), name=name).dataset_id

        key = f"dataset {self._once('dataset', name, find, make)}"
        if key not in self.seen:
            self.seen[key] = self._try(lambda: self.client.get_dataset(key.partition(" ")[2]))
        return self.seen[key]

    def _job(self, key: str, step: str, device: Any, model: Any) -> Any:
        """The job of one step of one task. Its name holds the run, so that a new run gets new jobs."""
        from qai_hub.client import JobType

        digest = hashlib.sha256(f"{self.journal.run_id} {key} {step}".encode()).hexdigest()[:16]
        name = f"edgeforge-{self.journal.run_id}-{step}-{digest}"
        kind = {"compile": JobType.COMPILE, "link": JobType.LINK, "infer": JobType.INFERENCE}[step]

        def find() -> str | None:
            for page in range(PAGES):
                found = self.client.get_job_summaries(offset=page * PAGE, limit=PAGE, type=kind)
                ids = [summary.job_id for summary in found if summary.name == name]
                if ids or len(found) < PAGE:
                    return ids[0] if ids else None
            return None

        dataset = self._dataset() if step == "infer" and ("job", name) not in self._known() else None

        def make() -> str:
            self.say(f"{key}: {step}")
            if step == "compile":
                options = "--target_runtime qnn_dlc --truncate_64bit_io"
                return self.client.submit_compile_job(model, device, name=name, options=options, retry=False).job_id
            if step == "link":
                return self.client.submit_link_job(model, device, name=name).job_id
            return self.client.submit_inference_job(
                model, device, inputs=dataset, name=name, retry=False, profile=True
            ).job_id

        id = self._once("job", name, find, make)
        if id not in self.seen:
            self.seen[id] = self._try(lambda: self.client.get_job(id))
        return self.seen[id]

    def _known(self) -> set[tuple[str, str]]:
        return {(kind, name) for kind, names in self.journal.ids.items() for name in names}

    def _once(self, kind: str, name: str, find: Callable[[], str | None], make: Callable[[], str]) -> str:
        """The hub's id of what we call ``name``: from the journal, found there, or made."""
        if name not in self.journal.ids[kind]:

            def find_or_make() -> str:
                found = find()
                if found is None:
                    with created_once():
                        found = make()
                return found

            self.journal.note(kind, name, self._try(find_or_make))
        return self.journal.ids[kind][name]

    def _try(self, ask: Callable[[], Any]) -> Any:
        """Ask, and again after a pause while the failure may pass. Raises BackendFailed."""
        for pause in (*self.patience.retries_s, None):
            try:
                return asked(ask, self.client.config.api_token)
            except Passing as error:
                if pause is None:
                    raise BackendFailed(f"{error} -> run this again later: it goes on where it was") from None
                self.say(f"{error}; again in {pause:g} s")
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _result(self, task: dict[str, Any], upload: Upload, job: Any) -> DeviceResult:
        profile = self._try(job.download_profile)
        summary = profile.get("execution_summary", {})
        target = _target(task["device"]["name"].removesuffix(" (Family)"))
        chip = [a.partition(":")[2] for a in task["device"]["attributes"] if a.startswith("chipset:")]
        soc = target.soc.name if target is not None and target.soc else (chip or [""])[0]
        times = summary.get("all_inference_times") or summary.get("estimated_inference_time", ())
        return DeviceResult(
            source="device-hosted" if official(self.client.config.api_url) else "loopback",
            run_id=f"{self.journal.run_id}-{hashlib.sha256(str(task['device']).encode()).hexdigest()[:6]}",
            created=self.journal.created,
            bundle_sha256=bundle_hash(self.bundle.path),
            artifact=upload.artifact,
            device=Device(name=plain(task["device"]["name"]), os=plain(task["device"]["os"]), soc=plain(soc)),
            runtime=Runtime(name="Qualcomm AI Hub, QNN context binary", versions={"qai-hub": VERSION}),
            latency_us=tuple(times) if isinstance(times, list | tuple) else (times,),
            load_ms=_scaled(summary.get("first_load_time"), 1e3),
            peak_memory_mb=_scaled(summary.get("estimated_inference_peak_memory"), 1e6),
            nodes=tuple(_node(detail) for detail in profile.get("execution_detail", ())),
            golden=self._golden(self._try(job.download_output_data)),
            notes=(f"job {job.job_id}",),
        )

    def _golden(self, outputs: Any) -> Golden:
        """The device's integers against the simulator's. The hub may rename outputs: then their order counts."""
        if not outputs:
            return Golden(status="not run", where="the job returned no outputs")
        wanted = self.bundle.golden_part("output")
        if set(outputs) != set(wanted) and len(outputs) == len(wanted):
            outputs = dict(zip(self.bundle.graph.outputs, outputs.values(), strict=True))
        got = {name: np.concatenate([np.asarray(a) for a in arrays]) for name, arrays in outputs.items()}
        if floats := [name for name, codes in got.items() if codes.dtype.kind == "f"]:
            return Golden(status="differs", where=f"{floats[0]} is {got[floats[0]].dtype}, not integers")
        return compare(wanted, got)


def _version(device: Any) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", device.os)]


def _target(name: str) -> Target | None:
    try:
        return load_target(name)
    except InvalidInput:
        return None


def _no_device(name: str, known: Sequence[str] = ()) -> Any:
    near = [one for one in known if any(word in one.lower() for word in name.lower().split() if len(word) > 2)]
    raise InvalidInput(
        f"the hub has no device {name!r} -> one of {', '.join(dict.fromkeys(near or known)) or 'its list'}"
    )


def _samples(bundle: Bundle, inputs: dict[str, np.ndarray]) -> dict[str, list[np.ndarray]]:
    rows = samples(bundle.graph, inputs, list(inputs))
    return {name: [np.ascontiguousarray(narrow(row[i])) for row in rows] for i, name in enumerate(inputs)}


def _scaled(value: Any, by: float) -> float | None:
    """Microseconds as milliseconds, bytes as megabytes; what the profile lacks stays unknown."""
    return value / by if isinstance(value, int | float) and value > 0 else None


def _node(detail: dict[str, Any]) -> NodeTime:
    return NodeTime(
        name=plain(detail["name"]), op=plain(detail["type"]), us=detail.get("execution_time", 0),
        unit=plain(detail["compute_unit"]), cycles=detail.get("execution_cycles"),
    )  # fmt: skip
