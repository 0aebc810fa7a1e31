"""The bulk encoder gives tiktoken's tokens, and tokens give the text back, byte for byte."""

import hashlib
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import HOSTILE, SHARED

from pipeline import shards, tokenizer
from pipeline.tokenizer import BulkEncoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> BulkEncoder:
    path = tmp_path_factory.mktemp("vocabulary") / shards.VOCABULARY_FILE
    path.write_bytes(tokenizer.vocabulary())
    return BulkEncoder(path)


def assert_same(encoder: BulkEncoder, texts: list[str]) -> None:
    encoded = encoder.encode([text.encode() for text in texts])
    for text, tokens in zip(texts, encoded, strict=True):
        ours = tokens.tolist()
        assert ours == tokenizer.reference().encode_ordinary(text), repr(text[:200])
        assert tokenizer.decode(ours) == text.encode()


def test_the_vocabulary_is_the_published_one() -> None:
    published = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
    assert hashlib.sha256(tokenizer.vocabulary()).hexdigest() == published
    assert tokenizer.reference().n_vocab == 50257
    assert tokenizer.reference().eot_token == 50256


def test_bulk_encoding_is_tiktokens_on_real_text(encoder: BulkEncoder, documents) -> None:
    assert_same(encoder, documents)


@pytest.mark.skipif(not SHARED.exists(), reason="no ../shared/data here")
def test_bulk_encoding_is_tiktokens_on_educational_text(encoder: BulkEncoder) -> None:
    assert_same(encoder, pq.read_table(SHARED / "small.parquet")["text"].to_pylist())


def test_bulk_encoding_is_tiktokens_on_hostile_text(encoder: BulkEncoder) -> None:
    assert_same(encoder, HOSTILE)


def test_bulk_encoding_is_tiktokens_on_random_text(encoder: BulkEncoder) -> None:
    rng = random.Random(0)
    pools = [
        "abc'sdmtlrev ",
        " \n\t\r\u00a0\u3000",
        "0123456789٣Ⅷ½",
        "éßñЖ中あ한ع",
        "!?<|>_-*'\"",
        "👍🏽\u200d\u0301",
    ]
    texts = []
    for _ in range(3000):
        pool = "".join(rng.sample(pools, rng.randint(1, 4)))
        texts.append("".join(rng.choice(pool) for _ in range(rng.randint(1, 60))))
    assert_same(encoder, texts)


def test_text_never_makes_a_special_token(encoder: BulkEncoder) -> None:
    (tokens,) = encoder.encode([b"<|endoftext|>" * 3])
    assert shards.EOT_TOKEN not in tokens
    assert shards.EOT_TOKEN not in tokenizer.encode("<|endoftext|>")


def test_a_ten_megabyte_document_encodes(encoder: BulkEncoder, documents) -> None:
    text = " ".join(documents)
    text = (text * (10_000_000 // len(text) + 1))[:10_000_000]
    (tokens,) = encoder.encode([text.encode()])
    assert tokenizer.decode(tokens) == text.encode()


def test_the_vocabulary_file_alone_decodes(tmp_path: Path) -> None:
    path = tmp_path / shards.VOCABULARY_FILE
    path.write_bytes(tokenizer.vocabulary())
    vocabulary = shards.read_vocabulary(path)
    assert len(vocabulary) == 50257
    text = "Fruits are good for you — 果物"
    assert b"".join(vocabulary[t] for t in tokenizer.encode(text)) == text.encode()
