// SPDX-License-Identifier: Apache-2.0
//
// The confounder dictionary on CUDA: plans that say where everything lies. They
// know nothing of torch: the caller gives device pointers and a workspace,
// sized by building the plans on an empty Arena.
//
// The stages are prepare (mean, scale, directions, points), seed (k-means++)
// and lloyd (all iterations, then the dictionary itself). A launch runs some of
// them with a team of blocks:
//   small problems  one launch of one cluster, with rows, centres and sums in
//                   shared memory
//   large problems  prepare by the whole grid; seed by a cluster, on a sample
//   of
//                   the rows; lloyd by the whole grid
// A small clustering after a large projection goes with the seeding. The device
// decides when to stop, so that the host never waits.
#pragma once

#include <cstdint>

#include "fixed.cuh"
#include "launch.cuh"

namespace kdci::cuda {

/// Blocks of the largest team, and of the largest that seeds.
constexpr int64_t kMaxTeam = 4096;
constexpr int64_t kMaxSeedTeam = 8;

/// What the device finds out and later stages obey.
struct DictionaryState {
  double scale; // power of two that brings the features into (-1, 1)
  int finite;   // all inputs are finite: otherwise nothing is computed
  // Subspace solver
  int converged;
  int degree;    // of the Chebyshev filter
  double center; // of the interval that the filter damps
  double radius;
  double captured; // variance in the subspace, last cycle
};

/// Leading eigenvectors of a symmetric positive semi-definite matrix.
struct Subspace {
  int64_t m; // order of the matrix
  int64_t q; // eigenvectors wanted
  DictionaryState* state;
  double precision; // of eigenvectors of small matrices
  double* scatter;  // [m, m] the matrix
  // Results
  double* leading; // [m, q]
  double* values;  // [width] falling
  // Scratch
  int64_t shared_bytes; // of dynamic shared memory, for the small matrices
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
  Subspace(
      int64_t m,
      int64_t q,
      double precision,
      DictionaryState* state,
      Arena& arena);
};

/// Rows of points and of centres are filled up with zeros to whole vectors of
/// 16 bytes.
template <typename A>
constexpr int64_t kVector = 16 / sizeof(A);

/// Stage 1: rows to be clustered, points = scale (features - mean) V.
template <typename A>
struct Projection {
  int64_t n;            // rows
  int64_t d;            // columns
  int64_t q;            // components kept; q == d keeps the columns themselves
  int64_t stride;       // q in whole vectors
  const A* features;    // [n, d]
  int64_t initial_rows; // 0 without initial prototypes
  const A* initial;     // [initial_rows, d]
  A* initial_points;    // [initial_rows, stride] the same, projected
  // Results
  DictionaryState* state;
  double* mean; // [d]
  A* points;    // [n, stride]
  // Scratch
  bool small;     // for a cluster of blocks, not for the grid
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
      int64_t clusters,
      bool has_initial,
      Arena& arena);
};

/// Offsets into dynamic shared memory, in bytes; -1: not there.
struct SharedLayout {
  int points = -1;        // [own rows, in whole tiles; shared stride]
  int stage_points = -1;  // [2, tile rows, stage stride]
  int centers = -1;       // [clusters, shared stride]
  int stage_centers = -1; // [2, tile columns, stage stride]
  int sums = -1;          // [words, clusters * q], then counts [clusters]
  int seed_points = -1;   // [own rows of the seeding sample; shared stride]
  int distances = -1;     // [own rows of the seeding sample]
  int trial = -1;         // [candidates, own rows of the seeding sample]
  int potential = -1;     // [blocks + 1, candidates]
  int drawn = -1;         // [2, candidates]
  int64_t bytes = 0;
};

/// Stage 2: k-means++, Lloyd's iterations and the dictionary itself.
template <typename A>
struct Clustering {
  int64_t n;
  int64_t d;
  int64_t q;
  int64_t stride;
  int64_t clusters;
  int64_t candidates; // tried in each round of k-means++
  int64_t max_iter;
  double tol;
  double momentum;
  const A* features;      // [n, d]
  const double* uniforms; // [clusters, candidates]
  bool has_initial;
  // Of stage 1
  DictionaryState* state;
  const double* mean; // [d]
  const A* points;    // [n, stride]
  // Results
  A* prototypes;     // [clusters, d]
  A* proportions;    // [clusters]
  int64_t* labels;   // [n]
  double* inertia;   // []
  int64_t* num_iter; // []
  // Scratch
  bool small;             // for a cluster of blocks, not for the grid
  int64_t seed_rows;      // rows that k-means++ sees
  FixedPoint of_points;   // sums of points
  FixedPoint of_features; // sums of centred and scaled features
  A* distances;           // [n] squared, to the nearest or the own centre
  A* trial;               // [candidates, seed_rows]
  int64_t* sample;        // [seed_rows] the rows that k-means++ sees
  A* norms;               // [n] of the points
  int64_t slices;         // of the rows
  double* slice_sum;      // [slices]
  A* centers;             // [clusters, stride]
  A* half_squares;        // [clusters] half the squared norms of the centres
  A* means;               // [2, clusters, stride]
  double* between;        // [clusters] parts of a sum of squares
  Word* sums;             // [words, clusters * max(q, d)]
  Word* counts;           // [clusters]
  Word* changed;          // [2] labels, by the parity of the iteration
  int64_t* moved;         // [clusters, 3] row, empty cluster, old label
  A* far_value;           // [2, kMaxTeam] farthest row of each block
  int64_t* far_index;     // [2, kMaxTeam]
  double* potentials;     // [kMaxSeedTeam, candidates]
  int64_t* draws;         // [kMaxSeedTeam, candidates]

  Clustering(
      int64_t n,
      int64_t d,
      int64_t q,
      int64_t clusters,
      int64_t candidates,
      Arena& arena);
};

/// Queues the whole dictionary.
template <typename A>
void run_dictionary(
    const Projection<A>& projection,
    const Clustering<A>& clustering,
    cudaStream_t stream);

} // namespace kdci::cuda
