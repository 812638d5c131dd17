from .models.fuse import FusionReport as FusionReport
from .models.fuse import fuse as fuse
from .models.fuse import fusion_report as fusion_report
from .models.fuse import unfuse as unfuse
from .models.registry import build_model as build_model

__version__: str
