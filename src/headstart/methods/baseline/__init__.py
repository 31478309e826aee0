"""Plain ways that every other method has to beat: they change nothing, or only the plan."""
