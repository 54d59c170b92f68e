# SPDX-License-Identifier: Apache-2.0
"""KDCI in a plain PyTorch loop: a student learns from images that the teacher was not trained on.

Four lines are KDCI's, marked by numbers. Sampled images do not change, so that their confounder
dictionary is built once, before training. Run it with: python examples/plain_loop.py
"""

import torch
from digits import NUM_CLASSES, accuracy, network, strokes, trained_teacher

import kdci_ext

torch.manual_seed(0)
teacher, student = trained_teacher(), network(width=32)
images = strokes(4000)
with torch.no_grad():
    teacher_logits = teacher(images)

kdci = kdci_ext.KDCI(NUM_CLASSES, num_prototypes=32)  # 1
dictionary = kdci.update(teacher_logits)  # 2
print("share of each prototype:", dictionary.proportions.sort(descending=True).values[:5])

# 3: the attention of the compensation learns as the student does
optimizer = torch.optim.Adam([*student.parameters(), *kdci.parameters()], lr=0.01)
for epoch in range(10):
    for batch in torch.randperm(len(images)).split(128):
        loss = kdci.loss(student(images[batch]), teacher_logits[batch], temperature=4.0)  # 4
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if epoch % 2 == 1:
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, student {accuracy(student):.1f} %")

# The student alone is evaluated and deployed: the compensation belongs to training.
print(f"teacher {accuracy(teacher):.1f} %, student {accuracy(student):.1f} %")
assert accuracy(student) > 50  # chance is 10 %

# To go on later, save KDCI beside the student: the dictionary is part of its state.
again = kdci_ext.KDCI(NUM_CLASSES, num_prototypes=32)
again.load_state_dict(kdci.state_dict())
assert torch.equal(again(student(images)), kdci(student(images)))
