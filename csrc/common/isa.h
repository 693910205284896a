// Which instruction sets this CPU has, and which of them a kernel runs with.
//
// A kernel comes as units, one object file per instruction set, each exporting one table of function pointers. choose()
// picks the best unit the CPU can run; PGOLF_ISA=<level> (a machine fact: "pretend to be an older CPU") lowers that for
// the whole process, and tests force one level per call. The levels are ordered: each includes the ones before it.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "common/check.h"

#if defined(__x86_64__)
#include <cpuid.h>
#define PGOLF_X86 1
#else
#define PGOLF_X86 0
#endif
#if defined(__linux__) && PGOLF_X86
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pgolf {

constexpr const char* kIsaLevels[] = {"generic", "avx2", "avx512", "avx512bf16", "amx"};
constexpr int kNumIsaLevels = 5;

using Feature = std::pair<const char*, bool>;

// Name and presence of every feature the levels are made of; a feature whose registers the OS does not save is absent.
inline std::vector<Feature> detect_features() {
  uint32_t l1c = 0, l7b = 0, l7c = 0, l7d = 0, l71a = 0;
  uint64_t saved = 0;  // XCR0: which register files the OS saves on a context switch
#if PGOLF_X86
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d)) l1c = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) l7b = b, l7c = c, l7d = d;
  if (a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) l71a = a;
  if (l1c >> 27 & 1) {  // OSXSAVE
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    saved = uint64_t(high) << 32 | low;
  }
#endif
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6;
#if defined(PGOLF_EMULATE_AMX)
  l7d |= 0xdu << 22, saved |= 0x60000;  // amx.h brings tiles of its own
#endif
  bool tiles = (saved & 0x60000) == 0x60000 && (l7d >> 24 & 1);
#if defined(__linux__) && PGOLF_X86 && !defined(PGOLF_EMULATE_AMX)
  // Linux hands out the 8 KB tile state per process, on request: ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA.
  tiles = tiles && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#elif !defined(PGOLF_EMULATE_AMX)
  tiles = false;
#endif
  return {
      {"avx2", ymm && (l7b >> 5 & 1)},        {"fma", ymm && (l1c >> 12 & 1)},
      {"f16c", ymm && (l1c >> 29 & 1)},       {"bmi2", bool(l7b >> 8 & 1)},
      {"avx512f", zmm && (l7b >> 16 & 1)},    {"avx512dq", zmm && (l7b >> 17 & 1)},
      {"avx512bw", zmm && (l7b >> 30 & 1)},   {"avx512vl", zmm && (l7b >> 31 & 1)},
      {"avx512vbmi", zmm && (l7c >> 1 & 1)},  {"avx512vnni", zmm && (l7c >> 11 & 1)},
      {"avx512bf16", zmm && (l71a >> 5 & 1)}, {"amx_tile", tiles},
      {"amx_bf16", tiles && (l7d >> 22 & 1)}, {"amx_int8", tiles && (l7d >> 25 & 1)},
  };
}

inline const std::vector<Feature>& cpu_features() {
  static const std::vector<Feature> features = detect_features();
  return features;
}

inline bool has(const char* name) {
  for (const auto& [feature, present] : cpu_features())
    if (std::string(feature) == name) return present;
  fail("isa: unknown CPU feature ", name);
}

// The best level this CPU and OS can run, as an index into kIsaLevels.
inline int cpu_level() {
  static const int level = [] {
    if (!(has("avx2") && has("fma") && has("f16c") && has("bmi2"))) return 0;
    if (!(has("avx512f") && has("avx512dq") && has("avx512bw") && has("avx512vl"))) return 1;
    if (!(has("avx512bf16") && has("avx512vbmi") && has("avx512vnni"))) return 2;
    return has("amx_tile") && has("amx_bf16") && has("amx_int8") ? 4 : 3;
  }();
  return level;
}

// The level called `name`, which must exist and run here.
inline int level_of(const std::string& name, const char* who) {
  std::string runnable;
  for (int i = 0; i <= cpu_level(); ++i) {
    if (name == kIsaLevels[i]) return i;
    runnable += (i ? ", " : "") + std::string(kIsaLevels[i]);
  }
  fail(who, " must name an instruction set this CPU can run (", runnable, "), got '", name, "'");
}

// The level kernels use unless told otherwise: the CPU's, or what PGOLF_ISA lowers it to. Read once.
inline int default_level() {
  static const int level = [] {
    const char* forced = std::getenv("PGOLF_ISA");
    return forced && *forced ? level_of(forced, "PGOLF_ISA") : cpu_level();
  }();
  return level;
}

template <class Table>
struct Unit {
  int level;  // index into kIsaLevels
  const Table* table;
};

// The best of `units` (best first) at or below the default level, or exactly the one called `forced` if that is given.
template <class Table, size_t N>
const Table& choose(const Unit<Table> (&units)[N], const std::string& forced, const char* op) {
  const int level = forced.empty() ? default_level() : level_of(forced, "isa");
  for (const auto& unit : units)
    if (forced.empty() ? unit.level <= level : unit.level == level) return *unit.table;
  std::string names;
  for (const auto& unit : units) names += (names.empty() ? "" : ", ") + std::string(kIsaLevels[unit.level]);
  fail(op, ": isa must be one of ", names, ", got '", forced, "'");
}

}  // namespace pgolf
