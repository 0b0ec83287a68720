// csrc/cuda's kernels behind a C interface, run on the host; called by tests/cuda_on_host.py.
#include "pair_reduce.cuh"

using namespace bvpo::cuda;

extern "C" {

void pair_reduce(const float* trace, const float* empty, const float* weights, int add, void* total,
                 int is_half, float* partials, long numel, int vector, int grid) {
  const int64_t tiles = (numel + kTile - 1) / kTile;
  const auto run = [&](auto* out, auto has_vector) {
    launch(grid, kReduceThreads, [&] {
      pair_reduce_kernel<decltype(has_vector)::value>(trace, empty, weights, add != 0, out,
                                                      partials, numel, tiles);
    });
  };
  const auto typed = [&](auto has_vector) {
    if (is_half) return run(static_cast<__nv_bfloat16*>(total), has_vector);
    run(static_cast<float*>(total), has_vector);
  };
  vector ? typed(std::true_type{}) : typed(std::false_type{});
}
}
