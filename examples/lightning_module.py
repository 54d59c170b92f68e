# SPDX-License-Identifier: Apache-2.0
"""KDCI in Lightning: a part of the module, saved and moved to devices with it.

Needs the package ``lightning``. Run it with: python examples/lightning_module.py
"""

import tempfile
from pathlib import Path

import lightning
import torch
from digits import NUM_CLASSES, accuracy, network, strokes, trained_teacher
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import kdci_ext


class Distiller(lightning.LightningModule):
    """Distils a fixed teacher into a student, with KDCI."""

    def __init__(self, teacher: nn.Module, student: nn.Module) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        self.kdci = kdci_ext.KDCI(NUM_CLASSES, num_prototypes=32)

    @torch.no_grad()
    def on_train_start(self) -> None:
        """Build the dictionary of all images, unless it came with a checkpoint."""
        if not self.kdci.is_ready:
            loader = self.trainer.train_dataloader
            logits = [self.teacher(images.to(self.device)) for (images,) in loader]
            self.kdci.update(torch.cat(logits))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """Return the loss of one batch of images."""
        (images,) = batch  # with a generator: make them here, and update the dictionary
        with torch.no_grad():
            teacher_logits = self.teacher(images)
        loss = self.kdci.loss(self.student(images), teacher_logits, temperature=4.0)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Let student and compensation learn together."""
        return torch.optim.Adam([*self.student.parameters(), *self.kdci.parameters()], lr=0.01)


lightning.seed_everything(0)
teacher = trained_teacher()
module = Distiller(teacher, network(width=32))
loader = DataLoader(TensorDataset(strokes(4000)), batch_size=128, shuffle=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=10,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, loader)
    trainer.save_checkpoint(Path(folder) / "last.ckpt")
    # The dictionary is part of the checkpoint.
    again = Distiller.load_from_checkpoint(
        Path(folder) / "last.ckpt",
        weights_only=True,
        teacher=teacher,
        student=network(width=32),
    )

print(f"teacher {accuracy(teacher):.1f} %, student {accuracy(module.student):.1f} %")
assert accuracy(module.student) > 50  # chance is 10 %
assert torch.equal(again.kdci.prototypes, module.kdci.prototypes)
assert accuracy(again.student) == accuracy(module.student)
