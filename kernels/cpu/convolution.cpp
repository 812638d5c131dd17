// 3x3 convolutions with padding 1 for training on a CPU, by direct multiplication, alone or with the BatchNorm + ReLU
// (+ add) that follows. Activations and weights are channels-last, float32 or, on a CPU that has AVX-512 with bf16,
// bf16; the weight's gradient is float32. The code does not depend on torch. convolution.py and conv_norm.py check
// shapes and dtypes before they call these functions.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "batchnorm.h"
#include "words.h"

struct Ahead {  // prefetches the data that is read next into the L2, a few lines of 64 bytes at a time
  const char *next = nullptr, *end = nullptr;

  Ahead() = default;
  template <class T>
  Ahead(const T* from, int64_t values) : next((const char*)from), end((const char*)(from + values)) {}
  int lines() const { return (end - next) / 64; }
  void fetch(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// ---- the weight gradient of a 3x3 convolution, padding 1 -----------------------------------------------------------
// dw[k][r][s][c] += dy[h][w][k] x[S h + r - 1][S w + s - 1][c], computed on words of pixels: one pixel in float32, and
// two pixels that lie side by side in 32 bits in bf16, whose products are both added. Each word of dy, one channel
// broadcast to all lanes, is multiplied with three words of x, one for each column s of the window.

// Writes pixels first, first + step, ... of a row of W pixels to out in words, padded with zeros at the end of the row.
template <class T>
static void pack_pixels(const T* row, int W, int first, int step, int words, int C, WordOf<T>* out) {
  for (int j = 0, at = first; j < words; ++j, at += Word<T>::VALUES * step)
    for (int c = 0; c < C; c += LANES) {
      V values[2] = {};
      for (int i = 0; i < Word<T>::VALUES; ++i)
        if (at + i * step < W) values[i] = load(row + (at + i * step) * C + c);
      Word<T>::put_exact(out + j * C + c, values);
    }
}

template <class T, int S>
struct WeightGradient {
  static constexpr int CHANNELS = LANES == 16 ? 8 : 4;  // of dy, whose sums of three columns stay in registers
  static constexpr bool PACKS_DY = Word<T>::VALUES > 1, PACKS_X = PACKS_DY || S > 1;  // otherwise pixels are words
  using Words = typename Word<T>::Vector;

  int C, K, XH, XW, H, W;  // an image of x is (XH, XW, C), one of dy (H, W, K)
  int in_row = W * K, in_image = H * in_row;  // values from one row of dy to the next, and from one image to the next
  int words = (W + Word<T>::VALUES - 1) / Word<T>::VALUES;  // per row of dy
  const WordOf<T>*x[2] = {}, *dy = {};  // words of pixels; with stride 2, x[0] has even columns and x[1] odd ones
  int dy_row = PACKS_DY ? words * K : in_row, dy_image = PACKS_DY ? H * dy_row : in_image;  // likewise, in words
  Ahead ahead = {};

  int x_row() const { return words * C; }

  // Adds to dw row r of the window for input channels from c and output channels from k on, summed over n images.
  void tile(int n, int k, int r, int c, float* dw) {
    V sum[CHANNELS][3] = {};  // from zero, because a sum of few terms, added to dw, has smaller rounding errors
    for (int image = 0; image < n; ++image)
      for (int h = 0; h < H; ++h) {
        ahead.fetch(12);
        const int row = S * h + r - 1;
        if (row < 0 || row >= XH) continue;  // padding
        const int from = (image * XH + row) * x_row() + c;
        const WordOf<T>*even = x[0] + from, *odd = x[S - 1] + from, *d = dy + image * dy_image + h * dy_row + k;
        Words own = Word<T>::read(odd), left = Word<T>::before(Words(), own);
        const auto step = [&](Words after) {
          const Words middle = S == 1 ? own : Word<T>::read(even), last = S == 1 ? Word<T>::behind(own, after) : own;
#pragma GCC unroll 8
          for (int i = 0; i < CHANNELS; ++i) {
            sum[i][0] = Word<T>::multiply_add(sum[i][0], left, d[i]);
            sum[i][1] = Word<T>::multiply_add(sum[i][1], middle, d[i]);
            sum[i][2] = Word<T>::multiply_add(sum[i][2], last, d[i]);
          }
          left = Word<T>::before(own, after), own = after;
          even += C, odd += C, d += K;
        };
        for (int j = 1; j < words; ++j) step(Word<T>::read(odd + C));
        step(Words());  // behind the end of the row is padding
      }
#pragma GCC unroll 24  // without unrolling, the compiler keeps the sums in memory
    for (int i = 0; i < 3 * CHANNELS; ++i) {
      float* const to = dw + (i / 3 * 9 + i % 3) * C;
      store(to, load(to) + sum[i / 3][i % 3]);
    }
  }

  int size() const { return S * XH * x_row() + H * words * K; }  // words of an image of x and one of dy
  int most() const { return std::max((1 << 14) / size(), 1); }   // images of one call of add: 64 KiB, or one image

  // Adds the gradient of n images to dw (K, 3, 3, C), and prefetches next_x in the first half and then next_dy.
  void add(const T* x_in, const T* dy_in, int n, float* dw, Ahead next_x, Ahead next_dy) {
    auto* room = scratch<WordOf<T>, PATCHES>(n * size());
    if constexpr (PACKS_X)
      for (int odd = 0; odd < S; ++odd) {
        x[odd] = room;
        for (int h = 0; h < n * XH; ++h, room += x_row()) pack_pixels(x_in + h * XW * C, XW, odd, S, words, C, room);
      }
    else x[0] = x_in;
    dy = room;
    if constexpr (PACKS_DY)
      for (int h = 0; h < n * H; ++h, room += dy_row)
        pack_pixels(dy_in + h / H * in_image + h % H * in_row, W, 0, 1, words, K, room);
    else dy = dy_in;
    for (int k = 0; k < K; k += CHANNELS)
      for (int r = 0; r < 3; ++r)
        for (int c = 0; c < C; c += LANES) {
          if (r + c == 0 && (k == 0 || k == K / 16 * 8)) ahead = k ? next_dy : next_x;
          tile(n, k, r, c, dw + (k * 9 + r * 3) * C + c);
        }
  }
};

// ---- 3x3 convolution, stride 1, padding 1; also its input's gradient ------------------------------------------------

// Packs LANES output channels of w (K, 3, 3, C) -> [K / LANES][3 r][C in words][3 s][LANES words]. If transposed, packs
// the filter of the input's gradient instead: (C, 3, 3, K), rotated by 180 degrees.
template <class T>
static void pack_filters(const T* w, int K, int C, bool transposed, int block, T* out) {
  const int in = transposed ? K : C;
  out += block * 9 * in * LANES;
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < in; c += Word<T>::VALUES)
      for (int s = 0; s < 3; ++s)
        for (int k = block * LANES; k < block * LANES + LANES; ++k)
          for (int i = 0; i < Word<T>::VALUES; ++i)
            *out++ = transposed ? w[(((c + i) * 3 + 2 - r) * 3 + 2 - s) * C + k] : w[((k * 3 + r) * 3 + s) * C + c + i];
}

// Computes R rows of W pixels for LANES output channels. x points to the top left corner of the window, in an image
// that is padded with zeros. Rows and pixels have x_row and C words.
template <int R, int W, int C, class T>
static void tile(const WordOf<T>* x, int x_row, const WordOf<T>* w, T* y, int y_row, int K) {
  V sum[R][W] = {};
  for (int r = 0; r < 3; ++r, x += x_row)
    for (int c = 0; c < C; ++c, w += 3 * LANES) {
      const auto w0 = Word<T>::read(w), w1 = Word<T>::read(w + LANES), w2 = Word<T>::read(w + 2 * LANES);
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 18
        for (int j = 0; j < W + 2; ++j) {
          const WordOf<T> a = x[i * x_row + j * C + c];
          if (j < W) sum[i][j] = Word<T>::multiply_add(sum[i][j], w0, a);
          if (j >= 1 && j <= W) sum[i][j - 1] = Word<T>::multiply_add(sum[i][j - 1], w1, a);
          if (j >= 2) sum[i][j - 2] = Word<T>::multiply_add(sum[i][j - 2], w2, a);
        }
    }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < W; ++j) store(y + i * y_row + j * K, sum[i][j]);
}

