"""What the owner may set, where it comes from, and who may come in."""
