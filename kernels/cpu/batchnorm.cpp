// BatchNorm + ReLU (+ add) on a CPU, for training and inference. Activations are channels-last, and for inference also
// NCHW, in bf16 or float32; parameters and statistics are float32. The code needs AVX-512, AVX2 with FMA or NEON, and
// does not depend on torch.
// batchnorm.py checks shapes and dtypes before it calls these functions.
#include <algorithm>
#include "batchnorm.h"

// ---- forward, backward, inference -----------------------------------------------------------------------------------

template <class T>
static void forward(const T* x, const T* residual, const float* weight, const float* bias, const Running& running, T* y,
                    Bits* mask, const Stats& t, double eps, int64_t values, int64_t C) {
  const Shape s(values, C);
  const std::vector<float> origin = first_pixel(x, s);
  Sums sums(s);
  parallel_for(s.chunks, [&](int64_t k) {
    sum_about(sums, s, k, x + k * s.height * s.width, origin.data(), s.chunk_rows(k));
  });
  // The last row is filled with the origin, whose distance is 0.
  if (s.rest) sum_about(sums, s, s.chunks, last_row(x, s, x).data(), origin.data(), 1);
  sums.finish(s);
  set_statistics(t, sums, origin, weight, running, eps, values, C);
  const Affine map{s.repeated(t.mean), s.repeated(t.scale), s.repeated(bias)};
  normalise(x, residual, y, mask, mask != nullptr, map, s);
}

template <class T>
static void backward(const T* g, const T* g2, const T* x, const Bits* mask, const Stats& t, T* dz, T* dx,
                     float* dweight, float* dbias, int64_t values, int64_t C) {
  const Shape s(values, C);
  const Gradient map = parameter_gradients(g, g2, x, mask, t, dz, dweight, dbias, values, s);
  const T* masked = dz ? dz : g;  // dz has been masked
  const Bits* bits = dz ? nullptr : mask;
  const bool large = is_large(s.rows * s.width);
  parallel_for(s.chunks, [&](int64_t k) {
    const int64_t i = k * s.height * s.width;
    const Output<T> to(dx + i, large);
    input_gradient_rows(masked + i, at(bits, i / LANES), x + i, to, map, s.width, s.chunk_rows(k));
  });
  if (!s.rest) return;
  const auto row = last_row(masked, s), x_row = last_row(x, s);
  std::vector<T> dx_row(s.width);
  const int64_t i = s.rows * s.width;
  input_gradient_rows(row.data(), at(bits, i / LANES), x_row.data(), Output<T>(dx_row.data(), false), map, s.width, 1);
  std::copy_n(dx_row.begin(), s.rest, dx + i);
}

// Returns the bytes of ReLU's mask: one bit per value on x86-64, two on aarch64, and the last row is padded.
extern "C" int64_t bn_mask_bytes(int64_t values, int64_t C) {
  const Shape s(values, C);
  return (s.rows + (s.rest > 0)) * s.width / LANES * sizeof(Bits);
}

// The functions below have one more argument in front, which is true if the activations are bf16.

// Computes y = act(BatchNorm(x) + residual) with the statistics of x, and updates the running statistics. x, residual
// and y have `values` elements. mask receives ReLU's mask; if it is null, there is no ReLU. residual and the running
// statistics may be null. stats receives 3 x C values.
extern "C" void bn_forward(bool half, const void* x, const void* residual, const float* weight, const float* bias,
                           float* running_mean, float* running_var, void* y, Bits* mask, float* stats, int64_t values,
                           int64_t C, double momentum, double eps) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    const Running running{running_mean, running_var, momentum};
    forward((const T*)x, (const T*)residual, weight, bias, running, (T*)y, mask, Stats(stats, C), eps, values, C);
  };
  half ? run(bf16()) : run(float());
}

// Computes the gradients of bn_forward. g and g2 (or null) are two gradients of y, which are added. mask and stats come
// from bn_forward. dz receives the residual's gradient, (g + g2) masked by ReLU; it is null without residual and g2.
extern "C" void bn_backward(bool half, const void* g, const void* g2, const void* x, const Bits* mask, float* stats,
                            void* dz, void* dx, float* dweight, float* dbias, int64_t values, int64_t C) {
  const auto run = [&](auto type) {
    using T = decltype(type);
    backward((const T*)g, (const T*)g2, (const T*)x, mask, Stats(stats, C), (T*)dz, (T*)dx, dweight, dbias, values, C);
  };
  half ? run(bf16()) : run(float());
}

// Computes y = act(BatchNorm(x) + residual) with the given statistics. residual may be null. `plane` consecutive values
// belong to one channel: 1 if the tensors are channels-last, H W, at least 16, if they are NCHW.
extern "C" void bn_inference(bool half, const void* x, const void* residual, const float* weight, const float* bias,
                             const float* mean, const float* var, void* y, int64_t values, int64_t C, int64_t plane,
                             double eps, bool relu) {
  const Shape s(values, C);
  std::vector<float> scale(C);
  for (int64_t c = 0; c < C; ++c) scale[c] = weight[c] / std::sqrt(var[c] + eps);
  const auto run = [&](auto type) {
    using T = decltype(type);
    const auto in = (const T*)x, added = (const T*)residual;
    if (plane > 1) {
      const Affine map{{mean, mean + C}, scale, {bias, bias + C}};
      normalise_planes(in, added, (T*)y, relu, map, values / plane, plane);
    } else {
      const Affine map{s.repeated(mean), s.repeated(scale.data()), s.repeated(bias)};
      normalise(in, added, (T*)y, nullptr, relu, map, s);
    }
  };
  half ? run(bf16()) : run(float());
}
