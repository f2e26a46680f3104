// What products of integers share. Weights lie as a dot-product instruction takes them: 4 inputs of 16 columns side by side, a
// step, read once, in order. Few rows wait for that reading, many for the instruction.
#include <math.h>

#include "threads.h"
#include "vectors.h"

enum { COLUMNS = 16, INPUTS = 4, STEP = COLUMNS * INPUTS };  // of a step: its bytes are a cache line
enum { VECTORS = COLUMNS / W };
enum { ROUNDED = 16 * 1024 };  // numbers that a thread rounds at a time, about
// Bytes of weight: processors fetch ahead, but not past a page. Into the second cache: the first is too small.
enum { AHEAD = 4096 };
typedef int8_t Quads __attribute__((vector_size(4 * W)));  // 4 inputs of each of W columns

// Adds to the sums of W columns the products of their 4 inputs with those of a row. Weights without a sign are of 4 bits, and
// `finish` makes their sums whole. `fused`: a b + c, rounded once.
#if defined(__AVX512VNNI__)
enum { TOO_HIGH = 128 };  // the instruction takes weights without a sign: signed ones 128 too high
INLINE F fused(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
typedef int32_t __attribute__((may_alias)) Four;
// gcc 12 copies each sum before its intrinsic adds to it, and takes 1.8 times as long. Inputs are spread as they are read.
#define add_products(sums, weights, x, is_signed) \
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(weights), "m"(*(const Four *)(x)))
#define finish(sums, is_signed) (sums)
#elif defined(__AVX2__)
enum { TOO_HIGH = 0 };
INLINE F fused(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
// The instruction takes one side without a sign, which the other side then gets. It adds two products in 16 bits, where
// 2 * 128 * 127 fits, as no input is ever -128. Those of weights without a sign stay there to the end of a block, where 16 of
// at most 15 * 127 fit.
INLINE I add_four(I sums, Quads weights, const int8_t *x, const int is_signed) {
  int32_t four;
  memcpy(&four, x, sizeof four);
  const __m256i inputs = _mm256_set1_epi32(four), w = (__m256i)weights, ones = _mm256_set1_epi16(1);
  if (!is_signed) return (I)_mm256_add_epi16((__m256i)sums, _mm256_maddubs_epi16(w, inputs));
  return sums + (I)_mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w)), ones);
}
#define add_products(sums, weights, x, is_signed) ((sums) = add_four(sums, weights, x, is_signed))
INLINE I finish(I sums, const int is_signed) {
  return is_signed ? sums : (I)_mm256_madd_epi16((__m256i)sums, _mm256_set1_epi16(1));
}
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
enum { TOO_HIGH = 0 };
INLINE F fused(F a, F b, F c) { return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
#define add_products(sums, weights, x, is_signed) \
  ((sums) = (I)vdotq_s32((int32x4_t)(sums), (int8x16_t)(weights), vreinterpretq_s8_s32(vld1q_dup_s32((const int32_t *)(x)))))
#define finish(sums, is_signed) (sums)
#else
#error "this processor is not known to multiply int8 fast"
#endif

INLINE Quads load_quads(const void *from) {
  Quads quads;
  memcpy(&quads, from, sizeof quads);
  return quads;
}

INLINE Quads signed_quads(const void *from) { return load_quads(from) ^ (int8_t)TOO_HIGH; }

// Does something with `rows` a constant: as many as there are, ROWS at most.
#define CASE(count, ...)                            \
  case count: {                                     \
    enum { rows = count < ROWS ? count : ROWS };    \
    __VA_ARGS__;                                    \
    break;                                          \
  }
#define WITH_ROWS(count, ...)                                                                                             \
  switch (count) {                                                                                                        \
    CASE(1, __VA_ARGS__) CASE(2, __VA_ARGS__) CASE(3, __VA_ARGS__) CASE(4, __VA_ARGS__) CASE(5, __VA_ARGS__)              \
    default: {                                                                                                            \
      enum { rows = ROWS };                                                                                               \
      __VA_ARGS__;                                                                                                        \
    }                                                                                                                     \
  }

// Returns the largest magnitude's bits, which sort as magnitudes do; those of an infinity and of a NaN come last.
INLINE uint32_t largest_bits(const float *x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// How many strips of 16 columns a part has, so that each thread takes as many parts, of about PART bytes.
INLINE int64_t strips_of_part(int64_t strips, int64_t bytes, int64_t threads) {
  return ceiling(strips, threads * ceiling(strips * bytes, threads * PART));
}
