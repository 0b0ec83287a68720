// Launchers of the row kernels. Schemas are defined in bvpo_kernels/ops.py.
#include "rows.cuh"

#include <optional>

#include "host.cuh"

namespace bvpo::cuda {
namespace {

Tile tile_of(const Tensor& z, int64_t row_start, int64_t column_start) {
  return {pointer<float>(z, ScalarType::Float, "z"), z.stride(0), static_cast<int>(z.size(0)),
          static_cast<int>(z.size(1)), static_cast<int>(column_start), static_cast<int>(row_start)};
}

Transform transform_of(const std::optional<Tensor>& bias, double softcap, double inv_temperature) {
  const float* values = bias ? pointer<float>(*bias, ScalarType::Float, "bias") : nullptr;
  return {values, static_cast<float>(softcap), static_cast<float>(inv_temperature)};
}

// Calls fn with a value of the C++ type of `tensor`.
template <typename Fn>
void with_type(const Tensor& tensor, const Fn& fn) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return fn(float{});
    case ScalarType::BFloat16: return fn(__nv_bfloat16{});
    case ScalarType::Half: return fn(__half{});
    default: STD_TORCH_CHECK(false, "fp32, bf16 or fp16 expected");
  }
}

template <typename Fn>
void with_flags(bool first, bool second, const Fn& fn) {
  if (first && second) return fn(std::true_type{}, std::true_type{});
  if (first) return fn(std::true_type{}, std::false_type{});
  if (second) return fn(std::false_type{}, std::true_type{});
  fn(std::false_type{}, std::false_type{});
}

void rows_forward(Tensor z, std::optional<Tensor> p, std::optional<Tensor> bias, Tensor target,
                  Tensor count, Tensor state, int64_t row_start, int64_t column_start,
                  double softcap, double inv_temperature, bool entropy) {
  const Tile tile = tile_of(z, row_start, column_start);
  const Transform transform = transform_of(bias, softcap, inv_temperature);
  const int64_t* targets = pointer<int64_t>(target, ScalarType::Long, "target");
  const int32_t* counted = pointer<int32_t>(count, ScalarType::Int, "count");
  float* states = pointer<float>(state, ScalarType::Float, "state");
  const int grid = persistent_grid(z, tile.rows, kRowBlocksPerSm);
  with_type(p.value_or(z), [&](auto element) {
    using Out = decltype(element);
    Out* out = p ? static_cast<Out*>(p->mutable_data_ptr()) : nullptr;
    const bool vector = vector_rows<float>(z) && (!p || vector_rows<Out>(*p));
    with_flags(entropy, vector, [&](auto has_entropy, auto has_vector) {
      forward_kernel<Out, decltype(has_entropy)::value, decltype(has_vector)::value>
          <<<grid, kRowThreads, 0, current_stream(z)>>>(tile, out, p ? p->stride(0) : 0, transform,
                                                     targets, counted, states, state.stride(0));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

void rows_backward(Tensor z, Tensor dz, std::optional<Tensor> bias, Tensor target, Tensor count,
                   Tensor upstream, Tensor coefficient, Tensor max, Tensor logsum,
                   int64_t row_start, int64_t column_start, double softcap,
                   double inv_temperature) {
  const Tile tile = tile_of(z, row_start, column_start);
  const Transform transform = transform_of(bias, softcap, inv_temperature);
  const int64_t* targets = pointer<int64_t>(target, ScalarType::Long, "target");
  const int32_t* counted = pointer<int32_t>(count, ScalarType::Int, "count");
  const auto values = [](const Tensor& tensor, const char* name) {
    return pointer<float>(tensor, ScalarType::Float, name);
  };
  const int grid = persistent_grid(z, tile.rows, kRowBlocksPerSm);
  with_type(dz, [&](auto element) {
    using Out = decltype(element);
    const bool vector = vector_rows<float>(z) && vector_rows<Out>(dz);
    with_flags(vector, false, [&](auto has_vector, auto) {
      backward_kernel<Out, decltype(has_vector)::value>
          <<<grid, kRowThreads, 0, current_stream(z)>>>(
              tile, static_cast<Out*>(dz.mutable_data_ptr()), dz.stride(0), transform, targets,
              counted, values(upstream, "upstream"), values(coefficient, "coefficient"),
              values(max, "max"), values(logsum, "logsum"));
    });
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bvpo, CUDA, m) {
  m.impl("cuda_rows_forward", TORCH_BOX(&rows_forward));
  m.impl("cuda_rows_backward", TORCH_BOX(&rows_backward));
}

}  // namespace bvpo::cuda
