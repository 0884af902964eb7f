"""Who waits, who starts where, and what those that are refused are told. No HTTP, no model, no thread of its own."""
