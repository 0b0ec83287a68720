// csrc/cuda's kernels behind a C interface, run on the host; called by tests/cuda_on_host.py.
#include "pair_reduce.cuh"
#include "rows.cuh"

using namespace bvpo::cuda;

extern "C" {

void rows_forward(const float* z, long stride, int rows, int columns, int column_start,
                  int row_start, void* p, int p_is_half, long p_stride, const float* bias,
                  float softcap, float inv_temperature, const int64_t* targets,
                  const int32_t* count, float* state, long state_stride, int vector, int grid) {
  const Tile tile{z, stride, rows, columns, column_start, row_start};
  const Transform transform{bias, softcap, inv_temperature};
  const auto run = [&](auto* out, auto has_vector) {
    launch(grid, kRowThreads, [&] {
      forward_kernel<std::remove_pointer_t<decltype(out)>, true, decltype(has_vector)::value>(
          tile, out, p_stride, transform, targets, count, state, state_stride);
    });
  };
  const auto typed = [&](auto has_vector) {
    if (p_is_half) return run(static_cast<__nv_bfloat16*>(p), has_vector);
    run(static_cast<float*>(p), has_vector);
  };
  vector ? typed(std::true_type{}) : typed(std::false_type{});
}

void rows_backward(const float* z, long stride, int rows, int columns, int column_start,
                   int row_start, void* dz, int dz_is_half, long dz_stride, const float* bias,
                   float softcap, float inv_temperature, const int64_t* targets,
                   const int32_t* count, const float* upstream, const float* coefficient,
                   const float* max, const float* logsum, int vector, int grid) {
  const Tile tile{z, stride, rows, columns, column_start, row_start};
  const Transform transform{bias, softcap, inv_temperature};
  const auto run = [&](auto* out, auto has_vector) {
    launch(grid, kRowThreads, [&] {
      backward_kernel<std::remove_pointer_t<decltype(out)>, decltype(has_vector)::value>(
          tile, out, dz_stride, transform, targets, count, upstream, coefficient, max, logsum);
    });
  };
  const auto typed = [&](auto has_vector) {
    if (dz_is_half) return run(static_cast<__nv_bfloat16*>(dz), has_vector);
    run(static_cast<float*>(dz), has_vector);
  };
  vector ? typed(std::true_type{}) : typed(std::false_type{});
}

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
