// y = W x for a thin x: W [out, in] as checkpoints store it, x a few columns.
//
// A decode step is bound by reading W from memory once. So: W is streamed in its own order, prefetched, and each piece
// is multiplied with all columns while it is in registers or in L1. Vectors run along `in` (x and y lie column by
// column in memory), so one column costs one column, and every output is summed in one fixed order (kLanes partial
// sums, then a tree) that depends on neither the number of columns, nor the tile, nor the thread. A 1-token step and
// a block step therefore give bitwise equal products.

#ifndef DFLASH_PRODUCT_H_
#define DFLASH_PRODUCT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "vectors.h"

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
    const Vec total = Sums(sums[0][n], M > 1 ? sums[1 % M][n] : none, M > 2 ? sums[2 % M][n] : none,
                           M > 3 ? sums[3 % M][n] : none);
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

// M rows of W times all columns, in blocks of about equal width, at most N.
template <int M, int N>
void Rows(const float* w, const float* x, float* y, int64_t in, int64_t out, int64_t columns) {
  const int64_t blocks = (columns + N - 1) / N;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = columns * b / blocks, last = columns * (b + 1) / blocks;
    TileOf<M, N>(last - first, w, x + first * in, y + first * out, in, out);
  }
}

struct Product {
  const float *w, *x;
  float* y;
  int64_t in, out, columns;

  // Pieces are runs of rows, large enough to be streamed and small enough to share out evenly.
  int64_t PieceRows() const {
    const int64_t bytes = 128 << 10, unit = kRows * kOtherRows;
    return std::max<int64_t>(1, bytes / (in * sizeof(float)) / unit) * unit;
  }
  int64_t Pieces() const { return (out + PieceRows() - 1) / PieceRows(); }

  void operator()(int64_t piece) const {
    const int64_t begin = piece * PieceRows(), end = std::min(out, begin + PieceRows());
    if (columns >= kOtherFrom && columns <= kOtherColumns) {
      Run<kOtherRows, kOtherColumns>(begin, end);
    } else {
      Run<kRows, kColumns>(begin, end);
    }
  }

 private:
  template <int M, int N>
  void Run(int64_t row, int64_t end) const {
    for (; row + M <= end; row += M) Rows<M, N>(w + row * in, x, y + row, in, out, columns);
    for (; row < end; ++row) Rows<1, N>(w + row * in, x, y + row, in, out, columns);
  }
};

#endif  // DFLASH_PRODUCT_H_
