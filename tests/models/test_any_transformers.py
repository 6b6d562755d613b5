"""The contract of the adapter for all of transformers' text classifiers, type by type; six by default, all with --thorough."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from network_contract import check_bits, check_gradients, check_leaving, check_phase_3, check_rebuilding, documented
from small_networks import NUM_OUTPUTS, build_noisy, texts
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedTokenizerFast, XLNetTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from eectl.core.errors import EectlError
from eectl.data.text import Texts, encode, load_tokenizer, padding_id
from eectl.exits.costs import measure_costs
from eectl.models.adapters.args_and_weights import NotOnThisMachineError
from eectl.models.adapters.transformers_parts import ADAPTERS
from eectl.models.backbone import Backbone
from eectl.models.build import attach_exits, build_backbone
from eectl.models.multi_exit import MultiExitModel
from eectl.recipe.recipe import BackboneSection

LENGTH = 9
SMALL = {
    **{"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48},
    **{"max_position_embeddings": 16, "type_vocab_size": 2, "pad_token_id": 0, "embedding_size": 32, "num_key_value_heads": 4},
    **{"head_dim": 8, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 16, "n_group": 1, "topk_group": 1, "word_embed_proj_dim": 32, "ffn_dim": 48, "dff": 48, "hidden_dim": 32},
    **{"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8, "attention_window": 4, "entity_vocab_size": 10},
    **{"entity_emb_size": 8, "true_hidden_size": 16, "intra_bottleneck_size": 16, "num_layers": 3, "num_heads": 4},
}
"""Sizes under all names that configurations have for them; each type takes those that it knows."""

OWN: dict[str, dict[str, Any]] = {
    "axk1": {"head_dim": 8},
    "deepseek_v3": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1], [["global"], 1]]},
    "layoutlmv3": {"visual_embed": False, "coordinate_size": 6, "shape_size": 4},
    "mistral4": {"head_dim": 16},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}
"""What some types need besides."""

_CUT = """arcee axk1 big_bird biogpt bloom convbert ctrl data2vec-text deepseek_v2 deepseek_v3 diffllama doge ernie esm esmc
    eurobert exaone4 falcon fnet gemma gemma2 gemma3_text glm glm4 gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss
    gptj gte helium hunyuan_v1_dense hunyuan_v1_moe ibert jamba jetmoe jina_embeddings_v3 layoutlm layoutlmv3 llama
    longformer luke markuplm megatron-bert minicpm3 minimax ministral ministral3 mistral mistral4 mixtral mobilebert
    modernbert modernbert-decoder mpnet nemotron nomic_bert nystromformer olmo olmo2 olmo3 openai-gpt opt
    persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_text qwen3_moe qwen3_next rembert roberta-prelayernorm
    roc_bert roformer seed_oss smollm3 stablelm starcoder2 tapas ultrabert xlm-roberta-xl xlnet xmod yoso"""
CUT = tuple(_CUT.split())
REFUSED = {  # by the reason that is given
    **dict.fromkeys(("bart", "bigbird_pegasus", "mbart", "mt5", "mvp", "plbart", "t5", "umt5"), "an encoder and a decoder"),
    **dict.fromkeys(("gemma3", "modernvbert", "qwen3_5", "ultravbert", "t5gemma", "t5gemma2", "mpt"), "parts of their own"),
    **dict.fromkeys(("funnel", "squeezebert"), "do not run once each"),
    **dict.fromkeys(("flaubert", "xlm"), "do not hand on one hidden state"),
    "canine": "fewer than the text has tokens",
    "mra": "gives zeros",
}
SIX = ("modernbert", "mpnet", "xlnet", "longformer", "gpt2", "gemma3_text")
"""Kinds of layers, a bias that trains, tokens first, filled windows, absolute positions read from left to right, a mask each."""

UNSEEN = {
    "fnet": 3 * sum(2 * LENGTH * 32 * math.log2(size) for size in (LENGTH, 32)),
    **dict.fromkeys(("qwen3_5_text", "qwen3_next"), 3 * 32 * (64 * 64 // 2) * (128 + 128)),
}
"""The multiply-adds that PyTorch's counter does not see. Fourier transforms: n log₂ n butterflies of 4 for 2 numbers. Triangular
systems, in each of 32 heads of 3 layers: half a product of [64, 64] with keys and values of 128 channels."""

TYPES = [pytest.param(name, marks=[] if name in SIX else pytest.mark.thorough) for name in CUT]


def small(model_type: str) -> dict[str, Any]:
    known = {*AutoConfig.for_model(model_type).to_dict(), *CONFIG_MAPPING[model_type].attribute_map}
    twice = set(CONFIG_MAPPING[model_type].attribute_map.values())  # a size goes by one of its names
    sizes = {key: value for key, value in SMALL.items() if key in known and key not in twice}
    return sizes | OWN.get(model_type, {})


def library(net: Any, inputs: Tensor) -> Tensor:
    """The library's own forward pass; token types only where the network has a table of them."""
    if net.config.model_type == "xlnet":  # its tokenizer puts padding first, and the class token, of a type of its own, last
        inputs = torch.stack([row[:, row[1].argsort(stable=True)] for row in inputs])
        inputs[:, 2, -1] = 2
    ids, mask, types = inputs.unbind(1)
    has_types = getattr(net.config, "type_vocab_size", 0) or net.config.model_type == "xlnet"
    return net(input_ids=ids, attention_mask=mask, **({"token_type_ids": types} if has_types else {})).logits


