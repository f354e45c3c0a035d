"""What a calibration has done so far, in a folder, so that one that was interrupted goes on where it was.

Each phase has a file of its own, a safetensors file that names what it belongs to: the model and all options. A file of another
calibration is not read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from ..errors import InvalidArgument
from ..process.progress import note

SECONDS_BETWEEN = 120.0
"""Between two times that one phase is saved; so much work is lost at most."""
_OWNER = "calibration"


class Checkpoint:
    """The files of one calibration.

    Parameters:
        directory: where they are; made when the first is written. None: nothing is kept.
        owner: which calibration they belong to, a digest.

    Raises:
        InvalidArgument: where the directory cannot be made.
    """

    def __init__(self, directory: str | Path | None, owner: str) -> None:
        self._directory = None if directory is None else Path(directory)
        self._owner = owner
        self._saved = time.monotonic()
        if self._directory is not None:
            try:
                self._directory.mkdir(mode=0o700, exist_ok=True)
            except OSError as error:
                raise InvalidArgument(f"cannot keep what is done in {self._directory}: {error}") from error

    @property
    def is_due(self) -> bool:
        """Whether a phase that is not done should be saved now."""
        return self._directory is not None and time.monotonic() - self._saved >= SECONDS_BETWEEN

    def load(self, phase: str) -> dict[str, Tensor] | None:
        """What was saved of a phase; None where nothing of this calibration was, or a file is damaged."""
        if self._directory is None:
            return None
        try:
            with safetensors.safe_open(self._directory / f"{phase}.safetensors", framework="pt") as file:
                if (file.metadata() or {}).get(_OWNER) != self._owner:
                    return None
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError):
            return None

    def save(self, phase: str, tensors: dict[str, Tensor]) -> None:
        """Keep these tensors, in place of what was kept of the phase."""
        if self._directory is None:
            return
        on_host = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        path, partial = (self._directory / f"{phase}{suffix}" for suffix in (".safetensors", ".part"))
        try:
            # Written as they are: as bytes in memory they would take their size once more.
            safetensors.torch.save_file(on_host, partial, {_OWNER: self._owner})
            partial.replace(path)
        except (OSError, safetensors.SafetensorError) as error:
            # The work itself is unharmed.
            note(f"cannot keep what is done: {error}")
        self._saved = time.monotonic()

    def once(self, phase: str, work: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of a phase: those that were saved, or those that `work` gives, which are then saved."""
        found = self.load(phase)
        if found is not None:
            note(f"{phase}: done before")
            return found
        made = work()
        self.save(phase, made)
        return made
