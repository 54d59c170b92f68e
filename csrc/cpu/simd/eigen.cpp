// SPDX-License-Identifier: Apache-2.0
#include "eigen.h"

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
    cholesky,
    solve_lower,
    solve_upper};

} // namespace kdci::KDCI_SIMD
