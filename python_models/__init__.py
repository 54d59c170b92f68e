# SPDX-License-Identifier: Apache-2.0
"""Networks, data, methods and the training loop of data-free knowledge distillation with KDCI."""
