// The passes of BatchNorm + ReLU (+ add) on a CPU. Activations are channels-last, in bf16 or float32; parameters and
// statistics are float32.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>
#include <vector>

#include "vectors.h"

constexpr int UNROLL = LANES == 4 ? 8 : 4;  // vectors per row of a tile, whose sums stay in registers
constexpr int TILE = UNROLL * LANES;

// ---- the order of the work ------------------------------------------------------------------------------------------
// lcm(C, 64) values, a whole number of pixels, form one row, so every row of every tensor is a whole number of vectors.
// The values after the last whole row are copied into a padded row of their own. Rows are split into chunks, one task
// each. Neither rows nor chunks depend on the number of threads, and a column is summed from top to bottom, so the sums
// depend neither on the number of threads nor on the vectors' length.

// True for more than an L2 and its share of an L3 hold: 4 MiB of float32.
static bool is_large(int64_t values) { return values >= 1 << 20; }

struct Shape {
  int64_t C, width, rows, rest;  // rest: values after the last whole row
  int64_t height, chunks;        // rows per chunk; the row of the rest is a chunk of its own

  Shape(int64_t values, int64_t C, int64_t of_a_chunk = 0)  // of_a_chunk: values, in whole rows; 0 chooses their number
      : C(C), width(std::lcm(C, int64_t(64))), rows(values / width), rest(values % width),
        height(of_a_chunk ? of_a_chunk / width : std::clamp<int64_t>(16384 / width, 32, 256)),
        chunks((rows + height - 1) / height) {}

  int64_t partials() const { return chunks + (rest > 0); }
  int64_t chunk_rows(int64_t k) const { return std::min(height, rows - k * height); }
  std::vector<float> repeated(const float* p) const {  // the values of C channels, repeated to fill a row
    std::vector<float> row(width);
    for (int64_t i = 0; i < width; ++i) row[i] = p[i % C];
    return row;
  }
};

// Calls f(i, c, u, ahead) for every vector of `rows` rows: i is the offset of its first value, c its column, u its
// number within a tile, and ahead the distance to the values to prefetch. open(c) and close(c) enclose a tile, which is
// TILE columns of `group` rows. Tensors are read row by row, because strips of columns from top to bottom took
// up to 1.7 times as long from memory. A tile of several rows saves loads and stores of sums and parameters. That pays
// if a row is one or two tiles, and if the parameters fill the L1.
template <class Open, class F, class Close>
static void each_vector(int64_t width, int64_t rows, Open open, F f, Close close) {
  const int64_t group = width == 64 ? 16 : width >= 2048 ? 4 : 1;
  const int64_t next = group == 1 ? 1024 : std::min<int64_t>(width, 256);
  for (int64_t top = 0; top < rows; top += group)
    for (int64_t c = 0; c < width; c += TILE) {
      const int64_t ahead = group == 1 || c + next < width ? next : next + (group - 1) * width;
      const int64_t end = std::min(top + group, rows);
      open(c);
      for (int64_t r = top; r < end; ++r)
#pragma GCC unroll 8
        for (int u = 0; u < UNROLL; ++u) f(r * width + c + u * LANES, c + u * LANES, u, ahead);
      close(c);
    }
}

template <class F>
static void each_vector(int64_t width, int64_t rows, F f) {
  each_vector(width, rows, [](int64_t) {}, f, [](int64_t) {});
}

// Loads a vector, and prefetches a line of 64 bytes into the L2, each line once. The hardware does not follow as many
// streams as there are.
template <class T>
static V read(const T* p, int64_t i, int u, int64_t ahead) {
  if (u * LANES * sizeof(T) % 64 == 0) __builtin_prefetch(p + i + ahead, 0, 2);
  return load(p + i);
}

// The address of value i of a tensor that may not be there.
template <class T>
static T* at(T* p, int64_t i) {
  return p ? p + i : p;
}

// A tensor that is written. Large float32 tensors are written past the caches, because a line that is written through a
// cache is first read from memory; with the next reader counted, that takes 0.8 to 1 times as long. bf16 gains nothing.
template <class T>
class Output {
  T* p;
  bool streams;

