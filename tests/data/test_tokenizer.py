"""What is asked of tokenizers, over real ones."""

from typing import Any

from anima.data.tokenizer import adds_bos, special_tokens, tokenize, tokenizer_fingerprint


def test_nothing_is_added_and_special_tokens_are_split_on_demand(byte_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    read = tokenize(tokenizer, ["a<|im_end|>", "", "a"])
    assert read == [[read[2][0], 4], [], read[2]]
    assert len(tokenize(tokenizer, ["a<|im_end|>"], split_special=True)[0]) == len("a<|im_end|>")
    assert tokenize(tokenizer, []) == []


def test_who_adds_a_bos(byte_tokenizer: Any, spm_tokenizer: Any) -> None:
    assert not adds_bos(byte_tokenizer())
    assert adds_bos(byte_tokenizer(adds_bos=True))
    assert adds_bos(spm_tokenizer)


def test_special_tokens(byte_tokenizer: Any) -> None:
    assert special_tokens(byte_tokenizer()) == {"<pad>": 0, "<s>": 1, "</s>": 2, "<|im_start|>": 3, "<|im_end|>": 4}


def test_a_word_of_the_model_is_no_control_token(byte_tokenizer: Any) -> None:
    """Such as <think>, which answers may hold as one token."""
    from tokenizers import AddedToken

    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    assert "<think>" not in special_tokens(tokenizer)
    assert len(tokenize(tokenizer, ["<think>"], split_special=True)[0]) == 1


def test_the_fingerprint_follows_what_decides_ids_and_nothing_else(byte_tokenizer: Any, spm_tokenizer: Any) -> None:
    tokenizer = byte_tokenizer()
    first = tokenizer_fingerprint(tokenizer)
    tokenize(tokenizer, ["<|im_end|>"], split_special=True)
    tokenizer(["a", "abc"], padding=True, truncation=True, max_length=2)
    assert tokenizer_fingerprint(tokenizer) == first == tokenizer_fingerprint(byte_tokenizer())
    others = [byte_tokenizer(None), byte_tokenizer(adds_bos=True), byte_tokenizer(eos="<|im_end|>"), spm_tokenizer]
    changed = byte_tokenizer()
    changed.add_tokens(["hello"])
    prints = {tokenizer_fingerprint(other) for other in [*others, changed]}
    assert len(prints | {first}) == 6


def test_the_small_model_s_tokenizer(smol_tokenizer: Any) -> None:
    assert not adds_bos(smol_tokenizer)
    assert special_tokens(smol_tokenizer)["<|im_end|>"] == 2
    assert smol_tokenizer.pad_token_id == smol_tokenizer.eos_token_id
