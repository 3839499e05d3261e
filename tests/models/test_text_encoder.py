"""The text encoder: features of words and sentences, and padding."""

import torch

from crislit.models.cris import CRIS
from crislit.models.text_encoder import end_of_sentence, padding_mask
from tests.models.networks import WIDTH, sentences, tiny


def test_the_end_of_a_sentence_is_its_largest_id_and_padding_follows_it() -> None:
    tokens = torch.tensor([[98, 5, 99, 0, 0], [98, 5, 6, 7, 99], [98, 99, 0, 0, 0]])
    assert end_of_sentence(tokens).tolist() == [2, 4, 1]
    padding = [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0, 0, 1, 1, 1]]
    assert padding_mask(tokens).int().tolist() == padding


def test_a_word_changes_the_features_of_itself_and_later_words_only(model: CRIS) -> None:
    tokens = sentences(6)
    changed = tokens.clone()
    changed[0, 4] = tokens[0, 4] % 90 + 1
    with torch.no_grad():
        words, sentence = model.text_encoder(tokens)
        changed_words, changed_sentence = model.text_encoder(changed)
    torch.testing.assert_close(words[0, :4], changed_words[0, :4])
    assert ((words - changed_words)[0, 4:8].abs().amax(dim=1) > 1e-3).all()
    assert not torch.allclose(sentence, changed_sentence)


def test_the_sentence_feature_is_the_projected_word_feature_at_its_end(model: CRIS) -> None:
    with torch.no_grad():
        words, sentence = model.text_encoder(sentences(2, 6))
    assert words.shape == (2, 12, WIDTH)
    ends = torch.stack([words[0, 3], words[1, 7]])
    torch.testing.assert_close(sentence, ends @ model.text_encoder.text_projection)


def test_clips_unused_logit_scale_is_stored_but_not_trained() -> None:
    model = tiny()
    assert "text_encoder.logit_scale" in model.state_dict()
    assert "text_encoder.logit_scale" not in dict(model.named_parameters())
