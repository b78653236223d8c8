"""How often an audit is wrong, measured on models that were not used to choose its settings."""
