"""orchd and other llama.cpp servers on the same work, side by side: ``python -m benchmarks.compare``.

| file | what it is |
| --- | --- |
| `stats.py` | the formulae: percentiles, gaps, paired ratios, targets; pure |
| `prompts.py` | prompts of so many tokens, from a seed |
| `drivers.py` | how each server is started and spoken to |
| `servers.py` | one server process, from its start to its exit |
| `load.py` | the load client: the same reading loop for every server |
| `workloads.py` | the scenarios and their targets |
| `conversations.py` | those in which prompts come back, or meet other work |
| `setup.py` | the models and this machine |
| `profile.py` | where orchd's Python time goes, by py-spy |
| `report.py`, `plots.py` | JSON, tables, docs |
"""
