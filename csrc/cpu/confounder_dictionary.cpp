// SPDX-License-Identifier: Apache-2.0
//
// The confounder dictionary on the CPU: rows are centred and scaled, projected
// on their leading principal directions straight into the tiles that k-means
// works on, seeded, clustered; the prototypes are means of the original rows.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/stable.h"
#include "arena.h"
#include "kmeans.h"
#include "pca.h"
#include "simd/rows.h"
#include "simd/subspace.h"
#include "tiles.h"

namespace kdci {
namespace {

// Statistics of columns are summed over at most so many slices of rows.
constexpr int64_t max_slices = 16;

// Rows are summed by cluster in blocks of columns, this many at least; where
// there is work for every thread, as many as leave so many sums, which fit in
// the second-level cache: long stretches of rows are read faster.
constexpr int64_t least_columns = 128;
constexpr int64_t cached_sums = 1 << 16;

int64_t num_slices(int64_t n) {
  return std::clamp<int64_t>(n / 1024, 1, max_slices);
}

// Sums of the rows [K, d], in double, take no more memory than 1/32 of the
// projected rows [n, q].
int64_t num_row_slices(
    int64_t n,
    int64_t q,
    int64_t num_prototypes,
    int64_t d) {
  return std::clamp<int64_t>(n * q / (64 * num_prototypes * d), 1, 8);
}

template <typename T>
struct Columns {
  Columns(Arena& arena, int64_t n, int64_t d) {
    const int64_t slices = num_slices(n);
    sum = arena.take<double>(slices * d);
    low = arena.take<T>(slices * d);
    high = arena.take<T>(slices * d);
    mean = arena.take<double>(d);
    shift = arena.take<T>(d + 16);
    extent = arena.take<T>(d);
  }

  double* sum;  // [slices, d]
  T* low;       // [slices, d]
  T* high;      // [slices, d]
  double* mean; // [d]
  T* shift;     // [d], mean * 2^exponent
  T* extent;    // [d], of |rows * 2^exponent - shift| the largest
  int exponent; // rows * 2^exponent - shift lie in (-1, 1)
  T scale;      // 2^exponent
};

/// Finds the columns' means and the scaling; false if a sum is not finite.
template <typename T>
bool measure_columns(const T* rows, int64_t n, int64_t d, Columns<T>& columns) {
  const int64_t slices = num_slices(n);
  std::fill_n(columns.sum, slices * d, 0.0);
  std::fill_n(columns.low, slices * d, std::numeric_limits<T>::infinity());
  std::fill_n(columns.high, slices * d, -std::numeric_limits<T>::infinity());
  torch::stable::parallel_for(0, slices, 1, [&](int64_t begin, int64_t end) {
    for (int64_t slice = begin; slice < end; ++slice) {
      const int64_t first = slice * n / slices;
      rows_kernels<T>().column_stats(
          rows + first * d,
          (slice + 1) * n / slices - first,
          d,
          rows + n * d,
          columns.sum + slice * d,
          columns.low + slice * d,
          columns.high + slice * d);
    }
  });
  double largest = 0;
  double farthest = 0;
  for (int64_t k = 0; k < d; ++k) {
    double sum = 0;
    double low = columns.low[k];
    double high = columns.high[k];
    for (int64_t slice = 0; slice < slices; ++slice) {
      sum += columns.sum[slice * d + k];
      low = std::min<double>(low, columns.low[slice * d + k]);
      high = std::max<double>(high, columns.high[slice * d + k]);
    }
    if (!std::isfinite(sum)) {
      return false;
    }
    columns.mean[k] = sum / n;
    const double extent =
        std::max(columns.mean[k] - low, high - columns.mean[k]);
    columns.extent[k] = static_cast<T>(extent);
    largest = std::max(largest, extent);
    farthest = std::max({farthest, -low, high});
  }
  // A power of two changes no digit; it and what it scales, far from the mean
  // of a column that hardly varies, must be representable.
  columns.exponent = 0;
  if (largest > 0) {
    int distance;
    std::frexp(largest, &columns.exponent);
    std::frexp(farthest, &distance);
    const int most = std::numeric_limits<T>::max_exponent - 1;
    columns.exponent = std::clamp(
        -columns.exponent,
        std::numeric_limits<T>::min_exponent,
        std::min(most, most - distance));
  }
  columns.scale = std::ldexp(T(1), columns.exponent);
  for (int64_t k = 0; k < d; ++k) {
    columns.shift[k] =
        static_cast<T>(std::ldexp(columns.mean[k], columns.exponent));
    // The shift has been rounded.
    columns.extent[k] = std::ldexp(columns.extent[k], columns.exponent) +
        std::abs(columns.shift[k]) * std::numeric_limits<T>::epsilon();
  }
  std::fill_n(columns.shift + d, 16, T(0));
  return true;
}

/// Centres, scales and projects rows number(0 .. count) into tiles; the packed
/// basis [d, q] is null for no projection, and then q = d.
template <typename T, typename Number>
void fill_tiles(
    const CenteredRows<T>& rows,
    int64_t count,
    Number number,
    const T* packed_basis,
    int64_t q,
    T* scratch,
    int64_t scratch_tiles,
    T* tiles) {
  const int64_t d = rows.d;
  const int64_t num_tiles = (count + tile_points - 1) / tile_points;
  const auto fill = [&](int64_t tile, T* to) {
    const int64_t first = tile * tile_points;
    const int64_t used = std::min(tile_points, count - first);
    int64_t index[tile_points];
    for (int64_t i = 0; i < used; ++i) {
      index[i] = number(first + i);
    }
    rows_kernels<T>().center_tile(
        rows.data,
        index,
        used,
        d,
        rows.data + rows.n * d,
        rows.shift,
        rows.scale,
        to);
  };
  if (packed_basis == nullptr) {
    torch::stable::parallel_for(
        0, num_tiles, 8, [&](int64_t begin, int64_t end) {
          for (int64_t tile = begin; tile < end; ++tile) {
            fill(tile, tiles + tile * d * tile_points);
          }
        });
    return;
  }
  // Each part of the tiles has one scratch tile of its own.
  const int64_t parts = std::min(scratch_tiles, num_tiles);
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    T* centered = scratch + begin * d * tile_points;
    const int64_t last = end * num_tiles / parts;
    for (int64_t tile = begin * num_tiles / parts; tile < last; ++tile) {
      fill(tile, centered);
      subspace_kernels<T>().project_tile(
          centered,
          tile_points,
          d,
          packed_basis,
          q,
          tiles + tile * q * tile_points);
    }
  });
}

