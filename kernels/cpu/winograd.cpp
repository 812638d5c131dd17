// 3x3 convolutions of stride 1 and padding 1 by Winograd's minimal filtering F(2x2, 3x3): A. Lavin and S. Gray, "Fast
// Algorithms for Convolutional Neural Networks" (2016), section 4.1. Four outputs take 16 multiplications, not 36.
// Activations are channels-last, float32 or, on a CPU that has AVX-512 with bf16, bf16; weights and their gradient are
// float32. The code does not depend on torch. convolution.py checks shapes and dtypes before it calls these functions.
//
// A tile is 2x2 outputs, and its patch d the 4x4 inputs around them. A filter g, a patch d and products m are
// transformed in each channel: u = G g G', v = B' d B, y = A' m A. Between them, each of the 16 places p of a patch has
// a matrix product over the channels: m[p] = v[p] u[p]. The filter's gradient is G' (the sum over tiles of A dy A'
// times v) G.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "words.h"

struct Images {  // (N, H, W, C), in tiles of 2x2 pixels
  int64_t N, H, W, C, rows = (H + 1) / 2, columns = (W + 1) / 2;  // of tiles in an image
  int64_t tiles() const { return N * rows * columns; }
};

struct Place {  // of a tile, its first row and column in its image
  const Images& of;
  int64_t n, i, j;
  Place(const Images& of, int64_t tile)
      : of(of), n(tile / (of.rows * of.columns)), i(tile / of.columns % of.rows), j(tile % of.columns) {}
  void next() {
    if (++j == of.columns) j = 0, ++i;
    if (i == of.rows) i = 0, ++n;
  }
};

// ---- transforms of LANES channels -----------------------------------------------------------------------------------

// Computes one column of B' d; the patch's top row is h.
template <class T>
static void patch_column(const T* image, const Images& of, int64_t h, int64_t w, V* out) {
  V d[4] = {};
  for (int64_t r = 0; r < 4; ++r)
    if (w >= 0 && w < of.W && h + r >= 0 && h + r < of.H) d[r] = load(image + ((h + r) * of.W + w) * of.C);
  out[0] = d[0] - d[2], out[1] = d[1] + d[2], out[2] = d[2] - d[1], out[3] = d[1] - d[3];
}

// Calls put(i, p, v) for each tile first + i and place p, with v = B' d B of channels c to c + LANES - 1.
template <class T, class Put>
static void transform_patches(const T* x, const Images& of, int64_t first, int64_t tiles, int64_t c, Put put) {
  V column[4][4];
  Place at(of, first);
  for (int64_t i = 0; i < tiles; ++i, at.next()) {
    const T* image = x + at.n * of.H * of.W * of.C + c;
    const int64_t h = 2 * at.i - 1, w = 2 * at.j - 1;
    const bool starts = i == 0 || at.j == 0;  // otherwise two columns are those of the tile on the left
    for (int s = 0; s < 2; ++s)
      if (starts) patch_column(image, of, h, w + s, column[s]);
      else std::copy_n(column[s + 2], 4, column[s]);
    for (int s = 2; s < 4; ++s) patch_column(image, of, h, w + s, column[s]);
    for (int r = 0; r < 4; ++r) {
      put(i, 4 * r + 0, column[0][r] - column[2][r]);
      put(i, 4 * r + 1, column[1][r] + column[2][r]);
      put(i, 4 * r + 2, column[2][r] - column[1][r]);
      put(i, 4 * r + 3, column[1][r] - column[3][r]);
    }
  }
}

// Computes u = G g G'.
static void transform_filter(const V g[3][3], V u[16]) {
  V e[4][3];
  for (int s = 0; s < 3; ++s) {
    const V outer = (g[0][s] + g[2][s]) * 0.5f, inner = g[1][s] * 0.5f;
    e[0][s] = g[0][s], e[1][s] = outer + inner, e[2][s] = outer - inner, e[3][s] = g[2][s];
  }
  for (int r = 0; r < 4; ++r) {
    const V outer = (e[r][0] + e[r][2]) * 0.5f, inner = e[r][1] * 0.5f;
    u[4 * r] = e[r][0], u[4 * r + 1] = outer + inner, u[4 * r + 2] = outer - inner, u[4 * r + 3] = e[r][2];
  }
}

// ---- the convolution and its input's gradient -----------------------------------------------------------------------

constexpr int64_t BLOCK = 48;  // tiles of a task, whose patches and products fit in an L2
constexpr int ROWS = 6;        // of a product's part whose sums stay in registers

