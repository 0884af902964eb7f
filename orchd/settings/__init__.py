"""The settings, where they come from, and the token that opens the server."""
