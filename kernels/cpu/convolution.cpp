// 3x3 convolutions with padding 1 for training on a CPU, by direct multiplication. Activations and weights are
// channels-last, float32 or, on a CPU that has AVX-512 with bf16, bf16; the weight's gradient is float32. The code does
// not depend on torch. convolution.py checks shapes and dtypes before it calls these functions.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "words.h"

struct Ahead {  // prefetches the data that is read next into the L2, a few lines of 64 bytes at a time
  const char *next = nullptr, *end = nullptr;
  void fetch(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) __builtin_prefetch(next, 0, 2);
  }
};

// ---- the weight gradient of a 3x3 convolution, padding 1 -----------------------------------------------------------
// dw[k][r][s][c] += dy[h][w][k] x[S h + r - 1][S w + s - 1][c], computed on words of pixels: one pixel in float32, and
// two pixels that lie side by side in 32 bits in bf16, whose products are both added. Each word of dy, one channel
// broadcast to all lanes, is multiplied with three words of x, one for each column s of the window.

// Writes pixels first, first + step, ... of a row of W pixels to out in words, padded with zeros at the end of the row,
// and one more word of zeros after them.
template <class T>
static void pack_pixels(const T* row, int W, int first, int step, int words, int C, WordOf<T>* out) {
  for (int j = 0, at = first; j < words; ++j, at += Word<T>::VALUES * step)
    for (int c = 0; c < C; c += LANES) {
      V values[2] = {};
      for (int i = 0; i < Word<T>::VALUES; ++i)
        if (at + i * step < W) values[i] = load(row + (at + i * step) * C + c);
      Word<T>::put_exact(out + j * C + c, values);
    }
  memset(out + words * C, 0, C * sizeof *out);
}

template <class T, int S>
struct Gradient {
  static constexpr int CHANNELS = LANES == 16 ? 8 : 4;  // of dy, whose sums of three columns stay in registers
  using Words = typename Word<T>::Vector;

  int C, K, XH, XW, H, W;  // an image of x is (XH, XW, C), one of dy (H, W, K)
  int words = (W + Word<T>::VALUES - 1) / Word<T>::VALUES;  // per row of dy
  WordOf<T>*x[2] = {}, *dy = {};  // words of pixels; with stride 2, x[0] has the even columns and x[1] the odd ones
  Ahead ahead = {};

  int x_row() const { return (words + 1) * C; }
  int dy_row() const { return (words + 1) * K; }

  // Adds to dw row r of the window for input channels from c and output channels from k on, summed over n images.
  void tile(int n, int k, int r, int c, float* dw) {
    V sum[CHANNELS][3] = {};  // from zero, because a sum of few terms, added to dw, has smaller rounding errors
    for (int image = 0; image < n; ++image)
      for (int h = 0; h < H; ++h) {
        ahead.fetch(12);
        const int row = S * h + r - 1;
        if (row < 0 || row >= XH) continue;  // padding
        const int from = (image * XH + row) * x_row() + c;
        const WordOf<T>*even = x[0] + from, *odd = x[S - 1] + from, *d = dy + (image * H + h) * dy_row() + k;
        Words own = Word<T>::read(odd), left = Word<T>::before(Words(), own);
        for (int j = 0; j < words; ++j, even += C, odd += C, d += K) {
          const Words after = Word<T>::read(odd + C);
          const Words middle = S == 1 ? own : Word<T>::read(even), last = S == 1 ? Word<T>::behind(own, after) : own;
#pragma GCC unroll 8
          for (int i = 0; i < CHANNELS; ++i) {
            sum[i][0] = Word<T>::multiply_add(sum[i][0], left, d[i]);
            sum[i][1] = Word<T>::multiply_add(sum[i][1], middle, d[i]);
            sum[i][2] = Word<T>::multiply_add(sum[i][2], last, d[i]);
          }
          left = Word<T>::before(own, after), own = after;
        }
      }
#pragma GCC unroll 24  // without unrolling, the compiler keeps the sums in memory
    for (int i = 0; i < 3 * CHANNELS; ++i) {
      float* const to = dw + (i / 3 * 9 + i % 3) * C;
      store(to, load(to) + sum[i / 3][i % 3]);
    }
  }

