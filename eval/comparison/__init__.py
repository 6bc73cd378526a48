"""From sample folders over numbers with intervals to a verdict in words; people's votes count like a scorer."""