// Convolves an image (H + 2, W + 2, C), padded with zeros, to y (H, W, K) in tiles of R rows of P pixels.
template <class T, int C, int R, int P>
static void image(const T* x, int H, int W, int K, const T* w, T* y, Ahead ahead) {
  const int row = (W + 2) * C, tiles = K / LANES * (H / R) * (W / P), lines = ahead.lines() / tiles + 1;
  constexpr int VALUES = Word<T>::VALUES;
  for (int k = 0; k < K; k += LANES, w += 9 * C * LANES)
    for (int h = 0; h < H; h += R)
      for (int j = 0; j < W; j += P) {
        ahead.fetch(lines);
        const auto *from = (const WordOf<T>*)(x + h * row + j * C), *filter = (const WordOf<T>*)w;
        tile<R, P, C / VALUES>(from, row / VALUES, filter, y + (h * W + j) * K + k, W * K, K);
      }
}

template <class T>
using Convolve = void (*)(const T*, int, int, int, const T*, T*, Ahead);

// Returns the kernel for images of 16, 32 or 64 channels. W is a multiple of 16, or W is a multiple of 8 and H is even.
template <class T, int C>
static Convolve<T> convolution(int W) {
  if (LANES < 16) return image<T, C, 1, 8>;
  return W % 16 == 0 ? image<T, C, 1, 16> : image<T, C, 2, 8>;
}

