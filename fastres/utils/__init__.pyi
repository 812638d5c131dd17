from .progress import ProgressLine as ProgressLine
