"""The contract of every classifier: images in [0, 1] → logits, normalisation inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Classifier(nn.Module):
    """f: images in [0, 1], shape (B, C, H, W) → logits, shape (B, K).

    Positional parameters of a subclass are its networks (its *parts*), keyword-only parameters its options.
    """

    stochastic: bool = False

    def objectives(self, batch: Any, noise: Any) -> dict[str, Tensor]:
        """Cross-entropy on (x, y), for all parts together: the keys are part names joined by "+"."""
        return {
            "+".join(name for name, _ in self.named_children()): nn.functional.cross_entropy(self(batch.x), batch.y)
        }

    @classmethod
    def parts(cls, shape: tuple[int, int, int], size: str = "tiny", classes: int = 10) -> dict[str, nn.Module]:
        """Fresh networks: images of ``shape`` (C, H, W) → ``classes`` logits, keyed by the constructor's parameters."""
        return {}
