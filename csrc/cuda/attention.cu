// SPDX-License-Identifier: Apache-2.0
#include "attention.h"

#include <math.h>

#include "block.cuh"

namespace kdci::cuda {
namespace {

constexpr int kGroupRows = 4;
constexpr int64_t kMaxSlices = 16;

/// scale * sum_k a(i, k) b(k, j) over `depth` terms, with optional factors for
/// the rows and for the terms of `a`.
template <typename A>
struct Product {
  int64_t depth = 0;
  const A* a = nullptr;
  int64_t a_row = 0;
  int64_t a_depth = 0;
  const A* b = nullptr;
  int64_t b_depth = 0;
  int64_t b_column = 0;
  const A* row_factor = nullptr;
  const A* depth_factor = nullptr;
  A scale = 1;
};

/// out [rows, columns] = base + first + second.
template <typename A>
struct Job {
  int64_t rows = 0;
  int64_t columns = 0;
  A* out = nullptr;
  const A* base = nullptr;
  Product<A> first;
  Product<A> second;
};

template <typename A>
struct Jobs {
  Job<A> job[4];
};

template <typename A>
using JobTile = Tile<A, 2>;

template <typename A>
__host__ __device__ int64_t count_tiles(const Job<A>& job) {
  return ceil_div(job.rows, JobTile<A>::kSide) *
      ceil_div(job.columns, JobTile<A>::kSide);
}

template <typename A>
__device__ void add_product(
    const Product<A> p,
    const Job<A>& job,
    int64_t row,
    int64_t column,
    JobTile<A>& tile) {
  tile.accumulate(
      row,
      column,
      job.rows,
      job.columns,
      0,
      p.depth,
      p.a_depth == 1,
      p.b_depth == 1,
      [=](int64_t i, int64_t k) {
        A value = p.scale * p.a[i * p.a_row + k * p.a_depth];
        if (p.row_factor != nullptr) {
          value *= p.row_factor[i];
        }
        if (p.depth_factor != nullptr) {
          value *= p.depth_factor[k];
        }
        return value;
      },
      [=](int64_t k, int64_t j) { return p.b[k * p.b_depth + j * p.b_column]; },
      MultiplyAdd());
}

/// Up to four matrix products in one launch, a block for each tile.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    products_kernel(const __grid_constant__ Jobs<A> jobs) {
  int64_t tiles = 0;
  for (const Job<A>& job : jobs.job) {
    tiles += count_tiles(job);
  }
  for (int64_t item = blockIdx.x; item < tiles; item += gridDim.x) {
    int64_t index = item;
    int which = 0;
    while (index >= count_tiles(jobs.job[which])) {
      index -= count_tiles(jobs.job[which]);
      ++which;
    }
    const Job<A>& job = jobs.job[which];
    const int64_t across = ceil_div(job.columns, JobTile<A>::kSide);
    const int64_t row = index / across * JobTile<A>::kSide;
    const int64_t column = index % across * JobTile<A>::kSide;
    JobTile<A> tile;
    tile.clear();
    add_product(job.first, job, row, column, tile);
    add_product(job.second, job, row, column, tile);
    const A* base = job.base;
    A* out = job.out;
    const int64_t columns = job.columns;
    tile.store(
        row, column, job.rows, columns, [=](int64_t i, int64_t j, double sum) {
          const int64_t e = i * columns + j;
          const double start =
              base == nullptr ? 0 : static_cast<double>(base[e]);
          out[e] = static_cast<A>(start + sum);
        });
  }
}

template <typename A>
void run_products(const Jobs<A>& jobs, cudaStream_t stream) {
  int64_t tiles = 0;
  for (const Job<A>& job : jobs.job) {
    tiles += count_tiles(job);
  }
  launch(products_kernel<A>, tiles, kThreads, stream, jobs);
}

/// Scores and their softmax over the prototypes, a block for each row.
template <typename A>
__global__ void __launch_bounds__(kThreads)
    weights_kernel(const Attention<A> p, const AttentionState<A> state) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const A* query = state.query + b * p.hidden;
    A* weights = state.weights + b * p.prototypes;
    for (int64_t i = warp; i < p.prototypes; i += kThreads / 32) {
      const A* key = state.key + i * p.hidden;
      A score = 0;
      for (int64_t h = lane; h < p.hidden; h += 32) {
        score += p.w_score[h] * tanh(query[h] + key[h]);
      }
      score = warp_reduce(score, Add());
      if (lane == 0) {
        if (p.posterior) {
          score += p.proportion[i] > 0 ? log(p.proportion[i]) : -INFINITY;
        }
        weights[i] = score;
      }
    }
    __syncthreads();
    A largest = -INFINITY;
    for (int64_t i = threadIdx.x; i < p.prototypes; i += kThreads) {
      largest = maximum(largest, weights[i]);
    }
    largest = block_reduce(largest, Max());
    A sum = 0;
    for (int64_t i = threadIdx.x; i < p.prototypes; i += kThreads) {
      weights[i] = exp(weights[i] - largest);
      sum += weights[i];
    }
    sum = block_reduce(sum, Add());
    for (int64_t i = threadIdx.x; i < p.prototypes; i += kThreads) {
      weights[i] /= sum;
    }
  }
}

