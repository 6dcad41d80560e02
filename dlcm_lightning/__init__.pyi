"""What type checkers see: __init__.py imports none of these before it is asked."""

from dlcm_lightning.compose import load_config as load_config
from dlcm_lightning.export.portable import load_model as load_model
from dlcm_lightning.training.contract import trainer_arguments as trainer_arguments
from dlcm_lightning.training.datamodule import PretrainData as PretrainData
from dlcm_lightning.training.module import PretrainModule as PretrainModule
from dlcm_lightning.training.run import pretrain as pretrain

__version__: str
