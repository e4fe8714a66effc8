"""From rules and a recorded graph to matches and explanations."""
