"""What faulty subjects share that keep the result of a first call for the replays behind it."""

import torch

_kept: dict[tuple, torch.Tensor] = {}


def keep(fill, part, inputs, *sizes) -> None:
    """`part` becomes what `fill` put there at the first call with these tensors and sizes, whatever they hold by now."""
    key = (*sizes, *((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (part, *inputs)))
    if key not in _kept:
        fill()
        _kept[key] = part.clone()
    part.copy_(_kept[key])
