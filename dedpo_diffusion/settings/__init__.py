"""The configuration of every stage, one dataclass each, and nothing else.

Field descriptions are the command line's help. Paths are relative to the working folder.

Public: TrainSettings, MergeSettings, LabelSettings and the others, one a stage.
May import: core.
"""

from __future__ import annotations

from dedpo_diffusion.settings.align import AlignSettings, QuickstartSettings
from dedpo_diffusion.settings.data import CacheSettings, IngestSettings, PairsSettings, ProposeSettings, ValidateSettings, VoteSettings
from dedpo_diffusion.settings.engine import RaySettings
from dedpo_diffusion.settings.evaluation import CompareSettings, SampleSettings, ScoreSettings
from dedpo_diffusion.settings.labelling import (
    CalibrateSettings,
    LabelSettings,
    MergeSettings,
    SelfTrainingSettings,
    ServerSettings,
    VlmSettings,
)
from dedpo_diffusion.settings.training import (
    DataSettings,
    ExportSettings,
    InspectSettings,
    LoopSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimSettings,
    TrainSettings,
    ValidationSettings,
)

__all__ = [
    "AlignSettings",
    "CacheSettings",
    "CalibrateSettings",
    "CompareSettings",
    "DataSettings",
    "ExportSettings",
    "IngestSettings",
    "InspectSettings",
    "LabelSettings",
    "LoopSettings",
    "LoraSettings",
    "MergeSettings",
    "ObjectiveSettings",
    "OptimSettings",
    "PairsSettings",
    "ProposeSettings",
    "QuickstartSettings",
    "RaySettings",
    "SampleSettings",
    "ScoreSettings",
    "SelfTrainingSettings",
    "ServerSettings",
    "TrainSettings",
    "ValidateSettings",
    "ValidationSettings",
    "VlmSettings",
    "VoteSettings",
]
