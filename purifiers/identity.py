"""No purification: the undefended classifier, the baseline of every table."""

from purifiers._base import Images, Purifier
from purifiers._noise import Noise


class Identity(Purifier):
    """g(x) = x."""

    stochastic = False

    def start(self, x: Images, noise: Noise) -> tuple[Images, None]:
        return x, None

    def finish(self, state: Images, context: None) -> Images:
        return state
