// Products by low-bit weights on the CPU, as custom calls of XLA's FFI.
//
// A weight [k, n] lies in panels of 16 outputs: words[n / 16][k / J][16], each of which holds J = 32 / bits inputs of one
// output. Code j of a word is at bit 8 (j % 4) + bits (j / 4): four inputs a byte apart are what an integer dot product
// takes, and a shift brings any code to the lowest bits, where a table in a register is looked up.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/ffi.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ffi = xla::ffi;

namespace {

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

constexpr int PANEL = 16;
constexpr int DEPTH = 256;  // Inputs of a decoded panel: 256 x 32 outputs x 4 bytes = 32 KiB, in a core's first cache.
constexpr int FEW = 16;     // Rows up to which codes are decoded in registers, for four rows at a time.

enum Kind { TABLE2, TABLE4, INT8, FLOAT8 };
constexpr int BITS[] = {2, 4, 8, 8};

struct Product {             // y[m][n] = x[m][k] @ w
  const float* x;
  const uint32_t* codes;     // [n / 16][k / J][16]
  const float* scale;        // [n / 16][groups][16]
  const float* offset;       // Likewise, or null.
  const float* levels;       // [16]; [1] for INT8: what is taken from a code; [48] for FLOAT8.
  float* y;
  int64_t m, n, k, groups;
};

struct Sums {                // y[m][n] = sum over k of x[m][k] (code[k][n] - zero[n])
  const int8_t* x;
  const uint32_t* codes;
  const int32_t* zero;       // [n / 16][16]
  int32_t* y;
  int64_t m, n, k;
};

struct Level {               // The loops for one instruction set, over units [begin, end) of outputs.
  int unit;
  void (*product[4])(const Product&, int64_t begin, int64_t end);  // By Kind.
  void (*sums[3])(const Sums&, int64_t begin, int64_t end);        // Of 2, 4 and 8 bits.
};

namespace portable {
#define TARGET
constexpr int W = 4;
typedef int32_t I __attribute__((vector_size(16)));
typedef const float* Table;
TARGET INLINE Table table(const float* p) { return p; }
TARGET INLINE auto lookup(Table t, I i) {
  typedef float F __attribute__((vector_size(16)));
  return F{t[i[0] & 15], t[i[1] & 15], t[i[2] & 15], t[i[3] & 15]};
}
TARGET INLINE I dot4(I sum, I u, const int8_t* x) {
  return sum + (u & 255) * x[0] + (u >> 8 & 255) * x[1] + (u >> 16 & 255) * x[2] + (u >> 24 & 255) * x[3];
}
#include "loops.h"
#undef TARGET
}  // namespace portable

#if defined(__x86_64__)
namespace avx2 {
#define TARGET __attribute__((target("avx2,fma")))
constexpr int W = 8;
typedef int32_t I __attribute__((vector_size(32)));
struct Table { __m256 low, high; };
TARGET INLINE Table table(const float* p) {
  return p ? Table{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)} : Table{_mm256_setzero_ps(), _mm256_setzero_ps()};
}
TARGET INLINE __m256 lookup(Table t, I i) {
  __m256i index = (__m256i)i;
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index),
                          _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
TARGET INLINE I dot4(I sum, I u, const int8_t* x) {  // In 16 bits: products of bytes in pairs would saturate.
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  __m256i v = _mm256_set1_epi32(four), bytes = _mm256_set1_epi16(255);
  __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), odd = _mm256_srai_epi16(v, 8);
  __m256i a = _mm256_madd_epi16(_mm256_and_si256((__m256i)u, bytes), even);
  __m256i b = _mm256_madd_epi16(_mm256_srli_epi16((__m256i)u, 8), odd);
  return sum + (I)_mm256_add_epi32(a, b);
}
#include "loops.h"
#undef TARGET
}  // namespace avx2

