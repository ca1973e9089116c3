"""Text through a BERT-style encoder: checkpoints, token ids in place of texts, and encodings of what is left of them.

A word that is dropped has to be dropped *before* the encoder: its neighbours' vectors were made with it, so a stored
sequence of vectors without its own still tells of it (`leak` measures how much). So texts become token ids, a mask
replaces ids by [UNK] between [CLS] and the last [SEP] and leaves the attention mask as it was (LNLN's protocol), and
the encoder reads what is left: inside a model that is trained with it, or once, frozen, with `encode`.

    splits = load("mosi", root, text="ids")                       # ids that the file brings, or
    data = with_ids(data, transcripts("mosi", root), checkpoint)  # ids of your own texts
    train, tests = lnln_protocol(seed)
    masked = tests["r=0.4"].draw(data).apply(data, keep_complete=True)
    model = DEAR.for_data(data, load_encoder(checkpoint))         # reads ids, fine-tunes the encoder
    frozen = encode(masked, load_encoder(checkpoint))             # vectors, for any model

Checkpoints are read with `transformers` (``pip install mmlib[text]``) from a folder, or by name from its cache; nothing
is downloaded unless that is asked for. Encodings are kept in a cache folder: see `avmnist.cache_folder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..batch import DATASET, MultimodalBatch, MultimodalDataset
from ..checks import PATH, Flag, Is, Maybe, Several, Text, Whole
from ..files import atomic_write
from ..layers import scoring
from ._readers import cache_folder, fingerprint

__all__ = ["encode", "leak", "load_encoder", "load_tokenizer", "tokenise", "with_ids"]

MAX_LENGTH = 50  # tokens of an utterance in MMSA's and LNLN's files
_CACHE_VERSION = 1
# Without any of them, transformers makes a tokenizer that knows the special tokens alone
_VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "spm.model",
                 "sentencepiece.bpe.model")  # fmt: skip


def load_encoder(checkpoint: str | os.PathLike[str], download: bool = False) -> nn.Module:
    """The encoder in a `transformers` checkpoint, in float32 and eval mode: a folder, or a name such as
    "bert-base-uncased".

    download : fetch a name that is not in the cache of `transformers`
    Raises FileNotFoundError for a folder that is not there, ValueError for what is not a checkpoint of a text encoder
    (no or a damaged config.json or weights, an encoder-decoder), ImportError without `transformers`.
    """
    PATH("checkpoint", checkpoint)
    Flag()("download", download)
    transformers = _transformers()
    with _reading(checkpoint, "model"):
        model, found = transformers.AutoModel.from_pretrained(
            _place(checkpoint), dtype=torch.float32, local_files_only=not download, output_loading_info=True
        )
    about = model.config
    # Weights that are not in the file would stay random, and layers that config.json does not count be left out. The
    # pooler and the heads of tasks are not used here.
    missing = [name for name in found["missing_keys"] if "pooler" not in name]
    ignored = [name for name in found["unexpected_keys"] if "layer." in name and name.partition(".")[0] != "cls"]
    if wrong := sorted([*missing, *map(str, found["mismatched_keys"]), *ignored]):
        raise ValueError(
            f"checkpoint: the weights in {os.fspath(checkpoint)!r} are not those of its config.json: {len(wrong)} are "
            f"missing, of another shape, or left over, such as {wrong[0]}"
        )
    if bad := [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]:
        raise ValueError(f"checkpoint: {os.fspath(checkpoint)!r} has NaN or infinite weights in {bad[0]}")
    if getattr(about, "is_encoder_decoder", False) or not isinstance(getattr(about, "hidden_size", None), int):
        raise ValueError(
            f"checkpoint: expected a BERT-style text encoder, got {about.model_type!r} in {os.fspath(checkpoint)!r}"
        )
    return model.eval()


def load_tokenizer(checkpoint: str | os.PathLike[str], download: bool = False) -> Any:
    """The tokenizer of a checkpoint; errors as for `load_encoder`, and ValueError where it has no [UNK] or no ends."""
    PATH("checkpoint", checkpoint)
    Flag()("download", download)
    with _reading(checkpoint, "tokenizer"):
        folder = Path(_place(checkpoint))
        if folder.is_dir() and not any((folder / name).is_file() for name in _VOCABULARIES):
            raise ValueError(
                f"checkpoint: {str(folder)!r} has no vocabulary, that is none of {', '.join(_VOCABULARIES)}"
            )
        tokenizer = _transformers().AutoTokenizer.from_pretrained(_place(checkpoint), local_files_only=not download)
        about = folder / "config.json"
        size = int(json.loads(about.read_bytes())["vocab_size"]) if about.is_file() else None
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("unk", "cls", "sep", "pad")}
    if lacking := [name for name, value in ids.items() if value is None]:
        raise ValueError(f"checkpoint: the tokenizer of {os.fspath(checkpoint)!r} has no {', '.join(lacking)} token")
    if size is not None and not size - 256 < len(tokenizer) <= size:  # vocabularies are filled up to round numbers
        raise ValueError(
            f"checkpoint: the tokenizer of {os.fspath(checkpoint)!r} has {len(tokenizer)} tokens, its config.json says "
            f"{size}; the vocabulary is cut short, or another encoder's"
        )
    return tokenizer


TEXTS = Several(Maybe(Text), 1)


def tokenise(
    texts: Sequence[str | None], checkpoint: Any, max_length: int = MAX_LENGTH
) -> tuple[Tensor, Tensor, list[int]]:
    """Token ids int64 [n, L], valid bool [n, L], and the places of the texts that were longer and lost their end.

    Every text is [CLS], its words, [SEP], padding; None and the empty text have the two ends alone.

    checkpoint : a folder or name, or a tokenizer
    max_length : L, at least 2. Raises ValueError where the tokenizer's encoder reads fewer, TypeError for other texts
    """
    Whole(2)("max_length", max_length)
    TEXTS("texts", texts)
    tokenizer = checkpoint if callable(checkpoint) else load_tokenizer(checkpoint)
    if not 2 <= max_length <= tokenizer.model_max_length:
        raise ValueError(
            f"max_length: expected 2 to {tokenizer.model_max_length} tokens, which the encoder reads, got {max_length}"
        )
    said = [t or "" for t in texts]
    whole = tokenizer(said, truncation=True, max_length=max_length, padding="max_length", return_tensors="pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counts = [len(ids) for ids in tokenizer(said, verbose=False)["input_ids"]]
    longer = [i for i, count in enumerate(counts) if count > max_length]
    return whole["input_ids"].long(), whole["attention_mask"].bool(), longer


def with_ids(
    data: MultimodalDataset,
    texts: Sequence[str | None] | Mapping[str, str | None],
    checkpoint: Any,
    *,
    modality: str = "language",
    max_length: int = MAX_LENGTH,
) -> MultimodalDataset:
    """The data set with token ids of ``texts`` as a modality: in place of the one of that name, or in front of all.

    texts : one a sample, or a mapping from ``data.names``, such as `mmsa.transcripts`. A blank text is a missing one
    checkpoint, max_length : as `tokenise` takes them; ``fill`` becomes the tokenizer's [UNK]

    ``info`` adds ``truncated``: how many texts were longer. Raises ValueError for names without a text, and for data
    that a mask was already applied to.
    """
    Text("modality", modality)
    if not isinstance(texts, Mapping):
        TEXTS("texts", texts)
    if DATASET("data", data).data.complete is not None:
        raise ValueError("data: expected what is there by nature; a mask was applied already")
    if isinstance(texts, Mapping):
        names = data.names or []
        if unknown := [name for name in names if name not in texts] or ([] if names else ["(data without names)"]):
            raise ValueError(f"texts: nothing for {len(unknown)} samples, the first {unknown[:3]}")
        texts = [texts[name] for name in names]
    if len(texts) != len(data):
        raise ValueError(f"texts: expected {len(data)}, one a sample, got {len(texts)}")
    tokenizer = checkpoint if callable(checkpoint) else load_tokenizer(checkpoint)
    ids, valid, longer = tokenise(texts, tokenizer, max_length)
    there = torch.tensor([t is not None and bool(t.strip()) for t in texts])
    batch, device = data.data, data.device
    order = list(data.modalities) if modality in data.modalities else [modality, *data.modalities]
    columns = [there.to(device) if m == modality else batch.present[..., batch.index(m)] for m in order]
    rest = [m for m in order if m != modality]
    changed = batch.replace(
        features={m: ids.to(device) if m == modality else batch.features[m] for m in order},
        present=torch.stack(columns, -1),
        valid={**{m: batch.valid[m] for m in rest}, modality: valid.to(device)},
        observed={**{m: batch.observed[m] for m in rest}, modality: (valid & there[:, None]).to(device)},
        fill={**{m: f for m, f in batch.fill.items() if m != modality}, modality: tokenizer.unk_token_id},
    )
    made = MultimodalDataset(changed, {**data.info, "text": "ids", "truncated": len(longer)}, data.names)
    made.info["fingerprint"] = fingerprint(made)
    return made


# --- encodings --------------------------------------------------------------------------------------------------------


def encode(
    data: MultimodalDataset,
    encoder: nn.Module,
    *,
    modality: str = "language",
    batch_size: int = 64,
    cache: bool = True,
) -> MultimodalDataset:
    """The data set with the encoder's vectors [T, D] in place of a modality's token ids, and in ``complete`` too.

    The vectors are of the ids as they are now: mask first, then encode. A [UNK] has a vector like any token, which is
    not zero although ``observed`` says that the word was dropped; masking the result again would zero it.

    encoder : as `load_encoder` gives it; it runs in eval mode, without gradients, where it is
    cache : keep the vectors of valid tokens in the cache folder, under a name that depends on ids, masks and weights

    Raises ValueError for a modality without token ids, ids outside the vocabulary and texts longer than the encoder.
    """
    Is("an nn.Module", nn.Module)("encoder", encoder)
    Text("modality", modality)
    Whole(1)("batch_size", batch_size)
    Flag()("cache", cache)
    batch = DATASET("data", data).data
    weights = _weights(encoder) if cache else ""
    whole = batch.complete
    made = _encoded(batch, encoder, modality, batch_size, weights)
    if whole is not None:
        made = made.replace(complete=_encoded(whole, encoder, modality, batch_size, weights))
    result = MultimodalDataset(made, {**data.info, "text": "encoded ids"}, data.names)
    if "fingerprint" in data.info:
        result.info["fingerprint"] = fingerprint(result)
    return result


@torch.no_grad()
def leak(
    data: MultimodalDataset, encoder: nn.Module, *, modality: str = "language", **options: Any
) -> dict[str, float]:
    """How far zeroing stored vectors is from encoding again, over the words that the mask left: their vectors change.

    data : token ids, masked with ``keep_complete=True``
    Returns ``tokens``, how many were left (without the two ends); ``relative``, the mean of |a - b| / |a| between a
    word's vector in the complete text, which a feature-level drop keeps, and its vector in the text with [UNK];
    ``cosine``, their mean cosine. Were there no leak: 0 and 1. NaN where no word is left.
    """
    if DATASET("data", data).data.complete is None:
        raise ValueError("data: expected what was there before; apply the mask with keep_complete=True")
    again = encode(data, encoder, modality=modality, **options).data
    assert again.complete is not None
    before = again.valid[modality].cumsum(-1)
    inner = (before > 1) & (before < before[..., -1:])
    kept = again.observed[modality] & inner
    a, b = again.complete.features[modality][kept].double(), again.features[modality][kept].double()
    return {
        "tokens": len(a),
        "relative": float(((a - b).norm(dim=-1) / a.norm(dim=-1)).mean()),
        "cosine": float(torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()),
    }


def _encoded(batch: MultimodalBatch, encoder: nn.Module, modality: str, size: int, weights: str) -> MultimodalBatch:
    ids, valid = batch.features[batch.modalities[batch.index(modality)]], batch.valid[modality]
    if ids.is_floating_point():
        raise ValueError(f"modality: expected token ids in {modality!r}, got {ids.dtype} {tuple(ids.shape)}")
    about = getattr(encoder, "config", None)
    vocabulary = getattr(about, "vocab_size", None)
    longest = getattr(about, "max_position_embeddings", None)
    if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"features[{modality!r}]: expected ids in [0, {vocabulary}), the encoder's vocabulary, got values from "
            f"{int(ids.min())} to {int(ids.max())}"
        )
    if longest is not None and ids.shape[-1] > longest:
        raise ValueError(
            f"features[{modality!r}]: expected at most {longest} tokens, which the encoder reads, got {ids.shape[-1]}"
        )
    if ids.ndim != 2:
        raise ValueError(f"data: expected samples [n], got the leading shape {batch.shape}")
    rows = valid.cpu()
    store = None
    if weights:
        digest = hashlib.sha256(f"{_CACHE_VERSION}|{weights}|{tuple(ids.shape)}|".encode())
        digest.update(torch.where(rows, ids.cpu(), 0).numpy().tobytes() + rows.numpy().tobytes())
        store = cache_folder() / f"text-{digest.hexdigest()[:24]}.npz"
    count = int(rows.sum())
    vectors = None if store is None else _read_cache(store, count)
    if vectors is None:
        vectors = _run(ids, valid, encoder, size)
        if store is not None:
            _write_cache(store, vectors)
    x = torch.zeros(*rows.shape, vectors.shape[-1])
    x[rows] = torch.from_numpy(vectors)
    fill = {m: f for m, f in batch.fill.items() if m != modality}
    return batch.replace(features={**batch.features, modality: x.to(batch.device)}, fill=fill, complete=None)


def _run(ids: Tensor, valid: Tensor, encoder: nn.Module, size: int) -> np.ndarray:
    """The vectors of the valid tokens, row by row, [tokens, D] float32. Texts of like length go together."""
    device = next(encoder.parameters()).device
    order = valid.sum(-1).cpu().argsort(stable=True)
    parts: dict[int, Tensor] = {}
    with scoring(encoder):
        for start in range(0, len(ids), size):
            places = order[start : start + size]
            seen = valid[places.to(valid.device)]
            length = max(int(seen.any(0).nonzero().amax()) + 1, 1) if seen.any() else 1
            seen = seen[:, :length].to(device)
            read = torch.where(seen, ids[places.to(ids.device), :length].to(device), 0)
            attended = seen | ~seen.any(-1, keepdim=True)  # a row of padding alone has no vectors to keep
            out = encoder(input_ids=read, attention_mask=attended.long())
            out = getattr(out, "last_hidden_state", out).float().cpu()
            for place, row, mask in zip(places.tolist(), out, seen.cpu(), strict=True):
                parts[place] = row[mask]
    return torch.cat([parts[i] for i in range(len(ids))]).numpy()


def _weights(encoder: nn.Module) -> str:
    """What an encoder is: its configuration, and every number in it."""
    about: Any = getattr(encoder, "config", None)
    told = about.to_dict() if hasattr(about, "to_dict") else {}
    digest = hashlib.sha256(f"{type(encoder).__name__}|{json.dumps(told, sort_keys=True, default=str)}".encode())
    for name, value in sorted(encoder.state_dict().items()):
        digest.update(f"|{name}|{tuple(value.shape)}|{value.dtype}|".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_cache(store: Path, count: int) -> np.ndarray | None:
    """What the file holds, or None where it is not there or damaged: then it is made again."""
    if not store.is_file():
        return None
    try:
        with np.load(store, allow_pickle=False) as kept:
            vectors, checksum = kept["vectors"], str(kept["checksum"])
        if len(vectors) == count and checksum == hashlib.sha256(vectors.tobytes()).hexdigest():
            return vectors
        problem = "its checksum does not match"
    except Exception as error:  # a damaged zip file raises almost anything
        problem = f"{type(error).__name__}: {error}"
    warnings.warn(f"the cache file {store} is damaged ({problem}); computing it again", stacklevel=5)
    return None


def _write_cache(store: Path, vectors: np.ndarray) -> None:
    """A full disk, or a folder where nothing can be written, costs a warning."""
    buffer = io.BytesIO()
    np.savez(buffer, vectors=vectors, checksum=np.array(hashlib.sha256(vectors.tobytes()).hexdigest()))
    try:
        atomic_write(store, buffer.getbuffer())
    except OSError as error:
        warnings.warn(
            f"could not write the cache file {store} ({error}); the texts are encoded all the same", stacklevel=5
        )


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError("text encoders need the package transformers: pip install mmlib[text]") from error
    return transformers


def _place(checkpoint: str | os.PathLike[str]) -> str:
    """The checkpoint as `transformers` takes it; FileNotFoundError or ValueError for a folder that is none."""
    place = os.fspath(checkpoint)
    folder = Path(place).expanduser()
    looks_like_a_path = isinstance(checkpoint, Path) or place.startswith((".", "~", os.sep)) or place.count("/") > 1
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            held = sorted(p.name for p in folder.iterdir())[:5]
            raise ValueError(
                f"checkpoint: {place!r} is not a transformers checkpoint, it has no config.json but {held}"
            )
        return str(folder)
    if looks_like_a_path or folder.exists():
        raise FileNotFoundError(f"checkpoint: no folder {place!r}")
    return place


@contextlib.contextmanager
def _reading(checkpoint: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Without progress bars, and with errors that name the checkpoint."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    except (FileNotFoundError, ImportError):
        raise
    except Exception as error:  # safetensors, json, tokenizers and the hub each have their own
        if isinstance(error, ValueError) and str(error).startswith("checkpoint:"):
            raise
        raise ValueError(
            f"checkpoint: could not read the {what} of {os.fspath(checkpoint)!r} ({type(error).__name__}: {error}); "
            f"expected the folder of a transformers checkpoint, or a name in its cache (any name with download=True)"
        ) from error
    finally:
        if shown:
            logging.enable_progress_bar()
