// SPDX-License-Identifier: Apache-2.0
#include "eigen.h"

#include "transpose.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

inline double dot(const double* a, const double* b, int64_t n) {
  Vec<double> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * lanes<double> <= n; i += 2 * lanes<double>) {
    sums[0] += load(a + i) * load(b + i);
    sums[1] += load(a + i + lanes<double>) * load(b + i + lanes<double>);
  }
  const Vec<double> both = sums[0] + sums[1];
  double sum = 0;
  for (int64_t j = 0; j < lanes<double>; ++j) {
    sum += both[j];
  }
  for (; i < n; ++i) {
    sum += a[i] * b[i];
  }
  return sum;
}

/// row += factor * other
inline void add(
    double* __restrict row,
    double factor,
    const double* other,
    int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    row[i] += factor * other[i];
  }
}

template <int count>
struct Count {
  static constexpr int value = count;
};

inline double magnitude(double value) {
  return __builtin_fabs(value);
}

/// Householder reduction to tridiagonal form: H_k .. H_0 A H_0 .. H_k. Step k
/// leaves its reflector I - factor[k] v v^T in matrix[k, k + 1 ..].
void tridiagonalize(
    double* matrix,
    int64_t n,
    double* diagonal,
    double* off_diagonal,
    double* factor,
    double* work) {
  for (int64_t k = 0; k + 1 < n; ++k) {
    double* v = matrix + k * n + k + 1;
    const int64_t size = n - k - 1;
    diagonal[k] = matrix[k * n + k];
    factor[k] = 0;
    off_diagonal[k] = v[0];
    const double tail = dot(v + 1, v + 1, size - 1);
    if (tail == 0) {
      continue;
    }
    const double norm = __builtin_sqrt(v[0] * v[0] + tail);
    const double reflected = v[0] > 0 ? -norm : norm;
    off_diagonal[k] = reflected;
    v[0] -= reflected;
    factor[k] = 2 / (v[0] * v[0] + tail);
    double* w = work;
    for (int64_t i = 0; i < size; ++i) {
      w[i] = factor[k] * dot(matrix + (k + 1 + i) * n + k + 1, v, size);
    }
    add(w, -factor[k] / 2 * dot(w, v, size), v, size);
    for (int64_t i = 0; i < size; ++i) {
      double* __restrict row = matrix + (k + 1 + i) * n + k + 1;
      const double vi = v[i];
      const double wi = w[i];
      for (int64_t j = 0; j < size; ++j) {
        row[j] -= vi * w[j] + wi * v[j];
      }
    }
  }
  diagonal[n - 1] = matrix[n * n - 1];
}

/// Rotates the plane of two rows.
inline void rotate(
    double* __restrict first,
    double* __restrict second,
    double c,
    double s,
    int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const double a = first[i];
    const double b = second[i];
    first[i] = c * a + s * b;
    second[i] = c * b - s * a;
  }
}

