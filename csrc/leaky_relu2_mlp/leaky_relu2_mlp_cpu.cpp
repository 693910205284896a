// The MLP's driver: what is packed, and which rows and panels make a piece of work. The loops are in
// leaky_relu2_mlp_body.inl.
#include "leaky_relu2_mlp/leaky_relu2_mlp.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"
#include "leaky_relu2_mlp/leaky_relu2_mlp_kernels.h"

namespace pgolf::leaky_relu2_mlp {

static const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

constexpr int64_t kMostRows = 256;       // of a piece; more would only make the pieces uneven
constexpr int64_t kStretch = 2048;       // rows whose dp is in memory at a time, at least
constexpr int64_t kGradientRows = 560;   // of D in a piece: with a chunk's depth they stay in the second-level cache
constexpr int64_t kPanelsPerPiece = 8;   // at most, of a weight's gradient
constexpr int64_t kPiecesPerThread = 4;  // at least, where there is enough work

static const Loops& loops(DType dtype, const std::string& isa) {
  const Kernels& kernels = choose(kUnits, isa, "leaky_relu2_mlp");
  return dtype == DType::float32 ? kernels.float32 : kernels.bfloat16;
}

static int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// [0, n) in `parts` nearly equal parts of whole `unit`s.
struct Split {
  int64_t n, unit, parts;
  int64_t begin(int64_t i) const { return std::min(n, ceil_div(n, unit) * i / parts * unit); }
  int64_t count(int64_t i) const { return begin(i + 1) - begin(i); }
  int64_t most() const { return ceil_div(ceil_div(n, unit), parts) * unit; }
};

static Split split_rows(const Problem& p, const Loops& k, int64_t rows) {
  const int64_t fit = std::min(kMostRows, k.tile_bytes / (k.element_bytes * (p.D + p.H))) / k.block_rows;
  const int64_t blocks = ceil_div(rows, k.block_rows), threads = std::max(1, p.threads);
  const int64_t turns = ceil_div(blocks, std::max<int64_t>(fit, 1) * threads);
  return {rows, k.block_rows, std::min(blocks, turns * threads)};
}

static char* worker_memory(int64_t bytes) {
  static thread_local Scratch<char> memory;
  return memory.need(bytes);
}

int64_t packed_bytes(int64_t rows, int64_t columns, DType dtype, const std::string& isa) {
  const Loops& k = loops(dtype, isa);
  return ceil_div(rows, k.panel) * k.panel_bytes(columns);
}

void pack(const void* weight, int64_t rows, int64_t columns, DType dtype, int threads, const std::string& isa,
          void* out) {
  const Loops& k = loops(dtype, isa);
  parallel_for(ceil_div(rows, k.panel), threads, [&](int64_t i, int) {
    k.pack_rows(weight, rows, columns, i, static_cast<char*>(out) + i * k.panel_bytes(columns));
  });
}

// The right operands that need packing, in one parallel loop.
class Packing {
 public:
  using Pack = void (*)(const void* w, int64_t columns, int64_t depth, int64_t p, void* out);
  explicit Packing(const Loops& k) : k_(k) {}

  int64_t bytes(int64_t columns, int64_t depth) const { return ceil_div(columns, k_.panel) * k_.panel_bytes(depth); }

  void* add(Pack pack, const void* w, int64_t columns, int64_t depth, char*& memory) {
    jobs_.push_back({pack, w, columns, depth, memory});
    void* out = memory;
    memory += bytes(columns, depth);
    return out;
  }

  void run(int threads) const {
    int64_t total = 0;
    for (const Job& job : jobs_) total += ceil_div(job.columns, k_.panel);
    parallel_for(total, threads, [&](int64_t i, int) {
      const Job* job = jobs_.data();
      for (; i >= ceil_div(job->columns, k_.panel); ++job) i -= ceil_div(job->columns, k_.panel);
      job->pack(job->w, job->columns, job->depth, i, job->out + i * k_.panel_bytes(job->depth));
    });
  }

