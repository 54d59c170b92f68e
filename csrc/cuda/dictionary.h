// SPDX-License-Identifier: Apache-2.0
//
// The stages of the confounder dictionary on CUDA. They know nothing of
// torch: the caller gives device pointers and a workspace, sized by building
// the plan on an empty Arena.
#pragma once

#include <cstdint>

#include "launch.cuh"

namespace kdci::cuda {

/// What the device decides and later launches obey, so that the host never
/// waits for it.
struct DictionaryState {
  double scale; // power of two that brings the features into (-1, 1)
  int finite;   // all inputs are finite: otherwise nothing is computed
  // Subspace solver
  int converged; // 1 + the cycle that found the subspace, or 0
  int degree;    // of the Chebyshev filter
  double center; // of the interval that the filter damps
  double radius;
  double captured; // variance in the subspace, last cycle
  // Lloyd iterations
  int done;
  int strict; // stopped because no label changed
  int64_t iterations;
  double shift_limit; // stop at this sum of squared centre shifts
};

/// Leading eigenvectors of a symmetric positive semi-definite matrix.
struct Subspace {
  int64_t m; // order of the matrix
  int64_t q; // eigenvectors wanted
  DictionaryState* state;
  double* scatter; // [m, m] the matrix; overwritten
  // Results
  double* leading; // [m, q]
  double* values;  // [width] falling
  // Scratch
  bool one_block;       // small enough to run in one launch of one block
  bool direct;          // solve it whole, not by subspace iteration
  int64_t width;        // columns of the iterated subspace
  double* even;         // [m, width] filtered subspace, even degrees
  double* odd;          // [m, width] the same, odd degrees
  double* basis;        // [m, width] orthonormalised
  double* image;        // [m, width] scatter * basis
  int64_t gram_slices;  // of the m rows
  double* gram_partial; // [gram_slices, width, width]
  double* small;        // [width, width]
  double* vectors;      // [width, width]
  double* transform;    // [width, width]
  double* rotations;    // [2 * width + 2]
  int64_t* order;       // [width]

  Subspace() = default;
  Subspace(int64_t m, int64_t q, DictionaryState* state, Arena& arena);
  void run(cudaStream_t stream) const;
};

/// Stage 1: rows to be clustered, points = scale (features - mean) V.
template <typename A>
struct Projection {
  int64_t n;            // rows
  int64_t d;            // columns
  int64_t q;            // components kept; q == d keeps the columns themselves
  const A* features;    // [n, d]
  int64_t initial_rows; // 0 without initial prototypes
  const A* initial;     // [initial_rows, d]
  // Results
  DictionaryState* state;
  double* mean;      // [d]
  A* points;         // [n, q]
  A* initial_points; // [initial_rows, q]
  // Scratch
  bool one_block; // small enough to run in one launch of one block
  int64_t slices; // of the rows
  int64_t slice_rows;
  double* column_partial; // [slices, d]
  double* spread_partial; // [slices]
  bool gram; // the scatter matrix is Y Y^T [n, n] (d > n), not Y^T Y [d, d]
  int64_t scatter_slices;  // of the depth of that product
  double* scatter_partial; // [scatter_slices, m, m]
  double* directions;      // [d, q]
  Subspace subspace;

  Projection(
      int64_t n,
      int64_t d,
      int64_t q,
      int64_t initial_rows,
      Arena& arena);
  void run(cudaStream_t stream) const;
};

/// Stage 2: k-means++, Lloyd's iterations and the dictionary itself.
template <typename A>
struct Clustering {
  int64_t n;
  int64_t d;
  int64_t q;
  int64_t clusters;
  int64_t candidates; // tried in each round of k-means++
  int64_t max_iter;
  double tol;
  const A* features;      // [n, d]
  const double* uniforms; // [clusters, candidates]
  bool has_initial;
  // Of stage 1
  DictionaryState* state;
  const double* mean;      // [d]
  const A* points;         // [n, q]
  const A* initial_points; // [clusters, q]
  // Results
  A* prototypes;     // [clusters, d]
  A* proportions;    // [clusters]
  int64_t* labels;   // [n]
  double* inertia;   // []
  int64_t* num_iter; // []
  // Scratch
  bool one_block; // small enough to run in one launch of one block
  int64_t slices; // of the rows, for seeding and inertia
  int64_t slice_rows;
  A* distances;       // [n] squared, to the nearest centre
  double* slice_sum;  // [slices]
  int64_t* candidate; // [candidates]
  double* potential;  // [slices, candidates]
  int64_t* chosen;    // [clusters]
  A* centers;         // [clusters, q]
  int64_t row_tiles;
  int32_t* changed;   // [row_tiles] labels that changed
  int64_t sum_slices; // of the rows, for the sums of clusters
  int64_t sum_rows;
  double* sum_partial;    // [sum_slices, clusters, max(q, d)]
  int32_t* count_partial; // [sum_slices, clusters]
  double* sums;           // [clusters, max(q, d)]
  int64_t* counts;        // [clusters]

  Clustering(
      int64_t n,
      int64_t d,
      int64_t q,
      int64_t clusters,
      int64_t candidates,
      Arena& arena);
  void run(cudaStream_t stream) const;
};

} // namespace kdci::cuda
