// Newton-Schulz's driver: the polynomial of each block as a sequence of products, and which piece runs where.
//
// The steps of a block are one polynomial P of R = X X^T, which multiplies X once: per step
//   Q = a I + b R + c R^2        P <- Q P        T = Q R,  R <- Q T
// Every symmetric matrix is kept as d I + M with a number d of its own, the mean of its diagonal: near the end of the
// iteration all of them are close to multiples of I, and a 16-bit diagonal would lose what is left to do. It costs
// nothing, as (d I + M)(e I + N) = d e I + (M N + d N + e M) and a product adds two matrices anyway. In 16 bits R and T
// also keep what their rounding lost, for these additions alone, because the small eigenvalues of R grow by a^2 per
// step and their errors with them.
#include "newton_schulz/newton_schulz.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "common/check.h"
#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "newton_schulz/newton_schulz_kernels.h"

namespace pgolf::newton_schulz {

static const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

namespace {

// Up to this many rows a bank costs little and is computed in float: rounding a few numbers to 16 bits moves the norm
// of x, which the first steps magnify.
constexpr int64_t kFewRows = 32;

// shift I + m (+ low)
struct Symmetric {
  char *m, *low;
  double shift;
};

// One matrix of the bank and its working memory.
struct Matrix {
  int64_t number;
  char* x;
  Symmetric r, q, p, t;
  float *diagonal, *divisors, *part;
};

class Bank {
 public:
  explicit Bank(const Problem& problem)
      : problem_(problem),
        kernels_(choose(kUnits, problem.isa, "newton_schulz")),
        short_(std::min(problem.m, problem.n)),
        long_(std::max(problem.m, problem.n)),
        loops_(problem.dtype == DType::float32 ? kernels_.float32
               : short_ <= kFewRows            ? kernels_.precise
                                               : kernels_.bfloat16) {}

  void run() const {
    const int threads = std::max(problem_.threads, 1);
    // A matrix per thread stays in the caches of its core. What is left over has its panels shared out.
    const int64_t whole = problem_.matrices / threads * threads;
    parallel_for(whole, threads, [&](int64_t i, int) { run(i, 1, 1); });
    if (whole < problem_.matrices) run(whole, problem_.matrices - whole, threads);
  }

 private:
  using Matrices = std::vector<Matrix>;

  const Problem& problem_;
  const Kernels& kernels_;
  const int64_t short_, long_;
  const Loops& loops_;

  void run(int64_t first, int64_t count, int threads) const {
    static thread_local Scratch<char> memory;
    Matrices matrices = allocate(memory, first, count);
    parallel_for(count, threads, [&](int64_t i, int) { normalize(matrices[i]); });
    int64_t step = 0;
    for (const int64_t length : problem_.blocks) {
      polynomial(matrices, threads, step, step + length);
      multiply(matrices, threads, [&](Matrix& m) {
        Product q = product(m.p.m, m.x);
        q.columns = long_, q.symmetric = false;
        q.u = q.out = m.x, q.beta = float(m.p.shift);
        return q;
      });
      step += length;
    }
    const int64_t bytes = problem_.m * problem_.n * size_of(problem_.dtype);
    parallel_for(count, threads, [&](int64_t i, int) {
      char* out = static_cast<char*>(problem_.out) + matrices[i].number * bytes;
      loops_.store(matrices[i].x, short_, long_, problem_.m > problem_.n, out);
    });
  }

  Matrices allocate(Scratch<char>& memory, int64_t first, int64_t count) const {
    const auto lines = [](int64_t bytes) { return (bytes + 63) / 64 * 64; };
    const int64_t x = lines(loops_.bytes(short_, long_)), square = lines(loops_.bytes(short_, short_));
    const int64_t low = loops_.keeps_low ? square : 0, floats = lines(long_ * 4);
    char* at = memory.need(count * (x + 4 * square + 2 * low + 3 * floats));
    const auto take = [&](int64_t bytes) { return bytes ? std::exchange(at, at + bytes) : nullptr; };
    Matrices matrices(count);
    for (Matrix& m : matrices) {
      m.number = first++;
      m.x = take(x);
      for (Symmetric* s : {&m.r, &m.q, &m.p, &m.t}) *s = {take(square), nullptr, 0};
      for (Symmetric* s : {&m.r, &m.t}) s->low = take(low);
      for (float** f : {&m.diagonal, &m.divisors, &m.part}) *f = reinterpret_cast<float*>(take(floats));
    }
    return matrices;
  }

