"""Build transformers' classifiers of texts and of images, and refuse names, options and weights that do not work.

A name is a model type, a local folder or an id on the Hugging Face hub. Nothing is downloaded unless pretrained weights are asked
for, and no pickle is read. The adapters are in transformers_parts and, for all types that have none there, in transformers_tower
and transformers_images; tokenizers are read in the room data.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)
from transformers.utils import logging
from transformers.utils.hub import cached_file

from eectl.core.errors import EectlError, closest, lookup
from eectl.core.files import read_text
from eectl.core.json_files import parse_json
from eectl.models.adapters.args_and_weights import NotOnThisMachineError, check_names, first_names
from eectl.models.adapters.tower import CannotBeCutError
from eectl.models.adapters.transformers_images import image_tower
from eectl.models.adapters.transformers_parts import ADAPTERS, TextBackbone
from eectl.models.adapters.transformers_tower import TowerBackbone
from eectl.models.backbone import Backbone
from eectl.models.limits import MOST_TENSORS


@dataclass(frozen=True)
class _Kind:
    """A kind of the library's networks.

    Attributes:
        noun: what messages call one.
        types: the model types that have one.
        auto: the library's class that builds one.
        others: some types that take exits, for messages.
    """

    noun: str
    types: Mapping[str, Any]
    auto: Any
    others: str


@dataclass(frozen=True)
class _Unlike:
    """The tensors in which a network and its published weights differ."""

    missing: tuple[str, ...] = ()
    other_shapes: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()


def build(name: str, args: Mapping[str, Any], *, input_shape: Sequence[int], num_outputs: int, pretrained: bool) -> Backbone:
    """Build a sequence classifier, or an image classifier, of transformers'.

    `rebuilds_as` of the result is its model type with all options, so that a checkpoint needs neither a folder nor the hub.

    Args:
        name: a model type, a folder or an id on the hub, without `hf/`.
        args: changes of its configuration.
        input_shape: (3, tokens at most) of texts, (channels, height, width) of images.
        num_outputs: the number of logits.
        pretrained: whether the weights in the folder, or on the hub, are loaded.

    Raises:
        EectlError: for an unknown name, a model type that has no such classifier or cannot be cut, options it does not take,
            weights that are missing, not safetensors or another network's, texts that are longer than its positions, and images
            that it does not run on.
    """
    if name in CONFIG_MAPPING and pretrained:
        raise EectlError(
            f"backbone.pretrained: hf/{name} is a kind of network and has no weights of its own; name a folder with a "
            "config.json (hf/./FOLDER) or an id on the Hugging Face hub, or a file in backbone.weights"
        )
    kind = _IMAGES if len(input_shape) == 3 else _TEXTS
    given = {"model_type": name} if name in CONFIG_MAPPING else _read_config(name, kind, download=pretrained)
    model_type = given["model_type"]
    _check_type(name, model_type, kind)
    unlike = _Unlike()
    backbone: Backbone
    with _explained(name, args, kind), _quiet():
        if kind is _IMAGES:
            options, config = _image_options(name, given, args, input_shape)
        else:
            options = _options(name, given, args)
            config = AutoConfig.for_model(model_type, **options)
        config.num_labels = num_outputs
        config.architectures = []  # of two classifiers of one type the library builds the first
        if pretrained:
            net, unlike = _load(name, config, kind)
        else:
            net = kind.auto.from_config(config)
        backbone = image_tower(net, input_shape) if kind is _IMAGES else ADAPTERS.get(model_type, TowerBackbone)(net)
    backbone.name, backbone.rebuilds_as = f"hf/{name}", (f"hf/{model_type}", options)
    _check_match(backbone, unlike, model_type)
    backbone.fresh = tuple(key for key in backbone.net.state_dict() if key in {*unlike.missing, *unlike.other_shapes})
    limit = backbone.max_tokens if isinstance(backbone, TextBackbone) else None
    if limit is not None and input_shape[1] > limit:
        raise EectlError(
            f"data.max_length is {input_shape[1]}; {backbone.name} has positions for {limit} tokens; set it to {limit}"
        )
    return backbone


def check_rebuilds(name: str) -> None:
    """Raise EectlError unless a checkpoint's network `name`, without `hf/`, is a model type: no folder is read on its word."""
    lookup({**_TEXTS.types, **_IMAGES.types}, name, what="kind of network")