 public:
  Output(T* p, bool is_large) : p(p), streams(is_large && (uintptr_t)p % 64 == 0) {}

  void put(int64_t i, V v) const {  // writes values i to i + LANES - 1
    if constexpr (std::is_same_v<T, float>)
      if (streams) return stream(p + i, v);
    store(p + i, v);
  }
};

// The values after the last whole row in a row that is padded with `fill`, which has C values, or with zeros.
template <class T>
static std::vector<T> last_row(const T* p, const Shape& s, const T* fill = nullptr) {
  std::vector<T> row(p ? s.width : 0);
  if (!p) return row;
  std::copy_n(p + s.rows * s.width, s.rest, row.begin());
  for (int64_t i = s.rest; fill && i < s.width; ++i) row[i] = fill[i % s.C];
  return row;
}

struct Sums {  // per channel, the sums of a and of a * b: float32 within a chunk, float64 across chunks
  std::vector<float> partial;  // per chunk, a row of sums of a and a row of sums of a * b
  std::vector<double> first, second;

  explicit Sums(const Shape& s) : partial(s.partials() * 2 * s.width), first(s.width), second(s.width) {}

  // Adds rows to chunk k; f(a, b, i, c, u, ahead) sets a and b.
  template <class F>
  void add(const Shape& s, int64_t k, int64_t rows, F f) {
    float *sum = &partial[k * 2 * s.width], *product = sum + s.width;
    V p[UNROLL], q[UNROLL];
    const auto open = [&](int64_t c) {
#pragma GCC unroll 8
      for (int u = 0; u < UNROLL; ++u) p[u] = load(sum + c + u * LANES), q[u] = load(product + c + u * LANES);
    };
    const auto close = [&](int64_t c) {
#pragma GCC unroll 8
      for (int u = 0; u < UNROLL; ++u) store(sum + c + u * LANES, p[u]), store(product + c + u * LANES, q[u]);
    };
    const auto step = [&](int64_t i, int64_t c, int u, int64_t ahead) {
      V a, b;
      f(a, b, i, c, u, ahead);
      p[u] += a, q[u] += a * b;
    };
    each_vector(s.width, rows, open, step, close);
  }

  void finish(const Shape& s) {  // sums over chunks, then over the pixels of a row
    parallel_for(s.width / 64, [&](int64_t block) {
      for (int64_t k = 0; k < s.partials(); ++k)
        for (int64_t c = block * 64, end = c + 64; c < end; ++c)
          first[c] += partial[k * 2 * s.width + c], second[c] += partial[(k * 2 + 1) * s.width + c];
    });
    for (int64_t c = s.C; c < s.width; ++c) first[c % s.C] += first[c], second[c % s.C] += second[c];
  }
};

// ---- the passes -----------------------------------------------------------------------------------------------------

// Squares are summed about the first pixel, which is near the mean. Returns its channels, repeated to fill a row.
template <class T>
static std::vector<float> first_pixel(const T* x, const Shape& s) {
  std::vector<float> origin(s.width);
  for (int64_t i = 0; i < s.width; ++i) origin[i] = value(x[i % s.C]);
  return origin;
}

template <class T>  // adds rows of x to chunk k
static void sum_about(Sums& sums, const Shape& s, int64_t k, const T* x, const float* origin, int64_t rows) {
  sums.add(s, k, rows, [=](V& a, V& b, int64_t i, int64_t c, int u, int64_t ahead) {
    a = b = read(x, i, u, ahead) - load(origin + c);
  });
}

struct Affine {  // rows of the map z = (x - mean) * scale + shift
  std::vector<float> mean, scale, shift;
};

