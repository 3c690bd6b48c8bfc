// The loops of matmul.cc, written once over vectors of W numbers. Included for each instruction set, inside a namespace
// that has TARGET, W, Table, `table`, `lookup` and `dot4`.
//
// A vector's lanes are W neighbouring outputs, so that x is broadcast, no sum is taken across lanes, and a group of
// inputs ends with one product by a vector of scales. Outputs are taken P vectors at a time: a unit.

typedef float V __attribute__((vector_size(4 * W)));

constexpr int P = 2, UNIT = P * W;

template <class Vector, class T>
TARGET INLINE Vector load(const T* p) {
  Vector v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// Writes, or adds, one unit of some rows to y [m][n], whose last unit may be short: a weight is padded to whole panels.
template <class Vector, class T>
TARGET NOINLINE void put(const Vector (*rows)[P], int count, T* y, int64_t n0, int64_t n, bool add) {
  for (int i = 0; i < count; i++, y += n)
    for (int q = 0; q < P; q++) {
      const int64_t at = n0 + q * W;
      const T* from = reinterpret_cast<const T*>(rows[i] + q);
      if (at + W <= n) {
        const Vector v = add ? rows[i][q] + load<Vector>(y + at) : rows[i][q];
        __builtin_memcpy(y + at, &v, sizeof v);
      } else {
        for (int64_t lane = 0; at + lane < n; lane++) y[at + lane] = from[lane] + (add ? y[at + lane] : 0);
      }
    }
}

// Where output n0 + vector * W starts in an array [panels][length][PANEL]. What lies past the end is read as n0's.
template <class T>
TARGET INLINE const T* column(const T* array, int64_t length, int64_t n, int64_t n0, int vector) {
  int64_t at = n0 + vector * W < n ? n0 + vector * W : n0;
  return array + at / PANEL * length * PANEL + at % PANEL;
}

template <int KIND>
struct Levels {
  Table a, b, c;
  float shift;
  TARGET INLINE explicit Levels(const float* p)
      : a(table(KIND == INT8 ? nullptr : p)), b(table(KIND == FLOAT8 ? p + 16 : nullptr)),
        c(table(KIND == FLOAT8 ? p + 32 : nullptr)), shift(KIND == INT8 ? *p : 0) {}
};

// The values of code j of each word.
template <int KIND>
TARGET INLINE V value(const Levels<KIND>& levels, I word, int j) {
  constexpr int bits = BITS[KIND];
  I field = word >> (8 * (j % 4) + bits * (j / 4));
  if (KIND == INT8) return __builtin_convertvector(field & 255, V) - levels.shift;
  if (KIND != FLOAT8) return lookup(levels.a, field);
  // A sign and the upper bits of an exponent, times the rest; subnormals have a table of their own.
  I upper = field >> 4;
  return lookup(levels.a, upper) * ((upper & 7) == 0 ? lookup(levels.b, field) : lookup(levels.c, field));
}

// sum over inputs of each group: x [m][k] -> sums [m][groups].
TARGET inline void group_sums(const Product& p, float* sums) {
  const int64_t size = p.k / p.groups;
  for (int64_t i = 0; i < p.m * p.groups; i++) {
    const float* x = p.x + i * size;
    V vector = {};
    float sum = 0;
    int64_t k = 0;
    for (; k + W <= size; k += W) vector += load<V>(x + k);
    for (; k < size; k++) sum += x[k];
    for (int lane = 0; lane < W; lane++) sum += vector[lane];
    sums[i] = sum;
  }
}

// MR rows of x by one unit: codes become numbers in registers. y = sum over groups of scale (x @ value) + offset sum(x).
template <int KIND, int MR>
TARGET void few_rows(const Product& p, int64_t m0, int64_t n0, const float* sums) {
  constexpr int J = 32 / BITS[KIND], CHAINS = MR == 1 ? 4 : MR == 2 || W == 16 ? 2 : 1;  // Sums that hide latency.
  const Levels<KIND> levels(p.levels);
  const int64_t words = p.k / J, size = words / p.groups;
  const uint32_t* codes[P];
  const float *scale[P], *offset[P];
  UNROLL for (int q = 0; q < P; q++) {
    codes[q] = column(p.codes, words, p.n, n0, q);
    scale[q] = column(p.scale, p.groups, p.n, n0, q);
    offset[q] = p.offset ? column(p.offset, p.groups, p.n, n0, q) : nullptr;
  }
  V y[MR][P] = {};
  for (int64_t g = 0; g < p.groups; g++) {
    V sum[CHAINS][MR][P] = {};
    for (int64_t w = g * size; w < (g + 1) * size; w++) {
      const float* x = p.x + m0 * p.k + w * J;
      I word[P];
      UNROLL for (int q = 0; q < P; q++) word[q] = load<I>(codes[q] + w * PANEL);
      UNROLL for (int j = 0; j < J; j++)
        UNROLL for (int q = 0; q < P; q++) {
          V v = value<KIND>(levels, word[q], j);
          UNROLL for (int i = 0; i < MR; i++) sum[j % CHAINS][i][q] += v * x[i * p.k + j];
        }
    }
    UNROLL for (int q = 0; q < P; q++) {
      V s = load<V>(scale[q] + g * PANEL);
      UNROLL for (int i = 0; i < MR; i++) {
        UNROLL for (int c = 1; c < CHAINS; c++) sum[0][i][q] += sum[c][i][q];
        y[i][q] += sum[0][i][q] * s;
        if (p.offset) y[i][q] += load<V>(offset[q] + g * PANEL) * sums[(m0 + i) * p.groups + g];
      }
    }
  }
  V rows[MR][P];  // Of its own: `y` stays in registers.
  UNROLL for (int i = 0; i < MR; i++)
    UNROLL for (int q = 0; q < P; q++) rows[i][q] = y[i][q];
  put(rows, MR, p.y + m0 * p.n, n0, p.n, false);
}

// The numbers of words [w0, w1) of a unit: panel [codes][UNIT].
template <int KIND>
TARGET void decode(const Product& p, int64_t n0, int64_t w0, int64_t w1, float* panel) {
  constexpr int J = 32 / BITS[KIND];
  const Levels<KIND> levels(p.levels);
  const int64_t words = p.k / J, size = words / p.groups;
  UNROLL for (int q = 0; q < P; q++) {
    const uint32_t* codes = column(p.codes, words, p.n, n0, q);
    const float* scale = column(p.scale, p.groups, p.n, n0, q);
    const float* offset = p.offset ? column(p.offset, p.groups, p.n, n0, q) : nullptr;
    for (int64_t w = w0; w < w1;) {
      const int64_t g = w / size, end = (g + 1) * size < w1 ? (g + 1) * size : w1;
      V s = load<V>(scale + g * PANEL), o = {};
      if (offset) o = load<V>(offset + g * PANEL);
      for (; w < end; w++) {
        I word = load<I>(codes + w * PANEL);
        float* to = panel + (w - w0) * J * UNIT + q * W;
        UNROLL for (int j = 0; j < J; j++) {
          V v = value<KIND>(levels, word, j) * s + o;
          __builtin_memcpy(to + j * UNIT, &v, sizeof v);
        }
      }
    }
  }
}

// y[MR][UNIT] (+)= x[MR][count] @ panel[count][UNIT].
template <int MR>
TARGET void block(const Product& p, const float* x, const float* panel, int64_t count, bool add, int64_t m0, int64_t n0) {
  V sum[MR][P] = {};
  for (int64_t k = 0; k < count; k++) {
    V v[P];
    UNROLL for (int q = 0; q < P; q++) v[q] = load<V>(panel + k * UNIT + q * W);
    UNROLL for (int i = 0; i < MR; i++)
      UNROLL for (int q = 0; q < P; q++) sum[i][q] += v[q] * x[i * p.k + k];
  }
  V rows[MR][P];
  UNROLL for (int i = 0; i < MR; i++)
    UNROLL for (int q = 0; q < P; q++) rows[i][q] = sum[i][q];
  put(rows, MR, p.y + m0 * p.n, n0, p.n, add);
}

// Many rows by one unit: codes become a panel of floats in the cache, which all rows read.
template <int KIND>
TARGET void many_rows(const Product& p, int64_t n0, float* panel) {
  constexpr int J = 32 / BITS[KIND];
  const int64_t words = p.k / J, step = DEPTH / J;
  for (int64_t w = 0; w < words; w += step) {
    const int64_t end = w + step < words ? w + step : words, count = (end - w) * J;
    decode<KIND>(p, n0, w, end, panel);
    int64_t m = 0;
    for (const float* x = p.x + w * J; m < p.m;) {
      const int64_t left = p.m - m;
      if (left >= 8) block<8>(p, x + m * p.k, panel, count, w, m, n0), m += 8;
      else if (left >= 4) block<4>(p, x + m * p.k, panel, count, w, m, n0), m += 4;
      else if (left >= 2) block<2>(p, x + m * p.k, panel, count, w, m, n0), m += 2;
      else block<1>(p, x + m * p.k, panel, count, w, m, n0), m += 1;
    }
  }
}

template <int KIND>
TARGET void product(const Product& p, int64_t begin, int64_t end) {
  std::vector<float> work(p.m > FEW ? DEPTH * UNIT + 16 : p.offset ? p.m * p.groups : 0);
  if (p.m <= FEW && p.offset) group_sums(p, work.data());
  float* panel = work.data() + (-reinterpret_cast<uintptr_t>(work.data()) / 4) % 16;       // Of whole cache lines.
  for (int64_t n0 = begin * UNIT; n0 < end * UNIT && n0 < p.n; n0 += UNIT) {
    if (p.m > FEW) {
      many_rows<KIND>(p, n0, panel);
      continue;
    }
    for (int64_t m = 0; m < p.m; m += 4) {
      const int64_t left = p.m - m;
      if (left == 1) few_rows<KIND, 1>(p, m, n0, work.data());
      else if (left == 2) few_rows<KIND, 2>(p, m, n0, work.data());
      else if (left == 3) few_rows<KIND, 3>(p, m, n0, work.data());
      else few_rows<KIND, 4>(p, m, n0, work.data());
    }
  }
}

// sum over inputs: x [m][k] -> sums [m].
TARGET inline void row_sums(const Sums& p, int32_t* sums) {
  typedef int8_t Bytes __attribute__((vector_size(W)));
  for (int64_t i = 0; i < p.m; i++) {
    const int8_t* x = p.x + i * p.k;
    I vector = {};
    int32_t sum = 0;
    int64_t k = 0;
    for (; k + W <= p.k; k += W) vector += __builtin_convertvector(load<Bytes>(x + k), I);
    for (; k < p.k; k++) sum += x[k];
    for (int lane = 0; lane < W; lane++) sum += vector[lane];
    sums[i] = sum;
  }
}

// MR rows by one unit: y = sum of x (code - zero), which is sum of x code, less zero sum(x).
template <int B, int MR>
TARGET void sum_rows(const Sums& p, int64_t m0, int64_t n0, const int32_t* sums) {
  constexpr int J = 32 / B, MASK = B == 2 ? 0x03030303 : B == 4 ? 0x0f0f0f0f : -1;
  const int8_t* x = p.x + m0 * p.k;
  const uint32_t* codes[P];
  UNROLL for (int q = 0; q < P; q++) codes[q] = column(p.codes, p.k / J, p.n, n0, q);
  I sum[MR][P] = {};
  for (int64_t w = 0; w < p.k / J; w++, x += J)
    UNROLL for (int q = 0; q < P; q++) {
      I word = load<I>(codes[q] + w * PANEL);
      UNROLL for (int part = 0; part < 8 / B; part++)
        UNROLL for (int i = 0; i < MR; i++) sum[i][q] = dot4(sum[i][q], word >> B * part & MASK, x + i * p.k + 4 * part);
    }
  I rows[MR][P];
  UNROLL for (int q = 0; q < P; q++) {
    I zero = load<I>(column(p.zero, 1, p.n, n0, q));
    UNROLL for (int i = 0; i < MR; i++) rows[i][q] = sum[i][q] - zero * sums[m0 + i];
  }
  put(rows, MR, p.y + m0 * p.n, n0, p.n, false);
}

template <int B>
TARGET void integer_sums(const Sums& p, int64_t begin, int64_t end) {
  std::vector<int32_t> sums(p.m);
  row_sums(p, sums.data());
  for (int64_t n0 = begin * UNIT; n0 < end * UNIT && n0 < p.n; n0 += UNIT)
    for (int64_t m = 0; m < p.m;) {
      const int64_t left = p.m - m;
      if (left >= 8) sum_rows<B, 8>(p, m, n0, sums.data()), m += 8;
      else if (left >= 4) sum_rows<B, 4>(p, m, n0, sums.data()), m += 4;
      else if (left >= 2) sum_rows<B, 2>(p, m, n0, sums.data()), m += 2;
      else sum_rows<B, 1>(p, m, n0, sums.data()), m += 1;
    }
}

const Level level = {UNIT,
                     {product<TABLE2>, product<TABLE4>, product<INT8>, product<FLOAT8>},
                     {integer_sums<2>, integer_sums<4>, integer_sums<8>}};
