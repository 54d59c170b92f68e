# SPDX-License-Identifier: Apache-2.0
"""KDCI beside a generator of your own: the dictionary follows the images that it makes.

The images change with each step of the generator, and with them what the teacher predicts. So the
dictionary is rebuilt from the logits of each new batch. Run it with:
python examples/own_generator.py
"""

import torch
from digits import NUM_CLASSES, PIXELS, accuracy, network, trained_teacher
from torch import nn
from torch.nn import functional as F

import kdci_ext

LATENT_DIM, BATCH_SIZE = 32, 128

torch.manual_seed(0)
teacher, student = trained_teacher(), network(width=32)
generator = nn.Sequential(
    *(nn.Linear(LATENT_DIM, 128), nn.BatchNorm1d(128), nn.ReLU()),
    *(nn.Linear(128, PIXELS), nn.Sigmoid()),
)
kdci = kdci_ext.KDCI(NUM_CLASSES, num_prototypes=8)
generator_optimizer = torch.optim.Adam(generator.parameters(), lr=0.002)
optimizer = torch.optim.Adam([*student.parameters(), *kdci.parameters()], lr=0.005)

for step in range(600):
    # The generator: images that the teacher is sure of (first term), of all classes (second), and
    # on which teacher and student differ (third).
    images = generator(torch.randn(BATCH_SIZE, LATENT_DIM))
    logits = teacher(images)
    proportions = logits.softmax(1).mean(0)
    differing = (logits.softmax(1) - student(images).softmax(1)).abs().sum(1).mean()
    generator_loss = (
        F.cross_entropy(logits, logits.argmax(1))
        - 5 * torch.special.entr(proportions).sum()
        - differing
    )
    generator_optimizer.zero_grad()
    generator_loss.backward()
    generator_optimizer.step()

    # The student: the same images, with the dictionary of what the teacher makes of them.
    images, logits = images.detach(), logits.detach()
    kdci.update(logits)
    loss = kdci.loss(student(images), logits, temperature=4.0)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 150 == 149:
        print(f"step {step + 1}: loss {loss.item():.3f}, student {accuracy(student):.1f} %")

print(f"teacher {accuracy(teacher):.1f} %, student {accuracy(student):.1f} %")
assert accuracy(student) > 50  # chance is 10 %
assert torch.isclose(kdci.proportions.sum(), torch.tensor(1.0))
