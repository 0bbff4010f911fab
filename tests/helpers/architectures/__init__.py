"""Architectures with the roles of their parameters as a person reads them off the source: the registry of the tests."""

from helpers.architectures.architecture import LANGUAGE, TOKENS, VOCABULARY, Architecture
from helpers.architectures.language import LANGUAGE_MODELS
from helpers.architectures.plain import PLAIN, Encoder
from helpers.architectures.vision import VISION_MODELS

__all__ = ["ARCHITECTURES", "LANGUAGE", "TOKENS", "VOCABULARY", "Architecture", "Encoder"]

ARCHITECTURES: dict[str, Architecture] = PLAIN | LANGUAGE_MODELS | VISION_MODELS
