"""Many runs of a study, and what they say."""