def option_names(name: str, *, download: bool) -> tuple[str, ...]:
    """Return the names of what a network's configuration says; one on the hub is read as by `build`."""
    either = replace(_TEXTS, types={**_TEXTS.types, **_IMAGES.types})
    model_type = name if name in CONFIG_MAPPING else _read_config(name, either, download=download)["model_type"]
    adapter = ADAPTERS.get(model_type)
    if adapter:
        return tuple(adapter.options)
    default = AutoConfig.for_model(model_type).to_dict()
    return _shaping(default[_VISION] if model_type in _IMAGES.types and isinstance(default.get(_VISION), dict) else default)


def _options(name: str, given: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the library's configuration, changed by one that was read and by `args`: only what shapes the network."""
    model_type = given["model_type"]
    aliases: Mapping[str, str] = CONFIG_MAPPING[model_type].attribute_map
    adapter = ADAPTERS.get(model_type)
    names = adapter.options if adapter else _shaping(AutoConfig.for_model(model_type).to_dict())
    check_names(f"hf/{name}", args, dict.fromkeys((*names, *aliases)))
    if adapter and given.get("position_embedding_type") not in (None, "absolute"):
        kind = given["position_embedding_type"]
        raise EectlError(f"hf/{name} has {kind} positions; eectl takes absolute ones, as transformers 5 does")
    changes = {aliases.get(key, key): value for key, value in args.items()}
    if adapter:
        shaping = {aliases.get(key, key): given[key] for key in (*aliases, *names) if key in given}
        whole = AutoConfig.for_model(**{"model_type": model_type} | shaping).to_dict() | changes
    else:  # the library's class knows the keys of older files, and what follows from others, as the kinds of all layers do
        shaping = {aliases.get(key, key): given[key] for key in given if key not in _NOT_SHAPING and not key.startswith("_")}
        _check_sizes(name, shaping | changes)
        whole = AutoConfig.for_model(**{"model_type": model_type} | shaping | changes).to_dict()
    return {key: whole[key] for key in names if key in whole}


def _image_options(
    name: str, given: Mapping[str, Any], args: Mapping[str, Any], input_shape: Sequence[int]
) -> tuple[dict[str, Any], Any]:
    """Return the options of an image classifier, as `_options` does, and the library's configuration.

    Of types with a configuration for images and one for texts they are those for images. What is read from no file takes images
    as the data have them.
    """
    model_type = given["model_type"]
    default = AutoConfig.for_model(model_type).to_dict()
    part = default.get(_VISION) if isinstance(default.get(_VISION), dict) else None
    kind = model_type if part is None else part["model_type"]
    read = given if part is None else given.get(_VISION, {})
    if not isinstance(read, dict):
        raise EectlError(f"hf/{name}: {_VISION} of its config.json is no configuration; name a folder that transformers saved")
    names = _shaping(default if part is None else part)
    aliases: Mapping[str, str] = CONFIG_MAPPING[kind].attribute_map
    check_names(f"hf/{name}", args, dict.fromkeys((*names, *aliases)))
    changes = {aliases.get(key, key): value for key, value in args.items()}
    if name in CONFIG_MAPPING:
        channels, height, width = input_shape
        sides = isinstance((default if part is None else part).get("image_size"), (list, tuple)) or height != width
        own = {"num_channels": channels, "image_size": [height, width] if sides else height}
        changes = {key: value for key, value in own.items() if key in names} | changes
    shaping = {aliases.get(key, key): read[key] for key in read if key not in _NOT_SHAPING and not key.startswith("_")}
    _check_sizes(name, shaping | changes)
    whole = AutoConfig.for_model(**{"model_type": kind} | shaping | changes).to_dict()
    options = {key: whole[key] for key in names if key in whole}
    made = AutoConfig.for_model(model_type, **(options if part is None else {_VISION: {**options, "model_type": kind}}))
    return options, made


def _shaping(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the keys of a configuration that shape the network; raises EectlError where they are those of several networks."""
    parts = [key for key, value in config.items() if isinstance(value, dict) and "model_type" in value]
    if parts:
        raise CannotBeCutError(f"its configuration has parts of their own ({', '.join(parts)})")
    return tuple(key for key in config if key not in _NOT_SHAPING and not key.startswith("_"))


def _check_sizes(name: str, options: Mapping[str, Any]) -> None:
    """Raise EectlError for sizes that no limit on a network's tensors bounds.

    A configuration lists all layers before there is one, and texts are filled up to windows that no tensor has.
    """
    for key, value in options.items():
        most = next((most for words, most in _MOST.items() if any(word in key for word in words.split())), None)
        sizes = value if isinstance(value, (list, tuple)) else [value]
        if most is not None and any(isinstance(size, (int, float)) and size > most for size in sizes):
            raise EectlError(f"hf/{name}: backbone.args.{key} is {value}; allowed are {most:,} at most")


def _check_type(name: str, model_type: str, kind: _Kind) -> None:
    """Raise EectlError for a model type that is none, or of which transformers has no classifier of this kind."""
    if model_type in kind.types:
        return
    what = f"has no {kind.noun}" if model_type in CONFIG_MAPPING else "does not know"
    raise EectlError(
        f"hf/{name} is of the type {model_type}, of which transformers {what}{closest(model_type, kind.types)}; {kind.others}"
    )


def _read_config(name: str, kind: _Kind, *, download: bool) -> dict[str, Any]:
    """Return the configuration in a folder or of a network on the hub: from the local cache, unless `download` is allowed.

    It is read as JSON, and by none of the library's classes, some of which run code that lies beside it.
    """
    folder = Path(name)
    if not folder.is_dir() and name.startswith((".", "/", "~")):
        raise EectlError(f"backbone.name: no folder {name}; hf/./FOLDER is a folder with a config.json")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise EectlError(f"backbone.name: the folder {name} has no config.json, so it is not a network that transformers saved")
    path = folder / "config.json" if folder.is_dir() else _config_on_hub(name, kind, download=download)
    config = parse_json(read_text(path), where=path)
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(model_type, str):
        raise EectlError(f"{path}: transformers cannot read it (it names no model_type); name a folder that transformers saved")
    return dict(config)


def _config_on_hub(name: str, kind: _Kind, *, download: bool) -> Path:
    """Return where the configuration of a network on the hub lies in the library's cache, downloaded where that is allowed."""
    try:
        with _quiet():
            return Path(str(cached_file(name, "config.json", local_files_only=not download)))
    except (OSError, ValueError) as error:
        if download:
            raise EectlError(f"hf/{name} cannot be downloaded ({_reason(error)}); a local folder is hf/./FOLDER") from error
        raise NotOnThisMachineError(
            f"hf/{name} is not a model type{closest(name, kind.types)}, not a folder and not in the local cache; "
            f"{kind.others}; --pretrained downloads from the Hugging Face hub, a folder is hf/./FOLDER",
            model_type=_type_in(name, kind),
        ) from error


def _type_in(name: str, kind: _Kind) -> str | None:
    """Return the model type with which an id on the hub begins, such as `gemma3_text` of `google/gemma-3-1b-pt`; else None."""
    title = _bare(name.rpartition("/")[2])
    types = {_bare(each.removesuffix("_text")): each for each in kind.types} | _OTHER_NAMES
    longest = max((bare for bare in types if title.startswith(bare)), key=len, default=None)
    return None if longest is None else types[longest]


def _bare(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _load(name: str, config: Any, kind: _Kind) -> tuple[Any, _Unlike]:
    """Return the network with its published weights in float32, and where these differ from it."""
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickled = "pytorch_model.bin alone, a pickle, which eectl does not read" if any(folder.glob("*.bin")) else "no weights"
        raise EectlError(f"backbone.pretrained: the folder {name} has {pickled}; save the network there as model.safetensors")
    if (folder / "adapter_config.json").exists():
        raise EectlError(f"backbone.pretrained: the folder {name} has adapters for another network; merge and save it as a whole")
    try:
        with _quiet():
            net, info = kind.auto.from_pretrained(
                name,
                config=config,
                local_files_only=folder.is_dir(),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (OSError, SafetensorError) as error:
        raise EectlError(
            f"the weights of hf/{name} cannot be read ({_reason(error)}); eectl takes safetensors, from the hub, a folder or "
            "backbone.weights"
        ) from error
    missing, shapes = set(info["missing_keys"]), {key for key, *_ in info["mismatched_keys"]}
    no, other = (tuple(key for key in net.state_dict() if key in keys) for keys in (missing, shapes))
    return net.float(), _Unlike(no, other, tuple(sorted(info["unexpected_keys"])))


def _check_match(backbone: Backbone, unlike: _Unlike, model_type: str) -> None:
    """Raise EectlError where weights left more of the network freshly drawn than its head."""
    no, shapes = (
        [key for key in keys if backbone.locate(key) != backbone.depth] for keys in (unlike.missing, unlike.other_shapes)
    )
    if no or shapes:
        count = len(backbone.net.state_dict())
        there = count - len(unlike.missing) - len(unlike.other_shapes)
        faults = {"no": no, "of another shape": shapes, "unexpected": unlike.unexpected}
        listed = "; ".join(f"{what} {first_names(keys)}" for what, keys in faults.items() if keys)
        raise EectlError(
            f"backbone.pretrained: the weights of {backbone.name} are not those of {model_type} with these backbone.args "
            f"({there} of its {count} tensors are there): {listed}"
        )


@contextlib.contextmanager
def _explained(name: str, args: Mapping[str, Any], kind: _Kind) -> Iterator[None]:
    """Turn what transformers raises for options that do not go together into an EectlError."""
    try:
        yield
    except CannotBeCutError as error:
        raise EectlError(f"hf/{name} takes no exits: {error}; {kind.others}") from error
    except (
        StrictDataclassError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        given = f" with {dict(args)}" if args else ""
        raise EectlError(f"hf/{name} cannot be built{given}: {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' warnings and progress bars; what weights leave freshly drawn is in `backbone.fresh`."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text.partition(". ")[0].rstrip(".") or type(error).__name__


_MOST = {"layer depth repeat": MOST_TENSORS, "window chunk block stride rate landmark": 2**17}
"""The most that options with one of these words in their names may be; published networks take 2¹⁷ tokens at most."""
_TEXTS = _Kind(
    "text classifier",
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForSequenceClassification,
    "types that take exits are bert, roberta, modernbert, mpnet, gpt2, llama, qwen3 and their like",
)
_IMAGES = _Kind(
    "image classifier",
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    AutoModelForImageClassification,
    "types that take exits are vit, deit, beit, dinov2, siglip, swin, convnext, resnet and their like",
)
_VISION = "vision_config"
_OTHER_NAMES = {"debertav3": "deberta-v2"}
"""Names of networks that are published as another type than they say."""

_LABELS_AND_FILES = """architectures auto_map dtype finetuning_task id2label label2id model_type name_or_path num_labels prefix
    problem_type task_specific_params tokenizer_class torch_dtype transformers_version"""
_GENERATION = """bos_token_id decoder_start_token_id forced_bos_token_id forced_eos_token_id is_decoder
    is_encoder_decoder sep_token_id tie_encoder_decoder use_cache"""
_WAYS_TO_RUN = """attn_implementation chunk_size_feed_forward experts_implementation output_attentions output_hidden_states
    quantization_config return_dict torchscript trust_remote_code use_bfloat16 use_return_dict
    out_features out_indices stage_names"""
_NOT_SHAPING = frozenset(" ".join((_LABELS_AND_FILES, _GENERATION, _WAYS_TO_RUN)).split())
"""The keys of a configuration that do not shape the network, or would run what a file names."""
