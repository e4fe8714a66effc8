"""From YAML to validated rules that remember where they stand."""