// Transforms 16 output channels of w (K, 3, 3, C) to u [out / 16][16 places][in, in words][16]. If transposed,
// transforms the filter of the input's gradient: in and out swapped, and rotated by 180 degrees.
template <class T>
static void transform_filters(const float* w, int64_t K, int64_t C, bool transposed, int64_t block, WordOf<T>* u) {
  constexpr int VALUES = Word<T>::VALUES;
  const int64_t words = (transposed ? K : C) / VALUES;
  for (int64_t word = 0; word < words; ++word)
    for (int64_t k = 0; k < 16; k += LANES) {
      V both[VALUES][16], pair[VALUES];
      for (int i = 0; i < VALUES; ++i) {
        const int64_t c = word * VALUES + i, first = block * 16 + k;
        V g[3][3];
        for (int r = 0; r < 3; ++r)
          for (int s = 0; s < 3; ++s)
            if (transposed) g[r][s] = load(w + ((c * 3 + 2 - r) * 3 + 2 - s) * C + first);
            else
              for (int lane = 0; lane < LANES; ++lane) g[r][s][lane] = w[(((first + lane) * 3 + r) * 3 + s) * C + c];
        transform_filter(g, both[i]);
      }
      for (int p = 0; p < 16; ++p) {
        for (int i = 0; i < VALUES; ++i) pair[i] = both[i][p];
        Word<T>::put(u + ((block * 16 + p) * words + word) * 16 + k, pair);
      }
    }
}

// Multiplies ROWS rows of v with N vectors of u's columns, to m (ROWS, N LANES). A block of u's 16 columns is `apart`.
template <class T, int N>
static void multiply(const WordOf<T>* v, const WordOf<T>* u, int64_t apart, int64_t words, float* m) {
  V sum[ROWS][N] = {};
  for (int64_t w = 0; w < words; ++w, u += 16)
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) {
        const auto columns = Word<T>::read(u + n * LANES / 16 * apart + n * LANES % 16);
        sum[r][n] = Word<T>::multiply_add(sum[r][n], columns, v[r * words + w]);
      }
  for (int r = 0; r < ROWS; ++r)
    for (int n = 0; n < N; ++n) store(m + (r * N + n) * LANES, sum[r][n]);
}

// What is done with a sum before it is stored: act(sum + bias + residual); bias and residual may be null.
template <class T>
struct Epilogue {
  const float* bias;  // of each output channel
  const T* residual;  // like the output, and may be the same memory
  bool relu;
};

// Computes N LANES output channels from k on of some tiles from their patches v [16 places][BLOCK][in, in words].
template <class T, int N>
static void outputs(const WordOf<T>* v, const WordOf<T>* u, int64_t words, const Images& to, int64_t first,
                    int64_t tiles, int64_t channel, const Epilogue<T>& act, T* y) {
  constexpr int64_t WIDTH = N * LANES;
  float* const m = scratch<float, PRODUCTS>(16 * BLOCK * WIDTH);
  for (int p = 0; p < 16; ++p)
    for (int64_t i = p * BLOCK; i < p * BLOCK + tiles; i += ROWS)
      multiply<T, N>(v + i * words, u + p * words * 16, 16 * words * 16, words, m + i * WIDTH);
  Place at(to, first);
  for (int64_t i = 0; i < tiles; ++i, at.next()) {
    const int64_t corner = ((at.n * to.H + 2 * at.i) * to.W + 2 * at.j) * to.C + channel;
    const int below = 2 * at.i + 1 < to.H, right = 2 * at.j + 1 < to.W;
    for (int64_t k = 0; k < WIDTH; k += LANES) {
      V e[2][4];
      for (int s = 0; s < 4; ++s) {
        V q[4];
        for (int r = 0; r < 4; ++r) q[r] = load(m + ((4 * r + s) * BLOCK + i) * WIDTH + k);
        e[0][s] = q[0] + q[1] + q[2], e[1][s] = q[1] - q[2] - q[3];
      }
      const auto put = [&](int64_t i, V sum) {
        if (act.bias) sum += load(act.bias + channel + k);
        if (act.residual) sum += load(act.residual + i);
        store(y + i, act.relu ? relu(sum) : sum);
      };
      for (int r = 0; r <= below; ++r) {
        const int64_t row = corner + r * to.W * to.C + k;
        put(row, e[r][0] + e[r][1] + e[r][2]);
        if (right) put(row + to.C, e[r][1] - e[r][2] - e[r][3]);
      }
    }
  }
}

