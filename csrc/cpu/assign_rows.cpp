// SPDX-License-Identifier: Apache-2.0
//
// One block of rows of a streamed dictionary on the CPU: rows are centred,
// scaled and projected a tile at a time, assigned to the nearest centre, and
// summed by label. The results do not depend on the number of threads.
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/stable.h"
#include "arena.h"
#include "simd/kmeans.h"
#include "simd/rows.h"
#include "simd/subspace.h"
#include "tiles.h"

namespace kdci {
namespace {

// So many tiles at most are in work at once.
constexpr int64_t max_parts = 32;
constexpr int64_t column_block = 128;

/// The arguments and results of the operator, contiguous.
template <typename T>
struct Problem {
  const T* rows;         // [m, d]
  const double* mean;    // [d]
  const double* basis;   // [d, q], or null and then q = d
  const double* centers; // [K, q]
  int64_t m;
  int64_t d;
  int64_t q;
  int64_t num_centers;
  int64_t* labels;   // [m]
  double* distances; // [m]
  double* sums;      // [K, d]

  int64_t num_tiles() const {
    return (m + tile_points - 1) / tile_points;
  }
};

template <typename T>
struct Buffers {
  Buffers(Arena& arena, const Problem<T>& problem) {
    const int64_t d = problem.d;
    const int64_t q = problem.q;
    parts = std::min(problem.num_tiles(), max_parts);
    column_sums = arena.take<double>(parts * d);
    low = arena.take<T>(parts * d);
    high = arena.take<T>(parts * d);
    shift = arena.take<T>(d + 16);
    centers = arena.take<T>(q * problem.num_centers);
    packed_centers = arena.take<T>(q * problem.num_centers);
    centered = arena.take<T>(parts * d * tile_points);
    if (problem.basis != nullptr) {
      basis = arena.take<T>(d * q);
      packed_basis = arena.take<T>(d * q);
      projected = arena.take<T>(parts * q * tile_points);
    }
  }

  int64_t parts;
  double* column_sums;       // [parts, d]
  T* low;                    // [parts, d]
  T* high;                   // [parts, d]
  T* shift;                  // [d], mean * scale
  T* centers;                // [q, K]
  T* packed_centers;         // [q, K]
  T* centered;               // [parts, d, 64]
  T* basis = nullptr;        // [d, q]
  T* packed_basis = nullptr; // [d, q]
  T* projected = nullptr;    // [parts, q, 64]
};

/// Calls body(part, first, last) for equal parts of `count` items.
template <typename Body>
void for_parts(int64_t count, int64_t parts, const Body& body) {
  torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      body(part, part * count / parts, (part + 1) * count / parts);
    }
  });
}

/// The largest coordinate of the centre that is nearest to the mean; of those
/// that are not the mean, if `elsewhere`.
template <typename T>
double nearest_center(const Problem<T>& problem, bool elsewhere) {
  double nearest = std::numeric_limits<double>::infinity();
  for (int64_t c = 0; c < problem.num_centers; ++c) {
    double largest = 0;
    for (int64_t j = 0; j < problem.q; ++j) {
      largest = std::max(largest, std::abs(problem.centers[c * problem.q + j]));
    }
    if (largest > 0 || !elsewhere) {
      nearest = std::min(nearest, largest);
    }
  }
  return nearest;
}

/// The power of two that brings the centred rows, and the centres that can be
/// near to one, to a size of about 1.
template <typename T>
double find_scale(const Problem<T>& problem, const Buffers<T>& buffers) {
  const int64_t d = problem.d;
  const int64_t size = buffers.parts * d;
  std::fill_n(buffers.column_sums, size, 0.0);
  std::fill_n(buffers.low, size, std::numeric_limits<T>::infinity());
  std::fill_n(buffers.high, size, -std::numeric_limits<T>::infinity());
  for_parts(
      problem.m, buffers.parts, [&](int64_t part, int64_t first, int64_t last) {
        rows_kernels<T>().column_stats(
            problem.rows + first * d,
            last - first,
            d,
            problem.rows + problem.m * d,
            buffers.column_sums + part * d,
            buffers.low + part * d,
            buffers.high + part * d);
      });
  double largest = 0;
  double largest_mean = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double mean = problem.mean[i % d];
    largest =
        std::max({largest, mean - buffers.low[i], buffers.high[i] - mean});
    largest_mean = std::max(largest_mean, std::abs(mean));
  }
  largest = std::max(largest, nearest_center(problem, false));
  if (largest == 0) {
    largest = nearest_center(problem, true);
  }
  // What is constant may be much larger, and must not overflow.
  constexpr int range = std::numeric_limits<T>::max_exponent / 2;
  int exponent = 0;
  if (std::isfinite(largest)) {
    std::frexp(std::max(largest, std::ldexp(largest_mean, -range)), &exponent);
  }
  return std::ldexp(
      1.0,
      std::clamp(
          -exponent,
          std::numeric_limits<T>::min_exponent,
          std::numeric_limits<T>::max_exponent - 1));
}

