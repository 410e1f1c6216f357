"""robustbench imports this name from here; pyautoattack's class is the same one."""

from pyautoattack.state import EvaluationState

__all__ = ["EvaluationState"]