/// From u = grad Z^T in weights_grad: the gradient of the scores, and in the
/// place of u the terms of the proportions' gradient (paper's weighting).
template <typename A>
__global__ void __launch_bounds__(kThreads) score_grad_kernel(
    const Attention<A> p,
    const A* all_weights,
    A* weights_grad,
    A* score_grad) {
  const A scale = static_cast<A>(p.scale);
  for (int64_t b = blockIdx.x; b < p.batch; b += gridDim.x) {
    const A* weights = all_weights + b * p.prototypes;
    A* u = weights_grad + b * p.prototypes;
    A* out = score_grad + b * p.prototypes;
    A mean = 0;
    for (int64_t i = threadIdx.x; i < p.prototypes; i += kThreads) {
      A grad = scale * u[i];
      if (!p.posterior) {
        u[i] = weights[i] * grad;
        grad *= p.proportion[i];
      }
      out[i] = grad;
      mean += weights[i] * grad;
    }
    mean = block_reduce(mean, Add());
    for (int64_t i = threadIdx.x; i < p.prototypes; i += kThreads) {
      out[i] = weights[i] * (out[i] - mean);
    }
  }
}

/// Gradient of the queries, and by groups of rows that of w_score. A thread has
/// one hidden unit of kGroupRows rows.
template <typename A>
__global__ void __launch_bounds__(kThreads) query_grad_kernel(
    const Attention<A> p,
    const AttentionState<A> state,
    const BackwardWorkspace<A> work) {
  const int64_t tiles = ceil_div(p.hidden, kThreads);
  for (int64_t item = blockIdx.x; item < work.groups * tiles;
       item += gridDim.x) {
    const int64_t group = item / tiles;
    const int64_t h = item % tiles * kThreads + threadIdx.x;
    if (h >= p.hidden) {
      continue;
    }
    A query[kGroupRows];
    A sum[kGroupRows];
    const A* score_grad[kGroupRows];
    for (int r = 0; r < kGroupRows; ++r) {
      // Rows beyond the last repeat it; their results are not used.
      const int64_t b = minimum(group * kGroupRows + r, p.batch - 1);
      query[r] = state.query[b * p.hidden + h];
      score_grad[r] = work.score_grad + b * p.prototypes;
      sum[r] = 0;
    }
    const int rows = static_cast<int>(
        minimum<int64_t>(kGroupRows, p.batch - group * kGroupRows));
    A w_score_sum = 0;
    for (int64_t i = 0; i < p.prototypes; ++i) {
      const A key = state.key[i * p.hidden + h];
#pragma unroll
      for (int r = 0; r < kGroupRows; ++r) {
        const A t = tanh(query[r] + key);
        const A grad = r < rows ? score_grad[r][i] : A(0);
        sum[r] += grad * (1 - t * t);
        w_score_sum += grad * t;
      }
    }
    for (int r = 0; r < rows; ++r) {
      work.query_grad[(group * kGroupRows + r) * p.hidden + h] =
          p.w_score[h] * sum[r];
    }
    work.w_score_partial[group * p.hidden + h] = w_score_sum;
  }
}

