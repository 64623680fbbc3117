"""Rows that some rank needs, to where it reads them: see ``parallel/push.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from supersonic_moe.kernels.interface import Banks


def push_rows(rows_TC: Tensor, copy_TR: Tensor, own_TC: Tensor, to: Banks) -> None:
    for rank, needed_T in enumerate((copy_TR >= 0).T):
        arriving = own_TC if rank == to.rank else _places(to, rank, rows_TC)[to.rank, : len(rows_TC)]
        arriving[needed_T] = rows_TC[needed_T]


def needed_rows(ids_UK: Tensor, experts: int, ranks: int) -> Tensor:
    here = ((ids_UK >= 0) & (ids_UK < experts)).any(1)
    place, rank = here.view(ranks, -1).T.nonzero(as_tuple=True)
    found = torch.zeros(1 + len(here), dtype=torch.int32, device=here.device)
    found[0] = len(rank)
    found[1 : 1 + len(rank)] = rank * (len(here) // ranks) + place
    return found


def push_back(rows_UC: Tensor, needed: Tensor, to: Banks) -> None:
    rows_RMC, needed_RM = _of_exchange(rows_UC, to), _mask(needed, to)
    for rank, needed_M in enumerate(needed_RM):
        _places(to, rank, rows_UC)[to.rank][needed_M] = rows_RMC[rank][needed_M]


def take_rows(out_UC: Tensor, needed: Tensor, of: Banks) -> None:
    needed_RM = _mask(needed, of)
    needed_RM[of.rank] = False
    _of_exchange(out_UC, of)[needed_RM] = _places(of, of.rank, out_UC)[needed_RM]


def _places(banks: Banks, rank: int, like: Tensor) -> Tensor:
    """(R, each, C) in the bank of a rank."""
    shape = len(banks.bytes_R), banks.each, like.shape[1]
    size = shape[0] * shape[1] * shape[2] * like.element_size()
    return banks.bytes_R[rank][:size].view(like.dtype).view(shape)


def _of_exchange(rows_UC: Tensor, banks: Banks) -> Tensor:
    """(R, each, C) of R·M rows, as a view."""
    rows_RMC = rows_UC.view(-1, banks.places, rows_UC.shape[1])
    return rows_RMC[:, banks.first : banks.first + banks.each]


def _mask(needed: Tensor, banks: Banks) -> Tensor:
    """(R, each) bool"""
    mask = torch.zeros(len(needed) - 1, 1, dtype=torch.bool, device=needed.device)
    mask[needed[1 : 1 + int(needed[0])].long()] = True
    return _of_exchange(mask, banks)[:, :, 0]
