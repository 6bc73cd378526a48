"""What was trained, and the files that other programs load: run folders, checkpoints, LoRAs in every layout, model cards.

Public: run_folder.open_run, checkpoints.save_checkpoint, source, lora.Lora, algebra, kohya, diffusers_layout, inspection, card,
    hub.
May import: core, labels, models, settings.

| file | what it is |
|---|---|
| lora.py | a LoRA in memory: of a file's tensors, of the adapter that is being trained |
| algebra.py | another strength, another rank, several in one, the LoRA of a whole fine-tune |
| diffusers_layout.py, kohya.py | the two layouts of LoRA files |
| names.py | what a layer is called in diffusers and in the original code |
| reading.py | a LoRA file of these and other programs' layouts, read |
| run_folder.py, checkpoints.py, source.py | a run and what it keeps; what of it is exported |
| fusing.py | changes worked into a model's weights |
| portable_folder.py | a merged folder made fit for older programs |
| base_model.py | the base model that weights are for |
| header.py | the header of a file; files whose bytes depend on nothing but what is in them |
| inspection.py | what a file or a folder is; adapters.py, compatibility.py, conversion.py, v_prediction.py, provenance.py serve it |
| card.py | the model card; card_text.py says what is in it |
| hub.py | what goes to a model hub, and what arrived there |
"""

from dedpo_diffusion.weights.diffusers_layout import to_diffusers
from dedpo_diffusion.weights.kohya import to_kohya
from dedpo_diffusion.weights.lora import Lora, LoraLayer, from_parameters, to_parameters
from dedpo_diffusion.weights.reading import read_lora_file

__all__ = [
    "Lora", "LoraLayer", "from_parameters", "read_lora_file", "to_diffusers", "to_kohya",
    "to_parameters",
]  # fmt: skip
