// Stands in for CUDA's header; the tests do not run half precision.
#pragma once

struct __half {
  unsigned short bits;
};
inline float __half2float(__half) { return 0.0f; }
inline __half __float2half_rn(float) { return {}; }
