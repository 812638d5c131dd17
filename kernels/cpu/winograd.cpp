// 3x3 convolutions of stride 1 and padding 1 by Winograd's minimal filtering F(MxM, 3x3): A. Lavin and S. Gray, "Fast
// Algorithms for Convolutional Neural Networks" (2016), section 4. Activations are channels-last. In float32, M is 4,
// and 16 outputs take 36 multiplications, not 144. In bf16, which needs AVX-512 with bf16, M is 2, and 4 outputs take
// 16, not 36, because the errors of F(4x4, 3x3) are several times as large. Weights and their gradient are float32. The
// code does not depend on torch. convolution.py checks shapes and dtypes before it calls these functions.
//
// A tile is MxM outputs, and its patch d the (M + 2)x(M + 2) inputs around them. A filter g, a patch d and products m
// are transformed in each channel: u = G g G', v = B' d B, y = A' m A. Between them, each place p of a patch has a
// matrix product over the channels: m[p] = v[p] u[p]. The filter's gradient is G' (the sum over tiles of A dy A' times
// v) G.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "words.h"

// ---- transforms of LANES channels -----------------------------------------------------------------------------------

// The products of B', G, A', A and G' with a column.
template <int M>
struct Transform;

template <>
struct Transform<2> {  // section 4.1
  static void patch(const V d[4], V v[4]) {
    v[0] = d[0] - d[2], v[1] = d[1] + d[2], v[2] = d[2] - d[1], v[3] = d[1] - d[3];
  }
  static void filter(const V g[3], V u[4]) {
    const V even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
    u[0] = g[0], u[1] = even + odd, u[2] = even - odd, u[3] = g[2];
  }
  static void output(const V m[4], V y[2]) { y[0] = m[0] + m[1] + m[2], y[1] = m[1] - m[2] - m[3]; }
  static void output_gradient(const V y[2], V m[4]) {
    m[0] = y[0], m[1] = y[0] + y[1], m[2] = y[0] - y[1], m[3] = -y[1];
  }
  static void filter_gradient(const V u[4], V g[3]) {
    const V half = (u[1] + u[2]) * 0.5f;
    g[0] = u[0] + half, g[1] = (u[1] - u[2]) * 0.5f, g[2] = half + u[3];
  }
};

// Section 4.3 interpolates at the points 0, 1, -1, 2, -2 and infinity. Here they are 0, a, -a, b, -b and infinity with
// a = 1 / b = sqrt(1/2), which halves the errors. At a and -a, a polynomial is its even part plus and minus its odd
// part.
template <>
struct Transform<4> {
  static constexpr float a = 0.70710678f, b = 1.41421356f, aa = 0.5f, bb = 2, of_a = -2 / 3.f, of_b = 1 / 6.f;

  static void patch(const V d[6], V v[6]) {
    const V even_a = d[4] - bb * d[2], odd_a = a * d[3] - b * d[1];
    const V even_b = d[4] - aa * d[2], odd_b = b * d[3] - a * d[1];
    v[0] = d[0] - (aa + bb) * d[2] + d[4], v[5] = d[1] - (aa + bb) * d[3] + d[5];
    v[1] = even_a + odd_a, v[2] = even_a - odd_a, v[3] = even_b + odd_b, v[4] = even_b - odd_b;
  }
  static void filter(const V g[3], V u[6]) {
    const V even_a = of_a * (g[0] + aa * g[2]), odd_a = of_a * a * g[1];
    const V even_b = of_b * (g[0] + bb * g[2]), odd_b = of_b * b * g[1];
    u[0] = g[0], u[5] = g[2];
    u[1] = even_a + odd_a, u[2] = even_a - odd_a, u[3] = even_b + odd_b, u[4] = even_b - odd_b;
  }
  static void output(const V m[6], V y[4]) {
    const V even_a = m[1] + m[2], odd_a = a * (m[1] - m[2]), even_b = m[3] + m[4], odd_b = b * (m[3] - m[4]);
    y[0] = m[0] + even_a + even_b, y[1] = odd_a + odd_b;
    y[2] = aa * even_a + bb * even_b, y[3] = aa * odd_a + bb * odd_b + m[5];
  }
  static void output_gradient(const V y[4], V m[6]) {
    const V even_a = y[0] + aa * y[2], odd_a = a * (y[1] + aa * y[3]);
    const V even_b = y[0] + bb * y[2], odd_b = b * (y[1] + bb * y[3]);
    m[0] = y[0], m[5] = y[3];
    m[1] = even_a + odd_a, m[2] = even_a - odd_a, m[3] = even_b + odd_b, m[4] = even_b - odd_b;
  }
  static void filter_gradient(const V u[6], V g[3]) {
    const V even_a = of_a * (u[1] + u[2]), odd_a = of_a * a * (u[1] - u[2]);
    const V even_b = of_b * (u[3] + u[4]), odd_b = of_b * b * (u[3] - u[4]);
    g[0] = u[0] + even_a + even_b, g[1] = odd_a + odd_b, g[2] = aa * even_a + bb * even_b + u[5];
  }
};

