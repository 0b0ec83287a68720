// Sixteen floats at a time, in the compilers' own vector types: gcc and clang lower them to whatever
// the enclosing function's target has (AVX-512, AVX2, SSE2, NEON), so one source serves every ISA.
#pragma once

#include <cstdint>
#include <cstring>

namespace bvpo {

typedef float v8 __attribute__((vector_size(32)));
typedef int32_t v8i __attribute__((vector_size(32)));
typedef uint16_t v8h __attribute__((vector_size(16)));
typedef float v16 __attribute__((vector_size(64)));
typedef int32_t v16i __attribute__((vector_size(64)));
typedef uint16_t v16h __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;

#define BVPO_INLINE static inline __attribute__((always_inline))

// BVPO_DISPATCH(name, (parameters), (arguments)) defines `name` as a choice, made once per process,
// between builds of the always-inlined `name_body` for the instruction sets below. Not
// target_clones: gcc matches its arch= against one exact CPU model, and sanitizers break it.
// BVPO_DISPATCH_WIDTHS does so for a template over the vector: gcc keeps a vector that is wider than
// a register in memory, which a loop of few operations per load cannot afford.
#if defined(__x86_64__)
enum class Isa { kBaseline, kAvx2, kAvx512 };

inline Isa isa() {
  static const Isa found = [] {
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Isa::kAvx512;
    }
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    return avx2 ? Isa::kAvx2 : Isa::kBaseline;
  }();
  return found;
}

#define BVPO_DISPATCH_BODIES(name, parameters, arguments, wide, narrow)                   \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))) static void      \
      name##_avx512 parameters {                                                          \
    wide arguments;                                                                       \
  }                                                                                       \
  __attribute__((target("avx2,fma"))) static void name##_avx2 parameters {                \
    narrow arguments;                                                                     \
  }                                                                                       \
  void name parameters {                                                                  \
    if (isa() == Isa::kAvx512) return name##_avx512 arguments;                            \
    if (isa() == Isa::kAvx2) return name##_avx2 arguments;                                \
    narrow arguments;                                                                     \
  }
#else
#define BVPO_DISPATCH_BODIES(name, parameters, arguments, wide, narrow) \
  void name parameters { narrow arguments; }
#endif
#define BVPO_DISPATCH(name, parameters, arguments) \
  BVPO_DISPATCH_BODIES(name, parameters, arguments, name##_body, name##_body)
#define BVPO_DISPATCH_WIDTHS(name, parameters, arguments) \
  BVPO_DISPATCH_BODIES(name, parameters, arguments, name##_body<v16>, name##_body<v8>)

BVPO_INLINE v16 splat(float x) { return v16{} + x; }

BVPO_INLINE v16 load(const float* p) {
  v16 x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

BVPO_INLINE void store(float* p, v16 x) { std::memcpy(p, &x, sizeof(x)); }

BVPO_INLINE v16 max(v16 a, v16 b) { return a > b ? a : b; }
BVPO_INLINE v16 min(v16 a, v16 b) { return a < b ? a : b; }

// exp(x) for x <= 0 (or little above), about one ulp; exactly 0 below the smallest normal number
// and for -inf; NaN stays NaN, so that a broken weight row is seen.
// x = n ln 2 + r with |r| <= ln 2 / 2, n rounded by adding 1.5 * 2^23; a polynomial in r; exponent.
BVPO_INLINE v16 exp_nonpositive(v16 x) {
  const v16 lowest = splat(-87.33654f);
  const v16 magic = splat(12582912.0f);
  const v16i below = x < lowest;
  const v16 y = below ? lowest : x;
  const v16 shifted = y * 1.44269504f + magic;
  const v16 n = shifted - magic;
  const v16 r = (y - n * 0.693359375f) - n * -2.12194440e-4f;
  v16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const v16i exponent = ((v16i)shifted - (v16i)magic) << 23;
  return (v16)(((v16i)p + exponent) & ~below);
}

// tanh(x) as an odd rational function, a few ulp; beyond 7.9 fp32 rounds it to one.
BVPO_INLINE v16 tanh(v16 x) {
  x = min(max(x, splat(-7.90531111f)), splat(7.90531111f));
  const v16 t = x * x;
  v16 p = t * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * t + -8.60467152213735e-11f;
  p = p * t + 5.12229709037114e-08f;
  p = p * t + 1.48572235717979e-05f;
  p = p * t + 6.37261928875436e-04f;
  p = p * t + 4.89352455891786e-03f;
  v16 q = t * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * t + 2.26843463243900e-03f;
  q = q * t + 4.89352518554385e-03f;
  return x * p / q;
}

// Sixteen bf16 bit patterns in the low halves of 32-bit lanes, rounded to nearest even.
BVPO_INLINE v16i to_bf16_bits(v16 x) {
  const v16i bits = (v16i)x;
  const v16i rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return (rounded >> 16) & 0xffff;
}

BVPO_INLINE void store_low_halves(uint16_t* p, v16i bits) {
  const v16h narrow = __builtin_convertvector(bits, v16h);
  std::memcpy(p, &narrow, sizeof(narrow));
}

}  // namespace bvpo
