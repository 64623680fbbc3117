"""The text: Python's own standard library, as bytes, split by file; and the n-gram models that set the bar.

Every machine that can run the demo has this text, so there is nothing to download. A file is held out as a whole or
not at all: the model is judged on files it never saw. Which side a file falls on depends only on the hash of its
content, so the split is the same on every run, and two copies of one file never end up on different sides.

A vocabulary of 256 bytes needs no tokenizer, and makes the score comparable across models: bits per byte is what an
ideal compressor driven by the model would spend on a byte of held-out text. 8 is ignorance; a bigram needs about 3.5.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCAB = 256
END_OF_FILE = b"\0"  # never occurs inside Python source
HELD_OUT_PERCENT = 8
SKIPPED_FOLDERS = {
    *("site-packages", "dist-packages"),  # third parties
    *("test", "tests", "idle_test"),  # the interpreter's own tests: not on every machine
    *("encodings", "pydoc_data"),  # tables that happen to end in .py
}


@dataclass(frozen=True)
class Corpus:
    """Train and held-out text as (bytes,) uint8 tensors, and the files that they are joined from."""

    train: Tensor
    held_out: Tensor
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]


def standard_library() -> list[tuple[str, bytes]]:
    """Every source file of this interpreter's standard library: (path relative to its root, content)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (path.relative_to(root) for path in root.rglob("*.py"))
    return [(str(path), (root / path).read_bytes()) for path in files if SKIPPED_FOLDERS.isdisjoint(path.parts)]


def split(files: Iterable[tuple[str, bytes]], *, train_bytes: int, held_out_bytes: int) -> Corpus:
    """Assign each file to a side by the hash of its content, until the side has as many bytes as asked; then cut there.

    Files are taken in the order of their hashes: a shuffle that is the same everywhere.
    """
    sides: dict[str, list[tuple[str, bytes]]] = {"train": [], "held-out": []}
    room = {"train": train_bytes, "held-out": held_out_bytes}
    for digest, path, content in sorted((hashlib.sha256(content).digest(), path, content) for path, content in files):
        side = "held-out" if int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT else "train"
        if content and room[side] > 0:
            room[side] -= len(content)
            sides[side].append((path, content))
    for side, chosen in sides.items():
        if not chosen:
            raise ValueError(
                f"the text needs Python source files; the {side} side got none from {sysconfig.get_paths()['stdlib']}. "
                "Some distributions ship the standard library compiled only; use a Python that has its sources."
            )
    (train_paths, train), (held_out_paths, held_out) = (zip(*chosen, strict=True) for chosen in sides.values())
    return Corpus(
        train=_as_tensor(train)[:train_bytes],
        held_out=_as_tensor(held_out)[:held_out_bytes],
        train_files=train_paths,
        held_out_files=held_out_paths,
    )


def _as_tensor(contents: Iterable[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(END_OF_FILE.join(contents)), dtype=torch.uint8)


def sample_batch(text: Tensor, batch: int, length: int, generator: torch.Generator) -> Tensor:
    """``batch`` windows of ``length + 1`` bytes at random places, int64: inputs are [:, :-1], targets [:, 1:]."""
    starts_B = torch.randint(len(text) - length, (batch,), generator=generator)
    return text[starts_B[:, None] + torch.arange(length + 1)].long()


def unigram_bits_per_byte(train: Tensor, held_out: Tensor) -> float:
    """Bits per byte of a model that knows only how often each byte occurs (add-one smoothed)."""
    return -_unigram(train).log2()[held_out[1:].long()].mean().item()


def bigram_bits_per_byte(train: Tensor, held_out: Tensor, prior_weight: float = 4.0) -> float:
    """Bits per byte of an interpolated bigram model: the most that one byte of context can tell.

    P(b | a) = (count(a, b) + w P(b)) / (count(a) + w): relative frequency, backed off to the unigram as if every
    context had been seen w = ``prior_weight`` times more. With megabytes of text for 256 × 256 cells, any w from 0.5 to
    16 gives the same result to 0.001.
    """
    pairs = train[:-1].long() * VOCAB + train[1:].long()
    counts_VV = torch.bincount(pairs, minlength=VOCAB * VOCAB).view(VOCAB, VOCAB).double()
    probability_VV = (counts_VV + prior_weight * _unigram(train)) / (counts_VV.sum(1, keepdim=True) + prior_weight)
    return -probability_VV.log2()[held_out[:-1].long(), held_out[1:].long()].mean().item()


def _unigram(train: Tensor) -> Tensor:
    counts_V = torch.bincount(train.long(), minlength=VOCAB).double() + 1.0
    return counts_V / counts_V.sum()
