"""Settings: of training runs (:class:`Config`) and of studies (:class:`StudyConfig`).

:mod:`~jaxmoo.config.schema` says how settings are declared, checked and documented,
:mod:`~jaxmoo.config.reading` how they are read from YAML.
"""

from jaxmoo.config.data_section import is_date
from jaxmoo.config.lora_section import lora_of
from jaxmoo.config.study_config import MeasureConfig, StudyConfig, load_study
from jaxmoo.config.training import (
    ColumnsConfig,
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ResolveConfig,
    SamplingConfig,
    TrainConfig,
    dated,
    differences,
    differences_from_yaml,
    load_config,
    to_yaml,
    validate,
)

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "LoraConfig",
    "MeasureConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ResolveConfig",
    "SamplingConfig",
    "StudyConfig",
    "TrainConfig",
    "dated",
    "differences",
    "differences_from_yaml",
    "is_date",
    "load_config",
    "load_study",
    "lora_of",
    "to_yaml",
    "validate",
]