/// Implicitly shifted QR iterations (Golub & Van Loan, section 8.3) on a
/// tridiagonal matrix; the rows of `vectors`, unless it is null, are rotated
/// alike.
void diagonalize(
    double* diagonal,
    double* off_diagonal,
    int64_t n,
    double precision,
    double* vectors) {
  double norm = magnitude(diagonal[n - 1]);
  for (int64_t i = 0; i + 1 < n; ++i) {
    const double row = magnitude(diagonal[i]) + magnitude(off_diagonal[i]);
    norm = row > norm ? row : norm;
  }
  const double negligible = norm * precision;
  int64_t high = n - 1;
  // Each eigenvalue takes two or three sweeps; the bound only rules out an
  // endless loop.
  for (int64_t sweep = 0; high > 0 && sweep < 50 * n; ++sweep) {
    if (magnitude(off_diagonal[high - 1]) <= negligible) {
      --high;
      continue;
    }
    int64_t low = high - 1;
    while (low > 0 && magnitude(off_diagonal[low - 1]) > negligible) {
      --low;
    }
    const double e = off_diagonal[high - 1];
    const double half = (diagonal[high - 1] - diagonal[high]) / 2;
    const double root = __builtin_sqrt(half * half + e * e);
    const double shift =
        diagonal[high] - e * e / (half + (half < 0 ? -root : root));
    double x = diagonal[low] - shift;
    double z = off_diagonal[low];
    for (int64_t k = low; k < high; ++k) {
      const double r = __builtin_sqrt(x * x + z * z);
      const double c = r > 0 ? x / r : 1;
      const double s = r > 0 ? z / r : 0;
      if (k > low) {
        off_diagonal[k - 1] = r;
      }
      const double upper = diagonal[k];
      const double lower = diagonal[k + 1];
      const double between = off_diagonal[k];
      const double cross = 2 * c * s * between;
      diagonal[k] = c * c * upper + cross + s * s * lower;
      diagonal[k + 1] = s * s * upper - cross + c * c * lower;
      off_diagonal[k] = c * s * (lower - upper) + (c * c - s * s) * between;
      if (k + 1 < high) {
        x = off_diagonal[k];
        z = s * off_diagonal[k + 1];
        off_diagonal[k + 1] *= c;
      }
      if (vectors != nullptr) {
        rotate(vectors + k * n, vectors + (k + 1) * n, c, s, n);
      }
    }
  }
}

void symmetric_eigen(
    double* matrix,
    int64_t n,
    int64_t num_vectors,
    double precision,
    double* values,
    double* vectors,
    double* work) {
  double* off_diagonal = work;
  double* factor = work + n;
  double* scratch = work + 2 * n;
  tridiagonalize(matrix, n, values, off_diagonal, factor, scratch);
  for (int64_t i = 0; num_vectors > 0 && i < n * n; ++i) {
    vectors[i] = i % (n + 1) == 0;
  }
  diagonalize(
      values, off_diagonal, n, precision, num_vectors > 0 ? vectors : nullptr);

  // Selection sort: as many swaps as values, and few values.
  for (int64_t i = 0; i + 1 < n; ++i) {
    int64_t best = i;
    for (int64_t j = i + 1; j < n; ++j) {
      best = values[j] > values[best] ? j : best;
    }
    if (best != i) {
      const double value = values[i];
      values[i] = values[best];
      values[best] = value;
      for (int64_t j = 0; num_vectors > 0 && j < n; ++j) {
        const double entry = vectors[i * n + j];
        vectors[i * n + j] = vectors[best * n + j];
        vectors[best * n + j] = entry;
      }
    }
  }
  for (int64_t i = 0; i < num_vectors; ++i) {
    for (int64_t k = n - 2; k >= 0; --k) {
      const double* v = matrix + k * n + k + 1;
      double* row = vectors + i * n + k + 1;
      if (factor[k] != 0) {
        add(row, -factor[k] * dot(v, row, n - k - 1), v, n - k - 1);
      }
    }
  }
}

// -- Leading eigenvectors in float -------------------------------------------
//
// Householder reduction, bisection of the wanted eigenvalues side by side
// (Sturm counts), and for each its vector from a twisted factorization (Dhillon
// & Parlett, SIMAX 2004). Distances in the subspace do not depend on how close
// vectors turned into each other, so plain float is enough for the matrix.

/// A symmetric tridiagonal matrix.
struct Tridiagonal {
  double* diagonal;     // [n]
  double* off_diagonal; // [n], the last one 0
};