namespace avx512 {
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")))
constexpr int W = 16;
typedef int32_t I __attribute__((vector_size(64)));
typedef __m512 Table;
TARGET INLINE Table table(const float* p) { return p ? _mm512_loadu_ps(p) : _mm512_setzero_ps(); }
TARGET INLINE __m512 lookup(Table t, I i) { return _mm512_permutexvar_ps((__m512i)i, t); }  // By the lowest 4 bits.
TARGET INLINE I dot4(I sum, I u, const int8_t* x) {
  int32_t four;
  __builtin_memcpy(&four, x, 4);
  return (I)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)u, _mm512_set1_epi32(four));
}
#include "loops.h"
#undef TARGET
}  // namespace avx512
#endif

const Level* const LEVELS[] = {
    &portable::level,
#if defined(__x86_64__)
    &avx2::level, &avx512::level,
#endif
};

int best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  for (bool has : {__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                   __builtin_cpu_supports("avx512dq"), __builtin_cpu_supports("avx512vl"),
                   __builtin_cpu_supports("avx512vnni")})
    if (!has) return 1;
  return 2;
#endif
  return 0;
}

// The level that was asked for, which a program compiled on another machine may have chosen too high.
const Level& at_level(int32_t asked) {
  static const int best = best_level();
  return *LEVELS[asked < 0 || asked > best ? best : asked];
}

// Calls f(begin, end) for pieces of [0, units) on the threads of `pool` and on this one. A task that no thread takes is
// not waited for: the caller may itself be of the pool, and all others busy.
void parallel(ffi::ThreadPool& pool, int64_t units, int64_t operations, std::function<void(int64_t, int64_t)> f) {
  constexpr int64_t SMALLEST = 1 << 18;  // Operations that are worth a task: some 10 us.
  struct Work {
    std::function<void(int64_t, int64_t)> f;
    int64_t units, pieces;
    std::atomic<int64_t> next{0}, done{0};
    void run() {
      for (int64_t i; (i = next++) < pieces; done++) f(units * i / pieces, units * (i + 1) / pieces);
    }
  };
  const int64_t threads = pool.num_threads(), worth = operations / SMALLEST + 1;
  const int64_t pieces = std::min({units, 4 * std::max<int64_t>(threads, 1), worth});
  if (pieces < 2 || threads < 2) return f(0, units);
  auto work = std::make_shared<Work>();
  work->f = std::move(f), work->units = units, work->pieces = pieces;
  for (int64_t t = 1; t < std::min(threads, pieces); t++) pool.Schedule([work] { work->run(); });
  work->run();
  while (work->done.load() < pieces) std::this_thread::yield();
}

using Shape = ffi::Span<const int64_t>;

int64_t size(Shape shape, int64_t from, int64_t to) {
  int64_t product = 1;
  for (int64_t i = from; i < to; i++) product *= shape[i];
  return product;
}

// An operand [*batch, *matrix] under a result [*batch, m, n]: which of its matrices belongs to each of the result's. Axes of
// size 1 are shared.
struct Batch {
  Shape result, operand;
  int64_t rank, matrix;      // Axes of the batch, numbers of a matrix.
  Batch(Shape result, Shape operand)
      : result(result), operand(operand), rank(result.size() - 2), matrix(size(operand, rank, operand.size())) {}
  bool shared() const { return size(operand, 0, rank) == 1; }
  int64_t operator()(int64_t b) const {
    int64_t at = 0, stride = matrix;
    for (int64_t i = rank - 1; i >= 0; i--) {
      at += operand[i] == 1 ? 0 : b % result[i] * stride;
      stride *= operand[i], b /= result[i];
    }
    return at;
  }
};

