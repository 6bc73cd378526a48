"""LoRAs and checkpoints <-> the files that other programs load.

| file | what it is |
|---|---|
| lora.py | a LoRA in memory |
| algebra.py | another strength, another rank, several in one, the LoRA of a whole fine-tune |
| diffusers_layout.py | the layout of diffusers |
"""

from .diffusers_layout import diffusers_lora, read_lora, read_metadata, save_lora
from .lora import Lora, LoraLayer

__all__ = ["Lora", "LoraLayer", "diffusers_lora", "read_lora", "read_metadata", "save_lora"]
