// What kernels of floating-point numbers share: vectors of numbers, and the exponential function.
// A vector has W float32. EVERY(f) is f(0), f(1), ... f(W - 1).
#define FOUR(f, i) f(i), f(i + 1), f(i + 2), f(i + 3)
#if defined(__AVX512VNNI__)
#define W 16
#define EVERY(f) FOUR(f, 0), FOUR(f, 4), FOUR(f, 8), FOUR(f, 12)
#elif defined(__AVX2__)
#define W 8
#define EVERY(f) FOUR(f, 0), FOUR(f, 4)
#else
#define W 4
#define EVERY(f) FOUR(f, 0)
#endif
static const float MASKED = -1e30f;  // as in layers.py
typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));
typedef int8_t Bytes __attribute__((vector_size(W)));
typedef enum { FLOAT32, BFLOAT16, INT8 } Type;

static inline Type type_of(const Buffer *buffer) {
  return buffer->dtype == XLA_FFI_DataType_S8 ? INT8 : buffer->dtype == XLA_FFI_DataType_BF16 ? BFLOAT16 : FLOAT32;
}

// Does something with `type` a constant.
#define TYPE(of, ...) case of: { enum { type = of }; __VA_ARGS__; break; }
#define WITH_TYPE(of, ...) switch (of) { TYPE(FLOAT32, __VA_ARGS__) TYPE(BFLOAT16, __VA_ARGS__) TYPE(INT8, __VA_ARGS__) }

// Does something with `rows` a constant, ROWS at most.
#define CASE(count, ...) case count: if (count < ROWS) { enum { rows = count < ROWS ? count : ROWS }; __VA_ARGS__; break; }
#define WITH_ROWS(count, ...) \
  switch (count) { \
    CASE(1, __VA_ARGS__) CASE(2, __VA_ARGS__) CASE(3, __VA_ARGS__) CASE(4, __VA_ARGS__) CASE(5, __VA_ARGS__) \
    default: { enum { rows = ROWS }; __VA_ARGS__; } \
  }

INLINE F load(const void *from) {
  F f;
  memcpy(&f, from, sizeof f);
  return f;
}

INLINE F spread(float number) { return number - (F){0}; }

// a b + c, rounded once.
INLINE F fused(F a, F b, F c) {
#if W == 16
  return _mm512_fmadd_ps(a, b, c);
#elif W == 8
  return _mm256_fmadd_ps(a, b, c);
#else
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#endif
}

INLINE void store(void *to, F f) { memcpy(to, &f, sizeof f); }

// Writes a row's numbers from `column` on, as many of W as there are.
INLINE void store_columns(void *row, F numbers, int64_t column, int64_t columns) {
  char *to = (char *)row + column * 4;
  if (column + W <= columns) store(to, numbers);
  else if (column < columns) memcpy(to, &numbers, (columns - column) * 4);
}

INLINE int64_t bytes_of(const Type type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

INLINE F widen(const char *numbers, const Type type) {
  if (type == FLOAT32) return load(numbers);
#if W == 16  // gcc 12 would widen halves of a vector in turn, and bytes one by one
  if (type == BFLOAT16) return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)numbers)), 16);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)numbers)));
#elif W == 8
  if (type == BFLOAT16) return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)numbers)), 16);
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)numbers)));
#else
  if (type == BFLOAT16) {
    Halves halves;
    memcpy(&halves, numbers, sizeof halves);
    return (F)(__builtin_convertvector(halves, I) << 16);
  }
  Bytes bytes;
  memcpy(&bytes, numbers, sizeof bytes);
  return __builtin_convertvector(__builtin_convertvector(bytes, I), F);
#endif
}

// Vector c of H numbers; nothing behind them is read.
INLINE F read(const void *numbers, int64_t c, int64_t H, const Type type) {
  const char *from = (const char *)numbers + c * W * bytes_of(type);
  if ((c + 1) * W <= H) return widen(from, type);
  char last[sizeof(F)] = {0};
  memcpy(last, from, (H - c * W) * bytes_of(type));
  return widen(last, type);
}

INLINE F choose(I mask, F a, F b) { return (F)(((I)a & mask) | ((I)b & ~mask)); }
INLINE F larger(F a, F b) {  // not by `choose`, of which gcc makes more instructions
  const I is = a > b;
  return (F)(((I)a & is) | ((I)b & ~is));
}

// W numbers of two vectors by place; those of b come after those of a.
#if defined(__clang__)
#define PICK(a, b, place) __builtin_shufflevector(a, b, EVERY(place))
#else
#define PICK(a, b, place) __builtin_shuffle(a, b, (I){EVERY(place)})
#endif

// The lanes of a, then those of b, by twos. Of W vectors, W - 1 such steps make one: the sum of each in a lane.
#define EVEN(i) 2 * (i)
#define ODD(i) 2 * (i) + 1
INLINE F add_pairs(F a, F b) { return PICK(a, b, EVEN) + PICK(a, b, ODD); }

INLINE float sum(F f) {
  for (int n = 1; n < W; n *= 2) f = add_pairs(f, f);
  return f[0];
}

// e to the power of x, up to 0, to 2e-7; 0 below -87, NaN of NaN.
INLINE F exponential(F x) {
  const F round = spread(12582912);  // 1.5 * 2^23: a sum with it has no fraction, and the integer in its last bits
  const F shifted = x * 1.44269504f + round, n = shifted - round;
  F r = x - n * 0.693359375f;  // x - n log 2, in two parts
  r = r + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;  // Cephes, expf
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const F power = (F)(((I)shifted - (I)round + 127) << 23);
  return (F)((I)(p * power) & ~(x < -87.0f));
}
