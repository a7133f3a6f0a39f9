// The kernels of uncompressed matrices, for the Operands of linear.hpp.
#include "step_dense.hpp"

// In float32 (0), bfloat16 (1) or float16 (2).
extern "C" const reallm::Kernels* reallm_dense(int dtype) {
  using namespace reallm::step;
  return dtype == 0 ? dense_kernels<float>() : dtype == 1 ? dense_kernels<Bf16>() : dense_kernels<Fp16>();
}
