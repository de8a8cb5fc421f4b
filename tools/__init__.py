"""Programs beside training: python -m tools.NAME --help says what each does."""
