"""`ModelConfig` as a configuration of transformers: the same fields by the same names, and the names that its tools ask
for as aliases."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import PretrainedConfig

from dlcm_lightning.config.model import BoundaryConfig, ModelConfig, MupConfig


class DLCMConfig(PretrainedConfig):
    """Shapes and segmentation of a Dynamic Large Concept Model (arXiv 2512.24617), or of its dense baseline."""

    model_type = "dlcm"
    attribute_map = {  # noqa: RUF012 - transformers declares it so
        "hidden_size": "d_token", "num_attention_heads": "heads_token", "num_key_value_heads": "kv_heads_token",
        "intermediate_size": "ffn_token", "rms_norm_eps": "norm_epsilon"}

    def __init__(self, max_position_embeddings: int = 8192, tie_word_embeddings: bool = False, **fields: Any) -> None:
        """max_position_embeddings: tokens of the rows that the model was trained on. fields: those of `ModelConfig`,
        and what transformers keeps. ValueError: tied embeddings, or a model that cannot be."""
        self.tie_word_embeddings = tie_word_embeddings
        self.check_untied()
        for name, value in asdict(ModelConfig()).items():
            setattr(self, name, fields.pop(name, value))
        self.max_position_embeddings = max_position_embeddings
        shapes = self.model_config()
        fields.pop("num_hidden_layers", None)
        self.num_hidden_layers = shapes.decoder_layers + (
            shapes.encoder_layers + shapes.backbone_layers if shapes.kind == "dlcm" else 0)
        super().__init__(tie_word_embeddings=False, **fields)

    def check_untied(self) -> None:
        """ValueError: it asks for tied embeddings. A model asks again, for a keyword may have changed it."""
        if self.tie_word_embeddings:
            raise ValueError("tie_word_embeddings = True: embedding and unembedding of this model are two matrices; "
                             "leave it out, or set it to False")

    def model_config(self) -> ModelConfig:
        """ConfigError, a ValueError: a field that cannot be."""
        plain = {name: getattr(self, name) for name in asdict(ModelConfig())}
        parts = {"boundary": BoundaryConfig(**plain["boundary"]), "mup": MupConfig(**plain["mup"])}
        return ModelConfig(**(plain | parts))