float sum_lanes(Vec<float> values) {
  float sums[lanes<float>];
  store(sums, values);
  for (int64_t half = lanes<float> / 2; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

/// One step's part in the reduction of a symmetric matrix [n, pitch], of which
/// only squares of `lanes` rows on and above the diagonal are kept up to date:
/// A -= v w^T + w v^T, and A x for the updated A. All vectors are [pitch].
struct Step {
  float* matrix;
  int64_t pitch;
  const float* v;
  const float* w;
  const float* x;
  float* product;  // what columns contribute to A x
  float* row_sums; // [pitch, lanes]: what rows do, lane by lane
};

constexpr int block_vectors = vector_bytes == 64 ? 4 : 2;

/// Rows [first, last) of `width` vectors of columns, with the diagonal in one
/// of these vectors, or right of the rows if it is -1; adds to the columns'
/// sums.
template <int diagonal, int width>
KDCI_INLINE void advance_rows(
    const Step& step,
    int64_t first,
    int64_t last,
    int64_t column,
    Vec<float> (&sums)[width]) {
  constexpr int begin = diagonal < 0 ? 0 : diagonal;
  Vec<float> vj[width];
  Vec<float> wj[width];
  Vec<float> xj[width];
#pragma GCC unroll 4
  for (int c = begin; c < width; ++c) {
    vj[c] = load(step.v + column + c * lanes<float>);
    wj[c] = load(step.w + column + c * lanes<float>);
    xj[c] = load(step.x + column + c * lanes<float>);
  }
  for (int64_t i = first; i < last; ++i) {
    float* row = step.matrix + i * step.pitch + column;
    float* row_sum = step.row_sums + i * lanes<float>;
    const Vec<float> vi = broadcast(step.v[i]);
    const Vec<float> wi = broadcast(step.w[i]);
    const Vec<float> xi = broadcast(step.x[i]);
    Vec<float> sum = diagonal < 0 ? load(row_sum) : Vec<float>{};
#pragma GCC unroll 4
    for (int c = begin; c < width; ++c) {
      const Vec<float> a =
          load(row + c * lanes<float>) - vi * wj[c] - wi * vj[c];
      store(row + c * lanes<float>, a);
      sums[c] += xi * a;
      if (c > diagonal) {
        sum += xj[c] * a;
      }
    }
    store(row_sum, sum);
  }
}

/// The rows whose diagonal lies in vector `diagonal` or after it.
template <int diagonal, int width>
KDCI_INLINE void advance_diagonal(
    const Step& step,
    int64_t n,
    int64_t first,
    int64_t column,
    Vec<float> (&sums)[width]) {
  if constexpr (diagonal < width) {
    const int64_t begin = column + diagonal * lanes<float>;
    const int64_t end = begin + lanes<float>;
    advance_rows<diagonal>(
        step, first > begin ? first : begin, end < n ? end : n, column, sums);
    advance_diagonal<diagonal + 1>(step, n, first, column, sums);
  }
}

template <int width>
void advance_columns(
    const Step& step,
    int64_t n,
    int64_t first,
    int64_t column) {
  Vec<float> sums[width] = {};
  // Narrow vectors go past the last row, up to the end of the pitch.
  advance_rows<-1>(step, first, column < n ? column : n, column, sums);
  advance_diagonal<0>(step, n, first, column, sums);
#pragma GCC unroll 4
  for (int c = 0; c < width; ++c) {
    store(step.product + column + c * lanes<float>, sums[c]);
  }
}

/// Updates the matrix from row and column `first` on, and multiplies it.
void advance(const Step& step, int64_t n, int64_t first) {
  const int64_t begin = first / lanes<float> * lanes<float>;
  int64_t column = begin;
  for (; column + block_vectors * lanes<float> <= step.pitch;
       column += block_vectors * lanes<float>) {
    advance_columns<block_vectors>(step, n, first, column);
  }
  switch ((step.pitch - column) / lanes<float>) {
    case 3:
      advance_columns<3>(step, n, first, column);
      break;
    case 2:
      advance_columns<2>(step, n, first, column);
      break;
    case 1:
      advance_columns<1>(step, n, first, column);
      break;
  }
  for (int64_t i = begin; i < step.pitch; i += lanes<float>) {
    Vec<float> parts[lanes<float>];
#pragma GCC unroll 16
    for (int64_t r = 0; r < lanes<float>; ++r) {
      parts[r] = load(step.row_sums + (i + r) * lanes<float>);
    }
    sum_rows<lanes<float> / 2, float>(parts);
    store(step.product + i, load(step.product + i) + parts[0]);
  }
}

/// Reduces matrix [n, pitch]; reflector k is I - v v^T with v in row k of
/// `reflectors` [n, pitch].
void reduce(
    float* matrix,
    int64_t n,
    float* reflectors,
    float* work, // [2 + lanes, pitch]
    const Tridiagonal& reduced) {
  const int64_t pitch = eigen_pitch(n);
  float* w = work;
  float* product = work + pitch;
  float* row_sums = work + 2 * pitch;
  for (int64_t i = 0; i < (2 + lanes<float>)*pitch; ++i) {
    work[i] = 0;
  }
  const float* last_v = w; // no update comes before the first step
  for (int64_t k = 0; k < n; ++k) {
    float* row = matrix + k * pitch;
    // Vectors of the columns that are still in work.
    const int64_t begin = k / lanes<float> * lanes<float>;
    const float vk = last_v[k];
    const float wk = w[k];
    for (int64_t j = begin; j < pitch; j += lanes<float>) {
      store(row + j, load(row + j) - vk * load(w + j) - wk * load(last_v + j));
    }
    reduced.diagonal[k] = row[k];
    reduced.off_diagonal[k] = 0;
    float* v = reflectors + k * pitch;
    for (int64_t j = 0; j < pitch; ++j) {
      v[j] = j > k ? row[j] : 0;
    }
    if (k + 1 == n) {
      break;
    }
    Vec<float> squares = {};
    for (int64_t j = begin; j < pitch; j += lanes<float>) {
      squares += load(v + j) * load(v + j);
    }
    // What is so small that its square has few digits is none: the trace is 1.
    const float square = sum_lanes(squares);
    const float norm = square > 1e-30f ? __builtin_sqrtf(square) : 0;
    const float head = v[k + 1];
    const float reflected = head > 0 ? -norm : norm;
    reduced.off_diagonal[k] = reflected;
    // |v|^2 = 2, so that the reflector needs no factor.
    const float length = norm * (norm + __builtin_fabsf(head));
    const float scale = length > 0 ? 1 / __builtin_sqrtf(length) : 0;
    v[k + 1] -= reflected;
    for (int64_t j = begin; j < pitch; j += lanes<float>) {
      store(v + j, load(v + j) * scale);
    }
    // The last step's update of the matrix and this one's product with it.
    advance({matrix, pitch, last_v, w, v, product, row_sums}, n, k + 1);
    // w = p - (p.v / 2) v; entries at and before k stay zero.
    Vec<float> dots = {};
    for (int64_t j = begin; j < pitch; j += lanes<float>) {
      dots += load(product + j) * load(v + j);
    }
    const float half = sum_lanes(dots) / 2;
    for (int64_t j = begin; j < pitch; j += lanes<float>) {
      store(w + j, load(product + j) - half * load(v + j));
    }
    for (int64_t j = begin; j <= k; ++j) {
      w[j] = 0;
    }
    last_v = v;
  }
}

/// Eigenvalues by bisection, of which value i has ranks[i] (or, if `ranks` is
/// null, i) larger ones; they are off by 2^-25 of the span of all.
void bisect(
    const Tridiagonal& matrix,
    int64_t n,
    const int64_t* ranks,
    int64_t count,
    double* values,
    float* work) { // [2, n]
  float* diagonal = work;
  float* squares = work + n;
  double low = matrix.diagonal[0];
  double high = low;
  double before = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double after = magnitude(matrix.off_diagonal[i]);
    const double radius = before + after;
    low = matrix.diagonal[i] - radius < low ? matrix.diagonal[i] - radius : low;
    high =
        matrix.diagonal[i] + radius > high ? matrix.diagonal[i] + radius : high;
    before = after;
  }
  const double span = high - low > 0 ? high - low : 1;
  for (int64_t i = 0; i < n; ++i) {
    diagonal[i] = static_cast<float>((matrix.diagonal[i] - low) / span);
    const double off = i > 0 ? matrix.off_diagonal[i - 1] / span : 0;
    // Never zero, which divided by a pivot of zero would be no number.
    squares[i] = static_cast<float>(off * off) + 1e-30f;
  }
  constexpr int vectors = 4;
  constexpr int64_t batch = vectors * lanes<float>;
  for (int64_t first = 0; first < count; first += batch) {
    Vec<float> lower[vectors];
    Vec<float> upper[vectors];
    Vec<int32_t> wanted[vectors]; // eigenvalues that are larger, or n
    const int64_t left = count - first < batch ? count - first : batch;
    const int64_t used = (left + lanes<float> - 1) / lanes<float>;
    for (int64_t v = 0; v < vectors; ++v) {
      lower[v] = Vec<float>{};
      upper[v] = broadcast(1.0f);
      for (int64_t j = 0; j < lanes<float>; ++j) {
        const int64_t at = first + v * lanes<float> + j;
        const int64_t rank = at >= count ? 0
            : ranks != nullptr           ? ranks[at]
                                         : at;
        wanted[v][j] = static_cast<int32_t>(rank);
      }
    }
    for (int step = 0; step < 25; ++step) {
      Vec<float> middle[vectors];
      Vec<float> pivot[vectors];
      Vec<int32_t> larger[vectors];
      for (int64_t v = 0; v < vectors; ++v) {
        middle[v] = (lower[v] + upper[v]) * 0.5f;
        pivot[v] = broadcast(1.0f);
        larger[v] = static_cast<int32_t>(n) - Vec<int32_t>{};
      }
      // A pivot of zero counts by its sign, and the infinite one after it has
      // the other sign: the two count as one, as they should.
      const auto count_larger = [&](auto num) {
        constexpr int width = decltype(num)::value;
        for (int64_t i = 0; i < n; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < width; ++v) {
            pivot[v] = diagonal[i] - middle[v] - squares[i] / pivot[v];
            larger[v] += (Vec<int32_t>)pivot[v] >> 31;
          }
        }
      };
      if (used > 2) {
        count_larger(Count<4>());
      } else if (used == 2) {
        count_larger(Count<2>());
      } else {
        count_larger(Count<1>());
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const auto above = larger[v] > wanted[v];
        lower[v] = above ? middle[v] : lower[v];
        upper[v] = above ? upper[v] : middle[v];
      }
    }
    for (int64_t i = 0; i < left; ++i) {
      const int64_t v = i / lanes<float>;
      const int64_t j = i % lanes<float>;
      values[first + i] =
          low + span * (static_cast<double>(lower[v][j]) + upper[v][j]) / 2;
    }
  }
}

