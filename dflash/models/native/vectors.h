// Vectors of floats as wide as the machine's registers, by the vector extensions of GCC and Clang.

#ifndef DFLASH_VECTORS_H_
#define DFLASH_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <utility>

// A tile is kRows rows of W times up to kColumns columns; its sums and operands have to fit the vector registers.
// From kOtherFrom to kOtherColumns columns it is kOtherRows rows times all of them: wide tiles take W from L1 once, tall
// ones stream W faster. kQueries are a tile's in attention.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 4, kColumns = 6, kOtherRows = 3, kOtherFrom = 7, kOtherColumns = 8,
              kQueries = 6;  // 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 2, kColumns = 6, kOtherRows = 4, kOtherFrom = 1, kOtherColumns = 2,
              kQueries = 2;  // 16
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 4, kOtherRows = 4, kOtherFrom = 1, kOtherColumns = 4,
              kQueries = 4;  // 16 or more
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline void Store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }

inline Vec LoadFirst(const float* p, int64_t count) {  // the rest is zero
  Vec v = {};
  std::memcpy(&v, p, count * sizeof(float));
  return v;
}

// Lane I of the result is lane Pick(I) of a and b one after the other.
template <typename Pick, int... I>
inline Vec Shuffle(Vec a, Vec b, std::integer_sequence<int, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, Pick::At(I)...);
#else
  return __builtin_shuffle(a, b, Index{Pick::At(I)...});
#endif
}

template <typename Pick>
inline Vec Shuffle(Vec a, Vec b) {
  return Shuffle<Pick>(a, b, std::make_integer_sequence<int, kLanes>());
}

template <int Base>  // of each 4 lanes, two of a and two of b, alternating
struct Zip {
  static constexpr int At(int i) { return i / 4 * 4 + Base + i % 4 / 2 + i % 2 * kLanes; }
};
template <int Base>  // of each 4 lanes, two of a, then two of b
struct Join {
  static constexpr int At(int i) { return i / 4 * 4 + Base + i % 2 + i % 4 / 2 * kLanes; }
};
template <int By>
struct Turn {
  static constexpr int At(int i) { return (i + By) % kLanes; }
};

// The sums over the lanes of four vectors, in the first four lanes.
inline Vec Sums(Vec a, Vec b, Vec c, Vec d) {
  const Vec ab = Shuffle<Zip<0>>(a, b) + Shuffle<Zip<2>>(a, b);
  const Vec cd = Shuffle<Zip<0>>(c, d) + Shuffle<Zip<2>>(c, d);
  Vec sums = Shuffle<Join<0>>(ab, cd) + Shuffle<Join<2>>(ab, cd);
  if constexpr (kLanes >= 16) sums += Shuffle<Turn<8 % kLanes>>(sums, sums);
  if constexpr (kLanes >= 8) sums += Shuffle<Turn<4 % kLanes>>(sums, sums);
  return sums;
}

// Keeps a vector in a register: GCC would rather load it again for every use, and loads are what limits a tile.
inline void Keep(Vec& v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#else
  (void)v;
#endif
}


inline Vec Select(Index mask, Vec yes, Vec no) {  // mask: all bits of a lane or none
  return (Vec)(((Index)yes & mask) | ((Index)no & ~mask));
}

inline Vec Max(Vec a, Vec b) { return Select(a > b, a, b); }

inline float Total(Vec v) {
  const Vec none = {};
  return Sums(v, none, none, none)[0];
}

// e^x for x <= 0 within 2 units in the last place; 0 below -87, where floats end; not-a-number stays so.
inline Vec Exp(Vec x) {
  const Index under = x < -87.0f;
  x = Select(under, Vec{}, x);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const Vec shifted = x * 1.44269504f + to_integer;
  const Vec n = shifted - to_integer;
  const Vec r = x - n * 0.693359375f - n * -2.12194440e-4f;  // x - n ln 2, in two parts
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Index power = ((Index)shifted << 23) + (127 << 23);  // 2^n; the shift drops to_integer's own bits
  return Select(under, Vec{}, p * (Vec)power);
}

#endif  // DFLASH_VECTORS_H_
