"""The identity of a model or an adapter from its files: a digest of all that the caches it computes depend on.

Machines that share a store must find the same identity for the same weights, so nothing of a path, a file's name or its time
counts, nor how tensors are spread over files. Weights are read from safetensors files by tensor. Of a large tensor a sample is
read, `PLACES` spans of `SPAN_BYTES` at fixed distances, the first and the last bytes among them: training, merging and
quantization change nearly every value of the tensors they touch, so they are seen. A change that touches none of the sampled
bytes, such as of a few rows of a large embedding, is not seen. Tensors of at most `PLACES * SPAN_BYTES` (72 KiB) are read
whole, and so are configurations and code. Other formats (.bin, .pt, .gguf) are sampled as files; nothing is ever unpickled.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import InvalidArgument
from ..key_digest import Part, digest

SPAN_BYTES = 4096
PLACES = 18
MOST_SPANS = 65536
"""Of a model in all; of models of very many tensors fewer are read of each, but always the first and the last one."""
FILE_PLACES = 4096
"""Spans that are read of a file whose tensors are not known."""
FILE_START = 16 << 20
"""Read whole at the beginning of such a file: where GGUF has its metadata."""

_CONFIGS = (
    "config.json",
    "adapter_config.json",
    "params.json",
    "quantize_config.json",
    "quant_config.json",
    "hf_quant_config.json",
)
_FORMATS = (
    ("model.safetensors", ("*.safetensors",)),
    ("pytorch_model.bin", ("*.bin", "*.pt", "*.pth")),
    (None, ("*.gguf",)),
)
"""Of formats of weights, in the order in which engines prefer them: the file of an unsplit model, and patterns of all files."""
_NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
_OF_NO_EFFECT = frozenset(
    {
        "_name_or_path", "_commit_hash", "transformers_version", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
        "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    }
)  # fmt: skip
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_MOST_HEADER_BYTES = 100_000_000


class UnknownModel(InvalidArgument):
    """The files of a model or an adapter are not found, or hold no weights that kvtc can read."""


def files_identity(place: Path) -> str:
    """The identity of the model or adapter in a folder, or in a file of its own (GGUF): "files:" and 32 hexadecimal digits.

    Two copies of one model have one identity, also where they are split into other files. Reads some ten thousand spans
    of a few KiB at most, once in a process as long as the files stay as they are. Raises `UnknownModel`.
    """
    return _identity(_signature(place))


def find_model(name: str, revision: str | None = None, *, cache_dir: str | None = None, is_told: bool = True) -> Path:
    """The folder or file of a model that an engine names: a path, or a name of the Hugging Face hub, `name@revision` too.

    revision: of the hub; None: its default one. is_told: whether the engine tells it; where it does not, the only snapshot
    on this machine is taken, and several are refused. cache_dir: where the hub's snapshots are; None: in their usual place.
    Nothing is downloaded. Raises `UnknownModel`.
    """
    try:
        path = Path(name).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # no permission, a name too long, an unknown user
        raise UnknownModel(f"there are no files at {name:.200}: {error}") from error
    name, _, given = name.partition("@")
    revision = given or revision
    if not _HUB_NAME.fullmatch(name):
        raise UnknownModel(f"there are no files at {path}")
    try:
        from huggingface_hub import constants, snapshot_download
    except ImportError as error:
        raise UnknownModel(
            f"there are no files at {path}, and without huggingface_hub no name can be looked up"
        ) from error
    if revision is None and not is_told:
        root = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
        found = sorted(root.iterdir()) if root.is_dir() else []
        if len(found) > 1:
            raise UnknownModel(
                f"there are {len(found)} revisions of {name} on this machine, and the engine does not tell which one it "
                f"serves; expected name@revision, such as {name}@{found[0].name}"
            )
        if found:
            return found[0]
    try:
        return Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
    except Exception as error:  # the hub's library has many, and a model that is not there is what they all mean
        at = "" if revision is None else f" at revision {revision}"
        raise UnknownModel(f"the files of {name}{at} are not on this machine: {type(error).__name__}") from error


def config_of(place: Path) -> dict[str, Any]:
    """The configuration of the model in a folder, empty where there is none. Raises `UnknownModel`."""
    path = place / "config.json"
    return _read_json(path) if path.is_file() else {}


@dataclass(frozen=True)
class _File:
    """A file as it is now, as far as can be told without reading it.

    name: what it is called where it was found, for the hub's snapshots are links to nameless files.
    """

    path: Path
    name: str
    n_bytes: int
    changed_ns: int
    status_changed_ns: int
    inode: int


def _signature(place: Path) -> tuple[_File, ...]:
    """All files that count."""
    try:
        if place.is_file():
            return (_stat(place),)
        if not place.is_dir():
            raise UnknownModel(f"there are no files at {place}")
        weights = _weight_files(place)
        others = [place / name for name in _CONFIGS if (place / name).is_file()] + sorted(place.glob("*.py"))
        return tuple(_stat(path) for path in [*others, *weights])
    except OSError as error:
        raise UnknownModel(f"the files at {place} cannot be read: {error.strerror or error}") from error


def _stat(path: Path) -> _File:
    found = path.stat()
    return _File(path.resolve(), path.name, found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def loaded_files(place: Path) -> list[Path]:
    """Those of the files of weights that transformers loads. Raises `UnknownModel`."""
    whole = place / "model.safetensors"
    return [place] if place.is_file() else [whole] if whole.is_file() else _weight_files(place)


def _weight_files(folder: Path) -> list[Path]:
    """The files that engines load from a folder: those of an index, or all of the first format of which there are any.

    The file of an unsplit model beside an index counts too: some engines load it, some what the index names.
    """
    for whole, patterns in _FORMATS:
        if whole and (index := folder / f"{whole}.index.json").is_file():
            names = _read_json(index).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
                raise UnknownModel(f"{index} does not say which tensor is in which file")
            unsplit = {whole} if (folder / whole).is_file() else set()
            return [folder / name for name in sorted({*names.values(), *unsplit})]
        found = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if found := [path for path in found if not _NO_WEIGHTS.fullmatch(path.name)]:
            return found
    raise UnknownModel(f"there are no weights in {folder}: no .safetensors, .bin, .pt, .pth or .gguf file")


@functools.lru_cache(maxsize=256)
def _identity(files: tuple[_File, ...]) -> str:
    configs: list[Part] = []
    others: list[bytes] = []
    tensors: list[_Tensor] = []
    try:
        for file in files:
            if file.name in _CONFIGS:
                configs.append([file.name, without_effect(_read_json(file.path))])
            elif file.name.endswith(".py"):
                others.append(digest("code", name=file.name, contents=file.path.read_bytes()))
            elif file.name.endswith(".safetensors"):
                tensors += _tensors_of(file.path, file.n_bytes)
            else:
                others.append(_sampled_file(file.path, file.n_bytes))
        contents = sorted(_digests_of(tensors))
    except OSError as error:
        raise UnknownModel(f"the files of a model cannot be read: {error}") from error
    # Sorted, for neither the order of the files nor in which of them a tensor lies counts.
    found = digest("model files", configs=configs, tensors=contents, others=sorted(others))
    return f"files:{found.hex()[:32]}"


@dataclass(frozen=True)
class _Tensor:
    """A tensor of a safetensors file: where its bytes are."""

    path: Path
    start: int
    n_bytes: int
    name: str
    dtype: str
    shape: tuple[int, ...]


def _tensors_of(path: Path, n_bytes: int) -> list[_Tensor]:
    """All tensors that the header of a file tells of."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if n_bytes < 8 or length > min(n_bytes - 8, _MOST_HEADER_BYTES):
            raise UnknownModel(f"{path} is not a safetensors file: it says that its header has {length} bytes")
        header = _parse_json(path, file.read(length))
    start = 8 + length
    tensors = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            first, stop = (int(at) for at in entry["data_offsets"])
            tensor = _Tensor(
                path, start + first, stop - first, name, str(entry["dtype"]), tuple(map(int, entry["shape"]))
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UnknownModel(f"{path} is not a safetensors file: it does not say where tensor {name} is") from error
        if not 0 <= first <= stop <= n_bytes - start:
            raise UnknownModel(f"{path} is not a safetensors file: tensor {name} is said to lie beyond its end")
        tensors.append(tensor)
    return tensors


def _digests_of(tensors: list[_Tensor]) -> Iterator[bytes]:
    """Of each tensor its name, dtype, shape, and its bytes or a sample of them."""
    places = max(2, min(PLACES, MOST_SPANS // max(1, len(tensors))))
    path: Path | None = None
    file: BinaryIO | None = None
    try:
        for tensor in sorted(tensors, key=lambda one: (one.path, one.start)):
            if tensor.path != path or file is None:
                if file is not None:
                    file.close()
                path, file = tensor.path, tensor.path.open("rb", buffering=0)
            spans = [(0, tensor.n_bytes)] if tensor.n_bytes <= places * SPAN_BYTES else _spans(tensor.n_bytes, places)
            sample = _sampled(file, tensor.start, spans)
            yield digest("tensor", name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, sample=sample)
    finally:
        if file is not None:
            file.close()


def _sampled_file(path: Path, n_bytes: int) -> bytes:
    """Of a file whose tensors are not known: its size, its beginning and spans of the rest, or all of a small one."""
    n_sampled = FILE_START + FILE_PLACES * SPAN_BYTES
    spans = [(0, n_bytes)]
    if n_bytes > n_sampled:
        spans = [(0, FILE_START)]
        spans += [(FILE_START + start, length) for start, length in _spans(n_bytes - FILE_START, FILE_PLACES)]
    with path.open("rb", buffering=0) as file:
        return digest("file", n_bytes=n_bytes, sample=_sampled(file, 0, spans))


def _spans(n_bytes: int, places: int) -> list[tuple[int, int]]:
    """(start, length) of so many spans at even distances, the first at the beginning and the last at the end."""
    last = n_bytes - SPAN_BYTES
    return [(index * last // (places - 1), SPAN_BYTES) for index in range(places)]


def _sampled(file: BinaryIO, start: int, spans: Iterable[tuple[int, int]]) -> bytes:
    """SHA-256 of spans of a file; OSError where it ends before them."""
    found = hashlib.sha256()
    for at, length in spans:
        file.seek(start + at)
        while length:
            if not (data := file.read(min(length, 1 << 20))):
                raise OSError(f"{file.name} ends before byte {start + at + length}")
            found.update(data)
            length -= len(data)
    return found.digest()


def without_effect(value: Any, more: Collection[str] = ()) -> Any:
    """A configuration without the fields that no cache depends on, in nested ones too. more: other fields to leave out."""
    if isinstance(value, Mapping):
        return {
            name: without_effect(item, more)
            for name, item in value.items()
            if name not in _OF_NO_EFFECT and name not in more
        }
    return [without_effect(item, more) for item in value] if isinstance(value, list) else value


def _read_json(path: Path) -> dict[str, Any]:
    return _parse_json(path, path.read_bytes())


def _parse_json(path: Path, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnknownModel(f"{path} does not hold JSON: {error}") from error
    if not isinstance(value, dict):
        raise UnknownModel(f"{path} holds JSON of another kind than expected: {type(value).__name__}, not an object")
    return value