/// Eigenvectors z [n, lanes] for as many eigenvalues, which are refined.
void twist(
    const Tridiagonal& matrix,
    int64_t n,
    double norm,
    Vec<double>& values,
    double* forward, // [n, lanes]
    double* backward,
    double* z) {
  constexpr int64_t width = lanes<double>;
  const double tiny = norm * 1e-290 + 1e-300;
  const auto off = [&](int64_t i) {
    return i < 0 ? 0 : matrix.off_diagonal[i];
  };
  const auto safe = [&](Vec<double> pivot) {
    const Vec<double> size = pivot < 0 ? -pivot : pivot;
    return size < tiny ? broadcast(tiny) : pivot;
  };
  for (int round = 0; round < 2; ++round) {
    // Pivots from the top and from the bottom, of which only what divides an
    // entry's next neighbour by them is kept: forward[i] = off[i] / pivot[i]
    // and backward[i] = off[i - 1] / pivot[i].
    Vec<double> upper = {};
    Vec<double> lower = {};
    for (int64_t i = 0; i < n; ++i) {
      const int64_t j = n - 1 - i;
      upper = off(i) / safe(matrix.diagonal[i] - values - off(i - 1) * upper);
      lower = off(j - 1) / safe(matrix.diagonal[j] - values - off(j) * lower);
      store(forward + i * width, upper);
      store(backward + j * width, lower);
    }
    Vec<double> best = broadcast(__builtin_inf());
    Vec<double> residual = {};
    Vec<double> twist_at = {};
    upper = Vec<double>{};
    for (int64_t i = 0; i < n; ++i) {
      const Vec<double> below =
          i + 1 < n ? load(backward + (i + 1) * width) : Vec<double>{};
      const Vec<double> gamma =
          matrix.diagonal[i] - values - off(i - 1) * upper - off(i) * below;
      const Vec<double> size = gamma < 0 ? -gamma : gamma;
      const auto smaller = size < best;
      best = smaller ? size : best;
      residual = smaller ? gamma : residual;
      twist_at = smaller ? broadcast(static_cast<double>(i)) : twist_at;
      upper = load(forward + i * width);
    }
    Vec<double> length = {};
    Vec<double> entry = {};
    for (int64_t i = 0; i < n; ++i) {
      const double at = static_cast<double>(i);
      entry = -entry * load(backward + i * width);
      entry = twist_at < at ? entry : Vec<double>{};
      entry = twist_at == at ? broadcast(1.0) : entry;
      store(z + i * width, entry);
      length += entry * entry;
    }
    entry = Vec<double>{};
    for (int64_t i = n - 1; i >= 0; --i) {
      const double at = static_cast<double>(i);
      const Vec<double> above = -entry * load(forward + i * width);
      const Vec<double> old = load(z + i * width);
      entry = twist_at > at ? above : old;
      length += twist_at > at ? entry * entry : Vec<double>{};
      // Below the twist only the twist's own entry is passed on.
      store(z + i * width, entry);
    }
    values += residual / length;
    for (int64_t j = 0; j < width; ++j) {
      length[j] = 1 / __builtin_sqrt(length[j]);
    }
    for (int64_t i = 0; round == 1 && i < n; ++i) {
      store(z + i * width, load(z + i * width) * length);
    }
  }
}

