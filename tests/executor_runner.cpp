// A runner with the options and the log of ExecuTorch's executor_runner, as far as a benchmark needs them:
// --model_path, --inputs (comma-separated files), --output_file (prefix), --num_executions, --cpu_threads.

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>
#include <sched.h>

using executorch::extension::from_blob;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::EValue;
using Clock = std::chrono::steady_clock;

static double since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

static int fail(const char* what) {
  std::fprintf(stderr, "E executor_runner.cpp] %s\n", what);
  return 1;
}

int main(int argc, char** argv) {
  std::map<std::string, std::string> asked{{"--num_executions", "1"}, {"--cpu_threads", "1"}};
  for (int i = 1; i + 1 < argc; i += 2) asked[argv[i]] = argv[i + 1];
  cpu_set_t cores;  // the headers of the wheel lack the thread pool's: pin instead of resizing it
  CPU_ZERO(&cores);
  for (int i = 0; i < std::stoi(asked["--cpu_threads"]); ++i) CPU_SET(i, &cores);
  sched_setaffinity(0, sizeof cores, &cores);

  auto start = Clock::now();
  Module module(asked["--model_path"]);
  if (module.load_forward() != executorch::runtime::Error::Ok) return fail("the program does not load");
  std::printf("I executor_runner.cpp] Model loaded in %f ms.\n", since(start));

  auto about = module.method_meta("forward");
  std::vector<std::vector<char>> data;
  std::vector<TensorPtr> tensors;
  std::vector<EValue> inputs;
  std::stringstream files(asked["--inputs"]);
  for (std::string file; std::getline(files, file, ',');) {
    std::ifstream stream(file, std::ios::binary);
    data.emplace_back(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
  }
  for (size_t i = 0; i < data.size(); ++i) {
    auto meta = about->input_tensor_meta(i);
    if (!meta.ok() || meta->nbytes() != data[i].size()) return fail("an input has another size than the program's");
    std::vector<executorch::aten::SizesType> sizes(meta->sizes().begin(), meta->sizes().end());
    tensors.push_back(from_blob(data[i].data(), sizes, meta->scalar_type()));
    inputs.emplace_back(*tensors.back());
  }

  const int count = std::stoi(asked["--num_executions"]);
  for (int i = 0; i < count; ++i) {
    start = Clock::now();
    auto outputs = module.forward(inputs);
    const double ms = since(start);
    if (!outputs.ok()) return fail("the program does not run");
    std::printf("I executor_runner.cpp] Iteration %d of %d: %f ms\n", i + 1, count, ms);
    for (size_t o = 0; o < outputs->size() && i + 1 == count; ++o) {
      const auto tensor = outputs->at(o).toTensor();
      std::ofstream stream(asked["--output_file"] + "-" + std::to_string(o) + ".bin", std::ios::binary);
      stream.write(tensor.const_data_ptr<char>(), static_cast<std::streamsize>(tensor.nbytes()));
    }
  }
  return 0;
}
