// Products of few rows on a CPU: what a step of decoding is made of.
//
// Groups of rows, each times a matrix of its own: y[r] = x[r] w[group of r]. Such a
// product takes as long as its weights take to be read, so a tile of them is held in
// registers for up to four rows, and nothing is copied or packed. A row's sums are in
// the same order whatever rows are beside it. `few_rows.py` compiles and calls it.

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <utility>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kVectors = 2;
#else
constexpr int kBytes = 16, kVectors = 4;
#endif
constexpr int kLanes = kBytes / sizeof(float);
constexpr int kTile = kVectors * kLanes;  // columns of a tile
constexpr int kRows = 4;                  // of a tile: its sums fill the registers
constexpr int kAhead = 8;                 // rows of the matrix fetched before use
constexpr int64_t kBlock = 512;           // columns that a thread takes at once
constexpr int64_t kShares = 2;            // of a thread, where there are few columns

typedef float Floats __attribute__((vector_size(kBytes)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint32_t Words __attribute__((vector_size(kBytes)));
typedef uint16_t Halves __attribute__((vector_size(kBytes / 2)));

template <typename To, typename From>
To Bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
T At(const void* p) {
  T t;
  std::memcpy(&t, p, sizeof(t));
  return t;
}

// A weight as float: kept as one, or as the upper half of one, which is bfloat16.
float Float(const float* w) { return *w; }
float Float(const uint16_t* w) { return Bits<float>(uint32_t{*w} << 16); }
Floats Load(const float* w) { return At<Floats>(w); }
Floats Load(const uint16_t* w) {
  return Bits<Floats>(__builtin_convertvector(At<Halves>(w), Words) << 16);
}

// Some vectors of columns of some rows.
template <int rows, int vectors, typename W>
void Tile(const float* x, const W* w, float* y, int64_t in, int64_t out) {
  Floats sum[rows][vectors] = {};
  for (int64_t i = 0; i < in; ++i, w += out) {
    Floats weights[vectors];
    for (int v = 0; v < vectors; ++v) {
      __builtin_prefetch(w + kAhead * out + v * kLanes);
      weights[v] = Load(w + v * kLanes);
    }
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < vectors; ++v) sum[r][v] += x[r * in + i] * weights[v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v)
      std::memcpy(y + r * out + v * kLanes, &sum[r][v], kBytes);
}

template <int vectors, typename W>
void Tiles(const float* x, const W* w, float* y, int64_t rows, int64_t in, int64_t out) {
  for (; rows >= kRows; rows -= kRows, x += kRows * in, y += kRows * out)
    Tile<kRows, vectors>(x, w, y, in, out);
  if (rows == 3) Tile<3, vectors>(x, w, y, in, out);
  if (rows == 2) Tile<2, vectors>(x, w, y, in, out);
  if (rows == 1) Tile<1, vectors>(x, w, y, in, out);
}

// `columns` of a group's product.
template <typename W>
void Block(const float* x, const W* w, float* y, int64_t rows, int64_t in, int64_t out,
           int64_t columns) {
  int64_t j = 0;
  for (; j + kTile <= columns; j += kTile)
    Tiles<kVectors>(x, w + j, y + j, rows, in, out);
  for (; j + kLanes <= columns; j += kLanes) Tiles<1>(x, w + j, y + j, rows, in, out);
  for (; j < columns; ++j)
    for (int64_t r = 0; r < rows; ++r) {
      float sum = 0;
      for (int64_t i = 0; i < in; ++i) sum += x[r * in + i] * Float(w + i * out + j);
      y[r * out + j] = sum;
    }
}

// The sum of every column's lanes.
template <int columns>
std::array<float, columns> Sums(const Floats (&lanes)[columns]) {
  std::array<float, columns> sums;
  for (int c = 0; c < columns; ++c) {
    Quad q = {};
    for (const Quad& part : Bits<std::array<Quad, kLanes / 4>>(lanes[c])) q += part;
    sums[c] = (q[0] + q[2]) + (q[1] + q[3]);
  }
  return sums;
}

// Dot products of some rows of x with some of w, all of length `in`.
template <int rows, int columns, typename W>
void Dots(const float* x, const W* w, float* y, int64_t in, int64_t out) {
  Floats sum[rows][columns] = {};
  int64_t i = 0;
  for (; i + kLanes <= in; i += kLanes) {
    Floats weights[columns];
    for (int m = 0; m < columns; ++m) weights[m] = Load(w + m * in + i);
    for (int r = 0; r < rows; ++r) {
      const Floats values = Load(x + r * in + i);
      for (int m = 0; m < columns; ++m) sum[r][m] += values * weights[m];
    }
  }
  for (int r = 0; r < rows; ++r) {
    auto sums = Sums(sum[r]);
    for (int m = 0; m < columns; ++m)
      for (int64_t k = i; k < in; ++k) sums[m] += x[r * in + k] * Float(w + m * in + k);
    std::memcpy(y + r * out, &sums, sizeof(sums));
  }
}

int64_t Threads(const ffi::ThreadPool& pool) {
  return std::max<int64_t>(1, pool.num_threads());
}

struct Progress {
  std::atomic<int64_t> next{0}, done{0};
};

// Calls task(n) for n below `total`, on this thread and those of the pool.
template <typename Task>
void Parallel(ffi::ThreadPool pool, int64_t total, Task task) {
  // Shared: a helper may begin when all is done and this call has returned.
  auto progress = std::make_shared<Progress>();
  auto work = [=] {
    for (int64_t n; (n = progress->next.fetch_add(1)) < total;) {
      task(n);
      progress->done.fetch_add(1);
    }
  };
  for (int64_t n = std::min(Threads(pool), total); n > 1; --n) {
    auto helper = work;
    pool.Schedule(std::move(helper));
  }
  work();
  while (progress->done.load() < total) std::this_thread::yield();  // one may have no core
}

// x [A, I], w [E, I, O], upto [E] (the rows of the groups up to each), y [A, O].
template <ffi::DataType dtype>
ffi::Error Grouped(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_AI,
                   ffi::Buffer<dtype> w_EIO, ffi::Buffer<ffi::S32> upto_E,
                   ffi::ResultBuffer<ffi::F32> y_AO) {
  const auto* x = x_AI.typed_data();
  const auto* w = w_EIO.typed_data();
  const auto* upto = upto_E.typed_data();
  auto* y = y_AO->typed_data();
  const int64_t groups = w_EIO.dimensions()[0];
  const int64_t in = w_EIO.dimensions()[1], out = w_EIO.dimensions()[2];
  const int64_t inside = upto[groups - 1];
  std::fill(y + inside * out, y + x_AI.dimensions()[0] * out, 0.0f);
  // Wide, but so that every thread has some.
  const int64_t share = groups * out / (kShares * Threads(pool));
  const int64_t block = std::clamp(share / kTile * kTile, int64_t{kTile}, kBlock);
  const int64_t blocks = (out + block - 1) / block;
  Parallel(pool, groups * blocks, [=](int64_t n) {
    const int64_t group = n / blocks, j = n % blocks * block;
    const int64_t row = group ? upto[group - 1] : 0;
    Block(x + row * in, w + group * in * out + j, y + row * out + j, upto[group] - row, in,
          out, std::min(block, out - j));
  });
  return ffi::Error::Success();
}

// x [G, R, I], w [G, M, I], y [G, R, M].
template <ffi::DataType dtype>
ffi::Error Scores(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x_GRI,
                  ffi::Buffer<dtype> w_GMI, ffi::ResultBuffer<ffi::F32> y_GRM) {
  const auto* x = x_GRI.typed_data();
  const auto* w = w_GMI.typed_data();
  auto* y = y_GRM->typed_data();
  const int64_t groups = x_GRI.dimensions()[0], rows = x_GRI.dimensions()[1];
  const int64_t in = x_GRI.dimensions()[2], out = w_GMI.dimensions()[1];
  const int64_t blocks = (out + kBlock - 1) / kBlock;
  Parallel(pool, groups * blocks, [=](int64_t n) {
    const int64_t group = n / blocks, first = n % blocks * kBlock;
    const int64_t end = std::min(out, first + kBlock);
    for (int64_t m = first; m < end;) {
      const auto* from = w + (group * out + m) * in;
      const bool many = m + kRows <= end;
      for (int64_t r = 0; r < rows;) {
        const auto* of = x + (group * rows + r) * in;
        auto* to = y + (group * rows + r) * out + m;
        const bool full = many && r + kRows <= rows;
        if (full)
          Dots<kRows, kRows>(of, from, to, in, out);
        else if (many)
          Dots<1, kRows>(of, from, to, in, out);
        else
          Dots<1, 1>(of, from, to, in, out);
        r += full ? kRows : 1;
      }
      m += many ? kRows : 1;
    }
  });
  return ffi::Error::Success();
}

auto Bind() {
  return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::Buffer<ffi::F32>>();
}

template <ffi::DataType dtype>
auto BindGrouped() {
  return Bind()
      .Arg<ffi::Buffer<dtype>>()
      .template Arg<ffi::Buffer<ffi::S32>>()
      .template Ret<ffi::Buffer<ffi::F32>>();
}

template <ffi::DataType dtype>
auto BindScores() {
  return Bind().Arg<ffi::Buffer<dtype>>().template Ret<ffi::Buffer<ffi::F32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv3_grouped_float32, Grouped<ffi::F32>,
                              BindGrouped<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv3_grouped_uint16, Grouped<ffi::U16>,
                              BindGrouped<ffi::U16>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv3_scores_float32, Scores<ffi::F32>,
                              BindScores<ffi::F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(dsv3_scores_uint16, Scores<ffi::U16>,
                              BindScores<ffi::U16>());
