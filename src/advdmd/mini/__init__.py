"""The miniature: a drawn world with an exact checker, its suites, teachers and training data."""
