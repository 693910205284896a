// AMX tiles for units compiled for level amx: eight registers of 16 rows x 64 bytes, numbered by template arguments.
//
// With PGOLF_EMULATE_AMX the instructions are plain C++ on ordinary memory: the layouts and loops built on them can
// then be tested on CPUs without AMX and under AddressSanitizer, which does not see the real instructions' accesses.
#pragma once
#include "common/simd.h"

namespace pgolf::PGOLF_ISA {

#if defined(PGOLF_EMULATE_AMX)

struct Tile {
  alignas(64) uint8_t row[16][64];
};
static thread_local Tile tile_registers[8];

struct TileScope {};

template <int T>
PGOLF_INLINE void tile_zero() {
  memset(&tile_registers[T], 0, sizeof(Tile));
}
template <int T>
PGOLF_INLINE void tile_load(const void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tile_registers[T].row[i], (const char*)p + i * stride, 64);
}
template <int T>
PGOLF_INLINE void tile_stream(const void* p, int64_t stride) {
  tile_load<T>(p, stride);
}
template <int T>
PGOLF_INLINE void tile_store(void* p, int64_t stride) {
  for (int i = 0; i < 16; ++i) memcpy((char*)p + i * stride, tile_registers[T].row[i], 64);
}
// C += A B: A 16 rows x 32 bfloat16, B 16 pairs of rows x 16 columns, C 16 x 16 float.
template <int C, int A, int B>
PGOLF_INLINE void tile_multiply_bf16() {
  for (int i = 0; i < 16; ++i) {
    __m512 c = _mm512_load_ps(tile_registers[C].row[i]);
    for (int k = 0; k < 16; ++k) {
      int32_t pair;
      memcpy(&pair, tile_registers[A].row[i] + 4 * k, 4);
      c = _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)_mm512_load_si512(tile_registers[B].row[k]));
    }
    _mm512_store_ps(tile_registers[C].row[i], c);
  }
}

#else

// Configures the tiles of this thread for as long as it lives; released at the end, because a context switch saves
// 8 KB of tiles in use.
struct TileScope {
  TileScope() {
    struct __attribute__((packed)) {
      uint8_t palette, start_row, reserved[14];
      uint16_t bytes_per_row[16];
      uint8_t rows[16];
    } config = {};
    config.palette = 1;
    for (int t = 0; t < 8; ++t) config.bytes_per_row[t] = 64, config.rows[t] = 16;
    __asm__ volatile("ldtilecfg %0" ::"m"(config));
  }
  ~TileScope() { __asm__ volatile("tilerelease" ::: "memory"); }
};

// Our own statements, because GCC 12's intrinsics do not tell the compiler that they touch memory.
template <int T>
PGOLF_INLINE void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
PGOLF_INLINE void tile_load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
// Past the first-level cache, which is left to the other operand: 2.6 instead of 2.0 TFLOP/s a core.
template <int T>
PGOLF_INLINE void tile_stream(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int T>
PGOLF_INLINE void tile_store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
PGOLF_INLINE void tile_multiply_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace pgolf::PGOLF_ISA
