"""Settings of the model: which one, in what precision, how long its sequences may be."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ModelSettings(BaseModel):
    """The `model` part of the YAML. Names are vLLM's where vLLM has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str = Field(
        min_length=1,
        description="A folder in Hugging Face's form, a .gguf file, or package:NAME for the one "
        ".gguf file inside an installed Python package.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Precision of weights and KV. auto: the folder's own; float32 for GGUF files, "
        "whose quantised values it keeps exactly.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of prompt and output together. Default: the model's own limit.",
    )
    load_format: Literal["auto", "safetensors", "gguf", "dummy"] = Field(
        default="auto",
        description="auto tells by the path. dummy fills random weights of a fixed seed from "
        "config.json alone, for measurements.",
    )
    served_model_name: str | None = Field(
        default=None,
        min_length=1,
        description="Name that clients ask for. Default: the last part of the path, without .gguf.",
    )
