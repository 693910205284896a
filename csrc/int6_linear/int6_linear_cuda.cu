// int6_linear on a GPU for few rows of x: the weight is read once, in the layout it has on disk, and decoded to exact
// 16-bit floats for the tensor cores.
//
// What bounds it is one latency of memory: 1536 x 512 codes are 590 kB, which 132 multiprocessors ask for at once. So
// every warp asks for its codes first, then for x, and nothing but one barrier lies between them and y.
//
// The surprise is that the disk's layout costs as much to decode as one made for it. What has to come out are words of
// two 16-bit floats. 12 bytes hold 4 groups of 4 codes; a byte permutation puts the same 16 bits of two groups into the
// halves of a word, and a shift and one logic operation then give the mantissas of two codes at once (columns k and
// k + 4). Per 16 codes: 4 permutations, 6 shifts, 8 logic operations, 8 fused multiply-adds: 1.6 instructions a weight.
// A layout in planes of 4 and 2 bits, or of 2 x 16 bits with the spare bits put together, takes 17 instead of 18 before
// the multiply-adds, and would have to be kept beside the weight. Neighbours of x are permuted likewise, 8 instructions
// per 16 columns and 8 rows.
#include "int6_linear/int6_linear_cuda.h"

#include "common/check.h"
#include "common/cuda_mma.h"

