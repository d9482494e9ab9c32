"""Texts of a bundle: what was quantized how, and how to push and run each artifact."""

from __future__ import annotations

from collections import Counter
from typing import Any

from edgeforge.bundle import Manifest
from edgeforge.ir.graph import Graph
from edgeforge.ir.rules import RULES
from edgeforge.target import Target

#: What a phone needs per backend, and the command that runs the artifact.
PHONE = {
    "simulator": (
        "nothing: this is EdgeForge's own evaluator",
        "edgeforge simulate . --input FILE.npz --output FILE.npz",
    ),
    "onnx_qdq": (
        "ONNX Runtime 1.32 (onnxruntime-android), session entry session.qdq_matmulnbits_accuracy_level=1",
        "adb push artifacts/onnx_qdq/model.onnx /data/local/tmp/edgeforge/",
    ),
    "ort_qnn": (
        "ONNX Runtime 1.32 with the QNN execution provider and QNN 2.49 (libQnnHtp.so, the Hexagon skel of the chip)",
        "adb push artifacts/ort_qnn/. /data/local/tmp/edgeforge/   # load the EPContext model with the QNN provider",
    ),
    "executorch_xnnpack": (
        "the ExecuTorch 1.5.1 runner with XNNPACK",
        "adb push artifacts/executorch_xnnpack/model.pte /data/local/tmp/edgeforge/ && adb shell "
        "/data/local/tmp/edgeforge/executor_runner --model_path /data/local/tmp/edgeforge/model.pte",
    ),
    "executorch_qnn": (
        "the ExecuTorch 1.5.1 QNN runner and QNN 2.49 (libQnnHtp.so, libQnnSystem.so, the Hexagon stub and skel)",
        "adb push artifacts/executorch_qnn/model.pte /data/local/tmp/edgeforge/ && adb shell "
        "LD_LIBRARY_PATH=/data/local/tmp/edgeforge ADSP_LIBRARY_PATH=/data/local/tmp/edgeforge "
        "/data/local/tmp/edgeforge/qnn_executor_runner --model_path /data/local/tmp/edgeforge/model.pte",
    ),
}


def bundle_readme(target: Target, fields: dict[str, Any]) -> str:
    """README.txt: per artifact what the phone needs, the exact command, and what was only emulated."""
    lines = [f"{fields['model']} for {target.name} ({target.description}), {fields['precision']}", ""]
    if not fields["calibrated"]:
        lines += ["UNCALIBRATED: ranges come from random data; outputs are meaningless.", ""]
    for name, record in fields["backends"].items():
        needs, command = PHONE.get(name, ("see the backend's documentation", ""))
        if fields.get("language") and record.files:
            apart = any("/decode/" in file for file in record.files)
            command = command.replace(f"artifacts/{name}/", f"artifacts/{name}/decode/") if apart else command
            needs += "; prefill/ and decode/ hold one artifact each" if apart else "; methods prefill and decode"
        lines.append(f"[{name}]")
        if record.status != "built":
            lines += [f"  not built: {record.reason}", ""]
            continue
        lines += [f"  needs: {needs}", f"  run:   {command}"]
        lines += [f"  option: {key}={value}" for key, value in record.options.items()]
        lines += [f"  edit: {edit.where}: {edit.what} ({edit.why})" for edit in record.edits[:20]]
        lines += [f"  note: {note}" for note in record.notes]
        if record.islands:
            lines.append(f"  runs in float there: {len(record.islands)} node(s), listed in manifest.json")
        lines.append("")
    if (language := fields.get("language")) and language["prefix"]:
        lines += [
            f"{language['prefix']} holds row 0 of the cache, of token {language['bos']}, which begins every text,",
            "and the logits behind it. No graph computes that token: the next one is fed first, at position 1.",
        ]
    lines += [
        "manifest.json gives the type of each input and output, of integer codes also scale and zero point.",
        "golden.safetensors holds inputs, float outputs and the simulator's outputs to compare with.",
        "Everything here was compiled and emulated on a workstation; nothing has run on a phone.",
    ]
    return "\n".join(lines) + "\n"


def deviations(graph: Graph, manifest: Manifest) -> list[str]:
    """What a reader of the graph should know besides: widths, exceptions to the precision, float islands."""
    widths = Counter(graph.type(node.output).dtype for node in graph.nodes)
    lines = ["activations: " + ", ".join(f"{count} {dtype}" for dtype, count in sorted(widths.items()))]
    lines += [f"not {manifest.precision}: {name} {dtype}" for name, dtype in manifest.exceptions.items()]
    for name, record in manifest.backends.items():
        lines += [f"float on {name}: {node}" for node in record.islands]
    return lines


def quantization_report(graph: Graph, fields: dict[str, Any]) -> str:
    """report.md: precision map, rounding rules and their status, exceptions, backends."""
    widths = Counter(graph.type(node.output).dtype for node in graph.nodes)
    rules = Counter(node.rule for node in graph.nodes if node.rule)
    lines = [
        f"# {fields['model']}: {fields['precision']} for {fields['target']}",
        "",
        f"Calibration: {fields['calibration']}{'' if fields['calibrated'] else ' (**uncalibrated**)'}. "
        f"{len(graph.nodes)} nodes, {graph.level} graph `{fields['graph_hash'][:16]}`.",
        "",
        *(f"- {f.name}: {f.value:.6g} {f.unit} ({f.kind}; {f.source})" for f in fields["figures"]),
        "",
        "| activations | nodes |",
        "|---|---|",
        *(f"| {dtype} | {count} |" for dtype, count in sorted(widths.items())),
        "",
        "| rounding rule | nodes | status |",
        "|---|---|---|",
        *(f"| {rule} | {count} | {RULES[rule].status} {RULES[rule].note} |" for rule, count in sorted(rules.items())),
        "",
        "| backend | status | float islands | edits |",
        "|---|---|---|---|",
    ]
    for name, record in fields["backends"].items():
        status = record.status if record.status == "built" else f"skipped: {record.reason}"
        lines.append(f"| {name} | {status} | {len(record.islands)} | {len(record.edits)} |")
    if fields["exceptions"]:
        lines += ["", f"Widths that differ from {fields['precision']}:", ""]
        lines += [f"- `{name}`: {dtype}" for name, dtype in fields["exceptions"].items()]
    if fields["notes"]:
        lines += ["", *(f"- {note}" for note in fields["notes"])]
    return "\n".join(lines) + "\n"
