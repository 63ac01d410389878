import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtrain.data import ByteTokenizer


@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_decode_inverts_encode(text: str) -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode(text) == tokenizer.encode(text.encode()) == tokenizer.encode_array(text).tolist()


def test_ids_are_bytes_and_the_boundary_is_zero() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.boundary) == (256, 0)
    assert tokenizer.encode("é\n") == [0xC3, 0xA9, 10]
    assert tokenizer.encode_array("abc").dtype == np.uint8


def test_broken_utf8_decodes_to_the_replacement_character() -> None:
    assert ByteTokenizer().decode([0xC3, 65]) == "�A"
    with pytest.raises(ValueError, match="256"):
        ByteTokenizer().decode([256])
