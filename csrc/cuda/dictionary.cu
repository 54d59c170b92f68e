// SPDX-License-Identifier: Apache-2.0
//
// The one kernel of the dictionary, and the choice of its launches.
#include "dictionary.h"

#include <math.h>

#include <type_traits>

#include "lloyd.cuh"
#include "projection.cuh"
#include "rows.cuh"
#include "seeding.cuh"
#include "subspace.cuh"
#include "team.cuh"

namespace kdci::cuda {
namespace {

/// Which stages a launch runs.
struct Stages {
  bool prepare;
  bool seed;
  bool lloyd;
};

// float64 takes registers for one block to a multiprocessor.
template <typename A>
constexpr int kBlocksPerProcessor = sizeof(A) == 4 ? 2 : 1;

template <typename A, typename Team>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<A>)
    dictionary_kernel(
        const __grid_constant__ Projection<A> projection,
        const __grid_constant__ Clustering<A> clustering,
        const __grid_constant__ SharedLayout layout,
        const Stages stages) {
  const Team team;
  if (stages.prepare) {
    prepare(projection, team);
    if (projection.q < projection.d && projection.state->finite) {
      find_subspace(projection.subspace, team);
      project_all(projection, team);
    }
  }
  const bool finite = clustering.state->finite;
  if (layout.points >= 0 && finite) {
    const OwnRows own(clustering.n, team.rank(), team.size());
    copy_rows(
        clustering.points,
        own.begin,
        nullptr,
        own.end - own.begin,
        clustering.stride,
        shared_at<A>(layout.points));
    __syncthreads();
  }
  if (stages.seed && finite) {
    seed(clustering, layout, team);
  }
  if (stages.lloyd) {
    cluster_rows(clustering, layout, team);
  }
}

// Small enough for a cluster: elements of the features, order and
// multiply-adds of the scatter matrix; rows and multiply-adds of an iteration.
constexpr int64_t kSmallElements = 1 << 18;
constexpr int64_t kSmallOrder = 256;
constexpr int64_t kSmallScatter = 1 << 26;
constexpr int64_t kSmallRows = 4096;
constexpr int64_t kSmallIteration = 1 << 22;
// Elements of the features for each block of a cluster.
constexpr int64_t kBlockElements = 1 << 13;

bool small_clustering(int64_t n, int64_t q, int64_t clusters) {
  return n <= kSmallRows && n * q * clusters <= kSmallIteration;
}

/// Rows that k-means++ sees, of large inputs a sample: by experience the
/// inertia after Lloyd's iterations is the same.
int64_t sample_size(int64_t n, int64_t clusters) {
  const int64_t sample = largest(8192, 64 * clusters);
  return n >= 2 * sample ? sample : n;
}

template <typename A>
int64_t whole_vectors(int64_t columns) {
  return ceil_div(columns, kVector<A>) * kVector<A>;
}

/// Fills a layout from the beginning, as far as it has room.
class SharedArena {
 public:
  SharedArena(SharedLayout& layout, int64_t capacity)
      : layout_(layout), left_(capacity) {}

  bool has(int64_t bytes) const {
    return rounded(bytes) <= left_;
  }
  int take(int64_t bytes) {
    const int offset = static_cast<int>(layout_.bytes);
    layout_.bytes += rounded(bytes);
    left_ -= rounded(bytes);
    return offset;
  }

 private:
  static int64_t rounded(int64_t bytes) {
    return ceil_div(bytes, 16) * 16;
  }