// Computes y = act(z + residual). The flags are constants of the compiler, so that the loop has no branches.
template <bool ADDS, bool RELU, bool MASKS, class T>
static void normalise_rows(const T* x, const T* residual, Output<T> y, Bits* mask, const Affine& map, int64_t width,
                           int64_t rows) {
  const float *mean = map.mean.data(), *scale = map.scale.data(), *shift = map.shift.data();
  each_vector(width, rows, [=](int64_t i, int64_t c, int u, int64_t ahead) {
    V z = (read(x, i, u, ahead) - load(mean + c)) * load(scale + c) + load(shift + c);
    if (ADDS) z += read(residual, i, u, ahead);
    if (MASKS) mask[i / LANES] = passes(z);
    y.put(i, RELU ? relu(z) : z);
  });
}

template <class T>
static void normalise(const T* x, const T* residual, T* y, Bits* mask, bool relu, const Affine& map, const Shape& s) {
  const auto run = residual ? (mask   ? normalise_rows<true, true, true, T>
                               : relu ? normalise_rows<true, true, false, T>
                                      : normalise_rows<true, false, false, T>)
                            : (mask   ? normalise_rows<false, true, true, T>
                               : relu ? normalise_rows<false, true, false, T>
                                      : normalise_rows<false, false, false, T>);
  const bool large = is_large(s.rows * s.width);
  parallel_for(s.chunks, [&](int64_t k) {
    const int64_t i = k * s.height * s.width;
    run(x + i, at(residual, i), {y + i, large}, at(mask, i / LANES), map, s.width, s.chunk_rows(k));
  });
  if (!s.rest) return;
  const auto x_row = last_row(x, s), residual_row = last_row(residual, s);
  std::vector<T> y_row(s.width);
  const int64_t i = s.rows * s.width;
  run(x_row.data(), residual_row.data(), {y_row.data(), false}, at(mask, i / LANES), map, s.width, 1);
  std::copy_n(y_row.begin(), s.rest, y + i);
}

// Computes y = act(z + residual) for a plane of one channel, of at least LANES values. The last vector overlaps the one
// before it if LANES does not divide their number.
template <bool ADDS, bool RELU, class T>
static void normalise_plane(const T* x, const T* residual, T* y, float mean, float scale, float shift,
                            int64_t values) {
  for (int64_t k = 0; k < values; k += LANES) {
    const int64_t i = std::min(k, values - LANES);
    V z = (load(x + i) - mean) * scale + shift;
    if (ADDS) z += load(residual + i);
    store(y + i, RELU ? relu(z) : z);
  }
}

// Computes y = act(z + residual) for N C planes of `values` values; the map has C values.
template <class T>
static void normalise_planes(const T* x, const T* residual, T* y, bool relu, const Affine& map, int64_t planes,
                             int64_t values) {
  const auto run = residual ? (relu ? normalise_plane<true, true, T> : normalise_plane<true, false, T>)
                            : (relu ? normalise_plane<false, true, T> : normalise_plane<false, false, T>);
  parallel_for(planes, [&](int64_t k) {
    const int64_t i = k * values, c = k % map.mean.size();
    run(x + i, residual ? residual + i : nullptr, y + i, map.mean[c], map.scale[c], map.shift[c], values);
  });
}

// Computes dz = (g + g2) * mask, stores it if STORES, and sums dz and dz * (x - mean) into chunk k.
template <bool TWO, bool STORES, class T>
static void sum_gradients(Sums& sums, const Shape& s, int64_t k, const T* g, const T* g2, const T* x, const Bits* mask,
                          Output<T> dz, const float* mean, int64_t rows) {
  sums.add(s, k, rows, [=](V& a, V& b, int64_t i, int64_t c, int u, int64_t ahead) {
    a = read(g, i, u, ahead);
    if (TWO) a += read(g2, i, u, ahead);
    if (mask) a = keep(mask[i / LANES], a);
    if (STORES) dz.put(i, a);
    b = read(x, i, u, ahead) - load(mean + c);
  });
}

struct Gradient {  // rows of the map dx = scale * dz - slope * (x - mean) - offset
  std::vector<float> mean, scale, slope, offset;
};

