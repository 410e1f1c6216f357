"""Stand-in for the `autoattack` module that robustbench imports.

Why: robustbench 1.1.1 runs ``from autoattack import AutoAttack`` on import, but
that project is not on the package index. The index has the same attacks as
``pyautoattack``, with other names for the arguments; this module translates.

It is installed editable (see ``../../pyproject.toml``), so a real ``autoattack``
always wins over it. It can go, together with ``shims/`` and its mentions in the
Makefile, once robustbench imports without it or ``autoattack`` is on the index:
``tests/test_packaging.py`` fails on that day and says so.

The benchmark's own attacks do not use this module.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator

import pyautoattack

__all__ = ["AutoAttack"]


class AutoAttack(pyautoattack.AutoAttack):
    """pyautoattack's AutoAttack with the argument names of the original."""

    def __init__(
        self,
        model,
        norm="Linf",
        eps=0.3,
        seed=None,
        verbose=True,
        attacks_to_run=(),
        version="standard",
        is_tf_model=False,
        device="cuda",
        log_path=None,
    ):
        if is_tf_model:
            raise NotImplementedError("this stand-in for `autoattack` has no TensorFlow attacks")
        super().__init__(
            model,
            attacks=list(attacks_to_run) or None,
            device=device,
            eps=eps,
            norm=norm,
            seed=seed,
            version=version,
        )
        self.verbose = verbose
        self._log_path = log_path

    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        with self._log():
            x_adv, y_adv = super().run_standard_evaluation(x_orig, y_orig, batch_size=bs, state_path=state_path)
        return (x_adv, y_adv) if return_labels else x_adv

    def run_standard_evaluation_individual(self, x_orig, y_orig, bs=250, return_labels=False):
        # Written out: the base class would call the method above with its own argument names.
        everything = self.attacks_to_run
        results = {}
        try:
            for attack in everything:
                self.attacks_to_run = [attack]
                results[attack] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
        finally:
            self.attacks_to_run = everything
        return results

    @contextlib.contextmanager
    def _log(self) -> Iterator[None]:
        """Print and file the log as the original does; pyautoattack's goes nowhere by default."""
        handlers: list[logging.Handler] = []
        if self.verbose:
            handlers.append(logging.StreamHandler(sys.stdout))
        if self._log_path:
            handlers.append(logging.FileHandler(self._log_path))
        level = self.logger.level
        for handler in handlers:
            self.logger.addHandler(handler)
        if handlers:
            self.logger.setLevel(logging.DEBUG)
        try:
            yield
        finally:
            self.logger.setLevel(level)
            for handler in handlers:
                self.logger.removeHandler(handler)
                handler.close()
