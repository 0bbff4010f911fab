"""Architectures with the roles of their parameters as a person reads them off the source: the registry of the tests."""

from architectures.architecture import LANGUAGE, TOKENS, VOCABULARY, Architecture
from architectures.language import LANGUAGE_MODELS
from architectures.plain import PLAIN, Encoder
from architectures.vision import VISION_MODELS

__all__ = ["ARCHITECTURES", "LANGUAGE", "TOKENS", "VOCABULARY", "Architecture", "Encoder"]

ARCHITECTURES: dict[str, Architecture] = PLAIN | LANGUAGE_MODELS | VISION_MODELS
