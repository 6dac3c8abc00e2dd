"""Publishing: model cards whose every number has a source, and pushing folders and models to the Hugging Face Hub."""

from .card import build_card, validate_card
from .card_facts import CardFacts, collect_facts
from .citations import Citation, card_numbers
from .folder import PreparedFolder, prepare_folder
from .licence import Licence
from .push import PushResult, push_folder, push_model, push_to_hub

__all__ = [
    "CardFacts",
    "Citation",
    "Licence",
    "PreparedFolder",
    "PushResult",
    "build_card",
    "card_numbers",
    "collect_facts",
    "prepare_folder",
    "push_folder",
    "push_model",
    "push_to_hub",
    "validate_card",
]
