"""A program with the options, outputs and log of ExecuTorch's qnn_executor_runner, on the real runtime and emulator."""

import argparse
import time
from pathlib import Path

import torch
from executorch.runtime import Runtime

parser = argparse.ArgumentParser()
for option in ("--model_path", "--input_list_path", "--output_folder_path"):
    parser.add_argument(option, required=True)
asked = parser.parse_args()

DTYPES = {0: torch.uint8, 3: torch.int32, 6: torch.float32, 27: torch.uint16}  # by number in the program
program = Runtime.get().load_program(Path(asked.model_path).read_bytes())
method = program.load_method("forward")
meta = [method.metadata.input_tensor_meta(i) for i in range(method.metadata.num_inputs())]
total, lines = 0.0, Path(asked.input_list_path).read_text().splitlines()
for number, line in enumerate(lines):
    inputs = [
        torch.frombuffer(bytearray(Path(file).read_bytes()), dtype=DTYPES[about.dtype()]).reshape(about.sizes())
        for file, about in zip(line.split(" "), meta, strict=True)
    ]
    start = time.perf_counter()
    outputs = method.execute(inputs)
    ms = (time.perf_counter() - start) * 1e3
    total += ms
    print(f"I qnn_executor_runner.cpp] 1 inference took {ms:f} ms, avg {ms:f} ms", flush=True)
    for i, output in enumerate(outputs):
        Path(asked.output_folder_path, f"output_{number}_{i}.raw").write_bytes(output.contiguous().numpy().tobytes())
print(f"I qnn_executor_runner.cpp] {len(lines)} inference took {total:f} ms, avg {total / len(lines):f} ms")
