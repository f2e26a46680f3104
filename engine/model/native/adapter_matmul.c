// What the adapters of some rows add to their product with a weight that XLA multiplies by, called by XLA.
#include "threads.h"
#include "adapters.h"

static void do_row(const void *task, int64_t row) { add_row(task, row); }

KERNEL(adapter_matmul) {
  REQUIRE(call->args.size == 6 && call->rets.size == 1)
  REQUIRE(IS(in[0], F32, dim(in[0], 0), dim(in[0], 1)) && are_adapters(dim(in[0], 0), dim(in[0], 1), in + 1, out[0]))
  const Adapters t = adapters_of(in[0]->data, in[0]->dims[0], in[0]->dims[1], in + 1, out[0]);
  const int64_t size = t.rows * t.rank * (t.parts * t.in + t.out) * bytes_of(t.type);  // of all pairs
  run(call, size < PART ? 1 : count_threads(call), do_row, &t, t.rows);
  return NULL;
}
