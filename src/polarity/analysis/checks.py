"""What each public function of this room asks of its inputs, so that a wrong type is no wrong number."""

from typing import Any

import torch
from torch import Tensor

from polarity.errors import UserError


def booleans(**tensors: Any) -> list[Tensor]:
    """The tensors (or arrays, or lists), which must be booleans: 0 and 1 as integers would index rows, not choose them.

    Raises UserError that names the argument.
    """
    found = []
    for name, value in tensors.items():
        tensor = torch.as_tensor(value)
        if tensor.dtype != torch.bool:
            raise UserError(f"{name} is {tensor.dtype}; it is a boolean for each row or token: give {name}.bool()")
        found.append(tensor)
    return found