@pytest.fixture(scope="module", params=TYPES)
def model_type(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def shared(model_type: str) -> Backbone:
    """Built once for all tests of a type."""
    return build_noisy(f"hf/{model_type}", small(model_type), (3, LENGTH))


@pytest.fixture
def backbone(shared: Backbone) -> Backbone:
    return copy.deepcopy(shared)


@pytest.fixture
def rows(backbone: Backbone) -> Tensor:
    return texts(LENGTH, padding=backbone.net.config.pad_token_id or 0)


@pytest.fixture
def model(backbone: Backbone) -> MultiExitModel:
    torch.manual_seed(2)
    return attach_exits(backbone, after=[0, 1], heads="linear", num_outputs=NUM_OUTPUTS, input_shape=(3, LENGTH))


def test_the_documentation_lists_the_types() -> None:
    taken, refused = documented("texts")
    assert taken == {*CUT, *ADAPTERS} and refused >= {*REFUSED} and not refused & taken


def test_every_type_of_the_library_is_tried_or_said_to_be_open() -> None:
    """What is left needs options of its own, a library or another input, and is refused or built as its options allow."""
    left = set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) - set(CUT) - REFUSED.keys() - ADAPTERS.keys()
    assert len(left) < 20
    assert not set(CUT) & (REFUSED.keys() | ADAPTERS.keys())


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_pieces_equal_the_librarys_forward_bitwise(backbone: Backbone, rows: Tensor, training: bool) -> None:
    check_bits(backbone, rows, library, training=training)
    assert backbone.depth == 3


def test_gradients_are_the_librarys(backbone: Backbone, rows: Tensor) -> None:
    check_gradients(backbone, rows, library)


def test_rows_leave_where_the_offline_choice_says(model: MultiExitModel, rows: Tensor) -> None:
    check_leaving(model, rows)


def test_pytorchs_counter_agrees_on_costs(model_type: str, model: MultiExitModel) -> None:
    """It counts 2 per multiply-add; with plain attention and experts one by one, as it does not see the fused ones."""
    costs = measure_costs(model, (3, LENGTH))
    model.eval().requires_grad_(False)
    model.backbone.net.config._experts_implementation = "eager"
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        library(model.backbone.net, model.backbone.example((3, LENGTH)))
    expected = counter.get_total_flops() / 2 + UNSEEN.get(model_type, 0)
    assert costs.plain == pytest.approx(expected, rel=1e-3)
    assert 0 < costs.exits[0] < costs.exits[1] < costs.plain


def test_heads_alone_train_and_the_network_stays_as_it_is(model: MultiExitModel, rows: Tensor) -> None:
    check_phase_3(model, rows)


