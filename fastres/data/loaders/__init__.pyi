from .build import LOADERS as LOADERS
from .build import Loader as Loader
from .build import build_loader as build_loader
