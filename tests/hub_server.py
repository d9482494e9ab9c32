"""A stand-in for Qualcomm AI Hub on this machine: the part of its protocol that the real client speaks in a benchmark.

It keeps what it is given, counts it, and "runs" a model by calling ``evaluate`` on the inputs. Its faults are entries
of hub_faults.yaml: what happens to the n-th request that matches."""

from __future__ import annotations

import hashlib
import io
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h5py
import numpy as np
from qai_hub import public_api_pb2 as pb
from qai_hub.util.dataset_entries_converters import dataset_entries_to_h5, h5_to_dataset_entries

TOKEN = "s3cret-token-of-the-test"
DEVICES = {
    "Samsung Galaxy S24 (Family)": ("14", ["chipset:qualcomm-snapdragon-8gen3", "framework:qnn", "framework:onnx"]),
    "Samsung Galaxy S25 (Family)": ("15", ["chipset:qualcomm-snapdragon-8-elite", "framework:qnn", "framework:onnx"]),
}
RUNNING = {"compile": pb.JOB_STATE_OPTIMIZING_MODEL, "link": pb.JOB_STATE_LINKING_MODELS,
           "inference": pb.JOB_STATE_MEASURING_PERFORMANCE}  # fmt: skip


@dataclass
class Fault:
    """``at``: "METHOD path-regex". ``do``: a status code; "drop" (the connection, before anything is done); "lose" (the
    answer, after it was done); "garble" (the answer); "html"; "slow"; "fail" (the job); "truncate" (a transfer);
    "vanish" (the device). The ``skip`` first matches pass, then ``times`` are hit."""

    at: str
    do: str | int
    times: int = 1
    skip: int = 0
    text: str = ""

    def hits(self, method: str, path: str) -> bool:
        if not re.fullmatch(self.at, f"{method} {path}"):
            return False
        self.skip -= 1
        if self.skip >= 0 or self.times <= 0:
            return False
        self.times -= 1
        return True


@dataclass
class Stored:
    name: str
    kind: int = 0
    data: bytes = b""
    parts: dict[int, bytes] = field(default_factory=dict)
    size: int = 0
    complete: bool = False


class HubServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, evaluate: Callable[[dict[str, list[np.ndarray]]], dict[str, list[np.ndarray]]], looks: int = 1):
        """looks: how often a job is seen running before it is done."""
        super().__init__(("127.0.0.1", 0), Handler)
        self.evaluate, self.looks = evaluate, looks
        self.models: dict[str, Stored] = {}
        self.datasets: dict[str, Stored] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.uploads: Counter[str] = Counter()  # completed, by content
        self.created: Counter[tuple[str, str]] = Counter()  # jobs, by kind and device
        self.log: list[str] = []
        self.faults: list[Fault] = []
        self.devices = dict(DEVICES)
        self.part_size = 1 << 30
        self.hang: tuple[int, str] | None = None  # at the n-th request: "before" or "after" it is served
        self.hung = threading.Event()
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that were killed are no errors here."""

    def number(self, prefix: str) -> str:
        return f"{prefix}{len(self.models) + len(self.datasets) + len(self.jobs):06d}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.serve()

    do_POST = do_PUT = do_PATCH = do_GET

    def serve(self) -> None:
        hub, parts = self.server, urlsplit(self.path)
        path = parts.path.removeprefix("/api/v1")
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        with hub.lock:
            hub.log.append(f"{self.command} {path}")
            number = len(hub.log) - 1
            fault = next((f for f in hub.faults if f.hits(self.command, path)), None)
        if hub.hang == (number, "before"):
            return self.wait_for_the_end()
        do = fault.do if fault else ""
        if do == "drop":
            return self.cut()
        if do == "truncate" and self.command in ("PUT", "POST"):
            self.rfile.read(10)
            return self.cut()
        body = self.body()
        if do == "slow":
            time.sleep(1.5)
        if isinstance(do, int):
            return self.answer(do, (fault.text if fault else "").encode(), "text/plain")
        if parts.path.startswith("/api/") and self.headers.get("Authorization") != f"token {TOKEN}":
            return self.answer(401)
        with hub.lock:
            if do == "vanish":
                hub.devices.clear()
            status, data, kind = self.route(path, body, do, fault.text if fault else "")
        if hub.hang == (number, "after"):
            return self.wait_for_the_end()
        if do == "lose":
            return self.cut()
        if do == "garble":
            data = b"\xff\xff\xff" + data
        if do == "html":
            return self.answer(200, b"<html>down for maintenance</html>", "text/html")
        self.answer(status, data, kind, short=do == "truncate")

    def wait_for_the_end(self) -> None:
        self.server.hung.set()
        time.sleep(3)
        self.cut()

    def cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, data: bytes = b"", kind: str = "application/x-protobuf", short: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if self.command == "PUT":
            self.send_header("ETag", hashlib.md5(data).hexdigest())
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if short else data)
        if short:
            self.cut()

    def route(self, path: str, body: bytes, do: str, text: str) -> tuple[int, bytes, str]:
        for pattern, method in ROUTES:
            if found := re.fullmatch(pattern, f"{self.command} {path}"):
                made = method(self, body, *found.groups(), **({"fail": text} if do == "fail" else {}))
                if isinstance(made, bytes):
                    return 200, made, "application/octet-stream"
                if isinstance(made, str):
                    return int(made[:3]), made[4:].encode(), "text/plain"
                return 200, made.SerializeToString(), "application/x-protobuf"
        return 404, path.encode(), "text/plain"

    # --- devices, models ---

    def list_devices(self, _: bytes) -> Any:
        wanted, name = self.query.get("attributes", ""), self.query.get("name", "")
        found = pb.DeviceList()
        for known, (system, attributes) in self.server.devices.items():
            if name in ("", known) and (not wanted or wanted in attributes):
                found.devices.append(pb.Device(name=known, os=system, attributes=attributes))
        if self.query.get("select") == "True":
            del found.devices[1:]
        return found

    def page(self, items: list[Any]) -> list[Any]:
        offset = int(self.query.get("offset", 0))
        return items[offset : offset + int(self.query.get("limit", 50))]

    def list_models(self, _: bytes) -> Any:
        return pb.ModelList(models=[self.model_pb(id) for id in self.page(list(self.server.models)[::-1])])

    def model_pb(self, id: str) -> Any:
        stored = self.server.models[id]
        return pb.Model(model_id=id, name=stored.name, model_type=stored.kind, file_upload_complete=stored.complete)

    def make_model(self, body: bytes) -> Any:
        asked, id = pb.Model.FromString(body), self.server.number("m")
        self.server.models[id] = Stored(asked.name, asked.model_type)
        return pb.CreateUpdateResponse(id=id)

    def get_model(self, _: bytes, id: str) -> Any:
        return self.model_pb(id) if id in self.server.models else "404 no such model"

    def begin_upload(self, _: bytes, id: str) -> Any:
        stored, size = self.server.models[id], self.server.part_size
        stored.size, stored.parts = int(self.query["file_size"]), {}
        count = max(-(-stored.size // size), 1)
        urls = [f"{self.server.url}/blob/{id}/{i}" for i in range(count)]
        made = pb.FileMultipartUploadURL(urls=urls, upload_id=f"u-{id}", max_part_size=size)
        return pb.FileUploadResponse(multipart_url=made)

    def put_part(self, body: bytes, id: str, part: str) -> Any:
        self.server.models[id].parts[int(part)] = body
        return b""

    def end_upload(self, _: bytes, id: str) -> Any:
        stored = self.server.models[id]
        data = b"".join(stored.parts[i] for i in sorted(stored.parts))
        if len(data) != stored.size:
            return "400 the upload is incomplete"
        return self.keep(id, stored, data)

    def keep(self, id: str, stored: Stored, data: bytes) -> Any:
        if not stored.complete:
            self.server.uploads[hashlib.sha256(data).hexdigest()] += 1
        stored.data, stored.complete = data, True
        return pb.CreateUpdateResponse(id=id)

    # --- datasets ---

    def list_datasets(self, _: bytes) -> Any:
        return pb.DatasetList(datasets=[self.dataset_pb(id) for id in self.page(list(self.server.datasets)[::-1])])

    def dataset_pb(self, id: str) -> Any:
        stored = self.server.datasets[id]
        made = pb.Dataset(dataset_id=id, name=stored.name, file_upload_complete=stored.complete)
        made.expiration_time.seconds = int(time.time()) + 30 * 86400
        return made

    def make_dataset(self, body: bytes) -> Any:
        id = self.server.number("d")
        self.server.datasets[id] = Stored(pb.Dataset.FromString(body).name)
        return pb.CreateUpdateResponse(id=id)

    def get_dataset(self, _: bytes, id: str) -> Any:
        return self.dataset_pb(id) if id in self.server.datasets else "404 no such dataset"

    def dataset_url(self, _: bytes, id: str) -> Any:
        url = pb.FileUploadURL(url=f"{self.server.url}/form/{id}", file_field_name="file")
        url.fields["key"] = "value"
        return pb.FileUploadResponse(url=url)

    def put_form(self, body: bytes, id: str) -> Any:
        boundary = b"--" + self.headers["Content-Type"].partition("boundary=")[2].encode()
        part = next(p for p in body.split(boundary) if b'name="file"' in p)
        self.server.datasets[id].data = part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        return b""

    def end_dataset(self, _: bytes, id: str) -> Any:
        stored = self.server.datasets[id]
        with h5py.File(io.BytesIO(stored.data)) as file:
            content = h5_to_dataset_entries(file)
        data = b"".join(a.tobytes() for arrays in content.values() for a in arrays)
        if not stored.complete:
            self.server.uploads[hashlib.sha256(data).hexdigest()] += 1
        stored.complete = True
        return pb.CreateUpdateResponse(id=id)

    def download_dataset(self, _: bytes, id: str) -> Any:
        url = pb.FileDownloadURL(url=f"{self.server.url}/blob/{id}", filename="outputs.h5")
        return pb.FileDownloadResponse(url=url)

    def blob(self, _: bytes, id: str) -> Any:
        return self.server.datasets[id].data

    # --- jobs ---

    def make_job(self, body: bytes, fail: str | None = None) -> Any:
        asked = pb.Job.FromString(body)
        kind = asked.WhichOneof("job").removesuffix("_job")
        job = getattr(asked, f"{kind}_job")
        device = job.devices.devices[0] if kind == "compile" else job.device
        if device.name not in self.server.devices:
            return f"400 {device.name} is not available"
        models = [m.model_id for m in job.models.models] if kind == "link" else [job.model.model_id]
        if not all(self.server.models[id].complete for id in models):
            return "400 the model has not been uploaded"
        id = self.server.number("j")
        self.server.jobs[id] = {
            "pb": asked,
            "kind": kind,
            "looks": self.server.looks,
            "device": device.name,
            "fail": fail,
        }
        self.server.created[kind, device.name] += 1
        if kind in ("compile", "link"):
            target = self.server.number("m")
            types = {"compile": pb.MODEL_TYPE_QNN_DLC, "link": pb.MODEL_TYPE_QNN_CONTEXT_BINARY}
            self.server.models[target] = Stored(f"made by {id}", types[kind], b"binary", complete=True)
            job.target_model.CopyFrom(self.model_pb(target))
        setattr(job, f"{kind}_job_id", id)
        return pb.CreateUpdateResponse(id=id)

    def get_job(self, _: bytes, id: str, fail: str | None = None) -> Any:
        if id not in self.server.jobs:
            return "404 no such job"
        record = self.server.jobs[id]
        job = getattr(record["pb"], f"{record['kind']}_job")
        if fail is not None:
            record["fail"] = fail
        if record["looks"] > 0:
            record["looks"] -= 1
            job.job_state = RUNNING[record["kind"]]
        elif record["fail"] is not None:
            job.job_state, job.failure_reason = pb.JOB_STATE_FAILED, record["fail"]
        else:
            job.job_state = pb.JOB_STATE_DONE
        return record["pb"]

    def job_result(self, _: bytes, id: str) -> Any:
        record = self.server.jobs[id]
        if "outputs" not in record:
            with h5py.File(
                io.BytesIO(self.server.datasets[record["pb"].inference_job.dataset.dataset_id].data)
            ) as file:
                inputs = h5_to_dataset_entries(file)
            stream = io.BytesIO()
            with h5py.File(stream, "w") as file:
                dataset_entries_to_h5(self.server.evaluate(inputs), file)
            record["outputs"] = self.server.number("d")
            self.server.datasets[record["outputs"]] = Stored("outputs", data=stream.getvalue(), complete=True)
        detail = pb.ProfileDetail(
            major_version=1, minor_version=2, execution_time=512, cold_load_time=90_000,
            after_execution_peak_memory=12_000_000,
            all_execution_times=[512 + i for i in range(20)],
        )  # fmt: skip
        for i, name in enumerate(("conv/<lambda>:0", "add|1", "head")):
            unit = pb.COMPUTE_UNIT_NPU
            detail.layer_details.append(
                pb.LayerDetail(name=name, layer_type_name="op", compute_unit=unit, execution_time=100 + i)
            )
        result = pb.InferenceJobResult(inference_job_id=id, output_dataset_id=record["outputs"], detail=detail)
        return pb.JobResult(inference_job_result=result)

    def list_jobs(self, _: bytes) -> Any:
        found = pb.JobSummaryList()
        known = [
            (id, job) for id, job in self.server.jobs.items() if job["kind"] == self.query.get("type", job["kind"])
        ]
        for id, record in self.page(known[::-1]):
            job = getattr(record["pb"], f"{record['kind']}_job")
            summary = getattr(found.job_summaries.add(), f"{record['kind']}_job_summary")
            summary.job_id, summary.name, summary.job_state = id, job.name, job.job_state
        return found


ROUTES = [
    (r"GET /devices/", Handler.list_devices),
    (r"GET /models/", Handler.list_models),
    (r"POST /models/", Handler.make_model),
    (r"GET /models/(\w+)/", Handler.get_model),
    (r"GET /models/(\w+)/multipart_upload/", Handler.begin_upload),
    (r"PUT /blob/(\w+)/(\d+)", Handler.put_part),
    (r"POST /models/(\w+)/multipart_upload/", Handler.end_upload),
    (r"GET /datasets/", Handler.list_datasets),
    (r"POST /datasets/", Handler.make_dataset),
    (r"GET /datasets/(\w+)/", Handler.get_dataset),
    (r"GET /datasets/(\w+)/upload_url/", Handler.dataset_url),
    (r"POST /form/(\w+)", Handler.put_form),
    (r"PATCH /datasets/(\w+)/", Handler.end_dataset),
    (r"GET /datasets/(\w+)/download_data/", Handler.download_dataset),
    (r"GET /blob/(\w+)", Handler.blob),
    (r"POST /jobs/", Handler.make_job),
    (r"GET /jobs/(\w+)/", Handler.get_job),
    (r"GET /jobs/(\w+)/result/", Handler.job_result),
    (r"GET /job_summaries/", Handler.list_jobs),
]