// A convolution of images of one size, or its input's gradient.
template <class T>
class Convolution {
  int in, out, H, W;
  Convolve<T> convolve;
  T* filters;

 public:
  Convolution(const T* w, int64_t C, int64_t K, int64_t H, int64_t W, bool transposed)
      : in(transposed ? K : C), out(transposed ? C : K), H(H), W(W),
        convolve(in == 16 ? convolution<T, 16>(W) : in == 32 ? convolution<T, 32>(W) : convolution<T, 64>(W)),
        filters(scratch<T, FILTERS>(K * 9 * C)) {
    parallel_for(out / LANES, [&](int64_t k) { pack_filters(w, K, C, transposed, k, filters); });
  }

  int row() const { return (W + 2) * in; }  // of a padded image
  int size() const { return (H + 2) * row(); }
  T* padded(int64_t images) const {  // room of this thread for padded images, whose borders are zero
    T* const room = scratch<T, IMAGES>(images * size());
    return std::fill_n(room, images * size(), T()) - images * size();
  }
  T* inside(T* padded, int64_t h) const { return padded + (h + 1) * row() + in; }  // row h without its border
  void run(const T* padded, T* y, Ahead ahead) const { convolve(padded, H, W, out, filters, y, ahead); }
  void run(const T* x, T* padded, T* y, Ahead ahead) const {
    for (int h = 0; h < H; ++h) std::copy_n(x + h * W * in, W * in, inside(padded, h));
    run(padded, y, ahead);
  }
};

// The images whose values are summed in float32: up to 16,384 values as in batchnorm.cpp, or one image.
static int64_t images_of_a_chunk(int64_t values) { return std::max<int64_t>(16384 / values, 1); }

// Calls f(thread, first, end) for each thread's share of N.
template <class F>
static void each_share(int64_t N, F f) {
  const int64_t threads = std::min<int64_t>(N, omp_get_max_threads());
  parallel_for(threads, [&](int64_t t) { f(t, N * t / threads, N * (t + 1) / threads); });
}