namespace pgolf::int6_linear::cuda {
namespace {

constexpr int kTileRows = 8;      // of the weight in one tensor-core product
constexpr int kLaneColumns = 32;  // neighbouring columns of one lane: 24 bytes of codes
constexpr int kLaneWords = 3 * kLaneColumns / 16;
constexpr int kChunk = 4 * kLaneColumns;  // columns of one step of a warp
constexpr int kMaxWarps = 8;
constexpr int64_t kMaxGridRows = 65535;  // blocks along y
// From 129 tiles of 8 rows on, a large GPU's multiprocessors would hold several, each reading 16 rows of x.
constexpr int64_t kManyWeightRows = 128 * kTileRows;

struct Args {
  Problem p;
  int K;
  int64_t row_bytes;
};

// What x is split into for the tensor cores. A float32 is the sum of three bfloat16, and codes are exact in bfloat16,
// so float32 costs three times the products and no accuracy. Chains: sums that do not wait for each other.
//
// Decoding sets the exponent at which a step of the mantissa is 1, so that the code c in the mantissa makes 128 + c or
// 1024 + c, and subtracts what is too much: 160 or 1056, because c stands for c - 32.
template <class T>
struct Format;
template <>
struct Format<Bf16> {
  using Part = Bf16;
  static constexpr int kParts = 1, kChains = 2;
  static constexpr unsigned kExponent = 0x43004300, kOne = 0x3f803f80, kMinusOffset = 0xc320c320;
};
template <>
struct Format<Half> {
  using Part = Half;
  static constexpr int kParts = 1, kChains = 2;
  static constexpr unsigned kExponent = 0x64006400, kOne = 0x3c003c00, kMinusOffset = 0xe420e420;
};
template <>
struct Format<float> {
  using Part = Bf16;
  static constexpr int kParts = 3, kChains = 3;
};

// What is beyond the last column of x, for a lane that lies there.
alignas(16) __device__ const unsigned kZeros[kLaneColumns] = {};

// The word at `at`, of which only what lies in packed may be touched.
__device__ __forceinline__ unsigned word_inside(const Args& a, const uint8_t* at) {
  const uint8_t *first = a.p.packed, *last = first + a.p.N * a.row_bytes;
  if (at >= first && at + 4 <= last) return *reinterpret_cast<const unsigned*>(at);
  unsigned word = 0;
  for (int i = 0; i < 4; ++i)
    if (at + i >= first && at + i < last) word |= unsigned(at[i]) << 8 * i;
  return word;
}

// The lane's codes from `column` on of the weight row at `row`. Beyond the last column any codes: there x is 0.
// No branches where kAligned: loads under a condition are moved down to their first use, one latency each.
template <bool kAligned>
__device__ __forceinline__ void load_codes(const Args& a, const uint8_t* row, int column,
                                           unsigned (&words)[kLaneWords]) {
  if constexpr (kAligned) {
    const uint2* at = reinterpret_cast<const uint2*>(row + (column < a.K ? column : 0) / 4 * 3);
#pragma unroll
    for (int i = 0; i < kLaneWords / 2; ++i) {
      const uint2 two = at[i];
      words[2 * i] = two.x, words[2 * i + 1] = two.y;
    }
  } else {
    const uint8_t *at = row + (column < a.K ? column : 0) / 4 * 3, *last = row + a.row_bytes;
    const unsigned beyond = unsigned(reinterpret_cast<uintptr_t>(at) & 3);
    unsigned low = word_inside(a, at - beyond);
#pragma unroll
    for (int i = 0; i < kLaneWords; ++i) {
      const uint8_t* next = at - beyond + 4 * (i + 1);
      const unsigned high = next < last ? word_inside(a, next) : 0;
      words[i] = __funnelshift_r(low, high, 8 * beyond);
      low = high;
    }
  }
}

// The lane's columns of the row of x at `row`, as they lie in memory; zeros beyond the last column.
template <class T, bool kAligned>
__device__ __forceinline__ void load_x(const Args& a, const T* row, int column,
                                       unsigned (&words)[kLaneColumns * sizeof(T) / 4]) {
  constexpr int kWords = kLaneColumns * sizeof(T) / 4;
  if constexpr (kAligned) {
    const uint4* at = reinterpret_cast<const uint4*>(column < a.K ? row + column : reinterpret_cast<const T*>(kZeros));
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 four = at[i];
      words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
    }
  } else {
    const int count = a.K - column;
#pragma unroll
    for (unsigned& word : words) word = 0;
#pragma unroll
    for (int i = 0; i < kLaneColumns; ++i) {
      if constexpr (sizeof(T) == 4) {
        if (i < count) words[i] = __float_as_uint(row[column + i]);
      } else {
        if (i < count) words[i / 2] |= unsigned(row[column + i].bits) << 16 * (i % 2);
      }
    }
  }
}

// Codes as floats: of group 0 in the low and group 1 in the high halves, then of groups 2 and 3, four words each.
template <class Part>
__device__ __forceinline__ void decode(const unsigned* w, unsigned (&codes)[8]) {
  constexpr unsigned kCode = 0x003f003f, kExponent = Format<Part>::kExponent;
  const unsigned first[2] = {__byte_perm(w[0], w[1], 0x4310), __byte_perm(w[1], w[2], 0x6532)};   // bytes 0 and 1
  const unsigned second[2] = {__byte_perm(w[0], w[1], 0x5421), __byte_perm(w[1], w[2], 0x7643)};  // bytes 1 and 2
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    codes[4 * i] = (first[i] & kCode) | kExponent;
    codes[4 * i + 1] = (first[i] >> 6 & kCode) | kExponent;
    codes[4 * i + 2] = (second[i] >> 4 & kCode) | kExponent;
    codes[4 * i + 3] = (second[i] >> 10 & kCode) | kExponent;
  }
#pragma unroll
  for (unsigned& code : codes) code = fma_pairs<Part>(code, Format<Part>::kOne, Format<Part>::kMinusOffset);
}

// Columns k and k + 4 of x as a word, of the columns that `words` starts with: the parts of each.
template <class T>
__device__ __forceinline__ void pair_up(const unsigned* words, int k, unsigned (&parts)[1]) {
  parts[0] = __byte_perm(words[k / 2], words[k / 2 + 2], k % 2 ? 0x7632 : 0x5410);
}
template <class T>
__device__ __forceinline__ void pair_up(const unsigned* words, int k, unsigned (&parts)[3]) {
  unsigned x[2] = {words[k], words[k + 4]};
  float rest[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float whole = __uint_as_float(x[i]), cut = __uint_as_float(x[i] & 0xffff0000);
    rest[i] = fabsf(whole) < INFINITY ? whole - cut : 0.0f;
    if (whole != whole) x[i] = 0x7fffffff;  // it may have been a NaN by its low bits
  }
  parts[0] = __byte_perm(x[0], x[1], 0x7632);
  parts[1] = __byte_perm(__float_as_uint(rest[0]), __float_as_uint(rest[1]), 0x7632);
#pragma unroll
  for (float& r : rest) r -= __uint_as_float(__float_as_uint(r) & 0xffff0000);
  parts[2] = __byte_perm(__float_as_uint(rest[0]), __float_as_uint(rest[1]), 0x7632);
}