/// vectors [n, pitch] = the product of all reflectors with them.
void apply_reflectors(
    const float* reflectors,
    int64_t n,
    int64_t num_vectors,
    float* vectors) {
  const int64_t pitch = eigen_pitch(n);
  const auto apply = [&](auto num, int64_t first) {
    constexpr int width = decltype(num)::value;
    for (int64_t k = n - 2; k >= 0; k -= 2) {
      // (I - u u^T) (I - v v^T) x = x - v a - u (u.x - (u.v) a), a = v.x. The
      // last reflector, which has nothing left to reflect, is zero.
      const float* v = reflectors + k * pitch;
      const float* u = reflectors + (k > 0 ? k - 1 : n - 1) * pitch;
      Vec<float> products = {};
      for (int64_t i = k / lanes<float> * lanes<float>; i < pitch;
           i += lanes<float>) {
        products += load(u + i) * load(v + i);
      }
      const Vec<float> between = broadcast(sum_lanes(products));
      Vec<float> v_dots[width] = {};
      Vec<float> u_dots[width] = {};
      for (int64_t i = k; i < n; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < width; ++c) {
          const Vec<float> x =
              load(vectors + i * pitch + first + c * lanes<float>);
          v_dots[c] += v[i] * x;
          u_dots[c] += u[i] * x;
        }
      }
#pragma GCC unroll 4
      for (int c = 0; c < width; ++c) {
        u_dots[c] -= between * v_dots[c];
      }
      for (int64_t i = k; i < n; ++i) {
#pragma GCC unroll 4
        for (int c = 0; c < width; ++c) {
          float* to = vectors + i * pitch + first + c * lanes<float>;
          store(to, load(to) - v[i] * v_dots[c] - u[i] * u_dots[c]);
        }
      }
    }
  };
  int64_t first = 0;
  for (; num_vectors - first > 2 * lanes<float>; first += 4 * lanes<float>) {
    if (first + 4 * lanes<float> > pitch) {
      break;
    }
    apply(Count<4>(), first);
  }
  for (; num_vectors - first > lanes<float>; first += 2 * lanes<float>) {
    apply(Count<2>(), first);
  }
  if (first < num_vectors) {
    apply(Count<1>(), first);
  }
}

