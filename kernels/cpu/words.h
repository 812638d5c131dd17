// The operands of convolutions in words: one float32, or two bf16 side by side, whose products are both added.
#pragma once

#include <vector>

#include "vectors.h"

template <class T>
struct Word;

template <>
struct Word<float> {
  using Type = float;
  using Vector = V;  // LANES words
  static constexpr int VALUES = 1;
  static V read(const float* p) { return load(p); }
  static void put(float* to, const V* values) { store(to, values[0]); }
  static void put_exact(float* to, const V* values) { put(to, values); }
  static V multiply_add(V sum, V vector, float word) { return sum + vector * word; }
  // For words that follow each other in two vectors: the words that begin one value before those of the second, and
  // one value behind those of the first.
  static V before(V first, V) { return first; }
  static V behind(V, V second) { return second; }
};

#if defined(__AVX512BF16__)
template <>
struct Word<bf16> {
  using Type = uint32_t;
  using Vector = __m512i;
  static constexpr int VALUES = 2;
  static __m512i read(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static void put(uint32_t* to, const V* values) {
    const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[0]));
    const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(values[1]));
    _mm512_storeu_si512(to, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
  static void put_exact(uint32_t* to, const V* values) {  // of values that are bf16, which needs no rounding
    const __m512i low = _mm512_srli_epi32((__m512i)values[0], 16);
    _mm512_storeu_si512(to, _mm512_or_si512(low, (__m512i)values[1]));
  }
  static V multiply_add(V sum, __m512i vector, uint32_t word) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(word), (__m512bh)vector);
  }
  static __m512i before(__m512i first, __m512i second) {
    return _mm512_or_si512(_mm512_srli_epi32(first, 16), _mm512_slli_epi32(second, 16));
  }
  static __m512i behind(__m512i first, __m512i second) { return before(first, second); }
};
#endif

template <class T>
using WordOf = typename Word<T>::Type;

// Calls run(T()) with the type of the activations.
template <class Run>
static void with_type(bool half, Run run) {
#if defined(__AVX512BF16__)
  if (half) return run(bf16());
#endif
  run(float());
}

enum Buffer { FILTERS, IMAGES, PATCHES, PRODUCTS, GRADIENTS, SUMS };

struct alignas(64) Line {  // of a cache: vectors that lie in two lines are stored at half the rate
  char bytes[64];
};

// Returns a buffer that this thread keeps, because new memory costs page faults in every call.
template <class T, Buffer>
static T* scratch(int64_t size) {
  static thread_local std::vector<Line> kept;
  const size_t lines = (size * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
  if (kept.size() < lines) kept.resize(lines);
  return (T*)kept.data();
}