def test_an_exits_gradient_stops_at_its_block(model: MultiExitModel, rows: Tensor) -> None:
    model(rows, exits={1})[0].logits.square().sum().backward()
    graded = {model.part(name) for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert graded == {("segment", 1), ("head", 1)}


def test_a_spec_rebuilds_the_network(model: MultiExitModel, model_type: str, rows: Tensor) -> None:
    check_rebuilding(model, rows, BackboneSection(name=f"hf/{model_type}", args=small(model_type)))


def test_activation_checkpointing_changes_no_gradient(model: MultiExitModel, rows: Tensor) -> None:
    gradients = []
    for wanted in (False, True):
        model.checkpoint_activations(wanted)
        model.zero_grad()
        torch.manual_seed(4)
        sum(output.logits.square().sum() for output in model.train()(rows)).backward()
        gradients.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.allclose(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_the_library_says_once_a_batch_what_layers_are_called_with(backbone: Backbone, rows: Tensor) -> None:
    """What runs before the layers runs once, as in the library's own forward."""
    backbone.eval()
    calls: list[str] = []
    embeddings = [
        name for name, each in backbone.net.named_modules() if isinstance(each, nn.Embedding) and backbone.locate(name) < 0
    ]
    for name in embeddings:
        original = backbone.net.get_submodule(name).forward
        backbone.net.get_submodule(name).forward = counted(original, calls, name)
    with torch.no_grad():
        library(backbone.net, rows)
        once = sorted(calls)
        calls.clear()
        backbone(rows)
    assert sorted(calls) == once


def counted(forward: Callable[..., Any], calls: list[str], name: str) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return forward(*args, **kwargs)

    return run


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma3_text", "ctrl", "modernbert-decoder"])
def test_a_decoder_reads_the_last_real_token(name: str) -> None:
    """Whichever side is padded, and with whatever id: the library's forward, and its last token found row by row."""
    args = small(name) | {"pad_token_id": 3}
    backbone = build_noisy(f"hf/{name}", args, (3, LENGTH)).eval()
    right = texts(LENGTH, padding=3)
    right[:, 0] = torch.where(right[:, 1].bool(), right[:, 0].clamp(min=4), 3)
    left = torch.stack([row[:, row[1].argsort(stable=True)] for row in right])
    assert left[1, 1].tolist() == [0] * (LENGTH - 2) + [1, 1]
    with torch.no_grad():
        for rows in (right, left):
            assert torch.equal(backbone(rows), library(backbone.net, rows))
            others = rows.clone()
            others[:, 0][rows[:, 1] == 0] = 0
            assert torch.equal(backbone(others), backbone(rows))
            hidden = backbone.block(0, backbone.stem(rows))
            cls = backbone.feature(hidden).cls()
            for row, mask in enumerate(rows[:, 1].tolist()):
                last = max(place for place, real in enumerate(mask) if real)
                assert torch.equal(cls[row], hidden.x[row, last])


@pytest.mark.parametrize("eos", [5, [45, 5]])
def test_a_decoder_without_a_padding_token_takes_its_end_of_text(eos: int | list[int]) -> None:
    """As the library's users do, after the network was made: the row of that token is drawn, and trains. Rebuilt networks too."""
    args = {key: value for key, value in small("llama").items() if key != "pad_token_id"} | {"eos_token_id": eos}
    backbone = build_noisy("hf/llama", args, (3, LENGTH)).eval()
    rows = texts(LENGTH)
    rows[:, 0] = rows[:, 0].where(rows[:, 0] != 5, 6).where(rows[:, 1].bool(), 5)
    places = rows[:, 1].sum(1) - 1
    expected = backbone.net.score(backbone.net.model(input_ids=rows[:, 0], attention_mask=rows[:, 1]).last_hidden_state)
    for found in (backbone, build_backbone(section_of(backbone), input_shape=(3, LENGTH), num_outputs=NUM_OUTPUTS).eval()):
        found.load_state_dict(backbone.state_dict())
        torch.testing.assert_close(found(rows), expected[torch.arange(4), places])
    assert backbone.net.model.embed_tokens.padding_idx is None and backbone.net.model.embed_tokens.weight[5].any()


@pytest.mark.parametrize("name", ["llama", "xlnet"])
def test_texts_are_read_as_by_the_librarys_tokenizer(name: str, tmp_path: Path) -> None:
    """XLNet's own, with its types and its padding; and one without a padding token, where padding changes nothing."""
    words = ["▁good", "▁film", "▁bad", "▁plot"]
    if name == "xlnet":
        special = ["<unk>", "<s>", "</s>", "<sep>", "<pad>", "<cls>", "<mask>", "<eop>", "<eod>"]
        XLNetTokenizer(vocab=[(word, 0.0) for word in special + words]).save_pretrained(tmp_path)
    else:
        plain = Tokenizer(WordLevel({"<unk>": 0} | {word[1:]: number for number, word in enumerate(words, 1)}, unk_token="<unk>"))
        plain.pre_tokenizer = Whitespace()
        PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(tmp_path)
    args = {key: value for key, value in small(name).items() if key != "pad_token_id"} | {"eos_token_id": 7}
    backbone = build_noisy(f"hf/{name}", args, (3, 16)).eval()
    pairs = [("good film", "bad"), ("plot", "good"), ("bad film bad plot", "plot")]
    rows = pairs if name == "xlnet" else [(first,) for first, _ in pairs]
    tokenizer = load_tokenizer(str(tmp_path))
    encoded = encode(tokenizer, rows, max_length=16)
    arrays = [torch.from_numpy(array) for array in (encoded.ids, encoded.types, encoded.lengths)]
    padding = padding_id(tokenizer)
    texts = Texts(*arrays, padding=padding, max_length=16, device=torch.device("cpu"))
    (inputs,) = texts.read([torch.arange(3)])
    assert inputs[:, 1].sum(1).tolist() == arrays[2].tolist() and len(set(arrays[2].tolist())) > 1
    with torch.no_grad():
        for row, found in zip(rows, backbone(inputs), strict=True):
            alone = tokenizer(*row, return_tensors="pt", return_token_type_ids=name == "xlnet")
            torch.testing.assert_close(found, backbone.net(**alone).logits[0], rtol=1e-4, atol=1e-5)
        if name == "xlnet":
            columns, length = map(list, zip(*rows, strict=True)), inputs.shape[2]
            own = tokenizer(*columns, padding="max_length", max_length=length, return_token_type_ids=True)
            assert own["token_type_ids"][0][-1] == 2 and own["attention_mask"][1][0] == 0
            library_says = backbone.net(**{key: torch.tensor(value) for key, value in own.items()}).logits
            torch.testing.assert_close(backbone(inputs), library_says, rtol=1e-5, atol=1e-6)
        else:
            assert tokenizer.pad_token is None and padding == 0


def section_of(backbone: Backbone) -> BackboneSection:
    assert backbone.rebuilds_as is not None
    name, args = backbone.rebuilds_as
    return BackboneSection(name=name, args=args)


@pytest.mark.parametrize("name", ["gpt2", "xlnet"])
def test_queued_texts_of_two_lengths_are_padded_to_the_longer(name: str) -> None:
    """Their ends are found by the mask, though what fills them up is not the network's padding id, and lies behind them."""
    backbone = build_noisy(f"hf/{name}", small(name) | {"pad_token_id": 3}, (3, LENGTH)).eval()
    long, short = texts(LENGTH, padding=3), texts(6, padding=3)
    with torch.no_grad():
        parts = [backbone.block(0, backbone.stem(rows)) for rows in (long, short)]
        joined = type(parts[0]).cat(parts)
        for index in (1, 2):
            joined = backbone.block(index, joined)
        expected = torch.cat([backbone(long), backbone(short)])
        torch.testing.assert_close(backbone.head(joined), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "funnel" else pytest.mark.thorough) for name in REFUSED])