/// Centres, scales and projects the initial prototypes [K, d] into centers
/// [q, K]; false if one is not finite.
template <typename T>
bool project_prototypes(
    const double* prototypes,
    int64_t num_prototypes,
    int64_t d,
    const Columns<T>& columns,
    const T* basis,
    int64_t q,
    T* centers) {
  // Far outside the data a centre attracts nothing, but must not overflow.
  const double limit =
      std::ldexp(1.0, std::numeric_limits<T>::max_exponent / 4);
  std::vector<double> projected(q);
  for (int64_t c = 0; c < num_prototypes; ++c) {
    std::fill(projected.begin(), projected.end(), 0.0);
    for (int64_t k = 0; k < d; ++k) {
      const double offset =
          std::ldexp(prototypes[c * d + k] - columns.mean[k], columns.exponent);
      if (!std::isfinite(prototypes[c * d + k])) {
        return false;
      }
      if (basis == nullptr) {
        projected[k] = offset;
        continue;
      }
      for (int64_t j = 0; j < q; ++j) {
        projected[j] += std::clamp(offset, -limit, limit) * basis[k * q + j];
      }
    }
    for (int64_t j = 0; j < q; ++j) {
      centers[j * num_prototypes + c] =
          static_cast<T>(std::clamp(projected[j], -limit, limit));
    }
  }
  return true;
}

/// prototypes [K, d]: means of the rows with each label.
template <typename T>
void average_rows(
    const T* rows,
    int64_t n,
    int64_t d,
    const int64_t* labels,
    const int64_t* counts,
    int64_t num_prototypes,
    const double* mean,
    int64_t slices,
    double* sums,
    T* prototypes) {
  const int64_t shared = slices * d / torch::stable::get_num_threads();
  const int64_t columns =
      std::max(least_columns, std::min(cached_sums / num_prototypes, shared));
  const int64_t blocks = (d + columns - 1) / columns;
  const int64_t size = num_prototypes * d;
  std::fill_n(sums, slices * size, 0.0);
  torch::stable::parallel_for(
      0, slices * blocks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
          const int64_t slice = part / blocks;
          const int64_t first = slice * n / slices;
          const int64_t column = part % blocks * columns;
          rows_kernels<T>().add_rows(
              rows + first * d,
              (slice + 1) * n / slices - first,
              d,
              column,
              std::min(column + columns, d),
              labels + first,
              sums + slice * size);
        }
      });
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (int64_t slice = 0; slice < slices; ++slice) {
      sum += sums[slice * size + i];
    }
    const int64_t count = counts[i / d];
    prototypes[i] = static_cast<T>(count > 0 ? sum / count : mean[i % d]);
  }
}

