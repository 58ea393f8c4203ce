"""The steps from one version's schema to the next."""
