"""The five routes. HTTP statuses and headers live in this package alone."""