/// Brings mean, basis and centres to the type and scale of the tiles.
template <typename T>
void prepare(
    const Problem<T>& problem,
    double scale,
    const Buffers<T>& buffers) {
  const int64_t d = problem.d;
  const int64_t q = problem.q;
  // The rows are shifted by the rounded mean: so must the centres be.
  std::vector<double> offset(q, 0.0);
  for (int64_t k = 0; k < d; ++k) {
    const double exact = problem.mean[k] * scale;
    buffers.shift[k] = static_cast<T>(exact);
    const double rounding = exact - static_cast<double>(buffers.shift[k]);
    if (problem.basis == nullptr) {
      offset[k] = rounding;
      continue;
    }
    for (int64_t j = 0; j < q; ++j) {
      offset[j] += rounding * problem.basis[k * q + j];
    }
  }
  std::fill_n(buffers.shift + d, 16, T(0));
  if (problem.basis != nullptr) {
    std::copy_n(problem.basis, d * q, buffers.basis);
    pack_columns(buffers.basis, d, q, buffers.packed_basis);
  }
  // Far outside the rows a centre attracts nothing, but must not overflow.
  const double limit =
      std::ldexp(1.0, std::numeric_limits<T>::max_exponent / 4);
  for (int64_t c = 0; c < problem.num_centers; ++c) {
    for (int64_t j = 0; j < q; ++j) {
      const double center = problem.centers[c * q + j] * scale + offset[j];
      buffers.centers[j * problem.num_centers + c] =
          static_cast<T>(std::clamp(center, -limit, limit));
    }
  }
  pack_columns(buffers.centers, q, problem.num_centers, buffers.packed_centers);
}

template <typename T>
void assign_tile(
    const Problem<T>& problem,
    double scale,
    double mean_square,
    const Buffers<T>& buffers,
    int64_t part,
    int64_t tile) {
  const int64_t d = problem.d;
  const int64_t q = problem.q;
  const int64_t first = tile * tile_points;
  const int64_t count = std::min(tile_points, problem.m - first);
  T* points = buffers.centered + part * d * tile_points;
  rows_kernels<T>().center_tile(
      problem.rows + first * d,
      nullptr,
      count,
      d,
      problem.rows + problem.m * d,
      buffers.shift,
      static_cast<T>(scale),
      points);
  if (problem.basis != nullptr) {
    T* projected = buffers.projected + part * q * tile_points;
    subspace_kernels<T>().project_tile(
        points, tile_points, d, buffers.packed_basis, q, projected);
    points = projected;
  }
  int64_t* labels = problem.labels + first;
  std::fill_n(labels, count, 0);
  // By differences: the products' rounding would confuse close centres.
  Assignment<T> task{};
  task.tiles = points;
  task.n = count;
  task.depth = q;
  task.num_centers = problem.num_centers;
  task.columns = buffers.packed_centers;
  task.labels = labels;
  kmeans_kernels<T>().assign_tiles(task, 0, 1, nullptr);
  double squares[tile_points] = {};
  double distances[tile_points] = {};
  for (int64_t j = 0; j < q; ++j) {
    const T* center = buffers.centers + j * problem.num_centers;
    for (int64_t i = 0; i < count; ++i) {
      const double value = points[j * tile_points + i];
      const double difference = value - static_cast<double>(center[labels[i]]);
      squares[i] += value * value;
      distances[i] += difference * difference;
    }
  }
  // A row that is its own centre is at distance 0, which rounding hides.
  constexpr double rounding = 64.0 * std::numeric_limits<T>::epsilon();
  for (int64_t i = 0; i < count; ++i) {
    const double hidden = rounding * rounding * (squares[i] + mean_square);
    problem.distances[first + i] =
        distances[i] > hidden ? distances[i] / scale / scale : 0.0;
  }
}

