// Grouped-query attention over a cache of keys [B, G, D, S] and values [B, G, S, D]; softmax in float32.
//
// A piece is a few queries of one row and key head. Scores are vectors along the slots, the mix of values vectors
// along the head's dimensions; every sum runs over slots or dimensions in one order whatever the number of queries.
// A slot that a query does not see adds exactly nothing, so reading stops at the last slot that is seen.

#ifndef DFLASH_ATTENTION_H_
#define DFLASH_ATTENTION_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "vectors.h"

constexpr int kVectors = 4;  // of kLanes slots or dimensions that a tile of kQueries queries covers

// sums[n][v] = sum over i of a[n * lda + i] * b[i * ldb + lanes of v], for `length` i; the last vector has `lanes`.
template <int N, int V>
void Mixed(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t length, int64_t lanes, float* y,
           int64_t ldy) {
  Vec sums[N][V] = {};
  for (int64_t i = 0; i < length; ++i) {
    const float* row = b + i * ldb;
    Vec columns[V];
    for (int v = 0; v < V; ++v) {
      columns[v] = V == 1 && lanes < kLanes ? LoadFirst(row, lanes) : Load(row + v * kLanes);
    }
    for (int n = 0; n < N; ++n) {
      Vec weight = Vec{} + a[n * lda + i];
      Keep(weight);
      for (int v = 0; v < V; ++v) sums[n][v] += weight * columns[v];
    }
  }
  for (int n = 0; n < N; ++n) {
    for (int v = 0; v < V; ++v) {
      if (V == 1 && lanes < kLanes) {
        std::memcpy(y + n * ldy, &sums[n][v], lanes * sizeof(float));
      } else {
        Store(y + n * ldy + v * kLanes, sums[n][v]);
      }
    }
  }
}

// y [N, width] = a [N, length] b [length, width], a few vectors of the width at a time.
template <int N>
void Mix(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t length, int64_t width, float* y,
         int64_t ldy) {
  int64_t at = 0;
  for (; at + kVectors * kLanes <= width; at += kVectors * kLanes) {
    Mixed<N, kVectors>(a, lda, b + at, ldb, length, kLanes, y + at, ldy);
  }
  for (; at < width; at += kLanes) {
    Mixed<N, 1>(a, lda, b + at, ldb, length, std::min<int64_t>(kLanes, width - at), y + at, ldy);
  }
}

// Scores of the slots up to a multiple of kLanes become weights, not yet divided by their sum, which is returned.
inline float Softmax(float* scores, const uint8_t* visible, int64_t slots, float sink) {
  const float lowest = -std::numeric_limits<float>::infinity();
  Vec tops = Vec{} + lowest;
  for (int64_t s = 0; s < slots; s += kLanes) {
    float seen[kLanes];
    for (int i = 0; i < kLanes; ++i) seen[i] = s + i < slots && visible[s + i] ? 0.0f : lowest;
    const Vec bias = Load(seen);
    const Vec masked = Select(bias == 0.0f, Load(scores + s), bias);
    Store(scores + s, masked);
    tops = Max(tops, masked);
  }
  float top = sink;
  for (int i = 0; i < kLanes; ++i) top = std::max(top, tops[i]);
  Vec sums = {};
  for (int64_t s = 0; s < slots; s += kLanes) {
    const Vec weights = Exp(Load(scores + s) - top);
    Store(scores + s, weights);
    sums += weights;
  }
  return Total(sums) + std::exp(sink - top);
}

struct Attention {
  const float *q, *keys, *values, *sinks;  // q [B, T, G, R, D], sinks [G, R]
  const uint8_t* visible;                  // [B, T, S]
  float* out;                              // [B, T, G, R, D]
  int64_t batch, tokens, groups, repeats, dim, slots;

  int64_t Blocks() const { return (tokens * repeats + kQueries - 1) / kQueries; }  // of queries per key head
  int64_t Pieces() const { return batch * groups * Blocks(); }

  void operator()(int64_t piece) const {
    const int64_t block = piece % Blocks(), g = piece / Blocks() % groups, b = piece / Blocks() / groups;
    const int64_t queries = tokens * repeats;
    const int64_t first = queries * block / Blocks(), last = queries * (block + 1) / Blocks();
    BlockOf<kQueries>(b, g, first, last - first);
  }

 private:
  template <int N>
  void BlockOf(int64_t b, int64_t g, int64_t first, int64_t count) const {
    if constexpr (N > 0) {
      if (count < N) return BlockOf<N - 1>(b, g, first, count);
      Attend<N>(b, g, first);
    }
  }

  // Query i of a key head is repeat i % R of token i / R.
  int64_t Offset(int64_t b, int64_t g, int64_t i) const {
    return (((b * tokens + i / repeats) * groups + g) * repeats + i % repeats) * dim;
  }

  const uint8_t* Seen(int64_t b, int64_t i) const { return visible + (b * tokens + i / repeats) * slots; }

  template <int N>
  void Attend(int64_t b, int64_t g, int64_t first) const {
    int64_t end = 0;  // one past the last slot that any of these queries sees
    for (int n = 0; n < N; ++n) {
      const uint8_t* seen = Seen(b, first + n);
      int64_t last = slots;
      while (last > end && !seen[last - 1]) --last;
      end = std::max(end, last);
    }
    const int64_t padded = (end + kLanes - 1) / kLanes * kLanes;
    thread_local std::vector<float> scratch;
    scratch.resize(N * (dim + padded));
    float *scaled = scratch.data(), *scores = scaled + N * dim;
    const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
    for (int n = 0; n < N; ++n) {
      for (int64_t d = 0; d < dim; ++d) scaled[n * dim + d] = q[Offset(b, g, first + n) + d] * scale;
    }
    const int64_t head = (b * groups + g) * dim * slots;
    Mix<N>(scaled, dim, keys + head, slots, dim, end, scores, padded);
    float total[N];
    for (int n = 0; n < N; ++n) {
      total[n] = Softmax(scores + n * padded, Seen(b, first + n), end, sinks[g * repeats + (first + n) % repeats]);
    }
    float* mixed = scaled;  // the queries are done with
    Mix<N>(scores, padded, values + head, dim, end, dim, mixed, dim);
    for (int n = 0; n < N; ++n) {
      for (int64_t d = 0; d < dim; ++d) out[Offset(b, g, first + n) + d] = mixed[n * dim + d] / total[n];
    }
  }
};

#endif  // DFLASH_ATTENTION_H_
