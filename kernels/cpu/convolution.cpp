// 3x3 convolutions for training on a CPU that has AVX-512 with bf16. Activations are channels-last bf16, the weight's
// gradient float32. The code uses plain pointers and OpenMP and does not depend on torch. convolution.py checks shapes
// and dtypes before it calls these functions.
#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

using bf16 = uint16_t;
using V = __m512;

static void store(bf16* p, V v) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v)); }

struct Ahead {  // prefetches the data that is read next into the L2, a few lines of 64 bytes at a time
  const char *next = nullptr, *end = nullptr;
  void fetch(int lines) {
    for (; lines > 0 && next < end; --lines, next += 64) _mm_prefetch(next, _MM_HINT_T1);
  }
};

// ---- the weight gradient of a 3x3 convolution, padding 1 -----------------------------------------------------------
// dw[k][r][s][c] += dy[h][w][k] x[S h + r - 1][S w + s - 1][c], computed on pairs of pixels: vdpbf16ps multiplies the
// two pixels of a pair, which lie side by side in 32 bits, and adds both products. Each pair of dy, one channel
// broadcast to all lanes, is multiplied with three pairs of x, one for each column s of the window.

// Writes pixels first, first + step, ... of a row of W pixels to out in pairs, padded with zeros at the end of the row,
// and one more pair of zeros after them.
static void pair_up(const bf16* row, int W, int first, int step, int pairs, int C, uint32_t* out) {
  for (int j = 0, at = first; j < pairs; ++j, at += 2 * step)
    for (int c = 0; c < C; c += 16) {
      const bf16* a = row + at * C + c;
      __m512i lo = _mm512_setzero_si512(), hi = lo;
      if (at < W) lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)a));
      if (at + step < W) hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(a + step * C)));
      _mm512_storeu_si512(out + j * C + c, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
  memset(out + pairs * C, 0, C * sizeof *out);
}

template <int S>
struct Gradient {
  int C, K, XH, XW, H, W;       // an image of x is (XH, XW, C), one of dy (H, W, K)
  int pairs = (W + 1) / 2;      // per row of dy
  uint32_t *x[2] = {}, *dy = {};  // pairs of pixels; with stride 2, x[0] has the even columns and x[1] the odd ones
  Ahead ahead = {};

  int x_row() const { return (pairs + 1) * C; }
  int dy_row() const { return (pairs + 1) * K; }

  // Adds to dw row r of the window for input channels c to c + 15 and output channels k to k + 7, summed over n images.
  void tile(int n, int k, int r, int c, float* dw) {
    V sum[8][3];
#pragma GCC unroll 24
    for (int i = 0; i < 24; ++i) sum[i / 3][i % 3] = _mm512_loadu_ps(dw + (i / 3 * 9 + i % 3) * C);
    for (int image = 0; image < n; ++image)
      for (int h = 0; h < H; ++h) {
        ahead.fetch(12);
        const int row = S * h + r - 1;
        if (row < 0 || row >= XH) continue;  // padding
        const int from = (image * XH + row) * x_row() + c;
        const uint32_t *even = x[0] + from, *odd = x[S - 1] + from, *d = dy + (image * H + h) * dy_row() + k;
        __m512i own = _mm512_loadu_si512(odd), left = _mm512_slli_epi32(own, 16);
        for (int j = 0; j < pairs; ++j, even += C, odd += C, d += K) {
          const __m512i after = _mm512_loadu_si512(odd + C), right = _mm512_shrdi_epi32(own, after, 16);
          const __m512i middle = S == 1 ? own : _mm512_loadu_si512(even), last = S == 1 ? right : own;
#pragma GCC unroll 8
          for (int i = 0; i < 8; ++i) {
            const __m512bh g = (__m512bh)_mm512_set1_epi32(d[i]);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], g, (__m512bh)left);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], g, (__m512bh)middle);
            sum[i][2] = _mm512_dpbf16_ps(sum[i][2], g, (__m512bh)last);
          }
          left = right, own = after;
        }
      }