/// Carves the parts of `work` that the solvers share.
struct Reduction {
  Reduction(float* matrix, int64_t n, double* work) {
    const int64_t pitch = eigen_pitch(n);
    tridiagonal = {work, work + n};
    rest = work + 2 * n;
    reflectors = reinterpret_cast<float*>(rest);
    rest += (n * pitch + 1) / 2;
    reduce(matrix, n, reflectors, reinterpret_cast<float*>(rest), tridiagonal);
  }

  Tridiagonal tridiagonal;
  float* reflectors; // [n, pitch]
  double* rest;
};

void eigenvalues(
    float* matrix,
    int64_t n,
    const int64_t* ranks,
    int64_t count,
    double* values,
    double* work) {
  const Reduction reduction(matrix, n, work);
  bisect(
      reduction.tridiagonal,
      n,
      ranks,
      count,
      values,
      reinterpret_cast<float*>(reduction.rest));
}

bool leading_eigenvectors(
    float* matrix,
    int64_t n,
    int64_t num_vectors,
    float* vectors,
    double* work) {
  constexpr int64_t width = lanes<double>;
  const int64_t pitch = eigen_pitch(n);
  const Reduction reduction(matrix, n, work);
  double* values = reduction.rest;
  double* scratch = values + n + width;
  bisect(
      reduction.tridiagonal,
      n,
      nullptr,
      num_vectors,
      values,
      reinterpret_cast<float*>(scratch));
  const double norm = magnitude(values[0]);
  const double negligible = 1e-6 * norm;
  while (num_vectors > 1 && !(values[num_vectors - 1] > negligible)) {
    --num_vectors;
  }
  for (int64_t i = 0; i < n * pitch; ++i) {
    vectors[i] = 0;
  }
  for (int64_t first = 0; first < num_vectors; first += width) {
    const int64_t left =
        num_vectors - first < width ? num_vectors - first : width;
    Vec<double> batch;
    for (int64_t j = 0; j < width; ++j) {
      batch[j] = values[first + (j < left ? j : left - 1)];
    }
    double* z = scratch + 2 * n * width;
    twist(
        reduction.tridiagonal, n, norm, batch, scratch, scratch + n * width, z);
    for (int64_t j = 0; j < left; ++j) {
      values[first + j] = batch[j];
      for (int64_t i = 0; i < n; ++i) {
        vectors[i * pitch + first + j] = static_cast<float>(z[i * width + j]);
      }
    }
  }
  for (int64_t i = 1; i < num_vectors; ++i) {
    if (!(values[i - 1] - values[i] > negligible)) {
      return false;
    }
  }
  apply_reflectors(reduction.reflectors, n, num_vectors, vectors);
  return true;
}

