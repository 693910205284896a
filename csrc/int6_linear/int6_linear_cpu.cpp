// int6_linear's driver: which loop, which rows on which thread. The loops are in int6_linear_body.inl.
#include "int6_linear/int6_linear.h"

#include <algorithm>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pgolf::int6_linear {
namespace {

const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

// A thread pays from this much of its own work on: waking it takes a few microseconds.
constexpr int64_t kBytesPerThread = 192 << 10;  // of packed codes
constexpr int64_t kProductsPerThread = 1 << 21;
constexpr int64_t kPiecesPerThread = 16;
constexpr int64_t kPanelsPerPiece = 8;   // at least: the left operand of a piece is packed for them
constexpr int64_t kMaxTurnedRows = 128;  // rows of x up to which it is the one in panels

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t n, int64_t step) { return ceil_div(n, step) * step; }

char* worker_memory(int64_t bytes) {
  static thread_local Scratch<char> memory;
  return memory.need(bytes);
}

// Parts of one block of memory that lives as long as the thread.
class Parts {
 public:
  template <class T>
  void add(T*& part, int64_t count) {
    part = nullptr;
    parts_[count_++] = {reinterpret_cast<char**>(&part), total_};
    total_ += round_up(count * int64_t(sizeof(T)), 64);
  }
  void allocate() {
    static thread_local Scratch<char> memory;
    char* start = memory.need(total_);
    for (int i = 0; i < count_; ++i) *parts_[i].first = start + parts_[i].second;
  }

 private:
  std::pair<char**, int64_t> parts_[8];
  int count_ = 0;
  int64_t total_ = 0;
};

void add_columns(const Problem& p, Columns& columns, Parts& parts) {
  const int64_t size = round_up(p.N, kPieceRows) + kPieceRows;
  parts.add(columns.scale, size);
  parts.add(columns.bias, size);
}

int useful_threads(const Problem& p, int threads) {
  const int64_t most = std::max(p.N * row_bytes(p.K) / kBytesPerThread, p.M * p.N * p.K / kProductsPerThread);
  return int(std::clamp<int64_t>(most, 1, std::max(1, threads)));
}

void by_dots(const Problem& p, const Kernels& kernels, int threads) {
  const int64_t pieces = ceil_div(p.N, kPieceRows), depth = round_up(p.K, kChunk);
  Activations a;
  Columns columns;
  Parts parts;
  char* rows;
  const bool bytes = p.dtype == DType::bfloat16 && p.M <= kernels.max_bytes_rows && p.K > 0 && p.K <= kMaxBytesDepth;
  add_columns(p, columns, parts);
  parts.add(a.step, p.M);
  parts.add(a.offset, p.M);
  parts.add(rows, p.M * depth * 4);
  parts.add(a.planes, bytes ? 2 * p.M * depth : 0);
  parts.allocate();
  a.rows = rows;
  kernels.columns(p, columns);
  for (int64_t m = 0; m < p.M; ++m)
    if (!bytes || !kernels.quantize(p, m, a)) kernels.convert(p, m, a);
  const int64_t work = kernels.dots_work(p);
  parallel_for(pieces, threads,
               [&](int64_t i, int) { kernels.dots(p, a, columns, i * kPieceRows, worker_memory(work)); });
}

// The product on `panels` panels of one operand and blocks of the other, `total` rows: call(first, rows, first_panel,
// last_panel) for all of it.
template <class Call>
void by_pieces(int64_t total, int64_t rows, int64_t panels, int threads, const Call& call) {
  // Where the rows make too few pieces for the threads to end together, the panels are cut too.
  const int64_t pieces = ceil_div(total, rows);
  const int64_t wanted = threads == 1 ? 1 : ceil_div(threads * kPiecesPerThread, pieces);
  const int64_t per_range = std::max(ceil_div(panels, wanted), std::min(panels, kPanelsPerPiece));
  const int64_t ranges = ceil_div(panels, per_range);
  parallel_for(pieces * ranges, threads, [&](int64_t i, int) {
    const int64_t first_panel = i % ranges * per_range;
    call(i / ranges * rows, rows, first_panel, std::min(panels, first_panel + per_range));
  });
}

void by_product(const Problem& p, const Kernels& kernels, int threads) {
  const bool many = p.M > kMaxTurnedRows;
  const int64_t bytes = kernels.panel_bytes(p), panels = ceil_div(many ? p.N : p.M, kernels.panel);
  const int64_t total = many ? p.M : p.N, block = kernels.block_rows[p.dtype == DType::bfloat16];
  const int64_t rows = std::max<int64_t>(1, (many ? 128 : 64) / block) * block;
  Columns columns;
  Parts parts;
  char* packed;
  add_columns(p, columns, parts);
  parts.add(packed, panels * bytes);
  parts.allocate();
  kernels.columns(p, columns);
  const int64_t unpack_work = many ? kernels.unpack_work(p) : 0;
  parallel_for(panels, threads, [&](int64_t i, int) {
    many ? kernels.unpack(p, i, packed + i * bytes, worker_memory(unpack_work))
         : kernels.pack_x(p, i, packed + i * bytes);
  });
  const int64_t work = many ? kernels.multiply_work(p, rows) : kernels.multiply_x_work(p, rows);
  by_pieces(total, rows, panels, threads, [&](int64_t first, int64_t rows, int64_t first_panel, int64_t last_panel) {
    (many ? kernels.multiply : kernels.multiply_x)(p, packed, columns, first, rows, first_panel, last_panel,
                                                   worker_memory(work));
  });
}

}  // namespace

void forward(const Problem& p, int64_t packed_bytes, int threads, const std::string& isa) {
  const Kernels& kernels = choose(kUnits, isa, "int6_linear");
  PGOLF_CHECK(p.M >= 0 && p.N >= 0 && p.K >= 0 && packed_bytes == p.N * row_bytes(p.K),
              "int6_linear: packed must have N ceil(K / 4) 3 = ", p.N * row_bytes(p.K), " bytes for N = ", p.N,
              " and K = ", p.K, ", got ", packed_bytes);
  if (p.M == 0 || p.N == 0) return;
  threads = useful_threads(p, threads);
  const bool bf16 = p.dtype == DType::bfloat16;
  // The product says nothing of an empty sum.
  const bool few = p.K == 0 || p.M <= kernels.max_dots_rows[bf16] || (bf16 && p.M <= kernels.max_bytes_rows);
  few ? by_dots(p, kernels, threads) : by_product(p, kernels, threads);
}

}  // namespace pgolf::int6_linear