template <class T>
static void input_gradient_rows(const T* dz, const Bits* mask, const T* x, Output<T> dx, const Gradient& map,
                                int64_t width, int64_t rows) {
  const float *mean = map.mean.data(), *scale = map.scale.data();
  const float *slope = map.slope.data(), *offset = map.offset.data();
  each_vector(width, rows, [=](int64_t i, int64_t c, int u, int64_t ahead) {
    V z = read(dz, i, u, ahead);
    if (mask) z = keep(mask[i / LANES], z);
    const V v = load(scale + c) * z - load(offset + c);
    dx.put(i, v - load(slope + c) * (read(x, i, u, ahead) - load(mean + c)));
  });
}

// ---- between the passes ---------------------------------------------------------------------------------------------

struct Stats {  // C values each, saved for the backward: mean, 1 / sqrt(var + eps), weight / sqrt(var + eps)
  float *mean, *invstd, *scale;
  Stats(float* p, int64_t C) : mean(p), invstd(p + C), scale(p + 2 * C) {}
};

struct Running {  // statistics of C values, or null, and the weight of a batch
  float *mean, *var;
  double momentum;
};

// Sets t from finished sums about the origin, and updates the running statistics.
static void set_statistics(const Stats& t, const Sums& sums, const std::vector<float>& origin, const float* weight,
                           const Running& running, double eps, int64_t values, int64_t C) {
  const double count = values / C;
  for (int64_t c = 0; c < C; ++c) {
    const double d = sums.first[c] / count, var = std::max(sums.second[c] / count - d * d, 0.0);  // max keeps NaN
    t.mean[c] = origin[c] + d;
    t.invstd[c] = 1 / std::sqrt(var + eps);
    t.scale[c] = t.invstd[c] * weight[c];
    if (!running.mean) continue;
    running.mean[c] += running.momentum * (t.mean[c] - running.mean[c]);
    running.var[c] += running.momentum * (var * count / (count - 1) - running.var[c]);
  }
}

// Sets the gradients of the parameters from finished sums of gradients, and returns the map of the input's gradient.
static Gradient set_gradients(float* dweight, float* dbias, const Sums& sums, const Stats& t, int64_t values,
                              const Shape& s) {
  std::vector<float> slope(s.C), offset(s.C);
  const float count = values / s.C;
  for (int64_t c = 0; c < s.C; ++c) {
    dbias[c] = sums.first[c], dweight[c] = sums.second[c] * t.invstd[c];
    slope[c] = t.scale[c] * t.invstd[c] * dweight[c] / count;
    offset[c] = t.scale[c] * dbias[c] / count;
  }
  return {s.repeated(t.mean), s.repeated(t.scale), s.repeated(slope.data()), s.repeated(offset.data())};
}

// Computes dz = (g + g2) * mask, stores it unless dz is null, sums it for the gradients of the parameters, and returns
// the map of the input's gradient.
template <class T>
static Gradient parameter_gradients(const T* g, const T* g2, const T* x, const Bits* mask, const Stats& t, T* dz,
                                    float* dweight, float* dbias, int64_t values, const Shape& s) {
  const std::vector<float> mean = s.repeated(t.mean);
  const bool large = is_large(s.rows * s.width);
  const auto run = g2   ? sum_gradients<true, true, T>
                   : dz ? sum_gradients<false, true, T>
                        : sum_gradients<false, false, T>;
  Sums sums(s);
  parallel_for(s.chunks, [&](int64_t k) {
    const int64_t i = k * s.height * s.width;
    run(sums, s, k, g + i, at(g2, i), x + i, at(mask, i / LANES), {at(dz, i), large}, mean.data(), s.chunk_rows(k));
  });
  if (s.rest) {
    const int64_t i = s.rows * s.width;
    const auto g_row = last_row(g, s), g2_row = last_row(g2, s), x_row = last_row(x, s);
    std::vector<T> dz_row(dz ? s.width : 0);
    run(sums, s, s.chunks, g_row.data(), g2_row.data(), x_row.data(), at(mask, i / LANES), {dz_row.data(), false},
        mean.data(), 1);
    if (dz) std::copy_n(dz_row.begin(), s.rest, dz + i);
  }
  sums.finish(s);
  return set_gradients(dweight, dbias, sums, t, values, s);
}
