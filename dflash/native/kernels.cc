// Thin matrix products for CPUs: y = W x, W [out, in] as checkpoints store it, x a few columns.
//
// A decode step is bound by reading W from memory once. So: W is streamed in its own order, prefetched, and each piece
// is multiplied with all columns while it is in registers or in L1. Vectors run along `in` (x and y lie column by
// column in memory), so one column costs one column, and every output is summed in one fixed order (kLanes partial
// sums, then a tree) that depends on neither the number of columns, nor the tile, nor the thread. A 1-token step and
// a block step therefore give bitwise equal products.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

// A tile is kRows rows of W times up to kColumns columns; its sums and operands have to fit the vector registers.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kRows = 4, kColumns = 6;  // 32 registers
#elif defined(__AVX__)
constexpr int kLanes = 8, kRows = 4, kColumns = 2;  // 16
#else
constexpr int kLanes = 4, kRows = 4, kColumns = 4;  // 16 (SSE) or 32 (NEON)
#endif
constexpr int64_t kChunkBytes = 128 << 10;  // of W: what a thread claims at a time

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t Index __attribute__((vector_size(kLanes * sizeof(float))));

inline Vec Load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

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

// y[n * out + m] for M rows of W and N columns: w [M, in], x [N, in]. kRest: `in` is not a multiple of kLanes.
template <int M, int N, bool kRest>
void Tile(const float* w, const float* x, float* y, int64_t in, int64_t out) {
  Vec sums[M][N] = {};
  const int64_t whole = in - in % kLanes;
  for (int64_t k = 0; k < whole; k += kLanes) {
    Vec rows[M];
    for (int m = 0; m < M; ++m) {
      rows[m] = Load(w + m * in + k);
      // The tile below, into L2: L1 is full of x. This hint is what makes the stream as fast as the memory.
      __builtin_prefetch(w + (m + M) * in + k, 0, 2);
    }
    for (int n = 0; n < N; ++n) {
      Vec column = Load(x + n * in + k);
      Keep(column);
      for (int m = 0; m < M; ++m) sums[m][n] += rows[m] * column;
    }
  }
  if constexpr (kRest) {
    for (int n = 0; n < N; ++n) {
      const Vec column = LoadFirst(x + n * in + whole, in - whole);
      for (int m = 0; m < M; ++m) sums[m][n] += LoadFirst(w + m * in + whole, in - whole) * column;
    }
  }
  const Vec none = {};
  for (int n = 0; n < N; ++n) {
    const Vec total = M == 4 ? Sums(sums[0][n], sums[1 % M][n], sums[2 % M][n], sums[3 % M][n])
                             : Sums(sums[0][n], none, none, none);
    std::memcpy(y + n * out, &total, M * sizeof(float));
  }
}

// The tile of exactly `columns` columns, found among N, N-1, ... 1.
template <int M, int N>
void TileOf(int64_t columns, const float* w, const float* x, float* y, int64_t in, int64_t out) {
  if constexpr (N > 0) {
    if (columns < N) return TileOf<M, N - 1>(columns, w, x, y, in, out);
    return in % kLanes ? Tile<M, N, true>(w, x, y, in, out) : Tile<M, N, false>(w, x, y, in, out);
  }
}

// M rows of W times all columns, in blocks of about equal width.
template <int M>
void Rows(const float* w, const float* x, float* y, int64_t in, int64_t out, int64_t columns) {
  const int64_t blocks = (columns + kColumns - 1) / kColumns;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = columns * b / blocks, last = columns * (b + 1) / blocks;
    TileOf<M, kColumns>(last - first, w, x + first * in, y + first * out, in, out);
  }
}

// One product. Threads claim chunks of rows until none is left.
struct Job {
  const float *w, *x;
  float* y;
  int64_t in, out, columns, chunk, chunks;
  std::atomic<int64_t> next{0}, done{0};

  void Work() {
    for (int64_t c; (c = next.fetch_add(1)) < chunks; done.fetch_add(1)) {
      int64_t row = c * chunk;
      const int64_t end = std::min(out, row + chunk);
      for (; row + kRows <= end; row += kRows) Rows<kRows>(w + row * in, x, y + row, in, out, columns);
      for (; row < end; ++row) Rows<1>(w + row * in, x, y + row, in, out, columns);
    }
  }
};

ffi::Error Product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> w, ffi::Buffer<ffi::F32> x,
                   ffi::ResultBuffer<ffi::F32> y) {
  // Shared: a thread that comes late finds no work left, after this call has returned.
  auto job = std::make_shared<Job>();
  job->w = w.typed_data();
  job->x = x.typed_data();
  job->y = y->typed_data();
  job->out = w.dimensions()[0];
  job->in = w.dimensions()[1];
  job->columns = x.dimensions()[1];
  const int64_t rows = std::max<int64_t>(1, kChunkBytes / (job->in * sizeof(float)) / kRows) * kRows;
  job->chunk = rows;
  job->chunks = (job->out + rows - 1) / rows;
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), job->chunks) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->Work(); });
  job->Work();
  while (job->done.load() < job->chunks) std::this_thread::yield();
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