// Sums weight gradients of `values` values, a multiple of LANES: each thread sums its own images, and the threads' sums
// are added in order, so the result is bitwise reproducible for a given number of threads.
class ThreadSums {
  int64_t values;
  std::vector<float> sums;

 public:
  ThreadSums(int64_t values) : values(values), sums(omp_get_max_threads() * values) {}
  float* of(int64_t thread) { return &sums[thread * values]; }
  void total(float* dw) const {
    parallel_for(values / LANES, [&](int64_t k) {
      V sum = {};
      for (int64_t i = k * LANES; i < int64_t(sums.size()); i += values) sum += load(&sums[i]);
      store(dw + k * LANES, sum);
    });
  }
};

// ---- the functions that Python calls --------------------------------------------------------------------------------
// Their first argument is true if the activations are bf16.

// Computes dw (K, 3, 3, C) from x (N, XH, XW, C) and dy (N, H, W, K). C is a multiple of 16 and K of 8; H and W are XH
// and XW divided by the stride S, rounded up.
extern "C" void weight_gradient(bool half, const void* x, const void* dy, float* dw, int64_t N, int64_t C, int64_t K,
                                int64_t XH, int64_t XW, int64_t S) {
  const int64_t H = (XH + S - 1) / S, W = (XW + S - 1) / S, of_x = XH * XW * C, of_dy = H * W * K;
  ThreadSums sums(K * 9 * C);
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const auto run = [&](auto gradient, int64_t first, int64_t end, float* sum) {
      for (int64_t i = first, n; i < end; i += n) {
        n = std::min<int64_t>(gradient.most(), end - i);
        const T *from = (const T*)x + i * of_x, *to = (const T*)dy + i * of_dy;
        const int64_t next = std::min(n, end - i - n);
        gradient.add(from, to, n, sum, Ahead(from + n * of_x, next * of_x), Ahead(to + n * of_dy, next * of_dy));
      }
    };
    each_share(N, [&](int64_t t, int64_t first, int64_t end) {
      if (S == 1) run(WeightGradient<T, 1>{int(C), int(K), int(XH), int(XW), int(H), int(W)}, first, end, sums.of(t));
      else run(WeightGradient<T, 2>{int(C), int(K), int(XH), int(XW), int(H), int(W)}, first, end, sums.of(t));
    });
  });
  sums.total(dw);
}

// Convolves x (N, H, W, C) with w (K, 3, 3, C) to y (N, H, W, K), all of one type. If transposed, x is the output's
// gradient (N, H, W, K) and y receives the input's gradient (N, H, W, C). The channels of y are a multiple of 16.
extern "C" void convolve(bool half, const void* x, const void* w, void* y, int64_t N, int64_t C, int64_t K, int64_t H,
                         int64_t W, bool transposed) {
  const int64_t of_x = H * W * (transposed ? K : C), of_y = H * W * (transposed ? C : K);
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Convolution<T> conv((const T*)w, C, K, H, W, transposed);
    each_share(N, [&](int64_t, int64_t first, int64_t end) {
      T* const room = conv.padded(1);
      for (int64_t n = first; n < end; ++n) {
        const T* const from = (const T*)x + n * of_x;
        conv.run(from, room, (T*)y + n * of_y, Ahead(from + of_x, of_x));
      }
    });
  });
}

