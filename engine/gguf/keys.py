"""Which keys of a GGUF file are used, change nothing, or are refused.

docs/gguf.md has the same tables, with reasons; a test compares them. `{arch}` is the value of
general.architecture, and `*` stands for any text. Every other key is refused by name.
"""

from collections.abc import Mapping
from fnmatch import fnmatchcase

from paceline.engine.gguf.metadata import Metadata, short
from paceline.errors import UnsupportedModelError

USED = (
    "general.alignment",
    "general.architecture",
    "split.count",
    "split.tensors.count",
    # The tokenizer judges its own keys.
    "tokenizer.*",
    "{arch}.attention.head_count",
    "{arch}.attention.head_count_kv",
    "{arch}.attention.key_length",
    "{arch}.attention.layer_norm_rms_epsilon",
    "{arch}.attention.scale",
    "{arch}.attention.sliding_window",
    "{arch}.attention.value_length",
    "{arch}.block_count",
    "{arch}.context_length",
    "{arch}.embedding_length",
    "{arch}.feed_forward_length",
    "{arch}.rope.dimension_count",
    "{arch}.rope.freq_base",
    "{arch}.rope.scale_linear",
    "{arch}.rope.scaling.attn_factor",
    "{arch}.rope.scaling.factor",
    "{arch}.rope.scaling.original_context_length",
    "{arch}.rope.scaling.type",
    "{arch}.rope.scaling.yarn_beta_fast",
    "{arch}.rope.scaling.yarn_beta_slow",
    "{arch}.vocab_size",
)

# Where the file comes from, how it was made, and what its authors recommend to clients.
HARMLESS = (
    "general.author",
    "general.base_model.*",
    "general.basename",
    "general.dataset.*",
    "general.datasets",
    "general.description",
    "general.doi",
    "general.file_type",
    "general.finetune",
    "general.languages",
    "general.license",
    "general.license.*",
    "general.name",
    "general.organization",
    "general.parameter_count",
    "general.quantized_by",
    "general.repo_url",
    "general.sampling.*",
    "general.size_label",
    "general.source.*",
    "general.tags",
    "general.url",
    "general.uuid",
    "general.version",
    "imatrix.*",
    "mradermacher.*",
    "quantize.imatrix.*",
    "split.no",
    "{arch}.rope.scaling.finetuned",
)

# Keys that would change the output, or the way in which tensors are stored, with any other value.
ONLY: Mapping[str, object] = {
    "general.quantization_version": 2,
    "general.type": "model",
    "{arch}.attention.causal": True,
    "{arch}.attention.clamp_kqv": 0.0,
    "{arch}.attention.max_alibi_bias": 0.0,
    "{arch}.attn_logit_softcapping": 0.0,
    "{arch}.embedding_scale": 1.0,
    "{arch}.expert_count": 0,
    "{arch}.expert_group_count": 0,
    "{arch}.expert_group_used_count": 0,
    "{arch}.expert_used_count": 0,
    "{arch}.final_logit_softcapping": 0.0,
    "{arch}.logit_scale": 1.0,
    "{arch}.nextn_predict_layers": 0,
    "{arch}.pooling_type": 0,
    "{arch}.residual_scale": 1.0,
    "{arch}.rope.scaling.yarn_attn_factor": 1.0,
    "{arch}.rope.scaling.yarn_ext_factor": 1.0,
    "{arch}.rope.scaling.yarn_log_multiplier": 0.0,
    "{arch}.tensor_data_layout": "Meta AI original pth",
    "{arch}.use_parallel_residual": False,
}


def check_keys(metadata: Metadata) -> None:
    """Refuse a part of a split file, and every key that is unknown or would change the output.

    Raises UnsupportedModelError naming the keys and their values.
    """
    _check_split(metadata)
    refused = [
        f"{key} = {short(value)}{_wanted(key, metadata)}"
        for key, value in sorted(metadata.values.items())
        if not _is_known(key, value, metadata.architecture)
    ]
    if refused:
        raise UnsupportedModelError(
            f"{metadata.path} says {', '.join(refused)}: not implemented for the architecture "
            f"{metadata.architecture}, and ignoring it could change the model's output. Choose "
            "another model, or convert it again without the key if it changes nothing."
        )


def _is_known(key: str, value: object, architecture: str) -> bool:
    if any(_matches(key, pattern, architecture) for pattern in (*USED, *HARMLESS)):
        return True
    wanted = _only(key, architecture)
    return wanted is not None and isinstance(value, int | float | str) and value == wanted


def _wanted(key: str, metadata: Metadata) -> str:
    wanted = _only(key, metadata.architecture)
    return "" if wanted is None else f" (only {wanted!r} is implemented)"


def _only(key: str, architecture: str) -> object:
    for pattern, wanted in ONLY.items():
        if _matches(key, pattern, architecture):
            return wanted
    return None


def _matches(key: str, pattern: str, architecture: str) -> bool:
    return fnmatchcase(key, pattern.replace("{arch}", architecture))


def _check_split(metadata: Metadata) -> None:
    count = metadata.values.get("split.count", 1)
    if isinstance(count, int) and count <= 1:
        return
    number = metadata.values.get("split.no", 0)
    raise UnsupportedModelError(
        f"{metadata.path} is one of the {count} files into which a model was split (split.count = "
        f"{count}, split.no = {number}), and parts are not read. Merge them with llama.cpp's tool: "
        "llama-gguf-split --merge FIRST-FILE MERGED.gguf, and set model.path to the merged file."
    )
