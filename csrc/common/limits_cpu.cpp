// limits.h: the best of several timed rounds, because whatever else runs on the machine only makes a round slower.
#include "common/limits.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "common/isa.h"
#include "common/limits_kernels.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pgolf {

namespace limits {
static const Unit<Kernels> kUnits[] = {PGOLF_UNITS};
}

namespace {

constexpr int kRounds = 20;
constexpr double kRoundSeconds = 0.01;

// The most work per second of kRounds rounds; work(repeats) does some on every thread and returns how much.
template <class Work>
double best_rate(const Work& work) {
  double best = 0;
  const auto seconds_of = [&](int64_t repeats) {
    const auto start = std::chrono::steady_clock::now();
    const double amount = work(repeats);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, amount / seconds);
    return seconds;
  };
  int64_t repeats = 1;  // enough of them if not even the fastest of three rounds is too short: one may have waited
  while (std::min({seconds_of(repeats), seconds_of(repeats), seconds_of(repeats)}) < kRoundSeconds) repeats *= 2;
  for (int i = 0; i < kRounds; ++i) seconds_of(repeats);
  return best;
}

}  // namespace

double peak_operations(DType dtype, int threads, const std::string& isa) {
  const auto& kernels = choose(limits::kUnits, isa, "limits");
  threads = std::max(1, threads);
  std::vector<Scratch<char>> operands(threads);
  for (auto& own : operands) kernels.fill(dtype, own.need(kernels.operand_bytes(dtype)));
  return best_rate([&](int64_t repeats) {
    std::vector<double> done(threads);
    parallel_for(threads, threads,
                 [&](int64_t i, int) { done[i] = kernels.multiply(dtype, operands[i].get(), repeats); });
    double total = 0;
    for (double d : done) total += d;
    return total;
  });
}

double read_bandwidth(int64_t bytes, int threads, const std::string& isa) {
  PGOLF_CHECK(bytes > 0, "limits: bytes must be > 0, got ", bytes);
  const auto& kernels = choose(limits::kUnits, isa, "limits");
  threads = std::max(1, threads);
  const int64_t n = (bytes / 4 + 255) / 256 * 256;
  std::vector<Scratch<float>> memory(threads);
  for (auto& own : memory) std::fill_n(own.need(n), n, 1.0f);
  std::vector<float> sums(threads);  // kept, so that the reading cannot be optimised away
  const double rate = best_rate([&](int64_t repeats) {
    parallel_for(threads, threads, [&](int64_t i, int) {
      for (int64_t r = 0; r < repeats; ++r) sums[i] = kernels.read(memory[i].get(), n);
    });
    return 4.0 * n * repeats * threads;
  });
  for (float sum : sums) PGOLF_CHECK(sum > 0, "limits: the sum of ones is ", sum);
  return rate;
}

}  // namespace pgolf
