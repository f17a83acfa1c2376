// What XLA calls: thin matrix products and attention, shared out over XLA's own threads.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(dflash_attention, RunAttention,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<ffi::Buffer<ffi::PRED>>()
                                  .Arg<Floats>()
                                  .Ret<Floats>());
