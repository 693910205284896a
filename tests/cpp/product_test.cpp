// csrc/common/operands.h and product.h at one instruction set, PGOLF_ISA, as plain C++. Run by test_product.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "common/product.h"
#include "common/scratch.h"

namespace pgolf::PGOLF_ISA {
namespace {

std::mt19937 generator(std::random_device{}());

float number(const float* x) { return *x; }
float number(const bf16* x) { return load_one(x); }

template <class T>
std::vector<T> random_matrix(int64_t size) {
  std::normal_distribution<float> normal;
  std::vector<T> x(size);
  for (T& v : x) {
    const float f = normal(generator);
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if constexpr (sizeof(T) == 2)
      v.bits = uint16_t(bits >> 16);
    else
      v = f;
  }
  return x;
}

// All products of rows x depth with columns, from row `from(p)` on; transposed: the right operand as [columns, depth].
template <class T>
int product_is_right(int64_t rows, int64_t depth, int64_t columns, bool transposed, bool triangle) {
  const auto a = random_matrix<T>(rows * depth), b = random_matrix<T>(columns * depth);
  const int64_t panels = (columns + kPanel - 1) / kPanel, n = words<T>(depth);
  Scratch<Element<T>> left_memory;
  Scratch<Word<T>> right_memory;
  Scratch<float> sums;
  const int64_t size = left_size<T>(rows + kBlockRows<T>, depth);
  memset(left_memory.need(size), 0xff, size * sizeof(Element<T>));  // NaN wherever packing leaves a hole
  memset(right_memory.need(panels * n * kPanel), 0xff, panels * n * kPanel * 4);
  memset(sums.need(sums_size<T>(rows)), 0xff, sums_size<T>(rows) * 4);
  const auto left = pack_left<T>(rows, depth, left_memory.get(), [&](int64_t i) { return &a[i * depth]; });
  for (int64_t p = 0; p < panels; ++p) {
    const int64_t first = p * kPanel, count = columns - first < kPanel ? columns - first : kPanel;
    Word<T>* out = right_memory.get() + p * n * kPanel;
    transposed ? pack_transposed(&b[first * depth], depth, count, depth, out)
               : pack_columns(&b[first], columns, count, depth, out);
  }
  std::vector<int> seen(rows * panels);
  double worst = 0;
  const auto from = [&](int64_t p) { return triangle ? p * kPanel : 0; };
  const TileScope tiles;
  (void)tiles;
  product<T>(
      left, depth, 0, panels, sums.get(), from,
      [&](int64_t p, int64_t k, int64_t) { return right_memory.get() + (p * n + k) * kPanel; },
      [&](int64_t i, int64_t p, const float* c) {
        ++seen[i * panels + p];
        for (int64_t j = 0; j < kPanel; ++j) {
          double exact = 0;
          for (int64_t k = 0; k < depth && p * kPanel + j < columns; ++k)
            exact += double(number(&a[i * depth + k])) *
                     number(transposed ? &b[(p * kPanel + j) * depth + k] : &b[k * columns + p * kPanel + j]);
          worst = std::fmax(worst, std::fabs(exact - c[j]));
          if (!(c[j] == c[j])) worst = INFINITY;
        }
      });
  bool right = worst <= 1e-6 * depth + 1e-6;  // float32 sums of `depth` products of size 1
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t p = 0; p < panels; ++p) right = right && seen[i * panels + p] == (i >= from(p));
  if (!right)
    std::printf("%s %ld x %ld x %ld%s%s: error %g\n", sizeof(T) == 2 ? "bf16" : "float", long(rows), long(depth),
                long(columns), transposed ? " transposed" : "", triangle ? " triangle" : "", worst);
  return !right;
}

int rounding_is_to_nearest_even() {
  // Ties go to the even pattern; 1e-30 is 1.2676 x 2^-100, so 162 / 128 of it.
  const float in[] = {1.0f, 1.00390625f, 1.01171875f, -1.00390625f, 3.4e38f, INFINITY, NAN, 1e-30f};
  const float want[] = {1.0f, 1.0f, 1.015625f, -1.0f, INFINITY, INFINITY, NAN, std::ldexp(162 / 128.0f, -100)};
  float x[kLanes] = {};
  bf16 y[kLanes];
  int wrong = 0;
  for (int i = 0; i < 8; ++i) {
    x[0] = in[i];
    store(y, load(x));
    const float got = load_one(y);
    if (!(got == want[i] || (got != got && want[i] != want[i]))) {
      std::printf("bfloat16 of %g: %g instead of %g\n", in[i], got, want[i]);
      wrong = 1;
    }
  }
  return wrong;
}

template <class T>
int all() {
  int wrong = 0;
  // One number; tails of a block, a panel and a word; several chunks of depth, and a chunk's tail.
  const int64_t shapes[][3] = {{1, 1, 1}, {33, 35, 37}, {70, 64, 64}, {29, 1100, 40}};
  for (const auto& [rows, depth, columns] : shapes)
    for (bool transposed : {false, true}) wrong |= product_is_right<T>(rows, depth, columns, transposed, false);
  return wrong | product_is_right<T>(100, 100, 100, true, true) | product_is_right<T>(64, 600, 64, false, true);
}

}  // namespace
}  // namespace pgolf::PGOLF_ISA

int main() {
  using namespace pgolf::PGOLF_ISA;
  return all<float>() | all<bf16>() | rounding_is_to_nearest_even();
}
