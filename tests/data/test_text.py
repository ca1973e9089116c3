"""Texts, token ids and encodings: with a toy encoder, a checkpoint made on the spot, and the real one where it is."""

from __future__ import annotations

import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from book.support.experiments import train_and_score
from mmlib import DEAR
from mmlib.batch import MultimodalBatch, MultimodalDataset
from mmlib.data import load, mmsa, text
from mmlib.missing import lnln_protocol
from mmlib.training import TrainConfig, fit

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very", "a"]


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMLIB_CACHE", str(tmp_path / "cache"))


class Reader(nn.Module):
    """Every token sees the mean of the attended ones; it counts how often it is called."""

    def __init__(self, width=4):
        super().__init__()
        self.table = nn.Embedding(20, width)
        self.dropout = nn.Dropout(0.5)
        self.config = SimpleNamespace(vocab_size=20, hidden_size=width, max_position_embeddings=8)
        self.calls = 0

    def forward(self, input_ids, attention_mask):
        self.calls += 1
        x = self.table(input_ids)
        weight = attention_mask[..., None].to(x)
        return SimpleNamespace(
            last_hidden_state=self.dropout(x + (x * weight).sum(1, keepdim=True) / weight.sum(1)[:, None])
        )


def tokens(n=9, longest=6):
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, longest + 1, (n,), generator=g)
    ids = torch.randint(5, 20, (n, longest), generator=g)
    ids[:, 0] = 2
    ids[torch.arange(n), lengths - 1] = 3
    valid = torch.arange(longest) < lengths[:, None]
    batch = MultimodalBatch(
        {"language": torch.where(valid, ids, 0), "audio": torch.randn(n, 2, 5, generator=g)},
        torch.ones(n, 2, dtype=torch.bool),
        torch.randn(n, generator=g),
        {"language": valid},
        ids=torch.arange(n),
        fill={"language": 1},
    )
    return MultimodalDataset(batch, {"fingerprint": "x"}, [f"clip {i}" for i in range(n)])


def masked(data, rate=0.5):
    return lnln_protocol()[1][f"r={rate}"].draw(data).apply(data, keep_complete=True)


# --- encodings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4, 64])
def test_encodings_are_those_of_the_masked_ids(size):
    data, encoder = masked(tokens()), Reader()
    made = text.encode(data, encoder.train(), batch_size=size).data
    assert encoder.training  # as it was
    encoder.eval()
    for mine, theirs in ((made, data.data), (made.complete, data.data.complete)):
        for i in range(len(data)):
            length = int(theirs.valid["language"][i].sum())
            ids = theirs.features["language"][i, :length]
            expected = encoder(ids[None], torch.ones(1, length)).last_hidden_state[0]
            torch.testing.assert_close(mine.features["language"][i, :length], expected)
            assert not mine.features["language"][i, length:].any()
        for m in data.modalities:
            assert torch.equal(mine.valid[m], theirs.valid[m])
            assert torch.equal(mine.observed[m], theirs.observed[m])
    assert made.fill == {}
    assert torch.equal(made.features["audio"], data.data.features["audio"])
    assert (
        made.features["language"][~made.observed["language"] & made.valid["language"]] != 0
    ).any()  # [UNK] has a vector


def test_encodings_are_kept_and_known_by_their_contents(tmp_path):
    data, encoder = masked(tokens()), Reader()
    first = text.encode(data, encoder)
    calls = encoder.calls
    again = text.encode(data, encoder)
    assert encoder.calls == calls
    assert torch.equal(first.data.features["language"], again.data.features["language"])
    assert len(list((tmp_path / "cache").iterdir())) == 2  # the masked ids, and the complete ones
    assert first.info["fingerprint"] == again.info["fingerprint"] != "x"
    text.encode(masked(tokens(), 0.8), encoder)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # the complete ones are the same for all rates
    text.encode(data, encoder, cache=False)
    assert encoder.calls > calls
    with torch.no_grad():
        encoder.table.weight[7] += 1
    changed = text.encode(data, encoder)
    assert not torch.equal(changed.data.features["language"], first.data.features["language"])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"junk")
    with pytest.warns(UserWarning, match="is damaged"):
        repaired = text.encode(data, encoder)
    assert torch.equal(changed.data.features["language"], repaired.data.features["language"])


def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(text, "atomic_write", full)
    with pytest.warns(UserWarning, match="could not write the cache file"):
        text.encode(tokens(), Reader())


def test_what_cannot_be_encoded():
    data = tokens()
    with pytest.raises(ValueError, match="expected token ids in 'audio'"):
        text.encode(data, Reader(), modality="audio")
    with pytest.raises(ValueError, match="modality: expected one of"):
        text.encode(data, Reader(), modality="words")
    far = data.data.replace(features={**data.data.features, "language": data.data.features["language"] + 10})
    with pytest.raises(ValueError, match=r"expected ids in \[0, 20\)"):
        text.encode(MultimodalDataset(far), Reader())
    with pytest.raises(ValueError, match="expected at most 8 tokens, which the encoder reads, got 9"):
        text.encode(tokens(longest=9), Reader())
    with pytest.raises(ValueError, match="keep_complete=True"):
        text.leak(data, Reader())


