#!/usr/bin/env python
"""ExecuTorch-QNN in a child process.
parent:  from qnn_child import child;  child("compile", ep="m.pt2", pte="m.pte", soc="SM8650", quant_io=True) -> dict
         child("run", pte="m.pte", inputs="in.npz", outputs="out.npz") -> dict
.pt2 = torch.export.save(torch.export.export(module, example_inputs)); float graph inputs, each followed by quantize_per_tensor;
each graph output is dequantize_per_tensor(quantize_per_tensor(...)).  quant_io=True turns those boundaries into integer I/O.
"""

import contextlib
import glob
import json
import os
import subprocess
import sys
import tempfile
import time


def sdk_env(root=None):
    """environment for the child: a fake QNN SDK made of links to the onnxruntime_qnn wheel's libraries"""
    import importlib.util

    pkg = os.path.dirname(importlib.util.find_spec("onnxruntime_qnn").origin)
    libs = pkg + ".libs"
    root = root or os.path.join(tempfile.gettempdir(), "edgeforge-qnn-sdk")
    lib = os.path.join(root, "lib", "x86_64-linux-clang")
    os.makedirs(lib, exist_ok=True)
    for f in glob.glob(pkg + "/libQnn*.so") + glob.glob(pkg + "/libHtpPrepare.so"):
        d = os.path.join(lib, os.path.basename(f))
        if not os.path.lexists(d):
            with contextlib.suppress(FileExistsError):
                os.symlink(f, d)
    env = dict(
        os.environ,
        QNN_SDK_ROOT=root,
        LD_LIBRARY_PATH=lib + ":" + libs,
        OMP_NUM_THREADS=os.environ.get("OMP_NUM_THREADS", "1"),
    )
    return env