  SharedLayout& layout_;
  int64_t left_;
};

/// What blocks leave for each other in stage seed: potentials, and rows drawn.
template <typename A>
int64_t potential_bytes(const Clustering<A>& p, int64_t blocks) {
  return (blocks + 1) * p.candidates * static_cast<int64_t>(sizeof(double));
}

template <typename A>
int64_t drawn_bytes(const Clustering<A>& p) {
  return 2 * p.candidates * static_cast<int64_t>(sizeof(int64_t));
}

/// What of stage lloyd is kept in shared memory, for blocks with `own_rows`
/// rows each; rows stay there only in a cluster, and only where they leave
/// `reserved` bytes to stage seed.
template <typename A>
SharedLayout lloyd_layout(
    const Clustering<A>& p,
    int64_t own_rows,
    bool keep_points,
    int64_t reserved,
    int64_t capacity) {
  constexpr int64_t element = sizeof(A);
  const int64_t row = shared_stride<A>(p.stride) * element;
  const int64_t stage_row = kStageStride<A> * element;
  const int64_t stage_points = 2 * kTileRows * stage_row;
  const int64_t stage_centers = 2 * 16 * kMaxThreadColumns * stage_row;
  const int64_t points = ceil_div(own_rows, kTileRows) * kTileRows * row;
  const int64_t centers = p.clusters * row;
  const int64_t sums =
      (kWords<A> * p.q + 1) * p.clusters * static_cast<int64_t>(sizeof(Word));
  SharedLayout layout;
  SharedArena arena(layout, capacity);
  if (keep_points && arena.has(points + largest(centers, reserved))) {
    layout.points = arena.take(points);
  } else {
    layout.stage_points = arena.take(stage_points);
  }
  if (arena.has(centers)) {
    layout.centers = arena.take(centers);
  } else {
    layout.stage_centers = arena.take(stage_centers);
  }
  if (arena.has(sums)) {
    layout.sums = arena.take(sums);
  }
  return layout;
}

/// Adds what stage seed keeps in shared memory, over what lloyd does.
template <typename A>
void add_seeding(
    const Clustering<A>& p,
    int64_t blocks,
    int64_t capacity,
    SharedLayout& layout) {
  const int64_t rows = ceil_div(p.seed_rows, blocks);
  const int64_t element = sizeof(A);
  SharedLayout seeding;
  SharedArena arena(seeding, capacity);
  const int64_t row = shared_stride<A>(p.stride) * element;
  if (layout.points >= 0) {
    layout.seed_points =
        arena.take(ceil_div(rows, kTileRows) * kTileRows * row);
  }
  layout.potential = arena.take(potential_bytes(p, blocks));
  layout.drawn = arena.take(drawn_bytes(p));
  if (arena.has((p.candidates + 1) * rows * element + 16)) {
    layout.distances = arena.take(rows * element);
    layout.trial = arena.take(p.candidates * rows * element);
  }
  if (layout.seed_points < 0 && arena.has(rows * row)) {
    layout.seed_points = arena.take(rows * row);
  }
  layout.bytes = largest(layout.bytes, seeding.bytes);
}

/// Queues `stages` for a team of at most `blocks` blocks. Up to kMaxSeedTeam of
/// them take all the shared memory they can get; more are the whole grid.
template <typename A, typename Team>
void run_stages(
    const Device& device,
    int64_t blocks,
    const Stages& stages,
    Projection<A> projection,
    const Clustering<A>& clustering,
    cudaStream_t stream) {
  constexpr bool cooperative = std::is_same_v<Team, GridTeam>;
  const auto kernel = dictionary_kernel<A, Team>;
  const bool wide = blocks > kMaxSeedTeam;
  int64_t capacity = shared_capacity(kernel, device, 1);
  SharedLayout layout;
  if (!wide) {
    blocks = fitting_blocks(kernel, device, cooperative, blocks, capacity);
  }
  if (stages.lloyd && wide) {
    // Several blocks to a multiprocessor, if none of them goes short for it.
    const int64_t share =
        shared_capacity(kernel, device, kBlocksPerProcessor<A>);
    layout = lloyd_layout(clustering, clustering.n, false, 0, share);
    if (layout.centers >= 0 && layout.sums >= 0) {
      capacity = share;
    } else {
      layout = lloyd_layout(clustering, clustering.n, false, 0, capacity);
    }
  } else if (stages.lloyd) {
    // Each of the two is rounded up to 16 bytes.
    const int64_t reserved = stages.seed
        ? potential_bytes(clustering, blocks) + drawn_bytes(clustering) + 16
        : 0;
    layout = lloyd_layout(
        clustering, ceil_div(clustering.n, blocks), true, reserved, capacity);
  }
  if (stages.seed) {
    add_seeding(clustering, blocks, capacity, layout);
  }
  int64_t scratch = 0;
  if (stages.lloyd) {
    scratch = kWords<A> * clustering.clusters * clustering.d *
        static_cast<int64_t>(sizeof(Word));
  }
  if (stages.prepare && projection.q < projection.d) {
    const int64_t order = projection.subspace.width;
    scratch = largest(
        scratch,
        2 * (order + 1) * (order + 1) * static_cast<int64_t>(sizeof(double)));
  }
  layout.bytes = largest(layout.bytes, smallest(capacity, scratch));
  projection.subspace.shared_bytes = layout.bytes;
  if (wide) {
    blocks = fitting_blocks(kernel, device, cooperative, blocks, layout.bytes);
  }
  const TeamLaunch team(cooperative, blocks, layout.bytes, stream);
  check(
      cudaLaunchKernelEx(
          &team.config, kernel, projection, clustering, layout, stages),
      "kernel launch");
}

/// The same for a team of a few blocks: a cluster, where the device has them.
template <typename A>
void run_narrow(
    const Device& device,
    int64_t blocks,
    const Stages& stages,
    const Projection<A>& projection,
    const Clustering<A>& clustering,
    cudaStream_t stream) {
  const auto run = has_clusters(dictionary_kernel<A, ClusterTeam>, device)
      ? run_stages<A, ClusterTeam>
      : run_stages<A, GridTeam>;
  run(device, blocks, stages, projection, clustering, stream);
}

} // namespace

