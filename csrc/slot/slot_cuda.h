// Fit and score SLOT on a GPU. Device pointers and sizes; the maths is in pgolf_kernels/ops/slot/reference.py.
//
// There is at least one window (B > 0). The order of calls: count() unless the caller knows how many rows take part,
// gather(), the product of the gathered rows with the head (by the caller), then a fit or the scores. Nothing here
// waits for the device.
//
// Window i's rows lie together, in the order of their positions, padded to whole segments. A segment belongs to one
// window and is the unit of every sum over rows; how long it is depends on the window's own number of rows, so a
// window's sums are the same whatever else is in the batch.
#pragma once
#include <stddef.h>
#include <stdint.h>

#include <vector>

namespace pgolf::slot::cuda {

constexpr int kSegmentRows = 64;
constexpr int kShortSegmentRows = 16;  // of windows with few rows, so that they too occupy several multiprocessors
constexpr int kShortWindow = 256;
constexpr int kMaxVocab = 8192;  // a block of 256 threads keeps a whole row in registers, 32 columns each
constexpr int kMaxHistory = 128;

constexpr int rows_per_segment(int64_t room) { return room <= kShortWindow ? kShortSegmentRows : kSegmentRows; }

enum class Mask : int { boolean, float32, float64 };

struct Problem {
  const void* hidden;      // [B, T, D]
  const void* weight;      // [V, D]
  const int64_t* targets;  // [B, T]
  const void* mask;        // [B, T] weights of a fit, or which rows to score
  Mask mask_type;
  bool whole_batch;  // the weights are divided by the batch's total, else by the window's
  int64_t B, T, D, V;
  bool bf16;    // dtype of hidden, weight and logits; else float32
  float cap;    // softcap; 0: none
  bool before;  // delta joins before the final RMSNorm
  int device;
  uintptr_t stream;
};

// Where rows lie, from how many rows each window may have. The last entry of each list is the total.
struct Layout {
  explicit Layout(const std::vector<int64_t>& room);

  std::vector<int32_t> room, first_segment, first_row, first_output;
  int num_windows() const { return int(room.size()); }
  int num_segments() const { return first_segment.back(); }
  int64_t num_rows() const { return first_row.back(); }
  size_t num_integers() const { return 3 * size_t(num_segments()) + size_t(num_rows()) + 4 * (room.size() + 1); }
};

// What gather() fills in. R = layout.num_rows(), S = layout.num_segments().
struct Rows {
  Rows(const Layout&, int32_t* integers, float* weight, void* hidden);

  void* hidden;             // [R, D]; zeros in the padding
  float* weight;            // [R] share of the row in the loss; null in a score
  int32_t* target;          // [R]
  int32_t* segment_window;  // [S]
  int32_t* segment_count;   // [S] rows that are no padding
  int32_t* segment_row;     // [S] its first row
  int32_t* first_segment;   // [B + 1] of each window
  int32_t* first_output;    // [B + 1] where a window's scores go
  int32_t* found;           // [B] rows that take part; -1: the window's mask, targets or room are impossible
  unsigned* arrivals;       // [B] of the window's blocks at a barrier
};

// Base logits of the rows from `first_row` on, [.., stride]; stride is a multiple of 8.
struct Logits {
  const void* data;
  int64_t stride, first_row;
};

// Which parameters there are. x [G, P] = delta [D], then bias [V]; G = 1 if shared, else B.
struct Form {
  bool delta, bias, shared;
};

struct AdamW {
  std::vector<double> learning_rates;  // one per step
  double beta1, beta2, eps, weight_decay;
};

struct Lbfgs {
  double lr, tolerance_grad, tolerance_change;
  int steps, max_iter, history, max_eval, max_line_search;  // max_line_search < 0: what is left of max_eval
  bool joint;                                               // one problem over all windows
};

// facts int64 [5, B]: number of rows of positive weight; least and largest of their targets; whether the mask is finite
// and not negative; the bits of the double that is the mask's total.
void count(const Problem&, int64_t* facts);

// totals: facts + 4 B. What is impossible (a target out of range, more rows than room) makes the window's results NaN.
void gather(const Problem&, const Layout&, const Rows&, const int64_t* facts);

// Whether each window's steps can all run in one launch; depends on T alone, so that results do not depend on the
// batch.
bool fits_one_launch(const Problem&, const Form&);

size_t adamw_bytes(const Problem&, const Layout&, const Form&);
size_t lbfgs_bytes(const Problem&, const Layout&, const Form&, const Lbfgs&);

// x in place, losses [steps, G]; `logits` holds every row.
void fit(const Problem&, const Layout&, const Rows&, const Logits&, const Form&, const AdamW&, float* x, float* losses,
         void* workspace);
// The same for windows [first, last), whose rows alone `logits` holds, with all steps in one launch.
void fit_in_one_launch(const Problem&, const Layout&, const Rows&, const Logits&, const Form&, const AdamW&, int first,
                       int last, float* x, float* losses, void* workspace);
// losses [steps, G], [steps, 1] if joint. As many evaluations as could be needed are launched; finished problems skip.
void fit(const Problem&, const Layout&, const Rows&, const Logits&, const Form&, const Lbfgs&, float* x, float* losses,
         void* workspace);

// nll [layout.first_output.back()] of windows [first, last), whose rows `logits` holds. delta, bias: null, or rows
// `stride` floats apart (0: one for all windows). shift: workspace [1 or B, V] for weight delta, filled where first is
// 0.
void score(const Problem&, const Layout&, const Rows&, const Logits&, int first, int last, const float* delta,
           int64_t delta_stride, const float* bias, int64_t bias_stride, float* shift, float* nll);

}  // namespace pgolf::slot::cuda