// acc += the products of a chunk: x and the codes as they were loaded.
template <class T, int kRowHalves, int kTiles>
__device__ __forceinline__ void multiply(const unsigned (&x)[kRowHalves][kLaneColumns * sizeof(T) / 4],
                                         const unsigned (&words)[kTiles][kLaneWords],
                                         float (&acc)[kTiles][Format<T>::kChains][4]) {
  using Part = typename Format<T>::Part;
  constexpr int kParts = Format<T>::kParts;
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // of the lane's columns
    unsigned codes[kTiles][8];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) decode<Part>(words[i] + 3 * half, codes[i]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // two columns each of two groups
      unsigned pairs[2][2][kParts] = {};    // [rows of x][columns]
#pragma unroll
      for (int i = 0; i < kRowHalves; ++i)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          pair_up<T>(x[i] + (2 * half + step / 2) * 2 * sizeof(T), step % 2 * 2 + j, pairs[i][j]);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const unsigned rows[4] = {pairs[0][0][part], pairs[1][0][part], pairs[0][1][part], pairs[1][1][part]};
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          const unsigned weights[2] = {codes[i][2 * step], codes[i][2 * step + 1]};
          mma_16x8x16<Part>(rows, weights, acc[i][kParts == 1 ? half : part]);
        }
      }
    }
  }
}

// A block computes 8 kRowHalves rows of x by 8 kTiles rows of the weight; its warps share out the columns.
// kAligned: K is a multiple of 32, packed lies at a multiple of 8 bytes and x at one of 16. (Else ptxas may have all
// the registers of a multiprocessor: told nothing, it spills for sm_80 to fit one block more.)
template <class T, int kRowHalves, int kTiles, bool kAligned>
__global__ void __launch_bounds__(kMaxWarps * 32, kAligned ? 0 : 1) int6_linear_kernel(const __grid_constant__ Args a) {
  constexpr int kRows = 8 * kRowHalves, kColumns = kTileRows * kTiles, kChains = Format<T>::kChains;
  alignas(8) __shared__ float sums[kMaxWarps][kRows][kColumns];

  const int num_warps = blockDim.x / 32, warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t first_m = int64_t(blockIdx.y) * kRows, first_n = int64_t(blockIdx.x) * kColumns;
  // Beyond the last rows the last ones are read once more, for sums that nobody stores.
  const uint8_t* weight_rows[kTiles];
  const T* x_rows[kRowHalves];
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int64_t n = first_n + i * kTileRows + g;
    weight_rows[i] = a.p.packed + (n < a.p.N ? n : a.p.N - 1) * a.row_bytes;
  }
#pragma unroll
  for (int i = 0; i < kRowHalves; ++i) {
    const int64_t m = first_m + 8 * i + g;
    x_rows[i] = static_cast<const T*>(a.p.x) + (m < a.p.M ? m : a.p.M - 1) * a.K;
  }

  float acc[kTiles][kChains][4] = {};
  unsigned words[kTiles][kLaneWords], x[kRowHalves][kLaneColumns * sizeof(T) / 4];
  int column = warp * kChunk + t * kLaneColumns;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) load_codes<kAligned>(a, weight_rows[i], column, words[i]);
#pragma unroll
  for (int i = 0; i < kRowHalves; ++i) load_x<T, kAligned>(a, x_rows[i], column, x[i]);
  const int64_t n = first_n + threadIdx.x % kColumns;
  Half scale = {};
  T bias = {};
  if (n < a.p.N) {  // for the end, but asked for now
    scale.bits = a.p.scale[n];
    if (a.p.bias) bias = static_cast<const T*>(a.p.bias)[n];
  }
  for (int chunk = warp * kChunk + num_warps * kChunk; chunk < a.K; chunk += num_warps * kChunk) {
    unsigned next_words[kTiles][kLaneWords], next_x[kRowHalves][kLaneColumns * sizeof(T) / 4];
    column += num_warps * kChunk;
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_codes<kAligned>(a, weight_rows[i], column, next_words[i]);
#pragma unroll
    for (int i = 0; i < kRowHalves; ++i) load_x<T, kAligned>(a, x_rows[i], column, next_x[i]);
    multiply<T, kRowHalves, kTiles>(x, words, acc);
    memcpy(words, next_words, sizeof words);
    memcpy(x, next_x, sizeof x);
  }
  multiply<T, kRowHalves, kTiles>(x, words, acc);