@torch.no_grad()
def test_the_leak_of_a_feature_level_drop():
    data, encoder = masked(tokens()), Reader().eval()
    found = text.leak(data, encoder)
    kept = data.data.observed["language"].clone()
    total, norms, cosines = 0, [], []
    for i in range(len(data)):
        length = int(data.data.valid["language"][i].sum())
        a = encoder(data.data.complete.features["language"][i, :length][None], torch.ones(1, length)).last_hidden_state[
            0
        ]
        b = encoder(data.data.features["language"][i, :length][None], torch.ones(1, length)).last_hidden_state[0]
        for t in range(1, length - 1):
            if kept[i, t]:
                total += 1
                norms.append(float((a[t] - b[t]).norm() / a[t].norm()))
                cosines.append(float(torch.nn.functional.cosine_similarity(a[t], b[t], 0)))
    assert found["tokens"] == total > 0
    assert found["relative"] == pytest.approx(np.mean(norms), rel=1e-4)
    assert found["cosine"] == pytest.approx(np.mean(cosines), rel=1e-4)
    assert found["relative"] > 0.01
    # A drop of stored vectors leaves them as the complete text made them; nothing dropped, nothing leaked.
    assert text.leak(masked(tokens(), 0.0), encoder)["relative"] == pytest.approx(0, abs=1e-6)


