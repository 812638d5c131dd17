from .registry import MODELS as MODELS
from .registry import build_model as build_model
from .registry import check_input_shape as check_input_shape
from .weights import load_weights as load_weights
from .weights import save_weights as save_weights
