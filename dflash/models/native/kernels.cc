// What XLA calls: thin matrix products and attention, shared out over XLA's own threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <thread>
#include <vector>

#include "attention.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

// Threads claim pieces of `work` until none is left; the caller works too, so nobody waits for a thread to be free.
template <typename Work>
struct Job {
  Work work;
  int64_t pieces;
  std::atomic<int64_t> next{0}, done{0};

  explicit Job(const Work& work) : work(work), pieces(work.Pieces()) {}

  void Run() {
    for (int64_t piece; (piece = next.fetch_add(1)) < pieces; done.fetch_add(1)) work(piece);
  }
};

template <typename Work>
ffi::Error Share(ffi::ThreadPool& pool, const Work& work) {
  // Shared ownership: a thread that comes late, after this call has returned, finds no piece left.
  auto job = std::make_shared<Job<Work>>(work);
  const int64_t helpers = std::min<int64_t>(pool.num_threads(), job->pieces) - 1;
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([job] { job->Run(); });
  job->Run();
  while (job->done.load() < job->pieces) std::this_thread::yield();
  return ffi::Error::Success();
}

using Floats = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

ffi::Error RunProduct(ffi::ThreadPool pool, Floats w, Floats x, Result y) {
  return Share(pool, Product{w.typed_data(), x.typed_data(), y->typed_data(), w.dimensions()[1], w.dimensions()[0],
                             x.dimensions()[1]});
}

// Some columns of x, next to each other, times one matrix of a stack each.
struct Products {
  std::vector<Product> each;

  int64_t Pieces() const {
    int64_t pieces = 0;
    for (const Product& product : each) pieces += product.Pieces();
    return pieces;
  }
  void operator()(int64_t piece) const {
    auto product = each.begin();
    for (; piece >= product->Pieces(); ++product) piece -= product->Pieces();
    (*product)(piece);
  }
};

// Column n of x [in, N] times matrix which[n] of stack [E, out, in]. A matrix is read once, for all its columns.
ffi::Error RunProductsOf(ffi::ThreadPool pool, Floats stack, ffi::Buffer<ffi::S32> which, Floats x, Result y) {
  const auto shape = stack.dimensions();
  const int64_t out = shape[1], in = shape[2], columns = x.dimensions()[1];
  const auto matrix = [&](int64_t n) { return std::clamp<int64_t>(which.typed_data()[n], 0, shape[0] - 1); };
  std::vector<int64_t> order(columns);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return matrix(a) < matrix(b); });
  std::vector<float> from(columns * in), to(columns * out);
  Products products;
  for (int64_t n = 0; n < columns; ++n) {
    std::copy_n(x.typed_data() + order[n] * in, in, from.data() + n * in);
    if (n == 0 || matrix(order[n]) != matrix(order[n - 1])) {
      products.each.push_back(
          {stack.typed_data() + matrix(order[n]) * out * in, from.data() + n * in, to.data() + n * out, in, out, 0});
    }
    ++products.each.back().columns;
  }
  const ffi::Error error = Share(pool, products);
  for (int64_t n = 0; n < columns; ++n) std::copy_n(to.data() + n * out, out, y->typed_data() + order[n] * out);
  return error;
}

ffi::Error RunAttention(ffi::ThreadPool pool, Floats q, Floats keys, Floats values, ffi::Buffer<ffi::PRED> visible,
                        Floats sinks, Result out) {
  const auto shape = q.dimensions();  // [G, R, D, B, T]
  return Share(pool, Attention{q.typed_data(), keys.typed_data(), values.typed_data(), sinks.typed_data(),
                               reinterpret_cast<const uint8_t*>(visible.typed_data()), out->typed_data(), shape[3],
                               shape[4], shape[0], shape[1], shape[2], keys.dimensions()[3]});
}

ffi::Error RunKept(Floats x, Result y) {
  std::memcpy(y->typed_data(), x.typed_data(), x.size_bytes());
  return ffi::Error::Success();
}

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_kept, RunKept, ffi::Ffi::Bind().Arg<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_product, RunProduct,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<Floats>().Arg<Floats>().Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_products_of, RunProductsOf,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_attention, RunAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
