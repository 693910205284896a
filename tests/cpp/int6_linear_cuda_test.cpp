// The CUDA int6_linear under the emulation, on arguments that end where AddressSanitizer sees every byte too many.
// Guard pages cannot: an aligned word with one byte inside never crosses a page.
#include <stdio.h>

#include <vector>

#include "int6_linear/int6_linear_cuda.cu"

using pgolf::DType;

// Exactly `bytes` of memory, freed at the end of the program.
static uint8_t* exactly(int64_t bytes) {
  static std::vector<std::vector<uint8_t>> all;
  all.emplace_back(bytes, uint8_t(0x3c));
  all.back().shrink_to_fit();
  return all.back().data();
}

int main() {
  const int64_t sizes[][2] = {{1, 1}, {3, 5}, {17, 63}, {9, 32}, {8, 160}, {10, 129}, {7, 500}, {5, 1100}, {1033, 32}};
  for (const DType dtype : {DType::float32, DType::bfloat16, DType::float16}) {
    for (const auto& [N, K] : sizes) {
      for (const int64_t M : {1, 8, 9, 17}) {
        if (N > 1000 && M != 9) continue;
        const int64_t size = pgolf::size_of(dtype), packed_bytes = N * 3 * ((K + 3) / 4);
        const auto x = exactly(M * K * size), packed = exactly(packed_bytes), bias = exactly(N * size);
        const auto scale = reinterpret_cast<uint16_t*>(exactly(2 * N));
        const auto y = exactly(M * N * size);
        pgolf::int6_linear::cuda::forward({x, packed, scale, bias, y, M, N, K, dtype}, packed_bytes, 0, 0);
      }
    }
  }
  puts("done");
}