/// Gradient of the keys by slices of the rows.
template <typename A>
__global__ void __launch_bounds__(kThreads) key_grad_kernel(
    const Attention<A> p,
    const AttentionState<A> state,
    const BackwardWorkspace<A> work) {
  const int64_t size = p.prototypes * p.hidden;
  const int64_t tiles = ceil_div(size, kThreads);
  for (int64_t item = blockIdx.x; item < work.slices * tiles;
       item += gridDim.x) {
    const int64_t slice = item / tiles;
    const int64_t e = item % tiles * kThreads + threadIdx.x;
    if (e >= size) {
      continue;
    }
    const int64_t i = e / p.hidden;
    const int64_t h = e % p.hidden;
    const A key = state.key[e];
    const int64_t begin = slice * work.slice_rows;
    const int64_t end = minimum(p.batch, begin + work.slice_rows);
    A sum = 0;
    for (int64_t b = begin; b < end; ++b) {
      const A t = tanh(state.query[b * p.hidden + h] + key);
      sum += work.score_grad[b * p.prototypes + i] * (1 - t * t);
    }
    work.key_partial[slice * size + e] = p.w_score[h] * sum;
  }
}

/// out[j] = sum_i source[i, j], divided by `divisor` (0 where that is 0) if
/// there is one.
template <typename A>
struct Total {
  int64_t rows = 0;
  int64_t columns = 0;
  const A* source = nullptr;
  const A* divisor = nullptr;
  A* out = nullptr;
};

template <typename A>
struct Totals {
  Total<A> total[3];
};

template <typename A>
__global__ void __launch_bounds__(kThreads)
    totals_kernel(const __grid_constant__ Totals<A> totals) {
  __shared__ double lane_sum[8][33];
  const int x = threadIdx.x % 32;
  const int y = threadIdx.x / 32;
  int64_t tiles = 0;
  for (const Total<A>& total : totals.total) {
    tiles += ceil_div(total.columns, 32);
  }
  for (int64_t item = blockIdx.x; item < tiles; item += gridDim.x) {
    int64_t index = item;
    int which = 0;
    while (index >= ceil_div(totals.total[which].columns, 32)) {
      index -= ceil_div(totals.total[which].columns, 32);
      ++which;
    }
    const Total<A>& total = totals.total[which];
    const int64_t column = index * 32 + x;
    double sum = 0;
    if (column < total.columns) {
      for (int64_t i = y; i < total.rows; i += 8) {
        sum += static_cast<double>(total.source[i * total.columns + column]);
      }
    }
    lane_sum[y][x] = sum;
    __syncthreads();
    if (y == 0 && column < total.columns) {
      for (int lane = 1; lane < 8; ++lane) {
        sum += lane_sum[lane][x];
      }
      if (total.divisor != nullptr) {
        const double divisor = static_cast<double>(total.divisor[column]);
        sum = divisor > 0 ? sum / divisor : 0;
      }
      total.out[column] = static_cast<A>(sum);
    }
    __syncthreads();
  }
}

/// log(sum_c exp(row[c] / temperature)).
template <typename A>
__device__ double log_sum_exp(const A* row, int64_t d, double temperature) {
  double largest = -INFINITY;
  for (int64_t c = threadIdx.x; c < d; c += kThreads) {
    largest = maximum(largest, static_cast<double>(row[c]) / temperature);
  }
  largest = block_reduce(largest, Max());
  double sum = 0;
  for (int64_t c = threadIdx.x; c < d; c += kThreads) {
    sum += exp(static_cast<double>(row[c]) / temperature - largest);
  }
  return largest + log(block_reduce(sum, Add()));
}