// Convolves x (N, H, W, C) with w (K, 3, 3, C) to z (N, H, W, K), and computes y = act(BatchNorm(z) + residual), as
// bn_forward does. Images of z are summed while they are in the cache.
extern "C" void convolve_normalise(bool half, const void* x, const void* w, void* z, const void* residual,
                                   const float* weight, const float* bias, float* running_mean, float* running_var,
                                   void* y, Bits* mask, float* stats, int64_t N, int64_t C, int64_t K, int64_t H,
                                   int64_t W, double momentum, double eps) {
  const int64_t of_x = H * W * C, of_z = H * W * K;
  const int64_t images = images_of_a_chunk(of_z);
  const Shape s(N * of_z, K, images * of_z);
  const Stats t(stats, K);
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Convolution<T> conv((const T*)w, C, K, H, W, false);
    conv.run((const T*)x, conv.padded(1), (T*)z, {});  // because its first pixel is the origin
    const std::vector<float> origin = first_pixel((const T*)z, s);
    Sums sums(s);
    each_share(s.chunks, [&](int64_t, int64_t first, int64_t end) {
      T* const room = conv.padded(1);
      for (int64_t k = first; k < end; ++k) {
        for (int64_t n = k * images; n < std::min(k * images + images, N); ++n) {
          const T* const from = (const T*)x + n * of_x;
          if (n) conv.run(from, room, (T*)z + n * of_z, Ahead(from + of_x, of_x));
        }
        sum_about(sums, s, k, (const T*)z + k * images * of_z, origin.data(), s.chunk_rows(k));
      }
    });
    sums.finish(s);
    set_statistics(t, sums, origin, weight, {running_mean, running_var, momentum}, eps, N * of_z, K);
    const Affine map{s.repeated(t.mean), s.repeated(t.scale), s.repeated(bias)};
    normalise((const T*)z, (const T*)residual, (T*)y, mask, mask != nullptr, map, s);
  });
}

// Computes the gradients of convolve_normalise; g, g2, mask, stats, dz, dweight and dbias are those of bn_backward. dx
// is null if it is not needed. The gradient of z is never stored: an image of it is used while it is in the cache.
extern "C" void convolve_normalise_backward(bool half, const void* g, const void* g2, const void* x, const void* w,
                                            const void* z, const Bits* mask, float* stats, void* dz, void* dx,
                                            float* dw, float* dweight, float* dbias, int64_t N, int64_t C, int64_t K,
                                            int64_t H, int64_t W) {
  const int64_t of_x = H * W * C, of_z = H * W * K;
  const Shape s(N * of_z, K, images_of_a_chunk(of_z) * of_z);
  ThreadSums sums(K * 9 * C);
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Gradient map = parameter_gradients((const T*)g, (const T*)g2, (const T*)z, mask, Stats(stats, K), (T*)dz,
                                             dweight, dbias, N * of_z, s);
    const T* const masked = (const T*)(dz ? dz : g);
    const Bits* const bits = dz ? nullptr : mask;
    const Convolution<T> conv((const T*)w, C, K, H, W, true);
    each_share(N, [&](int64_t t, int64_t first, int64_t end) {
      WeightGradient<T, 1> gradient{int(C), int(K), int(H), int(W), int(H), int(W), conv.row(), conv.size()};
      const int64_t most = gradient.most();
      T* const dy = conv.padded(most);
      for (int64_t i = first, n; i < end; i += n) {
        n = std::min(most, end - i);
        const int64_t next = std::min(n, end - i - n), after = (i + n) * of_z;
        for (int64_t j = 0; j < n; ++j) {
          T* const image = dy + j * conv.size();
          for (int64_t h = 0, k = (i + j) * of_z; h < H; ++h, k += W * K) {
            const Output<T> to(conv.inside(image, h), false);
            input_gradient_rows(masked + k, at(bits, k / LANES), (const T*)z + k, to, map, s.width, W * K / s.width);
          }
          const Ahead ahead(masked + after + j * of_z, j < next ? of_z : 0);
          if (dx) conv.run(image, (T*)dx + (i + j) * of_x, ahead);
        }
        const T* const from = (const T*)x + i * of_x;
        const Ahead next_x(from + n * of_x, next * of_x), next_z((const T*)z + after, next * of_z);
        gradient.add(from, conv.inside(dy, 0), n, sums.of(t), next_x, next_z);
      }
    });
  });
  sums.total(dw);
}
