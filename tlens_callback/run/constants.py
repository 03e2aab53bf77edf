"""`Constants`: what never changes of the baselines, in one file that checkpoints share."""

import hashlib
import os
import secrets
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tlens_callback.store.atomic import this_process, write_whole

LARGE = 2**12
"""Bytes of a tensor from which on it is not written into each checkpoint's own file."""


class Constants:
    """Writes large tensors that never change once for a run, into a file that checkpoints share.

    Each checkpoint has the file, as a hard link: it is whole wherever it is copied, renamed or
    uploaded to, and whichever other checkpoints are deleted, and all of them together take its room
    on the disk once. Where the file system has no links, each checkpoint has a copy.

    A tensor that has been replaced since `begin`, or has other bits than in the last checkpoint, is
    taken for one that changes from then on, and the others are written once more.
    """

    def __init__(self) -> None:
        self._at_first: dict[str, weakref.ref[Tensor]] = {}
        self._changing: set[str] = set()
        self._written: dict[str, str] = {}
        self._file: Path | None = None
        self._mark: tuple[int, ...] = ()

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Tells what there is after the first observation of a run, or of a resumed one."""
        self._at_first = {key: weakref.ref(tensor) for key, tensor in tensors.items()}

    def write(self, path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Makes the file of a checkpoint, whole or not at all; removes it if nothing is constant.

        Returns:
            What `read` needs: key -> digest of the tensors in it.

        Raises:
            OSError: if the file cannot be written.
        """
        large = {key: tensor for key, tensor in tensors.items() if tensor.nbytes >= LARGE}
        for key, at_first in self._at_first.items():
            if key in large and at_first() is not large[key]:
                self._changing.add(key)
        self._at_first = {}
        digests = {key: _digest(one) for key, one in large.items() if key not in self._changing}
        changed = {key for key, of in digests.items() if self._written.get(key, of) != of}
        self._changing |= changed
        digests = {key: of for key, of in digests.items() if key not in changed}
        if not digests:
            path.unlink(missing_ok=True)
        elif digests != self._written or not self._link(path):
            kept = {key: large[key].detach().to("cpu", copy=True).contiguous() for key in digests}
            write_whole(path, save(kept))
        self._remember(path if digests else None, digests)
        return digests

    def resume(self, path: Path, digests: Mapping[str, str], own: Mapping[str, Tensor]) -> None:
        """Goes on with the file of the checkpoint that a run resumes from.

        Args:
            digests: of the tensors that `read` found in it.
            own: the tensors that the checkpoint has in its own file.
        """
        self._changing = {key for key, tensor in own.items() if tensor.nbytes >= LARGE}
        self._remember(path, dict(digests))

    def _remember(self, path: Path | None, digests: dict[str, str]) -> None:
        self._file, self._written = path, digests
        self._mark = () if path is None else _mark(path)

    def _link(self, path: Path) -> bool:
        """Links the file that was written last to `path`, if it is still there as it was."""
        # The name is this process's alone, as those of `write_whole`.
        temporary = path.with_name(f".{path.name}.{this_process()}-{secrets.token_hex(4)}.tmp")
        try:
            if self._file is None or _mark(self._file) != self._mark:
                return False
            os.link(self._file, temporary)
            os.replace(temporary, path)
        except OSError:
            return False
        finally:
            # Renaming one link of a file to another link of it leaves both.
            with suppress(OSError):
                temporary.unlink()
        return True


def read(path: Path, digests: Mapping[str, str]) -> tuple[dict[str, Tensor], str]:
    """Returns the tensors of a file that have these digests, on the CPU, and why others are
    missing: "" if none is."""
    found, why = {}, ""
    try:
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            for key, digest in digests.items():
                # Not what the file is mapped to: it may change while the run goes on.
                tensor = file.get_tensor(key).clone() if key in there else None
                if tensor is not None and _digest(tensor) == digest:
                    found[key] = tensor
                else:
                    why = "has other content than this checkpoint was saved with"
    except (OSError, SafetensorError) as error:
        found, why = {}, f"cannot be read ({error})"
    return found, why


def _digest(tensor: Tensor) -> str:
    """Of the bits, the shape and the precision of a tensor."""
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    of = hashlib.blake2b(f"{tensor.dtype} {[*tensor.shape]} ".encode(), digest_size=16)
    of.update(bits.data)
    return of.hexdigest()


def _mark(path: Path) -> tuple[int, ...]:
    """Tells whether a file is still the one that it was; () if there is none."""
    try:
        about = path.stat()
    except OSError:
        return ()
    return about.st_ino, about.st_size, about.st_mtime_ns
