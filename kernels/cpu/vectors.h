// Vectors of float32, loaded from and stored to float32 or bf16, for AVX-512 with and without bf16, AVX2 with FMA, and
// NEON; and loops over torch's OpenMP threads.
#pragma once

#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

// ---- vectors --------------------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int LANES = 16;
using Bits = uint16_t;  // one bit per lane
#elif defined(__AVX2__)
constexpr int LANES = 8;
using Bits = uint8_t;
#else
constexpr int LANES = 4;
using Bits = uint8_t;
#endif
using V = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
struct bf16 {
  uint16_t bits;
};

static float value(float x) { return x; }
static float value(bf16 x) {
  const uint32_t word = uint32_t(x.bits) << 16;
  float f;
  memcpy(&f, &word, sizeof f);
  return f;
}

static V load(const float* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
static void store(float* p, V v) { memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even, and keeps NaN. The result is in the lower 16 bits.
[[maybe_unused]] static Words rounded(V v) {
  const Words w = (Words)v, quiet = w >> 16 | 0x40, nearest = (w + 0x7fff + (w >> 16 & 1)) >> 16;
  return v == v ? nearest : quiet;
}

#if defined(__AVX512F__)
static V load(const bf16* p) {
  return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
}
static void store(bf16* p, V v) {
#if defined(__AVX512BF16__)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(v));
#else
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16((__m512i)rounded(v)));
#endif
}
static void stream(float* p, V v) { _mm512_stream_ps(p, v); }
static V relu(V v) { return _mm512_max_ps(_mm512_setzero_ps(), v); }  // max returns its second argument for NaN
static Bits passes(V v) { return _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_NLE_UQ); }  // true for NaN
static V keep(Bits bits, V v) { return _mm512_maskz_mov_ps(bits, v); }
#elif defined(__AVX2__)
static V load(const bf16* p) {
  return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
}
static void store(bf16* p, V v) {
  const __m256i w = (__m256i)rounded(v), halves = _mm256_permute4x64_epi64(_mm256_packus_epi32(w, w), 0b1000);
  _mm_storeu_si128((__m128i*)p, _mm256_castsi256_si128(halves));
}
static void stream(float* p, V v) { _mm256_stream_ps(p, v); }
static V relu(V v) { return _mm256_max_ps(_mm256_setzero_ps(), v); }
static Bits passes(V v) { return _mm256_movemask_ps(_mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_NLE_UQ)); }
static V keep(Bits bits, V v) {
  const Words lane = {1, 2, 4, 8, 16, 32, 64, 128};
  return (V)((Words)v & (Words)((lane & uint32_t(bits)) == lane));
}
#else
static V load(const bf16* p) { return (V)vshll_n_u16(vld1_u16(&p->bits), 16); }
static void store(bf16* p, V v) { vst1_u16(&p->bits, vmovn_u32((uint32x4_t)rounded(v))); }
static void stream(float* p, V v) { store(p, v); }  // NEON has no intrinsic that writes past the caches
static V relu(V v) { return (V)((Words)v & ~(Words)(v < 0)); }
static Bits passes(V v) {
  const Words lane = {1, 2, 4, 8};
  return vaddvq_u32((uint32x4_t)(lane & ~(Words)(v <= 0)));
}
static V keep(Bits bits, V v) {
  const Words lane = {1, 2, 4, 8};
  return (V)((Words)v & (Words)((lane & uint32_t(bits)) == lane));
}
#endif

// ---- threads --------------------------------------------------------------------------------------------------------

// The code calls libgomp directly and has no pragmas, because clang compiles pragmas for another OpenMP library, which
// would run threads of its own beside torch's.
extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned);
extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();
extern "C" int omp_get_max_threads();

template <class F>
static void parallel_for(int64_t n, F f) {  // calls f(0), ..., f(n - 1)
  const auto some = [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) f(k);
#if !defined(__aarch64__)
    _mm_sfence();  // so that other threads see what was written past the caches
#endif
  };
  auto share = [&] {
    const int64_t thread = omp_get_thread_num(), threads = omp_get_num_threads();
    some(n * thread / threads, n * (thread + 1) / threads);
  };
  if (n == 1) some(0, 1);
  else if (n > 1) GOMP_parallel([](void* all) { (*static_cast<decltype(share)*>(all))(); }, &share, 0, 0);
}
