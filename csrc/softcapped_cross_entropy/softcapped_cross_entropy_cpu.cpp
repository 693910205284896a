// The driver of the soft-capped cross-entropy: packs the head once, then gives each thread blocks of rows.
#include "softcapped_cross_entropy/softcapped_cross_entropy.h"

#include "common/isa.h"
#include "common/parallel.h"
#include "common/scratch.h"

namespace pgolf::softcapped_cross_entropy {

static const Unit<Kernels> kUnits[] = {PGOLF_UNITS};

void loss_and_grad(const Problem& p, const Outputs& out, int threads, const std::string& isa) {
  PGOLF_CHECK(p.V > 0, "softcapped_cross_entropy: V must be > 0, got ", p.V);
  const Kernels& kernels = choose(kUnits, isa, "softcapped_cross_entropy");
  static thread_local Scratch<char> packed;
  const int64_t panels = (p.V + kernels.panel - 1) / kernels.panel, bytes = kernels.panel_bytes(p);
  char* all = packed.need(panels * bytes);
  parallel_for(panels, threads, [&](int64_t i, int) { kernels.pack(p, i, all + i * bytes); });
  const int64_t rows = kernels.rows(p);
  parallel_for((p.T + rows - 1) / rows, threads, [&](int64_t i, int) {
    static thread_local Scratch<char> memory;
    kernels.loss_and_grad(p, out, all, i * rows, memory.need(kernels.memory(p)));
  });
}

}  // namespace pgolf::softcapped_cross_entropy
