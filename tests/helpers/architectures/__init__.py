"""Architectures with the roles of their parameters as a person reads them off the source: the registry of the tests."""

from helpers.architectures.architecture import LANGUAGE, TOKENS, VOCABULARY, Architecture
from helpers.architectures.language import LANGUAGE_MODELS
from helpers.architectures.plain import PLAIN, Encoder
from helpers.architectures.vision import VISION_MODELS

__all__ = ["ARCHITECTURES", "LANGUAGE", "OWN_CONSTANTS", "TOKENS", "VOCABULARY", "Architecture", "Encoder"]

ARCHITECTURES: dict[str, Architecture] = PLAIN | LANGUAGE_MODELS | VISION_MODELS

OWN_CONSTANTS = {"gemma2": "embed_tokens", "tied t5": "shared"}
"""Those with a constant of their own that depends on the shape, and the parameter that it multiplies."""
