from . import resume as resume
from .environment import device_name as device_name
from .loading import load_run as load_run
from .loading import rebuild as rebuild
from .run_dir import RunDir as RunDir
from .training_log import TrainingLog as TrainingLog