// Applies `one` to the rows of `columns`, transposed: (I, O) -> out (O, O).
template <int I, int O, void (*one)(const V*, V*)>
static void transform_rows(const V* columns, V* out) {
  for (int r = 0; r < O; ++r) {
    V row[I];
    for (int s = 0; s < I; ++s) row[s] = columns[s * O + r];
    one(row, out + r * O);
  }
}

// Applies `one` to the columns of `in`, and then to the rows: in (I, I) -> out (O, O).
template <int I, int O, void (*one)(const V*, V*)>
static void transform(const V* in, V* out) {
  V columns[I * O];
  for (int s = 0; s < I; ++s) {
    V column[I];
    for (int r = 0; r < I; ++r) column[r] = in[r * I + s];
    one(column, columns + s * O);
  }
  transform_rows<I, O, one>(columns, out);
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

template <class T>
constexpr int M = 2;
template <>
constexpr int M<float> = 4;
template <class T>
constexpr int SIDE = M<T> + 2;  // of a patch
template <class T>
constexpr int PLACES = SIDE<T> * SIDE<T>;

template <class T>
struct Images {  // (N, H, W, C), in tiles
  int64_t N, H, W, C, rows = (H + M<T> - 1) / M<T>, columns = (W + M<T> - 1) / M<T>;  // of tiles in an image
  int64_t tiles() const { return N * rows * columns; }
};

template <class T>
struct Place {  // of a tile in its image
  const Images<T>& of;
  int64_t n, i, j;
  Place(const Images<T>& of, int64_t tile)
      : of(of), n(tile / (of.rows * of.columns)), i(tile / of.columns % of.rows), j(tile % of.columns) {}
  void next() {
    if (++j == of.columns) j = 0, ++i;
    if (i == of.rows) i = 0, ++n;
  }
  int64_t row() const { return M<T> * i; }  // of pixels
  int64_t column() const { return M<T> * j; }
  int64_t offset() const { return ((n * of.H + row()) * of.W + column()) * of.C; }
};

// Calls put(i, p, v) for each tile first + i and place p, with v = B' d B of channels c to c + LANES - 1.
template <class T, class Put>
static void transform_patches(const T* x, const Images<T>& of, int64_t first, int64_t tiles, int64_t c, Put put) {
  constexpr int64_t MOST = 8;  // tiles at a time, in one row of tiles, which have columns in common
  Place<T> at(of, first);
  for (int64_t i = 0; i < tiles;) {
    const int64_t n = std::min({tiles - i, of.columns - at.j, MOST}), top = at.row() - 1, left = at.column() - 1;
    const T* image = x + at.n * of.H * of.W * of.C + c;
    V columns[(MOST * M<T> + 2) * SIDE<T>];
    for (int64_t s = 0; s < n * M<T> + 2; ++s) {
      const int64_t w = left + s, bottom = w >= 0 && w < of.W ? of.H : 0;
      V d[SIDE<T>];
      for (int64_t r = 0, h = top; r < SIDE<T>; ++r, ++h)
        d[r] = h >= 0 && h < bottom ? load(image + (h * of.W + w) * of.C) : V();
      Transform<M<T>>::patch(d, columns + s * SIDE<T>);
    }
    for (int64_t k = 0; k < n; ++k, ++i, at.next()) {
      V v[PLACES<T>];
      transform_rows<SIDE<T>, SIDE<T>, Transform<M<T>>::patch>(columns + k * M<T> * SIDE<T>, v);
      for (int p = 0; p < PLACES<T>; ++p) put(i, p, v[p]);
    }
  }
}

// ---- the convolution and its input's gradient -----------------------------------------------------------------------

constexpr int ROWS = 6;           // of a product's part whose sums stay in registers
constexpr int64_t FEW = 64 * 64;  // filters, which an L2 holds beside the patches and products of a task

// Returns the tiles of a task, which reads all filters once.
static int64_t tiles_of_a_task(int64_t filters) { return filters <= FEW ? 2 * ROWS : 4 * ROWS; }

// Transforms 16 output channels of w (K, 3, 3, C) to u [out / 16][PLACES][in, in words][16]. If transposed,
// transforms the filter of the input's gradient: in and out swapped, and rotated by 180 degrees.
template <class T>
static void transform_filters(const float* w, int64_t K, int64_t C, bool transposed, int64_t block, WordOf<T>* u) {
  constexpr int VALUES = Word<T>::VALUES;
  const int64_t words = (transposed ? K : C) / VALUES;
  for (int64_t word = 0; word < words; ++word)
    for (int64_t k = 0; k < 16; k += LANES) {
      V both[VALUES][PLACES<T>], pair[VALUES];
      for (int i = 0; i < VALUES; ++i) {
        const int64_t c = word * VALUES + i, first = block * 16 + k;
        V g[9];
        for (int t = 0; t < 9; ++t)
          if (transposed) g[t] = load(w + (c * 9 + 8 - t) * C + first);
          else
            for (int lane = 0; lane < LANES; ++lane) g[t][lane] = w[((first + lane) * 9 + t) * C + c];
        transform<3, SIDE<T>, Transform<M<T>>::filter>(g, both[i]);
      }
      for (int p = 0; p < PLACES<T>; ++p) {
        for (int i = 0; i < VALUES; ++i) pair[i] = both[i][p];
        Word<T>::put(u + ((block * PLACES<T> + p) * words + word) * 16 + k, pair);
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

// Computes N LANES output channels from `channel` on of some tiles from their patches v [PLACES][room][in, in words].
template <class T, int N>
static void outputs(const WordOf<T>* v, int64_t room, const WordOf<T>* u, int64_t words, const Images<T>& to,
                    int64_t first, int64_t tiles, int64_t channel, const Epilogue<T>& act, T* y) {
  constexpr int64_t WIDTH = N * LANES;
  float* const m = scratch<float, PRODUCTS>(PLACES<T> * room * WIDTH);
  for (int p = 0; p < PLACES<T>; ++p)
    for (int64_t i = p * room; i < p * room + tiles; i += ROWS)
      multiply<T, N>(v + i * words, u + p * words * 16, PLACES<T> * words * 16, words, m + i * WIDTH);
  Place<T> at(to, first);
  for (int64_t i = 0; i < tiles; ++i, at.next()) {
    const int64_t corner = at.offset() + channel, below = to.H - at.row(), right = to.W - at.column();
    for (int64_t k = 0; k < WIDTH; k += LANES) {
      V products[PLACES<T>], sums[M<T> * M<T>];
      for (int p = 0; p < PLACES<T>; ++p) products[p] = load(m + (p * room + i) * WIDTH + k);
      transform<SIDE<T>, M<T>, Transform<M<T>>::output>(products, sums);
      for (int r = 0; r < M<T> && r < below; ++r)
        for (int s = 0; s < M<T> && s < right; ++s) {
          const int64_t pixel = corner + (r * to.W + s) * to.C + k;
          V sum = sums[r * M<T> + s];
          if (act.bias) sum += load(act.bias + channel + k);
          if (act.residual) sum += load(act.residual + pixel);
          store(y + pixel, act.relu ? relu(sum) : sum);
        }
    }
  }
}

template <class T>
static void convolve(const T* x, const float* w, const Epilogue<T>& act, T* y, int64_t N, int64_t C, int64_t K,
                     int64_t H, int64_t W, bool transposed) {
  const Images<T> from{N, H, W, transposed ? K : C}, to{N, H, W, transposed ? C : K};
  const int64_t words = from.C / Word<T>::VALUES, tiles = from.tiles(), room = tiles_of_a_task(K * C);
  auto* const u = scratch<WordOf<T>, FILTERS>(PLACES<T> * words * to.C);
  parallel_for(to.C / 16, [&](int64_t block) { transform_filters<T>(w, K, C, transposed, block, u); });
  parallel_for((tiles + room - 1) / room, [&](int64_t task) {
    auto* const v = scratch<WordOf<T>, PATCHES>(PLACES<T> * room * words);
    const int64_t first = task * room, n = std::min(room, tiles - first);
    for (int64_t c = 0; c < from.C; c += LANES)
      transform_patches(x, from, first, n, c, [&](int64_t i, int p, V value) {
        store((T*)(v + (p * room + i) * words) + c, value);
      });
    const auto run = [&](auto vectors, int64_t k) {
      outputs<T, vectors.value>(v, room, u + k * PLACES<T> * words, words, to, first, n, k, act, y);
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
static void transform_gradient(const T* dy, const Place<T>& at, bool any, int64_t k, V out[PLACES<T>]) {
  const Images<T>& of = at.of;
  const int64_t below = any ? of.H - at.row() : 0, right = of.W - at.column();
  V tile[M<T> * M<T>] = {};
  for (int r = 0; r < M<T> && r < below; ++r)
    for (int s = 0; s < M<T> && s < right; ++s)
      tile[r * M<T> + s] = load(dy + at.offset() + (r * of.W + s) * of.C + k);
  transform<M<T>, SIDE<T>, Transform<M<T>>::output_gradient>(tile, out);
}

// Adds the products of words `begin` to `end` of tiles to sum [PLACES][K][C]. each(n, f) calls f(0), ..., f(n - 1).
template <class T, class Each>
static void add_gradients(const T* x, const T* dy, const Images<T>& from, const Images<T>& to, int64_t begin,
                          int64_t end, float* sum, Each each) {
  constexpr int VALUES = Word<T>::VALUES, CHUNK = 16;  // words of a task
  const int64_t C = from.C, K = to.C, most = (1 << 18) / PLACES<T> / (C + K) / RUN * RUN;
  const int64_t room = std::min(end - begin, std::max(most, RUN));  // words at a time: 1 MiB of patches and gradients
  auto* const v = scratch<WordOf<T>, PATCHES>(PLACES<T> * room * C);
  auto* const g = scratch<WordOf<T>, GRADIENTS>(PLACES<T> * room * K);
  for (; begin < end; begin += room) {
    const int64_t words = std::min(room, end - begin);
    each((words + CHUNK - 1) / CHUNK, [&](int64_t chunk) {
      const int64_t first = chunk * CHUNK, n = std::min<int64_t>(CHUNK, words - first), tile = (begin + first) * VALUES;
      const int64_t here = std::min(n * VALUES, from.tiles() - tile);
      V left[PLACES<T>] = {};  // values of a pair's first tile
      for (int64_t c = 0; c < C; c += LANES)
        transform_patches(x, from, tile, here, c, [&](int64_t i, int p, V value) {
          V pair[2] = {value, {}};
          if (i % VALUES) pair[0] = left[p], pair[1] = value;
          else left[p] = value;
          if (i % VALUES == VALUES - 1 || i == here - 1)
            Word<T>::put(v + (p * room + first + i / VALUES) * C + c, pair);
        });
      Place<T> at(to, tile);
      for (int64_t i = 0; i < n; ++i) {
        const Place<T> one = at;
        at.next();
        const bool both = VALUES == 2 && i * 2 + 1 < here;
        for (int64_t k = 0; k < K; k += LANES) {
          V values[2][PLACES<T>], pair[2];
          transform_gradient(dy, one, true, k, values[0]);
          if (VALUES == 2) transform_gradient(dy, at, both, k, values[1]);
          for (int p = 0; p < PLACES<T>; ++p) {
            pair[0] = values[0][p], pair[1] = values[VALUES - 1][p];
            Word<T>::put(g + (p * room + first + i) * K + k, pair);
          }
        }
        if (VALUES == 2) at.next();
      }
    });
    const int64_t strip = LANES == 16 ? 64 : 16, strips = (C + strip - 1) / strip;
    each(PLACES<T> * strips, [&](int64_t task) {
      const int64_t p = task / strips, c = task % strips * strip, left = C - c;
      const auto run = [&](auto vectors, int64_t c) {
        accumulate_all<T, vectors.value>(g + p * room * K, v + p * room * C + c, words, K, C, sum + p * K * C + c);
      };
      if (left >= strip) return run(std::integral_constant<int, 4 / (LANES == 8 ? 2 : 1)>(), c);
      if (left & 32) run(std::integral_constant<int, 2>(), c);
      if (left & 16) run(std::integral_constant<int, 1>(), c + (left & 32));
    });
  }
}

// With few filters, each thread sums its own tiles, and its sums, patches and gradients stay in its L2. With more, the
// threads sum the same tiles, each at other places.
template <class T>
static void weight_gradient(const T* x, const T* dy, float* dw, int64_t N, int64_t C, int64_t K, int64_t H, int64_t W) {
  const Images<T> from{N, H, W, C}, to{N, H, W, K};
  const int64_t words = (from.tiles() + Word<T>::VALUES - 1) / Word<T>::VALUES, size = PLACES<T> * K * C;
  const int64_t parts = K * C <= FEW ? std::min<int64_t>(omp_get_max_threads(), words) : 1;
  float* const sums = scratch<float, SUMS>(parts * size);
  std::fill_n(sums, parts * size, 0.f);
  if (parts > 1) {
    const auto here = [](int64_t n, auto f) { for (int64_t i = 0; i < n; ++i) f(i); };
    parallel_for(parts, [&](int64_t t) {
      add_gradients(x, dy, from, to, words * t / parts, words * (t + 1) / parts, sums + t * size, here);
    });
  } else {
    add_gradients(x, dy, from, to, 0, words, sums, [](int64_t n, auto f) { parallel_for(n, f); });
  }
  parallel_for(K, [&](int64_t k) {
    for (int64_t c = 0; c < C; c += LANES) {
      V u[PLACES<T>] = {}, g[9];
      for (int64_t t = 0; t < parts; ++t)
        for (int p = 0; p < PLACES<T>; ++p) u[p] += load(sums + t * size + (p * K + k) * C + c);
      transform<SIDE<T>, 3, Transform<M<T>>::filter_gradient>(u, g);
      for (int t = 0; t < 9; ++t) store(dw + (k * 9 + t) * C + c, g[t]);
    }
  });
}

// ---- the functions that Python calls --------------------------------------------------------------------------------
// Their first argument is true if the activations are bf16. C and K are multiples of 16.

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

// Computes dw (K, 3, 3, C) from x (N, H, W, C) and dy (N, H, W, K). With few filters, rounding depends on the number of
// threads; the result is bitwise reproducible for a given number.
extern "C" void winograd_weight_gradient(bool half, const void* x, const void* dy, float* dw, int64_t N, int64_t C,
                                         int64_t K, int64_t H, int64_t W) {
  with_type(half, [&](auto type) {
    using T = decltype(type);
    weight_gradient((const T*)x, (const T*)dy, dw, N, C, K, H, W);
  });
}