Subspace::Subspace(
    int64_t m,
    int64_t q,
    double precision,
    DictionaryState* state,
    Arena& arena)
    : m(m), q(q), state(state), precision(precision) {
  direct = m <= kDirectOrder || 2 * (q + kOversampling) >= m;
  width = direct ? m : q + kOversampling;
  scatter = arena.take<double>(m * m);
  if (!direct) {
    even = arena.take<double>(m * width);
    odd = arena.take<double>(m * width);
    basis = arena.take<double>(m * width);
    image = arena.take<double>(m * width);
    gram_slices = smallest(16, ceil_div(m, 64));
    gram_partial = arena.take<double>(gram_slices * width * width);
    transform = arena.take<double>(width * width);
  }
  small = arena.take<double>(width * width);
  vectors = arena.take<double>(width * width);
  values = arena.take<double>(width);
  rotations = arena.take<double>(2 * width + 2);
  order = arena.take<int64_t>(width);
  leading = arena.take<double>(m * q);
}

template <typename A>
Projection<A>::Projection(
    int64_t n,
    int64_t d,
    int64_t q,
    int64_t clusters,
    bool has_initial,
    Arena& arena)
    : n(n),
      d(d),
      q(q),
      stride(whole_vectors<A>(q)),
      initial_rows(has_initial ? clusters : 0),
      state(arena.take<DictionaryState>(1)),
      gram(d > n && q <= n) {
  mean = arena.take<double>(d);
  points = arena.take<A>(n * stride);
  slice_rows = largest(64, ceil_div(n, 1024));
  slices = ceil_div(n, slice_rows);
  column_partial = arena.take<double>(slices * d);
  spread_partial = arena.take<double>(slices);
  small = small_clustering(n, q, clusters) && n * d <= kSmallElements;
  if (q == d) {
    return;
  }
  const int64_t m = gram ? n : d;
  const int64_t depth = gram ? d : n;
  small = small && m <= kSmallOrder && m * m * depth <= kSmallScatter;
  // Leave the rest of the rounding of sums in A and of their means alone.
  subspace = Subspace(m, q, sizeof(A) == 4 ? 1e-10 : 1e-15, state, arena);
  const int64_t tiles = ceil_div(m, Tile<A, 4>::kSide);
  scatter_slices = smallest(
      ceil_div(depth, small ? 128 : 512), largest(1, 512 / (tiles * tiles)));
  scatter_partial = arena.take<double>(scatter_slices * m * m);
  directions = gram ? arena.take<double>(d * q) : subspace.leading;
}

