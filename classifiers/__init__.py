"""Classifiers f: images in [0, 1] → logits. One method is one file; weights under other names are cards."""

from classifiers._base import Classifier

__all__ = ["Classifier"]