#pragma GCC unroll 24  // without unrolling, the compiler keeps the sums in memory
    for (int i = 0; i < 24; ++i) _mm512_storeu_ps(dw + (i / 3 * 9 + i % 3) * C, sum[i / 3][i % 3]);
  }

  void run(const bf16* x_in, const bf16* dy_in, int N, float* dw) {  // adds the gradient of N images to dw (K, 3, 3, C)
    const int size = S * XH * x_row() + H * dy_row(), most = std::clamp((1 << 14) / size, 1, N);  // 64 KiB of pairs
    std::vector<uint32_t> room(most * size);
    x[0] = room.data(), x[1] = x[0] + most * XH * x_row(), dy = x[S - 1] + most * XH * x_row();
    for (int i = 0, n = most; i < N; i += n) {
      n = std::min(most, N - i);
      for (int h = 0; h < n * XH; ++h, x_in += XW * C)
        for (int odd = 0; odd < S; ++odd) pair_up(x_in, XW, odd, S, pairs, C, x[odd] + h * x_row());
      for (int h = 0; h < n * H; ++h, dy_in += W * K) pair_up(dy_in, W, 0, 1, pairs, K, dy + h * dy_row());
      const int left = std::min(most, N - i - n);
      for (int k = 0; k < K; k += 8)
        for (int r = 0; r < 3; ++r)
          for (int c = 0; c < C; c += 16) {
            if (r + c == 0 && (k == 0 || k == K / 16 * 8)) {  // prefetch the next x in the first half, then the next dy
              ahead.next = (const char*)(k ? dy_in : x_in);
              ahead.end = ahead.next + left * 2 * (k ? H * W * K : XH * XW * C);
            }
            tile(n, k, r, c, dw + (k * 9 + r * 3) * C + c);
          }
    }
  }
};

// Computes dw (K, 3, 3, C) from x (N, XH, XW, C) and dy (N, H, W, K). C is a multiple of 16 and K of 8; H and W are XH
// and XW divided by the stride S, rounded up. Each thread sums its own images, and the threads' sums are added in
// order, so the result is bitwise reproducible for a given number of threads.
extern "C" void weight_gradient(const bf16* x, const bf16* dy, float* dw, int64_t N, int64_t C, int64_t K, int64_t XH,
                                 int64_t XW, int64_t S) {
  const int64_t values = K * 9 * C, threads = omp_get_max_threads(), H = (XH + S - 1) / S, W = (XW + S - 1) / S;
  std::vector<float> sums(threads * values);
#pragma omp parallel
  {
    const int64_t t = omp_get_thread_num(), T = omp_get_num_threads(), n = N * t / T, share = N * (t + 1) / T - n;
    const auto run = [&](auto gradient) {
      if (share) gradient.run(x + n * XH * XW * C, dy + n * H * W * K, share, &sums[t * values]);
    };
    if (S == 1) run(Gradient<1>{int(C), int(K), int(XH), int(XW), int(H), int(W)});
    else run(Gradient<2>{int(C), int(K), int(XH), int(XW), int(H), int(W)});
#pragma omp barrier
#pragma omp for
    for (int64_t i = 0; i < values; ++i) {
      float sum = 0;
      for (int64_t s = 0; s < threads; ++s) sum += sums[s * values + i];
      dw[i] = sum;
    }
  }
}

// ---- 3x3 convolution, stride 1, padding 1; also its input's gradient -------------------------------------------------

// Packs output block `block` of w (K, 3, 3, C) -> [K / 16][3 r][C / 2][3 s][16][2]. If transposed, packs the filter of
// the input's gradient instead: (C, 3, 3, K), rotated by 180 degrees.
static void pack(const bf16* w, int K, int C, bool transposed, int block, bf16* out) {
  const int in = transposed ? K : C;
  out += block * 9 * in * 16;
  for (int r = 0; r < 3; ++r)
    for (int c = 0; c < in; c += 2)
      for (int s = 0; s < 3; ++s)
        for (int k = block * 16; k < block * 16 + 16; ++k)
          for (int i = 0; i < 2; ++i)
            *out++ = transposed ? w[(((c + i) * 3 + 2 - r) * 3 + 2 - s) * C + k] : w[((k * 3 + r) * 3 + s) * C + c + i];
}

