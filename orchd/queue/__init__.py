"""Which tasks wait, which start and where, and what refused clients are told. No HTTP, no model, no thread."""
