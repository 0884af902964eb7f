"""A bridge in a process of its own: the OpenAI API on one side, a client of orchd's routes on the other."""
