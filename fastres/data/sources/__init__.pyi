from .load import SOURCES as SOURCES
from .load import load_source as load_source
from .source import Source as Source
from .source import Split as Split
from .source import hold_out as hold_out
