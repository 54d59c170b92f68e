// SPDX-License-Identifier: Apache-2.0
//
// The operators' schemas. Kernels are registered beside their definitions in
// cpu/, and in cuda/operators.cu; fake kernels and autograd in Python
// (kdci_ext/_ops.py).
#include "common/stable.h"

STABLE_TORCH_LIBRARY(kdci_ext, m) {
  m.def(
      "confounder_dictionary("
      "Tensor features, "            // [n, d]
      "Tensor uniforms, "            // [K, candidates] float64 in [0, 1)
      "Tensor? initial_prototypes, " // [K, d]
      "int num_components, int max_iter, float tol, float momentum) -> ("
      "Tensor prototypes, "  // [K, d]
      "Tensor proportions, " // [K]
      "Tensor labels, "      // [n] int64
      "Tensor inertia, "     // [] float64
      "Tensor num_iter)");   // [] int64
  m.def(
      "assign_rows("
      "Tensor features, " // [m, d]
      "Tensor mean, "     // [d]
      "Tensor? basis, "   // [d, q]
      "Tensor centers"    // [K, q]
      ") -> ("
      "Tensor labels, "    // [m] int64
      "Tensor distances, " // [m] float64
      "Tensor sums)");     // [K, d] float64
  m.def(
      "compensate("
      "Tensor logits, "                // [B, d]
      "Tensor prototypes, "            // [K, d]
      "Tensor proportions, "           // [K]
      "Tensor w_query, Tensor w_key, " // [H, d] each
      "Tensor w_score, "               // [H]
      "bool posterior, float scale) -> ("
      "Tensor compensated, " // [B, d]
      "Tensor saved)");      // for the gradients: [B H + K H + B K]
  m.def(
      "compensate_backward("
      "Tensor grad, " // [B, d]
      "Tensor logits, Tensor prototypes, Tensor proportions, "
      "Tensor w_query, Tensor w_key, Tensor w_score, "
      "Tensor saved, " // as compensate returned it
      "bool posterior, float scale, bool dictionary_grad) -> ("
      "Tensor grad_logits, Tensor grad_prototypes, Tensor grad_proportions, "
      "Tensor grad_w_query, Tensor grad_w_key, Tensor grad_w_score)");
  // On the CPU alone, without the dictionary's: the gradient of the queries
  // takes their place in `saved`.
  m.def(
      "compensate_backward_("
      "Tensor grad, " // [B, d]
      "Tensor logits, Tensor prototypes, Tensor proportions, "
      "Tensor w_query, Tensor w_key, Tensor w_score, "
      "Tensor(a!) saved, bool posterior, float scale) -> ("
      "Tensor grad_logits, "
      "Tensor grad_w_query, Tensor grad_w_key, Tensor grad_w_score)");
  m.def(
      "compensated_kd_loss("
      "Tensor student, Tensor teacher, " // [B, d] each
      "Tensor prototypes, Tensor proportions, "
      "Tensor w_query, Tensor w_key, Tensor w_score, "
      "float temperature, bool posterior, float scale, "
      "bool need_grad, bool dictionary_grad) -> ("
      "Tensor loss, " // []
      "Tensor grad_student, Tensor grad_prototypes, Tensor grad_proportions, "
      "Tensor grad_w_query, Tensor grad_w_key, Tensor grad_w_score)");
}