// Computes R rows of W pixels for 16 output channels. x points to the top left corner of the window, in an image that
// is padded with zeros.
template <int R, int W, int C>
static void tile(const bf16* x, int x_row, const bf16* w, bf16* y, int y_row, int K) {
  V sum[R][W] = {};
  for (int r = 0; r < 3; ++r, x += x_row)
    for (int c = 0; c < C; c += 2, w += 96) {
      const __m512bh w0 = (__m512bh)_mm512_loadu_si512(w), w1 = (__m512bh)_mm512_loadu_si512(w + 32),
                     w2 = (__m512bh)_mm512_loadu_si512(w + 64);
#pragma GCC unroll 2
      for (int i = 0; i < R; ++i)
#pragma GCC unroll 18
        for (int j = 0; j < W + 2; ++j) {
          const __m512bh a = (__m512bh)_mm512_set1_epi32(*(const int*)(x + i * x_row + j * C + c));
          if (j < W) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], w0, a);
          if (j >= 1 && j <= W) sum[i][j - 1] = _mm512_dpbf16_ps(sum[i][j - 1], w1, a);
          if (j >= 2) sum[i][j - 2] = _mm512_dpbf16_ps(sum[i][j - 2], w2, a);
        }
    }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < W; ++j) store(y + i * y_row + j * K, sum[i][j]);
}

// Convolves one image. room is a buffer of (H + 2, W + 2, C) for the padded image; its border is zero.
template <int R, int T, int C>
static void image(const bf16* x, int H, int W, int K, const bf16* w, bf16* room, bf16* y) {
  const int row = (W + 2) * C, bytes = H * W * C * 2, tiles = K / 16 * (H / R) * (W / T);
  for (int h = 0; h < H; ++h) memcpy(room + (h + 1) * row + C, x + h * W * C, W * C * 2);
  Ahead ahead{(const char*)x + bytes, (const char*)x + 2 * bytes};  // the next image
  for (int k = 0; k < K; k += 16, w += 9 * C * 16)
    for (int h = 0; h < H; h += R)
      for (int j = 0; j < W; j += T) {
        ahead.fetch(bytes / 64 / tiles + 1);
        tile<R, T, C>(room + h * row + j * C, row, w, y + (h * W + j) * K + k, W * K, K);
      }
}

using Convolve = void (*)(const bf16*, int, int, int, const bf16*, bf16*, bf16*);

// Returns the kernel for images of 16, 32 or 64 channels. W is a multiple of 16, or W is a multiple of 8 and H is even.
static Convolve convolution(int W, int C) {
  if (W % 16 == 0) return C == 16 ? image<1, 16, 16> : C == 32 ? image<1, 16, 32> : image<1, 16, 64>;
  return C == 16 ? image<2, 8, 16> : C == 32 ? image<2, 8, 32> : image<2, 8, 64>;
}

// Convolves x (N, H, W, C) with w (K, 3, 3, C) to y (N, H, W, K). If transposed, x is the output's gradient (N, H, W, K)
// and y receives the input's gradient (N, H, W, C). The channels of y are a multiple of 16.
extern "C" void convolve(const bf16* x, const bf16* w, bf16* y, int64_t N, int64_t C, int64_t K, int64_t H, int64_t W,
                         bool transposed) {
  const int64_t in = transposed ? K : C, out = transposed ? C : K;
  const Convolve run = convolution(W, in);
  std::vector<bf16> packed(K * 9 * C);
#pragma omp parallel
  {
#pragma omp for
    for (int64_t k = 0; k < out / 16; ++k) pack(w, K, C, transposed, k, packed.data());
    std::vector<bf16> room((H + 2) * (W + 2) * in);
#pragma omp for
    for (int64_t n = 0; n < N; ++n) run(x + n * H * W * in, H, W, out, packed.data(), room.data(), y + n * H * W * out);
  }
}
