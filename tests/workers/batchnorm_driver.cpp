// Runs the norm of kernels/cpu/batchnorm.cpp once, without Python, so that it can be tested on another processor.
//
//   batchnorm_driver HALF VALUES C PLANE RELU < input > output
//
// The input has weight, bias (C float32 each), then x, residual, g and g2 (VALUES activations each, bf16 if HALF is 1).
// The output has y, dx, dz, dweight, dbias and the running mean and variance from 0 and 1 with momentum 0.1, then the y
// of inference with those, and of inference of the same values as planes of PLANE values.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int64_t bn_mask_bytes(int64_t values, int64_t C);
void bn_forward(bool half, const void* x, const void* residual, const float* weight, const float* bias,
                float* running_mean, float* running_var, void* y, void* mask, float* stats, int64_t values, int64_t C,
                double momentum, double eps);
void bn_backward(bool half, const void* g, const void* g2, const void* x, const void* mask, float* stats, void* dz,
                 void* dx, float* dweight, float* dbias, int64_t values, int64_t C);
void bn_inference(bool half, const void* x, const void* residual, const float* weight, const float* bias,
                  const float* mean, const float* var, void* y, int64_t values, int64_t C, int64_t plane,
                  double eps, bool relu);
}

int main(int, char** argv) {
  const bool half = atoi(argv[1]), relu = atoi(argv[5]);
  const int64_t values = atoll(argv[2]), C = atoll(argv[3]), plane = atoll(argv[4]), bytes = values * (half ? 2 : 4);
  const auto input = [](int64_t size) {
    std::vector<char> data(size);
    if (int64_t(fread(data.data(), 1, size, stdin)) != size) exit(1);
    return data;
  };
  const auto weight = input(C * 4), bias = input(C * 4), x = input(bytes), residual = input(bytes), g = input(bytes),
             g2 = input(bytes);
  std::vector<char> y(bytes), dx(bytes), dz(bytes), inferred(bytes), mask(bn_mask_bytes(values, C));
  std::vector<float> dweight(C), dbias(C), mean(C), var(C, 1), stats(3 * C);
  const float *w = (const float*)weight.data(), *b = (const float*)bias.data();
  void* bits = relu ? mask.data() : nullptr;
  bn_forward(half, x.data(), residual.data(), w, b, mean.data(), var.data(), y.data(), bits, stats.data(), values, C,
             0.1, 1e-5);
  bn_backward(half, g.data(), g2.data(), x.data(), bits, stats.data(), dz.data(), dx.data(), dweight.data(),
              dbias.data(), values, C);
  for (const auto* data : {&y, &dx, &dz}) fwrite(data->data(), 1, bytes, stdout);
  for (const auto* data : {&dweight, &dbias, &mean, &var}) fwrite(data->data(), 4, C, stdout);
  for (const int64_t of_one_channel : {int64_t(1), plane}) {
    bn_inference(half, x.data(), residual.data(), w, b, mean.data(), var.data(), inferred.data(), values, C,
                 of_one_channel, 1e-5, relu);
    fwrite(inferred.data(), 1, bytes, stdout);
  }
}