template <class T>
static void convolve(const T* x, const float* w, const Epilogue<T>& act, T* y, int64_t N, int64_t C, int64_t K,
                     int64_t H, int64_t W, bool transposed) {
  const Images from{N, H, W, transposed ? K : C}, to{N, H, W, transposed ? C : K};
  const int64_t words = from.C / Word<T>::VALUES, tiles = from.tiles();
  auto* const u = scratch<WordOf<T>, FILTERS>(16 * words * to.C);
  parallel_for(to.C / 16, [&](int64_t block) { transform_filters<T>(w, K, C, transposed, block, u); });
  parallel_for((tiles + BLOCK - 1) / BLOCK, [&](int64_t block) {
    auto* const v = scratch<WordOf<T>, PATCHES>(16 * BLOCK * words);
    const int64_t first = block * BLOCK, n = std::min(BLOCK, tiles - first);
    for (int64_t c = 0; c < from.C; c += LANES)
      transform_patches(x, from, first, n, c, [&](int64_t i, int p, V value) {
        store((T*)(v + (p * BLOCK + i) * words) + c, value);
      });
    const auto run = [&](auto vectors, int64_t k) {
      outputs<T, vectors.value>(v, u + k * 16 * words, words, to, first, n, k, act, y);
    };
    int64_t k = 0;
    for (; LANES == 16 && k + 64 <= to.C; k += 64) run(std::integral_constant<int, 4>(), k);
    for (; LANES == 16 && k + 32 <= to.C; k += 32) run(std::integral_constant<int, 2>(), k);
    for (; k < to.C; k += 16) run(std::integral_constant<int, 16 / LANES>(), k);
  });
}

// ---- the weight's gradient ------------------------------------------------------------------------------------------
// Each place has a product over the tiles, so a word has the values of one tile, or of two.

// Adds to sum (4, C) the products of n words: 4 output channels of g (n, K) times N vectors of channels of v (n, C).
template <class T, int N>
static void accumulate(const WordOf<T>* g, const WordOf<T>* v, int64_t n, int64_t K, int64_t C, float* to) {
  V sum[4][N] = {};  // from zero, because a sum of few terms, added to the others, has smaller rounding errors
  for (int64_t i = 0; i < n; ++i, g += K, v += C)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
#pragma GCC unroll 4
      for (int c = 0; c < N; ++c) sum[k][c] = Word<T>::multiply_add(sum[k][c], Word<T>::read(v + c * LANES), g[k]);
  for (int k = 0; k < 4; ++k)
    for (int c = 0; c < N; ++c) store(to + k * C + c * LANES, load(to + k * C + c * LANES) + sum[k][c]);
}

constexpr int64_t RUN = 64;  // words of one accumulation: 64 channels of them fit in an L1

template <class T, int N>
static void accumulate_all(const WordOf<T>* g, const WordOf<T>* v, int64_t n, int64_t K, int64_t C, float* sum) {
  for (int64_t i = 0; i < n; i += RUN)
    for (int64_t k = 0; k < K; k += 4)
      accumulate<T, N>(g + i * K + k, v + i * C, std::min(RUN, n - i), K, C, sum + k * C);
}

// Computes A dy A' of channels k to k + LANES - 1 at the tile, or zeros for no tile.
template <class T>
static void transform_gradient(const T* dy, const Images& of, const Place& at, bool any, int64_t k, V out[16]) {
  const T* d = dy + ((at.n * of.H + 2 * at.i) * of.W + 2 * at.j) * of.C + k;
  const bool below = 2 * at.i + 1 < of.H, right = 2 * at.j + 1 < of.W;
  const V zero = {}, a = any ? load(d) : zero, b = any && right ? load(d + of.C) : zero;
  const V c = any && below ? load(d + of.W * of.C) : zero;
  const V e = any && below && right ? load(d + (of.W + 1) * of.C) : zero;
  const V left[4] = {a, a + c, a - c, -c}, other[4] = {b, b + e, b - e, -e};
  for (int r = 0; r < 4; ++r) {
    out[4 * r] = left[r], out[4 * r + 1] = left[r] + other[r];
    out[4 * r + 2] = left[r] - other[r], out[4 * r + 3] = -other[r];
  }
}

