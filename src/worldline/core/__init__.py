"""Ground floor: types, errors, seeds, clock, files and results. Imports no other subpackage, and no torch."""
