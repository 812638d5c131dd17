from .compiled_variants import CompiledVariant, declared_variants
from .text_table import table

__all__ = ["CompiledVariant", "declared_variants", "table"]