def test_frozen_encodings_are_the_frozen_encoder():
    """DEAR on encodings and DEAR with the frozen encoder inside: the same losses."""
    data, encoder = masked(tokens()), Reader()
    small = {"width": 6, "heads": 2, "head_width": 3, "hidden": 5}
    torch.manual_seed(0)
    inside = DEAR.for_data(data, encoder, freeze_text=True, **small)
    outside = DEAR.for_data(text.encode(data, encoder), **small)
    outside.load_state_dict({k: v for k, v in inside.state_dict().items() if not k.startswith("text_encoder")})
    a, b = inside(data.data), outside(text.encode(data, encoder).data)
    torch.testing.assert_close(a.logits, b.logits)
    for name, value in a.losses.items():
        torch.testing.assert_close(b.losses[name], value)


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A BERT of a few hundred numbers, written as `transformers` writes one."""
    transformers = pytest.importorskip("transformers", reason="checkpoints are read with transformers")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    about = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        max_position_embeddings=12,
    )  # fmt: skip
    transformers.BertModel(about).half().save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    transformers.BertTokenizer(vocab=vocabulary, model_max_length=12).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_checkpoint_is_read_in_full_precision(checkpoint):
    for place in (checkpoint, str(checkpoint)):
        encoder = text.load_encoder(place)
        assert not encoder.training
        assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    out = encoder(input_ids=torch.tensor([[2, 5, 3]]), attention_mask=torch.ones(1, 3))
    assert out.last_hidden_state.shape == (1, 3, 8)


def test_folders_that_are_no_checkpoints(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkpoint: no folder"):
        text.load_encoder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="checkpoint: no folder"):
        text.load_encoder("./nowhere")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("hello")
    for read in (text.load_encoder, text.load_tokenizer):
        with pytest.raises(ValueError, match="it has no config.json but"):
            read(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(ValueError, match="checkpoint: could not read the model"):
        text.load_encoder(tmp_path / "other")
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    (broken / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="checkpoint: could not read the model"):
        text.load_encoder(broken)
    with pytest.raises(ValueError, match="checkpoint: could not read the model of 'no-such-encoder'"):
        text.load_encoder("no-such-encoder")


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install mmlib\[text\]"):
        text.load_encoder("anything")


def test_texts_become_ids(checkpoint):
    said = ["a very good film", "", None, "unheard good", "very " * 20]
    ids, valid, longer = text.tokenise(said, checkpoint, 6)
    assert ids.tolist() == [
        [2, 9, 8, 5, 7, 3], [2, 3, 0, 0, 0, 0], [2, 3, 0, 0, 0, 0], [2, 1, 5, 3, 0, 0], [2, 8, 8, 8, 8, 3],
    ]  # fmt: skip
    assert valid.sum(1).tolist() == [6, 2, 2, 4, 6]
    assert longer == [4]
    with pytest.raises(TypeError, match="texts(\[0\])?: expected"):
        text.tokenise("good", checkpoint)
    with pytest.raises(TypeError, match="texts(\[0\])?: expected"):
        text.tokenise([1.0], checkpoint)
    with pytest.raises(ValueError, match="texts: expected a list or tuple of at least 1"):
        text.tokenise([], checkpoint)
    for length in (1, 13):
        with pytest.raises(ValueError, match="max_length: expected (2 to 12 tokens|an integer of at least 2)"):
            text.tokenise(["good"], checkpoint, length)


def test_a_data_set_of_texts_is_masked_and_encoded(checkpoint):
    audio = np.random.default_rng(0).normal(size=(4, 2, 3))
    data = MultimodalDataset.from_arrays({"audio": audio}, np.zeros(4, "float32"), ids=["p", "q", "r", "s"])
    said = {"p": "a very good film", "q": " ", "r": "bad " * 9, "s": "bad film"}
    made = text.with_ids(data, said, checkpoint, max_length=6)
    assert made.modalities == ("language", "audio")
    assert made.present.tolist() == [[True, True], [False, True], [True, True], [True, True]]
    assert made.data.fill == {"language": 1}
    assert made.info["truncated"] == 1
    made.data.check_values()
    gone = made.drop(observed={"language": torch.zeros(4, 6, dtype=torch.bool)})
    assert gone.data.features["language"].tolist()[0] == [2, 1, 1, 1, 1, 3]
    assert torch.equal(gone.data.valid["language"], made.data.valid["language"])
    again = text.with_ids(made, list(said.values()), text.load_tokenizer(checkpoint), max_length=4)
    assert again.feature_shapes == {"language": (4,), "audio": (2, 3)}
    encoder = text.load_encoder(checkpoint)
    model = DEAR.for_data(made, encoder, width=6, heads=2, head_width=3)
    assert model.eval()(gone.data).logits.isfinite().all()
    assert text.encode(made, encoder).feature_shapes["language"] == (6, 8)
    with pytest.raises(ValueError, match="texts: nothing for 1 samples, the first"):
        text.with_ids(data, {"p": "a", "q": "a", "r": "a"}, checkpoint)
    with pytest.raises(ValueError, match="texts: expected 4, one a sample, got 1"):
        text.with_ids(data, ["a"], checkpoint)
    with pytest.raises(ValueError, match="a mask was applied already"):
        text.with_ids(masked(made), said, checkpoint)


# --- the real encoder, on real texts ----------------------------------------------------------------------------------


@pytest.fixture
def real(real_data):
    pytest.importorskip("transformers", reason="checkpoints are read with transformers")
    for folder in ("text-encoder", "mosi"):
        if not (real_data / folder).is_dir():
            pytest.skip(f"no {folder}/ in {real_data}")
    return real_data


@pytest.mark.slow
@pytest.mark.real
def test_real_texts_give_the_ids_and_the_vectors_of_the_file(real):
    ids, stored = load("mosi", real, text="ids")["valid"], load("mosi", real)["valid"]
    said = mmsa.transcripts("mosi", real)
    made = text.with_ids(ids, said, real / "text-encoder")
    assert torch.equal(made.data.features["language"], ids.data.features["language"])
    assert torch.equal(made.data.valid["language"], ids.data.valid["language"])
    few = ids.subset(range(20))
    encoded = text.encode(few, text.load_encoder(real / "text-encoder"))
    assert (
        encoded.data.features["language"] - stored.data.features["language"][:20]
    ).abs().max() < 0.02  # half precision


@pytest.mark.slow
@pytest.mark.real
def test_feature_level_drop_leaks_context_on_real_texts(real):
    few = load("mosi", real, text="ids")["valid"].subset(range(30))
    encoder = text.load_encoder(real / "text-encoder")
    leaks = [text.leak(masked(few, rate), encoder) for rate in (0.2, 0.5, 0.8)]
    found = [round(one["relative"], 3) for one in leaks]
    assert found == sorted(found), found  # the more is dropped, the more a kept word's stored vector tells of it
    assert found[1] > 0.3, found


@pytest.mark.slow
@pytest.mark.real
def test_the_full_path_learns_on_real_texts(real):
    """Ids are masked anew in every epoch, encoded again, and the encoder is fine-tuned."""
    train = load("mosi", real, text="ids", modalities=["language", "audio"])["train"].subset(range(24))
    encoder = text.load_encoder(real / "text-encoder")
    model = DEAR.for_data(train, encoder, width=16, heads=2, head_width=8)
    before = encoder.embeddings.word_embeddings.weight.detach().clone()
    plan = lnln_protocol()[0]
    config = TrainConfig(epochs=1, batch_size=12, lr=1e-4, optimizer="adamw", select="last", device="cpu")
    history = fit(model, train, None, config, train_plan=plan)
    assert history.epochs[0]["train_calibration"] > 0
    assert not torch.equal(before, encoder.embeddings.word_embeddings.weight)


@pytest.mark.slow
@pytest.mark.real
def test_the_runner_knows_dear(real):
    config = {
        "data": "mosi", "data_root": str(real),
        "data_options": {"text": "ids", "max_frames": 6, "modalities": ["language", "audio"]},
        "method": "DEAR", "train": {"epochs": 1, "steps": 1, "batch_size": 4}, "train_plan": {"kind": "lnln"},
        "method_options": {"text_encoder": "text-encoder", "width": 8, "heads": 1, "head_width": 8,
                           "freeze_text": True},
        "valid_plan": None, "conditions": {"r=0.9": {"kind": "lnln", "rates": 0.9}}, "device": "cpu",
    }  # fmt: skip
    rows = train_and_score(config)
    assert {row["metric"] for row in rows if row["condition"] == "r=0.9"} >= {"mae", "corr", "acc7"}