/// Divergence of each row and its gradient. In double, because the logarithms
/// of two nearly equal distributions cancel.
template <typename A>
__global__ void __launch_bounds__(kThreads) kd_rows_kernel(
    int64_t batch,
    int64_t d,
    double temperature,
    const A* student,
    const A* teacher,
    double* row_loss,
    A* student_grad) {
  for (int64_t b = blockIdx.x; b < batch; b += gridDim.x) {
    const A* s = student + b * d;
    const A* t = teacher + b * d;
    const double s_norm = log_sum_exp(s, d, temperature);
    const double t_norm = log_sum_exp(t, d, temperature);
    double loss = 0;
    for (int64_t c = threadIdx.x; c < d; c += kThreads) {
      const double s_log_p = static_cast<double>(s[c]) / temperature - s_norm;
      const double t_log_p = static_cast<double>(t[c]) / temperature - t_norm;
      const double t_p = exp(t_log_p);
      if (t_p != 0) {
        loss += t_p * (t_log_p - s_log_p);
      }
      if (student_grad != nullptr) {
        student_grad[b * d + c] = static_cast<A>(
            temperature / static_cast<double>(batch) * (exp(s_log_p) - t_p));
      }
    }
    loss = block_reduce(loss, Add());
    if (threadIdx.x == 0) {
      row_loss[b] = loss;
    }
  }
}

template <typename A>
__global__ void __launch_bounds__(kThreads) kd_total_kernel(
    int64_t batch,
    double factor,
    const double* row_loss,
    A* loss) {
  double sum = 0;
  for (int64_t b = threadIdx.x; b < batch; b += kThreads) {
    sum += row_loss[b];
  }
  sum = block_reduce(sum, Add());
  if (threadIdx.x == 0) {
    *loss = static_cast<A>(factor * sum);
  }
}

} // namespace

template <typename A>
BackwardWorkspace<A>::BackwardWorkspace(
    int64_t batch,
    int64_t prototypes,
    int64_t hidden,
    Arena& arena) {
  groups = ceil_div(batch, kGroupRows);
  slice_rows = largest(16, ceil_div(batch, kMaxSlices));
  slices = ceil_div(batch, slice_rows);
  weights_grad = arena.take<A>(batch * prototypes);
  score_grad = arena.take<A>(batch * prototypes);
  query_grad = arena.take<A>(batch * hidden);
  w_score_partial = arena.take<A>(groups * hidden);
  key_partial = arena.take<A>(slices * prototypes * hidden);
  key_grad = arena.take<A>(prototypes * hidden);
}

template <typename A>
void attention_forward(
    const Attention<A>& p,
    const AttentionState<A>& state,
    A* compensated,
    cudaStream_t stream) {
  Jobs<A> pre_activations;
  Job<A>& query = pre_activations.job[0];
  query.rows = p.batch;
  query.columns = p.hidden;
  query.out = state.query;
  query.first = {p.d, p.logits, p.d, 1, p.w_query, 1, p.d};
  Job<A>& key = pre_activations.job[1];
  key.rows = p.prototypes;
  key.columns = p.hidden;
  key.out = state.key;
  key.first = {p.d, p.prototype, p.d, 1, p.w_key, 1, p.d};
  run_products(pre_activations, stream);

  launch(weights_kernel<A>, p.batch, kThreads, stream, p, state);

  Jobs<A> sums;
  Job<A>& out = sums.job[0];
  out.rows = p.batch;
  out.columns = p.d;
  out.out = compensated;
  out.base = p.logits;
  out.first = {
      p.prototypes, state.weights, p.prototypes, 1, p.prototype, p.d, 1};
  out.first.depth_factor = p.posterior ? nullptr : p.proportion;
  out.first.scale = static_cast<A>(p.scale);
  run_products(sums, stream);
}