template <typename A>
Clustering<A>::Clustering(
    int64_t n,
    int64_t d,
    int64_t q,
    int64_t clusters,
    int64_t candidates,
    Arena& arena)
    : n(n),
      d(d),
      q(q),
      stride(whole_vectors<A>(q)),
      clusters(clusters),
      candidates(candidates),
      small(small_clustering(n, q, clusters)),
      seed_rows(sample_size(n, clusters)),
      // Columns are below 1, and so a row below sqrt(d); directions of little
      // variance may be a bit longer than 1. Two rows more: one on its way to
      // an empty cluster is in two sums.
      of_points(n + 2, 4 * sqrt(static_cast<double>(d))),
      of_features(n, 1) {
  const int64_t columns = largest(q, d);
  distances = arena.take<A>(n);
  trial = arena.take<A>(candidates * seed_rows);
  sample = arena.take<int64_t>(seed_rows);
  norms = arena.take<A>(n);
  slices = ceil_div(n, kSliceRows);
  slice_sum = arena.take<double>(slices);
  centers = arena.take<A>(clusters * stride);
  half_squares = arena.take<A>(clusters);
  means = arena.take<A>(2 * clusters * stride);
  between = arena.take<double>(clusters);
  sums = arena.take<Word>(kWords<A> * clusters * columns);
  counts = arena.take<Word>(clusters);
  changed = arena.take<Word>(2);
  moved = arena.take<int64_t>(3 * clusters);
  far_value = arena.take<A>(2 * kMaxTeam);
  far_index = arena.take<int64_t>(2 * kMaxTeam);
  potentials = arena.take<double>(kMaxSeedTeam * candidates);
  draws = arena.take<int64_t>(kMaxSeedTeam * candidates);
}

template <typename A>
void run_dictionary(
    const Projection<A>& projection,
    const Clustering<A>& clustering,
    cudaStream_t stream) {
  const Device device = Device::current();
  const bool seed = !clustering.has_initial;
  if (projection.small) {
    int64_t blocks = 1;
    while (blocks < kMaxSeedTeam &&
           projection.n * projection.d > blocks * kBlockElements) {
      blocks *= 2;
    }
    run_narrow(
        device, blocks, {true, seed, true}, projection, clustering, stream);
    return;
  }
  run_stages<A, GridTeam>(
      device, kMaxTeam, {true, false, false}, projection, clustering, stream);
  if (seed || clustering.small) {
    run_narrow(
        device,
        kMaxSeedTeam,
        {false, seed, clustering.small},
        projection,
        clustering,
        stream);
  }
  if (!clustering.small) {
    run_stages<A, GridTeam>(
        device,
        largest(
            kMaxSeedTeam + 1,
            smallest(kMaxTeam, ceil_div(clustering.n, int64_t(kTileRows)))),
        {false, false, true},
        projection,
        clustering,
        stream);
  }
}

template void run_dictionary(
    const Projection<float>&,
    const Clustering<float>&,
    cudaStream_t);
template void run_dictionary(
    const Projection<double>&,
    const Clustering<double>&,
    cudaStream_t);
template struct Projection<float>;
template struct Projection<double>;
template struct Clustering<float>;
template struct Clustering<double>;

} // namespace kdci::cuda
