"""orchd and other llama.cpp servers on the same work, side by side: ``python -m benchmarks.compare``.

| file | what it is |
| --- | --- |
| `stats.py` | the formulae: percentiles, gaps, paired ratios, targets; pure |
| `prompts.py` | prompts of so many tokens, from a seed |
| `drivers.py` | how each server is started and spoken to |
| `servers.py` | one server process, from its start to its exit |
| `load.py` | the load client: the same reading loop for every server |
| `scenarios.py` | the table's rows: peers and targets |
| `workloads.py` | what is asked in each of them |
| `conversations.py` | those in which prompts come back, or meet other work |
| `setup.py` | the models and this machine |
| `profile.py` | where orchd's Python time goes, by py-spy |
| `report.py`, `plots.py` | JSON, tables, docs |
"""