def test_what_cannot_be_cut_is_refused_with_its_reason(name: str) -> None:
    sizes = {"n_layers": 2, "emb_dim": 32, "n_heads": 4, "d_model": 32, "d_inner": 48, "block_sizes": [1, 1]}
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    known = AutoConfig.for_model(name).to_dict()
    args = small(name) | {key: value for key, value in sizes.items() if key in known}
    with pytest.raises(EectlError, match=rf"^hf/{name} takes no exits: .*{REFUSED[name]}.*; types that take exits are bert.*$"):
        build_backbone(BackboneSection(name=f"hf/{name}", args=args), input_shape=(3, LENGTH), num_outputs=2)


def test_a_folders_older_keys_shape_the_network(tmp_path: Path) -> None:
    """A file of transformers 4 has the base of rotary positions outside of the key that transformers 5 reads; both are known."""
    config = small("llama") | {"model_type": "llama", "rope_theta": 123.0, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    backbone = build_backbone(BackboneSection(name=f"hf/{tmp_path}"), input_shape=(3, LENGTH), num_outputs=2)
    own = AutoConfig.from_pretrained(tmp_path, num_labels=2)
    torch.manual_seed(0)
    expected = AutoModelForSequenceClassification.from_config(own).eval()
    assert own.rope_parameters["rope_theta"] == 123.0
    rows = texts(LENGTH)
    assert torch.equal(backbone.eval()(rows), library(expected, rows))
    name, args = backbone.rebuilds_as
    assert name == "hf/llama" and str(tmp_path) not in json.dumps(args)


@pytest.mark.parametrize("way", ["pretrained", "weights"])
@pytest.mark.parametrize("name", SIX)
def test_an_encoder_without_a_head_is_loaded(name: str, way: str, tmp_path: Path) -> None:
    """Its names lack the library's prefix; only what belongs to the head is left as it was drawn."""
    torch.manual_seed(1)
    encoder = AutoModel.from_config(AutoConfig.for_model(name, **small(name)))
    encoder.save_pretrained(tmp_path)
    start = {"pretrained": True} if way == "pretrained" else {"weights": tmp_path / "model.safetensors"}
    backbone = build_backbone(BackboneSection(name=f"hf/{tmp_path}", **start), input_shape=(3, LENGTH), num_outputs=2)
    assert backbone.fresh and all(backbone.locate(key) == backbone.depth for key in backbone.fresh)
    own, prefix = backbone.net.state_dict(), f"{backbone.net.base_model_prefix}."
    kept = [key for key in own if key not in backbone.fresh]
    assert len(kept) >= 20 and all(torch.equal(own[key], encoder.state_dict()[key.removeprefix(prefix)]) for key in kept)


@pytest.mark.parametrize(
    "options",
    [
        {"auto_map": {"AutoModelForSequenceClassification": "code.Net"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        {"torch_dtype": "float16"},
    ],
)
def test_a_folder_says_sizes_and_not_what_runs(options: dict[str, object], tmp_path: Path) -> None:
    config = small("mpnet") | {"model_type": "mpnet"} | options
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = build_backbone(BackboneSection(name=f"hf/{tmp_path}"), input_shape=(3, LENGTH), num_outputs=2)
    assert not options.keys() & backbone.rebuilds_as[1].keys()
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}
    with pytest.raises(EectlError, match=r"^backbone\.args\..*: no such option"):
        build_backbone(BackboneSection(name="hf/mpnet", args=options), input_shape=(3, LENGTH), num_outputs=2)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("modernbrt", r"hf/modernbrt .*'modernbert'.*"),
        ("clip", r"hf/clip .*no text classifier.*"),
        ("gpt2", r"hf/gpt2 takes no exits: .*backbone\.args\.pad_token_id.*"),
    ],
)
def test_what_does_not_work_is_one_line(name: str, message: str) -> None:
    args = {key: value for key, value in small(name).items() if key != "pad_token_id"} if name == "gpt2" else {}
    with pytest.raises(EectlError, match=f"^{message}$"):
        build_backbone(BackboneSection(name=f"hf/{name}", args=args), input_shape=(3, LENGTH), num_outputs=2)