template <typename A>
void attention_backward(
    const Attention<A>& p,
    const AttentionState<A>& state,
    const A* grad,
    const BackwardWorkspace<A>& work,
    const AttentionGrads<A>& grads,
    cudaStream_t stream) {
  const int64_t k = p.prototypes;
  Jobs<A> onto_prototypes;
  Job<A>& u = onto_prototypes.job[0];
  u.rows = p.batch;
  u.columns = k;
  u.out = work.weights_grad;
  u.first = {p.d, grad, p.d, 1, p.prototype, 1, p.d};
  run_products(onto_prototypes, stream);

  launch(
      score_grad_kernel<A>,
      p.batch,
      kThreads,
      stream,
      p,
      static_cast<const A*>(state.weights),
      work.weights_grad,
      work.score_grad);
  launch(
      query_grad_kernel<A>,
      work.groups * ceil_div(p.hidden, kThreads),
      kThreads,
      stream,
      p,
      state,
      work);
  launch(
      key_grad_kernel<A>,
      work.slices * ceil_div(k * p.hidden, kThreads),
      kThreads,
      stream,
      p,
      state,
      work);

  Totals<A> totals;
  totals.total[0] = {
      work.slices, k * p.hidden, work.key_partial, nullptr, work.key_grad};
  totals.total[1] = {
      work.groups, p.hidden, work.w_score_partial, nullptr, grads.w_score};
  int64_t columns = k * p.hidden + p.hidden;
  if (grads.proportion != nullptr) {
    totals.total[2] = {
        p.batch,
        k,
        p.posterior ? work.score_grad : work.weights_grad,
        p.posterior ? p.proportion : nullptr,
        grads.proportion};
    columns += k;
  }
  launch(totals_kernel<A>, ceil_div(columns, 32) + 2, kThreads, stream, totals);

  Jobs<A> outputs;
  Job<A>& logits = outputs.job[0];
  logits.rows = p.batch;
  logits.columns = p.d;
  logits.out = grads.logits;
  logits.base = grad;
  logits.first = {p.hidden, work.query_grad, p.hidden, 1, p.w_query, p.d, 1};
  Job<A>& w_query = outputs.job[1];
  w_query.rows = p.hidden;
  w_query.columns = p.d;
  w_query.out = grads.w_query;
  w_query.first = {p.batch, work.query_grad, 1, p.hidden, p.logits, p.d, 1};
  Job<A>& w_key = outputs.job[2];
  w_key.rows = p.hidden;
  w_key.columns = p.d;
  w_key.out = grads.w_key;
  w_key.first = {k, work.key_grad, 1, p.hidden, p.prototype, p.d, 1};
  if (grads.prototype != nullptr) {
    Job<A>& prototype = outputs.job[3];
    prototype.rows = k;
    prototype.columns = p.d;
    prototype.out = grads.prototype;
    prototype.first = {p.batch, state.weights, 1, k, grad, p.d, 1};
    prototype.first.row_factor = p.posterior ? nullptr : p.proportion;
    prototype.first.scale = static_cast<A>(p.scale);
    prototype.second = {p.hidden, work.key_grad, p.hidden, 1, p.w_key, p.d, 1};
  }
  run_products(outputs, stream);
}

template <typename A>
void kd_loss(
    int64_t batch,
    int64_t d,
    double temperature,
    const A* student,
    const A* teacher,
    double* row_loss,
    A* loss,
    A* student_grad,
    cudaStream_t stream) {
  launch(
      kd_rows_kernel<A>,
      batch,
      kThreads,
      stream,
      batch,
      d,
      temperature,
      student,
      teacher,
      row_loss,
      student_grad);
  launch(
      kd_total_kernel<A>,
      1,
      kThreads,
      stream,
      batch,
      temperature * temperature / static_cast<double>(batch),
      static_cast<const double*>(row_loss),
      loss);
}

#define KDCI_INSTANTIATE(A)                                             \
  template struct BackwardWorkspace<A>;                                 \
  template void attention_forward(                                      \
      const Attention<A>&, const AttentionState<A>&, A*, cudaStream_t); \
  template void attention_backward(                                     \
      const Attention<A>&,                                              \
      const AttentionState<A>&,                                         \
      const A*,                                                         \
      const BackwardWorkspace<A>&,                                      \
      const AttentionGrads<A>&,                                         \
      cudaStream_t);                                                    \
  template void kd_loss(                                                \
      int64_t,                                                          \
      int64_t,                                                          \
      double,                                                           \
      const A*,                                                         \
      const A*,                                                         \
      double*,                                                          \
      A*,                                                               \
      A*,                                                               \
      cudaStream_t);
KDCI_INSTANTIATE(float)
KDCI_INSTANTIATE(double)
#undef KDCI_INSTANTIATE

} // namespace kdci::cuda
