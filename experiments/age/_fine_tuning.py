"""The paper's basicFT, plain fine-tuning."""

from bdjax.defenses import finetune


def basic(epochs: int) -> finetune.Config:
    """Fine-tuning with the victim's own recipe and as many epochs."""
    return finetune.Config(epochs, 128, "adam", 1e-3, weight_decay=0.0, schedule="cosine", augment="none")
