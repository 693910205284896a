// A kernel's units, one per instruction set: where every list of them comes from. C only, for units include it too.
#pragma once

// In <op>_kernels.h, behind `struct Kernels`: the table that each unit <op>_<isa>.cpp defines.
#define PGOLF_DECLARE_UNITS      \
  namespace generic {            \
  extern const Kernels kKernels; \
  }                              \
  namespace avx2 {               \
  extern const Kernels kKernels; \
  }                              \
  namespace avx512 {             \
  extern const Kernels kKernels; \
  }                              \
  namespace avx512bf16 {         \
  extern const Kernels kKernels; \
  }                              \
  namespace amx {                \
  extern const Kernels kKernels; \
  }

// In <op>_cpu.cpp, for choose() of isa.h: level and table, best first; the last runs everywhere.
#if defined(__x86_64__)
#define PGOLF_UNITS                                                                                \
  {4, &amx::kKernels}, {3, &avx512bf16::kKernels}, {2, &avx512::kKernels}, {1, &avx2::kKernels}, { \
    0, &generic::kKernels                                                                          \
  }
#else
#define PGOLF_UNITS {0, &generic::kKernels}
#endif