template <class T>
static void weight_gradient(const T* x, const T* dy, float* dw, int64_t N, int64_t C, int64_t K, int64_t H, int64_t W) {
  constexpr int VALUES = Word<T>::VALUES, CHUNK = 16;  // words of a task
  const Images from{N, H, W, C}, to{N, H, W, K};
  const int64_t tiles = from.tiles(), all = (tiles + VALUES - 1) / VALUES;
  const int64_t room = std::min(all, std::max<int64_t>(RUN, (1 << 14) / (C + K) / RUN * RUN));  // words at a time
  auto *const v = scratch<WordOf<T>, PATCHES>(16 * room * C), *const g = scratch<WordOf<T>, GRADIENTS>(16 * room * K);
  float* const sum = scratch<float, SUMS>(16 * K * C);
  std::fill_n(sum, 16 * K * C, 0.f);
  for (int64_t begin = 0; begin < all; begin += room) {
    const int64_t words = std::min(room, all - begin);
    parallel_for((words + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
      const int64_t first = chunk * CHUNK, n = std::min<int64_t>(CHUNK, words - first), tile = (begin + first) * VALUES;
      const int64_t here = std::min(n * VALUES, tiles - tile);
      V left[16] = {};  // values of a pair's first tile
      for (int64_t c = 0; c < C; c += LANES)
        transform_patches(x, from, tile, here, c, [&](int64_t i, int p, V value) {
          V pair[2] = {value, {}};
          if (i % VALUES) pair[0] = left[p], pair[1] = value;
          else left[p] = value;
          if (i % VALUES == VALUES - 1 || i == here - 1)
            Word<T>::put(v + (p * room + first + i / VALUES) * C + c, pair);
        });
      Place at(to, tile);
      for (int64_t i = 0; i < n; ++i) {
        const Place one = at;
        at.next();
        const bool both = VALUES == 2 && i * 2 + 1 < here;
        for (int64_t k = 0; k < K; k += LANES) {
          V values[2][16], pair[2];
          transform_gradient(dy, to, one, true, k, values[0]);
          if (VALUES == 2) transform_gradient(dy, to, at, both, k, values[1]);
          for (int p = 0; p < 16; ++p) {
            pair[0] = values[0][p], pair[1] = values[VALUES - 1][p];
            Word<T>::put(g + (p * room + first + i) * K + k, pair);
          }
        }
        if (VALUES == 2) at.next();
      }
    });
    const int64_t strip = LANES == 16 ? 64 : 16, strips = (C + strip - 1) / strip;
    parallel_for(16 * strips, [&](int64_t task) {
      const int64_t p = task / strips, c = task % strips * strip, left = C - c;
      const auto run = [&](auto vectors, int64_t c) {
        accumulate_all<T, vectors.value>(g + p * room * K, v + p * room * C + c, words, K, C, sum + p * K * C + c);
      };
      if (left >= strip) return run(std::integral_constant<int, 4 / (LANES == 8 ? 2 : 1)>(), c);
      if (left & 32) run(std::integral_constant<int, 2>(), c);
      if (left & 16) run(std::integral_constant<int, 1>(), c + (left & 32));
    });
  }
  parallel_for(K, [&](int64_t k) {
    for (int64_t c = 0; c < C; c += LANES) {
      V e[3][4];
      for (int s = 0; s < 4; ++s) {
        V q[4];
        for (int r = 0; r < 4; ++r) q[r] = load(sum + ((4 * r + s) * K + k) * C + c);
        const V half = (q[1] + q[2]) * 0.5f;
        e[0][s] = q[0] + half, e[1][s] = (q[1] - q[2]) * 0.5f, e[2][s] = half + q[3];
      }
      for (int r = 0; r < 3; ++r) {
        float* const row = dw + (k * 3 + r) * 3 * C + c;
        const V half = (e[r][1] + e[r][2]) * 0.5f;
        store(row, e[r][0] + half), store(row + C, (e[r][1] - e[r][2]) * 0.5f), store(row + 2 * C, half + e[r][3]);
      }
    }
  });
}

// ---- the functions that Python calls --------------------------------------------------------------------------------
// Their first argument is true if the activations are bf16. C and K are multiples of 16. Results do not depend on the
// number of threads.

// Computes y = act(conv(x) + bias + residual), (N, H, W, K), for x (N, H, W, C) and w (K, 3, 3, C); bias and residual
// may be null. If transposed, x is the output's gradient (N, H, W, K), and y receives the input's gradient
// (N, H, W, C).
extern "C" void winograd(bool half, const void* x, const float* w, const float* bias, const void* residual, void* y,
                         int64_t N, int64_t C, int64_t K, int64_t H, int64_t W, bool relu, bool transposed) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    convolve((const T*)x, w, {bias, (const T*)residual, relu}, (T*)y, N, C, K, H, W, transposed);
  });
}

// Computes dw (K, 3, 3, C) from x (N, H, W, C) and dy (N, H, W, K).
extern "C" void winograd_weight_gradient(bool half, const void* x, const void* dy, float* dw, int64_t N, int64_t C,
                                         int64_t K, int64_t H, int64_t W) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    weight_gradient((const T*)x, (const T*)dy, dw, N, C, K, H, W);
  });
}