@pytest.mark.parametrize(
    ("name", "model_type"),
    [
        ("no-one/bert-base-uncased", "bert"),
        ("no-one/distilbert-base", "distilbert"),
        ("no-one/deberta-v3-small", "deberta-v2"),
        ("no-one/deberta-base", "deberta"),
        ("no-one/xlm-roberta-base", "xlm-roberta"),
        ("no-one/ModernBERT-base", "modernbert"),
        ("no-one/gemma-3-1b-pt", "gemma3_text"),
        ("no-one/Qwen3-0.6B", "qwen3"),
        ("no-one/Llama-3.2-1B", "llama"),
        ("bert/all-minilm", None),
    ],
)
def test_a_network_that_is_not_here_is_of_the_type_that_its_name_says(name: str, model_type: str | None) -> None:
    with pytest.raises(NotOnThisMachineError) as error:
        build_backbone(BackboneSection(name=f"hf/{name}"), input_shape=(3, LENGTH), num_outputs=2)
    assert error.value.model_type == model_type


@pytest.mark.parametrize("option", ["attention_window", "max_position_embeddings", "hidden_size", "num_hidden_layers"])
def test_sizes_that_fill_the_memory_are_refused(option: str) -> None:
    """A window of attention is no tensor of the network: texts are filled up to it."""
    args = small("longformer") | {option: 10**9}
    with pytest.raises(EectlError, match=rf"hf/longformer.*{option if option == 'attention_window' else ''}"):
        build_backbone(BackboneSection(name="hf/longformer", args=args), input_shape=(3, LENGTH), num_outputs=2)
