// SPDX-License-Identifier: Apache-2.0
#include "divergence.h"

#include "elementary.h"
#include "lane_sums.h"
#include "transpose.h"
#include "vec.h"

namespace kdci::KDCI_SIMD {
namespace {

// What a row adds to the sum: cross / t_total + log(s_total / t_total), given
// sums of exponentials of differences to the largest logit. Logarithms take
// longest, so that there is one of a product; each factor lies between the
// number of classes and its inverse.
struct Divergence {
  double sum = 0;
  double ratio = 1;

  void add(double cross, double s_total, double t_total) {
    sum += cross / t_total;
    ratio *= s_total / t_total;
  }

  double total() const {
    return sum + __builtin_log(ratio);
  }
};

// What a class adds to the cross sum.
template <typename T>
inline Vec<T> cross_term(Vec<T> t_exp, Vec<T> t_shifted, Vec<T> s_shifted) {
  return t_exp == Vec<T>{} ? t_exp : t_exp * (t_shifted - s_shifted);
}

// divergence() of up to lanes<T> rows of classes that fill no vector each: the
// vectors hold a class of all rows.
template <typename T>
void add_narrow(
    int64_t rows,
    int64_t classes,
    T* student,
    const T* teacher,
    T inverse_temperature,
    T grad_factor,
    Divergence& result) {
  Vec<T> s[lanes<T>] = {};
  Vec<T> t[lanes<T>] = {};
  for (int64_t b = 0; b < rows; ++b) {
    s[b] = load_up_to(student + b * classes, classes, T(0));
    t[b] = load_up_to(teacher + b * classes, classes, T(0));
  }
  transpose<lanes<T> / 2, T>(s);
  transpose<lanes<T> / 2, T>(t);
  Vec<T> s_max = broadcast(-static_cast<T>(__builtin_inff()));
  Vec<T> t_max = s_max;
  for (int64_t c = 0; c < classes; ++c) {
    s[c] *= inverse_temperature;
    t[c] *= inverse_temperature;
    s_max = maximum<T>(s[c], s_max);
    t_max = maximum<T>(t[c], t_max);
  }
  Vec<T> s_total = {};
  Vec<T> t_total = {};
  Vec<T> cross = {};
  for (int64_t c = 0; c < classes; ++c) {
    const Vec<T> s_shifted = s[c] - s_max;
    const Vec<T> t_shifted = t[c] - t_max;
    Vec<T> values[2] = {s_shifted, t_shifted};
    exponentials_or_zero<2, T>(values);
    s[c] = values[0];
    t[c] = values[1];
    s_total += s[c];
    t_total += t[c];
    cross += cross_term<T>(t[c], t_shifted, s_shifted);
  }
  for (int64_t b = 0; b < rows; ++b) {
    result.add(cross[b], s_total[b], t_total[b]);
  }
  if (grad_factor == 0) {
    return;
  }
  const Vec<T> s_factor = grad_factor / s_total;
  const Vec<T> t_factor = grad_factor / t_total;
  for (int64_t c = 0; c < classes; ++c) {
    s[c] = s_factor * s[c] - t_factor * t[c];
  }
  transpose<lanes<T> / 2, T>(s);
  for (int64_t b = 0; b < rows; ++b) {
    store_up_to(student + b * classes, classes, s[b]);
  }
}

template <typename T>
inline T scaled_maximum(int64_t count, const T* values, T factor) {
  const T infinity = __builtin_inff();
  Vec<T> largest = broadcast(-infinity);
  for (int64_t c = 0; c < count; c += lanes<T>) {
    largest = maximum<T>(
        load_up_to(values + c, count - c, -infinity) * factor, largest);
  }
  return largest_lane<T>(largest);
}

// divergence() of one row.
template <typename T>
void add_row(
    int64_t classes,
    T* student,
    const T* teacher,
    T inverse_temperature,
    T grad_factor,
    Divergence& result) {
  // Exponentials are kept of the first classes, and made again of the others.
  constexpr int64_t most_kept = 1024;
  alignas(64) T s_kept[most_kept];
  alignas(64) T t_kept[most_kept];
  const T infinity = __builtin_inff();
  const T s_max = scaled_maximum(classes, student, inverse_temperature);
  const T t_max = scaled_maximum(classes, teacher, inverse_temperature);
  // The differences to the largest logits.
  const auto shift = [&](int64_t c, Vec<T>(&values)[2]) {
    const int64_t left = classes - c;
    values[0] =
        load_up_to(student + c, left, -infinity) * inverse_temperature - s_max;
    values[1] =
        load_up_to(teacher + c, left, -infinity) * inverse_temperature - t_max;
  };
  LongSum<T> s_sum;
  LongSum<T> t_sum;
  LongSum<T> cross;
  for (int64_t c = 0; c < classes; c += lanes<T>) {
    Vec<T> shifted[2];
    shift(c, shifted);
    Vec<T> values[2] = {shifted[0], shifted[1]};
    exponentials_or_zero<2, T>(values);
    s_sum.add(values[0]);
    t_sum.add(values[1]);
    cross.add(cross_term<T>(values[1], shifted[1], shifted[0]));
    if (c + lanes<T> <= most_kept) {
      store(s_kept + c, values[0]);
      store(t_kept + c, values[1]);
    }
  }
  const T s_total = s_sum.sum();
  const T t_total = t_sum.sum();
  result.add(cross.sum(), s_total, t_total);
  if (grad_factor == 0) {
    return;
  }
  const T s_factor = grad_factor / s_total;
  const T t_factor = grad_factor / t_total;
  for (int64_t c = 0; c < classes; c += lanes<T>) {
    Vec<T> values[2];
    if (c + lanes<T> <= most_kept) {
      values[0] = load(s_kept + c);
      values[1] = load(t_kept + c);
    } else {
      shift(c, values);
      exponentials_or_zero<2, T>(values);
    }
    store_up_to(
        student + c, classes - c, s_factor * values[0] - t_factor * values[1]);
  }
}

template <typename T>
double divergence(
    int64_t rows,
    int64_t classes,
    T* student,
    const T* teacher,
    T inverse_temperature,
    T grad_factor) {
  Divergence result;
  const bool narrow = classes <= lanes<T>;
  const int64_t step = narrow ? lanes<T> : 1;
  for (int64_t b = 0; b < rows; b += step) {
    T* s = student + b * classes;
    const T* t = teacher + b * classes;
    if (narrow) {
      add_narrow(
          rows - b < step ? rows - b : step,
          classes,
          s,
          t,
          inverse_temperature,
          grad_factor,
          result);
    } else {
      add_row(classes, s, t, inverse_temperature, grad_factor, result);
    }
  }
  return result.total();
}

} // namespace

extern const DivergenceKernels<float> divergence_kernels_float = {
    divergence<float>};
extern const DivergenceKernels<double> divergence_kernels_double = {
    divergence<double>};

} // namespace kdci::KDCI_SIMD
