"""fastres trains residual networks: fused BatchNorm+ReLU kernels, CUDA graphs, an exact schedule."""

from fastres.utils import run_timer as run_timer  # first: it notes when the process started  # isort: skip
import lazy_loader as lazy

from fastres.utils.process import leave_while_importing as _leave_while_importing
from fastres.utils.version import __version__ as __version__

_leave_while_importing()
__getattr__, __dir__, __all__ = lazy.attach_stub(__name__, __file__)
