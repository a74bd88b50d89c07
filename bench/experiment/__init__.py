"""From a configuration to trials: schema, loading, axes, identities; computes nothing."""