  void run(const T* x_in, const T* dy_in, int N, float* dw) {  // adds the gradient of N images to dw (K, 3, 3, C)
    const int size = S * XH * x_row() + H * dy_row(), most = std::clamp((1 << 14) / size, 1, N);  // 64 KiB of words
    x[0] = scratch<WordOf<T>, PATCHES>(most * size);
    x[1] = x[0] + most * XH * x_row(), dy = x[S - 1] + most * XH * x_row();
    for (int i = 0, n = most; i < N; i += n) {
      n = std::min(most, N - i);
      for (int h = 0; h < n * XH; ++h, x_in += XW * C)
        for (int odd = 0; odd < S; ++odd) pack_pixels(x_in, XW, odd, S, words, C, x[odd] + h * x_row());
      for (int h = 0; h < n * H; ++h, dy_in += W * K) pack_pixels(dy_in, W, 0, 1, words, K, dy + h * dy_row());
      const int left = std::min(most, N - i - n);
      for (int k = 0; k < K; k += CHANNELS)
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < C; c += LANES) {
            if (r + c == 0 && (k == 0 || k == K / 16 * 8)) {  // prefetch the next x in the first half, then the next dy
              ahead.next = (const char*)(k ? dy_in : x_in);
              ahead.end = ahead.next + left * sizeof(T) * (k ? H * W * K : XH * XW * C);
            }
            tile(n, k, r, c, dw + (k * 9 + r * 3) * C + c);
          }
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

// Convolves an image of C channels in tiles of R rows of P pixels. room is a buffer of (H + 2, W + 2, C) for the padded
// image; its border is zero.
template <class T, int C, int R, int P>
static void image(const T* x, int H, int W, int K, const T* w, T* room, T* y) {
  const int row = (W + 2) * C, bytes = H * W * C * sizeof(T), tiles = K / LANES * (H / R) * (W / P);
  constexpr int VALUES = Word<T>::VALUES;
  for (int h = 0; h < H; ++h) memcpy(room + (h + 1) * row + C, x + h * W * C, W * C * sizeof(T));
  Ahead ahead{(const char*)x + bytes, (const char*)x + 2 * bytes};  // the next image
  for (int k = 0; k < K; k += LANES, w += 9 * C * LANES)
    for (int h = 0; h < H; h += R)
      for (int j = 0; j < W; j += P) {
        ahead.fetch(bytes / 64 / tiles + 1);
        const auto *from = (const WordOf<T>*)(room + h * row + j * C), *filter = (const WordOf<T>*)w;
        tile<R, P, C / VALUES>(from, row / VALUES, filter, y + (h * W + j) * K + k, W * K, K);
      }
}

template <class T>
using Convolve = void (*)(const T*, int, int, int, const T*, T*, T*);

// Returns the kernel for images of 16, 32 or 64 channels. W is a multiple of 16, or W is a multiple of 8 and H is even.
template <class T, int C>
static Convolve<T> convolution(int W) {
  if (LANES < 16) return image<T, C, 1, 8>;
  return W % 16 == 0 ? image<T, C, 1, 16> : image<T, C, 2, 8>;
}

// ---- the functions that Python calls --------------------------------------------------------------------------------
// Their first argument is true if the activations are bf16.

// Computes dw (K, 3, 3, C) from x (N, XH, XW, C) and dy (N, H, W, K). C is a multiple of 16 and K of 8; H and W are XH
// and XW divided by the stride S, rounded up. Each thread sums its own images, and the threads' sums are added in
// order, so the result is bitwise reproducible for a given number of threads.
extern "C" void weight_gradient(bool half, const void* x, const void* dy, float* dw, int64_t N, int64_t C, int64_t K,
                                int64_t XH, int64_t XW, int64_t S) {
  const int64_t values = K * 9 * C, threads = omp_get_max_threads(), H = (XH + S - 1) / S, W = (XW + S - 1) / S;
  std::vector<float> sums(threads * values);
  with_type(half, [&](auto type) {
    using T = decltype(type);
    parallel_for(threads, [&](int64_t t) {
      const int64_t n = N * t / threads, share = N * (t + 1) / threads - n;
      const T *from = (const T*)x + n * XH * XW * C, *gradient = (const T*)dy + n * H * W * K;
      float* const sum = &sums[t * values];
      const auto run = [&](auto of) {
        if (share) of.run(from, gradient, share, sum);
      };
      if (S == 1) run(Gradient<T, 1>{int(C), int(K), int(XH), int(XW), int(H), int(W)});
      else run(Gradient<T, 2>{int(C), int(K), int(XH), int(XW), int(H), int(W)});
    });
  });
  parallel_for(K, [&](int64_t k) {
    for (int64_t i = k * 9 * C; i < (k + 1) * 9 * C; ++i) {
      float sum = 0;
      for (int64_t t = 0; t < threads; ++t) sum += sums[t * values + i];
      dw[i] = sum;
    }
  });
}

// Convolves x (N, H, W, C) with w (K, 3, 3, C) to y (N, H, W, K), all of one type. If transposed, x is the output's
// gradient (N, H, W, K) and y receives the input's gradient (N, H, W, C). The channels of y are a multiple of 16.
extern "C" void convolve(bool half, const void* x, const void* w, void* y, int64_t N, int64_t C, int64_t K, int64_t H,
                         int64_t W, bool transposed) {
  const int64_t in = transposed ? K : C, out = transposed ? C : K, room = (H + 2) * (W + 2) * in;
  with_type(half, [&](auto type) {
    using T = decltype(type);
    const Convolve<T> run = in == 16 ? convolution<T, 16>(W) : in == 32 ? convolution<T, 32>(W) : convolution<T, 64>(W);
    T* const packed = scratch<T, FILTERS>(K * 9 * C);
    parallel_for(out / LANES, [&](int64_t k) { pack_filters((const T*)w, K, C, transposed, k, packed); });
    const int64_t chunks = std::min<int64_t>(N, omp_get_max_threads());
    parallel_for(chunks, [&](int64_t t) {
      T* const padded = scratch<T, PATCHES>(room);
      std::fill_n(padded, room, T());
      for (int64_t n = N * t / chunks; n < N * (t + 1) / chunks; ++n)
        run((const T*)x + n * H * W * in, H, W, out, packed, padded, (T*)y + n * H * W * out);
    });
  });
}
