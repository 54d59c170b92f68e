// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace kdci {

/// Part of the points' sum of squares that a difference of inertias may owe to
/// rounding.
constexpr double inertia_rounding = 1e-9;

} // namespace kdci
