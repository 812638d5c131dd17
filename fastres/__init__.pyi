from .api import fit as fit
from .config.schema import Config as Config
from .data.loaders.build import build_loader as build_loader
from .data.sources.arrays import arrays as arrays
from .data.sources.load import load_source as load_source
from .models.fuse import FusionReport as FusionReport
from .models.fuse import fuse as fuse
from .models.fuse import fusion_report as fusion_report
from .models.fuse import unfuse as unfuse
from .models.registry import build_model as build_model
from .runs.predicting import Predictor as Predictor
from .runs.predicting import load_run as load_run
from .training.cuda_graph import capture as capture
from .training.engine import resolve_engine as resolve_engine
from .training.evaluator import Evaluator as Evaluator
from .training.step import TrainStep as TrainStep

__version__: str