/// The arguments and results of the operator, contiguous.
template <typename T>
struct Problem {
  const T* features;      // [n, d]
  const double* uniforms; // [K, candidates]
  const double* initial;  // [K, d] or null
  int64_t n;
  int64_t d;
  int64_t num_prototypes;
  int64_t candidates;
  int64_t num_components;
  int64_t max_iter;
  double tol;
  double momentum;
  T* prototypes;   // [K, d]
  T* proportions;  // [K]
  int64_t* labels; // [n]
  double* inertia;
  int64_t* num_iter;
};

/// Everything that k-means needs lies where the subspace's workspace was: of
/// that only the basis is needed later.
template <typename T>
struct Buffers {
  Buffers(Arena& arena, const Problem<T>& problem, int64_t q, bool project)
      : columns(arena, problem.n, problem.d) {
    if (project) {
      basis = arena.take<T>(problem.d * q);
      packed_basis = arena.take<T>(problem.d * q);
      scratch_tiles = torch::stable::get_num_threads();
      scratch = arena.take<T>(scratch_tiles * problem.d * tile_points);
      Arena shared = arena;
      subspace.emplace(shared, problem.n, problem.d, q, basis);
      arena.include(shared);
    }
    Arena shared = arena;
    kmeans.emplace(
        shared, problem.n, q, problem.num_prototypes, problem.candidates);
    sums = shared.take<double>(
        num_row_slices(problem.n, q, problem.num_prototypes, problem.d) *
        problem.num_prototypes * problem.d);
    arena.include(shared);
  }

  Columns<T> columns;
  std::optional<PrincipalSubspace<T>> subspace;
  T* basis = nullptr;        // [d, q]
  T* packed_basis = nullptr; // [d, q]
  T* scratch = nullptr;      // [scratch_tiles, d, 64]
  int64_t scratch_tiles = 0;
  std::optional<Kmeans<T>> kmeans;
  double* sums; // [slices, K, d]
};

template <typename T>
void fill_with_nan(const Problem<T>& problem) {
  const T nan = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(problem.prototypes, problem.num_prototypes * problem.d, nan);
  std::fill_n(problem.proportions, problem.num_prototypes, nan);
  std::fill_n(problem.labels, problem.n, 0);
  *problem.inertia = nan;
  *problem.num_iter = 0;
}