#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
#pragma unroll
    for (int j = 0; j < 2 * kRowHalves; ++j) {
      float total = acc[i][kChains - 1][j];  // the smallest parts first
#pragma unroll
      for (int chain = kChains - 2; chain >= 0; --chain) total += acc[i][chain][j];
      sums[warp][j / 2 * 8 + g][i * kTileRows + 2 * t + j % 2] = total;
    }
  }
  __syncthreads();
  // A block has a multiple of kColumns threads, so n, and with it scale and bias, stay.
  for (int i = threadIdx.x; i < kRows * kColumns; i += blockDim.x) {
    const int64_t m = first_m + i / kColumns;
    if (m >= a.p.M || n >= a.p.N) break;
    float total = 0;
#pragma unroll
    for (int w = 0; w < kMaxWarps; ++w)
      if (w < num_warps) total += sums[w][i / kColumns][i % kColumns];
    round_to(fmaf(total, to_float(scale), to_float(bias)), static_cast<T*>(a.p.y)[m * a.p.N + n]);
  }
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class T>
void forward_as(const Problem& p, uintptr_t stream) {
  const auto address = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer); };
  const bool aligned = p.K % kLaneColumns == 0 && address(p.packed) % 8 == 0 && address(p.x) % 16 == 0;
  const bool many = p.M > 8, wide = many && aligned && p.N > kManyWeightRows;
  auto* kernel = wide   ? int6_linear_kernel<T, 2, 2, true>
                 : many ? (aligned ? int6_linear_kernel<T, 2, 1, true> : int6_linear_kernel<T, 2, 1, false>)
                        : (aligned ? int6_linear_kernel<T, 1, 1, true> : int6_linear_kernel<T, 1, 1, false>);
  // As many warps as share the chunks out evenly: which warp adds which columns depends on K alone.
  const int64_t chunks = ceil_div(p.K, kChunk), warps = ceil_div(chunks, ceil_div(chunks, kMaxWarps));
  const int64_t tiles = ceil_div(p.N, wide ? 2 * kTileRows : kTileRows);
  for (int64_t m = 0; m < p.M; m += kMaxGridRows * kRowsAtOnce) {
    Args a = {p, int(p.K), 3 * ceil_div(p.K, 4)};
    a.p.M = p.M - m < kMaxGridRows * kRowsAtOnce ? p.M - m : kMaxGridRows * kRowsAtOnce;
    a.p.x = static_cast<const T*>(p.x) + m * p.K;
    a.p.y = static_cast<T*>(p.y) + m * p.N;
    const dim3 grid(unsigned(tiles), unsigned(ceil_div(a.p.M, many ? 16 : 8)));
    launch(kernel, grid, unsigned(32 * warps), stream, a);
  }
}

}  // namespace

void forward(const Problem& p, int64_t packed_bytes, int device, uintptr_t stream) {
  PGOLF_CHECK(p.M >= 0 && p.N >= 0 && p.K > 0 && packed_bytes == p.N * 3 * ceil_div(p.K, 4),
              "int6_linear: packed must have N ceil(K / 4) 3 bytes for N = ", p.N, " and K = ", p.K, ", K > 0, got ",
              packed_bytes);
  PGOLF_CHECK(p.N <= kMaxSize && p.K <= kMaxSize, "int6_linear: N and K must be at most ", kMaxSize, ", got N = ", p.N,
              " and K = ", p.K);
  if (p.M == 0 || p.N == 0) return;
  const DeviceGuard guard(device);
  switch (p.dtype) {
    case DType::float32:
      return forward_as<float>(p, stream);
    case DType::bfloat16:
      return forward_as<Bf16>(p, stream);
    case DType::float16:
      return forward_as<Half>(p, stream);
  }
}

}  // namespace pgolf::int6_linear::cuda
