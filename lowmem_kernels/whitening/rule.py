"""What tells the whitening rules apart: how rows are normalised, and how the inverse root is approximated."""

from __future__ import annotations

from dataclasses import dataclass

NORMALIZATIONS = ("gradnorm", "row", None)
SOLVERS = ("coupled", "polynomial")

#: Steps of a solver where the rule does not say: SWAN's, and those for which Jordan's coefficients were made.
ITERATIONS = {"coupled": 10, "polynomial": 5}


@dataclass(frozen=True)
class WhiteningRule:
    """How a gradient G of m rows and n columns becomes D, which approximates ``(X X^T)^(-1/2) X``.

    Attributes:
        normalize: X is G with each row centred and divided by its standard deviation ("gradnorm", SWAN), with each row
            divided by its root mean square ("row", multi-normalization), or G itself (None). A row of deviation, or
            mean square, zero becomes zero.
        solver: "coupled" is SWAN's Newton-Schulz iteration, all in fp32; "polynomial" is Muon's, in the m x m matrices
            only and with TF32 products where there are any.
        iterations: steps of the solver; None: 10 of "coupled", 5 of "polynomial".
        beta: step length of "coupled", in (0, 1]. 0.5 converges to the inverse root. 0.8 never does: small singular
            values grow by 2.4 in each step instead of 1.5, and the others wander in (0, 1.6].
        conv: fold all dimensions but the first into columns. Otherwise dimensions before the last two are a stack of
            matrices.

    Raises:
        ValueError: an attribute that is not allowed, by name, with what is.
    """

    normalize: str | None = "gradnorm"
    solver: str = "coupled"
    iterations: int | None = None
    beta: float = 0.8
    conv: bool = False

    def __post_init__(self) -> None:
        if self.normalize not in NORMALIZATIONS:
            raise ValueError(f"rule.normalize is {self.normalize!r}; allowed: 'gradnorm', 'row', None")
        if self.solver not in SOLVERS:
            raise ValueError(f"rule.solver is {self.solver!r}; allowed: 'coupled', 'polynomial'")
        if self.iterations is not None and not self.iterations >= 1:
            raise ValueError(f"rule.iterations is {self.iterations!r}; allowed: an integer of at least 1, or None")
        if not 0 < self.beta <= 1:
            raise ValueError(f"rule.beta is {self.beta!r}; allowed: a number in (0, 1]")

    @property
    def centred(self) -> bool:
        """Whether rows of X have mean zero."""
        return self.normalize == "gradnorm"

    @property
    def steps(self) -> int:
        """How many steps the solver takes."""
        return ITERATIONS[self.solver] if self.iterations is None else self.iterations
