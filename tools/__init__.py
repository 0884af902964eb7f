"""What the project runs on itself; no part of what is installed."""
