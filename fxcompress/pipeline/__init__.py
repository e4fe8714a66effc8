"""The stages of a compilation in order, and what calls them: compile, plan, measure, sweep."""
