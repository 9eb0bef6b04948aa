"""What is done to residual streams at marked tokens: nothing, a vector added, or a cap.

Runs inside tracing contexts and may run on a server: torch and builtins only.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from persona_nns.tracing.averages import normalised
from persona_nns.tracing.steering import cap, steer

OperationName = Literal["none", "add", "cap"]


@dataclass(frozen=True, eq=False)
class Operation:
    """What is done at the inputs of some blocks.

    Attributes:
        name: ``none``; ``add``: h + α v_L; ``cap``: h − max(0, h·v̂_L − τ) v̂_L.
        vector: [n_layers + 1, d_model].
        amount: α of ``add``, τ of ``cap``.
        layers: the blocks.
    """

    name: OperationName
    vector: Tensor
    amount: float
    layers: tuple[int, ...] = ()

    def __call__(self, hidden: Tensor, layer: int, marks: Tensor) -> Tensor:
        """The stream entering a block, changed.

        Args:
            hidden: [row, column, d_model].
            layer: the block.
            marks: [row, column], 1 on the tokens at which it acts.
        """
        vector, marks = self.vector[layer].to(hidden.device), marks.to(hidden.device)
        if self.name == "add":
            return steer(hidden, vector, self.amount * marks)
        if self.name == "cap":
            return cap(hidden, normalised(vector), self.amount, marks)
        return hidden