  // x = g with a Frobenius norm of 1, its rows divided by their norms before if wanted; norms in float32.
  void normalize(const Matrix& m) const {
    const Problem& p = problem_;
    const bool by_line = p.lines_are_rows;
    const char* g = static_cast<const char*>(p.g) + m.number * p.matrix_stride * size_of(p.g_dtype);
    const Lines lines = {g, by_line ? p.m : p.n, by_line ? p.n : p.m, p.line_stride, p.g_dtype};
    loops_.squares(lines, by_line, m.part, m.divisors);
    const float eps = float(p.eps);
    double total = 0;
    for (int64_t i = 0; i < p.m; ++i) {
      const float square = m.divisors[i], norm = std::sqrt(square), divisor = norm < eps ? eps : norm;
      total += p.row_normalize ? norm / divisor * (norm / divisor) : square;
      m.divisors[i] = p.row_normalize ? divisor : 1;
    }
    const float norm = std::sqrt(float(total)) + eps;
    loops_.normalize(lines, by_line, m.divisors, norm, by_line != (p.m <= p.n), m.x, short_, long_);
    for (const Symmetric* s : {&m.r, &m.q, &m.p, &m.t}) loops_.clear(s->m, short_, short_);
  }

  // p = what steps [first, last) together multiply x by.
  void polynomial(Matrices& matrices, int threads, int64_t first, int64_t last) const {
    const bool low = last - first > 1;
    symmetric(matrices, threads, [&](Matrix& m) {
      Sum s = {&m.r, 0, product(m.x, m.x), low};
      s.product.depth = long_, s.product.transposed = true;
      return s;
    });
    for (int64_t i = first; i < last; ++i) {
      const auto [a, b, c] = problem_.steps[i];
      const auto Q = i == first ? &Matrix::p : &Matrix::q;
      symmetric(matrices, threads, [&, a = a, b = b, c = c](Matrix& m) {
        const double d = m.r.shift;
        Sum s = {&(m.*Q), a + b * d + c * d * d, product(m.r.m, m.r.m), false};
        s.product.alpha = float(c);
        s.product.u = m.r.m, s.product.u_low = low ? m.r.low : nullptr, s.product.beta = float(b + 2 * c * d);
        return s;
      });
      if (i > first) {
        symmetric(matrices, threads, [&](Matrix& m) { return times(m.q, m.p, m.t, false); });
        for (Matrix& m : matrices) std::swap(m.p.m, m.t.m), std::swap(m.p.shift, m.t.shift);
      }
      if (i + 1 == last) break;
      symmetric(matrices, threads, [&](Matrix& m) { return times(m.*Q, m.r, m.t, true); });
      symmetric(matrices, threads, [&](Matrix& m) { return times(m.*Q, m.t, m.r, true); });
    }
  }

  struct Sum {
    Symmetric* out;
    double shift;  // of the result, but for the mean of its diagonal
    Product product;
    bool low;  // whether to keep what rounding loses
  };

  // left right, of symmetric matrices if nobody changes it.
  Product product(const char* left, const char* right) const {
    Product q = {};
    q.left = left, q.right = right;
    q.rows = q.depth = q.columns = short_;
    q.alpha = 1, q.symmetric = true;
    return q;
  }

  // out = left right, which commute.
  Sum times(const Symmetric& left, const Symmetric& right, Symmetric& out, bool low) const {
    Sum s = {&out, left.shift * right.shift, product(left.m, right.m), low};
    s.product.u = right.m, s.product.u_low = low ? right.low : nullptr, s.product.beta = float(left.shift);
    s.product.v = left.m, s.product.gamma = float(right.shift);
    return s;
  }

  template <class Make>
  void symmetric(Matrices& matrices, int threads, const Make& make) const {
    multiply(matrices, threads, [&](Matrix& m) {
      Sum s = make(m);
      s.product.out = s.out->m, s.product.out_low = s.low ? s.out->low : nullptr, s.product.diagonal = m.diagonal;
      return s.product;
    });
    for (Matrix& m : matrices) {
      const Sum s = make(m);
      s.out->shift = loops_.take_mean(s.shift, m.diagonal, short_, s.out->m, s.low ? s.out->low : nullptr);
    }
  }

  // One product per matrix, panel by panel if threads share them.
  template <class Make>
  void multiply(Matrices& matrices, int threads, const Make& make) const {
    const int64_t columns = make(matrices[0]).columns, panels = (columns + kernels_.panel - 1) / kernels_.panel;
    const int64_t pieces = threads > 1 ? panels : 1;
    parallel_for(int64_t(matrices.size()) * pieces, threads, [&](int64_t i, int) {
      static thread_local Scratch<char> memory;
      const int64_t piece = i % pieces;
      loops_.multiply(make(matrices[i / pieces]), piece, pieces > 1 ? piece + 1 : panels,
                      memory.need(loops_.product_bytes(short_)));
    });
  }
};

}  // namespace

void run(const Problem& problem) {
  PGOLF_CHECK(problem.matrices >= 0 && problem.m > 0 && problem.n > 0,
              "newton_schulz: g must be [matrices >= 0, m > 0, n > 0], got [", problem.matrices, ", ", problem.m, ", ",
              problem.n, "]");
  int64_t steps = 0;
  for (const int64_t length : problem.blocks) {
    PGOLF_CHECK(length > 0, "newton_schulz: a block must have at least one step, got ", length);
    steps += length;
  }
  PGOLF_CHECK(steps == int64_t(problem.steps.size()), "newton_schulz: blocks must have ", problem.steps.size(),
              " steps together, got ", steps);
  Bank(problem).run();
}

}  // namespace pgolf::newton_schulz