void cholesky(double* gram, int64_t n, double tolerance, bool* kept) {
  for (int64_t i = 0; i < n; ++i) {
    double* row = gram + i * n;
    for (int64_t j = 0; j < i; ++j) {
      row[j] =
          kept[j] ? (row[j] - dot(row, gram + j * n, j)) / gram[j * n + j] : 0;
    }
    const double rest = row[i] - dot(row, row, i);
    kept[i] = rest > tolerance;
    if (kept[i]) {
      row[i] = __builtin_sqrt(rest);
    } else {
      for (int64_t j = 0; j < i; ++j) {
        row[j] = 0;
      }
      row[i] = 1;
    }
  }
}

void scale_row(double* row, double factor, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    row[i] *= factor;
  }
}

void solve_lower(const double* lower, int64_t n, double* rows) {
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < i; ++j) {
      add(rows + i * n, -lower[i * n + j], rows + j * n, n);
    }
    scale_row(rows + i * n, 1 / lower[i * n + i], n);
  }
}

void solve_upper(const double* lower, int64_t n, double* rows) {
  for (int64_t i = n - 1; i >= 0; --i) {
    scale_row(rows + i * n, 1 / lower[i * n + i], n);
    for (int64_t j = 0; j < i; ++j) {
      add(rows + j * n, -lower[i * n + j], rows + i * n, n);
    }
  }
}

} // namespace

extern const EigenKernels eigen_kernels = {
    symmetric_eigen,
    leading_eigenvectors,
    eigenvalues,
    cholesky,
    solve_lower,
    solve_upper};

} // namespace kdci::KDCI_SIMD