template <typename T>
void build_dictionary(const Problem<T>& problem) {
  const int64_t n = problem.n;
  const int64_t d = problem.d;
  const int64_t num_prototypes = problem.num_prototypes;
  // With all components the projection would be a rotation; n rows span no
  // more than n dimensions.
  const bool project = problem.num_components < d;
  const int64_t q = project ? std::min(problem.num_components, n) : d;

  Arena count;
  Buffers<T>(count, problem, q, project);
  // Through the dispatcher, so that PyTorch's profiler shows it.
  const Tensor memory = torch::stable::empty({count.bytes()}, ScalarType::Byte);
  Arena arena(memory.mutable_data_ptr());
  Buffers<T> buffers(arena, problem, q, project);

  if (!measure_columns(problem.features, n, d, buffers.columns)) {
    fill_with_nan(problem);
    return;
  }
  const CenteredRows<T> rows{
      problem.features,
      n,
      d,
      buffers.columns.shift,
      buffers.columns.scale,
      buffers.columns.extent};
  if (project) {
    buffers.subspace->compute(rows);
    pack_columns(buffers.basis, d, q, buffers.packed_basis);
  }
  Kmeans<T>& kmeans = *buffers.kmeans;
  const auto fill = [&](int64_t count, auto number) {
    fill_tiles(
        rows,
        count,
        number,
        buffers.packed_basis,
        q,
        buffers.scratch,
        buffers.scratch_tiles,
        kmeans.tiles());
  };
  const bool is_seeded = problem.initial == nullptr;
  if (is_seeded) {
    // Where all points will be: a place of its own would cost memory.
    const auto number = [&](int64_t i) {
      return kmeans.seeding().sampled_point(i);
    };
    fill(kmeans.seeding().sample_size(), number);
    kmeans.seeding().choose_centers(problem.uniforms);
  }
  if (!is_seeded || kmeans.seeding().sample_size() < n) {
    fill(n, [](int64_t i) { return i; });
  }
  if (!is_seeded &&
      !project_prototypes(
          problem.initial,
          num_prototypes,
          d,
          buffers.columns,
          buffers.basis,
          q,
          kmeans.centers())) {
    fill_with_nan(problem);
    return;
  }
  *problem.num_iter = kmeans.iterate(
      problem.max_iter, problem.tol, problem.momentum, problem.labels);
  *problem.inertia =
      std::ldexp(kmeans.inertia(problem.labels), -2 * buffers.columns.exponent);
  for (int64_t c = 0; c < num_prototypes; ++c) {
    problem.proportions[c] =
        static_cast<T>(static_cast<double>(kmeans.counts()[c]) / n);
  }
  average_rows(
      problem.features,
      n,
      d,
      problem.labels,
      kmeans.counts(),
      num_prototypes,
      buffers.columns.mean,
      num_row_slices(n, q, num_prototypes, d),
      buffers.sums,
      problem.prototypes);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> confounder_dictionary(
    const Tensor& features,                          // [n, d]
    const Tensor& uniforms,                          // [K, candidates]
    const std::optional<Tensor>& initial_prototypes, // [K, d]
    int64_t num_components,
    int64_t max_iter,
    double tol,
    double momentum) {
  STD_TORCH_CHECK(features.dim() == 2, "features must be of shape [n, d]");
  STD_TORCH_CHECK(
      uniforms.dim() == 2 && uniforms.scalar_type() == ScalarType::Double,
      "uniforms must be float64 of shape [K, candidates]");
  const int64_t n = features.size(0);
  const int64_t d = features.size(1);
  const int64_t num_prototypes = uniforms.size(0);
  const int64_t candidates = uniforms.size(1);
  STD_TORCH_CHECK(
      1 <= num_prototypes && num_prototypes <= n && candidates >= 1,
      "uniforms must have between 1 and n rows");
  STD_TORCH_CHECK(
      n <= std::numeric_limits<int32_t>::max() * tile_points,
      "features has too many rows");
  STD_TORCH_CHECK(
      1 <= num_components && num_components <= d,
      "num_components must be in [1, d]");
  STD_TORCH_CHECK(max_iter >= 1, "max_iter must be >= 1");

  const ScalarType dtype = accumulate_type(features.scalar_type());
  const Tensor rows = as_contiguous(features, dtype);
  const Tensor draws = as_contiguous(uniforms, ScalarType::Double);
  std::optional<Tensor> initial;
  if (initial_prototypes.has_value()) {
    STD_TORCH_CHECK(
        initial_prototypes->dim() == 2 &&
            initial_prototypes->size(0) == num_prototypes &&
            initial_prototypes->size(1) == d,
        "initial_prototypes must be of shape [K, d]");
    initial = as_contiguous(*initial_prototypes, ScalarType::Double);
  }
  Tensor prototypes = empty_cpu({num_prototypes, d}, dtype);
  Tensor proportions = empty_cpu({num_prototypes}, dtype);
  Tensor labels = empty_cpu({n}, ScalarType::Long);
  Tensor inertia = empty_cpu({}, ScalarType::Double);
  Tensor num_iter = empty_cpu({}, ScalarType::Long);

  const auto run = [&](auto zero) {
    using T = decltype(zero);
    build_dictionary<T>({
        static_cast<const T*>(rows.const_data_ptr()),
        static_cast<const double*>(draws.const_data_ptr()),
        initial ? static_cast<const double*>(initial->const_data_ptr())
                : nullptr,
        n,
        d,
        num_prototypes,
        candidates,
        num_components,
        max_iter,
        tol,
        momentum,
        static_cast<T*>(prototypes.mutable_data_ptr()),
        static_cast<T*>(proportions.mutable_data_ptr()),
        static_cast<int64_t*>(labels.mutable_data_ptr()),
        static_cast<double*>(inertia.mutable_data_ptr()),
        static_cast<int64_t*>(num_iter.mutable_data_ptr()),
    });
  };
  if (dtype == ScalarType::Double) {
    run(double());
  } else {
    run(float());
  }
  return {prototypes, proportions, labels, inertia, num_iter};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CPU, m) {
  m.impl("confounder_dictionary", TORCH_BOX(&confounder_dictionary));
}

} // namespace kdci
