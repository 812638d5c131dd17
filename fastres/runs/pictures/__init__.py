"""Pictures of runs, and the report that shows them: curves, confusion matrices, and the style of every picture."""
