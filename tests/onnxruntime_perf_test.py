"""A program with the options, log and result file of onnxruntime_perf_test, on the real ONNX Runtime."""

import argparse
import resource
import time
from pathlib import Path

import onnx
import onnxruntime
from onnx import numpy_helper

parser = argparse.ArgumentParser()
parser.add_argument("-e", choices=["cpu"])
parser.add_argument("-m", choices=["times"])
for option in ("-r", "-x", "-o"):
    parser.add_argument(option, type=int)
parser.add_argument("-C", default="")
parser.add_argument("model", type=Path)
parser.add_argument("results", type=Path)
asked = parser.parse_args()

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = asked.x
for entry in asked.C.split():
    options.add_session_config_entry(*entry.split("|"))
start = time.perf_counter()
session = onnxruntime.InferenceSession(asked.model, options, providers=["CPUExecutionProvider"])
print(f"Session creation time cost: {time.perf_counter() - start:g} s")

feeds = {}
for file in (asked.model.parent / "test_data_set_0").glob("input_*.pb"):
    tensor = onnx.load_tensor(file)
    feeds[tensor.name] = numpy_helper.to_array(tensor)
session.run(None, feeds)
times = []
for _ in range(asked.r):
    start = time.perf_counter()
    session.run(None, feeds)
    times.append(time.perf_counter() - start)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
with asked.results.open("a") as stream:
    for number, seconds in enumerate(times):
        stream.write(f"model,{seconds:g},{peak},12,{number}\n")
