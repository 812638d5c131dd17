from .models.registry import build_model as build_model

__version__: str