template <typename T>
void assign_block(const Problem<T>& problem) {
  const int64_t d = problem.d;
  const int64_t size = problem.num_centers * d;
  std::fill_n(problem.sums, size, 0.0);
  if (problem.m == 0) {
    return;
  }
  Arena count;
  Buffers<T>(count, problem);
  const Tensor memory = empty_cpu({count.bytes()}, ScalarType::Byte);
  Arena arena(memory.mutable_data_ptr());
  const Buffers<T> buffers(arena, problem);

  const double scale = find_scale(problem, buffers);
  prepare(problem, scale, buffers);
  double mean_square = 0;
  for (int64_t k = 0; k < d; ++k) {
    mean_square += std::pow(problem.mean[k] * scale, 2);
  }
  for_parts(
      problem.num_tiles(),
      buffers.parts,
      [&](int64_t part, int64_t first, int64_t last) {
        for (int64_t tile = first; tile < last; ++tile) {
          assign_tile(problem, scale, mean_square, buffers, part, tile);
        }
      });
  // Threads share the columns out, so that rows are added in their order.
  for_parts(
      d,
      (d + column_block - 1) / column_block,
      [&](int64_t, int64_t first, int64_t last) {
        rows_kernels<T>().add_rows(
            problem.rows,
            problem.m,
            d,
            first,
            last,
            problem.labels,
            problem.sums);
      });
}

std::tuple<Tensor, Tensor, Tensor> assign_rows(
    const Tensor& features,             // [m, d]
    const Tensor& mean,                 // [d]
    const std::optional<Tensor>& basis, // [d, q]
    const Tensor& centers) {            // [K, q]
  STD_TORCH_CHECK(
      features.dim() == 2 && mean.dim() == 1 && centers.dim() == 2,
      "features, mean and centers must be of shapes [m, d], [d] and [K, q]");
  const int64_t m = features.size(0);
  const int64_t d = features.size(1);
  const int64_t num_centers = centers.size(0);
  const int64_t q = centers.size(1);
  STD_TORCH_CHECK(d >= 1 && q >= 1, "features and centers must have columns");
  STD_TORCH_CHECK(
      1 <= num_centers && num_centers <= std::numeric_limits<int32_t>::max(),
      "centers must have between 1 and 2^31 - 1 rows");
  STD_TORCH_CHECK(mean.size(0) == d, "mean must be of shape [d]");

  const ScalarType dtype = accumulate_type(features.scalar_type());
  const Tensor rows = as_contiguous(features, dtype);
  const Tensor means = as_contiguous(mean, ScalarType::Double);
  const Tensor points = as_contiguous(centers, ScalarType::Double);
  std::optional<Tensor> directions;
  if (basis.has_value()) {
    STD_TORCH_CHECK(
        basis->dim() == 2 && basis->size(0) == d && basis->size(1) == q,
        "basis must be of shape [d, q]");
    directions = as_contiguous(*basis, ScalarType::Double);
  } else {
    STD_TORCH_CHECK(q == d, "centers must be of shape [K, d]");
  }
  Tensor labels = empty_cpu({m}, ScalarType::Long);
  Tensor distances = empty_cpu({m}, ScalarType::Double);
  Tensor sums = empty_cpu({num_centers, d}, ScalarType::Double);

  const auto run = [&](auto zero) {
    using T = decltype(zero);
    assign_block<T>({
        static_cast<const T*>(rows.const_data_ptr()),
        static_cast<const double*>(means.const_data_ptr()),
        directions ? static_cast<const double*>(directions->const_data_ptr())
                   : nullptr,
        static_cast<const double*>(points.const_data_ptr()),
        m,
        d,
        q,
        num_centers,
        static_cast<int64_t*>(labels.mutable_data_ptr()),
        static_cast<double*>(distances.mutable_data_ptr()),
        static_cast<double*>(sums.mutable_data_ptr()),
    });
  };
  if (dtype == ScalarType::Double) {
    run(double());
  } else {
    run(float());
  }
  return {labels, distances, sums};
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(kdci_ext, CPU, m) {
  m.impl("assign_rows", TORCH_BOX(&assign_rows));
}

} // namespace kdci