def child(what, log=None, timeout=600, **job):
    """run one job; returns the child's result dict, raises RuntimeError naming the log"""
    fd, res = tempfile.mkstemp(suffix=".json")
    os.close(fd)
    log = log or res[:-5] + ".log"
    t = time.time()
    with open(log, "wb") as f:
        p = subprocess.run(
            [sys.executable, os.path.abspath(__file__), what, json.dumps(job), res],
            env=sdk_env(),
            stdout=f,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
    try:
        out = json.load(open(res))
    except Exception:
        out = None
    if p.returncode or out is None or "error" in out:
        raise RuntimeError(
            f"QNN child {what}: exit {p.returncode} {(out or {}).get('error', '')}; log {log}: "
            + open(log, errors="replace").read()[-1500:]
        )
    out.update(wall_s=time.time() - t, log=log)
    return out


def _compile(job):
    t0 = time.time()

    import torch

    torch.set_num_threads(1)
    import torch.ao.quantization.fx._decomposed
    from executorch.backends.qualcomm.serialization.qc_schema import QcomChipset
    from executorch.backends.qualcomm.utils.utils import (
        generate_htp_compiler_spec,
        generate_qnn_executorch_compiler_spec,
        to_edge_transform_and_lower_to_qnn,
    )
    from executorch.exir import ExecutorchBackendConfig
    from executorch.exir.capture._config import ExecutorchBackendConfig

    t1 = time.time()
    ep = torch.export.load(job["ep"])
    module = ep.module(check_guards=False)
    inputs = ep.example_inputs[0]
    spec = generate_qnn_executorch_compiler_spec(
        soc_model=getattr(QcomChipset, job["soc"]),
        backend_options=generate_htp_compiler_spec(use_fp16=False),
        **job.get("spec", {}),
    )
    kw = {}
    if job.get("quant_io"):
        from executorch.backends.qualcomm._passes import TagQuantIO
        from executorch.backends.qualcomm._passes.qnn_pass_manager import get_qnn_pass_manager_cls
        from executorch.backends.qualcomm.serialization.qc_schema import QnnExecuTorchBackendType
        from executorch.backends.qualcomm.utils.constants import (
            QCOM_PASS_ACTIVATE_KEY,
            QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY,
            QCOM_QUANT_ATTRS,
        )

        pj = get_qnn_pass_manager_cls(QnnExecuTorchBackendType.kHtpBackend).get_capture_program_passes()

        def io_dtype(node):
            qa = node.meta.get(QCOM_QUANT_ATTRS)
            if not qa or not (
                (node.op == "placeholder" and qa.get("axis") is None) or any(u.op == "output" for u in node.users)
            ):
                return None
            from executorch.backends.qualcomm.builders.utils import deduce_dtype

            if node.op == "placeholder" and not node.name.startswith(tuple(user_inputs)):
                return None
            return deduce_dtype(None, qa)

        user_inputs = ep.graph_signature.user_inputs
        pj[TagQuantIO][QCOM_PASS_ACTIVATE_KEY] = True
        pj[TagQuantIO][QCOM_PASS_ARGS_KWARGS_DEFAULTS_KEY]["get_quant_io_dtype_fn"] = io_dtype
        kw["passes_job"] = pj
    edge = to_edge_transform_and_lower_to_qnn(module, inputs, spec, **kw)
    gm = edge.exported_program().graph_module
    outside = [
        str(n.target)
        for n in gm.graph.nodes
        if n.op == "call_function"
        and "getitem" not in str(n.target)
        and "executorch_call_delegate" not in str(n.target)
    ]
    cfg = ExecutorchBackendConfig()
    if job.get("quant_io"):
        if outside:
            raise RuntimeError("quant_io needs a fully delegated graph; outside: " + str(outside))
        cfg = ExecutorchBackendConfig(memory_planning_pass=_quant_io_planning(gm))
    et = edge.to_executorch(cfg)
    open(job["pte"], "wb").write(reproducible(et.buffer))
    return dict(
        outside=outside,
        delegates=sum("executorch_call_delegate" in str(n.target) for n in gm.graph.nodes),
        bytes=len(et.buffer),
        import_s=t1 - t0,
        lower_s=time.time() - t1,
    )


def reproducible(pte):
    """the QNN delegate blob starts with magic 0x5678abcd, then an 8-byte signature = nanosecond clock, then its 8-byte size (the only bytes that differ between builds).
    Replace each clock by a hash of the whole file with all clocks zeroed."""
    import hashlib

    data, magic, at = bytearray(pte), bytes.fromhex("cdab7856"), []
    i = data.find(magic)
    while i >= 0:
        size = int.from_bytes(data[i + 12 : i + 20], "little")
        if 0 < size <= len(data) - i:
            at.append(i + 4)
        i = data.find(magic, i + 4)
    for a in at:
        data[a : a + 8] = bytes(8)
    h = hashlib.sha256(data).digest()
    for n, a in enumerate(at):
        data[a : a + 8] = hashlib.sha256(h + bytes([n])).digest()[:8]
    return bytes(data)


def _quant_io_planning(gm):
    """integer graph I/O. Upstream's BuildQuantIo changes dtypes before SpecPropPass, which re-executes the delegate's original float module on
    uint8 fakes and fails for mean / avg_pool / norms / mixed matmul. Changing the specs in place just before memory planning avoids the re-execution."""
    from executorch.backends.qualcomm.utils.constants import QCOM_QUANTIZED_IO
    from executorch.exir.passes import MemoryPlanningPass

    ins = {
        n.name: n.meta[QCOM_QUANTIZED_IO]
        for n in gm.graph.nodes
        if n.op == "placeholder" and QCOM_QUANTIZED_IO in n.meta
    }
    outs = [getattr(a, "meta", {}).get(QCOM_QUANTIZED_IO) for a in gm.graph.output_node().args[0]]

    def retype(spec, dtype):
        spec.scalar_type = dtype
        assert spec.dtype == dtype

    class Planning(MemoryPlanningPass):
        def run(self, gm, *a, **k):
            for n in gm.graph.nodes:
                if n.op == "placeholder" and n.name in ins:
                    retype(n.meta["spec"], ins[n.name])
                if n.op == "output":
                    for arg, dt in zip(n.args[0], outs, strict=False):
                        if dt is not None:
                            retype(arg.meta["spec"], dt)
            return super().run(gm, *a, **k)

    return Planning()


def _run(job):
    import numpy as np
    import torch
    from executorch.runtime import Runtime

    if not os.path.exists(job["pte"]):
        raise FileNotFoundError(job["pte"])
    z = np.load(job["inputs"])
    ins = [torch.from_numpy(z[k]) for k in sorted(z.files, key=lambda s: int(s))]
    p = Runtime.get().load_program(job["pte"])
    t = time.time()
    m = p.load_method("forward")
    load = time.time() - t
    outs, times = None, []
    n = job.get("repeat", 1)
    batched = job.get("batched")  # leading axis of every array = separate runs
    if batched:
        N = ins[0].shape[0]
        acc = None
        for i in range(N):
            t = time.time()
            o = m.execute([x[i] for x in ins])
            times.append(time.time() - t)
            o = [y.clone().numpy() for y in o]
            acc = [[y] for y in o] if acc is None else [[*a, y] for a, y in zip(acc, o, strict=False)]
        outs = [np.stack(a) for a in acc]
    else:
        for _ in range(n):
            t = time.time()
            o = m.execute(ins)
            times.append(time.time() - t)
        outs = [y.clone().numpy() for y in o]
    np.savez(job["outputs"], **{str(i): y for i, y in enumerate(outs)})
    return dict(load_s=load, run_s=times, dtypes=[str(y.dtype) for y in outs], shapes=[list(y.shape) for y in outs])


if __name__ == "__main__":
    what, job, res = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
    import resource

    def one(what, job):
        try:
            return {"compile": _compile, "run": _run}[what](job)
        except Exception as e:
            import traceback

            traceback.print_exc()
            return dict(error=f"{type(e).__name__}: {e}"[:3000])

    if what == "many":  # a list of [what, job]; results so far survive a native abort in the file res
        out = dict(results=[])
        for w, j in job["jobs"]:
            print("=== JOB", w, j, flush=True)
            out["results"].append(one(w, j))
            json.dump(out, open(res, "w"))
    else:
        out = one(what, job)
    out["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    json.dump(out, open(res, "w"))
    sys.stdout.flush()
    os._exit(0)
