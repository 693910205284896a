// csrc/common as plain C++: prints nothing and returns 0, or says which line failed. Run by test_common.py.
#include <cstdio>
#include <cstring>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"

#define EXPECT(condition)                                         \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      return 1;                                                   \
    }                                                             \
  } while (0)

static int every_piece_runs_once() {
  for (int64_t n : {0, 1, 2, 7, 1000}) {
    for (int threads : {0, 1, 2, 5}) {
      std::vector<std::atomic<int>> seen(n);
      std::atomic<bool> worker_in_range{true};
      pgolf::parallel_for(n, threads, [&](int64_t i, int worker) {
        ++seen[i];
        if (worker < 0 || worker >= std::max(1, threads)) worker_in_range = false;
      });
      for (const auto& count : seen) EXPECT(count == 1);
      EXPECT(worker_in_range);
    }
  }
  return 0;
}

static int exceptions_reach_the_caller() {
  for (int threads : {1, 4}) {
    std::string caught;
    try {
      pgolf::parallel_for(100, threads, [](int64_t i, int) {
        if (i == 13) pgolf::fail("piece ", i);
      });
    } catch (const std::invalid_argument& e) {
      caught = e.what();
    }
    EXPECT(caught == "piece 13");
  }
  return 0;
}

static int scratch_is_aligned_and_grows() {
  pgolf::Scratch<float> scratch;
  for (size_t n : {1, 17, 1000, 600000, 5}) {
    float* p = scratch.need(n);
    EXPECT(reinterpret_cast<uintptr_t>(p) % 64 == 0);
    std::memset(p, 0xff, n * sizeof(float));
    EXPECT(scratch.get() == p);
  }
  return 0;
}

static int levels_are_chosen_and_refused() {
  const int best = pgolf::cpu_level(), top = pgolf::kNumIsaLevels - 1;
  const int low = 0, high = 1;
  // A level above the process's must not be taken, even if it is the first row.
  const pgolf::Unit<int> units[] = {{top, &high}, {0, &low}};
  EXPECT(&pgolf::choose(units, "", "test") == (pgolf::default_level() < top ? &low : &high));
  EXPECT(&pgolf::choose(units, "generic", "test") == &low);
  std::string message;
  try {
    pgolf::choose(units, "z80", "test");
  } catch (const std::invalid_argument& e) {
    message = e.what();
  }
  EXPECT(message.find("isa must name an instruction set this CPU can run (generic") == 0);
  EXPECT(message.find("got 'z80'") != std::string::npos);
  if (best > 0 && best < top) {  // a level the CPU has and the op has not
    message.clear();
    try {
      pgolf::choose(units, pgolf::kIsaLevels[best], "test");
    } catch (const std::invalid_argument& e) {
      message = e.what();
    }
    EXPECT(message.find("test: isa must be one of ") == 0);
  }
  return 0;
}

int main() {
  return every_piece_runs_once() | exceptions_reach_the_caller() | scratch_is_aligned_and_grows() |
         levels_are_chosen_and_refused();
}
