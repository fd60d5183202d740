"""attn_implementation="fusebert": padding is masked; calls that the kernels do not compute run elsewhere or raise."""

import subprocess
import sys
import warnings

import pytest
import torch
from hf_families import TEXT, batch, build
from oracle import DEVICE
from torch import nn

from fusebert.kernels import use_backend
from fusebert.model.fusion import attention_interface, masks
from fusebert.model.fusion.attention_interface import attention_forward, register_attention

transformers = pytest.importorskip("transformers", minversion="5")
masking_utils = pytest.importorskip("transformers.masking_utils")


@pytest.fixture(autouse=True)
def _registered():
    register_attention()
    attention_interface.warn_once.cache_clear()


class Encoder(nn.Module):
    """The attribute of a module that attention_forward reads."""

    is_causal = False


def inputs_for():
    return batch("bert").values()


def qkv(batch=2, heads=2, n_q=9, n_k=9, size=16, groups=1):
    generator = torch.Generator().manual_seed(1)
    shapes = [(batch, heads, n_q, size), *[(batch, heads // groups, n_k, size)] * 2]
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("family", ["bert", "modernbert"])
def test_padded_batches_agree_with_sdpa(family, backend, recwarn):
    ids, mask = inputs_for()
    ours, theirs = (build(family, attn_implementation=name).eval() for name in ("fusebert", "sdpa"))
    with torch.no_grad(), use_backend(backend):
        masked, expected, unmasked = (x[0][mask.bool()] for x in (ours(ids, mask), theirs(ids, mask), ours(ids)))
    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)
    assert (unmasked - masked).norm() > 1e-2, "the mask changes nothing: the test shows nothing"
    assert not [str(w.message) for w in recwarn if "fusebert" in str(w.message)]


def test_from_pretrained(tmp_path):
    sdpa = build("bert").eval()
    sdpa.save_pretrained(tmp_path)
    model = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="fusebert").to(DEVICE).eval()
    ids, mask = inputs_for()
    with torch.no_grad():
        ours, theirs = model(ids, mask)[0], sdpa(ids, mask)[0]
    torch.testing.assert_close(ours[mask.bool()], theirs[mask.bool()], rtol=1e-4, atol=1e-5)


def test_no_mask_is_read():
    """On the meta device reading a mask's values would fail."""
    mask = torch.ones(2, 9, dtype=torch.int64, device="meta")
    config = transformers.BertConfig(**TEXT, attn_implementation="fusebert")
    made = masking_utils.create_bidirectional_mask(config, torch.empty(2, 9, 32, device="meta"), mask)
    assert (made.shape, made.dtype) == ((2, 1, 1, 9), torch.bool)
    assert masking_utils.create_bidirectional_mask(config, torch.empty(2, 9, 32, device="meta"), None) is None


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("window", [None, 0, 2, 20])
def test_masks_agree_with_eager_attentions(window, padded):
    """For every (query, key) pair, through Transformers' own requests."""
    _, mask = inputs_for()
    mask = mask if padded else None
    embeds = torch.empty(3, 17, 32, device=DEVICE)
    create = "create_bidirectional_mask" if window is None else "create_bidirectional_sliding_window_mask"

    def made(implementation):
        config = transformers.BertConfig(**TEXT, attn_implementation=implementation)
        config.sliding_window = window
        return getattr(masking_utils, create)(config, embeds, mask)

    theirs = made("eager")
    theirs = torch.ones(3, 1, 17, 17, dtype=torch.bool, device=DEVICE) if theirs is None else theirs == 0
    ours = masks.expanded_mask(made("fusebert"), 17)
    ours = torch.ones_like(theirs) if ours is None else ours
    assert torch.equal(ours.expand(3, 1, 17, 17), theirs.expand(3, 1, 17, 17))


def test_a_padding_mask_combined_with_another_is_transformers_mask():
    _, mask = inputs_for()
    embeds = torch.empty(3, 17, 32, device=DEVICE)

    def made(implementation):
        config = transformers.BertConfig(**TEXT, attn_implementation=implementation)
        no_earlier_key = {"and_mask_function": lambda b, h, q, k: k >= q}
        return masking_utils.create_bidirectional_mask(config, embeds, mask, **no_earlier_key)

    assert torch.equal(made("fusebert"), made("sdpa"))


@pytest.mark.parametrize(
    "other",
    [
        {"mask_function": masking_utils.causal_mask_function},
        {"use_vmap": True},
        {"kv_offset": 2},
        {"allow_is_bidirectional_skip": False},
    ],
)
def test_requests_for_more_than_padding(other):
    """The result is Transformers' own mask of all pairs."""
    _, mask = inputs_for()
    request = {"mask_function": masking_utils.bidirectional_mask_function, "allow_is_bidirectional_skip": True, **other}
    sizes = {"batch_size": 3, "q_length": 15, "kv_length": 15, "q_offset": 0, "device": DEVICE}
    mask = mask[:, :15].bool()
    ours = masks.build_mask(**sizes, attention_mask=mask, **request)
    request |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    assert torch.equal(ours, masking_utils.sdpa_mask(**sizes, attention_mask=mask, **request))
    assert ours.shape == (3, 1, 15, 15)


def test_a_fallback_warns_once():
    ids, _ = inputs_for()
    model, everything = build("bert", attn_implementation="fusebert").eval(), torch.ones(3, 1, 17, 17, device=DEVICE)
    with torch.no_grad():
        with pytest.warns(UserWarning, match=r"4 dimensions .*: Transformers' SDPA attention runs"):
            model(ids, everything)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids, everything)