 private:
  struct Job {
    Pack pack;
    const void* w;
    int64_t columns, depth;
    char* out;
  };
  const Loops& k_;
  std::vector<Job> jobs_;
};

void forward(const Problem& p, const void* packed_up, const void* packed_down, void* y, void* a) {
  const Loops& k = loops(p.dtype, p.isa);
  if (p.M == 0 || p.D == 0) {
    if (a) std::memset(a, 0, p.M * p.H * size_of(p.dtype));  // D = 0: sums of nothing
    return;
  }
  if (p.H == 0) {
    std::memset(y, 0, p.M * p.D * size_of(p.dtype));
    return;
  }
  static thread_local Scratch<char> weights;
  Packing packing(k);
  char* memory = weights.need(packing.bytes(p.H, p.D) + packing.bytes(p.D, p.H));
  if (!packed_up) packed_up = packing.add(k.pack_rows, p.w_up, p.H, p.D, memory);
  if (!packed_down) packed_down = packing.add(k.pack_rows, p.w_down, p.D, p.H, memory);
  packing.run(p.threads);
  const Forward f = {p.x, packed_up, packed_down, y, a, p.D, p.H, p.negative_slope};
  const Split rows = split_rows(p, k, p.M);
  const int64_t row_bytes = k.rows_memory(rows.most(), p.D, p.H);
  parallel_for(rows.parts, p.threads,
               [&](int64_t i, int) { k.forward(f, rows.begin(i), rows.count(i), worker_memory(row_bytes)); });
}

void backward(const Problem& p, const void* dy, const void* a, void* dx, void* dw_up, void* dw_down) {
  const Loops& k = loops(p.dtype, p.isa);
  const int64_t size = size_of(p.dtype), D = p.D, H = p.H;
  if (p.M == 0 || D == 0 || H == 0) {
    if (dx) std::memset(dx, 0, p.M * D * size);
    if (dw_up) std::memset(dw_up, 0, H * D * size);
    if (dw_down) std::memset(dw_down, 0, D * H * size);
    return;
  }
  static thread_local Scratch<char> weights, operands;
  static thread_local Scratch<float> sums;
  Packing packing(k);
  char* memory = weights.need(packing.bytes(H, D) + packing.bytes(D, H));
  const void* down = dx || dw_up ? packing.add(k.pack_columns, p.w_down, H, D, memory) : nullptr;
  const void* up = dx ? packing.add(k.pack_columns, p.w_up, D, H, memory) : nullptr;
  packing.run(p.threads);

  // Gradients of weights add up chunk by chunk, so the length of a stretch changes no result.
  const int64_t most_rows = std::max<int64_t>(kStretch, kStretch / 4 * p.threads);  // enough pieces for every thread
  const int64_t stretch = std::min(p.M, most_rows), chunks = ceil_div(stretch, k.chunk);
  const int64_t panels = ceil_div(H, k.panel), left = k.left_bytes(D, k.chunk);
  char* kept = operands.need(chunks * (2 * left + panels * k.panel_bytes(k.chunk)));
  char *x_left = kept, *dy_left = x_left + chunks * left, *dp = dy_left + chunks * left;
  const int64_t sums_size = stretch < p.M ? panels * D * k.panel : 0;  // one stretch keeps none
  float *up_sums = sums.need(2 * sums_size), *down_sums = up_sums + sums_size;
  const int64_t num_weights = (dw_up != nullptr) + (dw_down != nullptr);
  const Split left_rows = {D, k.block_rows, ceil_div(D, kGradientRows)};
  const int64_t wanted = ceil_div(kPiecesPerThread * p.threads, std::max<int64_t>(1, num_weights) * left_rows.parts);
  const Split groups = {panels, 1, std::min(panels, std::max(wanted, ceil_div(panels, kPanelsPerPiece)))};

  for (int64_t first = 0; first < p.M; first += stretch) {
    const int64_t n = std::min(stretch, p.M - first), n_chunks = ceil_div(n, k.chunk);
    const auto row = [&](const void* t, int64_t width) { return static_cast<const char*>(t) + first * width * size; };
    const Backward b = {row(dy, D),           row(a, H), down, up, dx ? const_cast<char*>(row(dx, D)) : nullptr,
                        dw_up ? dp : nullptr, n,         D,    H,  p.negative_slope};
    const Split rows = split_rows(p, k, n);
    const int64_t row_bytes = k.rows_memory(rows.most(), D, H);
    const int64_t pieces = down ? rows.parts : 0;
    parallel_for(pieces + num_weights * n_chunks, p.threads, [&](int64_t i, int) {
      if (i < pieces) return k.backward(b, rows.begin(i), rows.count(i), worker_memory(row_bytes));
      i -= pieces;
      const bool of_x = dw_up && i < n_chunks;
      const int64_t chunk = i % n_chunks, rest = std::min(k.chunk, n - chunk * k.chunk);
      k.transpose(row(of_x ? p.x : dy, D) + chunk * k.chunk * D * size, rest, D,
                  (of_x ? x_left : dy_left) + chunk * left);
    });
    const bool last = first + n == p.M;
    const auto gradient = [&](const char* transposed, const char* dp_or_null, float* total, void* out) {
      return WeightGradient{transposed, dp_or_null, row(a, H), n, D, H, total, first > 0, last ? out : nullptr};
    };
    const WeightGradient up_gradient = gradient(x_left, dp, up_sums, dw_up);
    const WeightGradient down_gradient = gradient(dy_left, nullptr, down_sums, dw_down);
    const int64_t gradient_bytes = k.gradient_memory(left_rows.most(), groups.most());
    const int64_t per_weight = left_rows.parts * groups.parts;
    parallel_for(num_weights * per_weight, p.threads, [&](int64_t i, int) {
      const WeightGradient& g = dw_up && i < per_weight ? up_gradient : down_gradient;
      const int64_t r = i % per_weight / groups.parts, q = i % groups.parts;
      k.weight_gradient(g, left_rows.begin(r), left_rows.begin(r + 1), groups.begin(q), groups.begin(q + 1),
                        worker_memory(gradient_bytes));
    });
  }
}

uint64_t fingerprint(const void* data, int64_t bytes) {
  constexpr int64_t kLines = 64, kLine = 64;
  const char* at = static_cast<const char*>(data);
  uint64_t hash = 0xcbf29ce484222325;
  const auto mix = [&](const char* from, int64_t n) {
    uint64_t word = 0;
    std::memcpy(&word, from, n);
    hash = (hash ^ word) * 0x9e3779b97f4a7c15;
    hash ^= hash >> 29;
  };
  const int64_t lines = ceil_div(bytes, kLine);
  for (int64_t i = 0; i < std::min(lines, kLines); ++i) {
    const int64_t line = lines <= kLines ? i : i * (lines - 1) / (kLines - 1);
    for (int64_t j = line * kLine; j < std::min(bytes, (line + 1) * kLine); j += 8)
      mix(at + j, std::min<int64_t>(8, bytes - j));
  }
  return hash;
}

}  // namespace pgolf::leaky_relu2_mlp