#define CHECK_SHAPES(condition) \
  if (!(condition)) return ffi::Error::InvalidArgument("The shapes of a product do not agree: " #condition)

ffi::Error multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U32> codes,
                    ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> offset, ffi::ResultBuffer<ffi::F32> y,
                    ffi::Span<const float> levels, int32_t bits, int32_t level) {
  const Shape shape = y->dimensions(), words = codes.dimensions(), inputs = x.dimensions();
  const int64_t rank = shape.size() - 2;
  Product p = {};
  p.levels = levels.begin();
  p.m = shape[rank], p.n = shape[rank + 1], p.k = inputs[rank + 1], p.groups = scale.dimensions()[rank + 1];
  if (y->element_count() == 0) return ffi::Error::Success();
  const Kind kind = bits == 2 ? TABLE2 : bits == 4 ? TABLE4 : levels.size() == 1 ? INT8 : FLOAT8;
  CHECK_SHAPES(p.k == words[rank + 1] * (32 / bits) && p.n <= words[rank] * PANEL && inputs[rank] == p.m);
  CHECK_SHAPES(p.groups > 0 && words[rank + 1] % p.groups == 0 && scale.dimensions()[rank] == words[rank]);
  const Batch of_x(shape, inputs), of_codes(shape, words), of_scale(shape, scale.dimensions());
  const Batch of_offset(shape, offset.dimensions());
  int64_t batch = size(shape, 0, rank);
  if (of_codes.shared() && of_scale.shared() && of_offset.shared() && x.element_count() == batch * p.m * p.k)
    p.m *= batch, batch = 1;                                                       // One weight: all rows at once.
  const Level& loops = at_level(level);
  for (int64_t b = 0; b < batch; b++) {
    Product q = p;
    q.x = x.typed_data() + of_x(b), q.y = y->typed_data() + b * p.m * p.n;
    q.codes = codes.typed_data() + of_codes(b), q.scale = scale.typed_data() + of_scale(b);
    q.offset = offset.element_count() ? offset.typed_data() + of_offset(b) : nullptr;
    parallel(pool, (p.n + loops.unit - 1) / loops.unit, p.m * p.n * p.k,
             [&](int64_t begin, int64_t end) { loops.product[kind](q, begin, end); });
  }
  return ffi::Error::Success();
}

ffi::Error integer_sums(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::U32> codes,
                        ffi::Buffer<ffi::S32> zero, ffi::ResultBuffer<ffi::S32> y, int32_t bits, int32_t level) {
  const Shape shape = y->dimensions(), words = codes.dimensions(), inputs = x.dimensions();
  const int64_t rank = shape.size() - 2;
  Sums p = {};
  p.m = shape[rank], p.n = shape[rank + 1], p.k = inputs[rank + 1];
  if (y->element_count() == 0) return ffi::Error::Success();
  CHECK_SHAPES(p.k == words[rank + 1] * (32 / bits) && p.n <= words[rank] * PANEL && inputs[rank] == p.m);
  CHECK_SHAPES(zero.dimensions()[rank] == words[rank]);
  const Batch of_x(shape, inputs), of_codes(shape, words), of_zero(shape, zero.dimensions());
  int64_t batch = size(shape, 0, rank);
  if (of_codes.shared() && of_zero.shared() && x.element_count() == batch * p.m * p.k) p.m *= batch, batch = 1;
  const Level& loops = at_level(level);
  for (int64_t b = 0; b < batch; b++) {
    Sums q = p;
    q.x = x.typed_data() + of_x(b), q.y = y->typed_data() + b * p.m * p.n;
    q.codes = codes.typed_data() + of_codes(b), q.zero = zero.typed_data() + of_zero(b);
    parallel(pool, (p.n + loops.unit - 1) / loops.unit, p.m * p.n * p.k,
             [&](int64_t begin, int64_t end) { loops.sums[bits / 4](q, begin, end); });
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" int qat_best_level() { return best_level(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_multiply, multiply, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::Buffer<ffi::F32>>().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::F32>>()
    .Arg<ffi::Buffer<ffi::F32>>().Ret<ffi::Buffer<ffi::F32>>()
    .Attr<ffi::Span<const float>>("levels").Attr<int32_t>("bits").Attr<int32_t>("level"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(qat_integer_sums, integer_sums, ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
    .Arg<ffi::Buffer<ffi::S8>>().Arg<ffi::Buffer<ffi::U32>>().Arg<ffi::Buffer<ffi::S32>>()
    .Ret<ffi::Buffer<ffi::S32>>().Attr<int32_t>("bits").Attr<int32_t>("level"));