@pytest.mark.filterwarnings("ignore:output_attentions=True")
def test_attention_weights_where_there_is_no_eager_attention():
    with pytest.raises(ValueError, match="Encoder has no eager attention"):
        attention_forward(Encoder(), *qkv(), None, output_attentions=True)


def test_a_decoder_stays_causal():
    ids, mask = inputs_for()
    ours, theirs = (build("bert", attn_implementation=name, is_decoder=True).eval() for name in ("fusebert", "sdpa"))
    real = mask.bool()
    with torch.no_grad():
        with pytest.warns(UserWarning, match="SDPA attention runs"):
            torch.testing.assert_close(ours(ids, mask)[0][real], theirs(ids, mask)[0][real])
        torch.testing.assert_close(ours(ids)[0], theirs(ids)[0])


def test_a_causal_module_without_a_mask():
    class Decoder(nn.Module):
        is_causal = True

    q, k, v = qkv()
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    with pytest.warns(UserWarning, match="Decoder is causal"):
        out, _ = attention_forward(Decoder(), q, k, v, None)
    torch.testing.assert_close(out, expected)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="is_causal=True"):
        attention_forward(Decoder(), q[:1], k[:1], v[:1], None, cu_seq_lens_q=cu, max_length_q=5)


def test_queries_of_another_length_and_grouped_heads():
    """Cross-attention with padded keys, and key heads shared by several query heads."""
    q, k, v = qkv(heads=4, n_q=5, n_k=9, groups=2)
    real = torch.arange(9, device=DEVICE) < torch.tensor([9, 4], device=DEVICE)[:, None]
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=real[:, None, None], scale=0.3, enable_gqa=True
    )
    for backend in ("reference", "triton"):
        with use_backend(backend):
            out, weights = attention_forward(Encoder(), q, k, v, real, scaling=0.3)
        torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-4, atol=1e-5)
        assert weights is None


def test_a_packed_batch():
    """One row of segments, as DataCollatorWithFlattening makes it: segments do not attend to each other."""
    q, k, v = qkv(batch=1)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    out, _ = attention_forward(Encoder(), q, k, v, None, cu_seq_lens_q=cu, max_length_q=5)
    for rows in (slice(0, 4), slice(4, 9)):
        alone, _ = attention_forward(Encoder(), *(x[:, :, rows] for x in (q, k, v)), None)
        torch.testing.assert_close(out[:, rows], alone, rtol=1e-4, atol=1e-5)
    mask = torch.ones(1, 9, dtype=torch.bool, device=DEVICE)
    with pytest.raises(ValueError, match=r"cu_seq_lens_q .* without attention_mask.*\[1, 9\]"):
        attention_forward(Encoder(), q, k, v, mask, cu_seq_lens_q=cu, max_length_q=5)


def test_a_position_bias_runs_on_sdpa():
    q, k, v = qkv()
    bias = torch.randn(1, 2, 9, 9, device=DEVICE)
    real = torch.arange(9, device=DEVICE) < torch.tensor([9, 4], device=DEVICE)[:, None]
    expected = nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias.masked_fill(~real[:, None, None], -torch.inf)
    )
    with pytest.warns(UserWarning, match="position bias"):
        out, _ = attention_forward(Encoder(), q, k, v, real, position_bias=bias)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize("name", attention_interface.UNSUPPORTED)
def test_unsupported_arguments(name):
    with pytest.raises(ValueError, match=f"does not support {name}, which Encoder passes"):
        attention_forward(Encoder(), *qkv(), None, **{name: torch.ones(2)})


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(2, 9),
        torch.ones(9, dtype=torch.bool),
        torch.ones(1, 9, dtype=torch.bool),
        torch.ones(2, 8, dtype=torch.bool),
        torch.ones(2, 9, 9, dtype=torch.int64),
    ],
)
def test_masks_of_unknown_form(mask):
    with pytest.raises(ValueError, match=r"attention_mask must be bool \[B, N_k\] = \[2, 9\]"):
        attention_forward(Encoder(), *qkv(), mask.to(DEVICE))


def test_a_callers_mask_of_three_dimensions():
    ids, _ = inputs_for()
    with pytest.raises(ValueError, match=r"attention_mask must have shape \[B, N\]"):
        build("bert", attn_implementation="fusebert")(ids, torch.ones(3, 17, 17, dtype=torch.bool, device=DEVICE))


def test_importing_the_interface_does_not_import_transformers():
    script = "import sys, fusebert.model.fusion.attention_interface; print('transformers' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert run.stdout.strip() == "False", run.stderr
