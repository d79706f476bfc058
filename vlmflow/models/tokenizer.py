"""Tokenizers: a byte-level BPE trained on dataset text, or a pretrained one made ready for images.

Either way the tokenizer ends with ChatML's markers, the image placeholder and the chat template, and pads on the left.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlmflow.errors import DataError, ModelError
from vlmflow.models.chat import END, IMAGE, START, TEMPLATE

PAD = "<|endoftext|>"
SPECIALS = (PAD, START, END, IMAGE)
# Qwen2's split pattern: words with one leading space, digits one by one, punctuation, newlines, spaces.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = 256


def train(texts: Iterable[str], vocab: int) -> Any:
    """Byte-level BPE of at most `vocab` tokens, the 256 bytes and 4 specials included; any text can be encoded.

    Deterministic in the order of texts. Raises DataError for an empty corpus or a vocabulary below 260.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if vocab < BYTES + len(SPECIALS):
        raise DataError(f"a byte-level vocabulary needs at least {BYTES + len(SPECIALS)} tokens, got {vocab}")
    corpus = [text for text in texts if text]
    if not corpus:
        raise DataError("no text to train the tokenizer on; the datasets of model.tokenizer.train_on carry no text")
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    return prepare(
        PreTrainedTokenizerFast(
            tokenizer_object=backend, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
        )
    )


def prepare(tokenizer: Any) -> Any:
    """Add missing markers and the placeholder, set end, padding and the chat template. Returns the tokenizer."""
    missing = [token for token in SPECIALS if token not in tokenizer.get_vocab()]
    if tokenizer.pad_token is not None and PAD in missing:
        missing.remove(PAD)
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    known = set(tokenizer.all_special_tokens)
    extra = [token for token in (START, END, IMAGE) if token not in known]
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": [*_extra(tokenizer), *extra]})
    tokenizer.eos_token = END
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    tokenizer.padding_side = "left"
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def pretrained(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a hub id or folder, prepared. Raises ModelError when it cannot be read or has no fast form."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read a tokenizer from '{source}': {error}") from error
    return prepare(tokenizer)


def _extra(tokenizer: Any) -> list[str]:
    """Special tokens beyond the named ones, as strings (the attribute's name differs between versions)."""
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    return [token for token in tokenizer.all_special_tokens if token not in named]
