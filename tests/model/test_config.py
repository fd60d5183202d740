"""Presets, and values that a configuration rejects."""

import pytest
import torch

from fusebert.model import BertConfig, BertForPreTraining


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("tiny", 4_433_468), ("mini", 11_267_900), ("small", 29_058_876), ("base", 110_106_428), ("large", 336_226_108)],
)
def test_presets_have_berts_sizes(name, parameters):
    """The counts of Transformers' BertForPreTraining with the layers of Turc et al. 2019 and Devlin et al. 2018."""
    config = BertConfig.preset(name, 30522)
    assert config.hidden_size // config.num_attention_heads == 64
    with torch.device("meta"):
        assert BertForPreTraining(config).num_parameters() == parameters


def test_changes_override_a_preset():
    config = BertConfig.preset("base", 1000, num_hidden_layers=3, hidden_dropout_prob=0)
    assert (config.num_hidden_layers, config.hidden_size, config.hidden_dropout_prob) == (3, 768, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer"),
        ({"hidden_size": 128.0}, "hidden_size must be a positive integer"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple"),
        ({"hidden_act": "relu"}, "hidden_act must be 'gelu'"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob must be a number in"),
        ({"attention_probs_dropout_prob": "0.1"}, "attention_probs_dropout_prob must be a number in"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be a positive number"),
        ({"initializer_range": float("nan")}, "initializer_range must be a positive number"),
        ({"pad_token_id": 100}, "pad_token_id must be None or in"),
        ({"pad_token_id": "0"}, "pad_token_id must be None or in"),
    ],
)
def test_a_bad_value_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.preset("tiny", **{"vocab_size": 100, **change})


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"'huge'.*tiny, mini, small, base, large"):
        BertConfig.preset("huge", 100)
